//! `[celery]`: broker, results, queues and the worker, with Celery's names.

use std::collections::BTreeMap;
use std::time::Duration;

use celery_worker::broker::amqp;
use celery_worker::broker::redis::{self, RedisTransportOptions};
use celery_worker::broker::{BrokerError, FailoverStrategy, MAX_NAME_BYTES};
use celery_worker::results::{self, Serializer};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use service_connection::url;

use super::problem::SectionProblems;
use super::{DelayedDelivery, ExchangeKind, QueueType, TaskQueue, TaskRoute};

/// Names and MIME types of the serializers.
const ACCEPTABLE: [&str; 6] = [
    "json",
    "msgpack",
    "yaml",
    "application/json",
    "application/x-msgpack",
    "application/x-yaml",
];
const PICKLE: [&str; 2] = ["pickle", "application/x-python-serialize"];

/// Names of the compressions of results.
const RESULT_COMPRESSIONS: [&str; 8] = [
    "",
    "gzip",
    "zlib",
    "bzip2",
    "bzip",
    "zstd",
    "zstandard",
    "application/zstd",
];

/// `[celery]`. Keys have Celery's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Celery {
    /// URL of RabbitMQ or Redis, or several of them separated by `;`; a secret, since it may contain a password.
    #[serde(skip_serializing)]
    pub broker_url: SecretString,
    /// Order in which the brokers of a list are tried.
    pub broker_failover_strategy: FailoverStrategy,
    /// File that contains the whole URL instead; empty for none.
    pub broker_url_file: String,
    /// File that contains the URL's password; empty for none.
    pub broker_password_file: String,
    /// Options of Redis as the broker.
    pub broker_transport_options: RedisTransportOptions,
    /// URL of a result backend as Celery writes it, or empty; a secret, since it may contain a password.
    #[serde(skip_serializing)]
    pub result_backend: SecretString,
    /// File that contains the whole URL instead; empty for none.
    pub result_backend_file: String,
    /// File that contains the URL's password; empty for none.
    pub result_backend_password_file: String,
    /// Seconds that a result is kept; 0 for no limit.
    pub result_expires: u64,
    /// Seconds that the result of a failed task is kept; -1 for `result_expires`.
    pub result_failure_expires: i64,
    /// Seconds that the records of a chord's parts are kept; -1 for `result_expires`.
    pub result_chord_expires: i64,
    /// True if results contain the task's name, its arguments and the worker.
    pub result_extended: bool,
    /// True if `rpc://` results survive a restart of the broker.
    pub result_persistent: bool,
    /// Serializer of results.
    pub result_serializer: Serializer,
    /// Compression of results in Redis; empty for none.
    pub result_compression: String,
    /// True if missing tables of results are created.
    pub database_create_tables_at_setup: bool,
    /// Options of the Redis backend.
    pub result_backend_transport_options: ResultTransport,
    /// TLS for Redis.
    pub redis_backend_use_ssl: RedisTls,
    /// Names of the tables of results.
    pub database_table_names: ResultTables,
    /// Schemas of the tables of results.
    pub database_table_schemas: ResultTables,
    /// Seconds to wait for results of a chord's header after its parts have returned.
    pub result_chord_join_timeout: f64,
    /// Seconds between two polls of a chord, where the backend does not count its parts.
    pub result_chord_retry_interval: f64,
    /// Queue of producers and workers without one of their own.
    pub task_default_queue: String,
    /// Concurrent tasks; 0 for the number of processors.
    pub worker_concurrency: u16,
    /// Prefetched deliveries for each slot; 0 means no limit.
    pub worker_prefetch_multiplier: u16,
    /// True if a message is taken only while a slot is free; only for Redis as the broker.
    pub worker_disable_prefetch: bool,
    /// True if task events are sent.
    pub worker_send_task_events: bool,
    /// An event `task-sent` is sent for each task that the worker sends.
    pub task_send_sent_event: bool,
    /// True if remote control is answered.
    pub worker_enable_remote_control: bool,
    /// True if the state STARTED is stored.
    pub task_track_started: bool,
    /// True if messages are acknowledged after their task rather than before, unless the task has an option of its own.
    pub task_acks_late: bool,
    /// True if, with late acknowledgement, the message of a failed task is acknowledged rather than rejected.
    pub task_acks_on_failure: bool,
    /// True if, with late acknowledgement, the message of a task that ran too long is acknowledged rather than
    /// requeued.
    pub task_acks_on_timeout: bool,
    /// True if no results are stored, unless the message or the task decides otherwise.
    pub task_ignore_result: bool,
    /// True if failures are stored even if results are not.
    pub task_store_errors_even_if_ignored: bool,
    /// Seconds that a task may run; 0 means no limit.
    pub task_time_limit: f64,
    /// Seconds until a task is asked to stop; 0 means no limit.
    pub task_soft_time_limit: f64,
    /// Rate limit for tasks of one name, e.g. `10/m`; empty means no limit.
    pub task_default_rate_limit: String,
    /// True if rate limits are ignored, including those of the tasks.
    pub worker_disable_rate_limits: bool,
    /// True if a redelivered task with the stored state SUCCESS does not run again.
    pub worker_deduplicate_successful_tasks: bool,
    /// Time limit in seconds for running tasks at a cold shutdown.
    pub worker_soft_shutdown_timeout: f64,
    /// Messages that may wait for their eta beyond the prefetch limit.
    pub worker_eta_task_limit: usize,
    /// Time that a message with an eta is held before it is published again.
    #[serde(with = "humantime_serde")]
    pub worker_eta_hold: Duration,
    /// Accepted requests of the remote control that change the worker.
    pub worker_remote_control_allowed: Vec<String>,
    /// Seconds between heartbeat events.
    pub worker_heartbeat_interval: f64,
    /// Seconds between AMQP heartbeats; 0 for none.
    pub broker_heartbeat: u16,
    /// Time limit of one connection attempt in seconds.
    pub broker_connection_timeout: u64,
    /// Accepted serializers, by name or MIME type.
    pub accept_content: Vec<String>,
    /// Largest accepted message body, in bytes, before and after decompression.
    pub max_body_bytes: usize,
    /// True if a lost connection is restored; otherwise the worker ends.
    pub broker_connection_retry: bool,
    /// True if the first connection is retried until it succeeds.
    pub broker_connection_retry_on_startup: bool,
    /// Consecutive failed attempts until the worker ends; 0 means no limit.
    pub broker_connection_max_retries: u32,
    /// PEM file of further certificate authorities for the broker's certificate; empty for those of the system.
    pub broker_ssl_ca_file: String,
    /// PEM file of the client certificate; empty for none.
    pub broker_ssl_cert_file: String,
    /// PEM file of the key of the client certificate.
    pub broker_ssl_key_file: String,
    /// True if queues and exchanges must exist and are not declared.
    pub no_declare: bool,
    /// Queues with declarations of their own, by name.
    #[serde(default)]
    pub task_queues: BTreeMap<String, TaskQueue>,
    /// Destinations of tasks that a worker sends, by their names or by patterns.
    #[serde(default)]
    pub task_routes: BTreeMap<String, TaskRoute>,
    /// Exchange of the default queue; empty for one of its own name.
    pub task_default_exchange: String,
    /// Kind of the default queue's exchange.
    pub task_default_exchange_type: ExchangeKind,
    /// Routing key of the default queue; empty for its name.
    pub task_default_routing_key: String,
    /// Type of the default queue.
    pub task_default_queue_type: QueueType,
    /// Type of queues that are not in the settings.
    pub task_create_missing_queue_type: QueueType,
    /// Kind of the exchanges of such queues.
    pub task_create_missing_queue_exchange_type: ExchangeKind,
    /// `x-max-priority` of queues that do not set it themselves; 0 for none.
    pub task_queue_max_priority: u8,
    /// Declaration of the queues for native delayed delivery.
    pub broker_native_delayed_delivery: DelayedDelivery,
    /// Type of the queues for native delayed delivery.
    pub broker_native_delayed_delivery_queue_type: QueueType,
    /// Names in messages by task type, for programs that let operators rename their tasks. The first name is sent; all
    /// of them are accepted.
    #[serde(default)]
    pub task_names: BTreeMap<String, Vec<String>>,
}

impl Celery {
    /// Number of concurrent tasks: the setting, or the number of processors where it is 0.
    pub fn concurrency(&self) -> usize {
        match self.worker_concurrency {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => usize::from(n),
        }
    }

    /// All keys as a mapping with Celery's names, for `celery inspect conf`; passwords in URLs are masked.
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

impl Celery {
    /// Adds a problem for each violated rule of the section.
    pub fn check(&self, problems: &mut SectionProblems<'_>) {
        self.check_broker(problems);
        self.check_results(problems);
        problems.require(
            !self.task_default_queue.is_empty(),
            "task_default_queue",
            "must not be empty",
        );
        problems.require(self.max_body_bytes > 0, "max_body_bytes", "must be above 0");
        self.check_accepted_content(problems);
        self.check_times(problems);
        problems.require(
            self.broker_ssl_cert_file.is_empty() == self.broker_ssl_key_file.is_empty(),
            "broker_ssl_key_file",
            "must be given with broker_ssl_cert_file, and only with it",
        );
        self.check_queues(problems);
    }

    fn check_broker(&self, problems: &mut SectionProblems<'_>) {
        let transport = &self.broker_transport_options;
        let checked = match redis::has_scheme(self.broker_url()) {
            true => redis::check_urls(self.broker_url(), transport).map_err(|error| match error {
                BrokerError::Url(reason) => reason,
                other => other.to_string(),
            }),
            false => amqp::check_urls(self.broker_url()).map_err(|reason| {
                match reason.starts_with("its scheme") {
                    true => format!(
                        "{reason}, {}{}",
                        redis::SCHEMES.join(", "),
                        scheme_advice(self.broker_url())
                    ),
                    false => reason,
                }
            }),
        };
        if let Err(reason) = checked {
            problems.add("broker_url", reason);
        }
        if let Some((key, rule)) = transport.problem() {
            problems.add(&format!("broker_transport_options.{key}"), rule);
        }
    }

    fn check_results(&self, problems: &mut SectionProblems<'_>) {
        if let Err(reason) = results::check_url(&self.into()) {
            problems.add("result_backend", reason);
        }
        problems.require(
            RESULT_COMPRESSIONS.contains(&self.result_compression.as_str()),
            "result_compression",
            "must be gzip, bzip2 or zstd, or empty; the others are only read",
        );
        let transport = &self.result_backend_transport_options;
        if self.result_backend().starts_with("sentinel://") {
            problems.require(
                !transport.master_name.is_empty(),
                "result_backend_transport_options.master_name",
                "must be given for sentinel://: the name that the sentinels know the server by",
            );
        }
        for (key, seconds) in [
            ("result_failure_expires", self.result_failure_expires),
            ("result_chord_expires", self.result_chord_expires),
        ] {
            problems.require(
                seconds >= -1,
                key,
                "must be a number of seconds, 0 for ever, or -1 for as long as celery.result_expires",
            );
        }
    }

    fn check_accepted_content(&self, problems: &mut SectionProblems<'_>) {
        for name in &self.accept_content {
            if PICKLE.contains(&name.as_str()) {
                let message =
                    "pickle is never accepted: reading it runs code that the sender chose";
                problems.add("accept_content", message);
            } else if !ACCEPTABLE.contains(&name.as_str()) {
                let message =
                    format!("`{name}` is not a serializer; known are json, msgpack and yaml");
                problems.add("accept_content", message);
            }
        }
        problems.require(
            !self.accept_content.is_empty(),
            "accept_content",
            "must name at least one serializer",
        );
    }

    fn check_times(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            self.broker_connection_timeout > 0,
            "broker_connection_timeout",
            "must be above 0",
        );
        for (key, seconds) in [
            ("task_time_limit", self.task_time_limit),
            ("task_soft_time_limit", self.task_soft_time_limit),
            (
                "worker_soft_shutdown_timeout",
                self.worker_soft_shutdown_timeout,
            ),
            ("result_chord_join_timeout", self.result_chord_join_timeout),
            (
                "result_chord_retry_interval",
                self.result_chord_retry_interval,
            ),
        ] {
            problems.require(
                seconds >= 0.0 && Duration::try_from_secs_f64(seconds).is_ok(),
                key,
                "must be a number of seconds",
            );
        }
        problems.require(
            (0.1..=60.0).contains(&self.worker_heartbeat_interval),
            "worker_heartbeat_interval",
            "must be between 0.1 and 60 seconds",
        );
        problems.require(
            self.worker_eta_hold >= Duration::from_secs(1),
            "worker_eta_hold",
            "must be 1s or more",
        );
    }

    fn check_queues(&self, problems: &mut SectionProblems<'_>) {
        for (name, queue) in &self.task_queues {
            let others = [queue.exchange.as_deref(), queue.routing_key.as_deref()];
            let key = format!("task_queues.{name}");
            check_names(problems, &key, name, others.into_iter().flatten());
        }
        for (name, route) in &self.task_routes {
            let (target, other) = match route {
                TaskRoute::Queue(queue) => (queue, None),
                TaskRoute::Exchange {
                    exchange,
                    routing_key,
                } => (exchange, Some(routing_key.as_str())),
            };
            check_names(problems, &format!("task_routes.{name}"), target, other);
        }
    }
}

/// Adds a problem if AMQP cannot represent a name of a queue or exchange, or one of the names and keys that belong to it.
fn check_names<'a>(
    problems: &mut SectionProblems<'_>,
    key: &str,
    name: &'a str,
    others: impl IntoIterator<Item = &'a str>,
) {
    let mut fit = others.into_iter().chain([name]);
    problems.require(
        !name.is_empty() && fit.all(|text| text.len() <= MAX_NAME_BYTES),
        key,
        &format!("names and keys must be no longer than {MAX_NAME_BYTES} bytes, and that of a queue or exchange not empty"),
    );
}

/// `[celery.result_backend_transport_options]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResultTransport {
    /// Prefix of every key in Redis; empty for none.
    pub global_keyprefix: String,
    /// Name of the server in queries to sentinels.
    pub master_name: String,
    /// Results of a chord's parts are kept in the order of its header.
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
    /// Table of tasks.
    pub task: String,
    /// Table of groups.
    pub group: String,
}

/// Advice for schemes that users of Redis try.
fn scheme_advice(url: &str) -> &'static str {
    match url.split("://").next().unwrap_or_default() {
        "valkey" => "; for Valkey it is redis",
        "valkeys" => "; for Valkey with TLS it is rediss",
        "unix" | "redis+unix" => "; for a socket it is redis+socket",
        scheme if scheme.contains("cluster") => {
            "; Redis Cluster is not supported, neither by Celery"
        }
        _ => "",
    }
}
