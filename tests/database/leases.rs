//! Leases: acquisition, takeover, and the right to write.

use std::path::Path;
use std::time::Duration;

use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::{ExpiryReason, Progress, Snapshot};
use ccat_transfer::transfer::repository::{Acquisition, Leftover, Listing};
use entity::{Outcome, Status};
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};

use crate::ops_db::{Fixture, TTL, dead, me, stranger};
use crate::transfer_rows::{assert_powerless, copying, failure, finished, is_lost};

crate::on_both_databases!(
    a_live_lease_is_respected,
    an_in_progress_row_without_a_lease_is_never_touched,
    an_unknown_status_is_reported,
    an_expired_lease_is_taken_over,
    a_dead_owner_loses_its_lease,
    a_former_owner_changes_nothing,
    an_operators_reset_wins,
    an_operators_cancel_is_noticed,
    a_late_renewal_revives_an_untaken_lease,
    stopping_is_not_failing,
    one_of_many_acquires,
    one_of_many_takes_over,
);

async fn a_live_lease_is_respected(db: Fixture) {
    let id = db.transfer().await;
    db.acquire(id).await;
    let before = db.everything(id).await;
    match db
        .repository
        .acquire(id, &stranger(), "task-2", TTL)
        .await
        .unwrap()
    {
        Acquisition::Held(info) => {
            assert_eq!((info.task_id.as_str(), info.attempt.get()), ("task-1", 1));
            assert_eq!(info.owner, me());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(db.everything(id).await, before);
}

async fn an_in_progress_row_without_a_lease_is_never_touched(db: Fixture) {
    let id = db.transfer().await;
    db.set_status(id, "IN_PROGRESS").await;
    let before = db.everything(id).await;
    let answer = db.repository.acquire(id, &me(), "t", TTL).await.unwrap();
    assert!(matches!(answer, Acquisition::Untracked));
    let sweep = db.repository.sweep(&me()).await.unwrap();
    assert!(sweep.recovered.is_empty() && sweep.failed.is_empty());
    assert_eq!(db.everything(id).await, before);
}

async fn an_unknown_status_is_reported(db: Fixture) {
    let id = db.transfer().await;
    if db.database.backend() == sea_orm::DbBackend::Postgres {
        db.sql("ALTER TYPE status ADD VALUE 'CANCELLED'").await;
    }
    db.set_status(id, "CANCELLED").await;
    match db.repository.acquire(id, &me(), "t", TTL).await.unwrap() {
        Acquisition::UnknownStatus(label) => assert_eq!(label, "CANCELLED"),
        other => panic!("{other:?}"),
    }
    let all = db.repository.list(&Listing::default()).await.unwrap();
    assert_eq!(all[0].status.as_str(), "CANCELLED");
}

async fn an_expired_lease_is_taken_over(db: Fixture) {
    let id = db.transfer().await;
    let first = db.acquire_as(id, &stranger()).await.lease;
    db.repository
        .record_files(&first, ".a.part", Path::new("/log/1"))
        .await
        .unwrap();
    db.expire(id).await;
    let second = db.acquire(id).await;
    assert_eq!(second.lease.attempt().get(), 2);
    let displaced = second.displaced.unwrap();
    assert_eq!(displaced.expiry_reason, ExpiryReason::Expired);
    assert_eq!(
        (displaced.lease.attempt, displaced.lease.owner),
        (first.attempt(), stranger())
    );
    let leftover = Leftover {
        attempt: first.attempt(),
        temporary_name: ".a.part".to_owned(),
    };
    assert_eq!(second.leftovers, [leftover]);
    assert_eq!(db.status(id).await, "IN_PROGRESS");
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(detail.transfer.retry_count, 0);
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Interrupted));
    assert_eq!(detail.attempts[1].outcome, None);

    db.repository
        .forget_temporary(id, first.attempt())
        .await
        .unwrap();
    db.repository.release(&second.lease, "stop").await.unwrap();
    assert!(db.acquire(id).await.leftovers.is_empty());
}

async fn a_dead_owner_loses_its_lease(db: Fixture) {
    let id = db.transfer().await;
    let first = db.acquire_as(id, &dead()).await.lease;
    // The processes of another host cannot be inspected.
    let answer = db
        .repository
        .acquire(id, &stranger(), "t", TTL)
        .await
        .unwrap();
    assert!(matches!(answer, Acquisition::Held(_)));
    let second = db.acquire(id).await;
    assert_eq!(
        second.displaced.unwrap().expiry_reason,
        ExpiryReason::OwnerDead
    );
    assert!(is_lost(
        db.repository.renew(&first, Snapshot::default()).await
    ));
}

async fn a_former_owner_changes_nothing(db: Fixture) {
    let id = db.transfer().await;
    let first = db.acquire_as(id, &stranger()).await.lease;
    db.expire(id).await;
    let second = db.acquire(id).await.lease;
    assert_powerless(&db, &first).await;
    db.repository.complete(&second, &finished()).await.unwrap();
    assert_powerless(&db, &first).await;
}

async fn an_operators_reset_wins(db: Fixture) {
    let id = db.transfer().await;
    let first = db.acquire_as(id, &stranger()).await.lease;
    db.set_status(id, "PENDING").await;
    assert_powerless(&db, &first).await;
    // The row of the lease remains, but does not prevent anything.
    let second = db.acquire(id).await;
    assert_eq!(
        second.displaced.unwrap().expiry_reason,
        ExpiryReason::StatusChanged
    );
    assert_powerless(&db, &first).await;
    db.repository
        .renew(&second.lease, Snapshot::default())
        .await
        .unwrap();
}

async fn an_operators_cancel_is_noticed(db: Fixture) {
    for status in ["FAILED", "COMPLETED", "SCHEDULED"] {
        let id = db.transfer().await;
        let lease = db.acquire(id).await.lease;
        db.set_status(id, status).await;
        assert_powerless(&db, &lease).await;
    }
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.sql(&format!("DELETE FROM data_transfer WHERE id = {id}"))
        .await;
    assert_powerless(&db, &lease).await;
}

async fn a_late_renewal_revives_an_untaken_lease(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire_as(id, &stranger()).await.lease;
    db.expire(id).await;
    db.repository
        .renew(&lease, Snapshot::default())
        .await
        .unwrap();
    let answer = db.repository.acquire(id, &me(), "t", TTL).await.unwrap();
    assert!(matches!(answer, Acquisition::Held(_)));
    assert!(
        db.repository
            .sweep(&me())
            .await
            .unwrap()
            .recovered
            .is_empty()
    );
}

async fn stopping_is_not_failing(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.repository
        .reset_for_retry(&lease, &failure())
        .await
        .unwrap();
    // Only the manager makes a row SCHEDULED, and only with a message.
    let lease = db.acquire(id).await.lease;
    let progress = Progress {
        bytes_done: 11,
        ..Progress::default()
    };
    db.repository
        .renew(&lease, copying(progress))
        .await
        .unwrap();
    db.repository.release(&lease, "worker stops").await.unwrap();
    assert_eq!(db.status(id).await, "PENDING");
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(detail.transfer.retry_count, 1);
    assert_eq!(
        detail.transfer.failure_error_message.as_deref(),
        Some("connection reset")
    );
    assert!(detail.lease.is_none());
    let last = detail.attempts.last().unwrap();
    assert_eq!(last.outcome, Some(Outcome::Interrupted));
    assert_eq!(
        (last.message.as_deref(), last.bytes),
        (Some("worker stops"), Some(11))
    );
}

/// Starts 16 concurrent attempts to acquire and returns the number of successful ones.
async fn race(db: &Fixture, id: TransferId) -> usize {
    let tasks: Vec<_> = (0..16)
        .map(|number| {
            let repository = db.repository.clone();
            tokio::spawn(async move {
                let task_id = format!("task-{number}");
                repository.acquire(id, &me(), &task_id, TTL).await.unwrap()
            })
        })
        .collect();
    let mut winners = 0;
    for task in tasks {
        match task.await.unwrap() {
            Acquisition::Acquired(_) => winners += 1,
            Acquisition::Held(_) => {}
            other => panic!("{other:?}"),
        }
    }
    winners
}

async fn one_of_many_acquires(db: Fixture) {
    for _ in 0..5 {
        let id = db.transfer().await;
        assert_eq!(race(&db, id).await, 1);
    }
}

async fn one_of_many_takes_over(db: Fixture) {
    let id = db.transfer().await;
    db.acquire_as(id, &stranger()).await;
    for attempts in 2..6 {
        db.expire(id).await;
        assert_eq!(race(&db, id).await, 1);
        let detail = db.repository.show(id).await.unwrap().unwrap();
        assert_eq!(detail.attempts.len(), attempts);
        assert_eq!(
            detail
                .attempts
                .iter()
                .filter(|a| a.outcome.is_none())
                .count(),
            1
        );
    }
}

/// A renewal that is not committed yet when another worker finds the lease expired.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_in_progress_beats_a_takeover() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    for sweeps in [true, false] {
        let id = db.transfer().await;
        db.acquire_as(id, &stranger()).await;
        db.expire(id).await;
        let renewal = db.database.connection().begin().await.unwrap();
        let sql = format!(
            "UPDATE transfer_worker_lease SET renewed_at = now(), expires_at = now() + '1 h' \
             WHERE data_transfer_id = {id}"
        );
        renewal.execute_unprepared(&sql).await.unwrap();
        let repository = db.repository.clone();
        let other = tokio::spawn(async move {
            if sweeps {
                repository.sweep(&me()).await.unwrap().recovered.is_empty()
            } else {
                let answer = repository.acquire(id, &me(), "t", TTL).await.unwrap();
                matches!(answer, Acquisition::Held(_))
            }
        });
        // The other worker waits for the lock on the lease's row now.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!other.is_finished());
        renewal.commit().await.unwrap();
        assert!(other.await.unwrap());
        let detail = db.repository.show(id).await.unwrap().unwrap();
        assert!(detail.transfer.status.means(Status::InProgress));
        assert!(detail.lease.is_some() && detail.attempts[0].outcome.is_none());
    }
}
