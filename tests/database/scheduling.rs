//! Scheduling of pending transfers, and the scan that finds them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::repository::{Acquisition, Batch, OpenTransfer};
use entity::Status;

use crate::ops_db::{Fixture, TTL, me};
use crate::transfer_rows::{confirmed, scan, scheduled, taken, wanted};

crate::on_both_databases!(
    a_row_is_scheduled_with_its_message,
    only_published_rows_are_scheduled,
    a_worker_may_get_the_message_before_the_commit,
    scheduling_is_exclusive,
    a_scan_shows_open_transfers,
    a_later_scan_sees_every_change_but_one,
);

async fn a_row_is_scheduled_with_its_message(db: Fixture) {
    let id = db.transfer().await;
    let messages = AtomicUsize::new(0);
    let publish = async |ids: Vec<TransferId>| {
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
    let unknown = TransferId::new(id.get() + 1);
    assert_eq!(schedule(unknown).await, taken(&[unknown]));
    assert_eq!(messages.load(Ordering::SeqCst), 1);
    db.acquire(id).await;
}

async fn only_published_rows_are_scheduled(db: Fixture) {
    let ids = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.set_status(ids[3], "COMPLETED").await;
    let candidates = ids.map(wanted);
    let refused = db.everything(ids[1]).await;
    let publish = async |offered: Vec<TransferId>| {
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
    // No message was confirmed: nothing changes, and the locks are released.
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

/// Ids and statuses of the scanned transfers.
fn shown(seen: &[OpenTransfer]) -> Vec<(TransferId, Status)> {
    seen.iter().map(|t| (t.id, t.status)).collect()
}

async fn a_scan_shows_open_transfers(db: Fixture) {
    use Status::{InProgress, Pending, Scheduled};
    assert_eq!(scan(&db, None).await.0, []);
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
    let (seen, watch) = scan(&db, None).await;
    assert_eq!(shown(&seen), open);
    assert_eq!(shown(&scan(&db, watch.as_ref()).await.0), open);

    let places = db.repository.transfer_ends().await.unwrap();
    let [origin, destination] = [
        seen[0].origin_location_id.unwrap(),
        seen[0].destination_location_id.unwrap(),
    ];
    let place = |id| (&places[&id].site[..], &places[&id].location[..]);
    assert_eq!(place(origin), ("ccat", "telescope_computer"));
    assert_eq!(place(destination), ("cologne", "buffer"));

    // With a filter for the origin's site.
    let mut of_origin = Vec::new();
    for origins in [vec![origin], vec![destination], vec![]] {
        let mut count = 0;
        let see = |_| count += 1;
        let look = db.repository.scan(Some(&origins), None, see);
        look.await.unwrap();
        of_origin.push(count);
    }
    assert_eq!(of_origin, [3, 0, 0]);
}

async fn a_later_scan_sees_every_change_but_one(db: Fixture) {
    // The distance is more than the number of ids that every scan reads again.
    let [old, failed, open] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.set_status(old, "COMPLETED").await;
    db.set_status(failed, "FAILED").await;
    let far = TransferId::new(open.get() + 5_000);
    let last = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET id = {far} WHERE id = {last}"
    ))
    .await;
    db.set_status(far, "COMPLETED").await;
    let (seen, watch) = scan(&db, None).await;
    assert_eq!(shown(&seen), [(open, Status::Pending)]);

    // An operator resets a failed row, and a new row appears late with a lower id.
    let late = TransferId::new(far.get() - 1);
    let last = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET id = {late} WHERE id = {last}"
    ))
    .await;
    db.set_status(failed, "PENDING").await;
    db.set_status(far, "PENDING").await;
    let expected = [failed, open, late, far].map(|id| (id, Status::Pending));
    assert_eq!(shown(&scan(&db, watch.as_ref()).await.0), expected);

    // Lowest id first, although the update has moved the row within the table.
    db.sql(&format!(
        "UPDATE data_transfer SET retry_count = 0 WHERE id = {failed}"
    ))
    .await;
    assert_eq!(shown(&scan(&db, watch.as_ref()).await.0), expected);

    // A full scan finds a row that was COMPLETED long ago.
    db.set_status(old, "PENDING").await;
    assert_eq!(shown(&scan(&db, watch.as_ref()).await.0), expected);
    assert_eq!(scan(&db, None).await.0.len(), 5);

    // Another database: the cursor does not apply.
    db.sql(&format!("DELETE FROM data_transfer WHERE id >= {late}"))
        .await;
    assert_eq!(scan(&db, watch.as_ref()).await.0.len(), 3);
}
