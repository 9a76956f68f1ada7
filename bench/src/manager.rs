//! Duration of passes of the manager, beside bare SQL and bare confirmed publishes.
//!
//! All created objects are removed again. Prints one JSON object a line: `name`, `side`, `rows`, `seconds`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ccat_transfer::manager::Manager;
use ccat_transfer::settings::{self, DatabaseType, Settings};
use ccat_transfer::tasks::{self, Producer};
use ccat_transfer::transfer::database::Database;
use ccat_transfer::transfer::lease::Owner;
use ccat_transfer::transfer::link::LinkName;
use ccat_transfer::transfer::repository::{LinkChange, Repository};
use ccat_transfer::transfer::topology;
use celery_worker::broker::amqp::Amqp;
use celery_worker::broker::{Broker, NoPropagation};
use celery_worker::celery_crate::app::{self, Producing};
use clap::{Args, ValueEnum};
use futures_util::future::try_join_all;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueDeleteOptions,
    QueuePurgeOptions,
};
use lapin::{Channel, Connection};
use sea_orm::{ConnectionTrait, TransactionTrait};
use serde_json::json;
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

use crate::{Outcome, broker};

const LINKS: usize = 10;

/// Rows in one transaction of the bare side; the same as the manager's maximum.
const BATCH: usize = 200;

/// Number of passes for a median.
const PASSES: usize = 15;

#[derive(Debug, Args)]
pub(crate) struct ManagerArgs {
    /// `sqlite`, or the URL of a PostgreSQL server in which databases can be made.
    database: String,
    scenario: Scenario,
    rows: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scenario {
    /// As many PENDING rows as the links have room for. Side `manager`: one pass; side `bare`: the same updates and
    /// messages, only with SQL and lapin.
    Schedule,
    /// One pass over PENDING rows, 1000 of them within the limits of ten links.
    Backlog,
    /// Passes beside COMPLETED rows, with 100 new rows and with none: the median of several.
    Steady,
}

/// Creates a database and a queue, measures a scenario and removes both.
///
/// # Errors
/// Errors of the database or the broker, and an unexpected number of scheduled rows.
pub(crate) async fn run(broker: &str, arguments: &ManagerArgs) -> Outcome {
    let bench = Bench::new(&arguments.database, broker).await?;
    let rows = arguments.rows;
    let measured = match arguments.scenario {
        Scenario::Schedule => bench.schedule(rows).await,
        Scenario::Backlog => bench.backlog(rows).await,
        Scenario::Steady => bench.steady(rows).await,
    };
    bench.remove().await?;
    measured
}

/// A database, a queue, and a manager that works on both.
struct Bench {
    database: Database,
    repository: Repository,
    manager: Manager,
    transport: Arc<Amqp>,
    broker: Connection,
    channel: Channel,
    queue: String,
    origin: String,
    kind: &'static str,
    server: Option<(Settings, String)>,
    _directory: TempDir,
}

impl Bench {
    async fn new(database: &str, broker: &str) -> Outcome<Self> {
        let tag = Uuid::new_v4().simple().to_string();
        let origin = format!("bench{}", &tag[..8]);
        let directory = TempDir::new()?;
        let mut settings = settings::load(None, [])?;
        settings.celery.broker_url = broker.into();
        let mut server = None;
        let kind = if database == "sqlite" {
            settings.ops_db.database_sqlite_database = directory.path().join("ops.sqlite");
            "sqlite"
        } else {
            let url = Url::parse(database)?;
            settings.ops_db.database_type = DatabaseType::Postgresql;
            settings.ops_db.database_postgresql_host = url.host_str().unwrap_or("").into();
            settings.ops_db.database_postgresql_port = url.port().unwrap_or(5432);
            settings.ops_db.database_postgresql_user = url.username().into();
            settings.ops_db.database_postgresql_password = url.password().unwrap_or("").into();
            settings.ops_db.database_postgresql_database = url.path().trim_matches('/').into();
            let name = format!("bench_{tag}");
            let there = Database::connect(&settings.ops_db).await?;
            let create = format!("CREATE DATABASE {name}");
            there.connection().execute_unprepared(&create).await?;
            server = Some((settings.clone(), name.clone()));
            settings.ops_db.database_postgresql_database = name;
            "postgresql"
        };
        let database = Database::connect_or_create(&settings.ops_db).await?;
        migration::create_ops_db(database.connection()).await?;
        migration::create_worker_tables(database.connection()).await?;
        let repository =
            Repository::open(database.clone(), settings.ops_db.text_enum_labels).await?;
        topology::seed(&repository, &sites(&origin).parse()?).await?;
        let package = "INSERT INTO data_transfer_package (file_name, relative_path, size, status) \
                       VALUES ('p.tar', 'p.tar', 1, 'WAITING')";
        database.connection().execute_unprepared(package).await?;

        let transport = Arc::new(Amqp::new(&settings.celery.amqp_options("bench"))?);
        let producing = Producing {
            hostname: "bench".into(),
            default_queue: settings.celery.task_default_queue.clone(),
            names: tasks::wire_names(&settings.celery),
            queues: settings.celery.task_queue_declarations(),
            reply_to: None,
            within: Duration::from_secs(5),
            propagation: Arc::new(NoPropagation),
        };
        let app = app::build(transport.clone(), producing).await?;
        let producer = Producer::new(Arc::new(app), &settings.celery);
        let manager = Manager::new(
            repository.clone(),
            Arc::new(settings),
            Owner::current("bench"),
            Arc::new(producer),
        );
        let broker = broker::connect(broker).await?;
        let channel = broker::confirming(&broker).await?;
        Ok(Self {
            database,
            repository,
            manager,
            transport,
            broker,
            channel,
            queue: format!("{origin}_buffer_data_transfer"),
            origin,
            kind,
            server,
            _directory: directory,
        })
    }

    /// Inserts rows, distributed over the links.
    async fn insert(&self, rows: usize, status: &str) -> Outcome {
        let sql = format!(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {rows}) \
             INSERT INTO data_transfer (data_transfer_package_id, origin_location_id, \
             destination_location_id, status, unpack_status, retry_count) \
             SELECT 1, 1, 2 + i % {LINKS}, '{status}', 'PENDING', 0 FROM n"
        );
        self.sql(&sql).await
    }

    async fn sql(&self, sql: &str) -> Outcome {
        self.database.connection().execute_unprepared(sql).await?;
        Ok(())
    }

    /// Updates the statistics of the tables, so that they are as in a database in use.
    async fn analyze(&self) -> Outcome {
        self.sql("ANALYZE").await
    }

    async fn limit(&self, max_active: usize) -> Outcome {
        let change = LinkChange {
            max_active: Some(Some(u32::try_from(max_active)?)),
            ..LinkChange::default()
        };
        for n in 0..LINKS {
            let name = LinkName {
                origin: self.origin.clone(),
                destination: format!("{}to{n}", self.origin),
            };
            self.repository.set_link(&name, &change).await?;
        }
        Ok(())
    }

    async fn pass(&self, expected: usize) -> Outcome<f64> {
        let began = Instant::now();
        let pass = self.manager.run_pass(false).await?;
        let seconds = began.elapsed().as_secs_f64();
        if pass.scheduled.len() != expected {
            let found = pass.scheduled.len();
            return Err(format!("{found} rows were scheduled, not {expected}").into());
        }
        Ok(seconds)
    }

    fn report(&self, name: &str, side: &str, rows: usize, seconds: f64) {
        let database = self.kind;
        let line = json!({
            "name": format!("manager/{name}/{database}"), "side": side, "rows": rows, "seconds": seconds,
        });
        println!("{line}");
    }

    async fn schedule(&self, rows: usize) -> Outcome {
        self.limit(rows.div_ceil(LINKS) + 1).await?;
        // The first message creates the connection and the queue, which exist already in a real manager.
        self.insert(1, "PENDING").await?;
        self.pass(1).await?;
        let pattern = self.take_message().await?;
        self.sql("UPDATE data_transfer SET status = 'COMPLETED'")
            .await?;
        self.insert(rows, "PENDING").await?;
        self.analyze().await?;
        let seconds = self.pass(rows).await?;
        self.report("schedule", "manager", rows, seconds);

        self.sql("DELETE FROM data_transfer").await?;
        self.purge().await?;
        self.insert(rows, "PENDING").await?;
        self.analyze().await?;
        let seconds = self.bare(rows, &pattern).await?;
        self.report("schedule", "bare", rows, seconds);
        Ok(())
    }

    /// Takes a message of the manager, so that the bare side sends the same.
    async fn take_message(&self) -> Outcome<lapin::message::Delivery> {
        let options = BasicGetOptions { no_ack: true };
        let message = self
            .channel
            .basic_get(self.queue.as_str().into(), options)
            .await?;
        Ok(message
            .ok_or("the manager's message is not in its queue")?
            .delivery)
    }

    /// Reads the pending rows and makes them SCHEDULED with their messages, in batches.
    async fn bare(&self, rows: usize, pattern: &lapin::message::Delivery) -> Outcome<f64> {
        let began = Instant::now();
        let db = self.database.connection();
        let sql =
            "SELECT CAST(id AS bigint) FROM data_transfer WHERE status = 'PENDING' ORDER BY id";
        let statement = sea_orm::Statement::from_string(db.get_database_backend(), sql);
        let found = db.query_all_raw(statement).await?;
        let ids = found
            .iter()
            .map(|row| row.try_get_by_index::<i64>(0))
            .collect::<Result<Vec<_>, _>>()?;
        if ids.len() != rows {
            return Err(format!("{} rows wait, not {rows}", ids.len()).into());
        }
        for ids in ids.chunks(BATCH) {
            let tx = db.begin().await?;
            let list = ids.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
            let sql = format!(
                "UPDATE data_transfer SET status = 'SCHEDULED' WHERE id IN ({list}) AND status = 'PENDING'"
            );
            tx.execute_unprepared(&sql).await?;
            let sending = ids.iter().map(async |_| {
                let sent = self.channel.basic_publish(
                    self.queue.as_str().into(),
                    self.queue.as_str().into(),
                    BasicPublishOptions::default(),
                    &pattern.data,
                    pattern.properties.clone(),
                );
                sent.await?.await
            });
            let confirmed = try_join_all(sending).await?;
            if !confirmed.iter().all(lapin::Confirmation::is_ack) {
                return Err("the broker refused a message".into());
            }
            tx.commit().await?;
        }
        Ok(began.elapsed().as_secs_f64())
    }

    async fn backlog(&self, rows: usize) -> Outcome {
        self.insert(1, "PENDING").await?;
        self.pass(1).await?;
        self.sql("UPDATE data_transfer SET status = 'COMPLETED'")
            .await?;
        self.limit(100).await?;
        self.insert(rows, "PENDING").await?;
        self.analyze().await?;
        let sent = rows.min(100 * LINKS);
        let seconds = self.pass(sent).await?;
        self.report("backlog", "manager", rows, seconds);
        let seconds = self.pass(0).await?;
        self.report("backlog_full", "manager", rows, seconds);
        Ok(())
    }

    async fn steady(&self, rows: usize) -> Outcome {
        self.insert(rows, "COMPLETED").await?;
        self.insert(1, "PENDING").await?;
        self.analyze().await?;
        self.pass(1).await?;
        let mut sending = Vec::new();
        for _ in 0..PASSES {
            self.sql("UPDATE data_transfer SET status = 'COMPLETED' WHERE status = 'SCHEDULED'")
                .await?;
            self.insert(100, "PENDING").await?;
            sending.push(self.pass(100).await?);
        }
        self.report("steady", "manager", rows, median(sending));
        self.limit(0).await?;
        self.insert(100, "PENDING").await?;
        let mut looking = Vec::new();
        for _ in 0..PASSES {
            looking.push(self.pass(0).await?);
        }
        self.report("steady_idle", "manager", rows, median(looking));
        Ok(())
    }

    async fn purge(&self) -> Outcome {
        let options = QueuePurgeOptions::default();
        self.channel
            .queue_purge(self.queue.as_str().into(), options)
            .await?;
        Ok(())
    }

    async fn remove(&self) -> Outcome {
        self.transport.close().await;
        self.channel
            .queue_delete(self.queue.as_str().into(), QueueDeleteOptions::default())
            .await?;
        self.channel
            .exchange_delete(self.queue.as_str().into(), ExchangeDeleteOptions::default())
            .await?;
        self.broker.close(200, "bye".into()).await?;
        if let Some((settings, name)) = &self.server {
            let there = Database::connect(&settings.ops_db).await?;
            let drop = format!("DROP DATABASE {name} (FORCE)");
            there.connection().execute_unprepared(&drop).await?;
        }
        Ok(())
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or_default()
}

/// One origin, and a destination for each link.
fn sites(origin: &str) -> String {
    let site = |name: &str| {
        format!(
            "[[sites]]\nname = \"{name}\"\nshort_name = \"{name}\"\n[[sites.locations]]\n\
             name = \"buffer\"\ntype = \"buffer\"\nstorage = \"disk\"\npath = \"/{name}\"\n"
        )
    };
    let destinations = (0..LINKS).map(|n| site(&format!("{origin}to{n}")));
    std::iter::once(site(origin)).chain(destinations).collect()
}
