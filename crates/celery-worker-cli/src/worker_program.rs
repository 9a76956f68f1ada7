//! A program that consists of a worker only.

use std::error::Error;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser};

use celery_worker::task::Registry;

use crate::error::ProcessError;
use crate::log;
use crate::program::{Process, ProcessArguments, Program};
use crate::settings::{Source, WorkerSettings};
use crate::worker::{WorkerArguments, WorkerOptions, WorkerParts};

/// Runs the tasks of this program for Celery's producers.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Arguments {
    #[command(flatten)]
    process: ProcessArguments,

    #[command(flatten)]
    worker: WorkerArguments,
}

/// A program with the flags and settings of `celery worker`, and with the caller's tasks.
#[derive(Debug, Clone)]
pub struct WorkerProgram {
    program: Program,
    source: Source,
    config_variable: String,
    warm_shutdown: Option<Duration>,
}

impl WorkerProgram {
    /// A program whose environment variables begin with its name: for `image-worker`,
    /// `IMAGE_WORKER_CELERY__WORKER_CONCURRENCY` sets `celery.worker_concurrency`, and `IMAGE_WORKER_CONFIG` names the
    /// file of settings.
    #[must_use]
    pub fn new(program: Program) -> Self {
        let prefix = format!("{}_", program.identifier().to_uppercase());
        Self {
            program,
            config_variable: format!("{prefix}CONFIG"),
            source: WorkerSettings::source(prefix),
            warm_shutdown: None,
        }
    }

    /// Sets another beginning of the names of the environment variables, e.g. `IMAGES_`.
    #[must_use]
    pub fn environment_prefix(self, prefix: &str) -> Self {
        Self {
            config_variable: format!("{prefix}CONFIG"),
            source: WorkerSettings::source(prefix.to_owned()),
            ..self
        }
    }

    /// Limits the time of a warm shutdown, after which running tasks are stopped and their messages returned. There is no
    /// limit by default.
    #[must_use]
    pub fn warm_shutdown(self, limit: Duration) -> Self {
        Self {
            warm_shutdown: Some(limit),
            ..self
        }
    }

    /// Runs the worker with the tasks that `register` returns, to its end. `arguments` begin with the name of the
    /// program, as [`std::env::args_os`] does. Errors are printed to standard error.
    ///
    /// A program that builds rustls with another provider of cryptography beside ring has to select one before
    /// (`CryptoProvider::install_default`).
    #[must_use]
    pub fn run<E: Into<Box<dyn Error + Send + Sync>>>(
        self,
        arguments: impl IntoIterator<Item = OsString>,
        register: impl AsyncFnOnce(WorkerParts) -> Result<Registry, E>,
    ) -> ExitCode {
        log::install_panic_hook();
        let variable = OsString::from(&self.config_variable);
        let command = Arguments::command().mut_arg("config", |config| config.env(variable));
        let arguments = self.program.parse(command, arguments);
        let program = self.program;
        self.start(arguments, register).unwrap_or_else(|error| {
            program.report(&error, "");
            ExitCode::from(error.exit_code())
        })
    }

    fn start<E: Into<Box<dyn Error + Send + Sync>>>(
        self,
        arguments: Arguments,
        register: impl AsyncFnOnce(WorkerParts) -> Result<Registry, E>,
    ) -> Result<ExitCode, ProcessError> {
        let Arguments {
            mut process,
            worker,
        } = arguments;
        process.expand_log_file(&worker.node_name()?)?;
        let source = self.source;
        let (mut settings, warnings) =
            source.load::<WorkerSettings>(process.config.as_deref(), std::env::vars())?;
        settings.warnings = warnings;
        worker.apply(&mut settings.celery)?;
        let reload = move |file: Option<&Path>| {
            let loaded = source.load::<WorkerSettings>(file, std::env::vars());
            loaded.map(drop)
        };
        process.run(self.program, settings, reload, async |process: Process| {
            let (health, _server) = process.health().await?;
            let options = WorkerOptions {
                queues: Vec::new(),
                warm_shutdown: self.warm_shutdown,
                deadline: worker.wait_for.deadline(),
            };
            let register = async |parts| {
                let tasks = register(parts).await;
                tasks.map_err(|error| ProcessError::Tasks(error.into()))
            };
            let build = async |shutdown| {
                process
                    .build_worker(&worker, &health, options, shutdown, register)
                    .await
            };
            let end = process.run_worker(&worker, &health, build).await?;
            end.conclude(&process)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_valid() {
        Arguments::command().debug_assert();
    }
}
