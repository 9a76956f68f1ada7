//! Records of SCHEDULED rows, and the manager's reconciliation of rows with messages.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ccat_transfer::manager::{
    FindError, FindMessages, HeldMessages, Manager, Pass, Submit, SubmitError,
};
use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::repository::{Instruction, Repository, Withdrawal};
use entity::Action;

use crate::ops_db::{Fixture, TTL, me};
use crate::transfer_rows::{confirmed, finished, scheduled, wanted};

crate::on_both_databases!(
    a_record_begins_with_scheduled_and_ends_with_it,
    a_lost_message_is_sent_again,
    rows_of_other_programs_are_found,
    messages_that_exist_are_not_sent_again,
    several_managers_send_once,
    the_broker_is_not_queried_without_need,
    an_unreachable_broker_changes_nothing,
    a_sent_again_transfer_waits_longer,
    a_withdrawn_message_takes_its_row_along,
    a_database_without_records_works_as_before,
);

const QUEUE: &str = "ccat_telescope_computer_data_transfer";

/// A broker with queues in memory.
#[derive(Default)]
struct QueueBroker {
    queues: Mutex<HashMap<String, Vec<TransferId>>>,
    held: Mutex<HeldMessages>,
    /// Requests are refused.
    is_mute: Mutex<bool>,
    asked: Mutex<Vec<&'static str>>,
}

impl QueueBroker {
    fn purge(&self) {
        self.queues.lock().unwrap().clear();
    }

    fn messages(&self) -> usize {
        self.queues.lock().unwrap().values().map(Vec::len).sum()
    }

    fn ask(&self, what: &'static str) -> Result<(), FindError> {
        self.asked.lock().unwrap().push(what);
        match *self.is_mute.lock().unwrap() {
            true => Err(FindError("mute".into())),
            false => Ok(()),
        }
    }

    fn asked(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

#[async_trait]
impl Submit for QueueBroker {
    async fn prepare(&self, _within: Duration) -> Result<(), SubmitError> {
        Ok(())
    }

    async fn submit(&self, id: TransferId, queue: &str) -> Result<String, SubmitError> {
        let mut queues = self.queues.lock().unwrap();
        queues.entry(queue.to_owned()).or_default().push(id);
        Ok(format!("task-{id}"))
    }
}

#[async_trait]
impl FindMessages for QueueBroker {
    async fn ready(&self, queues: &[String]) -> Result<HashMap<String, u64>, FindError> {
        self.ask("ready")?;
        let all = self.queues.lock().unwrap();
        let count = |queue: &String| all.get(queue).map_or(0, |messages| messages.len() as u64);
        Ok(queues.iter().map(|q| (q.clone(), count(q))).collect())
    }

    async fn held(&self) -> Result<HeldMessages, FindError> {
        self.ask("held")?;
        Ok(self.held.lock().unwrap().clone())
    }
}

/// Creates a manager for which a row is overdue after `after`.
fn manager(db: &Fixture, broker: &Arc<QueueBroker>, after: Duration) -> Manager {
    let mut settings = ccat_transfer::settings::load(None, []).unwrap();
    settings.manager.reconcile_after = after;
    Manager::new(
        db.repository.clone(),
        Arc::new(settings),
        me(),
        broker.clone(),
    )
    .reconciling(broker.clone())
}

const AT_ONCE: Duration = Duration::from_nanos(1);
const HOUR: Duration = Duration::from_secs(3600);

async fn pass(manager: &Manager) -> Pass {
    manager.run_pass(false).await.unwrap()
}

/// Transfers with a record, and the task ids in it.
async fn recorded(db: &Fixture) -> Vec<(TransferId, Option<String>)> {
    let records = db.repository.schedule_records().await.unwrap();
    records
        .into_iter()
        .map(|record| (record.data_transfer_id, record.task_id))
        .collect()
}

async fn a_record_begins_with_scheduled_and_ends_with_it(db: Fixture) {
    let ids = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    let before = db.database.now().await.unwrap();
    // One of three messages is confirmed.
    let publish = async |_| HashMap::from([(ids[1], "a".to_owned())]);
    let batch = db.repository.schedule(&ids.map(wanted), publish).await;
    assert_eq!(batch.unwrap().scheduled, [ids[1]]);
    let records = db.repository.schedule_records().await.unwrap();
    let record = records.iter().find(|r| r.data_transfer_id == ids[1]);
    let record = record.unwrap();
    assert!(record.scheduled_at >= before);
    assert_eq!(record.queue.as_deref(), Some("q"));
    assert_eq!(record.task_id.as_deref(), Some("a"));
    // A worker takes it.
    let lease = db.acquire(ids[1]).await.lease;
    assert!(recorded(&db).await.iter().all(|(id, _)| *id != ids[1]));
    db.repository.complete(&lease, &finished()).await.unwrap();
    // An operator gives up one of the transfers.
    db.repository
        .schedule(&[wanted(ids[0])], confirmed)
        .await
        .unwrap();
    let instruction = Instruction {
        action: Action::Fail,
        operator: "me@here".into(),
        reason: None,
        only: Vec::new(),
        untracked: false,
    };
    db.repository.execute(ids[0], &instruction).await.unwrap();
    assert!(recorded(&db).await.iter().all(|(id, _)| *id != ids[0]));
    // The other row is given up directly in the database.
    db.repository
        .schedule(&[wanted(ids[2])], confirmed)
        .await
        .unwrap();
    db.set_status(ids[2], "FAILED").await;
    assert_eq!(recorded(&db).await.len(), 1);
    pass(&manager(&db, &Arc::default(), HOUR)).await;
    assert_eq!(recorded(&db).await, []);
}

async fn a_lost_message_is_sent_again(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(db.transfer().await);
    }
    let broker = Arc::new(QueueBroker::default());
    assert_eq!(pass(&manager(&db, &broker, HOUR)).await.scheduled.len(), 4);
    broker.purge();
    // The row is not overdue yet.
    let early = pass(&manager(&db, &broker, HOUR)).await;
    assert_eq!((early.overdue, early.resent), (0, vec![]));
    // The row is sent again in the same pass.
    let done = pass(&manager(&db, &broker, AT_ONCE)).await;
    assert_eq!((done.overdue, &done.resent), (4, &ids));
    assert_eq!(done.scheduled.len(), 4);
    assert_eq!(broker.messages(), 4);
    for id in ids {
        assert_eq!(db.status(id).await, "SCHEDULED");
        let detail = db.repository.show(id).await.unwrap().unwrap();
        assert_eq!(detail.transfer.retry_count, 0);
        db.acquire(id).await;
    }
    assert_eq!(recorded(&db).await, []);
}

async fn rows_of_other_programs_are_found(db: Fixture) {
    // Made SCHEDULED by hand or by Python's manager: no record exists.
    let id = db.transfer().await;
    db.set_status(id, "SCHEDULED").await;
    let broker = Arc::new(QueueBroker::default());
    let manager = manager(&db, &broker, AT_ONCE);
    // The time of the row begins with the first scan that finds it.
    let first = pass(&manager).await;
    assert_eq!((first.overdue, first.resent), (0, vec![]));
    assert_eq!(recorded(&db).await, [(id, None)]);
    let second = pass(&manager).await;
    assert_eq!((second.overdue, second.resent), (1, vec![id]));
    assert_eq!(db.status(id).await, "SCHEDULED");
    assert_eq!(broker.messages(), 1);
}

async fn messages_that_exist_are_not_sent_again(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(db.transfer().await);
    }
    let broker = Arc::new(QueueBroker::default());
    let manager = manager(&db, &broker, AT_ONCE);
    pass(&manager).await;
    // The messages wait in the queue for longer than usual, and no worker is asked.
    broker.asked();
    let waiting = pass(&manager).await;
    assert_eq!((waiting.overdue, waiting.resent), (4, vec![]));
    assert_eq!(broker.asked(), ["ready"]);
    // Workers report two of the messages; one message is lost.
    broker
        .queues
        .lock()
        .unwrap()
        .insert(QUEUE.into(), vec![ids[1]]);
    *broker.held.lock().unwrap() = HeldMessages {
        transfers: HashSet::from([ids[0]]),
        task_ids: HashSet::from([format!("task-{}", ids[2])]),
        workers: 2,
    };
    let done = pass(&manager).await;
    assert_eq!(broker.asked(), ["ready", "held"]);
    // The oldest row whose message no worker holds is sent again. It has two messages then, and the row without a
    // message remains when the queue is empty.
    assert_eq!(done.resent, [ids[1]]);
    assert_eq!(pass(&manager).await.resent, [] as [TransferId; 0]);
    broker.purge();
    for id in [ids[0], ids[1], ids[2]] {
        db.acquire(id).await;
    }
    *broker.held.lock().unwrap() = HeldMessages::default();
    assert_eq!(pass(&manager).await.resent, [ids[3]]);
}

async fn several_managers_send_once(db: Fixture) {
    let mut ids = Vec::new();
    for _ in 0..6 {
        ids.push(db.transfer().await);
    }
    let broker = Arc::new(QueueBroker::default());
    pass(&manager(&db, &broker, HOUR)).await;
    broker.purge();
    let managers: Vec<_> = (0..4)
        .map(|_| {
            let manager = manager(&db, &broker, Duration::from_millis(50));
            tokio::spawn(async move { pass(&manager).await.resent })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(60)).await;
    let mut again = Vec::new();
    for manager in managers {
        again.extend(manager.await.unwrap());
    }
    again.extend(pass(&manager(&db, &broker, AT_ONCE)).await.resent);
    again.sort_unstable();
    assert_eq!(again, ids);
    assert_eq!(broker.messages(), 6);
}

async fn the_broker_is_not_queried_without_need(db: Fixture) {
    let broker = Arc::new(QueueBroker::default());
    let id = db.transfer().await;
    pass(&manager(&db, &broker, HOUR)).await;
    broker.purge();
    pass(&manager(&db, &broker, HOUR)).await;
    // With zero no row is checked.
    pass(&manager(&db, &broker, Duration::ZERO)).await;
    assert_eq!(broker.asked(), [] as [&str; 0]);
    assert_eq!(db.status(id).await, "SCHEDULED");
    // A row that a worker holds does not wait.
    db.acquire(id).await;
    let done = pass(&manager(&db, &broker, AT_ONCE)).await;
    assert_eq!((done.overdue, done.resent), (0, vec![]));
}

async fn an_unreachable_broker_changes_nothing(db: Fixture) {
    let id = db.transfer().await;
    let broker = Arc::new(QueueBroker::default());
    let manager = manager(&db, &broker, AT_ONCE);
    pass(&manager).await;
    broker.purge();
    *broker.is_mute.lock().unwrap() = true;
    let done = pass(&manager).await;
    assert_eq!((done.overdue, done.resent), (1, vec![]));
    assert_eq!(db.status(id).await, "SCHEDULED");
    *broker.is_mute.lock().unwrap() = false;
    assert_eq!(pass(&manager).await.resent, [id]);
}

async fn a_sent_again_transfer_waits_longer(db: Fixture) {
    let id = db.transfer().await;
    let broker = Arc::new(QueueBroker::default());
    pass(&manager(&db, &broker, HOUR)).await;
    let resent = async |minutes: i64| {
        broker.purge();
        let at = db.database.now().await.unwrap() - chrono::TimeDelta::minutes(minutes);
        db.sql(&format!(
            "UPDATE transfer_worker_schedule SET scheduled_at = '{}'",
            at.to_rfc3339()
        ))
        .await;
        pass(&manager(&db, &broker, HOUR)).await.resent.len()
    };
    assert_eq!(resent(59).await, 0);
    assert_eq!(resent(61).await, 1);
    assert_eq!(resent(61).await, 0);
    assert_eq!(resent(121).await, 1);
    assert_eq!(resent(181).await, 0);
    assert_eq!(resent(241).await, 1);
    // A worker has taken the row: the count starts again.
    let lease = db.acquire(id).await.lease;
    db.repository.release(&lease, "stop").await.unwrap();
    pass(&manager(&db, &broker, HOUR)).await;
    assert_eq!(resent(61).await, 1);
}

async fn a_withdrawn_message_takes_its_row_along(db: Fixture) {
    let id = db.transfer().await;
    let withdraw = async |task_id: &str, withdrawal: &Withdrawal| {
        let withdrawing = db.repository.withdraw(id, task_id, withdrawal);
        withdrawing.await.unwrap()
    };
    let failed = Withdrawal::Failed("revoked by an operator".into());
    // PENDING: the message is older than the latest one.
    assert!(!withdraw("t", &Withdrawal::Pending).await);
    db.repository
        .schedule(&[wanted(id)], confirmed)
        .await
        .unwrap();
    let mine = format!("task-{id}");
    assert!(!withdraw("another", &failed).await);
    assert_eq!(db.status(id).await, "SCHEDULED");
    assert!(withdraw(&mine, &Withdrawal::Pending).await);
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(recorded(&db).await, []);
    // Another program's message is unknown.
    db.set_status(id, "SCHEDULED").await;
    assert!(withdraw("another", &failed).await);
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(db.status(id).await, "FAILED");
    assert_eq!(
        detail.transfer.failure_error_message.as_deref(),
        Some("revoked by an operator")
    );
    assert!(detail.transfer.end_time.is_some());
    // A worker holds the row.
    let other = db.transfer().await;
    db.acquire(other).await;
    db.set_status(other, "SCHEDULED").await;
    let withdrawing = db.repository.withdraw(other, "t", &failed).await;
    assert!(!withdrawing.unwrap());
    assert!(
        !db.repository
            .withdraw(999.into(), "t", &failed)
            .await
            .unwrap()
    );
}

async fn a_database_without_records_works_as_before(db: Fixture) {
    let id = db.transfer().await;
    db.sql("DROP TABLE transfer_worker_schedule").await;
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    assert!(!repository.has_schedule());
    let db = Fixture { repository, ..db };
    let batch = db.repository.schedule(&[wanted(id)], confirmed).await;
    assert_eq!(batch.unwrap(), scheduled(&[id]));
    let broker = Arc::new(QueueBroker::default());
    let done = pass(&manager(&db, &broker, AT_ONCE)).await;
    assert_eq!((done.overdue, done.resent), (0, vec![]));
    assert_eq!(db.repository.schedule_records().await.unwrap(), []);
    let withdrawing = db.repository.withdraw(id, "t", &Withdrawal::Pending);
    assert!(withdrawing.await.unwrap());
    let taken = db.repository.acquire(id, &me(), "t", TTL).await.unwrap();
    let ccat_transfer::transfer::repository::Acquisition::Acquired(acquired) = taken else {
        panic!("{taken:?}");
    };
    db.repository
        .complete(&acquired.lease, &finished())
        .await
        .unwrap();
}
