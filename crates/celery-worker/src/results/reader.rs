//! The reading side of a result backend: a producer that waits for a result.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use secrecy::ExposeSecret as _;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::{ResultAccess, ResultBackend, ResultError, ResultOptions};
use crate::broker::{Broker, Consumer, Disposition, Queue, Subscription};
use celery_protocol::result::{FinalState, read_message};
use service_connection::error_chain::chain;

/// First and longest pause between two queries of a backend that stores results.
const POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Maximum number of replies that are kept until they are read; Celery keeps the same number.
const MAX_REPLIES: usize = 8192;

/// Waits for the results of tasks that this process sent. Several tasks may use it concurrently.
pub struct ResultReader(Source);

enum Source {
    /// A reply queue of this process.
    Replies(ReplyQueue),
    /// Stored results.
    Stored(Arc<dyn ResultBackend>),
}

/// A reply queue, and the replies received from it.
struct ReplyQueue {
    queue: String,
    arrived: Arc<Arrived>,
    _receiving: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Arrived {
    metas: Mutex<Metas>,
    changed: Notify,
}

/// The newest known state of each task; the oldest entries are dropped.
#[derive(Default)]
struct Metas {
    by_task: HashMap<String, Value>,
    order: VecDeque<String>,
}

/// Reason why no result could be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The backend reported an error.
    #[error(transparent)]
    Backend(#[from] ResultError),
    /// No backend is configured.
    #[error("results are not stored; set a result backend")]
    Disabled,
    /// The broker cannot be reached, or rejects the reply queue.
    #[error(
        "no reply queue at {broker} within {}; check that the broker runs, and its URL",
        humantime::format_duration(*.within)
    )]
    NoReplyQueue {
        /// Location of the broker, without password.
        broker: String,
        /// Time that was waited.
        within: Duration,
    },
    /// No result within this time; the task may still run.
    #[error("no result within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
}

impl ResultReader {
    /// Creates a reader for the backend that the options name. With `rpc://` it returns only once the reply queue
    /// exists: the broker would drop an earlier result.
    ///
    /// # Errors
    /// [`ReadError::Backend`] or [`ReadError::Disabled`] if results cannot be read from the backend of the URL,
    /// [`ReadError::NoReplyQueue`] if the broker does not create the reply queue `within` that time.
    pub async fn open(
        options: &ResultOptions,
        broker: &Arc<dyn Broker>,
        within: Duration,
    ) -> Result<Self, ReadError> {
        if options.url.expose_secret().is_empty() {
            return Err(ReadError::Disabled);
        }
        let backend = super::open(options, broker.clone())?;
        Self::of(backend, broker.as_ref(), within).await
    }

    /// Creates a reader for a backend.
    ///
    /// # Errors
    /// [`ReadError::Disabled`], [`ReadError::NoReplyQueue`].
    pub async fn of(
        backend: Arc<dyn ResultBackend>,
        broker: &dyn Broker,
        within: Duration,
    ) -> Result<Self, ReadError> {
        match backend.access() {
            ResultAccess::Discarded => Err(ReadError::Disabled),
            ResultAccess::Stored => Ok(Self(Source::Stored(backend))),
            ResultAccess::Replies => {
                let replies = ReplyQueue::open(broker, within).await?;
                Ok(Self(Source::Replies(replies)))
            }
        }
    }

    /// Name of the reply queue for the message property `reply_to`; none for stored results.
    #[must_use]
    pub fn reply_to(&self) -> Option<&str> {
        match &self.0 {
            Source::Replies(replies) => Some(&replies.queue),
            Source::Stored(_) => None,
        }
    }

    /// Waits for the final result of a task and returns the mapping of [`celery_protocol::result`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn wait(&self, task_id: &str, within: Duration) -> Result<Value, ReadError> {
        let reading = async {
            match &self.0 {
                Source::Replies(replies) => Ok(replies.arrived.wait(task_id).await),
                Source::Stored(backend) => stored(&**backend, task_id).await,
            }
        };
        match timeout(within, reading).await {
            Ok(read) => Ok(read?),
            Err(_) => Err(ReadError::Timeout(within)),
        }
    }

    /// Returns the newest known state of a task; none before the first.
    ///
    /// # Errors
    /// [`ReadError::Backend`].
    pub async fn latest(&self, task_id: &str) -> Result<Option<Value>, ReadError> {
        match &self.0 {
            Source::Replies(replies) => Ok(replies.arrived.get(task_id)),
            Source::Stored(backend) => Ok(backend.get(task_id).await?),
        }
    }

    /// Discards a result, and deletes it from a backend that stores results.
    ///
    /// # Errors
    /// [`ReadError::Backend`].
    pub async fn forget(&self, task_id: &str) -> Result<(), ReadError> {
        match &self.0 {
            Source::Replies(replies) => {
                replies.arrived.forget(task_id);
                Ok(())
            }
            Source::Stored(backend) => Ok(backend.forget(task_id).await?),
        }
    }
}

async fn stored(backend: &dyn ResultBackend, task_id: &str) -> Result<Value, ResultError> {
    let (mut pause, longest) = POLL;
    loop {
        if let Some(meta) = backend.get(task_id).await?.filter(is_final) {
            return Ok(meta);
        }
        sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

impl ReplyQueue {
    async fn open(broker: &dyn Broker, within: Duration) -> Result<Self, ReadError> {
        let queue = Uuid::new_v4().to_string();
        let consumer = broker.consume(Subscription {
            purpose: "results",
            queues: vec![Queue::replies(&queue)],
            prefetch: 0,
            delayed: None,
            max_body_bytes: None,
            max_waiting_body_bytes: None,
            permits: None,
        });
        let mut connected = consumer.connected();
        match timeout(within, connected.wait_for(|served| *served)).await {
            Ok(Ok(_)) => {}
            _ => {
                let broker = broker.masked_url();
                return Err(ReadError::NoReplyQueue { broker, within });
            }
        }
        let arrived = Arc::new(Arrived::default());
        let receiving = tokio::spawn(receive(consumer, arrived.clone()));
        Ok(Self {
            queue,
            arrived,
            _receiving: AbortOnDropHandle::new(receiving),
        })
    }
}

async fn receive(mut consumer: Consumer, arrived: Arc<Arrived>) {
    while let Some(delivery) = consumer.next().await {
        let read = read_message(&delivery.message);
        delivery.settle(Disposition::Ack).await;
        match read {
            Ok(meta) => arrived.put(meta),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "a reply is not a result; it is dropped")
            }
        }
    }
}

impl Arrived {
    fn put(&self, meta: Value) {
        let Some(task_id) = meta["task_id"].as_str() else {
            return;
        };
        let mut metas = self.metas.lock().unwrap_or_else(PoisonError::into_inner);
        let task_id = task_id.to_owned();
        match metas.by_task.get(&task_id) {
            // A redelivered message may arrive after the final state of its task.
            Some(known) if is_final(known) && !is_final(&meta) => return,
            Some(_) => {}
            None => metas.order.push_back(task_id.clone()),
        }
        metas.by_task.insert(task_id, meta);
        if metas.order.len() > MAX_REPLIES
            && let Some(oldest) = metas.order.pop_front()
        {
            metas.by_task.remove(&oldest);
        }
        drop(metas);
        self.changed.notify_waiters();
    }

    fn get(&self, task_id: &str) -> Option<Value> {
        let metas = self.metas.lock().unwrap_or_else(PoisonError::into_inner);
        metas.by_task.get(task_id).cloned()
    }

    fn forget(&self, task_id: &str) {
        let mut metas = self.metas.lock().unwrap_or_else(PoisonError::into_inner);
        metas.by_task.remove(task_id);
        metas.order.retain(|known| known != task_id);
    }

    async fn wait(&self, task_id: &str) -> Value {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no notification is missed.
            changed.as_mut().enable();
            if let Some(meta) = self.get(task_id).filter(is_final) {
                return meta;
            }
            changed.await;
        }
    }
}

/// Returns true for a final state of a task.
fn is_final(meta: &Value) -> bool {
    FinalState::of(meta).is_some()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn replies_are_kept_until_they_are_requested() {
        let arrived = Arrived::default();
        arrived.put(json!({"task_id": "a", "status": "STARTED"}));
        assert_eq!(
            arrived.get("a").map(|meta| meta["status"].clone()),
            Some(json!("STARTED"))
        );
        arrived.put(json!({"task_id": "a", "status": "SUCCESS", "result": 1}));
        arrived.put(json!({"task_id": "a", "status": "STARTED"}));
        arrived.put(json!("no result"));
        assert_eq!(arrived.wait("a").await["result"], 1);
        arrived.forget("a");
        assert_eq!(arrived.get("a"), None);
        for number in 0..=MAX_REPLIES {
            arrived.put(json!({"task_id": number.to_string(), "status": "SUCCESS"}));
        }
        assert!(arrived.get("0").is_none() && arrived.get("1").is_some());
    }
}
