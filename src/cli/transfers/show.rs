//! `transfers show`.

use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use entity::{Outcome, Status};
use serde::Serialize;

use super::super::{CliError, Context, output};
use super::list::progress;
use crate::explanation::{Explanation, RoutingInfo};
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::link::{Link, LinkName};
use crate::transfer::repository::{
    ActionRecord, AttemptRecord, LocationRecord, Repository, TransferDetail,
};
use celery_worker_cli::node::{host, node_name};

#[derive(Serialize)]
struct ShowOutput<'a> {
    #[serde(flatten)]
    detail: &'a TransferDetail,
    #[serde(rename = "outlook")]
    explanation: &'a Explanation,
}

pub(super) async fn run(context: &Context, id: TransferId) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let detail = repository.show(id).await?;
    let detail = detail.ok_or_else(|| super::unknown(id))?;
    let now = repository.database().now().await?;
    let link = link(&repository, &detail, now).await?;
    let routing = RoutingInfo::new(&context.settings, link);
    let observer = Owner::current(node_name(Some("transfers-show"), &host())?);
    let explanation = Explanation::of(&detail, &routing, &observer, now);
    if context.json {
        return output::json(&ShowOutput {
            detail: &detail,
            explanation: &explanation,
        });
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = describe(&mut text, &detail, &explanation);
    output::print(&text)
}

/// Returns the link of a waiting transfer, and the number of other transfers under way on it.
async fn link(
    repository: &Repository,
    detail: &TransferDetail,
    now: DateTime<Utc>,
) -> Result<Option<(Link, u64)>, DatabaseError> {
    let site = |location: &Option<LocationRecord>| {
        let site = location.as_ref()?.site.as_ref()?;
        Some(site.short_name.clone())
    };
    let transfer = &detail.transfer;
    let (Some(Status::Pending), Some(origin), Some(destination)) = (
        transfer.status.known(),
        site(&transfer.origin),
        site(&transfer.destination),
    ) else {
        return Ok(None);
    };
    let name = LinkName {
        origin,
        destination,
    };
    let link = repository.link(&name).await?;
    // Only a limit justifies counting all transfers under routing.
    let under_way = match link.limit(now) {
        None | Some(0) => 0,
        Some(_) => {
            let traffic = repository.traffic().await?;
            traffic.get(&name).map_or(0, |t| t.active + t.scheduled)
        }
    };
    Ok(Some((link, under_way)))
}

fn describe(
    text: &mut String,
    detail: &TransferDetail,
    explanation: &Explanation,
) -> std::fmt::Result {
    let transfer = &detail.transfer;
    writeln!(text, "transfer   {}", transfer.id)?;
    writeln!(
        text,
        "status     {}",
        output::clean(transfer.status.as_str())
    )?;
    writeln!(text, "retries    {}", transfer.retry_count)?;
    if let Some(package) = &transfer.package {
        let size = package
            .size_bytes
            .map_or_else(|| "size not recorded".into(), output::size);
        let path = output::clean(&package.relative_path);
        writeln!(text, "package    {path} ({size})")?;
    }
    for (label, location) in [("from", &transfer.origin), ("to", &transfer.destination)] {
        let Some(location) = location else { continue };
        let site = location
            .site
            .as_ref()
            .map_or("?", |site| site.short_name.as_str());
        let place = location.disk.as_ref().map_or_else(String::new, |disk| {
            let host = disk.host.as_deref().unwrap_or("(this host)");
            format!(", {host}:{}", disk.path)
        });
        let place = format!("{site}/{}{place}", location.name);
        writeln!(text, "{label:<10} {}", output::clean(&place))?;
    }
    // For a FAILED transfer this message is the reason, which is printed below.
    if let Some(message) = &transfer.failure_error_message
        && !transfer.status.means(Status::Failed)
    {
        writeln!(text, "failure    {}", output::clean(message))?;
    }
    if let Some(lease) = &detail.lease {
        let streams = lease
            .streams
            .map_or_else(String::new, |streams| format!(", {streams} streams"));
        let owner = lease.owner.to_string();
        writeln!(text, "held by    {}", output::clean(&owner))?;
        writeln!(text, "progress   {}{streams}", progress(lease))?;
        writeln!(
            text,
            "until      {} unless renewed",
            output::second(lease.expires_at)
        )?;
    }
    if let Some(bytes) = detail.bytes_verified.filter(|bytes| *bytes > 0) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        writeln!(text, "verified   {}", output::size(bytes))?;
    }
    writeln!(text, "why        {}", explanation.why)?;
    for (n, next) in explanation.next.iter().enumerate() {
        let label = if n == 0 { "next" } else { "" };
        writeln!(text, "{label:<10} {next}")?;
    }
    if !detail.attempts.is_empty() {
        writeln!(text, "\nattempts")?;
    }
    for attempt in &detail.attempts {
        describe_attempt(text, attempt)?;
    }
    if !detail.actions.is_empty() {
        writeln!(text, "\noperators")?;
    }
    for action in &detail.actions {
        describe_action(text, action)?;
    }
    Ok(())
}

fn describe_attempt(text: &mut String, attempt: &AttemptRecord) -> std::fmt::Result {
    let outcome = match attempt.outcome {
        None => "running",
        Some(Outcome::Completed) => "completed",
        Some(Outcome::Retried) => "retried",
        Some(Outcome::Failed) => "failed",
        Some(Outcome::Interrupted) => "interrupted",
    };
    let took = attempt.ended_at.map_or_else(String::new, |end| {
        format!(" for {}", output::age(end - attempt.started_at))
    });
    writeln!(
        text,
        "  {}. {outcome}, {}{took} by {}",
        attempt.attempt,
        output::second(attempt.started_at),
        output::clean(&attempt.worker)
    )?;
    match (&attempt.error_code, &attempt.message) {
        (Some(code), Some(message)) => {
            let shown = format!("{code}: {message}");
            writeln!(text, "     {}", output::clean(&shown))?;
        }
        (None, Some(message)) => writeln!(text, "     {}", output::clean(message))?,
        (_, None) => {}
    }
    if let Some(bytes) = attempt.bytes {
        let rate = attempt
            .rate_bytes_per_s
            .map(output::rate)
            .unwrap_or_default();
        writeln!(text, "     {} at {rate}", output::size(bytes))?;
    }
    if let Some(name) = &attempt.temporary_name
        && !matches!(attempt.outcome, None | Some(Outcome::Completed))
    {
        let name = output::clean(name);
        writeln!(text, "     partial copy {name} at the destination")?;
    }
    if let Some(digest) = &attempt.digest {
        writeln!(text, "     {}", output::clean(digest))?;
    }
    if let Some(log) = &attempt.log_path {
        writeln!(text, "     log {}", output::clean(log))?;
    }
    Ok(())
}

fn describe_action(text: &mut String, action: &ActionRecord) -> std::fmt::Result {
    let reason = action
        .reason
        .as_deref()
        .map_or_else(String::new, |reason| format!(": {reason}"));
    let shown = format!("{} by {}{reason}", action.action.as_str(), action.operator);
    writeln!(
        text,
        "  {}, was {}, {}",
        output::second(action.acted_at),
        output::clean(&action.previous_status),
        output::clean(&shown)
    )
}
