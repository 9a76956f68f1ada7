//! Passes of the manager over pending transfers, with a broker in memory.

use ccat_transfer::transfer::id::TransferId;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ccat_transfer::manager::{Manager, ManagerError, Submit, SubmitError};

use crate::ops_db::{Fixture, me};

crate::on_both_databases!(
    a_pass_schedules_all_but_refused_rows,
    a_full_queue_does_not_hold_up_the_others,
    a_silent_broker_holds_no_lock_for_long,
    a_reset_completed_row_is_scheduled_by_a_full_scan,
);

/// A broker that refuses, confirms or never answers, depending on its fields.
#[derive(Default)]
struct ConfigurableBroker {
    /// Transfers whose messages are refused.
    refuses: HashSet<TransferId>,
    /// No request is answered.
    is_silent: bool,
    /// Names of full queues.
    full: Mutex<HashSet<String>>,
    sent: Mutex<Vec<TransferId>>,
}

#[async_trait]
impl Submit for ConfigurableBroker {
    async fn prepare(&self, _within: Duration) -> Result<(), SubmitError> {
        Ok(())
    }

    async fn submit(&self, id: TransferId, queue: &str) -> Result<String, SubmitError> {
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

fn manager(db: &Fixture, broker: &Arc<ConfigurableBroker>) -> Manager {
    let settings = ccat_transfer::settings::load(None, []).unwrap();
    Manager::new(
        db.repository.clone(),
        Arc::new(settings),
        me(),
        broker.clone(),
    )
}

async fn a_pass_schedules_all_but_refused_rows(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..9 {
        ids.push(db.transfer().await);
    }
    let (bad_row, bad_message) = (ids[2], ids[6]);
    db.refuse_updates_of(bad_row).await;
    let broker = Arc::new(ConfigurableBroker {
        refuses: HashSet::from([bad_message]),
        ..ConfigurableBroker::default()
    });
    let manager = manager(&db, &broker);
    let pass = manager.run_pass(false).await.unwrap();
    let mut refused: Vec<_> = pass.refused.iter().map(|r| r.data_transfer_id).collect();
    refused.sort_unstable();
    assert_eq!(refused, [bad_row, bad_message]);
    assert_eq!(pass.scheduled.len(), 7);
    let mut sent = broker.sent.lock().unwrap().clone();
    sent.sort_unstable();
    let good = |id: &&TransferId| **id != bad_row && **id != bad_message;
    assert_eq!(sent, ids.iter().filter(good).copied().collect::<Vec<_>>());
    for id in [bad_row, bad_message] {
        assert_eq!(db.status(id).await, "PENDING");
    }
    // The next pass tries them again. Only these remain, and refusals do not count as a broker that is down.
    let pass = manager.run_pass(false).await.unwrap();
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
    let broker = Arc::new(ConfigurableBroker::default());
    let queue = "ccat_telescope_computer_data_transfer".to_owned();
    broker.full.lock().unwrap().insert(queue);
    let manager = manager(&db, &broker);
    for pass in 0..3 {
        let pass = match manager.run_pass(false).await {
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
    let pass = manager.run_pass(false).await.unwrap();
    assert_eq!((pass.scheduled.len(), pass.refused.len()), (full.len(), 0));
}

async fn a_silent_broker_holds_no_lock_for_long(db: Fixture) {
    let [id, other] = [db.transfer().await, db.transfer().await];
    db.set_status(other, "SCHEDULED").await;
    let broker = Arc::new(ConfigurableBroker {
        is_silent: true,
        ..ConfigurableBroker::default()
    });
    let manager = manager(&db, &broker);
    let began = std::time::Instant::now();
    let (pass, ()) = tokio::join!(manager.run_pass(false), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        // On SQLite it waits for the end of the pass.
        db.acquire(other).await;
    });
    assert!(matches!(pass, Err(ManagerError::Broker(_))));
    // Two seconds, plus the delay of a busy machine; without the limit, publishing would not end.
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(db.status(id).await, "PENDING");
    db.acquire(id).await;
}

async fn a_reset_completed_row_is_scheduled_by_a_full_scan(db: Fixture) {
    let id = db.transfer().await;
    let last = db.transfer().await;
    // Its id is lower than those of the rows that every scan reads.
    let far = TransferId::new(id.get() + 5_000);
    let sql = format!("UPDATE data_transfer SET id = {far} WHERE id = {last}");
    assert_eq!(db.sql(&sql).await, 1);
    db.set_status(id, "COMPLETED").await;
    let broker = Arc::new(ConfigurableBroker::default());
    let manager = manager(&db, &broker);
    let scheduled = async || {
        let pass = manager.run_pass(false).await.unwrap();
        let ids = pass.scheduled.iter().map(|a| a.data_transfer_id);
        ids.collect::<Vec<_>>()
    };
    assert_eq!(scheduled().await, [far]);
    db.set_status(id, "PENDING").await;
    assert_eq!(
        scheduled().await,
        [] as [TransferId; 0],
        "not before the time has come"
    );
    // As after a restart, or `--once`.
    let pass = self::manager(&db, &broker).run_pass(false).await.unwrap();
    assert_eq!(pass.scheduled.len(), 1);
}
