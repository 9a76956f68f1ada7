//! Options of a connection to Redis, with kombu's names and defaults.

use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::broker::{FailoverStrategy, Reconnect};
use crate::redis::SentinelLogin;
use crate::results::RedisTls;
use celery_protocol::virtual_message::BodyEncoding;

/// Configuration of the connection to a broker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RedisBrokerOptions {
    /// `redis://`, `rediss://`, `redis+socket://` or `sentinel://` URL, with password, or several separated by `;`: after
    /// a failure another one is used. Sentinels are one server.
    pub url: SecretString,
    /// Order in which the servers of a list are tried.
    pub failover: FailoverStrategy,
    /// Name of the connections in `CLIENT LIST`, unless `client_name` is set.
    pub name: String,
    /// Time limit of one attempt to connect, unless `socket_connect_timeout` is set.
    pub connection_timeout: Duration,
    /// TLS options for values that the URL does not set.
    pub tls: RedisTls,
    /// True if bindings must exist and are not written, except for those of queues that belong to this process.
    pub no_declare: bool,
    /// Conditions under which a consumer stops reconnecting.
    pub reconnect: Reconnect,
    /// `broker_transport_options`.
    pub transport: RedisTransportOptions,
}

impl RedisBrokerOptions {
    /// Celery's defaults for a broker.
    pub fn new(url: impl Into<SecretString>, name: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            failover: FailoverStrategy::default(),
            name: name.into(),
            connection_timeout: Duration::from_secs(4),
            tls: RedisTls::default(),
            no_declare: false,
            reconnect: Reconnect::default(),
            transport: RedisTransportOptions::default(),
        }
    }
}

/// The keys of `broker_transport_options` that have an effect here. All programs that use the same database must agree
/// about the names and prefixes.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RedisTransportOptions {
    /// Seconds after which a message is returned to its queue if its worker has died. A living worker renews its
    /// messages, for as long as they take.
    pub visibility_timeout: u64,
    /// Lowest priority of each class of messages.
    pub priority_steps: Vec<u8>,
    /// Order in which the queues are served.
    pub queue_order_strategy: QueueOrder,
    /// Separator in the names of lists and in bindings.
    pub sep: String,
    /// Prefix of every key and channel.
    pub global_keyprefix: String,
    /// Hash of the messages that are not acknowledged.
    pub unacked_key: String,
    /// Sorted set of the times of their deliveries.
    pub unacked_index_key: String,
    /// Lock of Python's search for expired messages. Not used here: each message is returned by one script.
    pub unacked_mutex_key: String,
    /// Lifetime of that lock in seconds.
    pub unacked_mutex_expire: u64,
    /// Maximum number of messages that one search returns; 0 for no limit.
    pub unacked_restore_limit: usize,
    /// Seconds between two ticks of the search for expired messages.
    pub unacked_restore_interval: u64,
    /// Number of ticks between two searches. A search takes place at least once a minute.
    pub unacked_restore_throttle: u64,
    /// Prefix of the channels: true for the number of the database, false for none, or a text.
    pub fanout_prefix: FanoutPrefix,
    /// True if the name of a channel contains the routing key.
    pub fanout_patterns: bool,
    /// Encoding of bodies: `base64`, or `utf-8` for text.
    pub body_encoding: BodyEncodingName,
    /// Seconds until a command without a reply ends its connection; 0 for the default of 5 seconds.
    pub socket_timeout: u64,
    /// Time limit in seconds of one attempt to connect; 0 for `broker_connection_timeout`.
    pub socket_connect_timeout: u64,
    /// Seconds between checks of a connection without other commands.
    pub health_check_interval: u64,
    /// Name of the connections in `CLIENT LIST`; empty for the program's.
    pub client_name: String,
    /// Name of the master that sentinels report.
    pub master_name: String,
    /// Login at the sentinels.
    pub sentinel_kwargs: SentinelKwargs,
    /// Number of replicas that must have a message before its publication is complete (`WAIT`); 0 for none.
    pub wait_for_replicas: u32,
}

impl Default for RedisTransportOptions {
    fn default() -> Self {
        Self {
            visibility_timeout: 3600,
            priority_steps: vec![0, 3, 6, 9],
            queue_order_strategy: QueueOrder::RoundRobin,
            sep: "\u{6}\u{16}".into(),
            global_keyprefix: String::new(),
            unacked_key: "unacked".into(),
            unacked_index_key: "unacked_index".into(),
            unacked_mutex_key: "unacked_mutex".into(),
            unacked_mutex_expire: 300,
            unacked_restore_limit: 0,
            unacked_restore_interval: 10,
            unacked_restore_throttle: 10,
            fanout_prefix: FanoutPrefix::Enabled(true),
            fanout_patterns: true,
            body_encoding: BodyEncodingName::Base64,
            socket_timeout: 0,
            socket_connect_timeout: 0,
            health_check_interval: 25,
            client_name: String::new(),
            master_name: String::new(),
            sentinel_kwargs: SentinelKwargs::default(),
            wait_for_replicas: 0,
        }
    }
}

/// Order in which queues are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueOrder {
    /// The queue that was served last is the last one.
    #[default]
    RoundRobin,
    /// The given order.
    Priority,
    /// Alphabetical order.
    Sorted,
}

/// Prefix of the channels.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum FanoutPrefix {
    /// The number of the database, or no prefix.
    Enabled(bool),
    /// A text; `{db}` in it is the number of the database.
    Text(String),
}

/// Encoding of bodies, by kombu's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum BodyEncodingName {
    /// `base64`
    #[default]
    #[serde(rename = "base64")]
    Base64,
    /// `utf-8`
    #[serde(rename = "utf-8")]
    Utf8,
}

impl From<BodyEncodingName> for BodyEncoding {
    fn from(name: BodyEncodingName) -> Self {
        match name {
            BodyEncodingName::Base64 => Self::Base64,
            BodyEncodingName::Utf8 => Self::Text,
        }
    }
}

/// Login at the sentinels.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SentinelKwargs {
    /// User; empty for none.
    pub username: String,
    /// Password; empty for none.
    #[serde(skip_serializing)]
    pub password: SecretString,
}

impl From<&SentinelKwargs> for SentinelLogin {
    fn from(login: &SentinelKwargs) -> Self {
        Self {
            username: login.username.clone(),
            password: login.password.clone(),
        }
    }
}

impl RedisTransportOptions {
    /// The first problem of the values, if any: the key, and the rule that its value violates.
    #[must_use]
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        let is_ascending = self.priority_steps.is_sorted_by(|a, b| a < b);
        let rules = [
            (
                "visibility_timeout",
                self.visibility_timeout > 0,
                "must be above 0",
            ),
            (
                "priority_steps",
                is_ascending && !self.priority_steps.is_empty(),
                "must be a list of ascending numbers",
            ),
            ("sep", !self.sep.is_empty(), "must not be empty"),
            (
                "unacked_key",
                !self.unacked_key.is_empty() && self.unacked_key != self.unacked_index_key,
                "must not be empty, and must differ from unacked_index_key",
            ),
            (
                "unacked_index_key",
                !self.unacked_index_key.is_empty(),
                "must not be empty",
            ),
            (
                "health_check_interval",
                self.health_check_interval > 0,
                "must be above 0",
            ),
        ];
        rules
            .into_iter()
            .find_map(|(key, holds, rule)| (!holds).then_some((key, rule)))
    }

    /// Time until a message of a dead worker is returned.
    pub(super) fn visibility(&self) -> Duration {
        Duration::from_secs(self.visibility_timeout)
    }

    /// Interval of the renewal of held messages. Python's clients use their own timeout for all messages, which is an
    /// hour by default.
    pub(super) fn renew_every(&self) -> Duration {
        (self.visibility() / 4).min(Duration::from_secs(300))
    }

    /// Interval of the search for expired messages.
    pub(super) fn sweep_every(&self) -> Duration {
        let seconds = self
            .unacked_restore_interval
            .saturating_mul(self.unacked_restore_throttle);
        Duration::from_secs(seconds.clamp(1, 60))
    }

    /// Time limit of one reply.
    pub(super) fn response_timeout(&self) -> Duration {
        match self.socket_timeout {
            0 => Duration::from_secs(5),
            seconds => Duration::from_secs(seconds),
        }
    }
}
