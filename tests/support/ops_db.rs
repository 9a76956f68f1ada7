//! A new ops-db for one test: a SQLite file, or a database in the server that `TEST_POSTGRES_URL` names.

#![allow(dead_code, reason = "each test binary uses a part of it")]

#[path = "../../crates/celery-worker/tests/support/service.rs"]
mod services;

use std::time::Duration;

use ccat_transfer::settings::{DatabaseType, EnumLabels, OpsDb, SslMode};
use ccat_transfer::transfer::database::Database;
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::Owner;
use ccat_transfer::transfer::repository::{Acquired, Acquisition, Repository};
use ccat_transfer::transfer::topology::{self, NewTransfer, Topology};
use sea_orm::sqlx::postgres::PgConnectOptions;
use sea_orm::sqlx::{AssertSqlSafe, ConnectOptions, Executor, PgConnection};
use sea_orm::{ConnectionTrait, Statement};
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

pub use services::service;

/// Long enough never to pass in a test.
pub const TTL: Duration = Duration::from_secs(3600);

pub const TOPOLOGY: &str = r#"
[[sites]]
name = "CCAT observatory"
short_name = "ccat"
location = "Cerro Chajnantor"
[[sites.locations]]
name = "telescope_computer"
type = "source"
storage = "disk"
host = "telescope.ccat.cl"
path = "/data/fyst"
priority = 1
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
path = "/data/buffer"

[[sites]]
name = "University of Cologne"
short_name = "cologne"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = "archive.uni-koeln.de"
path = "/buffer"
[[sites.locations]]
name = "tapes"
type = "long_term_archive"
storage = "tape"

[[routes]]
origin = "ccat"
destination = "cologne"
method = "bbcp"
type = "direct"
"#;

/// A database that is removed with this value.
pub struct TestDatabase {
    pub settings: OpsDb,
    _directory: Option<TempDir>,
    server: Option<Url>,
}

impl TestDatabase {
    /// A path in a new directory; the file does not exist yet.
    pub fn sqlite() -> Self {
        let directory = TempDir::new().unwrap();
        let mut settings = settings();
        settings.database_sqlite_database = directory.path().join("ops_db.sqlite");
        Self {
            settings,
            _directory: Some(directory),
            server: None,
        }
    }

    /// An empty database; without a server it prints a line and returns `None`.
    pub async fn postgres() -> Option<Self> {
        let url = service("TEST_POSTGRES_URL")?;
        let url = Url::parse(&url).unwrap();
        let name = format!("test_{}", Uuid::new_v4().simple());
        execute(&url, &format!("CREATE DATABASE {name}")).await;
        let settings = OpsDb {
            database_type: DatabaseType::Postgresql,
            database_postgresql_database: name,
            database_postgresql_user: url.username().to_owned(),
            database_postgresql_password: url.password().unwrap_or_default().into(),
            database_postgresql_host: url.host_str().unwrap().to_owned(),
            database_postgresql_port: url.port().unwrap_or(5432),
            ..settings()
        };
        Some(Self {
            settings,
            _directory: None,
            server: Some(url),
        })
    }

    /// URL in SQLAlchemy's form.
    pub fn python_url(&self) -> String {
        match &self.server {
            None => format!(
                "sqlite:///{}",
                self.settings.database_sqlite_database.display()
            ),
            Some(server) => {
                let mut url = server.clone();
                url.set_path(&self.settings.database_postgresql_database);
                url.to_string()
                    .replacen("postgres://", "postgresql+psycopg2://", 1)
            }
        }
    }

    /// Opens a new pool.
    pub async fn connect(&self) -> Database {
        Database::connect_or_create(&self.settings).await.unwrap()
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let sql = format!(
            "DROP DATABASE {} (FORCE)",
            self.settings.database_postgresql_database
        );
        // A runtime of its own, since the runtime of the test executes this drop.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(execute(&server, &sql));
        });
        let _ = dropping.join();
    }
}

async fn execute(server: &Url, sql: &str) {
    let options: PgConnectOptions = server.as_str().parse().unwrap();
    let mut connection: PgConnection = options.connect().await.unwrap();
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
}

fn settings() -> OpsDb {
    OpsDb {
        database_type: DatabaseType::Sqlite,
        database_sqlite_database: "unused".into(),
        database_postgresql_database: String::new(),
        database_postgresql_user: String::new(),
        database_postgresql_password: String::new().into(),
        database_postgresql_password_file: String::new(),
        database_postgresql_sslmode: SslMode::Environment,
        database_postgresql_sslrootcert: String::new(),
        database_postgresql_sslcert: String::new(),
        database_postgresql_sslkey: String::new(),
        database_postgresql_host: String::new(),
        database_postgresql_port: 5432,
        max_connections: 8,
        acquire_timeout: Duration::from_secs(30),
        text_enum_labels: EnumLabels::Names,
    }
}

/// A database with all tables and a topology.
pub struct Fixture {
    pub repository: Repository,
    pub database: Database,
    // Last, so that it is removed last.
    pub test: TestDatabase,
}

impl Fixture {
    pub async fn sqlite() -> Self {
        Self::on(TestDatabase::sqlite()).await
    }

    pub async fn postgres() -> Option<Self> {
        match TestDatabase::postgres().await {
            Some(test) => Some(Self::on(test).await),
            None => None,
        }
    }

    async fn on(test: TestDatabase) -> Self {
        let database = test.connect().await;
        migration::create_ops_db(database.connection())
            .await
            .unwrap();
        migration::create_worker_tables(database.connection())
            .await
            .unwrap();
        let repository = Repository::open(database.clone(), EnumLabels::Names)
            .await
            .unwrap();
        topology::seed(&repository, &TOPOLOGY.parse::<Topology>().unwrap())
            .await
            .unwrap();
        Self {
            repository,
            database,
            test,
        }
    }

    /// Creates a PENDING transfer.
    pub async fn transfer(&self) -> TransferId {
        self.transfer_from("ccat/telescope_computer").await
    }

    /// Creates a PENDING transfer from a location, `site/location`.
    pub async fn transfer_from(&self, origin: &str) -> TransferId {
        let new = NewTransfer {
            relative_path: format!("2026/{}.tar", Uuid::new_v4().simple()),
            size_bytes: Some(50_000_000_000),
            checksum: None,
            origin: origin.parse().unwrap(),
            destination: "cologne/buffer".parse().unwrap(),
        };
        let created = topology::create_transfer(&self.repository, &new).await;
        created.unwrap().into()
    }

    /// Acquires a free transfer.
    pub async fn acquire(&self, id: TransferId) -> Acquired {
        self.acquire_as(id, &me()).await
    }

    pub async fn acquire_as(&self, id: TransferId, owner: &Owner) -> Acquired {
        match self
            .repository
            .acquire(id, owner, "task-1", TTL)
            .await
            .unwrap()
        {
            Acquisition::Acquired(acquired) => acquired,
            other => panic!("not acquired: {other:?}"),
        }
    }

    /// Executes a statement, as another program would.
    pub async fn sql(&self, sql: &str) -> u64 {
        self.database
            .connection()
            .execute_unprepared(sql)
            .await
            .unwrap()
            .rows_affected()
    }

    /// Returns one text of one row.
    pub async fn text(&self, sql: &str) -> Option<String> {
        let db = self.database.connection();
        let row = db
            .query_one_raw(Statement::from_string(db.get_database_backend(), sql))
            .await
            .unwrap();
        row.unwrap().try_get_by_index(0).unwrap()
    }

    pub async fn status(&self, id: TransferId) -> String {
        let sql = format!("SELECT CAST(status AS text) FROM data_transfer WHERE id = {id}");
        self.text(&sql).await.unwrap()
    }

    pub async fn set_status(&self, id: TransferId, status: &str) {
        self.sql(&format!(
            "UPDATE data_transfer SET status = '{status}' WHERE id = {id}"
        ))
        .await;
    }

    /// Makes the database refuse every change of a transfer's row.
    pub async fn refuse_updates_of(&self, id: TransferId) {
        let trigger = format!(
            "CREATE TRIGGER bad BEFORE UPDATE ON data_transfer FOR EACH ROW WHEN (NEW.id = {id})"
        );
        self.sql(&match self.database.backend() {
            sea_orm::DbBackend::Postgres => format!(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN RAISE EXCEPTION 'bad row'; END $$; {trigger} EXECUTE FUNCTION refuse()"
            ),
            _ => format!("{trigger} BEGIN SELECT RAISE(ABORT, 'bad row'); END"),
        })
        .await;
    }

    /// Makes a lease expire.
    pub async fn expire(&self, id: TransferId) {
        let sql = format!(
            "UPDATE transfer_worker_lease SET expires_at = '2001-01-01T00:00:00+00:00' \
             WHERE data_transfer_id = {id}"
        );
        assert_eq!(self.sql(&sql).await, 1);
    }

    /// Returns all rows about a transfer, to check that nothing was changed.
    pub async fn everything(&self, id: TransferId) -> String {
        let detail = self.repository.show(id).await.unwrap();
        let logs = self
            .text(&format!(
                "SELECT CAST(count(*) AS text) FROM data_transfer_log WHERE data_transfer_id = {id}"
            ))
            .await;
        format!("{detail:?} {logs:?}")
    }

    pub async fn leases(&self) -> String {
        self.text("SELECT CAST(count(*) AS text) FROM transfer_worker_lease")
            .await
            .unwrap()
    }
}

/// Owner of leases in this process.
pub fn me() -> Owner {
    Owner::current("celery@here")
}

/// Owner in a dead process of this host.
pub fn dead() -> Owner {
    Owner {
        node: "celery@dead".to_owned(),
        started: "1".to_owned(),
        ..me()
    }
}

/// Owner in a process of another host.
pub fn stranger() -> Owner {
    Owner {
        node: "celery@far".to_owned(),
        host: "far.away".to_owned(),
        ..dead()
    }
}

/// Runs each of the named functions on both databases.
#[macro_export]
macro_rules! on_both_databases {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$name($crate::ops_db::Fixture::sqlite().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn postgres() {
                if let Some(fixture) = $crate::ops_db::Fixture::postgres().await {
                    super::$name(fixture).await;
                }
            }
        })+
    };
}
