//! bbcp: its command line, its output, the classification of its failures, and the running program.
//!
//! All modules except [`process`] and its log file are pure.

pub(crate) mod command;
mod log;
pub mod outcome;
pub mod output;
mod process;
mod watchdog;

pub use process::{CopyProgress, Report, copy};
