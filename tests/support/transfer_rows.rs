//! Values and steps of transfers on a database, shared by the tests of one binary.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::{Lease, LeaseError, Phase, Progress, Snapshot};
use ccat_transfer::transfer::repository::{
    Batch, Candidate, CompletedCopy, Failure, OpenTransfer, Repository, ScanCursor,
};
use entity::Status;

use crate::ops_db::{Fixture, TTL};

pub fn finished() -> CompletedCopy {
    CompletedCopy {
        bytes: 50_000_000_000,
        rate_bytes_per_s: 93_000_000,
        digest: Some("sha256:00ff".to_owned()),
        verification: Some("origin: this program, after the copy".to_owned()),
        log_path: Some("/var/log/ccat/1-1.log".into()),
    }
}

pub fn failure() -> Failure {
    Failure {
        error_code: "network".to_owned(),
        message: "connection reset".to_owned(),
        bytes: 7,
        rate_bytes_per_s: 1,
        log_path: Some("/var/log/ccat/1-1.log".into()),
        delay: Duration::ZERO,
    }
}

/// A failure that delays the next attempt.
pub fn delayed() -> Failure {
    Failure {
        delay: TTL,
        ..failure()
    }
}

pub fn copying(progress: Progress) -> Snapshot {
    Snapshot {
        phase: Phase::Copying,
        progress,
    }
}

pub fn is_lost<T>(result: Result<T, LeaseError>) -> bool {
    matches!(result, Err(LeaseError::Lost))
}

/// Scans the open transfers; returns them with the cursor for the next scan.
pub async fn scan(
    db: &Fixture,
    before: Option<&ScanCursor>,
) -> (Vec<OpenTransfer>, Option<ScanCursor>) {
    let mut seen = Vec::new();
    let see = |transfer| seen.push(transfer);
    let watch = db.repository.scan(None, before, see).await.unwrap();
    (seen, watch)
}

pub async fn pending(repository: &Repository) -> Vec<OpenTransfer> {
    let mut seen = Vec::new();
    let see = |transfer: OpenTransfer| {
        if transfer.status == Status::Pending {
            seen.push(transfer);
        }
    };
    repository.scan(None, None, see).await.unwrap();
    seen
}

/// Ids of the transfers that the manager would send.
pub async fn due(db: &Fixture) -> Vec<TransferId> {
    let pending = pending(&db.repository).await;
    let due = pending.iter().filter(|transfer| !transfer.has_delay);
    due.map(|transfer| transfer.id).collect()
}

/// Number of pending transfers that are not due.
pub async fn waiting(db: &Fixture) -> usize {
    let pending = pending(&db.repository).await;
    pending.iter().filter(|transfer| transfer.has_delay).count()
}

/// A candidate without a limit of its link.
pub fn wanted(id: TransferId) -> Candidate {
    Candidate {
        id,
        queue: "q".into(),
        allowance: None,
    }
}

/// Confirms every message.
pub async fn confirmed(ids: Vec<TransferId>) -> HashMap<TransferId, String> {
    let sent = ids.into_iter().map(|id| (id, format!("task-{id}")));
    sent.collect()
}

pub async fn published(db: &Fixture, id: TransferId) -> Batch {
    db.repository
        .schedule(&[wanted(id)], confirmed)
        .await
        .unwrap()
}

pub fn scheduled(ids: &[TransferId]) -> Batch {
    Batch {
        scheduled: ids.to_vec(),
        ..Batch::default()
    }
}

pub fn taken(ids: &[TransferId]) -> Batch {
    Batch {
        taken: ids.to_vec(),
        ..Batch::default()
    }
}

/// Checks that every write with a lost lease is refused and changes nothing.
pub async fn assert_powerless(db: &Fixture, lease: &Lease) {
    let id = lease.data_transfer_id();
    let before = db.everything(id).await;
    let repository = &db.repository;
    assert!(is_lost(repository.renew(lease, Snapshot::default()).await));
    assert!(is_lost(
        repository
            .record_files(lease, ".evil", Path::new("/x"))
            .await
    ));
    assert!(is_lost(repository.complete(lease, &finished()).await));
    assert!(is_lost(repository.reset_for_retry(lease, &failure()).await));
    assert!(is_lost(
        repository.mark_permanent_failure(lease, &failure()).await
    ));
    assert!(is_lost(repository.release(lease, "stop").await));
    assert_eq!(db.everything(id).await, before);
}
