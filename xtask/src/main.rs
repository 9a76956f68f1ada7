//! Development tasks of this repository, run as `cargo xtask <task>`. Nothing of it is shipped.
#![allow(clippy::disallowed_methods, reason = "each task starts its own tools")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use api::ApiError;
use log_events::LogEventsError;
use prose::ProseError;

mod api;
mod configuration;
mod defaults;
mod log_events;
mod pages;
mod prose;

/// Development tasks of this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Write the files that are generated from the source: the defaults and documentation pages.
    Docs,
    /// Write the public API of each published crate to crates/*/public-api.txt.
    Api {
        /// Compare only, and fail if an API has changed.
        #[arg(long)]
        check: bool,
    },
    /// Compare docs/LOGGING.md with the events in the source and print the rows that differ.
    LogEvents,
    /// Report comments and texts with patterns that make them hard to read.
    Prose,
}

/// Failure of a task.
#[derive(Debug, thiserror::Error)]
enum TaskError {
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    LogEvents(#[from] LogEventsError),
    #[error(transparent)]
    Prose(#[from] ProseError),
    #[error(transparent)]
    Api(#[from] ApiError),
}

fn main() -> ExitCode {
    api::act_as_rustdoc();
    match run(&Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = format!("xtask: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(source) = cause {
                text.push_str(&format!(": {source}"));
                cause = source.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<(), TaskError> {
    match task {
        Task::Docs => pages::write_all(&repository()),
        Task::Api { check } => api::run(&repository(), *check),
        Task::LogEvents => Ok(log_events::compare(&repository())?),
        Task::Prose => Ok(prose::check(&repository())?),
    }
}

/// Root directory of the repository.
fn repository() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}
