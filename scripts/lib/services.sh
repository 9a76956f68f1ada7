# shellcheck shell=bash
#
# Private servers for tests and the demo: RabbitMQ, Redis, PostgreSQL, sshd, and a Python with Celery.
# Source it; safe under `set -euo pipefail`.
#
#   need_compiler                  ends the script where there is no cargo or no cc
#   install_missing [CMD=PKG…]     installs by apt what the scripts need, and PKG for CMD; does not start installed services
#   install_for CMD=PKG…           installs PKG for each missing CMD, and nothing else
#   run_begin                      private directory $RUN_DIR, and the trap that ends everything
#   start_services NAME…           several at once: rabbitmq second_rabbitmq third_rabbitmq redis postgres sshd
#   start_rabbitmq start_redis start_postgres start_sshd
#   make_python                    .venv with tests/python/requirements.txt        → TEST_PYTHON
#   make_celery VERSION…           .venv-celery-VERSION with tests/python/celery_versions/VERSION.txt
#   at_end FUNCTION                FUNCTION also runs at the end of the script
#   run CMD…                       a foreground command that a signal can interrupt
#   spawn NAME CMD…                a background command, logged to $RUN_DIR/NAME.log → SPAWNED_PID
#   await SECONDS WHAT CMD…        polls until CMD succeeds
#
# Every server listens only on 127.0.0.1, on a free port, keeps its files below $RUN_DIR, and is stopped
# when the script ends, for whatever reason. The addresses of the started servers are exported for the tests:
#
#   TEST_AMQP_URL  TEST_RABBITMQ_CTL (a program: stop | start | restart)  RABBITMQCTL (rabbitmqctl for this node)
#   TEST_AMQPS_PORT (TLS, for `localhost` only)  TEST_TLS (directory: ca.pem client.pem client.key, for user tls-client)
#   SECOND_TEST_AMQP_URL …         the same for a second broker, and SECOND_TEST_REDIS_URL (another database of the same Redis);
#                                  THIRD_… for a third one
#   TEST_REDIS_URL  TEST_POSTGRES_URL (a superuser, so that tests make their own databases)
#   TEST_SSHD_PORT  TEST_SSH_IDENTITY  TEST_SSH_KNOWN_HOSTS  TEST_SSH_USER

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # Debian gives these to root only

RUN_DIR=
RUN_GROUPS=()      # process groups we started, in order
RUN_FOREGROUND=    # the group that `run` waits for
RUN_AT_END=()      # functions to call at the end
POLICY_PLACED=     # we put /usr/sbin/policy-rc.d there

# ---------------------------------------------------------------- messages

say() { printf '%s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$1" >&2
  shift
  local line
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

# ---------------------------------------------------------------- missing packages

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# The newest PostgreSQL whose programs belong together; a lone `postgres` on PATH may be another version's.
postgres_bin() {
  local dir best=
  for dir in /usr/lib/postgresql/*/bin; do
    if [[ -x $dir/postgres && -x $dir/initdb && -x $dir/psql ]]; then best=$dir; fi
  done
  [[ -n $best ]] && printf '%s\n' "$best"
}

# A Python that can make a virtual environment. Debian's own lacks ensurepip without python3-venv.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 /usr/bin/python3; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  return 1
}

RABBITMQ_SERVER_PROGRAM=/usr/lib/rabbitmq/bin/rabbitmq-server # /usr/sbin's switches to user rabbitmq

# Arguments of `install_missing` for the browser of the tests of the status page, and for its pictures.
# shellcheck disable=SC2034 # for the scripts that source this one
BROWSER=(chromium=chromium chromedriver=chromium-driver)

need_compiler() {
  command -v cargo >/dev/null || die "cargo is not on PATH" \
    "Install Rust (https://rustup.rs) and open a new shell."
  command -v cc >/dev/null || die "there is no C compiler (cc)" "Install one: apt-get install gcc libc6-dev"
}

install_missing() {
  need_compiler
  local -a packages=()
  [[ -x $RABBITMQ_SERVER_PROGRAM ]] || packages+=(rabbitmq-server)
  postgres_bin >/dev/null || packages+=(postgresql)
  find_python >/dev/null || packages+=(python3-venv)
  add_for redis-server=redis-server sshd=openssh-server ssh=openssh-client openssl=openssl ps=procps ip=iproute2 "$@"
  install_packages
}

install_for() {
  local -a packages=()
  add_for "$@"
  ((${#packages[@]} == 0)) || install_packages
}

# Adds the package of each missing command to `packages` of the caller.
add_for() {
  local wanted
  for wanted in "$@"; do command -v "${wanted%%=*}" >/dev/null || packages+=("${wanted#*=}"); done
}

# Installs `packages` of the caller.
install_packages() {
  if ((${#packages[@]} == 0)); then
    note "nothing is missing"
    return
  fi

  note "missing: ${packages[*]}"
  command -v apt-get >/dev/null || die "this system has no apt-get" "Install by hand: ${packages[*]}"
  if ((EUID != 0)) && ! command -v sudo >/dev/null; then
    die "installing needs root, and there is no sudo" "As root: apt-get update && apt-get install ${packages[*]}"
  fi
  [[ -n $RUN_DIR ]] || run_begin
  local log=$RUN_DIR/apt.log
  forbid_service_starts
  local -a apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
  if ! { run as_root "${apt[@]}" update && run as_root "${apt[@]}" install --no-install-recommends "${packages[@]}"; } \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "apt-get could not install ${packages[*]}" "Its last output is above."
  fi
  allow_service_starts
  if [[ -d /run/systemd/system ]]; then
    note "their system services were not started; they will be at the next boot, unless you disable them"
  fi
}

# Packages of servers start the servers at their installation; this file is Debian's method to prevent it.
forbid_service_starts() {
  [[ -e /usr/sbin/policy-rc.d ]] && return
  POLICY_PLACED=1
  # shellcheck disable=SC2016 # as it stands
  as_root sh -c 'printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d'
}

allow_service_starts() {
  [[ -n $POLICY_PLACED ]] || return 0
  POLICY_PLACED=
  as_root rm -f /usr/sbin/policy-rc.d
}

make_python() {
  export TEST_PYTHON=$REPO/.venv/bin/python
  make_venv "$REPO/.venv" "$REPO/tests/python/requirements.txt"
}

# make_celery VERSION… : the versions of Celery with which tests/python/test_versions.py runs.
make_celery() {
  local version requirements
  for version in "$@"; do
    requirements=$REPO/tests/python/celery_versions/$version.txt
    [[ -e $requirements ]] || die "no such version of Celery: $version" "Known: $(known_celery)"
    make_venv "$REPO/.venv-celery-$version" "$requirements"
  done
}

known_celery() {
  local -a files=("$REPO"/tests/python/celery_versions/*.txt)
  files=("${files[@]##*/}")
  printf '%s\n' "${files[*]%.txt}"
}

# make_venv DIRECTORY REQUIREMENTS
make_venv() {
  local venv=$1 requirements=$2 python
  if cmp -s "$requirements" "$venv/installed.txt" && "$venv/bin/python" -c '' 2>/dev/null; then
    return
  fi
  python=$(find_python) || die "no Python 3.10 or newer that can make a virtual environment" \
    "Install one: apt-get install python3-venv"
  rm -rf "$venv"
  run "$python" -m venv "$venv"
  if ! run "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
    die "pip could not install $requirements" "It needs access to PyPI; run the script again when there is one."
  fi
  cp "$requirements" "$venv/installed.txt"
}

# ---------------------------------------------------------------- beginning and end

run_begin() {
  [[ -z $RUN_DIR ]] || return 0
  RUN_DIR=$(mktemp -d "${TMPDIR:-/tmp}/ccat-XXXXXX")
  RUN_DIR=$(cd "$RUN_DIR" && pwd -P)
  chmod 711 "$RUN_DIR" # PostgreSQL's user passes through
  mkdir -m 700 "$RUN_DIR/tmp"
  # All later processes have the directory's name in their environment. By this, `run_end` finds processes that have
  # left their process group.
  export CCAT_RUN_DIR=$RUN_DIR TMPDIR=$RUN_DIR/tmp
  trap run_end EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# RUN_PROCESSES: ids of the processes that refer to the private directory in their environment, command line, working
# directory or open files. The last two find processes with a clean environment, such as bbcp's.
find_run_processes() {
  local file pid found clean=(env -i "PATH=$PATH") # or else grep would find itself
  RUN_PROCESSES=()
  found=$("${clean[@]}" grep -lsaFf /dev/stdin /proc/[0-9]*/environ /proc/[0-9]*/cmdline <<<"$RUN_DIR") || true
  found+=$'\n'$("${clean[@]}" find /proc/[0-9]*/cwd /proc/[0-9]*/fd -maxdepth 1 -lname "$RUN_DIR*" 2>/dev/null) || true
  for file in $found; do
    pid=${file#/proc/}
    pid=${pid%%/*}
    [[ $pid == "$$" || $pid == "$PPID" || " ${RUN_PROCESSES[*]} " == *" $pid "* ]] || RUN_PROCESSES+=("$pid")
  done
}

at_end() { RUN_AT_END+=("$1"); }

run_end() {
  local status=$? group last
  trap '' HUP INT TERM
  trap - EXIT
  set +e
  cd /
  allow_service_starts
  for last in "${RUN_AT_END[@]}"; do "$last"; done
  [[ -n $RUN_FOREGROUND ]] && kill -TERM -- "-$RUN_FOREGROUND" 2>/dev/null
  for group in "${RUN_GROUPS[@]}"; do kill -TERM -- "-$group" 2>/dev/null; done

  local deadline=$((SECONDS + 5)) signal=TERM
  while :; do
    find_run_processes
    ((${#RUN_PROCESSES[@]})) || break
    if ((SECONDS >= deadline)); then
      [[ $signal == KILL ]] && break
      signal=KILL deadline=$((SECONDS + 5))
    fi
    kill -"$signal" "${RUN_PROCESSES[@]}" 2>/dev/null
    sleep 0.1
  done
  if ((${#RUN_PROCESSES[@]})); then
    warn "these processes could not be ended:"
    ps -o pid,user,args -p "$(IFS=,; printf '%s' "${RUN_PROCESSES[*]}")" >&2
    ((status)) || status=1
  fi
  if ((status)) && [[ -n ${KEEP_RUN_DIR:-} ]]; then
    warn "KEEP_RUN_DIR is set: logs are in $RUN_DIR"
  else
    rm -rf "$RUN_DIR"
    if [[ -e $RUN_DIR ]]; then
      warn "could not remove $RUN_DIR"
      ((status)) || status=1
    fi
  fi
  exit "$status"
}

# Runs CMD in a process group of its own and waits. Unlike a plain foreground command it lets a
# signal through at once: bash runs traps during `wait`, but not while a foreground child runs.
run() {
  local status=0
  set -m # own process group, and SIGINT stays at its default in the child
  "$@" </dev/null &
  RUN_FOREGROUND=$!
  set +m
  wait "$RUN_FOREGROUND" || status=$?
  RUN_FOREGROUND=
  return "$status"
}

# Starts CMD in the background; it is ended by `run_end`.
spawn() {
  local name=$1
  shift
  set -m
  "$@" </dev/null >>"$RUN_DIR/$name.log" 2>&1 &
  SPAWNED_PID=$!
  set +m
  disown "$SPAWNED_PID" # or else bash reports its end
  RUN_GROUPS+=("$SPAWNED_PID")
}

# await SECONDS WHAT CMD… : until CMD succeeds. Gives up early when process $AWAIT_PID has ended, and
# shows the end of $AWAIT_LOG when it gives up.
await() {
  local limit=$1 what=$2
  shift 2
  local deadline=$((SECONDS + limit)) why=
  until "$@" >/dev/null 2>&1; do
    if [[ -n ${AWAIT_PID:-} ]] && ! kill -0 "$AWAIT_PID" 2>/dev/null; then
      why="it has ended"
    elif ((SECONDS >= deadline)); then
      why="not within $limit s"
    fi
    if [[ -n $why ]]; then
      if [[ -n ${AWAIT_LOG:-} && -s $AWAIT_LOG ]]; then tail -n 20 "$AWAIT_LOG" >&2; fi
      die "$what: $why"
    fi
    sleep 0.05
  done
}

# ---------------------------------------------------------------- servers

port_answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Below the kernel's ephemeral ports, so that no outgoing connection takes it in the meantime.
PORTS_TAKEN=" "
free_port() {
  while :; do
    PORT=$((10000 + (RANDOM * 32768 + RANDOM) % 20000))
    [[ $PORTS_TAKEN == *" $PORT "* ]] && continue
    if ! port_answers "$PORT"; then break; fi
  done
  PORTS_TAKEN+="$PORT "
}

# start_services NAME… : launches all, then waits for each.
start_services() {
  run_begin
  local name
  for name in "$@"; do "launch_$name"; done
  for name in "$@"; do "await_$name"; done
}

start_rabbitmq() { start_services rabbitmq; }
start_redis() { start_services redis; }
start_postgres() { start_services postgres; }
start_sshd() { start_services sshd; }

launch_rabbitmq() {
  local name=${1:-rabbitmq} amqp dist epmd
  local dir=$RUN_DIR/$name
  mkdir -p "$dir/home" "$dir/data" "$dir/log"
  free_port; amqp=$PORT
  free_port; dist=$PORT
  free_port; epmd=$PORT
  export TEST_AMQP_URL="amqp://guest:guest@127.0.0.1:$amqp//"
  export TEST_RABBITMQ_CTL=$dir/broker RABBITMQCTL=$dir/rabbitmqctl

  free_port; export TEST_AMQPS_PORT=$PORT TEST_TLS=$dir/tls
  make_certificates "$TEST_TLS"

  printf '[rabbitmq_auth_mechanism_ssl].\n' >"$dir/enabled_plugins"
  : >"$dir/rabbitmq-env.conf"
  cat >"$dir/rabbitmq.conf" <<END
disk_free_limit.absolute = 50MB
# The default of RabbitMQ 3.10. That of 4.0 is 16 MiB, and tests send larger messages.
max_message_size = 134217728
listeners.ssl.1 = 127.0.0.1:$TEST_AMQPS_PORT
ssl_options.cacertfile = $TEST_TLS/ca.pem
ssl_options.certfile = $TEST_TLS/server.pem
ssl_options.keyfile = $TEST_TLS/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = AMQPLAIN
auth_mechanisms.3 = EXTERNAL
END
  head -c 20 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$dir/home/.erlang.cookie"
  chmod 400 "$dir/home/.erlang.cookie"
  cat >"$dir/env" <<END
export HOME='$dir/home' CCAT_RUN_DIR='$RUN_DIR'
export ERL_EPMD_PORT=$epmd ERL_EPMD_ADDRESS=127.0.0.1
export RABBITMQ_NODENAME=ccat-$amqp@localhost RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT=$amqp RABBITMQ_DIST_PORT=$dist
export RABBITMQ_BASE='$dir' RABBITMQ_MNESIA_BASE='$dir/data' RABBITMQ_LOG_BASE='$dir/log' RABBITMQ_LOGS=-
export RABBITMQ_CONFIG_FILE='$dir/rabbitmq.conf' RABBITMQ_ADVANCED_CONFIG_FILE='$dir/advanced.config'
export RABBITMQ_CONF_ENV_FILE='$dir/rabbitmq-env.conf' RABBITMQ_ENABLED_PLUGINS_FILE='$dir/enabled_plugins'
# Distribution on loopback only. No busy waiting of the schedulers, because other programs use the machine, too.
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none'
export RABBITMQ_CTL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
# Makes the start script exec Erlang instead of waiting for it, so that the pid is the broker's.
export RUNNING_UNDER_SYSTEMD=true
unset NOTIFY_SOCKET
END
  cat >"$RABBITMQCTL" <<END
#!/bin/bash
# rabbitmqctl for the private broker.
. '$dir/env'
exec /usr/lib/rabbitmq/bin/rabbitmqctl "\$@"
END
  cat >"$TEST_RABBITMQ_CTL" <<END
#!/bin/bash
# broker stop|start|restart: the private broker; returns when it is done.
set -euo pipefail
. '$dir/env'
pid() { cat '$dir/pid' 2>/dev/null || echo 0; }
running() { (( \$(pid) )) && kill -0 "\$(pid)" 2>/dev/null; }
# A listener is not enough: the broker must answer the protocol header.
answers() {
  ( exec 3<>/dev/tcp/127.0.0.1/$amqp && printf 'AMQP\0\0\11\1' >&3 && IFS= read -r -t 2 -n 1 -u 3 ) 2>/dev/null
}
launch() {
  setsid '$RABBITMQ_SERVER_PROGRAM' >>'$RUN_DIR/$name.log' 2>&1 </dev/null &
  echo \$! >'$dir/pid'
}
ready() {
  local deadline=\$((SECONDS + 120)) # five are usual, twenty where tests take all processors
  until answers; do
    if ! running || ((SECONDS >= deadline)); then
      tail -n 20 '$RUN_DIR/$name.log' >&2
      echo 'error: RabbitMQ did not start' >&2
      exit 1
    fi
    sleep 0.05
  done
}
stop() {
  local deadline=\$((SECONDS + 30))
  if running; then kill -TERM "\$(pid)"; fi
  while running; do
    if ((SECONDS >= deadline)); then kill -KILL "\$(pid)"; fi
    sleep 0.05
  done
}
case \${1:-} in
  launch) launch ;;
  ready) ready ;;
  start) running || launch; ready ;;
  stop) stop ;;
  restart) stop; launch; ready ;;
  *) echo "usage: \$0 start|stop|restart" >&2; exit 2 ;;
esac
END
  chmod 755 "$RABBITMQCTL" "$TEST_RABBITMQ_CTL"

  # Our own port mapper, in the foreground: Erlang would start one as a daemon that outlives it.
  spawn "$name-epmd" env -u NOTIFY_SOCKET HOME="$dir/home" "$(epmd_program)" -port "$epmd" -address 127.0.0.1
  AWAIT_PID=$SPAWNED_PID AWAIT_LOG=$RUN_DIR/$name-epmd.log await 10 "Erlang's port mapper did not start" port_answers "$epmd"
  "$TEST_RABBITMQ_CTL" launch
  RUN_GROUPS+=("$(<"$dir/pid")")
}

# A private authority, and two certificates signed by it: the broker's for `localhost`, and a client's.
make_certificates() {
  local dir=$1 who
  mkdir -m 700 "$dir"
  (
    cd "$dir"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=test authority' \
      -addext 'keyUsage=critical,keyCertSign' -keyout ca.key -out ca.pem
    for who in server:localhost client:tls-client; do
      openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=${who#*:}" \
        -keyout "${who%:*}.key" -out request.pem
      openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out "${who%:*}.pem" \
        -extfile <(printf 'subjectAltName=DNS:%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${who#*:}")
    done
  ) >"$dir.log" 2>&1 || die "openssl could not make certificates" "See $dir.log."
}

epmd_program() {
  command -v epmd && return
  local program
  for program in /usr/lib/erlang/erts-*/bin/epmd; do :; done
  printf '%s\n' "$program"
}

await_rabbitmq() { "$TEST_RABBITMQ_CTL" ready || die "RabbitMQ did not start" "Its last output is above."; }

# Further brokers, for tests that run beside others.
launch_second_rabbitmq() { launch_further_rabbitmq second; }
launch_third_rabbitmq() { launch_further_rabbitmq third; }

launch_further_rabbitmq() {
  local which=$1 name
  local TEST_AMQP_URL TEST_RABBITMQ_CTL RABBITMQCTL TEST_AMQPS_PORT TEST_TLS # what `launch_rabbitmq` sets are these
  launch_rabbitmq "${which}_rabbitmq"
  for name in TEST_AMQP_URL TEST_RABBITMQ_CTL RABBITMQCTL TEST_AMQPS_PORT TEST_TLS; do
    export "${which^^}_$name=${!name}"
  done
}

await_second_rabbitmq() { TEST_RABBITMQ_CTL=$SECOND_TEST_RABBITMQ_CTL await_rabbitmq; }
await_third_rabbitmq() { TEST_RABBITMQ_CTL=$THIRD_TEST_RABBITMQ_CTL await_rabbitmq; }

launch_redis() {
  local dir=$RUN_DIR/redis
  mkdir -p "$dir"
  free_port
  REDIS_PORT=$PORT
  export TEST_REDIS_URL="redis://127.0.0.1:$PORT/0" SECOND_TEST_REDIS_URL="redis://127.0.0.1:$PORT/1"
  export THIRD_TEST_REDIS_URL="redis://127.0.0.1:$PORT/2"
  spawn redis redis-server --port "$PORT" --bind 127.0.0.1 --save '' --appendonly no --dir "$dir" --daemonize no
  REDIS_PID=$SPAWNED_PID
}

redis_answers() {
  local reply
  exec 3<>"/dev/tcp/127.0.0.1/$REDIS_PORT" || return
  printf 'PING\r\n' >&3
  IFS= read -r -t 2 -u 3 reply
  exec 3>&-
  [[ $reply == +PONG* ]]
}

await_redis() { AWAIT_PID=$REDIS_PID AWAIT_LOG=$RUN_DIR/redis.log await 20 "Redis did not start" redis_answers; }

launch_postgres() {
  local dir=$RUN_DIR/postgres
  local -a as_user=(env)
  POSTGRES_BIN=$(postgres_bin) || die "PostgreSQL is not installed" "Install it: apt-get install postgresql"
  mkdir -p "$dir"
  if ((EUID == 0)); then # it refuses to run as root
    local user=nobody
    if id -u postgres >/dev/null 2>&1; then user=postgres; fi
    chown "$user" "$dir"
    as_user=(setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups env)
  fi
  free_port
  POSTGRES_PORT=$PORT
  export TEST_POSTGRES_URL="postgresql://ccat@127.0.0.1:$PORT/ccat_ops_db"
  cat >"$dir.sh" <<'END'
set -e
bin=$1 dir=$2 port=$3
cd "$dir"
"$bin/initdb" --no-sync --auth=trust --username=ccat --encoding=UTF8 --no-locale -D "$dir/data"
echo 'CREATE DATABASE ccat_ops_db;' | "$bin/postgres" --single -D "$dir/data" postgres >/dev/null
exec "$bin/postgres" -D "$dir/data" -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories="$dir" \
  -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c max_connections=200
END
  spawn postgres "${as_user[@]}" bash "$dir.sh" "$POSTGRES_BIN" "$dir" "$PORT"
  POSTGRES_PID=$SPAWNED_PID
}

await_postgres() {
  AWAIT_PID=$POSTGRES_PID AWAIT_LOG=$RUN_DIR/postgres.log await 60 "PostgreSQL did not start" \
    "$POSTGRES_BIN/pg_isready" -q -h 127.0.0.1 -p "$POSTGRES_PORT" -U ccat -d ccat_ops_db
}

launch_sshd() {
  local dir=$RUN_DIR/sshd
  mkdir -m 700 "$dir"
  if ((EUID == 0)); then mkdir -p /run/sshd; fi # its privilege separation wants the directory
  free_port
  export TEST_SSHD_PORT=$PORT TEST_SSH_IDENTITY=$dir/client_key TEST_SSH_KNOWN_HOSTS=$dir/known_hosts
  TEST_SSH_USER=$(id -un)
  export TEST_SSH_USER
  ssh-keygen -q -t ed25519 -N '' -C 'test host' -f "$dir/host_key"
  ssh-keygen -q -t ed25519 -N '' -C 'test client' -f "$dir/client_key"
  cp "$dir/client_key.pub" "$dir/authorized_keys"
  printf '[127.0.0.1]:%s,[localhost]:%s %s\n' "$PORT" "$PORT" "$(cut -d' ' -f1,2 "$dir/host_key.pub")" >"$dir/known_hosts"
  cat >"$dir/config" <<END
ListenAddress 127.0.0.1:$PORT
HostKey $dir/host_key
AuthorizedKeysFile $dir/authorized_keys
PidFile none
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers $TEST_SSH_USER
MaxStartups 100
MaxSessions 100
SetEnv CCAT_RUN_DIR=$RUN_DIR
END
  spawn sshd "$(command -v sshd)" -D -e -f "$dir/config"
  SSHD_PID=$SPAWNED_PID
}

await_sshd() {
  AWAIT_PID=$SSHD_PID AWAIT_LOG=$RUN_DIR/sshd.log await 20 "sshd does not let $TEST_SSH_USER in" \
    ssh -F none -n -p "$TEST_SSHD_PORT" -i "$TEST_SSH_IDENTITY" -o BatchMode=yes -o IdentitiesOnly=yes \
    -o UserKnownHostsFile="$TEST_SSH_KNOWN_HOSTS" -o ConnectTimeout=5 "$TEST_SSH_USER@127.0.0.1" true
}

# ---------------------------------------------------------------- the build

# Path of Cargo's target directory.
target_dir() {
  (cd "$REPO" && cargo metadata --format-version 1 --no-deps) | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}
