# Short names of the common commands; `just` lists them.

features := "--features ccat-transfer/fault-points"

_default:
    @just --list

# All checks, as in CI.
test:
    scripts/test.sh

# Two transfers, seen from the outside.
demo:
    scripts/demo.sh

# Compile, lint and check the texts.
check:
    cargo fmt --all --check
    cargo clippy --locked --workspace --all-targets {{features}} -- -D warnings
    cargo xtask prose

# Unit tests of a crate, e.g. `just unit celery-protocol`.
unit crate *filter:
    cargo test -p {{crate}} {{filter}}

# Python tests beside private servers, e.g. `just python test_tasks.py -k retry`.
python file *options:
    scripts/with-services.sh python -m pytest -q tests/python/{{file}} {{options}}

# Licences, sources, duplicate and unused dependencies. Needs `cargo install --locked cargo-deny cargo-machete`.
dependencies:
    cargo deny check licenses bans sources
    cargo machete

# The documentation as a book, in target/book. Needs `cargo install --locked mdbook`.
book:
    mdbook build

# Write the generated files.
docs:
    cargo xtask docs

# Ratios against Python and against the machine's own limits.
bench *names:
    scripts/bench.sh {{names}}
