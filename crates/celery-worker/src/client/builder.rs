//! A client from URLs.

use std::sync::Arc;
use std::time::Duration;

use super::{Client, ClientOptions};
use secrecy::{ExposeSecret as _, SecretString};

use crate::broker::{self, BrokerError, TaskQueues, TracePropagation};
use crate::results::{self, ResultError};

/// Reason why no client was built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The broker's URL cannot be used, or the broker does not answer.
    #[error("no connection to the broker")]
    Broker(#[from] BrokerError),
    /// The result backend's URL cannot be used.
    #[error("the result backend cannot be used")]
    Results(#[from] ResultError),
}

/// Builds a [`Client`].
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// use celery_worker::client::Client;
///
/// let client = Client::builder("memory://").default_queue("fast").build().await?;
/// # drop(client);
/// assert!(Client::builder("ftp://host").build().await.is_err());
/// # Ok::<(), celery_worker::client::ConnectError>(())
/// # }).unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    broker_url: SecretString,
    results: results::ResultOptions,
    options: ClientOptions,
}

impl ClientBuilder {
    pub(super) fn new(broker_url: impl Into<String>) -> Self {
        Self {
            broker_url: SecretString::from(broker_url.into()),
            results: results::ResultOptions::new(""),
            options: ClientOptions::default(),
        }
    }

    /// Reads results from the backend of this URL: `rpc://`, `redis://…`, `db+postgresql://…`. Without
    /// it, results cannot be read.
    #[must_use]
    pub fn results(self, url: impl Into<String>) -> Self {
        self.result_options(results::ResultOptions::new(url.into()))
    }

    /// Reads results from a backend with more settings than a URL.
    #[must_use]
    pub fn result_options(self, results: results::ResultOptions) -> Self {
        Self { results, ..self }
    }

    /// Sets the queue for messages that do not name one; `celery` by default.
    #[must_use]
    pub fn default_queue(mut self, queue: impl Into<String>) -> Self {
        self.options.default_queue = queue.into();
        self
    }

    /// Declares queues as the workers do.
    #[must_use]
    pub fn queues(mut self, queues: TaskQueues) -> Self {
        self.options.queues = queues;
        self
    }

    /// Limits the time for publishing one message, reconnecting included.
    #[must_use]
    pub fn publish_timeout(mut self, limit: Duration) -> Self {
        self.options.publish_timeout = limit;
        self
    }

    /// Gives a task that a task sends the priority of its parent.
    #[must_use]
    pub fn inherit_parent_priority(mut self, inherit: bool) -> Self {
        self.options.inherit_parent_priority = inherit;
        self
    }

    /// Sends an event `task-sent` for each task (`task_send_sent_event`), for monitors such as Flower.
    #[must_use]
    pub fn task_sent_events(mut self, enabled: bool) -> Self {
        self.options.task_sent_events = enabled;
        self
    }

    /// Carries the trace of the caller to the receivers of its messages.
    #[must_use]
    pub fn trace_propagation(mut self, propagation: Arc<dyn TracePropagation>) -> Self {
        self.options.propagation = propagation;
        self
    }

    /// Connects to the broker.
    ///
    /// # Errors
    /// [`ConnectError`] if a URL cannot be used, or the broker does not answer within the time limit
    /// for publishing.
    pub async fn build(self) -> Result<Client, ConnectError> {
        let broker = broker::open(self.broker_url.expose_secret(), "client")?;
        let results = results::open(&self.results, Arc::clone(&broker))?;
        broker.prepare(self.options.publish_timeout).await?;
        Ok(Client::of(broker, results, self.options))
    }
}
