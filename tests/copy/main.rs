//! Copies with the bbcp double, run like the worker runs bbcp, and both kinds of ends.
//!
//! `$BBCP_DOUBLE` names the double; without it, it is built here. Remote ends need `$TEST_SSHD_PORT`,
//! `$TEST_SSH_IDENTITY` and `$TEST_SSH_KNOWN_HOSTS` (and may have `$TEST_SSH_USER`).
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod bench;
mod connections;
mod digests;
#[path = "../support/double.rs"]
mod double;
mod durable;
mod endpoints;
mod links;
mod noise;
mod runs;
#[path = "../../crates/celery-worker/tests/support/service.rs"]
mod service;
mod ssh_streams;
