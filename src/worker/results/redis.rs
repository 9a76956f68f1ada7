//! `redis://`: results as JSON under `celery-task-meta-<id>`, announced on a channel of that name.

use std::time::Duration;

use async_trait::async_trait;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, Client};
use serde_json::Value;

use super::chord::{ChordOptions, Chords};
use super::{ChordSupport, ResultBackend, ResultError};
use crate::wire::message::TaskMessage;
use crate::wire::result::ResultMeta;

/// Time for one answer, and for one attempt to connect.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Stores results in Redis.
pub struct Redis {
    connection: ConnectionManager,
    expires_seconds: u64,
}

/// The key, and the channel, of a task's result.
pub(super) fn key(task_id: &str) -> String {
    format!("celery-task-meta-{task_id}")
}

/// A connection that is opened when it is first used, and mends itself. Each command is tried
/// once: a result that could not be stored is repeated by the worker.
pub(super) fn connection(url: &str) -> Result<ConnectionManager, redis::RedisError> {
    let config = ConnectionManagerConfig::new()
        .set_number_of_retries(0)
        .set_connection_timeout(Some(TIMEOUT))
        .set_response_timeout(Some(TIMEOUT));
    Client::open(url)?.get_connection_manager_lazy(config)
}

impl Redis {
    /// A backend at `url`; results vanish after `expires_seconds`, or never if that is 0.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub fn new(url: &str, expires_seconds: u64) -> Result<Self, ResultError> {
        Ok(Self {
            connection: connection(url)?,
            expires_seconds,
        })
    }
}

#[async_trait]
impl ResultBackend for Redis {
    fn chords(&self) -> ChordSupport {
        let options = ChordOptions {
            ordered: true,
            expires_seconds: self.expires_seconds,
            result_expires_seconds: self.expires_seconds,
        };
        ChordSupport::Counted(Chords::new(self.connection.clone(), "", options))
    }

    async fn get(&self, id: &str) -> Result<Option<Value>, ResultError> {
        let stored: Option<String> = self.connection.clone().get(key(id)).await?;
        Ok(stored.and_then(|text| serde_json::from_str(&text).ok()))
    }

    async fn store(&self, meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        let mut connection = self.connection.clone();
        let key = key(&meta.task_id);
        let stored: Option<String> = connection.get(&key).await?;
        if stored.is_some_and(|text| is_success(&text)) {
            return Ok(());
        }
        let value = meta.to_json().to_string();
        let mut both = redis::pipe();
        both.atomic();
        if self.expires_seconds == 0 {
            both.set(&key, &value).ignore();
        } else {
            both.set_ex(&key, &value, self.expires_seconds).ignore();
        }
        both.publish(&key, &value).ignore();
        Ok(both.query_async(&mut connection).await?)
    }
}

/// Whether a stored result is a SUCCESS, which nothing overwrites.
fn is_success(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|meta| meta["status"] == "SUCCESS")
}
