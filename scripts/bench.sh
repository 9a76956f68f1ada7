#!/usr/bin/env bash
#
# How fast the worker is, beside Python's and beside what the machine can do at all. Prints one table and
# writes target/bench/*.json. Installs and starts what it needs, privately; leaves nothing running.
#
#   scripts/bench.sh [--quick] [--pairs N] [NAME…]
#
# NAMEs are those of the table, or the beginnings of them; all by default. With BBCP_REAL=/path/to/bbcp the
# copies are made by a real bbcp, else by the tests' double. See docs/PERFORMANCE.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

run_begin
say "Installing what is missing"
install_missing
make_python
say "Building the release"
run cargo build --locked --release --workspace --bins --example tasks_worker
run cargo bench --locked --no-run --bench manager
BENCH_PROGRAMS=$(target_dir)/release
export RUN_DIR BENCH_PROGRAMS BENCH_RESULTS=$(target_dir)/bench
say "Starting servers"
start_services rabbitmq redis postgres
run "$TEST_PYTHON" -m scripts.bench "$@"
