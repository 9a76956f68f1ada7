//! Connections: pools, second processes, busy files, unreachable servers, the clock.

use std::process::Command;
use std::time::Duration;

use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::database::{Database, DatabaseError};
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::Snapshot;
use ccat_transfer::transfer::repository::{Acquisition, Repository};
use sea_orm::ConnectionTrait as _;

use crate::ops_db::{Fixture, TTL, TestDatabase, me};
use crate::transfer_rows::{confirmed, finished, pending, scheduled, wanted};

crate::on_both_databases!(the_clock_is_the_databases,);

async fn the_clock_is_the_databases(db: Fixture) {
    let first = db.database.now().await.unwrap();
    let second = db.database.now().await.unwrap();
    assert!(second >= first);
    assert!((chrono::Utc::now() - second).abs() < chrono::TimeDelta::minutes(5));
    // Within a transaction the clock continues.
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

/// Acquires, renews and completes transfers and sweeps, like a busy worker.
async fn run_transfers(repository: &Repository, ids: &[TransferId]) {
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

/// Second process of the next test; does nothing when it is run directly.
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
    run_transfers(&repository, &ids).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_and_processes_write_to_one_sqlite_file_at_once() {
    let db = Fixture::sqlite().await;
    let mut ids = Vec::new();
    for _ in 0..40 {
        ids.push(db.transfer().await);
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "connections::second_process", "--nocapture"])
        .env(SQLITE_OF_PARENT, &db.test.settings.database_sqlite_database)
        .spawn()
        .unwrap();
    let mut workers = Vec::new();
    for _ in 0..4 {
        let repository = Repository::open(db.test.connect().await, EnumLabels::Names)
            .await
            .unwrap();
        let ids = ids.clone();
        workers.push(tokio::spawn(async move {
            run_transfers(&repository, &ids).await
        }));
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
async fn busy_sqlite_file_counts_as_unreachable() {
    let mut test = TestDatabase::sqlite();
    test.settings.acquire_timeout = Duration::from_millis(200);
    let writer = test.connect().await;
    let other = test.connect().await;
    writer
        .connection()
        .execute_unprepared("CREATE TABLE t (x INTEGER)")
        .await
        .unwrap();
    // One connection holds the write lock for longer than the other one waits.
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
async fn missing_sqlite_file_is_created_on_request_only() {
    let test = TestDatabase::sqlite();
    let missing = Database::connect(&test.settings).await.unwrap_err();
    assert!(matches!(missing, DatabaseError::Missing(_)));
    assert!(!test.settings.database_sqlite_database.exists());
    Database::connect_or_create(&test.settings).await.unwrap();
    Database::connect(&test.settings).await.unwrap();
}

#[tokio::test]
async fn absent_server_is_unreachable_without_showing_secrets() {
    let mut test = TestDatabase::sqlite();
    test.settings.database_type = ccat_transfer::settings::DatabaseType::Postgresql;
    test.settings.database_postgresql_host = "127.0.0.1".to_owned();
    // Port 1 is closed.
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
async fn waiting_for_a_postgres_row_lock_is_bounded() {
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
