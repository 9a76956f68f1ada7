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
    /// Who is told what.
    pub notifications: Notifications,
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
}

/// `[notifications]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notifications {
    /// Program and arguments; empty for none.
    pub command: Vec<String>,
    /// Where texts are posted; empty for nowhere. A secret: who knows it may post there.
    pub webhook_url: SecretString,
    /// Shortest time between two notifications.
    #[serde(with = "humantime_serde")]
    pub min_interval: Duration,
    /// For one notification by one way.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
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
