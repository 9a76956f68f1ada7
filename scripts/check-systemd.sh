#!/usr/bin/env bash
#
# Boots a Debian whose first process is a real systemd, installs the package there as in docs/deployment.md, and checks the
# units: readiness, and a reload, stop, freeze, kill, upgrade, reboot and removal while copies run. Prints a table of the
# results at the end.
#
#   scripts/check-systemd.sh [FILE.deb]    an existing package; without it, scripts/package.sh makes one
#
#   BASE=/path      directory that keeps the Debian from one run to the next; created if missing (two minutes)
#   BBCP=/path      a real bbcp: then packages go to another user of the guest by ssh. Without it they are copied from
#                   directory to directory by the test double, which has to be built
#   SUITE=bookworm  MIRROR=http://deb.debian.org/debian
#
# The guest is not a virtual machine: systemd runs in separate namespaces (processes, mounts, network, cgroups …), so
# nothing is emulated, and its servers cannot be reached from outside. Needs root, debootstrap, and access to the mirror.
# The script removes everything at its end.
# shellcheck disable=SC2016 # sed's and inner shells'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh
# shellcheck source=scripts/lib/topology.sh
. scripts/lib/topology.sh

((EUID == 0)) || die "this needs root, for namespaces" "sudo scripts/check-systemd.sh"
command -v debootstrap >/dev/null || die "there is no debootstrap" "apt-get install debootstrap"
hierarchy=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
[[ -n $hierarchy ]] || die "there is no cgroup2 here, and without it no systemd" "mount -t cgroup2 none /some/where"
run_begin

remote=
[[ -z ${BBCP:-} ]] || remote=yes
bbcp=${BBCP:-$(target_dir)/debug/bbcp}
[[ -x $bbcp ]] || die "there is no $bbcp" "cargo build --package bbcp-double, or set BBCP"
package=${1:-}
[[ -n $package ]] || package=$(scripts/package.sh "$RUN_DIR")

# ---------------------------------------------------------------- the guest

root=$RUN_DIR/root

in_chroot() {
  unshare --mount -- sh -c 'mount -t proc proc "$0/proc" && exec chroot "$0" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"' "$@"
}

# A Debian with systemd, the servers, and the dependencies of the package, because the guest cannot reach a mirror.
make_debian() {
  local log=$RUN_DIR/debian.log
  run debootstrap --variant=minbase "${SUITE:-bookworm}" "$1" "${MIRROR:-http://deb.debian.org/debian}" >"$log" 2>&1 ||
    die "debootstrap failed" "$(tail -n 3 "$log")"
  printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"
  chmod 755 "$1/usr/sbin/policy-rc.d"
  echo force-unsafe-io >"$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
  cp /etc/resolv.conf "$1/etc/resolv.conf"
  { in_chroot "$1" apt-get -q update && in_chroot "$1" apt-get -q -y install --no-install-recommends systemd systemd-sysv \
    dbus rabbitmq-server redis-server postgresql openssh-server openssh-client procps ca-certificates libgcc-s1; } \
    >>"$log" 2>&1 || die "the servers could not be installed" "$(tail -n 5 "$log")"
  rm "$1/usr/sbin/policy-rc.d"
  # The broker starts later than the services, as on another host.
  in_chroot "$1" systemctl --quiet disable rabbitmq-server
}

# Becomes the first process of the guest.
guest_init='
mount --bind "$1" "$1"
cd "$1"
hostname guest
mount -t proc proc proc
# The guest shares the kernel: settings there would change this machine.
for part in sys irq bus; do [ ! -d proc/$part ] || { mount --bind proc/$part proc/$part; mount -o remount,bind,ro proc/$part; }; done
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mknod -m 666 dev/tty c 5 0
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p .host
pivot_root . .host
umount -l /.host
exec env -i container=ccat-check PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --show-status=no
'

guest='' cgroup=''
boot() {
  cgroup=$hierarchy$(sed -n 's/^0:://p' /proc/self/cgroup)
  cgroup=${cgroup%/}/${RUN_DIR##*/}
  mkdir -p "$cgroup"
  spawn guest sh -ec 'echo $$ >"$0/cgroup.procs"; exec unshare --fork --kill-child --pid --mount --uts --ipc --net --cgroup sh -ec "$1" sh "$2"' \
    "$cgroup" "$guest_init" "$root"
  guest=$SPAWNED_PID
  first=
  AWAIT_PID=$guest AWAIT_LOG=$RUN_DIR/guest.log await 20 "systemd did not start" has_first_process
  AWAIT_PID=$guest AWAIT_LOG=$RUN_DIR/guest.log await 60 "the guest did not boot" answers
}
has_first_process() { first=$(pgrep --parent "$guest") && [[ $(<"/proc/$first/comm") == systemd ]]; }
# Returns true if the servers of the guest run; other units may still be starting.
answers() { inside systemctl --quiet is-active postgresql@15-main redis-server ssh; }
inside() {
  nsenter --target "$first" --mount --uts --ipc --net --pid --cgroup --root --wd env -i HOME=/root LC_ALL=C.UTF-8 \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_PAGER= SYSTEMD_COLORS=0 "$@"
}
is_off() { ! kill -0 "$guest" 2>/dev/null; }

guest_end() {
  [[ -n $cgroup && -d $cgroup ]] || return 0
  kill -KILL "$guest" 2>/dev/null # and with it all of the guest
  local tries
  for tries in {1..100}; do
    find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
    [[ -d $cgroup ]] || return 0
    sleep 0.05
  done
  warn "the cgroup $cgroup is left after $tries tries"
}
# shellcheck disable=SC2154 # set there
trap 'status=$?; set +e; guest_end; (exit "$status"); run_end' EXIT

# ---------------------------------------------------------------- helpers of the checks

worker=ccat-transfer-worker@buffer.service manager=ccat-transfer-manager.service
secret=correct-horse-battery

SEEN=()
saw() {
  SEEN+=("$1")
  printf '   %3d s  %s\n' "$SECONDS" "$1"
}
table() {
  printf '\nseen under %s:\n' "$(inside systemctl --version | head -n 1)"
  printf '  - %s\n' "${SEEN[@]}"
}
# failed WHAT : prints the last lines of the units, and ends the script.
failed() {
  inside journalctl --quiet --no-pager --output=cat --lines=30 --unit='ccat-transfer-*' >&2 || true
  inside systemctl --no-pager --lines=0 status 'ccat-transfer-*' >&2 || true
  die "$1"
}
# within SECONDS WHAT CMD… : polls until CMD succeeds.
within() {
  local limit=$1 what=$2 deadline=$((SECONDS + $1))
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || failed "$what: not within $limit s"
    sleep 0.1
  done
}
expect() { [[ $2 == "$3" ]] || failed "$1: expected $3, found $2"; }

of() { inside systemctl show --value --property="$2" "$1"; }
state() { of "$1" ActiveState; }
is() { [[ $(of "$1" "$2") == "$3" ]]; }
says() { [[ $(of "$1" StatusText) == "$2"* ]]; }
logged() { inside journalctl --quiet --no-pager --output=cat --unit="$1" --since="@$since" | grep -qF -- "$2"; }
mark() { since=$(date +%s); }
# Runs a command with the rights and settings of the service, as in docs/deployment.md.
ccat() {
  inside systemd-run --quiet --pipe --wait --uid=ccat-transfer --property=EnvironmentFile=/etc/ccat-transfer/ccat-transfer.env \
    --setenv=CCAT_DATA_TRANSFER_CONFIG=/etc/ccat-transfer/ccat-transfer.toml ccat-transfer "$@"
}
row() { inside runuser -u postgres -- psql -Atc "SELECT status FROM data_transfer WHERE id = $1" ccat_ops_db; }
has() { [[ $(row "$1") == "$2" ]]; }
attempts() {
  inside runuser -u postgres -- psql -Atc "SELECT outcome FROM transfer_worker_attempt WHERE data_transfer_id = $1 ORDER BY attempt" ccat_ops_db | tr '\n' ' '
}

night=0
# begin MB : starts a transfer of this size, and waits until its copy runs. Its id is $transfer.
begin() {
  night=$((night + 1))
  head -c "$1MB" /dev/urandom >"$root/data/here/night-$night.tar"
  transfer=$(ccat transfers create --package "night-$night.tar" --from here/buffer --to there/buffer)
  within 30 "transfer $transfer is not copied" is_copied
}
is_copied() { compgen -G "$root/data/there/.ccat-transfer-$transfer-*.part" && [[ $(row "$transfer") == IN_PROGRESS ]] && says "$worker" "1 copy runs"; }
arrives() {
  within "${1:-30}" "transfer $transfer does not arrive" has "$transfer" COMPLETED
  cmp "$root/data/here/night-$night.tar" "$root/data/there/night-$night.tar" || failed "the copy differs"
  [[ -z $(find "$root/data/there" -name '.ccat-transfer-*') ]] || failed "temporary files of the copy are left"
}
no_bbcp() { ! inside pgrep -x bbcp; }
# `systemctl`, for a command that has to return at once.
at_once() { inside timeout 10 systemctl "$@" || failed "systemctl $* does not return"; }
settings() { inside sed -i "$1" /etc/ccat-transfer/ccat-transfer.toml; }

# ---------------------------------------------------------------- from nothing to a service

say "== a Debian system"
if [[ -z ${BASE:-} ]]; then
  make_debian "$root"
else
  if [[ ! -d $BASE ]]; then
    make_debian "$RUN_DIR/base"
    mv "$RUN_DIR/base" "$BASE"
  fi
  cp --archive --reflink=auto "$BASE" "$root"
fi
echo guest >"$root/etc/hostname"
printf '127.0.0.1 localhost guest\n::1 localhost\n' >"$root/etc/hosts"
install -D --mode 755 "$bbcp" "$root/usr/local/bin/bbcp"
cp "$package" "$root/root/ccat-transfer.deb"

say "== boot, install"
boot
inside dpkg --install /root/ccat-transfer.deb >"$RUN_DIR/dpkg.log" 2>&1 || die "the package cannot be installed" "$(<"$RUN_DIR/dpkg.log")"
expect "installed units" "$(inside systemctl list-unit-files --no-legend 'ccat-transfer-*' | awk '{ print $2 }' | sort -u)" disabled
expect "running units" "$(inside systemctl list-units --no-legend 'ccat-transfer-*')" ""
saw "dpkg --install: two units, none enabled or started"

# The password must not be on a command line, because the journal records command lines.
printf '%s;\n' "CREATE ROLE ccat LOGIN PASSWORD '$secret'" "CREATE DATABASE ccat_ops_db OWNER ccat" |
  inside runuser -u postgres -- psql -q
inside sed -i "s|^#\(CELERY_RESULT_BACKEND=.*\)|\1|; s|^#\(CCAT_OPS_DB_DATABASE_POSTGRESQL_PASSWORD=\)|\1$secret|" /etc/ccat-transfer/ccat-transfer.env
inside cp /usr/share/doc/ccat-transfer/examples/worker-NAME.env /etc/ccat-transfer/worker-buffer.env
inside sed -i 's/ccat_buffer_data_transfer/here_buffer_data_transfer/' /etc/ccat-transfer/worker-buffer.env
inside sh -c 'cat >>/etc/ccat-transfer/ccat-transfer.toml' <<'END'

[bbcp]
max_rate = "2m"
progress_interval = 2

[manager]
sleep_time = "1s"
END
# shutdown_timeout is changed below.
settings 's/^\[transfer\]$/&\nshutdown_timeout = "0s"\nfree_space_margin = 0\nresume_above = 1000000/'
host=
inside install -d -o ccat-transfer /data /data/here /data/there /elsewhere
if [[ -n $remote ]]; then
  host=127.0.0.1
  inside sh -ec '
    useradd --create-home --shell /bin/bash receiver
    chown receiver /data/there
    cd /var/lib/ccat-transfer
    install -d -o ccat-transfer -g ccat-transfer -m 700 .ssh
    ssh-keygen -q -t ed25519 -N "" -f .ssh/id_ed25519
    sed "s/^/127.0.0.1 /" /etc/ssh/ssh_host_ed25519_key.pub >.ssh/known_hosts
    chown ccat-transfer:ccat-transfer .ssh/*
    install -d -o receiver -m 700 ~receiver/.ssh
    install -o receiver .ssh/id_ed25519.pub ~receiver/.ssh/authorized_keys
    printf "\n[ssh]\nuser = \"receiver\"\n" >>/etc/ccat-transfer/ccat-transfer.toml'
fi
{
  site here Here here /data/here
  site there There there /data/there "$host"
  location closed 2 /elsewhere
  route here there
} >"$root/data/topology.toml"
# The units' own times, except for two, because waiting a minute for the watchdog would take too long.
for unit in ccat-transfer-worker@ ccat-transfer-manager; do
  mkdir -p "$root/etc/systemd/system/$unit.service.d"
  printf '[Service]\nWatchdogSec=4\nRestartSec=1\n' >"$root/etc/systemd/system/$unit.service.d/check.conf"
done
# The guest is also the other host of the copies, and refuses logins while it shuts down.
[[ -z $remote ]] || printf '[Unit]\nAfter=ssh.service systemd-user-sessions.service\n' >>"$root/etc/systemd/system/ccat-transfer-worker@.service.d/check.conf"
printf '[Service]\nReadWritePaths=/data\n' >"$root/etc/systemd/system/ccat-transfer-worker@.service.d/override.conf"
inside systemctl daemon-reload
ccat db migrate >/dev/null
ccat db seed /data/topology.toml >/dev/null
saw "db migrate and db seed as the service's user, by systemd-run"

say "== ready"
inside systemctl --quiet enable "$worker" "$manager"
at_once start --no-block "$worker" "$manager"
for unit in "$worker" "$manager"; do
  within 10 "$unit does not show what it waits for" says "$unit" "waiting for the database and the broker"
  expect "$unit" "$(state "$unit")" activating
done
at_once stop "$worker" "$manager"
expect "$worker, stopped" "$(of "$worker" Result) $(state "$worker")" "success inactive"
saw "without a broker: activating, and a stop ends it at once"
at_once start --no-block "$worker" "$manager"
within 10 "the worker does not wait" is "$worker" ActiveState activating
inside systemctl start rabbitmq-server
inside timeout 60 systemctl start "$worker" "$manager" || failed "the units do not start"
expect "consumers of the queue" "$(inside rabbitmqctl --quiet list_queues name consumers | awk '$1 == "here_buffer_data_transfer" { print $2 }')" 1
saw "the broker comes: active, and consuming by then"
ccat doctor >"$RUN_DIR/doctor.txt" || failed "doctor: $(grep -v '✔' "$RUN_DIR/doctor.txt")"
saw "doctor, as documented: $(tail -n 1 "$RUN_DIR/doctor.txt")"

say "== reload"
begin 8
pid=$(of "$worker" MainPID)
mark
settings '$a nonsense = 1'
at_once reload "$worker"
within 10 "bad settings are not logged" logged "$worker" "restart refused: the new settings are not valid"
settings '$d'
settings 's/^shutdown_timeout = .*/shutdown_timeout = "1s"/'
at_once reload "$worker"
within 10 "the status does not announce the restart" says "$worker" "restarts when the running tasks have ended; 1 copy runs"
expect "$worker, reloading" "$(state "$worker") $(of "$worker" SubState)" "active running"
expect "readiness meanwhile" "$(inside bash -c 'exec 3<>/dev/tcp/127.0.0.1/9808; printf "GET /readyz HTTP/1.0\r\n\r\n" >&3; tail -n 1 <&3')" restarting
# With the old settings the copy would have no time limit; with the new ones its limit of one second is over.
arrives
within 10 "the worker does not restart" logged "$worker" '"worker ready"'
within 10 "the worker does no work" says "$worker" "no copy runs"
expect "$worker" "$(state "$worker") $(of "$worker" MainPID) $(of "$worker" NRestarts)" "active $pid 0"
saw "reload in mid-copy: returns at once, the copy arrives, same process and active throughout; bad settings change nothing"
pid=$(of "$manager" MainPID)
mark
at_once reload "$manager"
within 10 "the manager does not restart" logged "$manager" '"manager ready"'
expect "$manager" "$(state "$manager") $(of "$manager" MainPID)" "active $pid"
sleep 5 # a watchdog and a second
expect "$worker and $manager" "$(of "$worker" NRestarts) $(of "$manager" NRestarts)" "0 0"
saw "the watchdog is fed after that"

say "== stop"
begin 12
at_once stop "$worker"
expect "$worker" "$(of "$worker" Result) $(state "$worker")" "success inactive"
no_bbcp || failed "bbcp continues without its worker"
expect "the attempt" "$(attempts "$transfer")" "interrupted "
at_once start "$worker"
arrives
saw "stop in mid-copy with shutdown_timeout = 1s: the transfer is returned; the next worker completes it"
settings 's/^shutdown_timeout = .*/shutdown_timeout = "0s"/'
at_once reload "$worker"
begin 8
inside timeout 30 systemctl stop "$worker" || failed "a warm stop does not end"
arrives 0
expect "$worker" "$(of "$worker" Result) $(state "$worker")" "success inactive"
saw "stop in mid-copy without one: waits for the copy"
at_once start "$worker"
begin 12
at_once kill --signal=QUIT --kill-whom=main "$worker"
within 10 "QUIT does not end it" is "$worker" ActiveState inactive
no_bbcp || failed "bbcp continues without its worker"
at_once start "$worker"
arrives
saw "kill -s QUIT in mid-copy: ends at once, and stays stopped; the next worker completes it"

say "== crashes and freezes"
inside systemctl reset-failed
begin 12
at_once kill --signal=KILL --kill-whom=main "$worker"
within 10 "a killed worker does not come back" is "$worker" NRestarts 1
within 10 "a killed worker is not active again" is "$worker" ActiveState active
arrives
saw "kill -9 in mid-copy: no bbcp is left, restarted, completes the copy"
begin 20
at_once kill --signal=STOP --kill-whom=main "$worker"
within 15 "a frozen worker is not ended" is "$worker" NRestarts 2
within 10 "a frozen worker is not active again" is "$worker" ActiveState active
arrives
saw "frozen in mid-copy: the watchdog ends it, restarted, completes the copy"
at_once kill --signal=STOP --kill-whom=main "$manager"
within 15 "a frozen manager is not ended" is "$manager" NRestarts 1
within 10 "a frozen manager is not active again" is "$manager" ActiveState active
saw "a frozen manager: the same"

say "== exit codes"
inside systemctl reset-failed
at_once stop "$worker"
# not_tried_again WHAT CODE
not_tried_again() {
  ! inside systemctl --quiet start "$worker" 2>/dev/null || failed "it starts with $1"
  sleep 2
  expect "$worker with $1" "$(state "$worker") $(of "$worker" ExecMainStatus) $(of "$worker" NRestarts)" "failed $2 0"
}
settings '$a nonsense = 1'
not_tried_again "bad settings" 4
settings '$d'
inside sed -i.kept "s/$secret/wrong/" /etc/ccat-transfer/ccat-transfer.env
not_tried_again "a wrong password" 4
inside mv /etc/ccat-transfer/ccat-transfer.env.kept /etc/ccat-transfer/ccat-transfer.env
inside sed -i.kept 's/--task-events/--nonsense/' /etc/ccat-transfer/worker-buffer.env
not_tried_again "a flag that is none" 2
saw "bad settings and a wrong password (exit 4), a wrong flag (2): failed, and not tried again"
inside systemctl reset-failed
inside cp /etc/ccat-transfer/worker-buffer.env.kept /etc/ccat-transfer/worker-buffer.env
inside sed -i 's/:9808/:9807/' /etc/ccat-transfer/worker-buffer.env
! inside systemctl --quiet start "$worker" 2>/dev/null || failed "it starts with a port that is in use"
tried() { [[ $(state "$worker") == failed && $(of "$worker" NRestarts) == 5 ]]; }
within 30 "a port that is in use" tried
inside mv /etc/ccat-transfer/worker-buffer.env.kept /etc/ccat-transfer/worker-buffer.env
saw "a port that is in use (exit $(of "$worker" ExecMainStatus)): five times, then failed; reset-failed and start help"
inside systemctl reset-failed
at_once start "$worker"

say "== permissions"
night=$((night + 1))
head -c 1MB /dev/urandom >"$root/data/here/night-$night.tar"
transfer=$(ccat transfers create --package "night-$night.tar" --from here/buffer --to there/closed)
refused() { ccat transfers show "$transfer" | grep -q "Read-only file system"; }
within 30 "a directory outside of ReadWritePaths" refused
[[ -z $(ls -A "$root/elsewhere") ]] || failed "it wrote outside of ReadWritePaths"
ccat transfers show "$transfer" >"$RUN_DIR/closed.txt"
saw "a destination outside of ReadWritePaths: $(grep -o 'destination_denied' "$RUN_DIR/closed.txt" | head -n 1), read-only file system"
ccat transfers cancel "$transfer" --yes >/dev/null 2>&1 || true
inside systemctl show "$worker" "$manager" >"$RUN_DIR/show.txt"
inside journalctl --quiet --no-pager --output=export >"$RUN_DIR/journal.txt"
inside sh -c 'cat /proc/[0-9]*/cmdline' | tr '\0' '\n' >"$RUN_DIR/cmdline.txt"
for file in show journal cmdline; do
  ! grep -aqF "$secret" "$RUN_DIR/$file.txt" || failed "the password is in $file.txt"
done
grep -qF '"level":"INFO"' "$RUN_DIR/journal.txt" || failed "the journal has no JSON of ours"
saw "no password in systemctl show, the journal, or a command line"
saw "systemd-analyze security: $(inside systemd-analyze security --no-pager 2>/dev/null | awk '/^ccat-transfer/ { sub(/\.service/, "", $1); printf "%s%s %s %s", sep, $1, $2, $3; sep = ", " }')"

say "== upgrade, reboot, removal"
begin 8
pid=$(of "$worker" MainPID)
inside dpkg --install /root/ccat-transfer.deb >"$RUN_DIR/dpkg.log" 2>&1 || failed "the package cannot be installed again"
[[ $(inside readlink "/proc/$pid/exe") == *" (deleted)" ]] || failed "the program was not replaced"
expect "$worker" "$(state "$worker") $(of "$worker" MainPID)" "active $pid"
at_once reload "$worker"
arrives
renewed() { [[ $(inside readlink "/proc/$pid/exe") == /usr/bin/ccat-transfer ]] && says "$worker" "no copy runs"; }
within 10 "the new program does not run" renewed
saw "upgrade in mid-copy: nothing is stopped; after a reload the new program runs, in the same process"
begin 8
inside systemctl --no-block poweroff
within 30 "the guest does not end" is_off
boot
within 20 "the worker is not started at boot" is "$worker" ActiveState activating
arrives 0
saw "poweroff in mid-copy: waits for the copy"
inside systemctl start rabbitmq-server
within 30 "the worker does not start at boot" is "$worker" ActiveState active
within 30 "the manager does not start at boot" is "$manager" ActiveState active
expect "$worker and $manager" "$(of "$worker" NRestarts) $(of "$manager" NRestarts)" "0 0"
within 20 "the boot does not end" inside systemctl --quiet is-system-running
saw "boot without a broker: both wait, are active when it comes, and the system is up"
begin 20
inside timeout 30 dpkg --purge ccat-transfer >"$RUN_DIR/dpkg.log" 2>&1 || failed "the package cannot be removed: $(tail -n 3 "$RUN_DIR/dpkg.log")"
no_bbcp || failed "bbcp is left"
! has "$transfer" IN_PROGRESS || failed "the transfer was not returned"
inside rm -r /etc/ccat-transfer/worker-buffer.env /etc/systemd/system/ccat-transfer-{worker@,manager}.service.d # ours
inside rmdir /etc/ccat-transfer || failed "there is more in /etc/ccat-transfer"
left=$(cd "$root" && find etc usr lib -name '*ccat-transfer*')
expect "left by the package" "$left" ""
saw "dpkg --purge in mid-copy: the transfer is returned, nothing of the package is left"
table
inside systemctl --no-block poweroff
within 30 "the guest does not end" is_off
say
say "check-systemd.sh: ok, in $((SECONDS / 60)) min $((SECONDS % 60)) s"
