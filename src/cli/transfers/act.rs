//! `transfers retry`, `cancel` and `fail`.

use std::process::ExitCode;

use clap::Args;
use entity::Action;
use serde::Serialize;

use super::super::operator::{can_ask, is_confirmed, operator, validated_reason};
use super::super::{CliError, Context, NOT_FOUND, output};
use super::selection::Filters;
use super::{clean, list};
use crate::transfer::id::TransferId;
use crate::transfer::repository::{
    Applicability, Filter, Instruction, Listing, Repository, Sort, TransferSummary,
};
use celery_worker_cli::exit_code;

/// Number of selected transfers that are shown before the question.
const SHOWN_BEFORE_ASKING: usize = 20;

#[derive(Debug, Args)]
pub(in crate::cli) struct Retry {
    #[command(flatten)]
    selection: Selection,

    /// Reason; recorded with your name.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,

    /// Also transfers that are IN_PROGRESS without a lease, if no Python worker runs them.
    #[arg(long)]
    untracked: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Cancel {
    #[command(flatten)]
    selection: Selection,

    /// Reason; recorded with your name, and written to the row.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Fail {
    #[command(flatten)]
    selection: Selection,

    /// Reason; recorded with your name, and written to the row.
    #[arg(long, value_name = "TEXT")]
    reason: String,

    /// Also transfers that are IN_PROGRESS without a lease, if no Python worker runs them.
    #[arg(long)]
    untracked: bool,
}

/// Selection of transfers, and options for its confirmation.
#[derive(Debug, Args)]
struct Selection {
    /// Ids of the transfers; or else filters.
    ids: Vec<TransferId>,

    #[command(flatten)]
    filters: Filters,

    /// Maximum number of transfers that the filters select; the lowest ids come first.
    #[arg(long)]
    limit: Option<u64>,

    /// Print what would happen, and change nothing.
    #[arg(long)]
    dry_run: bool,

    /// Do not ask, even if the transfers were selected by filters.
    #[arg(long, short)]
    yes: bool,
}

/// An action with its transfers and reason.
pub(super) struct ActionOrder {
    selection: Selection,
    action: Action,
    reason: Option<String>,
    untracked: bool,
}

impl From<Retry> for ActionOrder {
    fn from(retry: Retry) -> Self {
        Self {
            selection: retry.selection,
            action: Action::Retry,
            reason: retry.reason,
            untracked: retry.untracked,
        }
    }
}

impl From<Cancel> for ActionOrder {
    fn from(cancel: Cancel) -> Self {
        Self {
            selection: cancel.selection,
            action: Action::Cancel,
            reason: cancel.reason,
            untracked: false,
        }
    }
}

impl From<Fail> for ActionOrder {
    fn from(fail: Fail) -> Self {
        Self {
            selection: fail.selection,
            action: Action::Fail,
            reason: Some(fail.reason),
            untracked: fail.untracked,
        }
    }
}

/// Result of the action on one transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum ActionOutcome {
    Done,
    /// Result with --dry-run.
    WouldBeDone,
    Unchanged,
    Refused,
    Unknown,
}

/// Answer about one transfer.
#[derive(Debug, Serialize)]
struct ActionAnswer {
    id: TransferId,
    outcome: ActionOutcome,
    from: Option<String>,
    to: Option<String>,
    message: String,
}

pub(super) async fn run(context: &Context, order: ActionOrder) -> Result<ExitCode, CliError> {
    let ActionOrder {
        selection,
        action,
        reason,
        untracked,
    } = order;
    let by_filter = !selection.filters.is_empty();
    if selection.ids.is_empty() != by_filter || (selection.limit.is_some() && !by_filter) {
        return Err(CliError::usage(
            "name the transfers, or choose them with filters (and --limit), not both",
        ));
    }
    let instruction = Instruction {
        action,
        operator: operator(),
        reason: reason.as_deref().map(validated_reason).transpose()?,
        only: selection.filters.statuses(),
        untracked,
    };
    let repository = context.repository().await?;
    let ids = if by_filter {
        let chosen = choose(&repository, &selection).await?;
        if !selection.dry_run && !selection.yes && !chosen.is_empty() {
            confirm(&repository, action, &chosen).await?;
        }
        chosen.iter().map(|transfer| transfer.id).collect()
    } else {
        selection.ids
    };
    let service = clean::service(context, repository.clone())?;
    let mut answers = Vec::new();
    let mut failure = None;
    for id in ids {
        let verdict = if selection.dry_run {
            repository.preview(id, &instruction).await
        } else {
            repository.execute(id, &instruction).await
        };
        match verdict {
            Ok(verdict) => {
                let has_ended = ends_unheld(&verdict) && !selection.dry_run;
                let mut answer = answer(id, &instruction, verdict, selection.dry_run);
                if has_ended {
                    let cleared = service.clear_partials(id).await;
                    answer.message.push_str(&clean::summary(id, &cleared));
                }
                if !context.json {
                    output::print(&format!("{id}  {}\n", answer.message))?;
                }
                answers.push(answer);
            }
            // Stop, but report the transfers that were changed before.
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if context.json {
        output::json(&answers)?;
    } else if answers.is_empty() && failure.is_none() {
        eprintln!("no transfer was chosen");
    }
    if let Some(error) = failure {
        return Err(error.into());
    }
    Ok(code(&answers))
}

/// Returns true if the transfer is given up and no worker holds it. A worker that holds it removes the copy itself.
fn ends_unheld(verdict: &Applicability) -> bool {
    matches!(verdict, Applicability::Changed(change)
        if change.to == entity::Status::Failed && change.stopped.is_none())
}

/// Chooses the exit code. An unknown id is a mistake in the command, so it ranks above a refusal.
fn code(answers: &[ActionAnswer]) -> ExitCode {
    let any = |outcome| answers.iter().any(|answer| answer.outcome == outcome);
    if any(ActionOutcome::Unknown) {
        NOT_FOUND.into()
    } else if any(ActionOutcome::Refused) {
        exit_code::REFUSED.into()
    } else {
        ExitCode::SUCCESS
    }
}

async fn choose(
    repository: &Repository,
    selection: &Selection,
) -> Result<Vec<TransferSummary>, CliError> {
    let listing = Listing {
        filter: Filter::from(&selection.filters),
        sort: Sort::Id,
        is_reversed: true,
        limit: selection.limit,
    };
    Ok(repository.list(&listing).await?)
}

/// Asks the operator for confirmation.
async fn confirm(
    repository: &Repository,
    action: Action,
    chosen: &[TransferSummary],
) -> Result<(), CliError> {
    let what = format!("{} {} transfer(s)", action.as_str(), chosen.len());
    if !can_ask() {
        return Err(CliError::refused(format!(
            "{what}, chosen by filters: there is no terminal to confirm it; look with --dry-run, then add --yes"
        )));
    }
    let now = repository.database().now().await?;
    let shown = chosen.get(..SHOWN_BEFORE_ASKING).unwrap_or(chosen);
    eprint!("{}", list::table(shown, now));
    if chosen.len() > shown.len() {
        eprintln!("… and {} more", chosen.len() - shown.len());
    }
    match is_confirmed(&what).await? {
        true => Ok(()),
        false => Err(CliError::refused("not confirmed; nothing was changed")),
    }
}

fn answer(
    id: TransferId,
    instruction: &Instruction,
    verdict: Applicability,
    dry_run: bool,
) -> ActionAnswer {
    let (outcome, from, to, message) = match verdict {
        Applicability::Unknown => (
            ActionOutcome::Unknown,
            None,
            None,
            "unknown: there is no such transfer".into(),
        ),
        Applicability::Unchanged => (
            ActionOutcome::Unchanged,
            None,
            None,
            "unchanged: it is due already, and the manager's next pass sends it".into(),
        ),
        Applicability::Refused(refusal) => (
            ActionOutcome::Refused,
            None,
            None,
            format!("refused: {refusal}"),
        ),
        Applicability::Changed(change) => {
            let (done, would) = (ActionOutcome::Done, ActionOutcome::WouldBeDone);
            let mut message = format!("{} → {}", change.from, change.to);
            match (&change.stopped, instruction.action) {
                (Some(lease), Action::Cancel) => {
                    message.push_str(&format!(", and {} stops the copy", lease.owner));
                }
                (_, Action::Retry) => {
                    message.push_str(", due now: the manager's next pass sends it")
                }
                _ => {}
            }
            if dry_run {
                message.insert_str(0, "would be ");
            }
            let from = change.from.to_string();
            let to = change.to.to_string();
            (
                if dry_run { would } else { done },
                Some(from),
                Some(to),
                message,
            )
        }
    };
    ActionAnswer {
        id,
        outcome,
        from,
        to,
        message: output::clean(&message).into_owned(),
    }
}
