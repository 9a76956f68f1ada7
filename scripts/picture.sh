#!/usr/bin/env bash
#
# Draws docs/images/watch.svg: `ccat-transfer transfers watch` on a terminal (tmux), while a worker copies
# three packages with the bbcp double. A real run, with a private broker (or TEST_AMQP_URL).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

run_begin
command -v tmux >/dev/null || die "tmux is missing" "Install it: apt-get install tmux"
if [[ -z ${TEST_AMQP_URL:-} ]]; then
  say "Installing what is missing"
  install_missing
  make_python
  start_services rabbitmq redis
fi
say "Building"
run cargo build --locked --bin ccat-transfer --package ccat-transfer --package bbcp-double --bins
TARGET=$(target_dir)
export BBCP_DOUBLE=$TARGET/debug/bbcp CCAT_TRANSFER_BIN=$TARGET/debug/ccat-transfer
say "Copying and drawing"
"$TEST_PYTHON" scripts/lib/picture.py "$RUN_DIR/picture" docs/images/watch.svg
