//! `transfers`: see, make and run transfers.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand, ValueEnum};
use entity::Status;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::db::topology_error;
use super::node::{host, node_name};
use super::signals::Signals;
use super::{CliError, Context, output};
use crate::notify::Notifier;
use crate::tasks::DataTransferTask;
use crate::transfer::error::TransferError;
use crate::transfer::lease::{LeaseInfo, Owner};
use crate::transfer::plan::LocalHost;
use crate::transfer::repository::{
    AttemptRecord, Endpoint, Filter, Location, ReleaseTo, TransferDetail, TransferSummary,
};
use crate::transfer::service::{Done, Request, Snapshot, TransferService};
use crate::transfer::topology::{self, LocationName, NewTransfer};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List transfers, the newest first.
    List {
        /// Only those in this state.
        #[arg(long)]
        status: Option<StatusArgument>,
        /// So many at most.
        #[arg(long, default_value_t = 50)]
        limit: u64,
    },
    /// Show one transfer with its lease and every attempt.
    Show {
        /// Id of the transfer.
        id: i64,
    },
    /// Make a package and a transfer that waits; not where the Python system does that.
    Create(Create),
    /// Do one transfer here and now, without a broker.
    Run {
        /// Id of the transfer.
        id: i64,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// The file: a path below the origin's directory.
    #[arg(long, value_name = "FILE")]
    package: String,
    /// Where it is, as SITE/LOCATION.
    #[arg(long, value_name = "SITE/LOCATION")]
    from: String,
    /// Where it is to be, as SITE/LOCATION.
    #[arg(long, value_name = "SITE/LOCATION")]
    to: String,
    /// Its digest, to be recorded as `sha256:HEX`.
    #[arg(long, value_name = "ALGORITHM:HEX")]
    checksum: Option<String>,
}

/// The states of a transfer.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum StatusArgument {
    Pending,
    Scheduled,
    InProgress,
    Completed,
    Failed,
}

impl From<StatusArgument> for Status {
    fn from(argument: StatusArgument) -> Self {
        match argument {
            StatusArgument::Pending => Self::Pending,
            StatusArgument::Scheduled => Self::Scheduled,
            StatusArgument::InProgress => Self::InProgress,
            StatusArgument::Completed => Self::Completed,
            StatusArgument::Failed => Self::Failed,
        }
    }
}

pub(super) async fn run(context: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::List { status, limit } => {
            let filter = Filter {
                status: status.map(Status::from),
                limit: Some(limit),
            };
            let transfers = context.repository().await?.list(filter).await?;
            if context.json {
                output::json(&transfers)?;
            } else {
                print_list(&transfers);
            }
        }
        Command::Show { id } => {
            let detail = context.repository().await?.show(id).await?;
            let detail =
                detail.ok_or_else(|| CliError::NotFound(format!("there is no transfer {id}")))?;
            if context.json {
                output::json(&detail)?;
            } else {
                print_detail(&detail);
            }
        }
        Command::Create(create) => self::create(context, create).await?,
        Command::Run { id } => return run_here(context, id).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(context: &Context, create: Create) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let origin: LocationName = create.from.parse().map_err(topology_error)?;
    let destination: LocationName = create.to.parse().map_err(topology_error)?;
    let at = topology::locate(&repository, &origin)
        .await
        .map_err(topology_error)?;
    let size_bytes = local_size(context, &at, &create.package)?;
    let new = NewTransfer {
        relative_path: create.package,
        size_bytes,
        checksum: create.checksum,
        origin,
        destination,
    };
    let id = topology::create_transfer(&repository, &new)
        .await
        .map_err(topology_error)?;
    if context.json {
        return output::json(&json!({ "id": id }));
    }
    println!("{id}");
    Ok(())
}

/// Size of a package that lies on this host; none where another host has it.
fn local_size(context: &Context, at: &Location, package: &str) -> Result<Option<u64>, CliError> {
    let Some(disk) = &at.disk else {
        return Ok(None);
    };
    let further = context
        .settings
        .transfer
        .local_hosts
        .iter()
        .map(String::as_str);
    let own = host();
    let here = LocalHost::new(&own, further);
    if disk
        .host
        .as_deref()
        .is_some_and(|host| !host.is_empty() && !here.is(host))
    {
        return Ok(None);
    }
    let path = Path::new(&disk.path).join(package);
    let facts = std::fs::metadata(&path)
        .map_err(|e| CliError::NotFound(format!("the package {}: {e}", path.display())))?;
    if facts.is_file() {
        Ok(Some(facts.len()))
    } else {
        Err(CliError::Usage(format!("{} is not a file", path.display())))
    }
}

fn print_list(transfers: &[TransferSummary]) {
    let mut table = output::table(&[
        "ID", "STATUS", "RETRIES", "FROM", "TO", "FILE", "SIZE", "PROGRESS",
    ]);
    for transfer in transfers {
        table.add_row([
            transfer.id.to_string(),
            transfer.status.to_string(),
            transfer.retry_count.to_string(),
            endpoint(transfer.origin.as_ref()),
            endpoint(transfer.destination.as_ref()),
            transfer.file_name.clone().unwrap_or_default(),
            transfer.size_bytes.map(output::size).unwrap_or_default(),
            match (&transfer.lease, transfer.not_before) {
                (Some(lease), _) => progress(lease),
                (None, Some(time)) => format!("not before {}", second(time)),
                (None, None) => String::new(),
            },
        ]);
    }
    println!("{table}");
}

/// A time to the second, in UTC.
fn second(time: DateTime<Utc>) -> impl std::fmt::Display {
    time.format("%Y-%m-%d %H:%M:%S UTC")
}

fn endpoint(endpoint: Option<&Endpoint>) -> String {
    endpoint.map_or_else(|| "?".into(), |e| format!("{}/{}", e.site, e.location))
}

fn progress(lease: &LeaseInfo) -> String {
    let share = output::percent(lease.bytes_done, lease.bytes_total.unwrap_or(0));
    format!("{share} {}", output::rate(lease.rate_bytes_per_s))
}

fn print_detail(detail: &TransferDetail) {
    let transfer = &detail.transfer;
    println!("transfer   {}", transfer.id);
    println!("status     {}", transfer.status);
    println!("retries    {}", transfer.retry_count);
    if let Some(package) = &transfer.package {
        let size = package
            .size_bytes
            .map_or_else(|| "size not recorded".into(), output::size);
        println!("package    {} ({size})", package.relative_path);
    }
    for (label, location) in [("from", &transfer.origin), ("to", &transfer.destination)] {
        let Some(location) = location else { continue };
        let site = location
            .site
            .as_ref()
            .map_or("?", |site| site.short_name.as_str());
        let place = location.disk.as_ref().map_or_else(String::new, |disk| {
            format!(
                ", {}:{}",
                disk.host.as_deref().unwrap_or("(this host)"),
                disk.path
            )
        });
        println!("{label:<10} {site}/{}{place}", location.name);
    }
    if let Some(message) = &transfer.failure_error_message {
        println!("failure    {message}");
    }
    if let Some(time) = detail.not_before {
        println!("next try   not before {}", second(time));
    }
    if let Some(lease) = &detail.lease {
        println!("held by    {}, {}", lease.owner, progress(lease));
        println!("until      {} unless renewed", lease.expires_at);
    }
    if detail.attempts.is_empty() {
        return;
    }
    println!("\nattempts");
    for attempt in &detail.attempts {
        print_attempt(attempt);
    }
}

fn print_attempt(attempt: &AttemptRecord) {
    let outcome = attempt
        .outcome
        .map_or_else(|| "running".into(), |o| format!("{o:?}").to_lowercase());
    println!(
        "  {}. {outcome}, {} by {}",
        attempt.attempt, attempt.started_at, attempt.worker
    );
    if let (Some(code), Some(message)) = (&attempt.error_code, &attempt.message) {
        println!("     {code}: {message}");
    } else if let Some(message) = &attempt.message {
        println!("     {message}");
    }
    if let Some(bytes) = attempt.bytes {
        let rate = attempt
            .rate_bytes_per_s
            .map(output::rate)
            .unwrap_or_default();
        println!("     {} at {rate}", output::size(bytes));
    }
    if let Some(digest) = &attempt.digest {
        println!("     {digest}");
    }
    if let Some(log) = &attempt.log_path {
        println!("     log {log}");
    }
}

/// The worker's own code, with the row's lease and the verification, but no broker.
async fn run_here(context: &Context, id: i64) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let repository = context.repository().await?;
    let owner = Owner::current(node_name(Some("transfers-run"), &host()));
    // Whoever starts it by hand does not want it to wait.
    repository.forget_delay(id).await?;
    let service = TransferService::new(repository, context.settings.clone(), owner);
    let notifier = Notifier::start(&context.settings.notifications);
    let transfers = DataTransferTask::new(service).with_notifier(notifier.clone());
    let cancelled = CancellationToken::new();
    let request = Request {
        id,
        task_id: Uuid::new_v4().to_string(),
        cancelled: cancelled.clone(),
        redelivered: false,
        // No message stays behind, so an interrupted transfer waits for the manager.
        release_to: ReleaseTo::Pending,
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
    // Aborted or not, it is gone.
    let _ = bar.await;
    match outcome {
        Ok(done) => {
            notifier.close().await;
            print_done(context, id, &done)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(failed) => {
            // Settling must not be cut short by what stopped the attempt.
            let request = Request {
                cancelled: CancellationToken::new(),
                ..request
            };
            let settled = transfers.on_failure(&request, &failed).await;
            notifier.close().await;
            let text = failed.error.chain();
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
                | TransferError::Untracked { .. } => CliError::Refused(text),
                _ => CliError::Failed(text),
            })
        }
    }
}

fn print_done(context: &Context, id: i64, done: &Done) -> Result<(), CliError> {
    let (outcome, summary) = match done {
        Done::AlreadyCompleted => ("already_completed", None),
        Done::AlreadyThere(summary) => ("already_there", Some(summary)),
        Done::Copied(summary) => ("copied", Some(summary)),
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
        None => println!("transfer {id} had been completed before"),
        Some(summary) => println!(
            "transfer {id} completed: {} in {:.1} s, {} at both ends",
            output::size(i64::try_from(summary.bytes).unwrap_or(i64::MAX)),
            summary.elapsed.as_secs_f64(),
            summary.digest
        ),
    }
    Ok(())
}

/// A bar on a terminal; nothing where nobody looks.
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
