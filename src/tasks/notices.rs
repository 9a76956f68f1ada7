//! Notices to administrators about transfers. The events are: a transfer has failed permanently, a transfer has
//! completed after that, a link works again.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use entity::Outcome;

use super::base::DataTransferTask;
use crate::advice;
use crate::notify::{Notice, Notifier};
use crate::transfer::failures::{Scope, TransferError};
use crate::transfer::id::TransferId;
use crate::transfer::repository::{AttemptRecord, LocationRecord, TransferDetail, TransferRecord};
use service_connection::error_chain::chain;

/// Maximum number of attempts that a text lists; the latest ones.
const ATTEMPTS: usize = 10;

/// Links (short names of both sites) on which a transfer was given up since the start of this process, if none has
/// completed on them since.
#[derive(Debug, Default)]
pub(super) struct BrokenLinks(Mutex<HashSet<(String, String)>>);

impl BrokenLinks {
    /// Records a transfer that was given up and its link, if the link is the cause.
    fn record_failure(&self, transfer: &TransferRecord, scope: Scope) {
        if let (Scope::Link, Some(link)) = (scope, link(transfer)) {
            self.lock().insert(link);
        }
    }

    /// Returns true if a transfer that has completed shows that its link works again.
    fn record_success(&self, transfer: &TransferRecord) -> bool {
        link(transfer).is_some_and(|link| self.lock().remove(&link))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<(String, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DataTransferTask {
    /// Sends the notice about a transfer that was given up.
    pub(super) async fn notify_failure(&self, id: TransferId, error: &TransferError) {
        let Some((notifier, detail)) = self.detail(id).await else {
            return;
        };
        self.broken_links
            .record_failure(&detail.transfer, error.scope());
        notifier.notify(failed(&detail, error));
    }

    /// Sends the notice about a transfer that has completed after it was given up, or whose link works again.
    pub(super) async fn notify_recovery(&self, id: TransferId) {
        let Some((notifier, detail)) = self.detail(id).await else {
            return;
        };
        let works_again = self.broken_links.record_success(&detail.transfer);
        if let Some(notice) = recovered(&detail, works_again) {
            notifier.notify(notice);
        }
    }

    /// Reads the content of a notice, if notices are sent. The row is written already: if this fails now, only the
    /// notice is lost.
    async fn detail(&self, id: TransferId) -> Option<(&Notifier, TransferDetail)> {
        let notifier = self.notifier.as_ref()?;
        match self.service().repository().show(id).await {
            Ok(detail) => Some((notifier, detail?)),
            Err(error) => {
                tracing::warn!(
                    data_transfer_id = id.get(),
                    error = %chain(&error),
                    "notice not sent: the transfer's row could not be read"
                );
                None
            }
        }
    }
}

fn link(transfer: &TransferRecord) -> Option<(String, String)> {
    let site = |location: &Option<LocationRecord>| {
        let site = location.as_ref()?.site.as_ref()?;
        Some(site.short_name.clone())
    };
    Some((site(&transfer.origin)?, site(&transfer.destination)?))
}

/// The notice about a transfer that was given up.
fn failed(detail: &TransferDetail, error: &TransferError) -> Notice {
    let id = detail.transfer.id;
    let mut text = format!(
        "why         {}\n\
         what to do  {} Then set the row to PENDING with retry_count 0 to try it again.\n",
        advice::explanation(error),
        advice::remedy(error.kind())
    );
    describe(&mut text, detail);
    Notice {
        subject: format!(
            "data transfer {id} has FAILED and is not tried again: {}",
            error.code()
        ),
        text,
    }
}

/// The notice about a transfer that has completed, if it needs one.
fn recovered(detail: &TransferDetail, link_works_again: bool) -> Option<Notice> {
    let TransferRecord { id, .. } = detail.transfer;
    let had_failed = detail
        .attempts
        .iter()
        .any(|attempt| attempt.outcome == Some(Outcome::Failed));
    let mut subjects = Vec::new();
    if had_failed {
        subjects.push(format!(
            "data transfer {id} has completed after it had FAILED"
        ));
    }
    if let (true, Some((origin, destination))) = (link_works_again, link(&detail.transfer)) {
        subjects.push(format!(
            "the link from {origin} to {destination} works again"
        ));
    }
    if subjects.is_empty() {
        return None;
    }
    let mut text = String::new();
    describe(&mut text, detail);
    Some(Notice {
        subject: subjects.join("; "),
        text,
    })
}

fn describe(text: &mut String, detail: &TransferDetail) {
    let transfer = &detail.transfer;
    let mut line = |label: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{label:<11} {value}");
    };
    line(
        "transfer",
        format!(
            "{}, {}, retry_count {}",
            transfer.id, transfer.status, transfer.retry_count
        ),
    );
    if let Some(package) = &transfer.package {
        let size = package
            .size_bytes
            .map_or_else(|| "of unknown size".into(), |size| format!("{size} bytes"));
        line("package", format!("{}, {size}", package.relative_path));
    }
    for (label, location) in [("from", &transfer.origin), ("to", &transfer.destination)] {
        if let Some(location) = location {
            line(label, place(location));
        }
    }
    let skipped = detail.attempts.len().saturating_sub(ATTEMPTS);
    for attempt in detail.attempts.iter().skip(skipped) {
        line("attempt", describe_attempt(attempt));
    }
}

fn place(location: &LocationRecord) -> String {
    let site = location
        .site
        .as_ref()
        .map_or("?", |site| site.short_name.as_str());
    let disk = location.disk.as_ref().map_or_else(String::new, |disk| {
        format!(
            ", {}:{}",
            disk.host.as_deref().unwrap_or("(the worker's host)"),
            disk.path
        )
    });
    format!("{site}/{}{disk}", location.name)
}

fn describe_attempt(attempt: &AttemptRecord) -> String {
    let outcome = attempt.outcome.map_or_else(
        || "running".into(),
        |outcome| format!("{outcome:?}").to_lowercase(),
    );
    let mut text = format!(
        "{} by {} at {}: {outcome}",
        attempt.attempt,
        attempt.worker,
        attempt.started_at.format("%Y-%m-%d %H:%M:%S UTC")
    );
    for (label, value) in [
        ("", &attempt.error_code),
        ("", &attempt.message),
        ("log ", &attempt.log_path),
    ] {
        if let Some(value) = value {
            let _ = write!(text, ", {label}{value}");
        }
    }
    text
}
