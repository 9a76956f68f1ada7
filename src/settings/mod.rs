//! Settings: one struct for each section of `config.default.toml`, which is their reference.
//!
//! [`load`] layers the embedded defaults, a file and the environment, and reports *every* problem
//! at once, each with its key and where the value came from. The types here only hold values;
//! nothing in them reads a file or the clock.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

mod check;
mod load;

pub use load::{DEFAULTS, Problem, SettingsError, load};

/// All settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The Celery side: broker, results, concurrency.
    pub celery: Celery,
    /// The operations database.
    pub ops_db: OpsDb,
    /// What holds for every transfer.
    pub transfer: Transfer,
    /// bbcp's command line.
    pub bbcp: Bbcp,
    /// How remote locations are reached.
    pub ssh: Ssh,
    /// Differences for single links.
    #[serde(default)]
    pub routes: Vec<RouteOverride>,
    /// The manager's loop.
    pub manager: Manager,
    /// Logging.
    pub log: Log,
}

/// `[celery]`. Keys have the names that Celery gives them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Celery {
    /// `amqp://` or `amqps://` URL; a secret, since it may hold a password.
    pub broker_url: SecretString,
    /// Empty, `rpc://` or a `redis://` URL; a secret for the same reason.
    pub result_backend: SecretString,
    /// Seconds that Redis keeps a result; 0 for ever.
    pub result_expires: u64,
    /// Queue for producers and workers that name none.
    pub task_default_queue: String,
    /// Tasks at a time; 0 is the number of processors.
    pub worker_concurrency: u16,
    /// Prefetched deliveries for each slot; 0 is no limit.
    pub worker_prefetch_multiplier: u16,
    /// Whether the events of tasks are sent.
    pub worker_send_task_events: bool,
    /// Whether remote control is answered.
    pub worker_enable_remote_control: bool,
    /// Whether STARTED is stored.
    pub task_track_started: bool,
    /// Seconds between AMQP heartbeats; 0 for none.
    pub broker_heartbeat: u16,
    /// Seconds to wait for one connection attempt.
    pub broker_connection_timeout: u64,
    /// Largest accepted message body, in bytes.
    pub max_body_bytes: usize,
    /// Whether a lost connection is made anew; otherwise the worker ends.
    pub broker_connection_retry: bool,
    /// Whether the first connection is tried again until it is there.
    pub broker_connection_retry_on_startup: bool,
    /// Attempts in a row that may fail before the worker ends; 0 is no limit.
    pub broker_connection_max_retries: u32,
    /// PEM file of the authorities that may have signed the broker's certificate, besides those of
    /// the system; empty for these alone.
    pub broker_ssl_ca_file: String,
    /// PEM file of our own certificate; empty for none.
    pub broker_ssl_cert_file: String,
    /// PEM file of its key.
    pub broker_ssl_key_file: String,
    /// Whether queues and exchanges are looked for instead of declared.
    pub no_declare: bool,
    /// Queues that are declared otherwise than the rest, by name.
    #[serde(default)]
    pub task_queues: BTreeMap<String, TaskQueue>,
    /// Exchange of the default queue; empty for one of its own name.
    pub task_default_exchange: String,
    /// Its kind.
    pub task_default_exchange_type: ExchangeKind,
    /// Routing key of the default queue; empty for its name.
    pub task_default_routing_key: String,
    /// Type of the default queue.
    pub task_default_queue_type: QueueType,
    /// Type of queues that are named nowhere in the settings.
    pub task_create_missing_queue_type: QueueType,
    /// Kind of their exchanges.
    pub task_create_missing_queue_exchange_type: ExchangeKind,
    /// `x-max-priority` of queues that have none of their own; 0 for none.
    pub task_queue_max_priority: u8,
    /// Whether the queues for native delayed delivery are declared.
    pub broker_native_delayed_delivery: DelayedDelivery,
    /// Their type.
    pub broker_native_delayed_delivery_queue_type: QueueType,
    /// Task type → wire names; the first is sent, all are answered.
    pub task_names: BTreeMap<String, Vec<String>>,
}

impl Celery {
    /// Tasks that run at once: the setting, or the number of processors where it is 0.
    pub fn concurrency(&self) -> usize {
        match self.worker_concurrency {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => usize::from(n),
        }
    }

    /// The broker URL with its password, for connecting only.
    pub fn broker_url(&self) -> &str {
        self.broker_url.expose_secret()
    }

    /// The result backend URL with its password, for connecting only.
    pub fn result_backend(&self) -> &str {
        self.result_backend.expose_secret()
    }
}

/// Kind of an exchange, in AMQP's terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExchangeKind {
    /// By equal routing key.
    #[default]
    Direct,
    /// To every bound queue.
    Fanout,
    /// By pattern.
    Topic,
    /// By headers.
    Headers,
}

impl ExchangeKind {
    /// Its name in AMQP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::Headers => "headers",
        }
    }
}

/// Type of a queue, in RabbitMQ's terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// On one node.
    #[default]
    Classic,
    /// Replicated.
    Quorum,
}

impl QueueType {
    /// Its name in `x-queue-type`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// When the queues for native delayed delivery are declared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DelayedDelivery {
    /// When a task queue is a quorum queue, as in Celery.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How one queue is declared.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskQueue {
    /// Its exchange; otherwise the default exchange, or one of its own name.
    pub exchange: Option<String>,
    /// The exchange's kind.
    pub exchange_type: Option<ExchangeKind>,
    /// Binding key; otherwise its name.
    pub routing_key: Option<String>,
    /// Queue arguments, e.g. `x-max-priority`.
    #[serde(default)]
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// Kind of the operations database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseType {
    /// A file.
    Sqlite,
    /// A server.
    Postgresql,
}

/// Which of an enum member's two spellings is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnumLabels {
    /// `PENDING`: SQLAlchemy's default.
    Names,
    /// `pending`.
    Values,
}

/// `[ops_db]`. Keys are those of the Python package, without its prefix `CCAT_OPS_DB_`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpsDb {
    /// Which of the two groups of keys below counts.
    pub database_type: DatabaseType,
    /// Path of the SQLite file.
    pub database_sqlite_database: PathBuf,
    /// Database name.
    pub database_postgresql_database: String,
    /// Login.
    pub database_postgresql_user: String,
    /// Its password.
    pub database_postgresql_password: SecretString,
    /// Host name, or the directory of a Unix socket.
    pub database_postgresql_host: String,
    /// TCP port.
    pub database_postgresql_port: u16,
    /// Size of the connection pool.
    pub max_connections: u32,
    /// Wait for a free connection, and for SQLite's write lock.
    #[serde(with = "humantime_serde")]
    pub acquire_timeout: Duration,
    /// Spelling of labels in a plain text column that holds no row yet.
    pub text_enum_labels: EnumLabels,
}

/// Which end of a transfer names its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueLocation {
    /// The location that holds the file.
    Origin,
    /// The location that gets it.
    Destination,
}

/// How origin and destination are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DigestAlgorithm {
    /// SHA-256, FIPS 180-4.
    Sha256,
    /// BLAKE3, 256 bits.
    Blake3,
    /// XXH3, 64 bits: fast, finds accidents but no attack.
    Xxh3,
}

/// `[transfer]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// Whose queue a transfer goes to.
    pub queue_location: QueueLocation,
    /// Prefix of every queue name.
    pub queue_prefix: String,
    /// Further attempts after the first failed one.
    pub max_retries: u32,
    /// Age of the last renewal at which a lease is dead.
    #[serde(with = "humantime_serde")]
    pub lease_ttl: Duration,
    /// Longest pause between two renewals.
    #[serde(with = "humantime_serde")]
    pub lease_renew_interval: Duration,
    /// A copy that moves nothing for so long is stopped.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// Algorithm of the verification.
    pub digest: DigestAlgorithm,
    /// Bytes that must stay free at the destination.
    pub free_space_margin: u64,
    /// Directory of the attempts' log files.
    pub log_dir: PathBuf,
    /// Further names of this host.
    pub local_hosts: Vec<String>,
}

/// `[bbcp]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Bbcp {
    /// Program here.
    pub program: PathBuf,
    /// Program at the other end.
    pub remote_program: PathBuf,
    /// Data streams, 1 to 64.
    pub streams: u8,
    /// TCP window as bbcp reads it; empty for its default.
    pub window: String,
    /// Seconds between progress lines, 2 or more.
    pub progress_interval: u32,
    /// Listener ports `first:last`; empty for bbcp's own.
    pub port_range: String,
    /// `-z`.
    pub reverse_connection: bool,
    /// `-n`.
    pub no_dns: bool,
    /// Buffer checksum: `c32c`, `md5` or empty.
    pub in_flight_checksum: String,
    /// Rate limit as bbcp reads it; empty for none.
    pub max_rate: String,
    /// Pause between SIGTERM and SIGKILL to the process group.
    #[serde(with = "humantime_serde")]
    pub kill_after: Duration,
}

/// `[ssh]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// Program.
    pub program: PathBuf,
    /// Login; empty for the user we run as.
    pub user: String,
    /// Port.
    pub port: u16,
    /// `-i`; empty for ssh's own search.
    pub identity_file: String,
    /// `UserKnownHostsFile`; empty for ssh's own.
    pub known_hosts_file: String,
    /// `ConnectTimeout`.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Further `-o` options, `Name=value`.
    pub options: Vec<String>,
}

/// `[[routes]]`: what differs for one link.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteOverride {
    /// Short name of the origin's site.
    pub origin: String,
    /// Short name of the destination's site.
    pub destination: String,
    /// Instead of `transfer.stall_timeout`.
    #[serde(default, with = "humantime_serde")]
    pub stall_timeout: Option<Duration>,
    /// Keys of `[bbcp]`.
    #[serde(default)]
    pub bbcp: figment::value::Dict,
    /// Keys of `[ssh]`.
    #[serde(default)]
    pub ssh: figment::value::Dict,
}

/// `[manager]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manager {
    /// Pause between two passes.
    #[serde(with = "humantime_serde")]
    pub sleep_time: Duration,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// `[log]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Level or filter.
    pub level: String,
    /// Form.
    pub format: LogFormat,
}

/// What holds on one link: the general settings with the route's differences laid over them.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    /// bbcp's command line.
    pub bbcp: Bbcp,
    /// How the remote end is reached.
    pub ssh: Ssh,
    /// A copy that moves nothing for so long is stopped.
    pub stall_timeout: Duration,
}

impl Settings {
    /// The settings of the link between two sites, by short name.
    ///
    /// # Errors
    /// What is wrong with a route's own keys; none for settings that came from [`load`], which has
    /// tried every route.
    pub fn link(&self, origin: &str, destination: &str) -> Result<LinkSettings, String> {
        load::link(self, origin, destination)
    }
}
