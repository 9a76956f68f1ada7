//! A stand-in for bbcp 17.12, so that everything around a copy can be tested without the real one.
//!
//! Without knobs this is a fast, faithful bbcp for local files: the same options, the same text on standard error, the
//! same exit codes, the same file states, the same processes. It opens no socket and starts no ssh; a "remote" host is
//! a directory (see [`knobs`]).
//!
//! With knobs it can fail in every way that was observed, or is expected, with the real program (see [`plan`]).
//!
//! A copy is three processes, each this same executable:
//!
//! ```text
//! bbcp OPTIONS SOURCE TARGET     agent: parses, starts the other two, prints the total, chooses the code
//!   ├─ bbcp SNK                  sink: owns the target file, prints progress and results
//!   └─ bbcp SRC                  source: reads, paces, checks; feeds the sink through a socket pair
//! ```
//!
//! Exit code 99 and a line beginning with `DOUBLE:` mean that the *test* is wrong: an unknown knob, a plan that cannot
//! be parsed, or a host name with a hidden option.
#![allow(
    clippy::disallowed_methods,
    reason = "bbcp starts its processes and stamps its output in several places"
)]

mod agent;
mod checksum;
mod console;
mod early;
mod effects;
mod failure;
mod knobs;
mod network;
mod options;
mod pace;
mod plan;
mod progress;
mod record;
mod sink;
mod source;
mod spec;
mod target;
mod watch;
mod wire;

use std::process::ExitCode;
use std::time::Duration;

/// First argument of the process that only holds standard error open (`fork-stderr`).
const HOLDER: &str = "DOUBLE-HOLD";

fn main() -> ExitCode {
    let arguments: Result<Vec<String>, _> = std::env::args_os()
        .map(std::ffi::OsString::into_string)
        .collect();
    let arguments = match arguments {
        Ok(arguments) => arguments,
        Err(other) => {
            console::line(&format!("DOUBLE: no UTF-8: {}", other.display()));
            return ExitCode::from(failure::MISUSE);
        }
    };
    let code = match arguments.get(1).map(String::as_str) {
        Some("SNK") => sink::run(),
        Some("SRC") => source::run(),
        Some(HOLDER) => hold_stderr(arguments.get(2)),
        _ => agent::run(&arguments),
    };
    ExitCode::from(code)
}

/// Keeps the inherited standard error open for `seconds`.
fn hold_stderr(seconds: Option<&String>) -> u8 {
    let seconds = seconds.and_then(|text| text.parse().ok()).unwrap_or(10.0);
    std::thread::sleep(Duration::from_secs_f64(seconds));
    0
}
