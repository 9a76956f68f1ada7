//! The search for transfers.

use askama::Template;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use humansize::{BINARY, format_size};
use url::form_urlencoded;

use super::super::error::WebError;
use super::super::model::Transfers;
use super::{Page, answer, filters};
use crate::transfer::id::TransferId;
use crate::transfer::repository::{TransferEnd, TransferSummary};

const STATUSES: [&str; 5] = ["PENDING", "SCHEDULED", "IN_PROGRESS", "COMPLETED", "FAILED"];

/// Name, label and example of each text field.
const FIELDS: [(&str, &str, &str); 7] = [
    ("id", "Ids", "one or several, such as 17, 18"),
    ("package", "File name", "a part of it, such as night-3"),
    ("origin", "From", "a site or a location: ccat, ccat/buffer"),
    ("destination", "To", "a site or a location: cologne"),
    (
        "error",
        "Error",
        "the code of the last failure, such as stalled",
    ),
    ("since", "Changed since", "24h, 7d, or 2026-12-01T18:00:00Z"),
    ("until", "Changed until", "12h, or 2026-12-02T06:00:00Z"),
];

/// The form as it was sent, so that the page can show it again.
#[derive(Debug, Clone, Default)]
pub(super) struct SearchForm {
    pairs: Vec<(String, String)>,
}

impl SearchForm {
    /// Reads the query of a URL.
    pub(super) fn parse(query: &str) -> Self {
        let pairs = form_urlencoded::parse(query.as_bytes());
        Self {
            pairs: pairs.into_owned().collect(),
        }
    }

    fn value(&self, name: &str) -> String {
        let values: Vec<_> = self
            .pairs
            .iter()
            .filter(|(key, value)| key == name && !value.is_empty())
            .map(|(_, value)| value.as_str())
            .collect();
        values.join(",")
    }

    fn has_status(&self, status: &str) -> bool {
        let values = self.value("status");
        let mut words = values.split(',').map(str::trim);
        words.any(|word| word.eq_ignore_ascii_case(status))
    }

    /// The same search from `cursor` on.
    fn continued(&self, base: &str, cursor: &str) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (name, value) in &self.pairs {
            if name != "cursor" && !value.is_empty() {
                query.append_pair(name, value);
            }
        }
        query.append_pair("cursor", cursor);
        format!("{base}/transfers?{}", query.finish())
    }
}

struct Field {
    name: &'static str,
    label: &'static str,
    hint: &'static str,
    value: String,
}

struct Row<'a> {
    id: String,
    file_name: Option<&'a str>,
    status: &'a str,
    changed_at: Option<DateTime<Utc>>,
    origin: String,
    destination: String,
    size_bytes: Option<i64>,
    detail: String,
}

impl<'a> Row<'a> {
    fn of(transfer: &'a TransferSummary) -> Self {
        Self {
            id: transfer.id.to_string(),
            file_name: transfer.file_name.as_deref(),
            status: transfer.status.as_str(),
            changed_at: transfer.changed_at,
            origin: place(transfer.origin.as_ref()),
            destination: place(transfer.destination.as_ref()),
            size_bytes: transfer.size_bytes,
            detail: detail(transfer),
        }
    }
}

fn place(end: Option<&TransferEnd>) -> String {
    end.map_or_else(
        || "unknown".to_owned(),
        |end| format!("{}/{}", end.site, end.location),
    )
}

/// The most important fact besides the status.
fn detail(transfer: &TransferSummary) -> String {
    if let Some(lease) = &transfer.lease {
        let size = |bytes| format_size(u64::try_from(bytes).unwrap_or(0), BINARY);
        let phase = lease.phase.as_deref().unwrap_or("running");
        return format!(
            "{phase}, {} at {}/s",
            size(lease.bytes_done),
            size(lease.rate_bytes_per_s)
        );
    }
    let mut facts = Vec::new();
    facts.extend(transfer.error_code.clone());
    facts.extend(
        transfer
            .not_before
            .map(|time| format!("next attempt {}", time.format("%Y-%m-%d %H:%M:%S UTC"))),
    );
    facts.extend(transfer.schedule.as_ref().map(|record| {
        let time = record.scheduled_at.format("%Y-%m-%d %H:%M:%S UTC");
        match record.resent {
            0 => format!("sent {time}"),
            count => format!("sent {time}, after {count} lost messages"),
        }
    }));
    facts.join(", ")
}

#[derive(Template)]
#[template(path = "transfers.html")]
struct TransfersPage<'a> {
    page: Page<'a>,
    fields: Vec<Field>,
    /// Statuses, and if each of them is chosen.
    statuses: Vec<(&'static str, bool)>,
    problem: Option<String>,
    found: Option<Vec<Row<'a>>>,
    next: Option<String>,
    /// Lowest id up to which the search has looked, if it did not look at all.
    searched_to: Option<TransferId>,
}

/// Renders the search with its result, or with the reason why there is none.
pub(super) fn render(
    base: &str,
    form: &SearchForm,
    result: Result<&Transfers, &WebError>,
) -> Response {
    let fields = FIELDS.map(|(name, label, hint)| Field {
        name,
        label,
        hint,
        value: form.value(name),
    });
    let found = result.ok();
    let page = TransfersPage {
        page: Page {
            base,
            current: "search",
        },
        fields: fields.into(),
        statuses: STATUSES.map(|name| (name, form.has_status(name))).into(),
        problem: result.err().map(ToString::to_string),
        found: found.map(|found| found.transfers.iter().map(Row::of).collect()),
        next: found
            .and_then(|found| found.next_cursor.as_deref())
            .map(|cursor| form.continued(base, cursor)),
        searched_to: found.and_then(|found| found.searched_to),
    };
    let status = result.map_or_else(WebError::status, |_| StatusCode::OK);
    answer(status, page.render())
}
