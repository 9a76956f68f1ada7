#!/usr/bin/env bash
#
# Draws docs/images/page.png and page-phone.png: the status page after a night with failures, in headless Chromium on a
# desk and on a phone. The past night is written into the database; what moves is real, against private servers.
#
#   CCAT_TRANSFER_BIN=… BBCP_DOUBLE=…   existing programs; they are built otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh
# shellcheck source=scripts/lib/topology.sh
. scripts/lib/topology.sh

run_begin
install_missing "${BROWSER[@]}"
make_python
if [[ -z ${CCAT_TRANSFER_BIN:-} || -z ${BBCP_DOUBLE:-} ]]; then
  # shellcheck disable=SC2086 # test.sh's features are words
  run cargo build --locked --workspace --bins ${CCAT_FEATURES:-}
  CCAT_TRANSFER_BIN=$(target_dir)/debug/ccat-transfer BBCP_DOUBLE=$(target_dir)/debug/bbcp
fi
start_services rabbitmq

DIR=$RUN_DIR/site
mkdir -p "$DIR/ccat" "$DIR/cologne" "$DIR/cornell"
cd "$DIR"
{
  two_sites "$DIR/ccat" "$DIR/cologne"
  site cornell "Cornell University" "Ithaca, New York" "$DIR/cornell"
  route cologne cornell
} >topology.toml
cat >config.toml <<END
[celery]
broker_url = "$TEST_AMQP_URL"
[ops_db]
database_sqlite_database = "$DIR/ops.sqlite"
[transfer]
log_dir = "logs"
free_space_margin = 0
[bbcp]
program = "$BBCP_DOUBLE"
progress_interval = 2
max_rate = "4m"
[manager]
sleep_time = "1s"
END
"$CCAT_TRANSFER_BIN" --config config.toml db migrate >/dev/null
"$CCAT_TRANSFER_BIN" --config config.toml db seed topology.toml >/dev/null
"$CCAT_TRANSFER_BIN" --config config.toml links set ccat cologne --max-active 4 >/dev/null
export CCAT_TRANSFER_BIN
"$TEST_PYTHON" "$REPO/scripts/lib/page_picture.py" "$DIR" "$REPO/docs/images"
note "docs/images/page.png and docs/images/page-phone.png are written"
