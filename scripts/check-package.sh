#!/usr/bin/env bash
#
# Installs the Debian package in a clean Debian and moves a package of data with its worker: a dependency that the package
# does not declare would be missing there.
#
#   scripts/check-package.sh [FILE.deb]    an existing package; without it, scripts/package.sh makes one
#
#   SUITE=bookworm  MIRROR=http://deb.debian.org/debian
#   BASE=/path      a Debian made by debootstrap, which is copied; without it a new one is made (two minutes)
#   BBCP=/path      the bbcp of the clean Debian; by default the test double, which has to be built
#
# Needs root (chroot), debootstrap, and access to the mirror; runs lintian if it is installed. The servers are private, see
# scripts/lib/services.sh, unless TEST_AMQP_URL and TEST_REDIS_URL are set. The script removes everything at its end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh
# shellcheck source=scripts/lib/topology.sh
. scripts/lib/topology.sh

((EUID == 0)) || die "this needs root, for chroot" "sudo scripts/check-package.sh"
command -v debootstrap >/dev/null || die "there is no debootstrap" "apt-get install debootstrap"
run_begin

package=${1:-}
[[ -n $package ]] || package=$(scripts/package.sh "$RUN_DIR")
bbcp=${BBCP:-$(target_dir)/debug/bbcp}
[[ -x $bbcp ]] || die "there is no $bbcp" "cargo build --package bbcp-double, or set BBCP"

if command -v lintian >/dev/null; then
  say "== lintian"
  run lintian --allow-root --fail-on error,warning "$package" || die "lintian reports errors"
fi

say "== a clean Debian"
root=$RUN_DIR/root
if [[ -n ${BASE:-} ]]; then
  cp -a "$BASE" "$root"
else
  run debootstrap --variant=minbase "${SUITE:-bookworm}" "$root" "${MIRROR:-http://deb.debian.org/debian}" >"$RUN_DIR/debootstrap.log" ||
    die "debootstrap failed" "$(tail -n 3 "$RUN_DIR/debootstrap.log")"
fi
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cp /etc/resolv.conf "$root/etc/resolv.conf"
install -D --mode 755 "$bbcp" "$root/usr/local/bin/bbcp"

# In a separate mount namespace, so that the mount of /proc ends with the command.
inside() {
  # shellcheck disable=SC2016 # the inner shell's
  unshare --mount -- sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"' "$root" "$@"
}
as_service() { inside setpriv --reuid ccat-transfer --regid ccat-transfer --init-groups env --chdir=/var/lib/ccat-transfer HOME=/var/lib/ccat-transfer "${environment[@]}" "$@"; }

say "== install $(basename "$package")"
cp "$package" "$root/tmp/ccat-transfer.deb"
inside apt-get -q update >"$RUN_DIR/apt.log"
inside apt-get -q -y install --no-install-recommends /tmp/ccat-transfer.deb >>"$RUN_DIR/apt.log" 2>&1 ||
  die "the package cannot be installed" "$(tail -n 20 "$RUN_DIR/apt.log")"
inside ccat-transfer --version
inside sh -ec '
  id ccat-transfer
  test "$(stat -c "%a %U %G" /etc/ccat-transfer/ccat-transfer.env)" = "640 root ccat-transfer"
  test "$(stat -c "%a %U" /var/lib/ccat-transfer)" = "750 ccat-transfer"
  test "$(stat -c "%a %U" /etc/logrotate.d/ccat-transfer)" = "644 root"
  systemd-analyze --man=no verify /lib/systemd/system/ccat-transfer-worker@.service /lib/systemd/system/ccat-transfer-manager.service
  ccat-transfer --config /etc/ccat-transfer/ccat-transfer.toml config check
  dpkg --verify ccat-transfer'

say "== a worker, as the unit starts it"
[[ -n ${TEST_AMQP_URL:-} && -n ${TEST_REDIS_URL:-} ]] || start_services rabbitmq redis
free_port
listen=127.0.0.1:$PORT queue=check_$RANDOM$RANDOM
environment=(
  "CCAT_DATA_TRANSFER_CONFIG=/etc/ccat-transfer/ccat-transfer.toml" "CCAT_DATA_TRANSFER_HTTP__LISTEN=$listen"
  "CELERY_BROKER_URL=$TEST_AMQP_URL" "CELERY_RESULT_BACKEND=$TEST_REDIS_URL"
  CCAT_OPS_DB_DATABASE_TYPE=sqlite CCAT_OPS_DB_DATABASE_SQLITE_DATABASE=/var/lib/ccat-transfer/ops.sqlite
  "CCAT_DATA_TRANSFER_TRANSFER__QUEUE_PREFIX=$queue." CCAT_DATA_TRANSFER_TRANSFER__FREE_SPACE_MARGIN=0
)
inside install -d -o ccat-transfer /data /data/here /data/there
head -c 5000000 /dev/urandom >"$root/data/here/night.tar"
{
  site here Here here /data/here
  site there There there /data/there
  route here there
} >"$root/data/topology.toml"
as_service ccat-transfer db migrate
as_service ccat-transfer db seed /data/topology.toml
# `as_service` is a function of this shell, so the process of the function is started and later stopped.
spawn worker as_service ccat-transfer worker --wait-for=30 --site here --hostname check@%h
worker=$SPAWNED_PID
ready() { [[ $(curl -s -o /dev/null -w '%{http_code}' "http://$listen/readyz") == 200 ]]; }
AWAIT_PID=$worker AWAIT_LOG=$RUN_DIR/worker.log await 60 "the worker is not ready" ready
as_service ccat-transfer transfers create --package night.tar --from here/buffer --to there/buffer
as_service ccat-transfer manager --once
arrived() { cmp -s "$root/data/here/night.tar" "$root/data/there/night.tar"; }
AWAIT_PID=$worker AWAIT_LOG=$RUN_DIR/worker.log await 60 "the package did not arrive" arrived
counted() { curl -s "http://$listen/metrics" | grep -qE '^ccat_transfer_bytes_total\{destination="there",origin="here"\} 5000000$'; }
await 20 "the bytes were not counted" counted
# The worker caches the counts of the table for 15 s.
in_table() { curl -s "http://$listen/metrics" | grep -qxF 'ccat_transfer_transfers{status="COMPLETED"} 1'; }
await 40 "the table was not counted" in_table

say "== the end"
# Stops the process group: the namespace's shell has become the worker by exec.
kill -TERM -- "-$worker"
gone() { ! kill -0 -- "-$worker" 2>/dev/null; }
await 30 "the worker did not end" gone
grep -q '"worker stopped"' "$RUN_DIR/worker.log" || die "the worker did not stop cleanly" "$(tail -n 5 "$RUN_DIR/worker.log")"
inside apt-get -q -y purge ccat-transfer >>"$RUN_DIR/apt.log" 2>&1 || die "the package cannot be removed" "$(tail -n 20 "$RUN_DIR/apt.log")"
left=$(cd "$root" && find etc usr lib -name '*ccat-transfer*' ! -path '*/proc/*')
[[ -z $left ]] || die "left by the package: $left"
say "check-package.sh: installed, moved a package of data, removed"
