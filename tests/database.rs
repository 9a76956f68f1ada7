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
#[path = "database/scheduled.rs"]
mod scheduled_rows;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ccat_transfer::manager::{Manager, ManagerError, Submit, SubmitError};
use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::database::{Database, DatabaseError};
use ccat_transfer::transfer::lease::{Demise, Lease, LeaseError, Owner, Phase, Progress, Snapshot};
use ccat_transfer::transfer::link::{Capacity, ClosedLink, FullLink, LinkName, Pause};
use ccat_transfer::transfer::repository::{
    Acquisition, Allowance, Batch, Candidate, ClaimError, Failure, Filter, Finished, Leftover,
    LinkChange, LinkError, Listing, OpenTransfer, Renewal, Repository, SiteError, Traffic, Watch,
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
    only_what_is_published_is_scheduled,
    a_worker_may_get_the_message_before_the_commit,
    scheduling_is_exclusive,
    a_look_shows_what_is_not_over,
    a_later_look_sees_every_change_but_one,
    managers_that_work_at_once_keep_a_limit_together,
    nothing_is_sent_over_a_link_that_was_paused_meanwhile,
    a_message_of_a_paused_link_puts_its_row_back,
    a_message_of_a_full_link_puts_its_row_back,
    workers_that_begin_at_once_keep_a_limit_together,
    a_renewal_tells_to_make_way,
    links_are_changed_one_thing_at_a_time,
    traffic_is_counted_by_link,
    a_pass_schedules_all_but_what_is_refused,
    a_full_queue_does_not_hold_up_the_others,
    a_silent_broker_holds_no_lock_for_long,
    what_was_completed_and_is_reset_is_scheduled_by_a_full_look,
    a_database_without_links_works_as_before,
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

fn is_lost<T>(result: Result<T, LeaseError>) -> bool {
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
/// Every transfer that is not over, and the watch for the next look.
async fn look(db: &Fixture, before: Option<&Watch>) -> (Vec<OpenTransfer>, Option<Watch>) {
    let mut seen = Vec::new();
    let see = |transfer| seen.push(transfer);
    let watch = db.repository.look(None, before, see).await.unwrap();
    (seen, watch)
}

async fn pending(repository: &Repository) -> Vec<OpenTransfer> {
    let mut seen = Vec::new();
    let see = |transfer: OpenTransfer| {
        if transfer.status == Status::Pending {
            seen.push(transfer);
        }
    };
    repository.look(None, None, see).await.unwrap();
    seen
}

async fn due(db: &Fixture) -> Vec<i64> {
    let pending = pending(&db.repository).await;
    let due = pending.iter().filter(|transfer| !transfer.waits);
    due.map(|transfer| transfer.id).collect()
}

async fn waiting(db: &Fixture) -> usize {
    let pending = pending(&db.repository).await;
    pending.iter().filter(|transfer| transfer.waits).count()
}

/// Without a limit of its link.
fn wanted(id: i64) -> Candidate {
    Candidate {
        id,
        queue: "q".into(),
        allowance: None,
    }
}

/// A broker that takes everything.
async fn confirmed(ids: Vec<i64>) -> HashMap<i64, String> {
    let sent = ids.into_iter().map(|id| (id, format!("task-{id}")));
    sent.collect()
}

async fn published(db: &Fixture, id: i64) -> Batch {
    db.repository
        .schedule(&[wanted(id)], confirmed)
        .await
        .unwrap()
}

fn scheduled(ids: &[i64]) -> Batch {
    Batch {
        scheduled: ids.to_vec(),
        ..Batch::default()
    }
}

fn taken(ids: &[i64]) -> Batch {
    Batch {
        taken: ids.to_vec(),
        ..Batch::default()
    }
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
    assert_eq!(waiting(&db).await, 1);
    assert_eq!(published(&db, id).await, taken(&[id]));
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
    assert_eq!(waiting(&db).await, 0);
    assert_eq!(published(&db, id).await, scheduled(&[id]));
    let lease = db.acquire(id).await.lease;
    // Taken up again, it waits no more, whatever becomes of this attempt.
    let release = db.repository.release(&lease, "stop");
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
    db.repository.release(&second.lease, "stop").await.unwrap();
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
    assert!(is_lost(repository.release(lease, "stop").await));
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

    let looks = AtomicUsize::new(0);
    let progress = || _ = looks.fetch_add(1, Ordering::Relaxed);
    let sweep = db.repository.sweep_watched(&me(), progress).await.unwrap();
    assert_eq!(
        looks.into_inner(),
        2,
        "each dead lease is a sign of progress"
    );
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
            Ok(_) => (1, "IN_PROGRESS"),
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
    db.refuse_updates_of(bad).await;
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
    let messages = AtomicUsize::new(0);
    let publish = async |ids: Vec<i64>| {
        messages.fetch_add(ids.len(), Ordering::SeqCst);
        confirmed(ids).await
    };
    let schedule = async |id| {
        let candidates = [wanted(id)];
        let scheduling = db.repository.schedule(&candidates, publish);
        scheduling.await.unwrap()
    };
    assert_eq!(schedule(id).await, scheduled(&[id]));
    assert_eq!(db.status(id).await, "SCHEDULED");
    assert_eq!(schedule(id).await, taken(&[id]));
    assert_eq!(schedule(id + 1).await, taken(&[id + 1]));
    assert_eq!(messages.load(Ordering::SeqCst), 1);
    db.acquire(id).await;
}

async fn only_what_is_published_is_scheduled(db: Fixture) {
    let ids = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.set_status(ids[3], "COMPLETED").await;
    let candidates = ids.map(wanted);
    let refused = db.everything(ids[1]).await;
    let publish = async |offered: Vec<i64>| {
        assert_eq!(offered, ids[..3]);
        confirmed(vec![ids[0], ids[2]]).await
    };
    let batch = db.repository.schedule(&candidates, publish).await.unwrap();
    let expected = Batch {
        scheduled: vec![ids[0], ids[2]],
        unpublished: vec![ids[1]],
        taken: vec![ids[3]],
        held_back: vec![],
    };
    assert_eq!(batch, expected);
    let mut statuses = Vec::new();
    for id in ids {
        statuses.push(db.status(id).await);
    }
    assert_eq!(statuses, ["SCHEDULED", "PENDING", "SCHEDULED", "COMPLETED"]);
    assert_eq!(db.everything(ids[1]).await, refused);
    // No message at all: nothing changes, and the locks are gone.
    let none = async |_| HashMap::new();
    let batch = db.repository.schedule(&candidates, none).await.unwrap();
    assert_eq!(batch.unpublished, [ids[1]]);
    assert_eq!(db.everything(ids[1]).await, refused);
    db.acquire(ids[1]).await;
}

async fn a_worker_may_get_the_message_before_the_commit(db: Fixture) {
    let id = db.transfer().await;
    let repository = db.repository.clone();
    let (send, receive) = tokio::sync::oneshot::channel();
    let worker = tokio::spawn(async move {
        receive.await.unwrap();
        repository.acquire(id, &me(), "t", TTL).await.unwrap()
    });
    let publish = |ids| async {
        send.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        confirmed(ids).await
    };
    let batch = db.repository.schedule(&[wanted(id)], publish).await;
    assert_eq!(batch.unwrap(), scheduled(&[id]));
    assert!(matches!(worker.await.unwrap(), Acquisition::Acquired(_)));
    assert_eq!(db.status(id).await, "IN_PROGRESS");
}

async fn scheduling_is_exclusive(db: Fixture) {
    let id = db.transfer().await;
    let managers = (0..8).map(|_| {
        let repository = db.repository.clone();
        tokio::spawn(async move {
            let candidates = [wanted(id)];
            repository.schedule(&candidates, confirmed).await.unwrap()
        })
    });
    let managers: Vec<_> = managers.collect();
    let mut times = 0;
    for manager in managers {
        times += manager.await.unwrap().scheduled.len();
    }
    assert_eq!(times, 1);
}

/// Ids and statuses of what a look shows.
fn shown(seen: &[OpenTransfer]) -> Vec<(i64, Status)> {
    seen.iter().map(|t| (t.id, t.status)).collect()
}

async fn a_look_shows_what_is_not_over(db: Fixture) {
    use Status::{InProgress, Pending, Scheduled};
    assert_eq!(look(&db, None).await.0, []);
    let mut ids = Vec::new();
    for status in [
        "COMPLETED",
        "PENDING",
        "SCHEDULED",
        "IN_PROGRESS",
        "FAILED",
        "COMPLETED",
    ] {
        let id = db.transfer().await;
        db.set_status(id, status).await;
        ids.push(id);
    }
    let open = [(ids[1], Pending), (ids[2], Scheduled), (ids[3], InProgress)];
    let (seen, watch) = look(&db, None).await;
    assert_eq!(shown(&seen), open);
    assert_eq!(shown(&look(&db, watch.as_ref()).await.0), open);

    let places = db.repository.places().await.unwrap();
    let [origin, destination] = [
        seen[0].origin_location_id.unwrap(),
        seen[0].destination_location_id.unwrap(),
    ];
    let place = |id| (&places[&id].site[..], &places[&id].location[..]);
    assert_eq!(place(origin), ("ccat", "telescope_computer"));
    assert_eq!(place(destination), ("cologne", "buffer"));

    // Of one site only.
    let mut of_origin = Vec::new();
    for origins in [vec![origin], vec![destination], vec![]] {
        let mut count = 0;
        let see = |_| count += 1;
        let look = db.repository.look(Some(&origins), None, see);
        look.await.unwrap();
        of_origin.push(count);
    }
    assert_eq!(of_origin, [3, 0, 0]);
}

async fn a_later_look_sees_every_change_but_one(db: Fixture) {
    // More than the ids that are looked at again in any case.
    let [old, failed, open] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.set_status(old, "COMPLETED").await;
    db.set_status(failed, "FAILED").await;
    let far = open + 5_000;
    let last = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET id = {far} WHERE id = {last}"
    ))
    .await;
    db.set_status(far, "COMPLETED").await;
    let (seen, watch) = look(&db, None).await;
    assert_eq!(shown(&seen), [(open, Status::Pending)]);

    // An operator resets what has failed, and a new one comes late with a lower id.
    let late = far - 1;
    let last = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET id = {late} WHERE id = {last}"
    ))
    .await;
    db.set_status(failed, "PENDING").await;
    db.set_status(far, "PENDING").await;
    let expected = [failed, open, late, far].map(|id| (id, Status::Pending));
    assert_eq!(shown(&look(&db, watch.as_ref()).await.0), expected);

    // What was COMPLETED long ago is seen by a look at all.
    db.set_status(old, "PENDING").await;
    assert_eq!(shown(&look(&db, watch.as_ref()).await.0), expected);
    assert_eq!(look(&db, None).await.0.len(), 5);

    // Another database: nothing of the watch holds.
    db.sql(&format!("DELETE FROM data_transfer WHERE id >= {late}"))
        .await;
    assert_eq!(look(&db, watch.as_ref()).await.0.len(), 3);
}

fn link() -> LinkName {
    LinkName {
        origin: "ccat".into(),
        destination: "cologne".into(),
    }
}

async fn pause(db: &Fixture, by: &str, stops_running: bool) -> Pause {
    let name = link();
    let pausing = db.repository.pause_link(&name, by, "storm", stops_running);
    pausing.await.unwrap().pause.unwrap()
}

async fn limit(db: &Fixture, max_active: u32) {
    let change = LinkChange {
        max_active: Some(Some(max_active)),
        ..LinkChange::default()
    };
    db.repository.set_link(&link(), &change).await.unwrap();
}

/// What the link allows, as a manager finds it.
async fn allowance(db: &Fixture, free: u64) -> Arc<Allowance> {
    let issued = db.repository.link(&link()).await.unwrap().issued;
    Arc::new(Allowance {
        link: link(),
        free,
        issued,
    })
}

async fn managers_that_work_at_once_keep_a_limit_together(db: Fixture) {
    limit(&db, 5).await;
    let mut ids = Vec::new();
    for _ in 0..24 {
        ids.push(db.transfer().await);
    }
    // All have counted before any of them schedules.
    let allowance = allowance(&db, 5).await;
    let managers: Vec<_> = ids
        .chunks(4)
        .map(|ids| {
            let repository = db.repository.clone();
            let candidate = |id: &i64| Candidate {
                id: *id,
                queue: "q".into(),
                allowance: Some(allowance.clone()),
            };
            let candidates: Vec<_> = ids.iter().map(candidate).collect();
            tokio::spawn(async move { repository.schedule(&candidates, confirmed).await.unwrap() })
        })
        .collect();
    let (mut sent, mut held_back) = (0, 0);
    for manager in managers {
        let batch = manager.await.unwrap();
        sent += batch.scheduled.len();
        held_back += batch.held_back.len();
    }
    assert_eq!((sent, held_back), (5, 19));
    assert_eq!(db.repository.link(&link()).await.unwrap().issued, 5);
}

async fn nothing_is_sent_over_a_link_that_was_paused_meanwhile(db: Fixture) {
    limit(&db, 5).await;
    let id = db.transfer().await;
    let candidates = [Candidate {
        id,
        queue: "q".into(),
        allowance: Some(allowance(&db, 5).await),
    }];
    pause(&db, "me@here", false).await;
    let batch = db
        .repository
        .schedule(&candidates, confirmed)
        .await
        .unwrap();
    assert_eq!(batch.held_back, [id]);
    assert_eq!(db.status(id).await, "PENDING");
}

async fn a_message_of_a_paused_link_puts_its_row_back(db: Fixture) {
    let [id, other] = [db.transfer().await, db.transfer().await];
    db.set_status(id, "SCHEDULED").await;
    let pause_of_link = pause(&db, "me@here", false).await;
    for _ in 0..2 {
        match db.repository.acquire(id, &me(), "t", TTL).await.unwrap() {
            Acquisition::LinkClosed(ClosedLink::Paused(paused)) => {
                assert_eq!((paused.name, paused.pause), (link(), pause_of_link.clone()));
            }
            answer => panic!("{answer:?}"),
        }
        assert_eq!(db.status(id).await, "PENDING");
    }
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
    assert_eq!(db.leases().await, "0");
    db.repository.resume_link(&link()).await.unwrap();
    db.acquire(id).await;

    // What a dead worker left is not taken over either.
    db.acquire_as(other, &dead()).await;
    pause(&db, "me@here", false).await;
    let answer = db.repository.acquire(other, &me(), "t", TTL).await.unwrap();
    let closed = matches!(answer, Acquisition::LinkClosed(ClosedLink::Paused(_)));
    assert!(closed, "{answer:?}");
    assert_eq!(db.status(other).await, "PENDING");
    assert_eq!(db.leases().await, "1");
}

/// The limit was another one when the messages were sent.
async fn a_message_of_a_full_link_puts_its_row_back(db: Fixture) {
    let [running, left, id] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    let lease = db.acquire(running).await.lease;
    db.set_status(id, "SCHEDULED").await;
    limit(&db, 1).await;
    let full = FullLink {
        name: link(),
        limit: 1,
        copies: 1,
    };
    match db.repository.acquire(id, &me(), "t", TTL).await.unwrap() {
        Acquisition::LinkClosed(closed) => assert_eq!(closed, ClosedLink::Full(full)),
        answer => panic!("{answer:?}"),
    }
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
    assert_eq!(db.leases().await, "1");

    // Another link's limit does not count, nor does one that a dead worker has left of this transfer.
    db.repository.complete(&lease, &finished()).await.unwrap();
    let back = LinkName {
        origin: link().destination,
        destination: link().origin,
    };
    let change = LinkChange {
        max_active: Some(Some(0)),
        ..LinkChange::default()
    };
    db.repository.set_link(&back, &change).await.unwrap();
    db.acquire_as(left, &dead()).await;
    db.acquire(left).await;

    // By hand goes beyond the limit, but not through a pause.
    let me = me();
    let by_hand = || db.repository.acquire_by_hand(id, &me, "t", TTL);
    pause(&db, "me@here", false).await;
    let answer = by_hand().await.unwrap();
    let closed = matches!(answer, Acquisition::LinkClosed(ClosedLink::Paused(_)));
    assert!(closed, "{answer:?}");
    db.repository.resume_link(&link()).await.unwrap();
    let answer = by_hand().await.unwrap();
    assert!(matches!(answer, Acquisition::Acquired(_)), "{answer:?}");
}

async fn workers_that_begin_at_once_keep_a_limit_together(db: Fixture) {
    limit(&db, 3).await;
    let mut workers = Vec::new();
    for _ in 0..10 {
        let id = db.transfer().await;
        db.set_status(id, "SCHEDULED").await;
        let repository = db.repository.clone();
        workers.push(async move { repository.acquire(id, &me(), "t", TTL).await.unwrap() });
    }
    let answers: Vec<_> = workers.into_iter().map(tokio::spawn).collect();
    let mut begun = 0;
    for answer in answers {
        match answer.await.unwrap() {
            Acquisition::Acquired(_) => begun += 1,
            Acquisition::LinkClosed(ClosedLink::Full(full)) => assert_eq!(full.copies, 3),
            answer => panic!("{answer:?}"),
        }
    }
    assert_eq!(begun, 3);
    assert_eq!(db.leases().await, "3");
}

async fn a_renewal_tells_to_make_way(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let renew = async || {
        let seen = Snapshot::default();
        db.repository.renew(&lease, seen).await.unwrap()
    };
    assert_eq!(renew().await, Renewal::GoOn);
    pause(&db, "me@here", false).await;
    assert_eq!(renew().await, Renewal::GoOn, "copies that run go on");
    pause(&db, "you@here", true).await;
    match renew().await {
        Renewal::Stop(paused) => assert_eq!(paused.pause.by, "you@here"),
        answer => panic!("{answer:?}"),
    }
    let release = db.repository.release(&lease, "paused");
    release.await.unwrap();
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
}

async fn links_are_changed_one_thing_at_a_time(db: Fixture) {
    assert_eq!(db.repository.links().await.unwrap(), []);
    let unlimited = db.repository.link(&link()).await.unwrap();
    assert_eq!((unlimited.max_active, unlimited.pause), (None, None));
    limit(&db, 4).await;
    let windows = "18:00-06:00 UTC max_active=1\n12:00-13:00 UTC max_active=0";
    let change = LinkChange {
        priority: Some(-3),
        capacity: Some(Capacity::stored(windows)),
        streams: Some(Some(8)),
        tcp_window: Some(Some("4m".into())),
        max_rate: Some(Some("100m".into())),
        ..LinkChange::default()
    };
    let changed = db.repository.set_link(&link(), &change).await.unwrap();
    assert_eq!((changed.max_active, changed.priority), (Some(4), -3));
    assert_eq!(changed.capacity.lines().join("\n"), windows);
    let change = LinkChange {
        max_active: Some(None),
        streams: Some(None),
        ..LinkChange::default()
    };
    let changed = db.repository.set_link(&link(), &change).await.unwrap();
    assert_eq!(
        (changed.max_active, changed.overrides.streams),
        (None, None)
    );
    assert_eq!(changed.overrides.max_rate.as_deref(), Some("100m"));
    assert_eq!(db.repository.links().await.unwrap(), [changed]);

    let refused = db.repository.resume_link(&link()).await;
    assert!(matches!(refused, Err(LinkError::NotPaused(_))));
    let pause = async |reason, now| {
        let name = link();
        let pausing = db.repository.pause_link(&name, "me@here", reason, now);
        pausing.await
    };
    let paused = pause("storm", false).await.unwrap();
    assert_eq!(paused.pause.as_ref().unwrap().reason, "storm");
    match pause("again", false).await {
        Err(LinkError::Paused { pause, .. }) => assert_eq!(pause.reason, "storm"),
        answer => panic!("{answer:?}"),
    }
    // It may become a stricter one.
    assert!(
        pause("now", true)
            .await
            .unwrap()
            .pause
            .unwrap()
            .stops_running
    );
    assert!(pause("later", false).await.is_err());
    let open = db.repository.resume_link(&link()).await.unwrap();
    assert_eq!((open.pause, open.priority), (None, -3));
}

async fn traffic_is_counted_by_link(db: Fixture) {
    assert!(db.repository.traffic().await.unwrap().is_empty());
    let mut ids = Vec::new();
    for status in ["COMPLETED", "PENDING", "PENDING", "SCHEDULED", "FAILED"] {
        let id = db.transfer().await;
        db.set_status(id, status).await;
        ids.push(id);
    }
    let running = db.transfer().await;
    db.acquire(running).await;
    let traffic = db.repository.traffic().await.unwrap();
    let pending_since = traffic
        .get(&link())
        .and_then(|traffic| traffic.pending_since);
    let age = db.database.now().await.unwrap() - pending_since.unwrap();
    assert!((-1..60).contains(&age.num_seconds()), "{age}");
    let expected = Traffic {
        active: 1,
        scheduled: 1,
        pending: 2,
        oldest_pending: Some(ids[1]),
        pending_since,
    };
    assert_eq!(
        traffic.into_iter().collect::<Vec<_>>(),
        [(link(), expected)]
    );
    let routed = db.repository.routed_links().await.unwrap();
    assert_eq!(
        routed.into_iter().map(|l| l.name).collect::<Vec<_>>(),
        [link()]
    );
}

/// As it was before there were links.
async fn a_database_without_links_works_as_before(db: Fixture) {
    let id = db.transfer().await;
    db.sql("DROP TABLE transfer_worker_link").await;
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    assert!(!repository.has_links());
    assert_eq!(repository.links().await.unwrap(), []);
    assert_eq!(repository.link(&link()).await.unwrap().max_active, None);
    let name = link();
    let refused = repository.pause_link(&name, "me@here", "storm", true);
    assert!(matches!(refused.await, Err(LinkError::NoTable)));
    let batch = repository.schedule(&[wanted(id)], confirmed).await.unwrap();
    assert_eq!(batch, scheduled(&[id]));
    let lease = match repository.acquire(id, &me(), "t", TTL).await.unwrap() {
        Acquisition::Acquired(acquired) => acquired.lease,
        answer => panic!("{answer:?}"),
    };
    let renewal = repository.renew(&lease, Snapshot::default()).await.unwrap();
    assert_eq!(renewal, Renewal::GoOn);
    repository.complete(&lease, &finished()).await.unwrap();
}

/// A broker that takes messages as it is told to.
#[derive(Default)]
struct Broker {
    /// Messages of these are refused.
    refuses: HashSet<i64>,
    /// It never answers.
    is_silent: bool,
    /// Names of full queues.
    full: Mutex<HashSet<String>>,
    sent: Mutex<Vec<i64>>,
}

#[async_trait]
impl Submit for Broker {
    async fn prepare(&self, _within: Duration) -> Result<(), SubmitError> {
        Ok(())
    }

    async fn submit(&self, id: i64, queue: &str) -> Result<String, SubmitError> {
        if self.is_silent {
            std::future::pending::<()>().await;
        }
        if self.refuses.contains(&id) || self.full.lock().unwrap().contains(queue) {
            return Err(SubmitError::refused("refused"));
        }
        self.sent.lock().unwrap().push(id);
        // A confirmation takes longer than a refusal.
        tokio::time::sleep(Duration::from_millis(5)).await;
        Ok(format!("task-{id}"))
    }
}

fn manager(db: &Fixture, broker: &Arc<Broker>) -> Manager {
    let settings = ccat_transfer::settings::load(None, []).unwrap();
    Manager::new(
        db.repository.clone(),
        Arc::new(settings),
        me(),
        broker.clone(),
    )
}

async fn a_pass_schedules_all_but_what_is_refused(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..9 {
        ids.push(db.transfer().await);
    }
    let (bad_row, bad_message) = (ids[2], ids[6]);
    db.refuse_updates_of(bad_row).await;
    let broker = Arc::new(Broker {
        refuses: HashSet::from([bad_message]),
        ..Broker::default()
    });
    let manager = manager(&db, &broker);
    let pass = manager.transfer_transfer_packages(false).await.unwrap();
    let mut refused: Vec<_> = pass.refused.iter().map(|r| r.data_transfer_id).collect();
    refused.sort_unstable();
    assert_eq!(refused, [bad_row, bad_message]);
    assert_eq!(pass.scheduled.len(), 7);
    let mut sent = broker.sent.lock().unwrap().clone();
    sent.sort_unstable();
    let good = |id: &&i64| **id != bad_row && **id != bad_message;
    assert_eq!(sent, ids.iter().filter(good).copied().collect::<Vec<_>>());
    for id in [bad_row, bad_message] {
        assert_eq!(db.status(id).await, "PENDING");
    }
    // The next pass tries them again. Only they are left, and refusals do not count as a broker that
    // is away.
    let pass = manager.transfer_transfer_packages(false).await.unwrap();
    assert_eq!((pass.scheduled.len(), pass.refused.len()), (0, 2));
}

/// A queue that refuses messages (`x-overflow=reject-publish`) does not affect other queues.
async fn a_full_queue_does_not_hold_up_the_others(db: Fixture) {
    let (mut full, mut good) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        full.push(db.transfer().await);
    }
    for _ in 0..4 {
        good.push(db.transfer_from("ccat/buffer").await);
    }
    let broker = Arc::new(Broker::default());
    let queue = "ccat_telescope_computer_data_transfer".to_owned();
    broker.full.lock().unwrap().insert(queue);
    let manager = manager(&db, &broker);
    for pass in 0..3 {
        let pass = match manager.transfer_transfer_packages(false).await {
            Ok(done) => done,
            Err(error) => panic!("pass {pass}: {error:?}"),
        };
        assert_eq!(pass.refused.len(), full.len());
    }
    assert_eq!(*broker.sent.lock().unwrap(), good, "one message for each");
    for id in &good {
        assert_eq!(db.status(*id).await, "SCHEDULED");
    }
    assert_eq!(db.status(full[0]).await, "PENDING");
    broker.full.lock().unwrap().clear();
    let pass = manager.transfer_transfer_packages(false).await.unwrap();
    assert_eq!((pass.scheduled.len(), pass.refused.len()), (full.len(), 0));
}

async fn a_silent_broker_holds_no_lock_for_long(db: Fixture) {
    let [id, other] = [db.transfer().await, db.transfer().await];
    db.set_status(other, "SCHEDULED").await;
    let broker = Arc::new(Broker {
        is_silent: true,
        ..Broker::default()
    });
    let manager = manager(&db, &broker);
    let began = std::time::Instant::now();
    let (pass, ()) = tokio::join!(manager.transfer_transfer_packages(false), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        // On SQLite it waits for the pass.
        db.acquire(other).await;
    });
    assert!(matches!(pass, Err(ManagerError::Broker(_))));
    // Two seconds, and what a busy machine adds; publishing itself would not end.
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(db.status(id).await, "PENDING");
    db.acquire(id).await;
}

async fn what_was_completed_and_is_reset_is_scheduled_by_a_full_look(db: Fixture) {
    let id = db.transfer().await;
    let last = db.transfer().await;
    // Not among the latest ones, which are always looked at.
    let far = id + 5_000;
    let sql = format!("UPDATE data_transfer SET id = {far} WHERE id = {last}");
    assert_eq!(db.sql(&sql).await, 1);
    db.set_status(id, "COMPLETED").await;
    let broker = Arc::new(Broker::default());
    let manager = manager(&db, &broker);
    let scheduled = async || {
        let pass = manager.transfer_transfer_packages(false).await.unwrap();
        let ids = pass.scheduled.iter().map(|a| a.data_transfer_id);
        ids.collect::<Vec<_>>()
    };
    assert_eq!(scheduled().await, [far]);
    db.set_status(id, "PENDING").await;
    assert_eq!(
        scheduled().await,
        [] as [i64; 0],
        "not before the time has come"
    );
    // As after a restart, or `--once`.
    let pass = self::manager(&db, &broker)
        .transfer_transfer_packages(false)
        .await
        .unwrap();
    assert_eq!(pass.scheduled.len(), 1);
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
    let waiting = pending(&repository).await;
    let ids: Vec<_> = waiting.iter().map(|pending| pending.id).collect();
    work(&repository, &ids).await;
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
    let publish = async |ids| {
        let answer = impatient.acquire(id, &me(), "t", TTL).await;
        assert!(answer.unwrap_err().is_unreachable());
        confirmed(ids).await
    };
    let candidates = [wanted(id)];
    let scheduling = db.repository.schedule(&candidates, publish);
    assert_eq!(scheduling.await.unwrap(), scheduled(&[id]));
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
    let publish = async |ids| {
        db.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = current_database() AND state = 'idle in transaction'",
        )
        .await;
        confirmed(ids).await
    };
    let error = single.schedule(&[wanted(id)], publish).await.unwrap_err();
    assert!(error.is_unreachable(), "{error:?}");
    assert_eq!(db.status(id).await, "PENDING");
    let candidates = [wanted(id)];
    let scheduling = single.schedule(&candidates, confirmed);
    assert_eq!(scheduling.await.unwrap(), scheduled(&[id]));
}
