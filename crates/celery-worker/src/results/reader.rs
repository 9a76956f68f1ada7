//! The other side of a result backend: a producer that waits for a result.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret as _;
use serde_json::Value;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{Kind, Options, ResultBackend, ResultError};
use crate::broker::{Consumer, Queue, Subscription, Transport, Verdict};

/// Pause between two looks at a backend that keeps results.
const POLL: Duration = Duration::from_millis(100);

/// Waits for the results of tasks that this process sent.
pub enum ResultReader {
    /// Reads its own reply queue.
    Rpc {
        /// Name of the queue; producers put it into `reply_to`.
        queue: String,
        /// Reads it.
        consumer: Consumer,
        /// Results that came before they were asked for.
        early: HashMap<String, Value>,
    },
    /// Looks at what is stored.
    Stored(Arc<dyn ResultBackend>),
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The backend.
    #[error(transparent)]
    Backend(#[from] ResultError),
    /// There is none.
    #[error("results are stored nowhere; celery.result_backend says where they should be")]
    Disabled,
    /// The broker is not reachable, or refuses.
    #[error(
        "no reply queue at {broker} within {}; is the broker up, and celery.broker_url right?",
        humantime::format_duration(*.within)
    )]
    NoReplyQueue {
        /// Where, without password.
        broker: String,
        /// How long was waited.
        within: Duration,
    },
    /// It takes too long; the task may still run.
    #[error("no result within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
}

impl ResultReader {
    /// A reader for the backend that the options name. With `rpc://` it is open only once the reply
    /// queue exists: a result that comes before is dropped by the broker.
    ///
    /// # Errors
    /// [`ReadError::Backend`] or [`ReadError::Disabled`] where the URL names no backend that can be
    /// read, [`ReadError::NoReplyQueue`] if the broker does not give one `within` that time.
    pub async fn open(
        options: &Options,
        transport: &Arc<dyn Transport>,
        within: Duration,
    ) -> Result<Self, ReadError> {
        match Kind::of(options.url.expose_secret())? {
            Kind::Disabled => Err(ReadError::Disabled),
            Kind::Rpc => {
                let queue = Uuid::new_v4().to_string();
                let consumer = transport.consume(Subscription {
                    purpose: "results",
                    queues: vec![Queue::replies(&queue)],
                    prefetch: 0,
                    delayed: None,
                    max_body_bytes: None,
                    max_waiting_body_bytes: None,
                });
                let mut connected = consumer.connected();
                match timeout(within, connected.wait_for(|served| *served)).await {
                    Ok(Ok(_)) => {}
                    _ => {
                        let broker = transport.masked_url();
                        return Err(ReadError::NoReplyQueue { broker, within });
                    }
                }
                Ok(Self::Rpc {
                    queue,
                    consumer,
                    early: HashMap::new(),
                })
            }
            Kind::Redis | Kind::Database => {
                Ok(Self::Stored(super::open(options, transport.clone())?))
            }
        }
    }

    /// What a producer puts into `reply_to`.
    #[must_use]
    pub fn reply_to(&self) -> Option<&str> {
        match self {
            Self::Rpc { queue, .. } => Some(queue),
            Self::Stored(_) => None,
        }
    }

    /// Waits for the final result of a task: the mapping of [`celery_protocol::result`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn wait(&mut self, task_id: &str, within: Duration) -> Result<Value, ReadError> {
        match timeout(within, self.read(task_id)).await {
            Ok(read) => Ok(read?),
            Err(_) => Err(ReadError::Timeout(within)),
        }
    }

    async fn read(&mut self, task_id: &str) -> Result<Value, ResultError> {
        match self {
            Self::Rpc {
                consumer, early, ..
            } => loop {
                if let Some(meta) = early.remove(task_id) {
                    return Ok(meta);
                }
                let Some(delivery) = consumer.next().await else {
                    std::future::pending().await
                };
                let meta = serde_json::from_slice(&delivery.message.body);
                delivery.settle(Verdict::Ack).await;
                if let Some((id, meta)) = meta.ok().and_then(ended) {
                    early.insert(id, meta);
                }
            },
            Self::Stored(backend) => loop {
                if let Some((_, meta)) = backend.get(task_id).await?.and_then(ended) {
                    return Ok(meta);
                }
                sleep(POLL).await;
            },
        }
    }
}

/// The mapping and whose it is, if it is final.
fn ended(meta: Value) -> Option<(String, Value)> {
    let is_final = matches!(
        meta["status"].as_str(),
        Some("SUCCESS" | "FAILURE" | "REVOKED")
    );
    let id = meta["task_id"].as_str()?.to_owned();
    is_final.then_some((id, meta))
}
