#!/usr/bin/env bash
#
# Shows the complete system on one machine: two sites, a broker, a manager, a worker, and three packages that are copied.
# All servers and files are private and removed at the end. Needs Debian 12 or newer, Rust and a C compiler.
#
#   BROKER=redis         Redis as the broker and for results, instead of RabbitMQ
#   WAIT=1               keep the page and all others until Enter is pressed
#   BBCP=/path/to/bbcp   the bbcp to use; else the one on PATH, else the project's test double
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh
# shellcheck source=scripts/lib/topology.sh
. scripts/lib/topology.sh

SIZE_MB=150
RATE=30m # bytes per second of each copy, so that there is something to see
QUEUE=ccat_buffer_data_transfer
BROKER=${BROKER:-rabbitmq}

chapter() { printf '\n%s\n' "$1"; }
shown() { printf '   $ %s\n' "$*"; }
ended() { ! kill -0 "$1" 2>/dev/null; }
indent() { sed 's/^/   /'; }

failed() {
  local log
  for log in manager worker web "$BROKER"; do
    if [[ -s $RUN_DIR/$log.log ]]; then
      printf '\nend of %s.log:\n' "$log" >&2
      tail -n 15 "$RUN_DIR/$log.log" >&2
    fi
  done
  die "the demo failed: $1"
}

[[ $BROKER == rabbitmq || $BROKER == redis ]] || die "BROKER=$BROKER is not known" "BROKER is rabbitmq or redis."
say "ccat-transfer demo: packages move from a telescope to an archive"

chapter "1. What is missing"
run_begin
install_missing
make_python

chapter "2. Build"
# shellcheck disable=SC2086 # the features are words, the same as in test.sh: others would cause a second complete build
run cargo build --locked --workspace --bins --examples ${CCAT_FEATURES:-}
# As `cargo run` selects it below: other members of the workspace can add features to dependencies, which are then built
# twice, and the transfer would not wait for that.
run cargo build --locked --example enqueue ${CCAT_FEATURES:-}
TARGET=$(target_dir)
export PATH=$TARGET/debug:$PATH # for `ccat-transfer`

if [[ -n ${BBCP:-} ]]; then
  BBCP=$(command -v "$BBCP") || die "BBCP=$BBCP is not a program"
  note "bbcp: $BBCP, from the variable BBCP"
elif BBCP=$(PATH=${PATH#*:} command -v bbcp); then
  note "bbcp: $BBCP, found on PATH"
else
  BBCP=$TARGET/debug/bbcp
  note "bbcp: the project's test double, since there is none on PATH (BBCP=/path/to/bbcp selects another)"
fi

chapter "3. Two sites, three packages"
cd "$RUN_DIR"
mkdir -p ccat/packages cologne
for n in 1 2 3; do head -c "${SIZE_MB}MB" /dev/urandom >"ccat/packages/night-$n.tar"; done
cat >config.toml <<END
[ops_db]
database_sqlite_database = "$RUN_DIR/ops.sqlite"

[transfer]
log_dir = "$RUN_DIR/logs"
lease_ttl = "10s"
lease_renew_interval = "500ms"
free_space_margin = 0

[bbcp]
program = "$BBCP"
progress_interval = 2
max_rate = "$RATE"
END
two_sites "$RUN_DIR/ccat" "$RUN_DIR/cologne" >topology.toml
transfer() { ccat-transfer --config config.toml "$@"; }
# Prints the new transfer's id.
create() { transfer transfers create --package "packages/night-$1.tar" --from ccat/buffer --to cologne/buffer; }

shown "ccat-transfer db migrate"
transfer db migrate | indent
shown "ccat-transfer db seed topology.toml"
transfer db seed topology.toml | indent
note "ccat     buffer  $RUN_DIR/ccat, 3 packages of $SIZE_MB MB"
note "cologne  buffer  $RUN_DIR/cologne, empty"

chapter "4. Broker, worker, manager"
start_services "$BROKER"
if [[ $BROKER == redis ]]; then
  export CELERY_BROKER_URL=$TEST_REDIS_URL CELERY_RESULT_BACKEND=$TEST_REDIS_URL
  note "Redis at ${TEST_REDIS_URL#redis://}, for messages and results"
else
  export CELERY_BROKER_URL=$TEST_AMQP_URL CELERY_RESULT_BACKEND=rpc://
  broker=${TEST_AMQP_URL##*@}
  note "RabbitMQ at ${broker%//}"
fi
shown "ccat-transfer worker --site ccat -c 3"
spawn worker ccat-transfer --config config.toml worker --site ccat -c 3
AWAIT_PID=$SPAWNED_PID AWAIT_LOG=$RUN_DIR/worker.log await 20 "the worker did not start" \
  grep -q 'worker ready' "$RUN_DIR/worker.log"
note "ready, listening to queue $QUEUE"

free_port; PAGE=127.0.0.1:$PORT
shown "ccat-transfer web --listen $PAGE"
spawn web ccat-transfer --config config.toml web --listen "$PAGE"
AWAIT_PID=$SPAWNED_PID AWAIT_LOG=$RUN_DIR/web.log await 20 "the page is not served" port_answers "$PORT"
note "the page of the system, until the demo ends: http://$PAGE/"

chapter "5. Three ways to start a transfer"
note "The manager finds a waiting transfer:"
shown "ccat-transfer transfers create --package packages/night-1.tar --from ccat/buffer --to cologne/buffer"
first=$(create 1)
note "$first"
shown "ccat-transfer manager"
spawn manager ccat-transfer --config config.toml manager
STATUS='import sqlite3, sys
database, id = sys.argv[1:]
print(*sqlite3.connect(database, timeout=10).execute("SELECT status FROM data_transfer WHERE id = ?", [id]).fetchone())'
taken() { [[ $("$TEST_PYTHON" -c "$STATUS" "$RUN_DIR/ops.sqlite" "$first") != PENDING ]]; }
AWAIT_PID=$SPAWNED_PID AWAIT_LOG=$RUN_DIR/manager.log await 20 "the manager does not take up the transfer" taken

second=$(create 2)
third=$(create 3)
printf '\n'
note "Python Celery sends a message, by the task's name:"
shown "examples/enqueue.py transfer_files_bbcp --id $second --queue $QUEUE --wait"
spawn python "$TEST_PYTHON" "$REPO/examples/enqueue.py" transfer_files_bbcp --id "$second" --queue "$QUEUE" --wait
producers=("python $SPAWNED_PID")
printf '\n'
note "Rust does the same:"
shown "cargo run --example enqueue -- transfer_files_bbcp --id $third --queue $QUEUE --wait"
# Cargo has to run in the repository; the broker's address is passed in the environment.
# shellcheck disable=SC2086
spawn rust env -C "$REPO" cargo run --locked --quiet ${CCAT_FEATURES:-} --example enqueue -- transfer_files_bbcp --id "$third" --queue "$QUEUE" --wait
producers+=("rust $SPAWNED_PID")

chapter "6. Copying, at ${RATE%m} MB/s each"
run "$TEST_PYTHON" "$REPO/scripts/lib/progress.py" "$RUN_DIR/ops.sqlite" 120 \
  "$first=by the manager" "$second=from Python" "$third=from Rust" || failed "a transfer did not complete"

for producer in "${producers[@]}"; do
  read -r language pid <<<"$producer"
  AWAIT_LOG=$RUN_DIR/$language.log await 20 "the $language producer got no result" ended "$pid"
  grep -q SUCCESS "$RUN_DIR/$language.log" || { cat "$RUN_DIR/$language.log" >&2; failed "the $language producer's task"; }
done
note "Python got: $(tail -n 1 "$RUN_DIR/python.log")"
note "Rust got:   $(tail -n 1 "$RUN_DIR/rust.log")"

chapter "7. The database and the page"
shown "ccat-transfer transfers list"
transfer transfers list | indent
VERDICT='import json, sys, urllib.request
print(json.load(urllib.request.urlopen(sys.argv[1], timeout=10))["verdict"]["text"])'
verdict=$("$TEST_PYTHON" -c "$VERDICT" "http://$PAGE/api/v1/overview") || failed "the page does not answer"
note "the page says: $verdict"

chapter "8. The digests by sha256sum"
same=yes
for n in 1 2 3; do
  package=packages/night-$n.tar
  here=$(cd ccat && sha256sum "$package")
  there=$(cd cologne && sha256sum "$package") || failed "$package did not arrive"
  note "ccat     $here"
  note "cologne  $there"
  [[ $here == "$there" ]] || same=no
done
[[ $same == yes ]] || failed "the digests differ"
left=$(find cologne -name '.*' -type f)
[[ -z $left ]] || failed "temporary files are left: $left"

if [[ -n ${WAIT:-} ]]; then
  note "the page is still at http://$PAGE/; Enter ends the demo"
  read -r
fi

say
say "demo: ok"
