#!/usr/bin/env bash
#
# Every check of the project, as CI runs them. Needs Debian 12 or newer, Rust and a C compiler; installs
# the rest. Its servers are private, and nothing is left running. See scripts/lib/services.sh.
#
#   KEEP_RUN_DIR=1   keep the servers' logs when a check fails
#   BBCP_REAL=/path  run the conformance cases, and a fault at every step, with a real bbcp too
#   SOAK_TRANSFERS=500 SOAK_SEED=7 DATABASE_OUTAGE=60 NOISE_SECONDS=30 WALK_STEPS=10000 WALK_SEED=7
#   REDIS_TASKS=10000 REDIS_SOAK_TASKS=20000 LOAD_TASKS=20000
#   EVERY_STEP=1     a fault at every step with each pair of broker and database
#                    lengthen tests that are short by default, see the tests that read these variables
#   PARSER_ROUNDS=100000 PARSER_SEED=7
#                    more damaged inputs for each parser, and with another seed, see crates/hostile-inputs
#   CELERY_VERSIONS=5.2,5.4
#                    also run fleets with these versions of Celery, see scripts/celery-versions.sh
# shellcheck disable=SC2086 # CCAT_FEATURES and CELERY_VERSIONS are words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

FAILED=()   # titles
FAILURES=() # their logs
PASSED=0
BEGAN=$SECONDS
NEEDED_MB=6000 # of the target directory and the servers

# check TITLE CMD… : a step whose failure does not stop the others.
check() {
  local title=$1 began=$SECONDS status=0 log
  shift
  log=$RUN_DIR/check-$((PASSED + ${#FAILED[@]})).log
  printf '\n== %s\n' "$title"
  run "$@" > >(tee "$log") 2>&1 || status=$?
  if ((status)); then
    if ((status == 124)); then title+=" (timed out)"; fi
    FAILED+=("$title")
    FAILURES+=("$log")
    printf -- '-- %s: FAILED (%s s)\n' "$title" $((SECONDS - began))
  else
    PASSED=$((PASSED + 1))
    printf -- '-- %s: ok (%s s)\n' "$title" $((SECONDS - began))
  fi
  return "$status"
}

summary() {
  local took=$((SECONDS - BEGAN)) i
  printf '\n'
  for ((i = 0; i < ${#FAILED[@]}; i++)); do
    printf 'failed: %s\n' "${FAILED[i]}"
    # Printed again at the end, because some viewers cut off earlier output.
    grep -aE '^(test .* FAILED$|FAILED |ERROR |error(:|\[)|Diff in )' "${FAILURES[i]}" | sort -u | head -n 40 | sed 's/^/   /' || true
  done
  printf 'test.sh: %s checks ok, %s failed, in %s min %s s\n' "$PASSED" "${#FAILED[@]}" $((took / 60)) $((took % 60))
  ((${#FAILED[@]} == 0)) || exit 1
}

# A step that the later ones need: if it fails, prints the summary and stops.
must() { check "$@" || summary; }

run_begin
export CARGO_NET_RETRY=${CARGO_NET_RETRY:-5}
if [[ -n ${CI:-} ]]; then
  # Of no use to a clone that is built once, and a fifth of the disk space.
  export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_STRIP=debuginfo
fi
free=$(df --output=avail -BM . | tail -n 1 | tr -dc 0-9)
if ((free < NEEDED_MB)); then
  warn "$free MB are free in $PWD, and the build and the tests write up to $NEEDED_MB MB: a step can fail for lack of space"
fi

printf '== what is missing\n'
install_missing promtool=prometheus pgbouncer=pgbouncer logrotate=logrotate "${BROWSER[@]}"
make_python
CELERY_VERSIONS=${CELERY_VERSIONS:-}
CELERY_VERSIONS=${CELERY_VERSIONS//,/ }
make_celery $CELERY_VERSIONS
note "$("$TEST_PYTHON" --version), Celery $("$TEST_PYTHON" -c 'import celery; print(celery.__version__)'), $(rustc --version)"

# The tested build has named fault points (src/faults.rs); the shipped one has none, and is checked separately.
export CCAT_FEATURES="--features ccat-transfer/fault-points"
check "format" cargo fmt --all --check || true
check "spelling" "${TEST_PYTHON%/*}/typos" || true
check "prose" cargo xtask prose || true
must "clippy" cargo clippy --locked --workspace --all-targets $CCAT_FEATURES -- -D warnings
must "clippy, as shipped" cargo clippy --locked -- -D warnings
must "build" cargo build --locked --workspace --all-targets $CCAT_FEATURES

# A changed API is written by `cargo xtask api`.
check "public API" cargo xtask api --check || true

TARGET=$(target_dir)
export BBCP_DOUBLE=$TARGET/debug/bbcp CCAT_TRANSFER_BIN=$TARGET/debug/ccat-transfer

printf '\n== servers\n'
export TEST_SERVICES=required # a test that finds no server fails
began=$SECONDS
start_services rabbitmq second_rabbitmq third_rabbitmq redis postgres sshd
broker=${TEST_AMQP_URL##*@}
note "RabbitMQ ${broker%//}, Redis ${TEST_REDIS_URL#redis://}, PostgreSQL ${TEST_POSTGRES_URL##*@}, sshd 127.0.0.1:$TEST_SSHD_PORT"
printf -- '-- servers: ready (%s s)\n' $((SECONDS - began))

# The time limits only prevent that a hang blocks CI.
check "unit, property, integration and documentation tests" \
  timeout --kill-after 10 1500 cargo test --locked --workspace --no-fail-fast $CCAT_FEATURES || true
# The release for the memory check, with the processor time that the next tests leave.
spawn release nice -n 19 cargo build --locked --release --bin ccat-transfer
check "Python interoperability" \
  timeout --kill-after 10 1500 env -u CELERY_VERSIONS "$TEST_PYTHON" -m pytest -p no:cacheprovider -q -n 3 --dist loadfile \
    --durations 15 tests/python || true
check "a part of Celery's own tests" timeout --kill-after 10 900 scripts/celery-suite.sh --short || true
if [[ -n $CELERY_VERSIONS ]]; then
  check "fleets with Celery $CELERY_VERSIONS" timeout --kill-after 10 1500 scripts/celery-versions.sh $CELERY_VERSIONS || true
fi
check "memory and start-up time" timeout --kill-after 10 1500 scripts/measure.sh || true
check "demo" timeout --kill-after 10 600 scripts/demo.sh || true

summary
