//! `transfers run`: the worker's own code, with the lease of the row and the verification, but without a broker.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use celery_worker_cli::Signals;
use celery_worker_cli::node::{host, node_name};

use super::super::{CliError, Context, output};
use crate::advice;
use crate::notify::Notifier;
use crate::tasks::DataTransferTask;
use crate::transfer::failures::TransferError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::{Owner, Snapshot};
use crate::transfer::request::{Request, Success};
use crate::transfer::service::TransferService;

/// Runs one transfer in this process.
pub(super) async fn run(context: &Context, id: TransferId) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let repository = context.repository().await?;
    let owner = Owner::current(node_name(Some("transfers-run"), &host())?);
    // An operator who starts the transfer by hand does not want to wait for its retry delay.
    repository.forget_delay(id).await?;
    let service = TransferService::new(repository, context.settings.clone(), owner);
    let notifier = Notifier::start(&context.settings.notifications);
    let transfers = DataTransferTask::new(service).with_notifier(notifier.clone());
    let cancelled = CancellationToken::new();
    let request = Request {
        id,
        task_id: Uuid::new_v4().to_string(),
        cancelled: cancelled.clone(),
        terminated: cancelled.clone(),
        no_new_attempt: cancelled.clone(),
        redelivered: false,
        by_hand: true,
        // No message remains, so an interrupted transfer waits for the manager.
        snapshots: watch::Sender::new(Snapshot::default()),
    };
    let bar = tokio::spawn(show_progress(request.snapshots.subscribe(), context.json));
    let outcome = {
        let attempt = transfers.run(&request);
        tokio::pin!(attempt);
        loop {
            tokio::select! {
                outcome = &mut attempt => break outcome,
                () = signals.any() => cancelled.cancel(),
            }
        }
    };
    bar.abort();
    // Waits until the task has ended, normally or by `abort`.
    let _ = bar.await;
    match outcome {
        Ok(done) => {
            notifier.close().await;
            print_done(context, id, &done)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(failed) => {
            // A signal that stopped the attempt must not interrupt the update of the row.
            let request = Request {
                cancelled: CancellationToken::new(),
                ..request
            };
            let settled = transfers.on_failure(&request, &failed).await;
            notifier.close().await;
            let text = advice::explanation(&failed.error);
            if context.json {
                output::json(&json!({
                    "id": id,
                    "outcome": "failed",
                    "error_code": failed.error.code(),
                    "message": text,
                    "row": format!("{settled:?}"),
                }))?;
            }
            Err(match failed.error {
                TransferError::UnknownTransfer { .. } => CliError::NotFound(text),
                TransferError::AlreadyFailed { .. }
                | TransferError::Held { .. }
                | TransferError::DestinationBusy { .. }
                | TransferError::LinkPaused { .. }
                | TransferError::Untracked { .. } => CliError::refused(text),
                _ => CliError::failed(text),
            })
        }
    }
}

fn print_done(context: &Context, id: TransferId, done: &Success) -> Result<(), CliError> {
    let (outcome, summary) = match done {
        Success::AlreadyCompleted => ("already_completed", None),
        Success::AlreadyThere(summary) => ("already_there", Some(summary)),
        Success::Copied(summary) => ("copied", Some(summary)),
    };
    if context.json {
        return output::json(&json!({
            "id": id,
            "outcome": outcome,
            "attempt": summary.map(|s| s.attempt),
            "bytes": summary.map(|s| s.bytes),
            "elapsed_s": summary.map(|s| s.elapsed.as_secs_f64()),
            "digest": summary.map(|s| &s.digest),
        }));
    }
    match summary {
        None => println!("transfer {id} was completed before"),
        Some(summary) => println!(
            "transfer {id} completed: {} in {:.1} s, {} at both ends",
            output::size(i64::try_from(summary.bytes).unwrap_or(i64::MAX)),
            summary.elapsed.as_secs_f64(),
            summary.digest
        ),
    }
    Ok(())
}

/// Shows a progress bar on a terminal; otherwise nothing.
async fn show_progress(mut snapshots: watch::Receiver<Snapshot>, quiet: bool) {
    let bar = if quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::no_length()
    };
    let style = "{msg:<10} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    loop {
        let Snapshot { phase, progress } = *snapshots.borrow_and_update();
        bar.set_message(phase.as_str());
        if let Some(total) = progress.bytes_total {
            bar.set_length(total);
        }
        bar.set_position(progress.bytes_done);
        if snapshots.changed().await.is_err() {
            return bar.finish_and_clear();
        }
    }
}
