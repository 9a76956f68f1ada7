//! Attempts at a transfer: acquired, renewed, completed, failed, postponed and given up.

use std::path::Path;

use ccat_transfer::transfer::id::{AttemptNumber, TransferId};
use ccat_transfer::transfer::lease::{LeaseError, Progress, Snapshot};
use ccat_transfer::transfer::repository::{Acquisition, ClaimError, Listing};
use entity::{Outcome, Status};

use crate::ops_db::{Fixture, TTL, me};
use crate::transfer_rows::{
    copying, delayed, due, failure, finished, is_lost, published, scheduled, taken, waiting,
};

crate::on_both_databases!(
    a_transfer_is_acquired_renewed_and_completed,
    completing_twice_is_completing_once,
    a_failed_transfer_waits_for_its_next_attempt,
    a_failed_transfer_waits_until_it_is_due,
    an_operators_change_ends_the_wait,
    a_postponed_transfer_has_not_failed,
    two_copies_never_share_a_destination,
    a_transfer_is_given_up,
    finished_transfers_are_not_acquired,
);

async fn a_transfer_is_acquired_renewed_and_completed(db: Fixture) {
    let id = db.transfer().await;
    let repository = &db.repository;
    let acquired = db.acquire(id).await;
    assert!(acquired.displaced.is_none() && acquired.leftovers.is_empty());
    let lease = acquired.lease;
    assert_eq!(
        (lease.data_transfer_id(), lease.attempt(), lease.ttl()),
        (id, AttemptNumber::new(1), TTL)
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
        ..Progress::default()
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

    repository
        .forget_temporary(id, lease.attempt())
        .await
        .unwrap();
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
    // The result of `show` can be printed as JSON.
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
    // The first answer was lost, and the caller repeats the request.
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
        assert_eq!(lease.attempt().get(), retry);
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
        Acquisition::NotDue { not_before: found } => assert_eq!(found, not_before),
        answer => panic!("{answer:?}"),
    }
    assert_eq!(db.status(id).await, "PENDING");

    let past = "UPDATE transfer_worker_delay SET not_before = '2001-01-01T00:00:00+00:00'";
    assert_eq!(db.sql(past).await, 1);
    assert_eq!(due(&db).await, [id, other]);
    assert_eq!(waiting(&db).await, 0);
    assert_eq!(published(&db, id).await, scheduled(&[id]));
    let lease = db.acquire(id).await.lease;
    // An acquired transfer no longer waits, even if this attempt fails.
    let release = db.repository.release(&lease, "stop");
    release.await.unwrap();
    assert_eq!(due(&db).await, [id, other]);
}

async fn an_operators_change_ends_the_wait(db: Fixture) {
    let fail = async |id| {
        let lease = db.acquire(id).await.lease;
        let failure = delayed();
        let failing = db.repository.reset_for_retry(&lease, &failure);
        failing.await.unwrap();
    };
    let id = db.transfer().await;
    // A reset like that of the Python system's web interface.
    fail(id).await;
    assert!(due(&db).await.is_empty());
    db.sql(&format!(
        "UPDATE data_transfer SET retry_count = 0 WHERE id = {id}"
    ))
    .await;
    assert_eq!(due(&db).await, [id]);
    // A manager that ignores delays, such as the Python one.
    fail(id).await;
    assert!(due(&db).await.is_empty());
    db.set_status(id, "SCHEDULED").await;
    assert_eq!(
        db.repository.show(id).await.unwrap().unwrap().not_before,
        None
    );
    // The same by `transfers run`.
    fail(id).await;
    db.repository.forget_delay(id).await.unwrap();
    assert_eq!(due(&db).await, [id]);
    // The transfer was given up and reset.
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

async fn two_copies_never_share_a_destination(db: Fixture) {
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
    // The path is free after the first transfer is completed. With a lost lease, no path can be claimed.
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

async fn finished_transfers_are_not_acquired(db: Fixture) {
    let id = db.transfer().await;
    db.set_status(id, "COMPLETED").await;
    let owner = me();
    let acquire = |id| db.repository.acquire(id, &owner, "t", TTL);
    let unknown = TransferId::new(id.get() + 1);
    assert!(matches!(acquire(id).await.unwrap(), Acquisition::Completed));
    for unknown in [unknown, TransferId::new(i64::MAX)] {
        let acquisition = acquire(unknown).await.unwrap();
        assert!(matches!(acquisition, Acquisition::Missing));
    }
    assert_eq!(db.repository.get_retry_count(unknown).await.unwrap(), None);
    assert!(db.repository.show(unknown).await.unwrap().is_none());
}
