#!/usr/bin/env bash
#
# How fast the worker is, beside Python's and beside what the machine can do at all. Prints one table and
# writes target/bench/*.json. Installs and starts what it needs, privately; leaves nothing running.
#
#   scripts/bench.sh [--quick] [--pairs N] [NAME…]
#
# NAMEs are those of the table, or the beginnings of them; --list shows them. With BBCP_REAL=/path/to/bbcp the
# copies are made by a real bbcp, else by the tests' double. See docs/PERFORMANCE.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

# A virtual machine's host may take back what lies free, and give it again page by page when it is used: copies in
# memory then take twice as long or not, by chance. So free memory is kept while this runs.
REPORTING=/sys/module/page_reporting/parameters/page_reporting_order
keep_free_memory() {
  [[ -e $REPORTING ]] || return 0
  REPORTED=$(cat "$REPORTING")
  if report_from 11; then # pages of an order that there is not
    at_end give_free_memory
    note "free memory stays with this machine ($REPORTING), and goes back to its host at the end"
  else
    warn "this machine's host takes back free memory, and we may not stop it ($REPORTING): copies will be uneven"
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
