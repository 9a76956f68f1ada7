//! Heartbeats for CCAT's monitors: keys in Redis that exist while a service or a task lives.
//!
//! The Python services keep `health:{service_type}:{service_name}` = `alive`, written every 30 s with a lifetime of 90 s.
//! Off unless the settings name a Redis. Nothing waits for these keys; one that cannot be written is logged.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::AsyncCommands;
use secrecy::ExposeSecret;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::settings;
use celery_worker::results::{self, ResultError};
use service_connection::error_chain::chain;

/// Time limit of one heartbeat.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// A cause of any type.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Destination of heartbeats.
#[async_trait]
pub trait HeartbeatWriter: Send + Sync {
    /// Writes a heartbeat of `key`.
    ///
    /// # Errors
    /// It could not be written. The next heartbeat follows after the interval.
    async fn beat(&self, key: &str) -> Result<(), Cause>;

    /// Removes `key` when its service or task has ended.
    ///
    /// # Errors
    /// It could not be removed. Its last heartbeat expires.
    async fn end(&self, key: &str) -> Result<(), Cause>;
}

/// Keys in Redis with the value `alive` and a lifetime. Heartbeats are rare, so each has its own connection.
pub struct RedisKeys {
    client: redis::Client,
    ttl: Duration,
}

impl RedisKeys {
    /// Creates the writer; a connection is opened for each heartbeat.
    ///
    /// # Errors
    /// The URL cannot be used.
    pub fn new(url: &str, ttl: Duration) -> Result<Self, ResultError> {
        let client = results::redis_client(url)?;
        Ok(Self { client, ttl })
    }
}

#[async_trait]
impl HeartbeatWriter for RedisKeys {
    async fn beat(&self, key: &str) -> Result<(), Cause> {
        let seconds = self.ttl.as_secs().max(1);
        let mut connection = self.client.get_multiplexed_async_connection().await?;
        Ok(connection.set_ex(key, "alive", seconds).await?)
    }

    async fn end(&self, key: &str) -> Result<(), Cause> {
        let mut connection = self.client.get_multiplexed_async_connection().await?;
        Ok(connection.del(key).await?)
    }
}

/// The heartbeats of a process.
#[derive(Clone, Default)]
pub struct Heartbeats {
    writer: Option<Arc<dyn HeartbeatWriter>>,
    service_type: String,
    task_key: String,
    every: Duration,
}

impl Heartbeats {
    /// Creates the heartbeats that the settings define.
    ///
    /// # Errors
    /// The URL cannot be used.
    pub fn new(settings: &settings::Health) -> Result<Self, ResultError> {
        let url = settings.redis_url.expose_secret();
        let writer = match url {
            "" => None,
            url => Some(Arc::new(RedisKeys::new(url, settings.ttl)?) as Arc<dyn HeartbeatWriter>),
        };
        Ok(Self {
            writer,
            service_type: settings.service_type.clone(),
            task_key: settings.task_key.clone(),
            every: settings.interval,
        })
    }

    /// Creates heartbeats that `writer` writes.
    #[must_use]
    pub fn with_writer(mut self, writer: Arc<dyn HeartbeatWriter>) -> Self {
        self.writer = Some(writer);
        self
    }

    /// Sends heartbeats of a service until the returned value is dropped.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<Heartbeat> {
        self.keep(format!("health:{}:{name}", self.service_type))
    }

    /// Sends heartbeats of a task until the returned value is dropped, if the settings have a key for it.
    #[must_use]
    pub fn task(&self, task_id: &str) -> Option<Heartbeat> {
        match self.task_key.as_str() {
            "" => None,
            key => self.keep(key.replace("{task_id}", task_id)),
        }
    }

    fn keep(&self, key: String) -> Option<Heartbeat> {
        let writer = self.writer.clone()?;
        let beats = tokio::spawn(beat(writer.clone(), key.clone(), self.every));
        Some(Heartbeat {
            beats: Some(AbortOnDropHandle::new(beats)),
            writer,
            key,
        })
    }
}

/// A sequence of heartbeats. Dropping it removes the key.
pub struct Heartbeat {
    beats: Option<AbortOnDropHandle<()>>,
    writer: Arc<dyn HeartbeatWriter>,
    key: String,
}

impl Heartbeat {
    /// Ends the heartbeats, and waits for the removal of the key.
    pub async fn end(mut self) {
        if let Some(beats) = self.beats.take() {
            beats.abort();
            let _ = beats.await;
            remove(&*self.writer, &self.key).await;
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        let (Some(beats), Ok(runtime)) = (self.beats.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let (writer, key) = (self.writer.clone(), std::mem::take(&mut self.key));
        runtime.spawn(async move {
            beats.abort();
            let _ = beats.await;
            remove(&*writer, &key).await;
        });
    }
}

async fn beat(writer: Arc<dyn HeartbeatWriter>, key: String, every: Duration) {
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        report(&key, timeout(WRITE_TIMEOUT, writer.beat(&key)).await);
    }
}

async fn remove(writer: &dyn HeartbeatWriter, key: &str) {
    report(key, timeout(WRITE_TIMEOUT, writer.end(key)).await);
}

fn report(key: &str, written: Result<Result<(), Cause>, tokio::time::error::Elapsed>) {
    let error = match written {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&*error).to_string(),
        Err(_) => "no answer in time".into(),
    };
    tracing::warn!(
        key,
        error,
        "heartbeat could not be written; monitors may report this process as dead"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl Kept {
        fn note(&self, what: &str, key: &str) {
            if let Ok(mut notes) = self.0.lock() {
                notes.push(format!("{what} {key}"));
            }
        }
        fn count(&self, note: &str) -> usize {
            self.0
                .lock()
                .map_or(0, |notes| notes.iter().filter(|n| *n == note).count())
        }
    }

    #[async_trait]
    impl HeartbeatWriter for Kept {
        async fn beat(&self, key: &str) -> Result<(), Cause> {
            self.note("beat", key);
            Err("a failure does not end it".into())
        }
        async fn end(&self, key: &str) -> Result<(), Cause> {
            self.note("end", key);
            Ok(())
        }
    }

    #[tokio::test]
    async fn heartbeats_are_written_until_the_end() {
        let kept = Arc::new(Kept::default());
        let health = Heartbeats {
            service_type: "data_transfer".into(),
            task_key: "task:{task_id}".into(),
            every: Duration::from_millis(1),
            ..Heartbeats::default()
        }
        .with_writer(kept.clone());
        let (service, task) = (health.service("transfer_manager"), health.task("a"));
        while kept.count("beat health:data_transfer:transfer_manager") < 3
            || kept.count("beat task:a") < 3
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(task);
        if let Some(service) = service {
            service.end().await;
        }
        while kept.count("end task:a") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(kept.count("end health:data_transfer:transfer_manager"), 1);
    }

    #[test]
    fn without_redis_no_heartbeat_is_written() {
        assert!(Heartbeats::default().service("x").is_none());
        assert!(Heartbeats::default().task("x").is_none());
    }
}
