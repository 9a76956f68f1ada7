//! bbcp: its command line, its output, the classification of its failures, and the running program.
//!
//! All modules except [`process`] and [`announcement`] are pure.

mod announcement;
pub(crate) mod command;
mod notation;
pub mod outcome;
pub mod output;
mod process;

pub(crate) use notation::size;
pub use process::copy;
