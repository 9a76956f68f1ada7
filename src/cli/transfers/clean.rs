//! `transfers clean`: removes partial copies that no attempt will complete.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::super::{CliError, Context, output};
use crate::transfer::attempt::Cleared;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::repository::{RecordedPartial, Repository};
use crate::transfer::service::TransferService;
use celery_worker_cli::node::{host, node_name};

#[derive(Debug, Args)]
pub(in crate::cli) struct Clean {
    /// Ids of the transfers; without any, all ended transfers.
    ids: Vec<TransferId>,

    /// List the partial copies and remove none.
    #[arg(long)]
    dry_run: bool,
}

/// Result for the partial copies of one transfer.
#[derive(Debug, Serialize)]
struct CleanAnswer {
    id: TransferId,
    removed: Vec<RecordedPartial>,
    kept: Vec<RecordedPartial>,
    error: Option<String>,
}

pub(super) fn service(
    context: &Context,
    repository: Repository,
) -> Result<TransferService, CliError> {
    let owner = Owner::current(node_name(Some("transfers-clean"), &host())?);
    Ok(TransferService::new(
        repository,
        context.settings.clone(),
        owner,
    ))
}

pub(super) async fn run(context: &Context, clean: Clean) -> Result<ExitCode, CliError> {
    let repository = context.repository().await?;
    let mut by_transfer = BTreeMap::<TransferId, Vec<RecordedPartial>>::new();
    for partial in repository.partials_of_ended().await? {
        let id = partial.data_transfer_id;
        if clean.ids.is_empty() || clean.ids.contains(&id) {
            by_transfer.entry(id).or_default().push(partial);
        }
    }
    if !clean.dry_run {
        repository.forget_blocks_of_ended().await?;
    }
    let service = service(context, repository)?;
    let mut answers = Vec::new();
    for (id, kept) in by_transfer {
        let answer = if clean.dry_run {
            CleanAnswer {
                id,
                removed: Vec::new(),
                kept,
                error: None,
            }
        } else {
            let cleared = service.clear_partials(id).await;
            let (kept, error) = cleared
                .kept
                .map_or((Vec::new(), None), |(kept, error)| (kept, Some(error)));
            CleanAnswer {
                id,
                removed: cleared.removed,
                kept,
                error,
            }
        };
        if !context.json {
            output::print(&lines(&answer))?;
        }
        answers.push(answer);
    }
    if context.json {
        output::json(&answers)?;
    } else if answers.is_empty() {
        eprintln!("no partial copy of an ended transfer is recorded");
    }
    match answers.iter().any(|answer| answer.error.is_some()) {
        true => Err(CliError::failed("some partial copies were not removed")),
        false => Ok(ExitCode::SUCCESS),
    }
}

fn lines(answer: &CleanAnswer) -> String {
    let CleanAnswer {
        id,
        removed,
        kept,
        error,
    } = answer;
    let line = |partial: &RecordedPartial, what: &str| {
        let size = output::size(i64::try_from(partial.bytes).unwrap_or(i64::MAX));
        let name = output::clean(&partial.temporary_name);
        format!("{id}  {name} ({size}) {what}\n")
    };
    let removed = removed.iter().map(|partial| line(partial, "removed"));
    let stays = match error {
        Some(error) => format!("not removed: {}", output::clean(error)),
        None => "is recorded".into(),
    };
    let kept = kept.iter().map(|partial| line(partial, &stays));
    removed.chain(kept).collect()
}

/// Sentence about partial copies, for the answer about a transfer that was given up.
pub(super) fn summary(id: TransferId, cleared: &Cleared) -> String {
    match &cleared.kept {
        Some((_, error)) => format!(
            "; its partial copy was not removed ({}): run `ccat-transfer transfers clean {id}` on a host \
             that reaches the destination",
            output::clean(error)
        ),
        None if cleared.removed.is_empty() => String::new(),
        None => format!(
            "; its partial copy ({}) is removed",
            output::size(i64::try_from(cleared.bytes()).unwrap_or(i64::MAX))
        ),
    }
}
