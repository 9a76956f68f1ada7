#!/usr/bin/env bash
#
# Runs scripts/test.sh in a clean Debian 13: its Redis, RabbitMQ, PostgreSQL, OpenSSH and Python are newer than those of
# Debian 12. The script tests the last commit, not changed files.
#
#   scripts/check-debian13.sh [COMMAND…]    a command in the copy of the repository, instead of scripts/test.sh
#
#   SUITE=trixie  MIRROR=http://deb.debian.org/debian
#   BASE=/path    a Debian made by debootstrap, which is copied; without it a new one is made (two minutes)
#   ROOT=/path    directory of the clean Debian, kept at the end, so that a second run is shorter
#
# Needs root (chroot, namespaces), debootstrap, access to the mirror, the Rust toolchain of rustup, and 12 GB of disk space.
# The script removes everything at its end, unless ROOT is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

((EUID == 0)) || die "this needs root, for chroot" "sudo scripts/check-debian13.sh"
command -v debootstrap >/dev/null || die "there is no debootstrap" "apt-get install debootstrap"
rustup=${RUSTUP_HOME:-$HOME/.rustup} cargo=${CARGO_HOME:-$HOME/.cargo}
[[ -x $cargo/bin/cargo && -d $rustup/toolchains ]] || die "there is no Rust toolchain of rustup" "Install it: https://rustup.rs"
run_begin

root=$(realpath -m "${ROOT:-$RUN_DIR/root}")
made=$root/made-by-check-debian13 # nothing is changed in a directory without this file
if [[ ! -e $made ]]; then
  [[ ! -e $root || -z $(ls -A "$root") ]] || die "$root was not made by this script" "Remove it, or set ROOT to another path."
  say "== a clean Debian"
  if [[ -n ${BASE:-} ]]; then
    cp -a "$BASE" "$root"
  else
    run debootstrap --variant=minbase --include=git,curl,ca-certificates,gcc,libc6-dev,sudo \
      "${SUITE:-trixie}" "$root" "${MIRROR:-http://deb.debian.org/debian}" >"$RUN_DIR/debootstrap.log" ||
      die "debootstrap failed" "$(tail -n 3 "$RUN_DIR/debootstrap.log")"
  fi
  touch "$made"
fi
cp /etc/resolv.conf "$root/etc/resolv.conf"
note "$(. "$root/etc/os-release" && printf '%s' "$PRETTY_NAME") in $root"

say "== the last commit: $(git log -1 --format='%h %s')"
rm -rf "$root/work"
git clone -q --no-hardlinks . "$root/work"
# The toolchain of this machine, and the sources of dependencies that it has fetched already.
mkdir -p "$root/rust/rustup" "$root/rust/cargo"
cp -au "$rustup/." "$root/rust/rustup"
for part in bin registry git; do
  if [[ -e $cargo/$part ]]; then cp -au "$cargo/$part" "$root/rust/cargo"; fi
done
# The clean Debian reaches the network as this machine does.
network='(CARGO|PIP|SSL|GIT|CURL|REQUESTS)_[A-Z_]*|[A-Za-z]*_(proxy|PROXY)'
for file in /etc/pip.conf "$cargo/config.toml" /etc/ssl/certs/ca-certificates.crt; do
  if [[ -f $file ]]; then install -D --mode 644 "$file" "$root${file/#$cargo//rust/cargo}"; fi
done

# In namespaces of its own, so that mounts and processes end with the command. The root directory is a mount point, because
# namespaces inside need one.
inside() {
  # shellcheck disable=SC2016 # the inner shell's
  unshare --mount --pid --fork --kill-child -- sh -c '
    mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount -t tmpfs tmpfs "$0/dev/shm" &&
    exec chroot "$0" env -i HOME=/root LC_ALL=C.UTF-8 TERM=dumb CARGO_HOME=/rust/cargo CARGO_TARGET_DIR=/target RUSTUP_HOME=/rust/rustup \
      PATH=/rust/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"' "$root" "$@"
}

say "== ${*:-scripts/test.sh}"
variables=()
while IFS= read -r name; do variables+=("$name=${!name}"); done < <(compgen -e | grep -Ex "$network|CI|KEEP_RUN_DIR|[A-Z_]*_(TRANSFERS|SEED|ROUNDS|STEPS|SECONDS)" |
  grep -vx 'CARGO_HOME\|CARGO_TARGET_DIR' || true)
# shellcheck disable=SC2016 # the inner shell's
run inside env "${variables[@]}" sh -c 'cd /work && exec "$@"' sh "${@:-scripts/test.sh}" || die "it fails on Debian 13" "See above."
say "check-debian13.sh: ok"
