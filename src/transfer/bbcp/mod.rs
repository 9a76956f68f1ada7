//! bbcp: its command line, its output, what its end means, and the running program.
//!
//! All but [`process`] and its log file is pure.

pub(crate) mod command;
mod log;
pub mod outcome;
pub mod output;
mod process;
mod watchdog;

pub use process::{CopyProgress, Report, copy};
