//! Leases and transfers on real databases: SQLite, and PostgreSQL where `TEST_POSTGRES_URL` names
//! a server.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "database/operators.rs"]
mod operators;
#[path = "support/ops_db.rs"]
mod ops_db;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::database::{Database, DatabaseError};
use ccat_transfer::transfer::lease::{Demise, Lease, LeaseError, Owner, Phase, Progress, Snapshot};
use ccat_transfer::transfer::repository::{
    Acquisition, ClaimError, Failure, Filter, Finished, Leftover, Listing, ReleaseTo, Repository,
    ScheduleError, Scheduled, SiteError,
};
use ccat_transfer::transfer::topology::{self, NewTransfer, Topology, TopologyError};
use entity::{Outcome, Status};
use ops_db::{Fixture, TOPOLOGY, TTL, TestDatabase, dead, me, stranger};
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};

on_both_databases!(
    a_transfer_is_acquired_renewed_and_completed,
    completing_twice_is_completing_once,
    a_failed_transfer_waits_for_its_next_attempt,
    a_failed_transfer_waits_until_it_is_due,
    what_an_operator_does_ends_the_wait,
    a_postponed_transfer_has_not_failed,
    no_two_copies_have_one_destination,
    a_transfer_is_given_up,
    what_is_over_is_not_acquired,
    a_live_lease_is_respected,
    an_in_progress_row_without_a_lease_is_never_touched,
    an_unknown_status_is_told,
    an_expired_lease_is_taken_over,
    a_dead_owner_loses_its_lease,
    a_former_owner_changes_nothing,
    an_operators_reset_wins,
    an_operators_cancel_is_noticed,
    a_late_renewal_revives_a_lease_that_nobody_took,
    stopping_is_not_failing,
    one_of_many_acquires,
    one_of_many_takes_over,
    a_sweep_recovers_what_is_dead_only,
    a_sweep_and_a_renewal_do_not_meet,
    a_sweep_removes_leases_without_a_cause,
    a_row_that_cannot_be_recovered_is_in_nobodys_way,
    a_row_is_scheduled_with_its_message,
    a_message_that_is_not_published_changes_nothing,
    a_worker_may_get_the_message_before_the_commit,
    scheduling_is_exclusive,
    pending_transfers_come_in_pages,
    locations_of_a_site,
    a_transfer_is_read_with_all_its_parts,
    a_transfer_is_read_without_its_parts,
    texts_with_nul_are_stored,
    transfers_are_listed,
    seeding_is_idempotent,
    seeding_reports_what_is_wrong,
    the_clock_is_the_databases,
);

fn finished() -> Finished {
    Finished {
        bytes: 50_000_000_000,
        rate_bytes_per_s: 93_000_000,
        digest: Some("sha256:00ff".to_owned()),
        log_path: Some("/var/log/ccat/1-1.log".into()),
    }
}

fn failure() -> Failure {
    Failure {
        error_code: "network".to_owned(),
        message: "connection reset".to_owned(),
        bytes: 7,
        rate_bytes_per_s: 1,
        log_path: Some("/var/log/ccat/1-1.log".into()),
        delay: Duration::ZERO,
    }
}

/// A failure after which the transfer waits.
fn delayed() -> Failure {
    Failure {
        delay: TTL,
        ..failure()
    }
}

fn copying(progress: Progress) -> Snapshot {
    Snapshot {
        phase: Phase::Copying,
        progress,
    }
}

fn is_lost(result: Result<(), LeaseError>) -> bool {
    matches!(result, Err(LeaseError::Lost))
}

async fn a_transfer_is_acquired_renewed_and_completed(db: Fixture) {
    let id = db.transfer().await;
    let repository = &db.repository;
    let acquired = db.acquire(id).await;
    assert!(acquired.displaced.is_none() && acquired.leftovers.is_empty());
    let lease = acquired.lease;
    assert_eq!(
        (lease.data_transfer_id(), lease.attempt(), lease.ttl()),
        (id, 1, TTL)
    );
    assert!(lease.tag().starts_with(&format!("{id}-1-")));
    assert_eq!(db.status(id).await, "IN_PROGRESS");

    repository
        .record_files(&lease, ".x.part", Path::new("/log/1"))
        .await
        .unwrap();
    let progress = Progress {
        bytes_done: 5,
        bytes_total: Some(u64::MAX),
        rate_bytes_per_s: 3,
    };
    repository.renew(&lease, copying(progress)).await.unwrap();
    let detail = repository.show(id).await.unwrap().unwrap();
    let info = detail.lease.unwrap();
    assert_eq!(
        (info.bytes_done, info.bytes_total, info.rate_bytes_per_s),
        (5, Some(i64::MAX), 3)
    );
    assert_eq!(info.owner, me());
    assert!(info.renewed_at >= info.acquired_at);
    assert_eq!(
        info.expires_at - info.renewed_at,
        chrono::TimeDelta::from_std(TTL).unwrap()
    );
    assert!(detail.transfer.start_time.is_some() && detail.transfer.end_time.is_none());
    assert_eq!(detail.attempts.len(), 1);
    assert_eq!(detail.attempts[0].outcome, None);
    assert_eq!(
        detail.attempts[0].temporary_name.as_deref(),
        Some(".x.part")
    );

    repository.forget_temporary(id, 1).await.unwrap();
    repository.complete(&lease, &finished()).await.unwrap();
    let detail = repository.show(id).await.unwrap().unwrap();
    assert!(detail.transfer.status.means(Status::Completed));
    assert!(detail.transfer.end_time >= detail.transfer.start_time);
    assert!(detail.lease.is_none());
    let attempt = &detail.attempts[0];
    assert_eq!(attempt.outcome, Some(Outcome::Completed));
    assert_eq!(attempt.bytes, Some(50_000_000_000));
    assert_eq!(attempt.digest.as_deref(), Some("sha256:00ff"));
    assert_eq!(attempt.log_path.as_deref(), Some("/log/1"));
    assert_eq!(attempt.temporary_name, None);
    assert!(attempt.ended_at.unwrap() >= attempt.started_at);
    let log = "SELECT log_path || ' ' || CAST(status AS text) FROM data_transfer_log";
    assert_eq!(
        db.text(log).await.unwrap(),
        "/var/log/ccat/1-1.log COMPLETED"
    );
    let unpacking = "SELECT CAST(unpack_status AS text) FROM data_transfer";
    assert_eq!(db.text(unpacking).await.unwrap(), "PENDING");
    // What is shown can be printed as JSON.
    assert!(
        serde_json::to_string(&detail)
            .unwrap()
            .contains("\"outcome\":\"completed\"")
    );
}

async fn completing_twice_is_completing_once(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.repository.complete(&lease, &finished()).await.unwrap();
    let before = db.everything(id).await;
    // The first answer got lost, and the caller asks again.
    db.repository.complete(&lease, &finished()).await.unwrap();
    assert!(is_lost(
        db.repository
            .mark_permanent_failure(&lease, &failure())
            .await
    ));
    assert!(is_lost(
        db.repository.renew(&lease, Snapshot::default()).await
    ));
    assert_eq!(db.everything(id).await, before);
}

async fn a_failed_transfer_waits_for_its_next_attempt(db: Fixture) {
    let id = db.transfer().await;
    for retry in 1..=3 {
        let lease = db.acquire(id).await.lease;
        assert_eq!(lease.attempt(), retry);
        db.repository
            .reset_for_retry(&lease, &failure())
            .await
            .unwrap();
        assert_eq!(db.status(id).await, "PENDING");
        assert_eq!(
            db.repository.get_retry_count(id).await.unwrap(),
            Some(retry as u32)
        );
    }
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(
        detail.transfer.failure_error_message.as_deref(),
        Some("connection reset")
    );
    assert_eq!(detail.transfer.end_time, None);
    for attempt in &detail.attempts {
        assert_eq!(attempt.outcome, Some(Outcome::Retried));
        assert_eq!(attempt.error_code.as_deref(), Some("network"));
    }
    assert_eq!(
        db.text("SELECT CAST(count(*) AS text) FROM data_transfer_log")
            .await
            .unwrap(),
        "3"
    );

    let lease = db.acquire(id).await.lease;
    db.repository.complete(&lease, &finished()).await.unwrap();
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(
        (transfer.retry_count, transfer.failure_error_message),
        (3, None)
    );
}

/// Ids of the transfers that the manager would send.
async fn due(db: &Fixture) -> Vec<i64> {
    let rows = db.repository.pending(None, 100).await.unwrap();
    rows.iter().map(|row| row.id).collect()
}

async fn published(db: &Fixture, id: i64) -> Scheduled {
    let publish = || async { Ok::<_, std::io::Error>(()) };
    db.repository.schedule(id, publish).await.unwrap()
}

async fn a_failed_transfer_waits_until_it_is_due(db: Fixture) {
    let [id, other] = [db.transfer().await, db.transfer().await];
    let lease = db.acquire(id).await.lease;
    let before = db.database.now().await.unwrap();
    db.repository
        .reset_for_retry(&lease, &delayed())
        .await
        .unwrap();

    assert_eq!(due(&db).await, [other]);
    assert_eq!(db.repository.waiting().await.unwrap(), 1);
    assert_eq!(published(&db, id).await, Scheduled::NotPending);
    let shown = db.repository.show(id).await.unwrap().unwrap();
    let not_before = shown.not_before.unwrap();
    assert!(not_before >= before + TTL && not_before < before + TTL * 2);
    let listed = db.repository.list(&Listing::default()).await.unwrap();
    let waits: Vec<_> = listed.iter().map(|t| (t.id, t.not_before)).collect();
    assert_eq!(waits, [(other, None), (id, Some(not_before))]);
    match db
        .repository
        .acquire(id, &me(), "by hand", TTL)
        .await
        .unwrap()
    {
        Acquisition::NotDue { not_before: told } => assert_eq!(told, not_before),
        answer => panic!("{answer:?}"),
    }
    assert_eq!(db.status(id).await, "PENDING");

    let past = "UPDATE transfer_worker_delay SET not_before = '2001-01-01T00:00:00+00:00'";
    assert_eq!(db.sql(past).await, 1);
    assert_eq!(due(&db).await, [id, other]);
    assert_eq!(db.repository.waiting().await.unwrap(), 0);
    assert_eq!(published(&db, id).await, Scheduled::Scheduled);
    let lease = db.acquire(id).await.lease;
    // Taken up again, it waits no more, whatever becomes of this attempt.
    let release = db.repository.release(&lease, ReleaseTo::Pending, "stop");
    release.await.unwrap();
    assert_eq!(due(&db).await, [id, other]);
}

async fn what_an_operator_does_ends_the_wait(db: Fixture) {
    let fail = async |id| {
        let lease = db.acquire(id).await.lease;
        let failure = delayed();
        let failing = db.repository.reset_for_retry(&lease, &failure);
        failing.await.unwrap();
    };
    let id = db.transfer().await;
    // A reset, as the Python system's web interface does it.
    fail(id).await;
    assert!(due(&db).await.is_empty());
    db.sql(&format!(
        "UPDATE data_transfer SET retry_count = 0 WHERE id = {id}"
    ))
    .await;
    assert_eq!(due(&db).await, [id]);
    // A manager that knows nothing of waits.
    fail(id).await;
    assert!(due(&db).await.is_empty());
    db.set_status(id, "SCHEDULED").await;
    assert_eq!(
        db.repository.show(id).await.unwrap().unwrap().not_before,
        None
    );
    // `transfers run`.
    fail(id).await;
    db.repository.forget_delay(id).await.unwrap();
    assert_eq!(due(&db).await, [id]);
    // Given up and reset.
    fail(id).await;
    db.repository.forget_delay(id).await.unwrap();
    let lease = db.acquire(id).await.lease;
    let failure = delayed();
    let failing = db.repository.mark_permanent_failure(&lease, &failure);
    failing.await.unwrap();
    db.set_status(id, "PENDING").await;
    assert_eq!(due(&db).await, [id]);
}

async fn a_postponed_transfer_has_not_failed(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.repository.postpone(&lease, &delayed()).await.unwrap();
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(detail.transfer.retry_count, 0);
    assert_eq!(detail.transfer.failure_error_message, None);
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Interrupted));
    assert!(detail.not_before.is_some() && due(&db).await.is_empty());
    assert!(is_lost(db.repository.postpone(&lease, &delayed()).await));
}

async fn no_two_copies_have_one_destination(db: Fixture) {
    let [first, second] = [db.transfer().await, db.transfer().await];
    let [one, two] = [
        db.acquire(first).await.lease,
        db.acquire(second).await.lease,
    ];
    let claim = |lease, key| db.repository.claim_destination(lease, key, 16);
    claim(&one, "archive:/buffer/a.tar").await.unwrap();
    claim(&one, "archive:/buffer/a.tar").await.unwrap();
    match claim(&two, "archive:/buffer/a.tar").await {
        Err(ClaimError::Taken(Some(holder))) => assert_eq!(holder.data_transfer_id, first),
        answer => panic!("{answer:?}"),
    }
    claim(&two, "archive:/buffer/b.tar").await.unwrap();
    // Free again when the first is done; and gone with a lost lease.
    db.repository.complete(&one, &finished()).await.unwrap();
    claim(&two, "archive:/buffer/a.tar").await.unwrap();
    db.set_status(second, "FAILED").await;
    let lost = claim(&two, "archive:/buffer/c.tar").await;
    assert!(
        matches!(lost, Err(ClaimError::Lease(LeaseError::Lost))),
        "{lost:?}"
    );
}

async fn a_transfer_is_given_up(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.repository
        .mark_permanent_failure(&lease, &failure())
        .await
        .unwrap();
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert!(detail.transfer.status.means(Status::Failed));
    assert!(detail.transfer.end_time.is_some());
    assert_eq!(detail.transfer.retry_count, 0);
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Failed));
    match db
        .repository
        .acquire(id, &me(), "again", TTL)
        .await
        .unwrap()
    {
        Acquisition::Failed { message } => assert_eq!(message.as_deref(), Some("connection reset")),
        other => panic!("{other:?}"),
    }
}

async fn what_is_over_is_not_acquired(db: Fixture) {
    let id = db.transfer().await;
    db.set_status(id, "COMPLETED").await;
    let acquire = |id| db.repository.acquire(id, &ME, "t", TTL);
    assert!(matches!(acquire(id).await.unwrap(), Acquisition::Completed));
    assert!(matches!(
        acquire(id + 1).await.unwrap(),
        Acquisition::Missing
    ));
    assert!(matches!(
        acquire(i64::MAX).await.unwrap(),
        Acquisition::Missing
    ));
    assert_eq!(db.repository.get_retry_count(id + 1).await.unwrap(), None);
    assert!(db.repository.show(id + 1).await.unwrap().is_none());
}

static ME: std::sync::LazyLock<Owner> = std::sync::LazyLock::new(me);

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
            assert_eq!((info.task_id.as_str(), info.attempt), ("task-1", 1));
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

async fn an_unknown_status_is_told(db: Fixture) {
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
    assert_eq!(second.lease.attempt(), 2);
    let displaced = second.displaced.unwrap();
    assert_eq!(displaced.demise, Demise::Expired);
    assert_eq!(
        (displaced.lease.attempt, displaced.lease.owner),
        (1, stranger())
    );
    let leftover = Leftover {
        attempt: 1,
        temporary_name: ".a.part".to_owned(),
    };
    assert_eq!(second.leftovers, [leftover]);
    assert_eq!(db.status(id).await, "IN_PROGRESS");
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(detail.transfer.retry_count, 0);
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Interrupted));
    assert_eq!(detail.attempts[1].outcome, None);

    db.repository.forget_temporary(id, 1).await.unwrap();
    db.repository
        .release(&second.lease, ReleaseTo::Pending, "stop")
        .await
        .unwrap();
    assert!(db.acquire(id).await.leftovers.is_empty());
}

async fn a_dead_owner_loses_its_lease(db: Fixture) {
    let id = db.transfer().await;
    let first = db.acquire_as(id, &dead()).await.lease;
    // Far away, nobody can tell.
    let answer = db
        .repository
        .acquire(id, &stranger(), "t", TTL)
        .await
        .unwrap();
    assert!(matches!(answer, Acquisition::Held(_)));
    let second = db.acquire(id).await;
    assert_eq!(second.displaced.unwrap().demise, Demise::OwnerDead);
    assert!(is_lost(
        db.repository.renew(&first, Snapshot::default()).await
    ));
}

/// Everything that a holder can do, with a lease that is not its own any more.
async fn assert_powerless(db: &Fixture, lease: &Lease) {
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
    assert!(is_lost(
        repository.release(lease, ReleaseTo::Pending, "stop").await
    ));
    assert!(is_lost(
        repository
            .release(lease, ReleaseTo::Scheduled, "stop")
            .await
    ));
    assert_eq!(db.everything(id).await, before);
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
    // The lease row stands, and is in nobody's way.
    let second = db.acquire(id).await;
    assert_eq!(second.displaced.unwrap().demise, Demise::StatusChanged);
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

async fn a_late_renewal_revives_a_lease_that_nobody_took(db: Fixture) {
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
    for (back_to, status) in [
        (ReleaseTo::Pending, "PENDING"),
        (ReleaseTo::Scheduled, "SCHEDULED"),
    ] {
        let lease = db.acquire(id).await.lease;
        let progress = Progress {
            bytes_done: 11,
            ..Progress::default()
        };
        db.repository
            .renew(&lease, copying(progress))
            .await
            .unwrap();
        db.repository
            .release(&lease, back_to, "worker stops")
            .await
            .unwrap();
        assert_eq!(db.status(id).await, status);
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
}

/// Lets 16 tasks try at once and returns how many have acquired.
async fn race(db: &Fixture, id: i64) -> usize {
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

async fn a_sweep_recovers_what_is_dead_only(db: Fixture) {
    let [live, far, expired, gone] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.acquire(live).await;
    db.acquire_as(far, &stranger()).await;
    db.acquire_as(expired, &stranger()).await;
    db.acquire_as(gone, &dead()).await;
    db.sql(&format!(
        "UPDATE data_transfer SET retry_count = 2 WHERE id = {gone}"
    ))
    .await;
    db.expire(expired).await;

    let sweep = db.repository.sweep(&me()).await.unwrap();
    assert!(sweep.failed.is_empty());
    let recovered: Vec<_> = sweep
        .recovered
        .iter()
        .map(|r| {
            (
                r.displaced.lease.data_transfer_id,
                r.displaced.demise,
                r.is_pending,
            )
        })
        .collect();
    assert_eq!(
        recovered,
        [
            (expired, Demise::Expired, true),
            (gone, Demise::OwnerDead, true)
        ]
    );
    assert_eq!(db.repository.get_retry_count(gone).await.unwrap(), Some(2));
    for (id, status) in [
        (live, "IN_PROGRESS"),
        (far, "IN_PROGRESS"),
        (expired, "PENDING"),
        (gone, "PENDING"),
    ] {
        assert_eq!(db.status(id).await, status);
    }
    let detail = db.repository.show(gone).await.unwrap().unwrap();
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Interrupted));
    assert_eq!(db.leases().await, "2");
    assert!(
        db.repository
            .sweep(&me())
            .await
            .unwrap()
            .recovered
            .is_empty()
    );
}

async fn a_sweep_and_a_renewal_do_not_meet(db: Fixture) {
    for _ in 0..10 {
        let id = db.transfer().await;
        let lease = db.acquire_as(id, &stranger()).await.lease;
        db.expire(id).await;
        let observer = me();
        let (sweep, renewal) = tokio::join!(
            db.repository.sweep(&observer),
            db.repository.renew(&lease, Snapshot::default())
        );
        let recovered = sweep.unwrap().recovered.len();
        // Exactly one of them, and the row tells which.
        let (renewals, status) = match renewal {
            Ok(()) => (1, "IN_PROGRESS"),
            Err(LeaseError::Lost) => (0, "PENDING"),
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(recovered + renewals, 1);
        assert_eq!(db.status(id).await, status);
        db.sql("DELETE FROM transfer_worker_lease").await;
    }
}

async fn a_sweep_removes_leases_without_a_cause(db: Fixture) {
    let [reset, deleted] = [db.transfer().await, db.transfer().await];
    db.acquire(reset).await;
    db.acquire(deleted).await;
    db.set_status(reset, "FAILED").await;
    db.sql(&format!("DELETE FROM data_transfer WHERE id = {deleted}"))
        .await;
    let sweep = db.repository.sweep(&me()).await.unwrap();
    assert_eq!(sweep.recovered.len(), 2);
    assert!(
        sweep
            .recovered
            .iter()
            .all(|recovered| !recovered.is_pending)
    );
    assert_eq!(db.status(reset).await, "FAILED");
    assert_eq!(db.leases().await, "0");
}

async fn a_row_that_cannot_be_recovered_is_in_nobodys_way(db: Fixture) {
    let [bad, good] = [db.transfer().await, db.transfer().await];
    db.acquire_as(bad, &dead()).await;
    db.acquire_as(good, &dead()).await;
    let trigger = format!(
        "CREATE TRIGGER bad BEFORE UPDATE ON data_transfer FOR EACH ROW WHEN (NEW.id = {bad})"
    );
    db.sql(&if db.database.backend() == sea_orm::DbBackend::Postgres {
        format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE EXCEPTION 'bad row'; END $$; {trigger} EXECUTE FUNCTION refuse()"
        )
    } else {
        format!("{trigger} BEGIN SELECT RAISE(ABORT, 'bad row'); END")
    })
    .await;
    let sweep = db.repository.sweep(&me()).await.unwrap();
    assert_eq!(sweep.recovered.len(), 1);
    assert_eq!(sweep.failed.len(), 1);
    assert_eq!(sweep.failed[0].0, bad);
    assert!(!sweep.failed[0].1.is_unreachable());
    assert_eq!(db.status(bad).await, "IN_PROGRESS");
    assert_eq!(db.status(good).await, "PENDING");
    assert_eq!(db.leases().await, "1");
}

async fn a_row_is_scheduled_with_its_message(db: Fixture) {
    let id = db.transfer().await;
    let published = AtomicUsize::new(0);
    let publish = || async {
        published.fetch_add(1, Ordering::SeqCst);
        Ok::<_, std::io::Error>(())
    };
    assert_eq!(
        db.repository.schedule(id, publish).await.unwrap(),
        Scheduled::Scheduled
    );
    assert_eq!(db.status(id).await, "SCHEDULED");
    assert_eq!(
        db.repository.schedule(id, publish).await.unwrap(),
        Scheduled::NotPending
    );
    assert_eq!(
        db.repository.schedule(id + 1, publish).await.unwrap(),
        Scheduled::NotPending
    );
    assert_eq!(published.load(Ordering::SeqCst), 1);
    db.acquire(id).await;
}

async fn a_message_that_is_not_published_changes_nothing(db: Fixture) {
    let id = db.transfer().await;
    let before = db.everything(id).await;
    let refused = db
        .repository
        .schedule(id, || async { Err(std::io::Error::other("no broker")) })
        .await;
    assert!(matches!(refused, Err(ScheduleError::Publish(_))));
    assert_eq!(db.everything(id).await, before);
    // The lock is gone: somebody else can go on at once.
    db.acquire(id).await;
}

async fn a_worker_may_get_the_message_before_the_commit(db: Fixture) {
    let id = db.transfer().await;
    let repository = db.repository.clone();
    let (send, receive) = tokio::sync::oneshot::channel();
    let worker = tokio::spawn(async move {
        receive.await.unwrap();
        repository.acquire(id, &me(), "t", TTL).await.unwrap()
    });
    let publish = || async {
        send.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok::<_, std::io::Error>(())
    };
    assert_eq!(
        db.repository.schedule(id, publish).await.unwrap(),
        Scheduled::Scheduled
    );
    assert!(matches!(worker.await.unwrap(), Acquisition::Acquired(_)));
    assert_eq!(db.status(id).await, "IN_PROGRESS");
}

async fn scheduling_is_exclusive(db: Fixture) {
    let id = db.transfer().await;
    let managers = (0..8).map(|_| {
        let repository = db.repository.clone();
        tokio::spawn(async move {
            repository
                .schedule(id, || async { Ok::<_, std::io::Error>(()) })
                .await
                .unwrap()
        })
    });
    let managers: Vec<_> = managers.collect();
    let mut scheduled = 0;
    for manager in managers {
        scheduled += usize::from(manager.await.unwrap() == Scheduled::Scheduled);
    }
    assert_eq!(scheduled, 1);
}

async fn pending_transfers_come_in_pages(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(db.transfer().await);
    }
    db.set_status(ids[1], "SCHEDULED").await;
    let first = db.repository.pending(None, 2).await.unwrap();
    assert_eq!(
        first.iter().map(|p| p.id).collect::<Vec<_>>(),
        [ids[0], ids[2]]
    );
    let origin = first[0].origin.clone().unwrap();
    assert_eq!(
        (origin.site.as_str(), origin.location.as_str()),
        ("ccat", "telescope_computer")
    );
    let destination = first[0].destination.clone().unwrap();
    assert_eq!(
        (destination.site.as_str(), destination.location.as_str()),
        ("cologne", "buffer")
    );
    let rest = db.repository.pending(Some(ids[2]), 100).await.unwrap();
    assert_eq!(
        rest.iter().map(|p| p.id).collect::<Vec<_>>(),
        [ids[3], ids[4]]
    );
}

async fn locations_of_a_site(db: Fixture) {
    let names = db.repository.locations_of_site("ccat").await.unwrap();
    assert_eq!(names, ["buffer", "telescope_computer"]);
    match db.repository.locations_of_site("us").await.unwrap_err() {
        SiteError::Unknown { known, .. } => assert_eq!(known, ["ccat", "cologne"]),
        other => panic!("{other:?}"),
    }
}

async fn a_transfer_is_read_with_all_its_parts(db: Fixture) {
    let id = db.transfer().await;
    db.sql("UPDATE data_location SET active = false WHERE name = 'telescope_computer'")
        .await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    let package = transfer.package.unwrap();
    assert!(package.relative_path.ends_with(&package.file_name));
    assert_eq!(package.size_bytes, Some(50_000_000_000));
    let origin = transfer.origin.unwrap();
    assert!(!origin.active);
    assert_eq!(origin.site.unwrap().short_name, "ccat");
    let disk = origin.disk.unwrap();
    assert_eq!(
        (disk.host.as_deref(), disk.path.as_str()),
        (Some("telescope.ccat.cl"), "/data/fyst")
    );
    assert!(transfer.destination.unwrap().active);
    assert_eq!(transfer.route.unwrap().method.as_deref(), Some("bbcp"));
}

async fn a_transfer_is_read_without_its_parts(db: Fixture) {
    let id = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET destination_location_id = \
         (SELECT id FROM data_location WHERE name = 'tapes') WHERE id = {id}"
    ))
    .await;
    db.sql("DELETE FROM data_transfer_route").await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    let destination = transfer.destination.unwrap();
    assert_eq!(destination.storage_type.as_str(), "TAPE");
    assert!(destination.disk.is_none() && transfer.route.is_none());
}

async fn texts_with_nul_are_stored(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let failure = Failure {
        message: "a\0b".to_owned(),
        ..failure()
    };
    db.repository
        .mark_permanent_failure(&lease, &failure)
        .await
        .unwrap();
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(
        transfer.failure_error_message.as_deref(),
        Some("a\u{fffd}b")
    );
}

async fn transfers_are_listed(db: Fixture) {
    let [first, second] = [db.transfer().await, db.transfer().await];
    db.acquire(first).await;
    let all = db.repository.list(&Listing::default()).await.unwrap();
    assert_eq!(
        all.iter().map(|t| t.id).collect::<Vec<_>>(),
        [second, first]
    );
    assert!(all[0].lease.is_none() && all[1].lease.is_some());
    assert!(all[0].file_name.as_ref().unwrap().ends_with(".tar"));
    let listing = Listing {
        filter: Filter {
            statuses: vec![Status::Pending],
            ..Filter::default()
        },
        limit: Some(5),
        ..Listing::default()
    };
    assert_eq!(db.repository.list(&listing).await.unwrap().len(), 1);
    let listing = Listing {
        limit: Some(1),
        ..Listing::default()
    };
    assert_eq!(db.repository.list(&listing).await.unwrap()[0].id, second);
}

async fn seeding_is_idempotent(db: Fixture) {
    let again = topology::seed(&db.repository, &TOPOLOGY.parse().unwrap())
        .await
        .unwrap();
    assert_eq!((again.created, again.updated, again.unchanged), (0, 0, 10));
    let changed = TOPOLOGY
        .replace("/data/fyst", "/data/fyst2")
        .replace("\"bbcp\"", "\"gridftp\"");
    let changed: Topology = changed.parse().unwrap();
    let seeded = topology::seed(&db.repository, &changed).await.unwrap();
    assert_eq!(
        (seeded.created, seeded.updated, seeded.unchanged),
        (0, 2, 8)
    );
    let id = db.transfer().await;
    let transfer = db.repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(transfer.origin.unwrap().disk.unwrap().path, "/data/fyst2");
    assert_eq!(transfer.route.unwrap().method.as_deref(), Some("gridftp"));
}

async fn seeding_reports_what_is_wrong(db: Fixture) {
    let route = "[[routes]]\norigin='ccat'\ndestination='us'\nmethod='bbcp'\ntype='direct'";
    match topology::seed(&db.repository, &route.parse().unwrap())
        .await
        .unwrap_err()
    {
        TopologyError::UnknownSite { name, known } => {
            assert_eq!((name.as_str(), known.len()), ("us", 2));
        }
        other => panic!("{other:?}"),
    }
    let new = NewTransfer {
        relative_path: "a.tar".to_owned(),
        size_bytes: None,
        checksum: None,
        origin: "ccat/nowhere".parse().unwrap(),
        destination: "cologne/buffer".parse().unwrap(),
    };
    match topology::create_transfer(&db.repository, &new)
        .await
        .unwrap_err()
    {
        TopologyError::UnknownLocation { known, .. } => assert_eq!(known.len(), 4),
        other => panic!("{other:?}"),
    }
    db.sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        .await;
    let owned = topology::seed(&db.repository, &TOPOLOGY.parse().unwrap()).await;
    assert!(matches!(owned, Err(TopologyError::OwnedByAlembic)));
    let owned = topology::create_transfer(&db.repository, &new).await;
    assert!(matches!(owned, Err(TopologyError::OwnedByAlembic)));
}

async fn the_clock_is_the_databases(db: Fixture) {
    let first = db.database.now().await.unwrap();
    let second = db.database.now().await.unwrap();
    assert!(second >= first);
    assert!((chrono::Utc::now() - second).abs() < chrono::TimeDelta::minutes(5));
    // Within a transaction the clock goes on.
    let id = db.transfer().await;
    db.acquire(id).await;
    let info = db
        .repository
        .show(id)
        .await
        .unwrap()
        .unwrap()
        .lease
        .unwrap();
    assert!(info.acquired_at >= second);
}

/// What a busy worker writes, many times, on a pool of its own.
async fn work(repository: &Repository, ids: &[i64]) {
    for &id in ids {
        match repository.acquire(id, &me(), "t", TTL).await.unwrap() {
            Acquisition::Acquired(acquired) => {
                let lease = acquired.lease;
                repository.renew(&lease, Snapshot::default()).await.unwrap();
                repository.complete(&lease, &finished()).await.unwrap();
            }
            Acquisition::Held(_) | Acquisition::Completed => {}
            other => panic!("{other:?}"),
        }
        repository.sweep(&me()).await.unwrap();
    }
}

const SQLITE_OF_PARENT: &str = "CCAT_TEST_SQLITE_OF_PARENT";

/// The second process of the next test; nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn second_process() {
    let Ok(path) = std::env::var(SQLITE_OF_PARENT) else {
        return;
    };
    let mut test = TestDatabase::sqlite();
    test.settings.database_sqlite_database = path.into();
    let database = Database::connect(&test.settings).await.unwrap();
    let repository = Repository::open(database, EnumLabels::Names).await.unwrap();
    let waiting = repository.pending(None, 1000).await.unwrap();
    work(
        &repository,
        &waiting.iter().map(|pending| pending.id).collect::<Vec<_>>(),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_and_processes_write_to_one_sqlite_file_at_once() {
    let db = Fixture::sqlite().await;
    let mut ids = Vec::new();
    for _ in 0..40 {
        ids.push(db.transfer().await);
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "second_process", "--nocapture"])
        .env(SQLITE_OF_PARENT, &db.test.settings.database_sqlite_database)
        .spawn()
        .unwrap();
    let mut workers = Vec::new();
    for _ in 0..4 {
        let repository = Repository::open(db.test.connect().await, EnumLabels::Names)
            .await
            .unwrap();
        let ids = ids.clone();
        workers.push(tokio::spawn(async move { work(&repository, &ids).await }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    let child = tokio::task::spawn_blocking(move || child.wait_with_output())
        .await
        .unwrap();
    assert!(child.unwrap().status.success());
    for id in ids {
        assert_eq!(db.status(id).await, "COMPLETED");
    }
    let count = "SELECT CAST(count(*) AS text) FROM data_transfer_log";
    assert_eq!(db.text(count).await.unwrap(), "40");
}

#[tokio::test]
async fn a_busy_sqlite_file_is_unreachable_and_nothing_else() {
    let mut test = TestDatabase::sqlite();
    test.settings.acquire_timeout = Duration::from_millis(200);
    let writer = test.connect().await;
    let other = test.connect().await;
    writer
        .connection()
        .execute_unprepared("CREATE TABLE t (x INTEGER)")
        .await
        .unwrap();
    // One connection holds the write lock for longer than the other waits.
    let mut settings = test.settings.clone();
    settings.max_connections = 1;
    let holder = Database::connect(&settings).await.unwrap();
    holder
        .connection()
        .execute_unprepared("BEGIN IMMEDIATE")
        .await
        .unwrap();
    let refused = other
        .connection()
        .execute_unprepared("INSERT INTO t VALUES (1)")
        .await;
    assert!(DatabaseError::from(refused.unwrap_err()).is_unreachable());
    holder
        .connection()
        .execute_unprepared("COMMIT")
        .await
        .unwrap();
    let refused = other
        .connection()
        .execute_unprepared("INSERT INTO nowhere VALUES (1)")
        .await;
    assert!(!DatabaseError::from(refused.unwrap_err()).is_unreachable());
}

#[tokio::test]
async fn a_missing_sqlite_file_is_made_only_when_asked() {
    let test = TestDatabase::sqlite();
    let missing = Database::connect(&test.settings).await.unwrap_err();
    assert!(matches!(missing, DatabaseError::Missing(_)));
    assert!(!test.settings.database_sqlite_database.exists());
    Database::connect_or_create(&test.settings).await.unwrap();
    Database::connect(&test.settings).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable_at_once_and_no_secret_is_told() {
    let mut test = TestDatabase::sqlite();
    test.settings.database_type = ccat_transfer::settings::DatabaseType::Postgresql;
    test.settings.database_postgresql_host = "127.0.0.1".to_owned();
    // Nobody listens on port 1.
    test.settings.database_postgresql_port = 1;
    test.settings.database_postgresql_password = "s3cr3t@/:%".to_owned().into();
    let before = std::time::Instant::now();
    let error = Database::connect(&test.settings).await.unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(5));
    assert!(error.is_unreachable());
    let mut text = format!("{error:?}");
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = cause {
        text.push_str(&error.to_string());
        cause = error.source();
    }
    assert!(
        text.contains("127.0.0.1:1") && !text.contains("s3cr3t"),
        "{text}"
    );
}

#[tokio::test]
async fn a_postgres_row_lock_is_not_waited_for_without_end() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    let id = db.transfer().await;
    let mut settings = db.test.settings.clone();
    settings.acquire_timeout = Duration::from_millis(500);
    let impatient = Database::connect(&settings).await.unwrap();
    let impatient = Repository::open(impatient, EnumLabels::Names)
        .await
        .unwrap();
    let publish = || async {
        let answer = impatient.acquire(id, &me(), "t", TTL).await;
        assert!(answer.unwrap_err().is_unreachable());
        Ok::<_, std::io::Error>(())
    };
    db.repository.schedule(id, publish).await.unwrap();
    assert!(matches!(
        impatient.acquire(id, &me(), "t", TTL).await.unwrap(),
        Acquisition::Acquired(_)
    ));
}

/// A renewal that is on its way while somebody else has found the lease expired.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_beats_whoever_found_the_lease_expired() {
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
        let rival = tokio::spawn(async move {
            if sweeps {
                repository.sweep(&me()).await.unwrap().recovered.is_empty()
            } else {
                let answer = repository.acquire(id, &me(), "t", TTL).await.unwrap();
                matches!(answer, Acquisition::Held(_))
            }
        });
        // Now the rival waits for the lease's row.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!rival.is_finished());
        renewal.commit().await.unwrap();
        assert!(rival.await.unwrap());
        let detail = db.repository.show(id).await.unwrap().unwrap();
        assert!(detail.transfer.status.means(Status::InProgress));
        assert!(detail.lease.is_some() && detail.attempts[0].outcome.is_none());
    }
}

#[tokio::test]
async fn a_killed_postgres_session_is_unreachable_and_replaced() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    let id = db.transfer().await;
    let mut settings = db.test.settings.clone();
    settings.max_connections = 1;
    let single = Database::connect(&settings).await.unwrap();
    let single = Repository::open(single, EnumLabels::Names).await.unwrap();
    let publish = || async {
        db.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND state = 'idle in transaction'",
        )
        .await;
        Ok::<_, std::io::Error>(())
    };
    match single.schedule(id, publish).await.unwrap_err() {
        ScheduleError::Database(error) => assert!(error.is_unreachable(), "{error:?}"),
        ScheduleError::Publish(_) => panic!("published"),
    }
    assert_eq!(db.status(id).await, "PENDING");
    assert!(
        single
            .schedule(id, || async { Ok::<_, std::io::Error>(()) })
            .await
            .is_ok()
    );
}
