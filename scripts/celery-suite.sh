#!/usr/bin/env bash
#
# Runs Celery's own tests against our worker, and against Python's worker as a control. Prints the tests that pass with
# Python's worker and fail with ours; one that is not in tests/celery_suite/known_differences.toml is a failure.
#
#   scripts/celery-suite.sh            t/integration with three pairs of broker and result backend, and t/smoke; two hours
#   scripts/celery-suite.sh --short    a part of t/integration, in a few minutes, as in scripts/test.sh
#   scripts/celery-suite.sh SETUP…     integration-rabbitmq-redis, integration-rabbitmq-rpc, integration-redis-redis,
#                                      smoke-rabbitmq-redis, smoke-redis-redis
#
#   SUITE_TESTS="-k name"  further arguments for pytest
#   SUITE_KEEP=/path       copies the logs and the outcomes there
#
# Celery's source distribution comes from the package index, in the version of tests/python/requirements.txt. Our worker is the
# example `celery_suite` of crates/celery-worker-cli. In t/smoke, which starts containers, tests/celery_suite/stand_ins
# starts processes; tests that need more of a container are skipped. Both workers run at the same time, on servers of their
# own. A test that differs is run a second time; compare.py has the rules.
# shellcheck disable=SC2086 # SUITE_TESTS is words
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/services.sh
. scripts/lib/services.sh

ALL=(integration-rabbitmq-redis integration-rabbitmq-rpc integration-redis-redis smoke-rabbitmq-redis smoke-redis-redis)
HERE=$REPO/tests/celery_suite

# Modules that use no worker, or only one of their own that they start from Python code.
WITHOUT_WORKER=(
  integration/test_{backend,backend_leak_in_fixture_teardown,beat,cache_backend,connection_recovery,database_backend}
  integration/test_{events_state_memory_leak,loader,logfile_format,mem_leak_in_exception_handling,request_backend_down}
  integration/test_{security,upgrade}
  smoke/tests/test_callback_publish_retry
)

# Unpacks Celery's source distribution → CELERY, and installs what its tests need → SITE.
fetch_celery() {
  local version directory
  version=$(sed -n 's/^celery==//p' tests/python/requirements.txt)
  directory=$(target_dir)/celery-suite
  CELERY=$directory/celery-$version SITE=$directory/site
  mkdir -p "$directory"
  if [[ ! -d $CELERY/t/integration ]]; then
    run "$TEST_PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary celery -d "$directory" \
      "celery==$version" || die "pip could not download Celery's source distribution" "It needs access to PyPI."
    tar -xzf "$directory/celery-$version.tar.gz" -C "$directory"
  fi
  if ! cmp -s "$HERE/requirements.txt" "$SITE/installed.txt"; then
    rm -rf "$SITE"
    run "$TEST_PYTHON" -m pip install --quiet --disable-pip-version-check --target "$SITE" -r "$HERE/requirements.txt" ||
      die "pip could not install $HERE/requirements.txt" "It needs access to PyPI."
    cp "$HERE/requirements.txt" "$SITE/installed.txt"
  fi
}

# A second Redis, whose port is not in the variables of the first one → SECOND_REDIS_PORT.
start_second_redis() {
  mkdir "$RUN_DIR/second_redis"
  free_port
  SECOND_REDIS_PORT=$PORT
  spawn second_redis redis-server --port "$PORT" --bind 127.0.0.1 --save '' --appendonly no --dir "$RUN_DIR/second_redis"
  REDIS_PORT=$SECOND_REDIS_PORT REDIS_PID=$SPAWNED_PID await_redis
}

# run_tests SETUP KIND OUTCOMES ARGUMENT… : Celery's tests with one kind of worker.
run_tests() {
  local setup=$1 kind=$2 outcomes=$3 suite broker backend port=$REDIS_PORT amqp=$TEST_AMQP_URL
  shift 3
  IFS=- read -r suite broker backend <<<"$setup"
  if [[ $kind == rust ]]; then port=$SECOND_REDIS_PORT amqp=$SECOND_TEST_AMQP_URL; fi
  local redis=redis://127.0.0.1:$port/0
  local -A urls=([rabbitmq]=$amqp [redis]=$redis [rpc]=rpc://)
  local -a plugins=(-p suite_plugin)
  case $suite in
    integration) plugins+=(-p celery.contrib.pytest) ;;
    smoke) plugins+=(-p pytest_celery) ;;
  esac
  cd "$CELERY"
  env TEST_BROKER="${urls[$broker]}" TEST_BACKEND="${urls[$backend]}" REDIS_HOST=127.0.0.1 REDIS_PORT="$port" \
    SUITE_WORKER="$kind" SUITE_WORKER_BIN="$WORKER" SUITE_LOGS="$LOGS" SUITE_OUTCOMES="$outcomes" \
    PYTHONPATH="$HERE:$HERE/stand_ins:$SITE" \
    "$TEST_PYTHON" -m pytest "${plugins[@]}" -p no:cacheprovider -q --continue-on-collection-errors "$@" \
    >>"$LOGS/$setup-$kind.log" 2>&1 || true
}

# The tests of one setup with both kinds of worker; those that differ are run again.
run_setup() {
  local setup=$1 module
  local -a tests=(t/integration)
  [[ $setup != smoke-* ]] || tests=(t/smoke)
  for module in "${WITHOUT_WORKER[@]}"; do tests+=("--ignore=t/$module.py"); done
  if [[ -n $SHORT ]]; then tests=(-k "$SHORT" "${tests[@]}"); fi
  run_tests "$setup" python "$OUTCOMES/$setup-python.json" "${tests[@]}" ${SUITE_TESTS:-} &
  local control=$!
  run_tests "$setup" rust "$OUTCOMES/$setup-rust.json" "${tests[@]}" ${SUITE_TESTS:-}
  wait "$control"
  local -a failed
  mapfile -t failed < <("$TEST_PYTHON" "$HERE/compare.py" "$OUTCOMES" "$setup" --failed)
  if [[ -n ${failed[*]} ]]; then run_tests "$setup" rust "$OUTCOMES/$setup-again.json" "${failed[@]}"; fi
}

keep_results() {
  [[ -n ${SUITE_KEEP:-} ]] || return 0
  mkdir -p "$SUITE_KEEP"
  cp -r "$LOGS" "$OUTCOMES" "$SUITE_KEEP"
}

SHORT=
# Else the numbers of known_differences.toml.
LEAST=()
SETUPS=("$@")
case ${1:-} in
  --short)
    # Each kind of behaviour, without the tests that wait long.
    SHORT="test_task_replacement or test_xmap or test_link_error or test_signature_serialization or test_stamping or"
    SHORT+=" test_group_chains or test_tasks and (basic or properties or limits or retried or reject or unicode or"
    SHORT+=" unpickleable or pydantic or wrong_arguments or switches)"
    SETUPS=(integration-rabbitmq-redis)
    # 81 pass with Celery 5.7.0.
    LEAST=(--least 75)
    ;;
  -*) die "unknown flag: $1" "Usage: scripts/celery-suite.sh [--short | SETUP…]" ;;
  "") SETUPS=("${ALL[@]}") ;;
esac
if [[ -n ${SUITE_TESTS:-} ]]; then LEAST=(--least 1); fi
for setup in "${SETUPS[@]}"; do
  [[ " ${ALL[*]} " == *" $setup "* ]] || die "unknown setup: $setup" "Known: ${ALL[*]}"
done

run_begin
install_missing
make_python
fetch_celery
say "Building the programs"
# As scripts/test.sh does, so that nothing is compiled twice.
run cargo build --locked --workspace --bins --examples --features ccat-transfer/fault-points
WORKER=$(target_dir)/debug/examples/celery_suite
LOGS=$RUN_DIR/logs OUTCOMES=$RUN_DIR/outcomes
mkdir "$LOGS" "$OUTCOMES"
at_end keep_results
say "Starting servers"
start_services rabbitmq second_rabbitmq redis
start_second_redis
for setup in "${SETUPS[@]}"; do
  say "Running $setup"
  run run_setup "$setup"
done
run "$TEST_PYTHON" "$HERE/compare.py" "$OUTCOMES" "${SETUPS[@]}" "${LEAST[@]}"
