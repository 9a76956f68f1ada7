//! The program: its name, the flags that every command has, and the start of its process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use celery_worker::Product;
use celery_worker::broker::Broker;
use celery_worker::liveness::LivenessRegistry;
use clap::FromArgMatches;
use service_connection::error_chain::chain;

use crate::error::ProcessError;
use crate::health::HealthRegistry;
use crate::http::HttpServer;
use crate::settings::{Problem, SettingsError, WorkerSettings};
use crate::text::visible_lines;
use crate::{log, node, traces};

/// Name and version of a program.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Name of the executable, e.g. `image-worker`. It is the prefix of error messages and the name of the service in
    /// traces.
    pub name: &'static str,
    /// Version, usually `env!("CARGO_PKG_VERSION")`.
    pub version: &'static str,
}

impl Program {
    /// A program by name and version.
    #[must_use]
    pub const fn new(name: &'static str, version: &'static str) -> Self {
        Self { name, version }
    }

    /// The program as the library shows it to others.
    #[must_use]
    pub fn product(self) -> Product {
        Product {
            name: self.name,
            version: self.version,
        }
    }

    /// The name with `_` instead of `-`: the name of the program's crate and the prefix of the names of its metrics.
    #[must_use]
    pub fn identifier(self) -> String {
        self.name.replace('-', "_")
    }

    /// Parses a command line for `command`, whose first word is the name of the program. Prints help, the version or an
    /// error and exits if the command line asks for it or is wrong.
    #[must_use]
    pub fn parse<C: FromArgMatches>(
        self,
        command: clap::Command,
        arguments: impl IntoIterator<Item = OsString>,
    ) -> C {
        let mut command = command.name(self.name).version(self.version);
        let matches = command.clone().get_matches_from(arguments);
        C::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }

    /// Prints an error with its causes to standard error, without secrets and control characters; `advice` follows it.
    pub fn report(self, error: &(dyn std::error::Error + 'static), advice: &str) {
        let text = format!("{}{advice}", chain(error));
        eprintln!("{}: {}", self.name, visible_lines(&text));
    }
}

/// Flags that every command has.
#[derive(Debug, clap::Args)]
pub struct ProcessArguments {
    /// File of settings, in TOML.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Log level, or a filter such as `warn,celery_worker=debug`.
    #[arg(short = 'l', long = "loglevel", global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,

    /// File to log to, instead of standard error; it may be renamed or emptied at any time.
    #[arg(short = 'f', long = "logfile", global = true, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
}

impl ProcessArguments {
    /// Expands the abbreviations for the node `node`, such as `%n`, in the name of the log file.
    ///
    /// # Errors
    /// [`ProcessError::Usage`] for an unknown abbreviation.
    pub fn expand_log_file(&mut self, node: &str) -> Result<(), ProcessError> {
        if let Some(path) = &self.log_file {
            self.log_file = Some(node::node_path("--logfile", path, node)?);
        }
        Ok(())
    }

    /// Starts the log, the traces and the threads, and runs a command to its end. A restart signal calls `reload`,
    /// which loads the settings again to check that the process could start with them.
    ///
    /// # Errors
    /// The error of the command, or [`ProcessError::Usage`] or [`ProcessError::Failed`] of the start.
    pub fn run<E: From<ProcessError>>(
        self,
        program: Program,
        settings: WorkerSettings,
        reload: impl Fn(Option<&Path>) -> Result<(), SettingsError> + Send + Sync + 'static,
        command: impl AsyncFnOnce(Process) -> Result<ExitCode, E>,
    ) -> Result<ExitCode, E> {
        let mut settings = settings;
        let own = program.identifier();
        if let Some(level) = self.log_level {
            log::filter(&level, &own)
                .map_err(|e| ProcessError::Usage(format!("--loglevel: {e}")))?;
            settings.log.level = level;
        }
        let tracer = traces::start(&settings.traces, program);
        log::init(&settings.log, &own, self.log_file.as_deref(), tracer)
            .map_err(|e| ProcessError::Failed(format!("--logfile: {e}")))?;
        let config = self.config;
        let process = Process {
            program,
            settings: Arc::new(settings),
            reload: Arc::new(move || reload(config.as_deref())),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| ProcessError::Failed(format!("cannot start threads: {e}")))?;
        let code = runtime.block_on(command(process));
        traces::close();
        // A local system call that hangs (a file server that does not answer) must not keep the process alive.
        runtime.shutdown_timeout(Duration::from_secs(1));
        code
    }
}

/// Loads the settings again, to check that the process could start with them.
type Reload = dyn Fn() -> Result<(), SettingsError> + Send + Sync;

/// A started process.
#[derive(Clone)]
pub struct Process {
    pub(crate) program: Program,
    pub(crate) settings: Arc<WorkerSettings>,
    pub(crate) reload: Arc<Reload>,
}

impl Process {
    /// The settings of this crate's sections.
    #[must_use]
    pub fn settings(&self) -> &WorkerSettings {
        &self.settings
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> Program {
        self.program
    }

    /// Logs the warnings of the settings. A service does this once at its start.
    pub fn log_warnings(&self) {
        for Problem {
            key,
            message,
            source,
        } in &self.settings.warnings
        {
            tracing::warn!(key, problem = message, source, "secret is exposed");
        }
    }

    /// Creates a connection to the broker, which the broker's management shows under `name`. It connects at its first
    /// use.
    ///
    /// # Errors
    /// The broker's URL cannot be used.
    pub fn broker(
        &self,
        name: &str,
        health: Option<&HealthRegistry>,
    ) -> Result<Arc<dyn Broker>, ProcessError> {
        let celery = &self.settings.celery;
        let options = celery.broker_options(name, self.program.product());
        Ok(match health {
            Some(health) => options.open(health.liveness())?,
            None => options.open(&LivenessRegistry::default())?,
        })
    }

    /// Creates a registry of health and metrics, and the HTTP server for it if the settings have an address. The server
    /// runs until the handle is dropped.
    ///
    /// # Errors
    /// The server cannot listen on the address.
    pub async fn health(&self) -> Result<(HealthRegistry, HttpServer), ProcessError> {
        let http = &self.settings.http;
        let health = HealthRegistry::new(self.program, http.stopped_after)?;
        let server = match http.address() {
            Some(address) => health.serve(address).await?,
            None => HttpServer::OFF,
        };
        Ok((health, server))
    }

    /// As [`health`](Self::health), with the pages that `pages` returns if the setting `http.page` is true. The program
    /// has to refuse requests without the token of the settings, if they contain one.
    ///
    /// # Errors
    /// The server cannot listen on the address.
    pub async fn health_with(
        &self,
        pages: impl FnOnce() -> Router,
    ) -> Result<(HealthRegistry, HttpServer), ProcessError> {
        let http = &self.settings.http;
        match http.address().filter(|_| http.page) {
            Some(address) => {
                let health = HealthRegistry::new(self.program, http.stopped_after)?;
                let server = health.serve_with(address, pages()).await?;
                Ok((health, server))
            }
            None => self.health().await,
        }
    }
}
