#!/usr/bin/env bash
#
# Compares the speed of the worker with Python's worker and with the maximum that the machine allows. Prints one table and
# writes target/bench/*.json. Installs what is missing, and starts private servers that end with the script.
#
#   scripts/bench.sh [--quick] [--pairs N] [NAME…]
#
# A NAME is the name of a comparison, or its beginning; --list shows them. `link` compares transfers between two hosts with a
# round trip of 240 ms (see scripts/longlink.sh; needs root), `web` the status page with a million transfers; both run only if they are
# named. BENCH_BEFORE=/path/to/target/release of another
# build, and the NAME `before`, compare our worker with that of the other build in turns. With BBCP_REAL=/path/to/bbcp a
# real bbcp makes the copies, else the tests' double. See docs/PERFORMANCE.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

# The host of a virtual machine may reclaim free memory, and return it page by page when it is used: copies in memory
# then sometimes take twice as long. So this script turns that off while it runs.
REPORTING=/sys/module/page_reporting/parameters/page_reporting_order
keep_free_memory() {
  [[ -e $REPORTING ]] || return 0
  REPORTED=$(cat "$REPORTING")
  if report_from 11; then # an order that does not exist: no page is reported
    at_end give_free_memory
    note "free memory stays with this machine ($REPORTING) until the end"
  else
    warn "the host of this machine reclaims free memory, and this script may not turn that off ($REPORTING): copies will vary"
  fi
}
report_from() { { echo "$1" >"$REPORTING"; } 2>/dev/null; }
give_free_memory() { report_from "$REPORTED"; }

build=(cargo build --locked --release --workspace --bins)

run_begin
if [[ " $* " == *" --list "* ]]; then
  install_missing
  make_python
  run "$TEST_PYTHON" -m scripts.bench --list
  exit
fi
say "Building the release, and meanwhile installing what is missing and starting servers"
need_compiler
spawn release "${build[@]}"
built=$SPAWNED_PID
install_missing
make_python
keep_free_memory
start_services rabbitmq redis postgres
run tail -n +1 -f --pid="$built" "$RUN_DIR/release.log"
run "${build[@]}" # nothing is left to do, or it fails once more, for all to see
BENCH_PROGRAMS=$(target_dir)/release
export RUN_DIR BENCH_PROGRAMS BENCH_RESULTS=$(target_dir)/bench
run "$TEST_PYTHON" -m scripts.bench "$@"
