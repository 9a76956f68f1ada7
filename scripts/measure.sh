#!/usr/bin/env bash
#
# Memory and start-up time of an idle worker: release build, private broker (or TEST_AMQP_URL), SQLite.
# Fails when the median of the runs is above a limit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

RUNS=7
MAX_RSS_KB=$((40 * 1024))
MAX_READY_MS=300

run_begin
if [[ -z ${TEST_AMQP_URL:-} ]]; then
  say "Installing what is missing"
  install_missing
  start_services rabbitmq
fi
say "Building the release"
run cargo build --locked --release --bin ccat-transfer
BIN=$(target_dir)/release/ccat-transfer
if grep -aq CCAT_TRANSFER_FAULT "$BIN"; then die "the release has the tests' fault points" "See src/faults.rs."; fi

mkdir "$RUN_DIR/measure"
cd "$RUN_DIR/measure"
export CELERY_BROKER_URL=$TEST_AMQP_URL CELERY_RESULT_BACKEND=rpc://
export CCAT_OPS_DB_DATABASE_TYPE=sqlite CCAT_OPS_DB_DATABASE_SQLITE_DATABASE=$RUN_DIR/measure/ops.sqlite
export CCAT_DATA_TRANSFER_LOG__FORMAT=json CCAT_DATA_TRANSFER_LOG__LEVEL=info
"$BIN" db migrate >/dev/null

now_us() { printf '%s' "${EPOCHREALTIME/[.,]/}"; }
median() { printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"; }

# Sets READY_MS and RSS_KB.
measure_once() {
  local began line pid ready='' rss deadline
  began=$(now_us)
  # The log is read from a pipe, because polling would add to the measured time.
  exec 4< <(exec "$BIN" worker -Q measure_data_transfer -n "measure$1@%h" -c 4 2>&1 >/dev/null)
  pid=$!
  while IFS= read -r -t 10 -u 4 line; do
    if [[ $line == *'worker ready'* ]]; then
      ready=$(now_us)
      break
    fi
    printf '%s\n' "$line" >>"$RUN_DIR/worker.log"
  done
  if [[ -z $ready ]]; then
    kill -KILL "$pid" 2>/dev/null || true
    tail -n 20 "$RUN_DIR/worker.log" >&2 || true
    die "the worker did not report that it is ready"
  fi
  READY_MS=$(((ready - began + 500) / 1000))

  # Maximum within two seconds of idling.
  RSS_KB=0
  for _ in {1..10}; do
    sleep 0.2
    rss=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$pid/status")
    [[ -n $rss ]] || die "the worker ended while it was idle"
    ((rss <= RSS_KB)) || RSS_KB=$rss
  done

  kill -TERM "$pid"
  deadline=$((SECONDS + 10))
  while kill -0 "$pid" 2>/dev/null; do
    ((SECONDS < deadline)) || die "the worker does not end on SIGTERM"
    sleep 0.05
  done
  exec 4<&-
}

say "Starting an idle worker $RUNS times"
times=() memory=()
for ((i = 1; i <= RUNS; i++)); do
  measure_once "$i"
  times+=("$READY_MS") memory+=("$RSS_KB")
  printf '   run %s: ready after %4s ms, resident %6s kB\n' "$i" "$READY_MS" "$RSS_KB"
done
ready=$(median "${times[@]}")
rss=$(median "${memory[@]}")
printf 'ready: %s ms (limit %s), resident: %s.%s MB (limit %s), medians of %s runs; binary %s MB\n' \
  "$ready" "$MAX_READY_MS" $((rss / 1024)) $((rss % 1024 * 10 / 1024)) $((MAX_RSS_KB / 1024)) "$RUNS" \
  $(($(stat -c %s "$BIN") / 1048576))
((ready <= MAX_READY_MS)) || die "start-up is too slow"
((rss <= MAX_RSS_KB)) || die "the idle worker is too large"
