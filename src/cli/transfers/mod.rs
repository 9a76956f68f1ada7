//! `transfers`: find, understand and steer transfers; one file for each command.

use std::process::ExitCode;

use clap::Subcommand;

use super::{CliError, Context};
use crate::transfer::id::TransferId;
use crate::transfer::repository::ListError;

mod act;
mod clean;
mod create;
mod list;
mod log;
mod outlook;
mod run;
mod selection;
mod show;
mod watch;

/// What the commands say where no transfer has the id.
fn unknown(id: TransferId) -> CliError {
    CliError::NotFound(format!(
        "there is no transfer {id}; `ccat-transfer transfers list` has those that there are"
    ))
}

#[derive(Debug, Subcommand)]
pub(super) enum TransfersCommand {
    /// List transfers, the newest first.
    List(list::List),
    /// Show one transfer: who has it, every attempt, and what comes next.
    Show {
        /// Id of the transfer.
        id: TransferId,
    },
    /// Watch copies while they run.
    Watch(watch::Watch),
    /// Have transfers tried again, now and without the failures of before.
    Retry(act::Retry),
    /// Stop transfers, whether they wait or run; they end FAILED.
    Cancel(act::Cancel),
    /// Give transfers up before they are tried (again); they end FAILED.
    Fail(act::Fail),
    /// Remove partial copies of transfers that have ended.
    Clean(clean::Clean),
    /// Print bbcp's output of an attempt.
    Log(log::Log),
    /// Make a package and a transfer that waits; not where the Python system does that.
    Create(create::Create),
    /// Do one transfer here and now, without a broker.
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
        TransfersCommand::Clean(clean) => return clean::run(context, clean).await,
        TransfersCommand::Log(log) => return log::run(context, &log).await,
        TransfersCommand::Create(create) => create::run(context, create).await?,
        TransfersCommand::Run { id } => return run::run(context, id).await,
    }
    Ok(ExitCode::SUCCESS)
}

impl From<ListError> for CliError {
    fn from(error: ListError) -> Self {
        match error {
            ListError::UnknownPlace { .. } => Self::NotFound(error.to_string()),
            ListError::Database(error) => error.into(),
        }
    }
}
