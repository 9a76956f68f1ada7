//! Settings: one struct for each section of `config.default.toml`, which is their reference.
//!
//! [`load`] layers the embedded defaults, a file and the environment, and reports *every* problem
//! at once, each with its key and where the value came from. The types here only hold values;
//! nothing in them reads a file or the clock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use service_connection::url;

mod check;
mod exposure;
mod load;
mod secrets;
mod worker_options;

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
    /// Who is told what.
    pub notifications: Notifications,
    /// Signs of life.
    pub health: Health,
    /// The side port.
    pub http: Http,
    /// Where spans are sent.
    pub traces: Traces,
    /// Logging.
    pub log: Log,
    /// What is not wrong but risky: secrets that others can read, here or on their way.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
}

/// `[celery]`. Keys have the names that Celery gives them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Celery {
    /// `amqp://` or `amqps://` URL, or several, with `;` between them; a secret, since it may hold a password.
    #[serde(skip_serializing)]
    pub broker_url: SecretString,
    /// File that holds the whole URL instead; empty for none.
    pub broker_url_file: String,
    /// File that holds the URL's password; empty for none.
    pub broker_password_file: String,
    /// Empty, or the URL of a backend as Celery writes it; a secret for the same reason.
    #[serde(skip_serializing)]
    pub result_backend: SecretString,
    /// File that holds the whole URL instead; empty for none.
    pub result_backend_file: String,
    /// File that holds the URL's password; empty for none.
    pub result_backend_password_file: String,
    /// Seconds that a result is kept; 0 for ever.
    pub result_expires: u64,
    /// The same for the results of tasks that failed; -1 as `result_expires`.
    pub result_failure_expires: i64,
    /// The same for what is noted of the parts of a chord; -1 as `result_expires`.
    pub result_chord_expires: i64,
    /// Whether results name the task, its arguments and the worker.
    pub result_extended: bool,
    /// Whether `rpc://` results survive a restart of the broker.
    pub result_persistent: bool,
    /// How results are written.
    pub result_serializer: ResultSerializer,
    /// How results are compressed in Redis; empty for not.
    pub result_compression: String,
    /// Whether tables of results are made where they are missing.
    pub database_create_tables_at_setup: bool,
    /// What only Redis needs to know.
    pub result_backend_transport_options: ResultTransport,
    /// TLS for Redis.
    pub redis_backend_use_ssl: RedisTls,
    /// Names of the tables of results.
    pub database_table_names: ResultTables,
    /// Schemas of the tables of results.
    pub database_table_schemas: ResultTables,
    /// Seconds that results of a chord's header may be on their way when its parts have returned.
    pub result_chord_join_timeout: f64,
    /// Seconds between two looks at a chord, where the backend does not count its parts.
    pub result_chord_retry_interval: f64,
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
    /// Whether a message is acknowledged after its task rather than before, where the task does not
    /// say. The transfer tasks say: after.
    pub task_acks_late: bool,
    /// Whether, with late acknowledgement, a failure is acknowledged rather than rejected.
    pub task_acks_on_failure: bool,
    /// Whether, with late acknowledgement, a task that ran too long is acknowledged rather than
    /// requeued.
    pub task_acks_on_timeout: bool,
    /// Whether no results are stored, where neither message nor task says.
    pub task_ignore_result: bool,
    /// Whether failures are stored even so.
    pub task_store_errors_even_if_ignored: bool,
    /// Seconds that a task may run; 0 is no limit.
    pub task_time_limit: f64,
    /// Seconds after which a task is asked to stop; 0 is no limit.
    pub task_soft_time_limit: f64,
    /// How many tasks of one name may begin, e.g. `10/m`; empty is no limit.
    pub task_default_rate_limit: String,
    /// Whether rate limits are ignored, those of the tasks, too.
    pub worker_disable_rate_limits: bool,
    /// Whether a task that is delivered again is not run if its stored state is SUCCESS.
    pub worker_deduplicate_successful_tasks: bool,
    /// Seconds that running tasks get to end when the worker has to stop at once.
    pub worker_soft_shutdown_timeout: f64,
    /// Messages that may wait for their eta beyond the prefetch limit.
    pub worker_eta_task_limit: usize,
    /// How long a message that waits for its eta is held before it is published anew.
    #[serde(with = "humantime_serde")]
    pub worker_eta_hold: Duration,
    /// Requests of the remote control that change what the worker does, as far as they are obeyed.
    pub worker_remote_control_allowed: Vec<String>,
    /// Seconds between the heartbeats that monitors see.
    pub worker_heartbeat_interval: f64,
    /// Seconds between AMQP heartbeats; 0 for none.
    pub broker_heartbeat: u16,
    /// Seconds to wait for one connection attempt.
    pub broker_connection_timeout: u64,
    /// Serializers that are accepted, by name or MIME type.
    pub accept_content: Vec<String>,
    /// Largest accepted message body, in bytes, before and after decompression.
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

    /// Everything as a mapping with Celery's names, for `celery inspect conf`; passwords in URLs are
    /// masked.
    #[must_use]
    pub fn shown(&self) -> serde_json::Value {
        let mut shown = serde_json::to_value(self).unwrap_or_default();
        shown["broker_url"] = url::masked(self.broker_url()).into();
        shown["result_backend"] = url::masked(self.result_backend()).into();
        shown
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

/// Ways to write a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResultSerializer {
    /// Celery's default.
    Json,
}

/// `[celery.result_backend_transport_options]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultTransport {
    /// Prefix of every key in Redis; empty for none.
    pub global_keyprefix: String,
    /// Name of the server that sentinels are asked for.
    pub master_name: String,
    /// Whether the results of a chord's parts are kept in the order of its header.
    pub result_chord_ordered: bool,
}

/// `[celery.redis_backend_use_ssl]`: files in PEM format.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedisTls {
    /// `required`, `none`, or empty for the former.
    pub ssl_cert_reqs: String,
    /// Authorities to trust; empty for the public ones.
    pub ssl_ca_certs: String,
    /// Our own certificate; empty for none.
    pub ssl_certfile: String,
    /// Its key.
    pub ssl_keyfile: String,
}

/// Names for the two tables of results.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultTables {
    /// Of tasks.
    pub task: String,
    /// Of groups.
    pub group: String,
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

/// libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// As the variable `PGSSLMODE` says; `prefer` where there is none.
    #[serde(rename = "")]
    Environment,
    /// No TLS.
    Disable,
    /// TLS where the server has it; nothing is verified.
    Prefer,
    /// TLS; as `verify-ca` if authorities are given, else nothing is verified.
    Require,
    /// TLS, with a certificate of a trusted authority.
    VerifyCa,
    /// The same, and the certificate is for the host that was asked for.
    VerifyFull,
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
    /// File that holds the password instead; empty for none.
    pub database_postgresql_password_file: String,
    /// Whether TLS is spoken and what is verified; libpq's `sslmode`.
    pub database_postgresql_sslmode: SslMode,
    /// PEM file of the authorities that may have signed the server's certificate; empty for
    /// `PGSSLROOTCERT`, or else the public ones.
    pub database_postgresql_sslrootcert: String,
    /// PEM file of our own certificate; empty for `PGSSLCERT`, or else none.
    pub database_postgresql_sslcert: String,
    /// PEM file of its key.
    pub database_postgresql_sslkey: String,
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
    /// MD5, RFC 1321: finds accidents but no attack; many archives record it.
    Md5,
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
    /// Wait before the first further attempt; each failure doubles it.
    #[serde(with = "humantime_serde")]
    pub retry_delay_first: Duration,
    /// The same after a failure for lack of storage.
    #[serde(with = "humantime_serde")]
    pub retry_delay_storage: Duration,
    /// Longest wait.
    #[serde(with = "humantime_serde")]
    pub retry_delay_max: Duration,
    /// Share by which a wait may be shorter, 0 to 1.
    pub retry_delay_jitter: f64,
    /// How long running tasks may go on when the worker was told to stop; zero for as long as they
    /// take.
    #[serde(with = "humantime_serde")]
    pub shutdown_timeout: Duration,
    /// Age of the last renewal at which a lease is dead.
    #[serde(with = "humantime_serde")]
    pub lease_ttl: Duration,
    /// Longest pause between two renewals.
    #[serde(with = "humantime_serde")]
    pub lease_renew_interval: Duration,
    /// A copy that moves nothing for so long is stopped.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// Bytes per second that a copy must move; 0 for no such limit.
    pub min_rate: u64,
    /// Over this time.
    #[serde(with = "humantime_serde")]
    pub min_rate_window: Duration,
    /// Bytes per second from which the longest time for a copy follows; 0 for no such limit.
    pub deadline_rate: u64,
    /// Added to that time.
    #[serde(with = "humantime_serde")]
    pub deadline_grace: Duration,
    /// Whether partial copies are kept for the next attempt.
    pub resume: bool,
    /// Of packages of this size and above.
    pub resume_above: u64,
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
    /// Program at a remote end, with its arguments, that prints the SHA-256 of its standard input.
    pub sha256_command: Vec<String>,
    /// The same for BLAKE3.
    pub blake3_command: Vec<String>,
    /// The same for XXH3.
    pub xxh3_command: Vec<String>,
    /// The same for MD5.
    pub md5_command: Vec<String>,
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
    /// Instead of `transfer.min_rate`.
    #[serde(default)]
    pub min_rate: Option<u64>,
    /// Instead of `transfer.min_rate_window`.
    #[serde(default, with = "humantime_serde")]
    pub min_rate_window: Option<Duration>,
    /// Instead of `transfer.deadline_rate`.
    #[serde(default)]
    pub deadline_rate: Option<u64>,
    /// Instead of `transfer.deadline_grace`.
    #[serde(default, with = "humantime_serde")]
    pub deadline_grace: Option<Duration>,
    /// Instead of `transfer.resume`.
    #[serde(default)]
    pub resume: Option<bool>,
    /// Instead of `transfer.resume_above`.
    #[serde(default)]
    pub resume_above: Option<u64>,
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
    /// How often all transfers are looked at, also those that were COMPLETED before.
    #[serde(with = "humantime_serde")]
    pub full_look_interval: Duration,
    /// Time that a transfer may be SCHEDULED before its message is looked for; zero for never.
    #[serde(with = "humantime_serde")]
    pub reconcile_after: Duration,
    /// Only transfers from these sites, by short name; empty for all.
    pub sites: Vec<String>,
}

/// `[notifications]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notifications {
    /// Program and arguments; empty for none.
    pub command: Vec<String>,
    /// Where texts are posted; empty for nowhere. A secret: who knows it may post there.
    pub webhook_url: SecretString,
    /// File that holds the address instead; empty for none.
    pub webhook_url_file: String,
    /// Shortest time between two notifications.
    #[serde(with = "humantime_serde")]
    pub min_interval: Duration,
    /// For one notification by one way.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

/// `[health]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Where signs of life are written; empty for nowhere. A secret, since it may hold a password.
    pub redis_url: SecretString,
    /// File that holds the URL instead; empty for none.
    pub redis_url_file: String,
    /// The word between `health:` and the name.
    pub service_type: String,
    /// Name of the manager.
    pub manager_name: String,
    /// Name of a worker.
    pub worker_name: String,
    /// Key of a running task, with `{task_id}` in it; empty for none.
    pub task_key: String,
    /// Pause between two signs.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// How long one holds.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
}

/// `[http]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Where `/livez`, `/readyz` and `/metrics` are answered; empty for nowhere.
    pub listen: String,
    /// A loop that is late by so long is taken for stopped.
    #[serde(with = "humantime_serde")]
    pub stopped_after: Duration,
}

impl Http {
    /// The address; none for nowhere, and for a text that is no address, which [`load`] refuses.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

pub use celery_worker::broker::{DelayedDelivery, ExchangeKind, QueueType, TaskQueue};
pub use traces::Traces;

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
    /// Algorithm by which the ends are compared.
    pub digest: DigestAlgorithm,
    /// What is too slow.
    pub slowness: Slowness,
    /// Whether partial copies are kept for the next attempt.
    pub resume: bool,
    /// Of packages of this size in bytes and above.
    pub resume_above: u64,
}

/// When a copy that moves is stopped nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slowness {
    /// Bytes per second that it must move, over `window`; 0 for no such limit.
    pub min_rate: u64,
    /// See `min_rate`.
    pub window: Duration,
    /// Bytes per second from which the longest time follows; 0 for no such limit.
    pub deadline_rate: u64,
    /// Added to that time.
    pub deadline_grace: Duration,
}

impl Slowness {
    /// The longest time that a copy of `bytes` may take.
    #[must_use]
    pub fn deadline(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes.checked_div(self.deadline_rate)?;
        Some(
            self.deadline_grace
                .saturating_add(Duration::from_secs(seconds)),
        )
    }
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
