//! Migrations, the schema check, and an ops-db made by SQLAlchemy.
//!
//! `TEST_POSTGRES_URL` names a server, `TEST_PYTHON` a Python with SQLAlchemy and psycopg2.

use std::path::PathBuf;
use std::process::Command;

use crate::ops_db::{Fixture, TOPOLOGY, TTL, TestDatabase, me, service};
use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::database::Database;
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::repository::{
    Acquisition, Candidate, CompletedCopy, Failure, Listing, OpenTransfer, Repository,
};
use ccat_transfer::transfer::schema::{self, Difference, SchemaError};
use ccat_transfer::transfer::topology::{self, TopologyError};
use entity::{DatabaseEnum, Label, LocationType, PackageState, RouteType, Status, StorageType};
use migration::MigrationError;
use proptest::prelude::*;
use rstest::rstest;
use sea_orm::ConnectionTrait;

crate::on_both_databases!(
    migrations_go_up_and_down_and_up,
    an_older_database_is_migrated,
    a_foreign_ops_db_is_left_alone,
    alembics_ops_db_is_left_alone,
    every_difference_is_reported_at_once,
    further_columns_are_no_difference,
);

async fn exec(database: &Database, sql: &str) {
    database.connection().execute_unprepared(sql).await.unwrap();
}

async fn differences(database: &Database) -> Vec<Difference> {
    match schema::check(database, EnumLabels::Names)
        .await
        .unwrap_err()
    {
        SchemaError::Differs(differences) => differences,
        other => panic!("{other:?}"),
    }
}

/// Ids of the pending transfers.
async fn pending(repository: &Repository) -> Vec<TransferId> {
    let mut ids = Vec::new();
    let see = |transfer: OpenTransfer| {
        if transfer.status == Status::Pending {
            ids.push(transfer.id);
        }
    };
    repository.scan(None, None, see).await.unwrap();
    ids
}

/// Schedules a transfer. Returns its id if it was pending, else nothing.
async fn scheduled(repository: &Repository, id: TransferId) -> Vec<TransferId> {
    let candidate = Candidate {
        id,
        queue: "q".into(),
        allowance: None,
    };
    let publish = async |ids: Vec<TransferId>| {
        let sent = ids.into_iter().map(|id| (id, format!("task-{id}")));
        sent.collect()
    };
    let scheduling = repository.schedule(std::slice::from_ref(&candidate), publish);
    scheduling.await.unwrap().scheduled
}

async fn migrations_go_up_and_down_and_up(db: Fixture) {
    let connection = db.database.connection();
    // A repetition changes nothing.
    migration::create_ops_db(connection).await.unwrap();
    migration::create_worker_tables(connection).await.unwrap();
    migration::drop_worker_tables(connection).await.unwrap();
    let missing: Vec<_> = differences(&db.database).await;
    // The tables of links, of SCHEDULED rows, of digests and of programs may be missing.
    assert_eq!(missing.len(), entity::WORKER_TABLES.len() - 4);
    migration::drop_ops_db(connection).await.unwrap();
    assert_eq!(differences(&db.database).await.len(), 11);
    // Dropping tables that do not exist succeeds.
    migration::drop_ops_db(connection).await.unwrap();
    migration::drop_worker_tables(connection).await.unwrap();
    migration::create_ops_db(connection).await.unwrap();
    migration::create_worker_tables(connection).await.unwrap();
    schema::check(&db.database, EnumLabels::Names)
        .await
        .unwrap();
}

async fn an_older_database_is_migrated(db: Fixture) {
    let id = db.transfer().await;
    db.acquire(id).await;
    // The schema of the first release.
    let sql = [
        "DROP TABLE transfer_worker_action",
        "DROP INDEX transfer_worker_attempt_error_code",
        "DROP INDEX transfer_worker_attempt_ended_at",
        "ALTER TABLE transfer_worker_lease DROP COLUMN phase",
        "ALTER TABLE transfer_worker_lease DROP COLUMN streams",
        "DROP TABLE transfer_worker_delay",
        "DROP TABLE transfer_worker_link",
        "DROP TABLE transfer_worker_schedule",
        "DROP TABLE transfer_worker_digest",
        "DROP TABLE transfer_worker_program",
        "DROP INDEX transfer_worker_lease_destination",
        "ALTER TABLE transfer_worker_lease DROP COLUMN destination",
        "DELETE FROM transfer_worker_migration WHERE version > 'm202611'",
    ];
    exec(&db.database, &sql.join(";")).await;
    let missing = differences(&db.database).await;
    assert_eq!(missing.len(), 5, "{missing:?}");
    migration::create_worker_tables(db.database.connection())
        .await
        .unwrap();
    schema::check(&db.database, EnumLabels::Names)
        .await
        .unwrap();
    assert_eq!(db.leases().await, "1", "what was there is kept");
}

async fn a_foreign_ops_db_is_left_alone(db: Fixture) {
    let connection = db.database.connection();
    migration::drop_worker_tables(connection).await.unwrap();
    migration::drop_ops_db(connection).await.unwrap();
    exec(&db.database, "CREATE TABLE site (id integer)").await;
    for refused in [
        migration::create_ops_db(connection).await,
        migration::drop_ops_db(connection).await,
    ] {
        match refused.unwrap_err() {
            MigrationError::TablesExist(tables) => assert_eq!(tables, ["site"]),
            other => panic!("{other:?}"),
        }
    }
    assert!(migration::table_exists(connection, "site").await.unwrap());
    assert!(
        !migration::table_exists(connection, "data_transfer")
            .await
            .unwrap()
    );
    migration::create_worker_tables(connection).await.unwrap();
}

async fn alembics_ops_db_is_left_alone(db: Fixture) {
    let connection = db.database.connection();
    exec(
        &db.database,
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
    )
    .await;
    for refused in [
        migration::create_ops_db(connection).await,
        migration::drop_ops_db(connection).await,
    ] {
        assert!(matches!(refused, Err(MigrationError::OwnedByAlembic)));
    }
    assert!(
        migration::table_exists(connection, "data_transfer")
            .await
            .unwrap()
    );
    // Our own tables are dropped and created by commands.
    migration::drop_worker_tables(connection).await.unwrap();
    migration::create_worker_tables(connection).await.unwrap();
}

async fn every_difference_is_reported_at_once(db: Fixture) {
    // On one connection: other connections of SQLite would use their cached schema.
    let sql = [
        "DROP TABLE transfer_worker_attempt",
        "DROP TABLE disk_data_location",
        "ALTER TABLE data_transfer RENAME COLUMN failure_error_message TO error",
        "ALTER TABLE data_transfer RENAME COLUMN retry_count TO retries",
        "ALTER TABLE data_transfer ADD COLUMN retry_count text",
        "DROP TABLE data_transfer_log",
        "CREATE TABLE data_transfer_log (id integer PRIMARY KEY, data_transfer_id integer, \
         timestamp timestamp, log_path text, operator text NOT NULL)",
    ];
    exec(&db.database, &sql.join(";")).await;
    let error = schema::check(&db.database, EnumLabels::Names)
        .await
        .unwrap_err();
    let text = error.to_string();
    for line in [
        "table disk_data_location is missing",
        "column data_transfer.failure_error_message is missing",
        "column data_transfer.retry_count has the type `",
        ", and an integer is needed",
        "column data_transfer_log.operator requires a value",
        "table transfer_worker_attempt is missing",
    ] {
        assert!(text.contains(line), "`{line}` is not in:\n{text}");
    }
}

async fn further_columns_are_no_difference(db: Fixture) {
    for sql in [
        "ALTER TABLE data_transfer ADD COLUMN speed double precision",
        "ALTER TABLE data_transfer_log ADD COLUMN note text",
        "ALTER TABLE data_transfer_log ADD COLUMN kind text NOT NULL DEFAULT 'x'",
        "ALTER TABLE data_location DROP COLUMN active",
        "ALTER TABLE data_transfer DROP COLUMN unpack_status",
        "ALTER TABLE data_transfer_package DROP COLUMN created_at",
        "ALTER TABLE data_transfer_log DROP COLUMN status",
    ] {
        exec(&db.database, sql).await;
    }
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    let Fixture { database, test, .. } = db;
    let db = Fixture {
        repository,
        database,
        test,
    };
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let finished = CompletedCopy {
        log_path: Some("/log".into()),
        ..CompletedCopy::default()
    };
    db.repository.complete(&lease, &finished).await.unwrap();
    assert!(
        db.repository
            .transfer(id)
            .await
            .unwrap()
            .unwrap()
            .origin
            .unwrap()
            .active
    );
}

/// The error names every table and no command; `advice` adds the commands of this program.
#[tokio::test]
async fn an_empty_database_lacks_every_table() {
    let test = TestDatabase::sqlite();
    let database = test.connect().await;
    let text = schema::check(&database, EnumLabels::Names)
        .await
        .unwrap_err()
        .to_string();
    for table in entity::OPS_DB_TABLES {
        assert!(
            text.contains(&format!("table {table} is missing")),
            "{text}"
        );
    }
    assert!(!text.contains("ccat-transfer"), "{text}");
}

#[tokio::test]
async fn a_native_type_must_have_every_status() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    exec(
        &db.database,
        "ALTER TYPE status RENAME VALUE 'SCHEDULED' TO 'QUEUED'",
    )
    .await;
    let found = differences(&db.database).await;
    assert_eq!(found.len(), 1);
    let text = found[0].to_string();
    assert!(
        text.contains("no label for SCHEDULED, only PENDING, QUEUED"),
        "{text}"
    );
}

#[tokio::test]
async fn a_key_without_a_default_is_a_difference() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    let sql = "ALTER TABLE data_transfer_log ALTER id DROP IDENTITY";
    exec(&db.database, sql).await;
    let found = differences(&db.database).await;
    let expected = Difference::Unwritten {
        table: "data_transfer_log".to_owned(),
        column: "id".to_owned(),
    };
    assert_eq!(found, [expected]);
}

#[tokio::test]
async fn types_may_be_quoted_domains_and_in_another_schema() {
    let Some(db) = Fixture::postgres().await else {
        return;
    };
    for sql in [
        "CREATE SCHEMA types",
        "ALTER TYPE status SET SCHEMA types",
        "ALTER TYPE types.status RENAME TO \"The Status\"",
        "CREATE DOMAIN routes AS routetype",
        "ALTER TABLE data_transfer_route ALTER route_type TYPE routes",
        "ALTER TABLE data_transfer ALTER retry_count TYPE numeric",
    ] {
        exec(&db.database, sql).await;
    }
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    topology::seed(
        &repository,
        &TOPOLOGY.replace("bbcp", "scp").parse().unwrap(),
    )
    .await
    .unwrap();
    let Fixture { database, test, .. } = db;
    let db = Fixture {
        repository,
        database,
        test,
    };
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    db.repository
        .reset_for_retry(&lease, &Failure::default())
        .await
        .unwrap();
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(1));
}

#[tokio::test]
async fn text_columns_are_written_as_their_rows_are() {
    let db = Fixture::sqlite().await;
    let id = db.transfer().await;
    db.set_status(id, "pending").await;
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    assert_eq!(scheduled(&repository, id).await, [id]);
    assert_eq!(db.status(id).await, "scheduled");
    // A row in the other spelling is found too.
    let other = db.transfer().await;
    assert_eq!(db.status(other).await, "PENDING");
    assert_eq!(pending(&repository).await, [other]);
}

#[tokio::test]
async fn text_columns_without_rows_are_written_as_set() {
    let test = TestDatabase::sqlite();
    let database = test.connect().await;
    migration::create_ops_db(database.connection())
        .await
        .unwrap();
    migration::create_worker_tables(database.connection())
        .await
        .unwrap();
    let repository = Repository::open(database.clone(), EnumLabels::Values)
        .await
        .unwrap();
    topology::seed(&repository, &TOPOLOGY.parse().unwrap())
        .await
        .unwrap();
    let db = Fixture {
        repository,
        database,
        test,
    };
    let id = db.transfer().await;
    assert_eq!(db.status(id).await, "pending");
    // From then on the spelling in the rows decides, not the setting.
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    let Fixture { database, test, .. } = db;
    let db = Fixture {
        repository,
        database,
        test,
    };
    let lease = db.acquire(id).await.lease;
    let finished = CompletedCopy {
        log_path: Some("/log".into()),
        ..CompletedCopy::default()
    };
    db.repository.complete(&lease, &finished).await.unwrap();
    assert_eq!(
        db.text("SELECT status FROM data_transfer_log")
            .await
            .unwrap(),
        "completed"
    );
}

/// Runs `tests/python/ops_db_models.py`. Without a Python it prints a line and returns `None`.
fn python(arguments: &[&str]) -> Option<String> {
    let python = service("TEST_PYTHON")?;
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/python/ops_db_models.py");
    let output = Command::new(python)
        .arg("-B")
        .arg(script)
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    Some(String::from_utf8(output.stdout).unwrap())
}

/// A transfer from beginning to end in tables made by SQLAlchemy, with the result read by SQLAlchemy.
#[rstest]
#[case::sqlite_names(false, "names")]
#[case::sqlite_values(false, "values")]
#[case::sqlite_text(false, "text")]
#[case::postgres_names(true, "names")]
#[case::postgres_values(true, "values")]
#[case::postgres_text(true, "text")]
#[tokio::test(flavor = "multi_thread")]
async fn sqlalchemys_ops_db(#[case] postgres: bool, #[case] labels: &str) {
    let test = if postgres {
        TestDatabase::postgres().await
    } else {
        Some(TestDatabase::sqlite())
    };
    let Some(test) = test else { return };
    let url = test.python_url();
    if python(&["create", &url, labels]).is_none() {
        return;
    }
    let shown = || -> serde_json::Value {
        serde_json::from_str(&python(&["show", &url, labels]).unwrap()).unwrap()
    };
    let database = Database::connect(&test.settings).await.unwrap();
    assert_eq!(
        differences(&database).await.len(),
        entity::WORKER_TABLES.len() - 4
    );
    let refused = migration::create_ops_db(database.connection()).await;
    assert!(matches!(refused, Err(MigrationError::OwnedByAlembic)));
    migration::create_worker_tables(database.connection())
        .await
        .unwrap();
    let repository = Repository::open(database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    let refused = topology::seed(&repository, &TOPOLOGY.parse().unwrap()).await;
    assert!(matches!(refused, Err(TopologyError::OwnedByAlembic)));

    let pending = pending(&repository).await;
    assert_eq!(pending.len(), 1);
    let id = pending[0];
    let transfer = repository.transfer(id).await.unwrap().unwrap();
    assert_eq!(transfer.origin.unwrap().disk.unwrap().path, "/data");
    assert_eq!(transfer.package.unwrap().size_bytes, Some(50_000_000_000));
    assert_eq!(transfer.route.unwrap().method.as_deref(), Some("bbcp"));
    assert_eq!(
        repository.locations_of_site("cologne").await.unwrap(),
        ["buffer", "tapes"]
    );

    assert_eq!(scheduled(&repository, id).await, [id]);
    assert_eq!(shown()["status"], "SCHEDULED");

    let lease = acquire(&repository, id).await;
    let failure = Failure {
        message: "a message that is longer than its column".to_owned(),
        log_path: Some("/log/1".into()),
        ..Failure::default()
    };
    repository.reset_for_retry(&lease, &failure).await.unwrap();
    let row = shown();
    assert_eq!(
        (&row["status"], &row["retry_count"]),
        (&"PENDING".into(), &1.into())
    );
    let message = row["failure_error_message"].as_str().unwrap();
    assert!(message.starts_with("a message that is l"), "{message}");

    let lease = acquire(&repository, id).await;
    assert_eq!(shown()["status"], "IN_PROGRESS");
    python(&["reset", &url, labels]);
    assert!(repository.release(&lease, "stop").await.is_err());

    let lease = acquire(&repository, id).await;
    let finished = CompletedCopy {
        log_path: Some("/log/3".into()),
        ..CompletedCopy::default()
    };
    repository.complete(&lease, &finished).await.unwrap();
    let expected = serde_json::json!({
        "status": "COMPLETED",
        "unpack_status": "PENDING",
        "retry_count": 1,
        "failure_error_message": null,
        "has_start_time": true,
        "has_end_time": true,
        "end_is_not_in_the_future": true,
        "logs": [["PENDING", "/log/1"], ["COMPLETED", "/log/3"]],
    });
    assert_eq!(shown(), expected);
    let listed = repository.list(&Listing::default()).await.unwrap();
    assert!(listed[0].status.means(Status::Completed));
}

async fn acquire(repository: &Repository, id: TransferId) -> ccat_transfer::transfer::lease::Lease {
    match repository.acquire(id, &me(), "task", TTL).await.unwrap() {
        Acquisition::Acquired(acquired) => acquired.lease,
        other => panic!("{other:?}"),
    }
}

fn in_any_case(label: &str) -> impl Strategy<Value = String> + use<> {
    let label = label.to_owned();
    proptest::collection::vec(any::<bool>(), label.len()).prop_map(move |upper| {
        let cased = label.chars().zip(upper).map(|(letter, upper)| {
            if upper {
                letter.to_ascii_uppercase()
            } else {
                letter.to_ascii_lowercase()
            }
        });
        cased.collect()
    })
}

fn members_are_read<E: DatabaseEnum>() {
    for &member in E::ALL {
        assert_eq!(E::from_label(member.name()), Some(member));
        assert_eq!(E::from_label(&member.value()), Some(member));
    }
}

#[test]
fn every_member_is_read_from_its_name_and_value() {
    members_are_read::<Status>();
    members_are_read::<LocationType>();
    members_are_read::<StorageType>();
    members_are_read::<RouteType>();
    members_are_read::<PackageState>();
}

proptest! {
    #[test]
    fn labels_are_read_in_any_case(
        (member, label) in proptest::sample::select(Status::ALL)
            .prop_flat_map(|member| (Just(member), in_any_case(member.name())))
    ) {
        prop_assert_eq!(Label::parse(&label), Label::Known(member));
    }

    #[test]
    fn any_text_is_a_label_and_none_is_lost(text in ".*") {
        match Label::<Status>::parse(&text) {
            Label::Known(member) => prop_assert!(text.trim().eq_ignore_ascii_case(member.name())),
            Label::Unknown(kept) => prop_assert_eq!(kept, text),
        }
    }

    #[test]
    fn any_text_is_read_as_a_time_without_panic(text in ".*") {
        let _ = text.parse::<entity::Timestamp>();
    }

    #[test]
    fn times_are_read_as_they_were_written(micros in 0i64..4_000_000_000_000_000) {
        let time = entity::Timestamp(chrono::DateTime::from_timestamp_micros(micros).unwrap());
        for format in ["%Y-%m-%d %H:%M:%S%.6f", "%Y-%m-%d %H:%M:%S%.f+00", "%Y-%m-%dT%H:%M:%S%.fZ"] {
            prop_assert_eq!(time.0.format(format).to_string().parse::<entity::Timestamp>().unwrap(), time);
        }
    }
}

#[test]
fn offsets_are_honoured() {
    let utc: entity::Timestamp = "2026-11-24 06:03:00.5".parse().unwrap();
    for text in ["2026-11-24 07:03:00.5+01", "2026-11-24T03:03:00.500-03:00"] {
        assert_eq!(text.parse::<entity::Timestamp>().unwrap(), utc);
    }
}
