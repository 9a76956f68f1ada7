//! Partial copies on record of transfers that have ended.

use ccat_transfer::transfer::id::TransferId;

use crate::on_both_databases;
use crate::ops_db::Fixture;

on_both_databases!(partials_behind_many_open_attempts_are_found);

async fn partials_behind_many_open_attempts_are_found(db: Fixture) {
    let [open, ended] = [db.transfer().await, db.transfer().await];
    let gone = TransferId::new(ended.get() + 1);
    // More attempts than one statement reads.
    for (id, attempts) in [(open, 10_001), (ended, 2), (gone, 1)] {
        db.sql(&format!(
            "INSERT INTO transfer_worker_attempt \
             (data_transfer_id, attempt, task_id, worker, started_at, outcome, temporary_name) \
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {attempts}) \
             SELECT {id}, i, 'task', 'worker', CURRENT_TIMESTAMP, 'interrupted', 'name' FROM n"
        ))
        .await;
    }
    db.set_status(ended, "FAILED").await;
    let left = db.repository.partials_of_ended().await.unwrap();
    let left: Vec<_> = left
        .iter()
        .map(|l| (l.data_transfer_id, l.attempt.get()))
        .collect();
    assert_eq!(left, [(ended, 1), (ended, 2), (gone, 1)]);
}
