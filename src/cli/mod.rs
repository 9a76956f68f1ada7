//! The command line: one file for each command.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed,
//! 2 wrong usage, 3 not found, 4 settings or schema, 5 database or broker not reachable, 6 refused
//! because of the state of things.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use futures_util::future::LocalBoxFuture;
use tokio_util::task::AbortOnDropHandle;

use crate::advice;
use crate::health::Health;
use crate::metrics;
use crate::settings::{self, Problem, Settings, SettingsError};
use crate::sideport::{BindError, Board};
use crate::tasks;
use crate::telemetry;
use crate::telemetry::text::visible_lines;
use celery_worker::broker::BrokerError;
use celery_worker::broker::amqp::Amqp;
use celery_worker::celery_crate::app::Producing;
use service_connection::error_chain::chain;

use crate::transfer::database::{Database, DatabaseError};
use crate::transfer::repository::Repository;
use crate::transfer::schema::SchemaError;
use celery_worker::task::{DuplicateTask, Registry};

mod config;
mod db;
mod doctor;
mod links;
mod manager;
mod manual;
mod node;
mod operator;
mod output;
mod patience;
mod pidfile;
mod restart;
mod serve;
mod signals;
mod supervision;
mod table;
mod transfers;
mod worker;

pub use serve::Service;

/// How long a producer tries to send one message. A manager, which does so inside of a transaction,
/// waits for less, see `manager`.
const SEND_WITHIN: Duration = Duration::from_secs(5);

/// Exit code where something is not there.
const NOT_FOUND: u8 = 3;

/// Exit code for settings and schemas that do not fit.
const SETTINGS: u8 = 4;

/// Exit code for what the state of things does not allow.
const REFUSED: u8 = 6;

/// Exit code where nobody reads the output any more: that of a program that SIGPIPE has ended.
const UNREAD: u8 = 141;

/// Moves CCAT transfer packages between sites with bbcp, as a Celery worker.
#[derive(Debug, Parser)]
#[command(name = "ccat-transfer", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,

    #[command(subcommand)]
    command: Command,
}

/// What every command has.
#[derive(Debug, clap::Args)]
struct Common {
    /// File of settings; see config.default.toml or `ccat-transfer config default`.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "CCAT_DATA_TRANSFER_CONFIG"
    )]
    config: Option<PathBuf>,

    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,

    /// Log level, or a filter such as `info,ccat_transfer=debug`.
    #[arg(short = 'l', long = "loglevel", global = true, value_name = "LEVEL")]
    log_level: Option<String>,

    /// File to log to, instead of standard error; it may be renamed or emptied at any time.
    #[arg(short = 'f', long = "logfile", global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

/// A worker without transfers.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct TasksWorker {
    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    worker: serve::WorkerArguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a worker: receive transfers from queues and do them.
    Worker(Box<worker::WorkerCommand>),
    /// Schedule the transfers that wait, for ever or once.
    Manager(manager::ManagerArguments),
    /// Set up and check the operations database.
    #[command(subcommand)]
    Db(db::DbCommand),
    /// See, limit, pause and resume the links between sites.
    #[command(subcommand)]
    Links(links::LinksCommand),
    /// Find, understand and steer transfers.
    #[command(subcommand)]
    Transfers(Box<transfers::TransfersCommand>),
    /// Check the settings, or print the defaults.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Doctor(doctor::DoctorArguments),
    /// Print a script by which a shell completes this command line.
    Completions(manual::Completions),
    /// Write the manual pages.
    Man(manual::Man),
    /// List the steps at which this build can make faults, and what can happen at each.
    #[cfg(feature = "fault-points")]
    #[command(hide = true)]
    FaultPoints,
}

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    telemetry::watch_panics();
    let Cli {
        mut common,
        command,
    } = Cli::parse();
    if let Command::Worker(arguments) = &command
        && let Err(error) = common.name_files(&arguments.worker)
    {
        return ended(Err(error));
    }
    if let (Command::Doctor(_), Err(error)) = (&command, common.load()) {
        // Settings that cannot be used are a finding like any other.
        return ended(doctor::without_settings(common.json, &error));
    }
    ended(match command {
        Command::Config(command) => config::run(&command, common.json, common.load()),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::man(&arguments),
        command => common.run(async |mut context| match command {
            Command::Worker(arguments) => {
                arguments.worker.apply(&mut context)?;
                worker::run(&context, *arguments).await
            }
            Command::Manager(arguments) => manager::run(&context, &arguments).await,
            Command::Db(command) => db::run(&context, command).await,
            Command::Links(command) => links::run(&context, command).await,
            Command::Transfers(command) => transfers::run(&context, *command).await,
            Command::Doctor(arguments) => doctor::run(&context, arguments).await,
            // Were run above, without settings that have to be good.
            Command::Config(_) | Command::Completions(_) | Command::Man(_) => Ok(ExitCode::SUCCESS),
            #[cfg(feature = "fault-points")]
            Command::FaultPoints => Ok(list_fault_points()),
        }),
    })
}

/// Runs a worker with the flags and settings of `ccat-transfer worker`, but with other tasks: those
/// that `register` makes. For programs of their own, such as the example `tasks_worker`; `arguments`
/// begin with the program's name, as [`std::env::args_os`] does. A program that builds in rustls with another provider of
/// cryptography beside ring has to say which one is to be used before this (`CryptoProvider::install_default`).
#[must_use]
pub fn tasks_worker<R>(
    arguments: impl IntoIterator<Item = OsString>,
    register: impl FnOnce(Service) -> R,
) -> ExitCode
where
    R: Future<Output = Result<Registry, DuplicateTask>>,
{
    let arguments = arguments.into_iter().collect();
    run_tasks_worker(arguments, Box::new(|service| Box::pin(register(service))))
}

/// What makes the tasks of a [`tasks_worker`].
type Register<'a> = dyn FnOnce(Service) -> LocalBoxFuture<'a, Result<Registry, DuplicateTask>> + 'a;

/// Not generic: a program that calls it is not to compile the whole worker once more.
#[inline(never)]
fn run_tasks_worker(arguments: Vec<OsString>, register: Box<Register<'_>>) -> ExitCode {
    telemetry::watch_panics();
    let TasksWorker { mut common, worker } = TasksWorker::parse_from(arguments);
    if let Err(error) = common.name_files(&worker) {
        return ended(Err(error));
    }
    ended(common.run(async |mut context| {
        worker.apply(&mut context)?;
        let register = async |service| {
            register(service)
                .await
                .map_err(|e| CliError::Configuration(e.to_string()))
        };
        let (board, _port) = context.board().await?;
        let build = async |shutdown| {
            let patience = worker.wait_for.patience();
            let queues = Vec::new();
            serve::build(
                &context, &worker, &board, shutdown, patience, queues, register,
            )
            .await
        };
        serve::serve(&context, &worker, &board, build)
            .await?
            .conclude()
    }))
}

fn ended(result: Result<ExitCode, CliError>) -> ExitCode {
    result.unwrap_or_else(|error| {
        if !matches!(error, CliError::Unread) {
            let text = format!("{}{}", chain(&error), error.command());
            eprintln!("ccat-transfer: {}", visible_lines(&text));
        }
        error.code()
    })
}

impl Common {
    /// Expands the abbreviations for a worker's name in the name of the log file.
    fn name_files(&mut self, worker: &serve::WorkerArguments) -> Result<(), CliError> {
        let node = worker.node_name()?;
        if let Some(path) = &self.log_file {
            self.log_file = Some(node::node_path("--logfile", path, &node)?);
        }
        Ok(())
    }

    fn load(&self) -> Result<Settings, SettingsError> {
        settings::load(self.config.as_deref(), std::env::vars())
    }

    /// Loads the settings, starts logging and threads, and runs a command.
    fn run<R>(self, command: impl FnOnce(Context) -> R) -> Result<ExitCode, CliError>
    where
        R: Future<Output = Result<ExitCode, CliError>>,
    {
        #[cfg(feature = "fault-points")]
        crate::faults::install_in_worker();
        let mut settings = self.load()?;
        if let Some(level) = self.log_level {
            telemetry::filter(&level).map_err(|e| CliError::Usage(format!("--loglevel: {e}")))?;
            settings.log.level = level;
        }
        let tracer = traces::start(&settings.traces);
        telemetry::init(&settings.log, self.log_file.as_deref(), tracer)
            .map_err(|e| CliError::Failed(format!("--logfile: {e}")))?;
        let context = Context {
            settings: Arc::new(settings),
            json: self.json,
            config: self.config,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| CliError::Failed(format!("cannot start threads: {e}")))?;
        let code = runtime.block_on(command(context));
        traces::close();
        // A local system call that hangs (a dead file server) must not keep the process.
        runtime.shutdown_timeout(Duration::from_secs(1));
        code
    }
}

#[cfg(feature = "fault-points")]
fn list_fault_points() -> ExitCode {
    let steps = crate::faults::FaultPoint::ALL
        .iter()
        .filter(|point| !point.is_loop());
    for point in steps {
        let modes: Vec<_> = point.modes().iter().map(|mode| mode.name()).collect();
        println!("{} {}", point.name(), modes.join(" "));
    }
    ExitCode::SUCCESS
}

/// What every command needs.
struct Context {
    settings: Arc<Settings>,
    json: bool,
    /// The file of settings, to be read again.
    config: Option<PathBuf>,
}

impl Context {
    /// Says once, where a service starts, what is risky about the settings.
    fn tell_warnings(&self) {
        for Problem {
            key,
            message,
            source,
        } in &self.settings.warnings
        {
            tracing::warn!(key, problem = message, source, "a secret is not safe");
        }
    }

    async fn repository(&self) -> Result<Repository, CliError> {
        let database = Database::connect(&self.settings.ops_db).await?;
        Ok(Repository::open(database, self.settings.ops_db.text_enum_labels).await?)
    }

    /// A transport to the broker; connects when it is used.
    fn transport(&self, name: &str) -> Result<Amqp, CliError> {
        let celery = &self.settings.celery;
        Ok(Amqp::new(&celery.amqp_options(name))?)
    }

    /// What the process shows, on the side port if the settings want one.
    async fn board(&self) -> Result<(Board, Option<AbortOnDropHandle<()>>), CliError> {
        let board = Board::new(self.settings.http.stopped_after)?;
        let port = match self.settings.http.address() {
            Some(address) => Some(board.serve(address).await?),
            None => None,
        };
        Ok((board, port))
    }

    fn health(&self) -> Result<Health, CliError> {
        Health::new(&self.settings.health)
            .map_err(|e| CliError::Configuration(format!("health.redis_url: {e}")))
    }

    fn producing(&self, hostname: &str) -> Producing {
        Producing {
            hostname: hostname.to_owned(),
            default_queue: self.settings.celery.task_default_queue.clone(),
            names: tasks::wire_names(&self.settings.celery),
            queues: self.settings.celery.task_queue_declarations(),
            reply_to: None,
            within: SEND_WITHIN,
            propagation: traces::propagation(),
        }
    }
}

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error(transparent)]
    Migration(#[from] migration::MigrationError),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    SidePort(#[from] BindError),
    #[error("metrics")]
    Metrics(#[from] metrics::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Configuration(String),
    #[error("{0}")]
    Unreachable(String),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Failed(String),
    /// Nobody reads standard output any more.
    #[error("nobody reads the output any more")]
    Unread,
}

impl CliError {
    /// Whether the same may work later, without anybody's doing.
    fn is_unreachable(&self) -> bool {
        match self {
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                error.is_unreachable()
            }
            Self::Broker(
                BrokerError::Unreachable { .. }
                | BrokerError::Timeout { .. }
                | BrokerError::Blocked { .. },
            )
            | Self::Unreachable(_) => true,
            _ => false,
        }
    }

    /// The end of the text: the command that helps, if there is one.
    fn command(&self) -> &'static str {
        match self {
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                advice::database_command(error)
            }
            _ => "",
        }
    }

    fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) | Self::Migration(_) | Self::SidePort(_) | Self::Metrics(_) => 1,
            Self::Usage(_) => 2,
            Self::NotFound(_) => NOT_FOUND,
            Self::Settings(_)
            | Self::Configuration(_)
            | Self::Schema(SchemaError::Differs(_))
            | Self::Broker(BrokerError::Url(_)) => SETTINGS,
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                if error.is_unreachable() { 5 } else { SETTINGS }
            }
            Self::Broker(_) | Self::Unreachable(_) => 5,
            Self::Refused(_) => REFUSED,
            Self::Unread => UNREAD,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_lines_are_sound() {
        Cli::command().debug_assert();
        TasksWorker::command().debug_assert();
    }
}
