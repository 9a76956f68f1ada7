//! bbcp: its command line, its output, the classification of its failures, and the running program.
//!
//! All modules except [`process`], its log file and [`announcement`] are pure.

mod announcement;
pub(crate) mod command;
mod log;
pub mod outcome;
pub mod output;
mod process;
mod watchdog;

pub use process::{CopyProgress, Report, copy};
