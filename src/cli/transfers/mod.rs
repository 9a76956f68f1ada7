//! `transfers`: find, understand and change transfers; one file for each command.

use std::process::ExitCode;

use clap::Subcommand;

use super::{CliError, Context};
use crate::transfer::id::TransferId;
use crate::transfer::repository::{ListError, SiteError};

mod act;
mod clean;
mod create;
mod list;
mod log;
mod report;
mod run;
mod selection;
mod show;
mod watch;

/// The error for an id without a transfer.
fn unknown(id: TransferId) -> CliError {
    CliError::NotFound(format!(
        "there is no transfer {id}; `ccat-transfer transfers list` lists all"
    ))
}

#[derive(Debug, Subcommand)]
pub(super) enum TransfersCommand {
    /// List transfers, the newest first.
    List(list::List),
    /// Show one transfer: its worker, every attempt, and the next step.
    Show {
        /// Id of the transfer.
        id: TransferId,
    },
    /// Watch copies while they run.
    Watch(watch::Watch),
    /// Retry transfers now, without counting earlier failures.
    Retry(act::Retry),
    /// Stop waiting or running transfers; they end FAILED.
    Cancel(act::Cancel),
    /// Give up transfers before their next attempt; they end FAILED.
    Fail(act::Fail),
    /// Report what arrived, how fast, and what failed: for each link and day.
    Report(report::ReportOptions),
    /// Remove partial copies of transfers that have ended.
    Clean(clean::Clean),
    /// Print bbcp's output of an attempt.
    Log(log::Log),
    /// Create a package and its PENDING transfer; not for databases that the Python system fills.
    Create(create::Create),
    /// Run one transfer in this process, without a broker.
    Run {
        /// Id of the transfer.
        id: TransferId,
    },
}

pub(super) async fn run(
    context: &Context,
    command: TransfersCommand,
) -> Result<ExitCode, CliError> {
    match command {
        TransfersCommand::List(list) => list::run(context, list).await?,
        TransfersCommand::Show { id } => show::run(context, id).await?,
        TransfersCommand::Watch(watch) => return watch::run(context, watch).await,
        TransfersCommand::Retry(retry) => return act::run(context, retry.into()).await,
        TransfersCommand::Cancel(cancel) => return act::run(context, cancel.into()).await,
        TransfersCommand::Fail(fail) => return act::run(context, fail.into()).await,
        TransfersCommand::Report(report) => report::run(context, report).await?,
        TransfersCommand::Clean(clean) => return clean::run(context, clean).await,
        TransfersCommand::Log(log) => return log::run(context, &log).await,
        TransfersCommand::Create(create) => create::run(context, create).await?,
        TransfersCommand::Run { id } => return run::run(context, id).await,
    }
    Ok(ExitCode::SUCCESS)
}

impl From<SiteError> for CliError {
    fn from(error: SiteError) -> Self {
        match error {
            SiteError::Unknown { .. } => Self::NotFound(error.to_string()),
            SiteError::Database(error) => error.into(),
        }
    }
}

impl From<ListError> for CliError {
    fn from(error: ListError) -> Self {
        match error {
            ListError::UnknownPlace { .. } => Self::NotFound(error.to_string()),
            ListError::Database(error) => error.into(),
        }
    }
}
