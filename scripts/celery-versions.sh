#!/usr/bin/env bash
#
# Runs fleets of our worker and a worker of another version of Celery, with a producer, a monitor and Flower of that version,
# on RabbitMQ and on Redis (tests/python/test_versions.py).
#
#   scripts/celery-versions.sh            every version of tests/python/celery_versions
#   scripts/celery-versions.sh 5.2 5.4    these
#
#   VERSIONS_TESTS="-k mingle"  further arguments for pytest
#
# Each version has a virtual environment of its own, .venv-celery-VERSION, with the packages of its file there. A version that
# needs an older Python than the newest one says so in that file: PYTHON=/path/to/python3.11.
# shellcheck disable=SC2046,SC2086 # lists of words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

case ${1:-} in -*) die "unknown flag: $1" "Usage: scripts/celery-versions.sh [VERSION…]" ;; esac
VERSIONS=("$@")
(($#)) || read -ra VERSIONS <<<"$(known_celery)"

run_begin
install_missing
make_python
make_celery "${VERSIONS[@]}"
say "Building the programs"
# As scripts/test.sh does, so that nothing is compiled twice.
run cargo build --locked --workspace --bins --examples --features ccat-transfer/fault-points
say "Starting servers"
start_services rabbitmq second_rabbitmq redis
TARGET=$(target_dir)
export TEST_SERVICES=required CCAT_TRANSFER_BIN=$TARGET/debug/ccat-transfer
CELERY_VERSIONS=$(IFS=,; printf '%s' "${VERSIONS[*]}")
export CELERY_VERSIONS
say "Running fleets with Celery ${VERSIONS[*]}"
run "$TEST_PYTHON" -m pytest -p no:cacheprovider -q -n 2 --dist loadgroup tests/python/test_versions.py ${VERSIONS_TESTS:-}
