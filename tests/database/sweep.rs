//! The sweep, which recovers transfers of dead workers.

use std::sync::atomic::{AtomicUsize, Ordering};

use ccat_transfer::transfer::lease::{ExpiryReason, LeaseError, Snapshot};
use entity::Outcome;

use crate::ops_db::{Fixture, dead, me, stranger};

crate::on_both_databases!(
    a_sweep_recovers_only_dead_leases,
    a_sweep_and_a_renewal_exclude_each_other,
    a_sweep_removes_orphaned_leases,
    an_unrecoverable_row_does_not_block_others,
);

async fn a_sweep_recovers_only_dead_leases(db: Fixture) {
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
                r.displaced.expiry_reason,
                r.is_pending,
            )
        })
        .collect();
    assert_eq!(
        recovered,
        [
            (expired, ExpiryReason::Expired, true),
            (gone, ExpiryReason::OwnerDead, true)
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

async fn a_sweep_and_a_renewal_exclude_each_other(db: Fixture) {
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
        // Exactly one of the two succeeds, and the row shows which.
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

async fn a_sweep_removes_orphaned_leases(db: Fixture) {
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

async fn an_unrecoverable_row_does_not_block_others(db: Fixture) {
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
