//! Tests of the double as a program: conformance with the real bbcp, injections, knobs, options and processes.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failing test has to stop"
)]

mod conformance;
mod injections;
mod knobs;
mod network;
mod options;
mod processes;
mod support;
