#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod clock;
mod error;
pub mod health;
pub mod http;
pub mod log;
pub mod metrics;
pub mod node;
mod program;
mod service;
pub mod settings;
pub mod text;
pub mod traces;
mod wait_for;
mod worker;
mod worker_program;

pub use error::{ProcessError, StartError, exit_code};
pub use program::{Process, ProcessArguments, Program};
pub use service::{End, Signals};
pub use wait_for::{StartDeadline, WaitFor};
pub use worker::{WorkerArguments, WorkerOptions, WorkerParts};
pub use worker_program::WorkerProgram;
