#!/usr/bin/env bash
#
# Builds the programs, starts private servers as scripts/test.sh does, runs one command beside them, and stops them.
#
#   scripts/with-services.sh COMMAND…
#
#   SERVICES="rabbitmq redis"   only these servers (default: rabbitmq second_rabbitmq redis postgres sshd)
#   KEEP_RUN_DIR=1              keep the servers' logs if the command fails
#
# `python` is that of .venv. See CONTRIBUTING.md.
# shellcheck disable=SC2086 # SERVICES is words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

run_begin
(($#)) || die "no command is given" "Usage: scripts/with-services.sh COMMAND…"
install_missing
make_python
say "Building the programs"
run cargo build --locked --workspace --bins --examples --features ccat-transfer/fault-points
say "Starting servers"
start_services ${SERVICES:-rabbitmq second_rabbitmq redis postgres sshd}
TARGET=$(target_dir)
export TEST_SERVICES=required BBCP_DOUBLE=$TARGET/debug/bbcp CCAT_TRANSFER_BIN=$TARGET/debug/ccat-transfer
PATH=$(dirname "$TEST_PYTHON"):$PATH
run "$@"
