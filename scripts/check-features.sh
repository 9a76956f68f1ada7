#!/usr/bin/env bash
#
# Checks that celery-worker compiles without warnings with each of its features alone. Part of a release, not of
# scripts/test.sh: each set of features compiles other dependencies, which takes minutes in a new clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RUSTFLAGS="${RUSTFLAGS:-} -D warnings"
for features in "" testing amqp redis database celery-crate "amqp,testing,fault-injection"; do
  printf '== celery-worker, features: %s\n' "${features:-none}"
  targets=()
  # The unit tests use the brokers and backends in memory, and need no feature; the integration tests name theirs.
  case $features in "" | testing | amqp) targets=(--all-targets) ;; esac
  cargo check --locked --quiet --package celery-worker --no-default-features --features "$features" "${targets[@]}"
done
