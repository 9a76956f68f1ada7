#!/usr/bin/env bash
#
# Draws a flame graph of the worker under load, with perf: docs/images/worker-flame.svg, or the file named.
# Installs what is missing, and starts private servers that end with the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

run_begin
say "Installing what is missing"
install_missing perf=linux-perf
make_python
say "Building the release"
run cargo build --locked --release --workspace --bins
BENCH_PROGRAMS=$(target_dir)/release
export RUN_DIR BENCH_PROGRAMS
say "Starting servers"
start_services rabbitmq
run "$TEST_PYTHON" -m scripts.bench.flame "${1:-docs/images/worker-flame.svg}"
