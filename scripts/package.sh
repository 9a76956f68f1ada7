#!/usr/bin/env bash
#
# Makes a Debian package of the program, with its units, manual pages, completions and examples of settings.
#
#   scripts/package.sh [DIRECTORY]      the package goes there; by default to target/debian. Prints its path.
#
#   BINARY=/path    package this program instead of building one: for tests
#   REVISION=1      Debian's revision
#   COMPRESSION=xz  of the package, see dpkg-deb(1)
#
# Needs dpkg-deb and, to build the program, Rust. tests/python/test_packaging.py checks the package;
# scripts/check-package.sh installs it in a clean Debian.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-target/debian}
say() { printf '%s\n' "$*" >&2; }

if [[ -z ${BINARY:-} ]]; then
  say "building the program"
  BINARY=$(cargo build --locked --release --package ccat-transfer --bin ccat-transfer --message-format json-render-diagnostics |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
fi
[[ -x $BINARY ]] || { say "error: there is no program $BINARY"; exit 1; }

version=$("$BINARY" --version | awk '{print $2}')-${REVISION:-1}
architecture=$(dpkg --print-architecture)
# The dependency on libc follows from the newest symbol that the program uses, not from the build machine.
libc=$(grep -aoE 'GLIBC_2\.[0-9]+' "$BINARY" | sort -uV | tail -n 1)
maintainer=${MAINTAINER:-$(git log -1 --format='%an <%ae>' 2>/dev/null || echo 'ccat-transfer <root@localhost>')}
# The same commit gives the same package.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
put() { install -D --mode "$1" "$2" "$root/$3"; }

put 755 "$BINARY" usr/bin/ccat-transfer
strip --strip-unneeded "$root/usr/bin/ccat-transfer"
put 644 packaging/systemd/ccat-transfer-worker@.service lib/systemd/system/ccat-transfer-worker@.service
put 644 packaging/systemd/ccat-transfer-manager.service lib/systemd/system/ccat-transfer-manager.service
put 644 packaging/systemd/ccat-transfer.sysusers usr/lib/sysusers.d/ccat-transfer.conf
put 644 packaging/debian/ccat-transfer.toml etc/ccat-transfer/ccat-transfer.toml
put 640 packaging/debian/ccat-transfer.env etc/ccat-transfer/ccat-transfer.env
put 644 packaging/debian/manager.env etc/ccat-transfer/manager.env
put 644 packaging/debian/ccat-transfer.logrotate etc/logrotate.d/ccat-transfer

"$BINARY" man "$root/usr/share/man/man1"
gzip --best --no-name "$root"/usr/share/man/man1/*.1
for shell in bash:bash-completion/completions/ccat-transfer zsh:zsh/vendor-completions/_ccat-transfer \
  fish:fish/vendor_completions.d/ccat-transfer.fish; do
  "$BINARY" completions "${shell%%:*}" >"$root/completion"
  put 644 "$root/completion" "usr/share/${shell#*:}"
done
rm "$root/completion"

doc=usr/share/doc/ccat-transfer
put 644 packaging/debian/copyright $doc/copyright
put 644 packaging/debian/lintian-overrides usr/share/lintian/overrides/ccat-transfer
put 644 packaging/debian/worker-example.env $doc/examples/worker-NAME.env
put 644 packaging/grafana/ccat-transfer.json $doc/examples/grafana-ccat-transfer.json
put 644 config.default.toml $doc/examples/config.default.toml
{
  printf 'ccat-transfer (%s) unstable; urgency=medium\n\n  * See the history of the project.\n\n' "$version"
  printf ' -- %s  %s\n' "$maintainer" "$(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")"
} | gzip --best --no-name >"$root/$doc/changelog.Debian.gz"
chmod 644 "$root/$doc/changelog.Debian.gz"

mkdir "$root/DEBIAN"
printf '/etc/%s\n' ccat-transfer/{ccat-transfer.toml,ccat-transfer.env,manager.env} logrotate.d/ccat-transfer >"$root/DEBIAN/conffiles"
install --mode 755 packaging/debian/{postinst,prerm,postrm} "$root/DEBIAN/"
cat >"$root/DEBIAN/control" <<END
Package: ccat-transfer
Version: $version
Architecture: $architecture
Maintainer: $maintainer
Installed-Size: $(du --summarize --apparent-size --block-size=1K "$root" | cut -f1)
Depends: libc6 (>= ${libc#GLIBC_}), libgcc-s1, ca-certificates, openssh-client, procps, systemd | systemd-standalone-sysusers
Suggests: logrotate, rabbitmq-server, postgresql, redis-server
Section: net
Priority: optional
Description: worker and manager that move CCAT's data packages with bbcp
 A Celery-compatible worker and a manager that take over the transfer stage of
 the data transfer system of the CCAT observatory: packages are copied from
 site to site by bbcp, verified, and never lost or copied twice at once.
 .
 bbcp itself is not in Debian and has to be installed on both ends of a link.
END
(cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
chmod 644 "$root"/DEBIAN/{control,conffiles,md5sums}

mkdir -p "$out"
dpkg-deb --root-owner-group -Z"${COMPRESSION:-xz}" --build "$root" "$out" >&2
printf '%s\n' "$(cd "$out" && pwd)/ccat-transfer_${version}_${architecture}.deb"
