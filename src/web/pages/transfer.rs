//! The page of one transfer: everything that `transfers show` prints.

use askama::Template;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use entity::{Outcome, Status};
use humansize::{BINARY, format_size};

use super::super::model::{LogTail, Transfer};
use super::{Page, answer, filters};
use crate::transfer::lease::LeaseInfo;
use crate::transfer::repository::{ActionRecord, AttemptRecord, LocationRecord, TransferDetail};

#[derive(Template)]
#[template(path = "transfer.html")]
struct TransferPage<'a> {
    page: Page<'a>,
    id: String,
    file_name: Option<&'a str>,
    status: &'a str,
    /// True if the state will change.
    is_open: bool,
    why: &'a str,
    next: &'a [String],
    copy: Option<Copy>,
    facts: Vec<Fact>,
    attempts: Vec<Attempt<'a>>,
    actions: Vec<Action<'a>>,
    log: Option<&'a LogTail>,
}

/// A name with a value: a text or a time.
struct Fact {
    name: &'static str,
    text: String,
    at: Option<DateTime<Utc>>,
}

impl Fact {
    fn text(name: &'static str, text: impl Into<String>) -> Self {
        Self {
            name,
            text: text.into(),
            at: None,
        }
    }

    fn time(name: &'static str, at: DateTime<Utc>) -> Self {
        Self {
            name,
            text: String::new(),
            at: Some(at),
        }
    }
}

/// Progress of the running copy.
struct Copy {
    bytes_done: u64,
    bytes_total: Option<u64>,
    percent: Option<u64>,
    bytes_per_second: u64,
    remaining_s: Option<u64>,
}

impl Copy {
    fn of(lease: &LeaseInfo) -> Self {
        let done = unsigned(lease.bytes_done);
        let total = lease.bytes_total.map(unsigned);
        let rate = unsigned(lease.rate_bytes_per_s);
        Self {
            bytes_done: done,
            bytes_total: total,
            percent: total
                .and_then(|total| done.saturating_mul(100).checked_div(total))
                .map(|percent| percent.min(100)),
            bytes_per_second: rate,
            remaining_s: total.and_then(|total| total.saturating_sub(done).checked_div(rate)),
        }
    }
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

struct Attempt<'a> {
    number: String,
    class: &'static str,
    outcome: &'static str,
    started_at: DateTime<Utc>,
    ended_at: Option<DateTime<Utc>>,
    duration_s: i64,
    worker: &'a str,
    message: Option<&'a str>,
    error_code: Option<&'a str>,
    bytes: Option<i64>,
    bytes_per_second: Option<i64>,
    notes: Vec<Fact>,
}

impl<'a> Attempt<'a> {
    fn of(record: &'a AttemptRecord) -> Self {
        let (class, outcome) = match record.outcome {
            None => ("running", "Runs"),
            Some(Outcome::Completed) => ("completed", "Completed"),
            Some(Outcome::Retried) => ("retried", "Failed, another attempt follows"),
            Some(Outcome::Failed) => ("failed", "Failed, no further attempt"),
            Some(Outcome::Interrupted) => ("interrupted", "Interrupted"),
        };
        let is_over = !matches!(record.outcome, None | Some(Outcome::Completed));
        let partial = record.temporary_name.as_ref().filter(|_| is_over);
        let notes = [
            ("Partial copy at the destination", partial),
            ("Verified digest", record.digest.as_ref()),
            ("Log", record.log_path.as_ref()),
            ("Task", Some(&record.task_id)),
        ];
        Self {
            number: record.attempt.to_string(),
            class,
            outcome,
            started_at: record.started_at,
            ended_at: record.ended_at,
            duration_s: record
                .ended_at
                .map_or(0, |end| (end - record.started_at).num_seconds()),
            worker: &record.worker,
            message: record.message.as_deref(),
            error_code: record.error_code.as_deref(),
            bytes: record.bytes,
            bytes_per_second: record.rate_bytes_per_s,
            notes: notes
                .into_iter()
                .filter_map(|(name, text)| Some(Fact::text(name, text?)))
                .collect(),
        }
    }
}

struct Action<'a> {
    acted_at: DateTime<Utc>,
    action: &'static str,
    operator: &'a str,
    previous_status: &'a str,
    reason: Option<&'a str>,
}

impl<'a> Action<'a> {
    fn of(record: &'a ActionRecord) -> Self {
        Self {
            acted_at: record.acted_at,
            action: record.action.as_str(),
            operator: &record.operator,
            previous_status: &record.previous_status,
            reason: record.reason.as_deref(),
        }
    }
}

fn place(location: &LocationRecord) -> String {
    let site = location
        .site
        .as_ref()
        .map_or("?", |site| site.short_name.as_str());
    let disk = location.disk.as_ref().map_or_else(String::new, |disk| {
        let host = disk.host.as_deref().unwrap_or("(the worker's host)");
        format!(", {host}:{}", disk.path)
    });
    format!("{site}/{}{disk}", location.name)
}

fn facts(detail: &TransferDetail) -> Vec<Fact> {
    let transfer = &detail.transfer;
    let mut facts = Vec::new();
    if let Some(package) = &transfer.package {
        facts.push(Fact::text("Package", &package.relative_path));
        let size = package.size_bytes.map_or_else(
            || "not recorded".to_owned(),
            |bytes| format_size(unsigned(bytes), BINARY),
        );
        facts.push(Fact::text("Size", size));
    }
    for (name, location) in [("From", &transfer.origin), ("To", &transfer.destination)] {
        if let Some(location) = location {
            facts.push(Fact::text(name, place(location)));
        }
    }
    let times = [
        ("Created", transfer.created_at),
        ("Last attempt began", transfer.start_time),
        ("Ended", transfer.end_time),
        ("Next attempt from", detail.not_before),
    ];
    for (name, time) in times {
        facts.extend(time.map(|time| Fact::time(name, time)));
    }
    facts.push(Fact::text(
        "Failed attempts",
        transfer.retry_count.to_string(),
    ));
    // The explanation of a FAILED transfer has it already.
    if let Some(message) = &transfer.failure_error_message
        && !transfer.status.means(Status::Failed)
    {
        facts.push(Fact::text("Last failure", message));
    }
    if let Some(lease) = &detail.lease {
        facts.push(Fact::text("Worker", lease.owner.to_string()));
        if let Some(phase) = &lease.phase {
            facts.push(Fact::text("Step", phase));
        }
        if let Some(streams) = lease.streams {
            facts.push(Fact::text("Data streams", streams.to_string()));
        }
        facts.push(Fact::time("Last sign of life", lease.renewed_at));
        facts.push(Fact::time("Given up, unless renewed, at", lease.expires_at));
    }
    if let Some(bytes) = detail.bytes_verified.filter(|bytes| *bytes > 0) {
        facts.push(Fact::text(
            "Verified at both ends",
            format_size(bytes, BINARY),
        ));
    }
    facts
}

/// Renders the page of a transfer.
pub(super) fn render(base: &str, transfer: &Transfer) -> Response {
    let detail = &transfer.detail;
    let status = detail.transfer.status.known();
    let page = TransferPage {
        page: Page { base, current: "" },
        id: detail.transfer.id.to_string(),
        file_name: detail
            .transfer
            .package
            .as_ref()
            .map(|package| package.file_name.as_str()),
        status: detail.transfer.status.as_str(),
        is_open: !matches!(status, Some(Status::Completed | Status::Failed)),
        why: &transfer.explanation.why,
        next: &transfer.explanation.next,
        copy: detail.lease.as_ref().map(Copy::of),
        facts: facts(detail),
        attempts: detail.attempts.iter().map(Attempt::of).collect(),
        actions: detail.actions.iter().map(Action::of).collect(),
        log: transfer.log.as_ref(),
    };
    answer(StatusCode::OK, page.render())
}
