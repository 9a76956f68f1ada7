//! A program that consists of a worker only.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

use celery_worker::task::{DuplicateTask, Registry};

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
#[derive(Debug, Clone, Copy)]
pub struct WorkerProgram {
    program: Program,
    source: Source,
    config_variable: &'static str,
}

impl WorkerProgram {
    /// Creates a program whose environment variables begin with `prefix`, e.g. `WORKER_` for
    /// `WORKER_CELERY__WORKER_CONCURRENCY`. `config_variable` is the variable that names the settings file.
    #[must_use]
    pub const fn new(
        program: Program,
        prefix: &'static str,
        config_variable: &'static str,
    ) -> Self {
        Self {
            program,
            source: WorkerSettings::source(prefix),
            config_variable,
        }
    }

    /// Runs the worker with the tasks that `register` returns, to its end. `arguments` begin with the name of the
    /// program, as [`std::env::args_os`] does. Errors are printed to standard error.
    ///
    /// A program that builds rustls with another cryptography provider in addition to ring has to select one before
    /// this call (`CryptoProvider::install_default`).
    #[must_use]
    pub fn run(
        &self,
        arguments: impl IntoIterator<Item = OsString>,
        register: impl AsyncFnOnce(WorkerParts) -> Result<Registry, DuplicateTask>,
    ) -> ExitCode {
        log::install_panic_hook();
        let variable = self.config_variable;
        let command = Arguments::command().mut_arg("config", |config| config.env(variable));
        let arguments = self.program.parse(command, arguments);
        self.start(arguments, register).unwrap_or_else(|error| {
            self.program.report(&error, "");
            ExitCode::from(error.exit_code())
        })
    }

    fn start(
        &self,
        arguments: Arguments,
        register: impl AsyncFnOnce(WorkerParts) -> Result<Registry, DuplicateTask>,
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
        let reload = move |file: Option<&std::path::Path>| {
            let loaded = source.load::<WorkerSettings>(file, std::env::vars());
            loaded.map(drop)
        };
        process.run(self.program, settings, reload, async |process: Process| {
            let (health, _server) = process.health().await?;
            let options = WorkerOptions {
                queues: Vec::new(),
                warm_shutdown: None,
                deadline: worker.wait_for.deadline(),
            };
            let register = async |parts| Ok::<_, ProcessError>(register(parts).await?);
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
