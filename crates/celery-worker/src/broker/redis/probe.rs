//! Questions about a server, for checks before a worker starts.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, RedisResult, cmd};
use secrecy::ExposeSecret as _;
use uuid::Uuid;

use super::RedisBrokerOptions;
use super::connecting::{Commands, RedisConnector};
use super::names::Names;
use super::scripts::{self, ClaimFrom, PublishRequest};
use super::shared::MessageLimits;
use crate::broker::{BrokerError, Subscription};
use celery_protocol::RawMessage;
use celery_protocol::virtual_message::{self, BodyEncoding};

/// State of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerState {
    /// Location of the server, without login.
    pub place: String,
    /// Version.
    pub version: String,
    /// True if it is a master.
    pub is_master: bool,
    /// True if it writes its data to disk.
    pub is_persistent: bool,
    /// Policy for a full memory; `noeviction` loses no message.
    pub eviction_policy: String,
    /// Number of messages that workers hold.
    pub held: u64,
    /// Number of these that no worker has renewed within the visibility timeout.
    pub expired: u64,
    /// Number of entries of the record that were parked.
    pub parked_entries: u64,
}

/// State of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueState {
    /// Number of waiting messages.
    pub messages: u64,
    /// Number of parked elements, which are not messages.
    pub parked: u64,
}

/// A connection for questions.
pub struct RedisProbe {
    pub(super) commands: Commands,
    pub(super) names: Names,
    visibility_timeout: u64,
}

impl RedisProbe {
    /// Returns the options for each server of a list, with its location without login. Sentinels are one server.
    ///
    /// # Errors
    /// [`BrokerError::Url`].
    pub fn servers(
        options: &RedisBrokerOptions,
    ) -> Result<Vec<(String, RedisBrokerOptions)>, BrokerError> {
        let connector = RedisConnector::new(options)?;
        let places = connector.uris();
        if places.len() < 2 {
            return Ok(places
                .into_iter()
                .map(|place| (place, options.clone()))
                .collect());
        }
        let urls = options.url.expose_secret().split(';');
        let alone = |url: &str| RedisBrokerOptions {
            url: url.into(),
            ..options.clone()
        };
        Ok(places.into_iter().zip(urls.map(alone)).collect())
    }

    /// Creates a probe, which connects at its first question.
    ///
    /// # Errors
    /// [`BrokerError::Url`].
    pub fn new(options: &RedisBrokerOptions) -> Result<Self, BrokerError> {
        let connector = Arc::new(RedisConnector::new(options)?);
        Ok(Self {
            names: Names::new(&options.transport, connector.db()),
            commands: Commands::new(connector),
            visibility_timeout: options.transport.visibility_timeout,
        })
    }

    /// Returns the state of the server.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn server(&self) -> Result<ServerState, BrokerError> {
        self.commands
            .run("INFO", async |connection| self.read_state(connection).await)
            .await
    }

    async fn read_state(&self, connection: &mut MultiplexedConnection) -> RedisResult<ServerState> {
        let info: String = cmd("INFO").query_async(connection).await?;
        let info: HashMap<_, _> = info
            .lines()
            .filter_map(|line| line.split_once(':'))
            .collect();
        let text = |key: &str| info.get(key).copied().unwrap_or_default().to_owned();
        // Some providers forbid CONFIG; snapshots have a trace in INFO, too.
        let saves: RedisResult<HashMap<String, String>> = cmd("CONFIG")
            .arg("GET")
            .arg("save")
            .query_async(connection)
            .await;
        let has_snapshots = match saves {
            Ok(saves) => saves.get("save").is_some_and(|rules| !rules.is_empty()),
            Err(_) => text("rdb_last_save_time") != text("uptime_in_seconds"),
        };
        let names = &self.names;
        let expired = scripts::expired(
            connection,
            names,
            self.visibility_timeout,
            usize::from(u16::MAX),
        )
        .await?;
        Ok(ServerState {
            place: self.commands.connector.place(),
            version: text("redis_version"),
            is_master: text("role") == "master",
            is_persistent: text("aof_enabled") == "1" || has_snapshots,
            eviction_policy: text("maxmemory_policy"),
            held: connection.hlen(&names.unacked).await?,
            expired: expired.len() as u64,
            parked_entries: connection.llen(names.parked_entries()).await?,
        })
    }

    /// Returns the time of the server's clock.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn time(&self) -> Result<DateTime<Utc>, BrokerError> {
        let (seconds, micros): (i64, i64) = self
            .commands
            .run("TIME", async |connection| {
                cmd("TIME").query_async(connection).await
            })
            .await?;
        let micros = seconds.saturating_mul(1_000_000).saturating_add(micros);
        Ok(DateTime::from_timestamp_micros(micros).unwrap_or_default())
    }

    /// Returns the state of a queue.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub async fn queue(&self, queue: &str) -> Result<QueueState, BrokerError> {
        self.commands
            .run("LLEN", async |connection| {
                let mut messages = 0;
                for list in self.names.lists(queue) {
                    messages += connection.llen::<_, u64>(list).await?;
                }
                let parked = connection.llen(self.names.parked(queue)).await?;
                Ok(QueueState { messages, parked })
            })
            .await
    }

    /// Publishes a message to a queue of its own, takes and acknowledges it, and subscribes to a channel: everything
    /// that a worker needs the permission for.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses a command.
    pub async fn try_commands(&self) -> Result<(), BrokerError> {
        let names = &self.names;
        let queue = format!("celery-worker.probe.{}", Uuid::new_v4());
        let text = virtual_message::encode(
            &RawMessage::default(),
            ("", &queue),
            BodyEncoding::default(),
        );
        let outgoing = PublishRequest {
            id: Uuid::new_v4().to_string(),
            text,
            lists: vec![names.list(&queue, 0)],
            expires_ms: 60_000,
            channel: Some(names.channel(&queue, "")),
        };
        let from = [ClaimFrom {
            queue: queue.clone(),
            room: 1,
            is_recorded: true,
        }];
        let fields = [Uuid::new_v4().to_string()];
        let limits = MessageLimits::from(&Subscription::new("probe", Vec::new()));
        self.commands
            .run("a command of a worker", async |connection| {
                cmd("CLIENT")
                    .arg("TRACKING")
                    .arg("ON")
                    .query_async::<()>(connection)
                    .await?;
                connection.psubscribe(names.channel(&queue, "")).await?;
                scripts::publish(connection, names, &outgoing).await?;
                scripts::claim(connection, names, &from, true, limits, &fields).await?;
                scripts::renew(connection, names, &fields).await?;
                scripts::remove(connection, names, &fields).await?;
                let members: Vec<String> = connection.smembers(names.bindings(&queue)).await?;
                drop(members);
                Ok(())
            })
            .await
    }
}
