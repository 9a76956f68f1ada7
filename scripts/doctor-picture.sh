#!/usr/bin/env bash
#
# Draws docs/images/doctor.svg: the output of `ccat-transfer doctor` on a terminal, on a set-up with faults. A real run,
# against private servers; see scripts/lib/services.sh.
#
#   CCAT_TRANSFER_BIN=… BBCP_DOUBLE=…   existing programs; they are built otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh
# shellcheck source=scripts/lib/topology.sh
. scripts/lib/topology.sh

run_begin
install_missing
make_python
if [[ -z ${CCAT_TRANSFER_BIN:-} || -z ${BBCP_DOUBLE:-} ]]; then
  # shellcheck disable=SC2086 # test.sh's features are words
  run cargo build --locked --workspace --bins ${CCAT_FEATURES:-}
  CCAT_TRANSFER_BIN=$(target_dir)/debug/ccat-transfer BBCP_DOUBLE=$(target_dir)/debug/bbcp
fi
start_services rabbitmq sshd

# Short names, because they appear in the picture.
DIR=$RUN_DIR/site
mkdir -p "$DIR/fyst" "$DIR/archive"
cd "$DIR"
two_sites "$DIR/fyst" "$DIR/archive" 127.0.0.1 >topology.toml
# Faults: no Redis at its address, no bbcp at the other end, and too little free space.
free_port
cat >config.toml <<END
[celery]
broker_url = "$TEST_AMQP_URL"
result_backend = "redis://127.0.0.1:$PORT/0"
[ops_db]
database_sqlite_database = "$DIR/ops.sqlite"
[transfer]
log_dir = "logs"
free_space_margin = 5000000000000
[bbcp]
program = "$BBCP_DOUBLE"
remote_program = "/opt/bbcp/bin/bbcp"
[ssh]
port = $TEST_SSHD_PORT
user = "$TEST_SSH_USER"
identity_file = "$TEST_SSH_IDENTITY"
known_hosts_file = "$TEST_SSH_KNOWN_HOSTS"
END
"$CCAT_TRANSFER_BIN" --config config.toml db migrate >/dev/null
"$CCAT_TRANSFER_BIN" --config config.toml db seed topology.toml >/dev/null
# One more fault: a queue declared with other arguments.
"$TEST_PYTHON" - "$TEST_AMQP_URL" <<'END'
import sys

import kombu

with kombu.Connection(sys.argv[1]) as connection, connection.channel() as channel:
    channel.queue_declare("ccat_buffer_data_transfer", durable=True, auto_delete=False, arguments={"x-max-priority": 10})
END
"$TEST_PYTHON" "$REPO/scripts/lib/terminal_svg.py" "$REPO/docs/images/doctor.svg" \
  "$DIR=/data" "$(dirname "$BBCP_DOUBLE")=/usr/local/bin" -- "$CCAT_TRANSFER_BIN" --config config.toml doctor
note "docs/images/doctor.svg is written"
