//! The command line: one file for each command.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not
//! found, 4 settings or schema, 5 database or broker not reachable, 6 refused because of the current state.

use std::borrow::Cow;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use crate::heartbeats::Heartbeats;
use crate::settings::{self, CONFIG_VARIABLE, Settings, SettingsError};
use crate::{PROGRAM, advice, tasks};
use celery_worker::broker::BrokerError;
use celery_worker::celery_crate::app::Producing;
use celery_worker_cli::{
    Process, ProcessArguments, ProcessError, StartError, WorkerArguments, exit_code, log, metrics,
    traces,
};

use crate::transfer::database::{Database, DatabaseError};
use crate::transfer::repository::Repository;
use crate::transfer::schema::SchemaError;

mod config;
mod db;
mod doctor;
mod links;
mod manager;
mod manual;
mod operator;
mod output;
mod parked;
mod table;
mod transfers;
mod web;
mod worker;

/// Time limit for sending one message. A manager, which sends inside of a transaction, has a shorter limit, see
/// `manager`.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Exit code for a missing transfer, link or site.
const NOT_FOUND: u8 = 3;

/// Exit code if the reader of the output has closed it: the code of a program that SIGPIPE has ended.
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

/// Flags that every command has.
#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    process: ProcessArguments,

    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a worker: receive transfers from queues and run them.
    Worker(Box<worker::WorkerCommand>),
    /// Schedule the PENDING transfers, continuously or once.
    Manager(manager::ManagerArguments),
    /// Serve the status page of the whole system; needs only the database, and only reads.
    Web(web::WebArguments),
    /// Set up and check the operations database.
    #[command(subcommand)]
    Db(db::DbCommand),
    /// See, measure, limit, pause and resume the links between sites.
    #[command(subcommand)]
    Links(links::LinksCommand),
    /// Find, understand and change transfers.
    #[command(subcommand)]
    Transfers(Box<transfers::TransfersCommand>),
    /// Check the settings, or print the defaults.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Doctor(doctor::DoctorArguments),
    /// See, requeue and delete elements of queues in Redis that are not messages.
    #[command(subcommand)]
    Parked(parked::ParkedCommand),
    /// Print the script for the completion of this command line in a shell.
    Completions(manual::Completions),
    /// Write the manual pages.
    Man(manual::Man),
    /// List the steps at which this build can inject faults, and the possible faults of each.
    #[cfg(feature = "fault-points")]
    #[command(hide = true)]
    FaultPoints,
}

/// The command line, for parsing, completions and manual pages.
fn command() -> clap::Command {
    Cli::command()
        .mut_arg("config", |argument| {
            argument
                .env(CONFIG_VARIABLE)
                .help("File of settings; see config.default.toml or `ccat-transfer config default`")
        })
        .mut_arg("log_level", |argument| {
            argument.help("Log level, or a filter such as `info,ccat_transfer=debug`")
        })
}

/// Runs the command in the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    log::install_panic_hook();
    let Cli {
        mut common,
        command,
    } = PROGRAM.parse(command(), std::env::args_os());
    if let Command::Worker(arguments) = &command
        && let Err(error) = common.expand_log_file(&arguments.worker)
    {
        return ended(Err(error));
    }
    if let (Command::Doctor(_), Err(error)) = (&command, common.load()) {
        // For `doctor`, unusable settings are a finding like any other.
        return ended(doctor::without_settings(common.json, &error));
    }
    ended(match command {
        Command::Config(command) => config::run(&command, common.json, common.load()),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::man(&arguments),
        Command::Worker(arguments) => {
            let arguments = *arguments;
            let flags = |settings: &mut Settings| arguments.worker.apply(&mut settings.celery);
            common.run(flags, async |context| {
                worker::run(&context, &arguments).await
            })
        }
        command => common.run(
            |_| Ok(()),
            async |context| match command {
                Command::Manager(arguments) => manager::run(&context, &arguments).await,
                Command::Web(arguments) => web::run(&context, &arguments).await,
                Command::Db(command) => db::run(&context, command).await,
                Command::Links(command) => links::run(&context, command).await,
                Command::Transfers(command) => transfers::run(&context, *command).await,
                Command::Doctor(arguments) => doctor::run(&context, arguments).await,
                Command::Parked(command) => parked::run(&context, command).await,
                #[cfg(feature = "fault-points")]
                Command::FaultPoints => Ok(list_fault_points()),
                // Already run above: these need no valid settings, or have flags that change them.
                Command::Config(_)
                | Command::Completions(_)
                | Command::Man(_)
                | Command::Worker(_) => Ok(ExitCode::SUCCESS),
            },
        ),
    })
}

fn ended(result: Result<ExitCode, CliError>) -> ExitCode {
    result.unwrap_or_else(|error| {
        if !matches!(error, CliError::Unread) {
            PROGRAM.report(&error, &error.command());
        }
        ExitCode::from(error.exit_code())
    })
}

impl Common {
    /// Expands the abbreviations for a worker's name in the name of the log file.
    fn expand_log_file(&mut self, worker: &WorkerArguments) -> Result<(), CliError> {
        Ok(self.process.expand_log_file(&worker.node_name()?)?)
    }

    fn load(&self) -> Result<Settings, SettingsError> {
        settings::load(self.process.config.as_deref(), std::env::vars())
    }

    /// Loads the settings, changes them by `flags`, starts the process, and runs a command.
    fn run(
        self,
        flags: impl FnOnce(&mut Settings) -> Result<(), ProcessError>,
        command: impl AsyncFnOnce(Context) -> Result<ExitCode, CliError>,
    ) -> Result<ExitCode, CliError> {
        #[cfg(feature = "fault-points")]
        crate::faults::install_in_worker();
        let mut settings = self.load()?;
        flags(&mut settings)?;
        let worker = settings.worker();
        let json = self.json;
        let reload = |file: Option<&Path>| settings::load(file, std::env::vars()).map(drop);
        let run = async |process| {
            command(Context {
                process,
                settings: Arc::new(settings),
                json,
            })
            .await
        };
        self.process.run(PROGRAM, worker, reload, run)
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

/// The started process, and the settings of all sections.
struct Context {
    process: Process,
    settings: Arc<Settings>,
    json: bool,
}

impl Context {
    async fn repository(&self) -> Result<Repository, CliError> {
        let database = Database::connect(&self.settings.ops_db).await?;
        Ok(Repository::open(database, self.settings.ops_db.text_enum_labels).await?)
    }

    fn heartbeats(&self) -> Result<Heartbeats, CliError> {
        Heartbeats::new(&self.settings.health)
            .map_err(|e| CliError::configuration(format!("health.redis_url: {e}")))
    }

    fn producing(&self, hostname: &str) -> Producing {
        Producing {
            hostname: hostname.to_owned(),
            default_queue: self.settings.celery.task_default_queue.clone(),
            names: tasks::wire_names(&self.settings.celery),
            queues: self.settings.celery.task_queue_declarations(),
            reply_to: None,
            within: SEND_TIMEOUT,
            propagation: traces::propagation(),
        }
    }
}

/// Failure of a command.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error(transparent)]
    Migration(#[from] migration::MigrationError),
    #[error("{0}")]
    NotFound(String),
    /// The reader of standard output has closed it.
    #[error("the reader of the output has closed it")]
    Unread,
}

impl CliError {
    fn usage(text: impl Into<String>) -> Self {
        ProcessError::Usage(text.into()).into()
    }

    fn configuration(text: impl Into<String>) -> Self {
        ProcessError::Configuration(text.into()).into()
    }

    fn unreachable(text: impl Into<String>) -> Self {
        ProcessError::Unreachable(text.into()).into()
    }

    fn refused(text: impl Into<String>) -> Self {
        ProcessError::Refused(text.into()).into()
    }

    fn failed(text: impl Into<String>) -> Self {
        ProcessError::Failed(text.into()).into()
    }

    /// Command that corrects the cause, as the end of the error text; empty if there is none.
    fn command(&self) -> Cow<'static, str> {
        match self {
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                advice::database_command(error).into()
            }
            Self::Schema(SchemaError::Differs(differences)) => {
                advice::schema_command(differences).into()
            }
            _ => "".into(),
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Process(error) => error.exit_code(),
            Self::Migration(_) => exit_code::FAILED,
            Self::NotFound(_) => NOT_FOUND,
            Self::Schema(SchemaError::Differs(_)) => exit_code::SETTINGS,
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                match error.is_unreachable() {
                    true => exit_code::UNREACHABLE,
                    false => exit_code::SETTINGS,
                }
            }
            Self::Unread => UNREAD,
        }
    }
}

impl StartError for CliError {
    fn is_unreachable(&self) -> bool {
        match self {
            Self::Process(error) => error.is_unreachable(),
            Self::Database(error) | Self::Schema(SchemaError::Database(error)) => {
                error.is_unreachable()
            }
            _ => false,
        }
    }
}

impl From<SettingsError> for CliError {
    fn from(error: SettingsError) -> Self {
        ProcessError::from(error).into()
    }
}

impl From<BrokerError> for CliError {
    fn from(error: BrokerError) -> Self {
        ProcessError::from(error).into()
    }
}

impl From<metrics::Error> for CliError {
    fn from(error: metrics::Error) -> Self {
        ProcessError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_valid() {
        command().debug_assert();
    }
}
