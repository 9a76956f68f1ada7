//! A [`celery::Celery`] app that publishes through a [`Broker`].
//!
//! The crate's own brokers are not used: its AMQP broker publishes without confirms, and supports neither TLS nor
//! queues with arguments. But the crate cannot build an app without one of its brokers. Therefore the app is built with
//! the crate's Redis broker and a local port without a Redis server (`redis` 0.22 sends nothing when it connects to
//! database 0 without a password), and the broker is replaced afterwards. This depends on the exact version that
//! `Cargo.toml` pins; the test below fails if it no longer works.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use celery::Celery;
use celery::CeleryBuilder;
use celery::broker::{Broker as CrateBroker, Delivery, DeliveryStream};
use celery::error::{BrokerError, CeleryError};
use celery::protocol::Message;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::broker::{Broker, Publication, Sending, TaskQueues, TracePropagation};
use crate::clock;
use celery_protocol::{Properties, RawMessage, isoformat, repr};
use service_connection::error_chain::chain;

/// Options for the messages of an app.
#[derive(Debug, Clone)]
pub struct Producing {
    /// Node name of the app.
    pub hostname: String,
    /// Queue for signatures that name none.
    pub default_queue: String,
    /// Names in messages by a task type's `NAME`, for types whose names differ.
    pub names: HashMap<&'static str, String>,
    /// Declarations of the queues.
    pub queues: TaskQueues,
    /// Queue for `rpc://` results.
    pub reply_to: Option<String>,
    /// Time limit of a publication with all its attempts.
    pub within: Duration,
    /// Transfers the sender's trace to the receiver.
    pub propagation: Arc<dyn TracePropagation>,
}

/// Creates an app that publishes through `broker`. Opens no connection to the broker.
///
/// # Errors
/// [`CeleryError::IoError`] if no local port is available.
pub async fn build(broker: Arc<dyn Broker>, producing: Producing) -> Result<Celery, CeleryError> {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("redis://{}", silent.local_addr()?);
    let mut app = CeleryBuilder::new("celery", &url)
        .hostname(&producing.hostname)
        .default_queue(&producing.default_queue)
        // With late acknowledgement, a transfer survives the death of its worker; the manager handles retries, not the
        // crate.
        .acks_late(true)
        .task_max_retries(0)
        .build()
        .await?;
    app.broker = Box::new(Producer { broker, producing });
    Ok(app)
}

/// The broker for the crate ([`CrateBroker`]), for publishing only; this crate's worker consumes by itself.
struct Producer {
    broker: Arc<dyn Broker>,
    producing: Producing,
}

impl Producer {
    fn unsupported<T>(&self, what: &str) -> Result<T, BrokerError> {
        Err(BrokerError::IoError(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{what} is done by this crate's worker, not by the celery crate"),
        )))
    }
}

#[async_trait]
impl CrateBroker for Producer {
    fn safe_url(&self) -> String {
        self.broker.masked_url()
    }

    async fn send(&self, message: &Message, queue: &str) -> Result<(), BrokerError> {
        let delay = message
            .headers
            .eta
            .and_then(|eta| (eta - clock::now()).to_std().ok());
        let route = self
            .producing
            .queues
            .route(queue, delay.unwrap_or_default());
        let mut publication = Publication {
            exchange: route.exchange,
            routing_key: route.routing_key,
            message: encode(message, &self.producing)?,
            declare: Some(route.declare),
            mandatory: true,
            queue_lifetime: None,
        };
        let sending = Sending::begin(
            &mut publication,
            &*self.broker,
            &*self.producing.propagation,
        );
        let within = self.producing.within;
        let sent = self.broker.publish(&publication, within).await;
        // The crate's error type supports only lapin 2. The text with all causes is kept, and the kind of error states
        // whether the broker has answered.
        let sent = sent.map_err(|e| (kind(&e), chain(&e).to_string()));
        sending.end(&sent.as_ref().copied().map_err(|(_, text)| text));
        sent.map_err(|(kind, text)| BrokerError::IoError(io::Error::new(kind, text)))
    }

    async fn consume(
        &self,
        _queue: &str,
        _error_handler: Box<dyn Fn(BrokerError) + Send + Sync + 'static>,
    ) -> Result<(String, Box<dyn DeliveryStream>), BrokerError> {
        self.unsupported("consuming")
    }

    async fn cancel(&self, _consumer_tag: &str) -> Result<(), BrokerError> {
        self.unsupported("cancelling a consumer")
    }

    async fn ack(&self, _delivery: &dyn Delivery) -> Result<(), BrokerError> {
        self.unsupported("acknowledging")
    }

    async fn retry(
        &self,
        _delivery: &dyn Delivery,
        _eta: Option<DateTime<Utc>>,
    ) -> Result<(), BrokerError> {
        self.unsupported("retrying")
    }

    async fn increase_prefetch_count(&self) -> Result<(), BrokerError> {
        self.unsupported("prefetching")
    }

    async fn decrease_prefetch_count(&self) -> Result<(), BrokerError> {
        self.unsupported("prefetching")
    }

    async fn close(&self) -> Result<(), BrokerError> {
        self.broker.close().await;
        Ok(())
    }

    /// Connects for publishing, unless this was done before.
    async fn reconnect(&self, connection_timeout: u32) -> Result<(), BrokerError> {
        self.broker
            .prepare(Duration::from_secs(connection_timeout.into()))
            .await
            .map_err(|e| BrokerError::IoError(io::Error::other(chain(&e).to_string())))
    }
}

/// The kind of error by which [`is_unanswered`] recognizes a publication without an answer.
fn kind(error: &crate::broker::BrokerError) -> io::ErrorKind {
    use crate::broker::BrokerError::{GivenUp, Timeout, Unreachable};
    match error {
        Unreachable { .. } | GivenUp { .. } => io::ErrorKind::NotConnected,
        Timeout { .. } => io::ErrorKind::TimedOut,
        _ => io::ErrorKind::Other,
    }
}

/// Returns true if a publication of an app failed without an answer of the broker, and false if the broker refused it.
#[must_use]
pub fn is_unanswered(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotConnected | io::ErrorKind::TimedOut
    )
}

/// Creates a protocol 2 message with every header of a Python producer, so that monitors show it like one of Python's.
fn encode(message: &Message, producing: &Producing) -> Result<RawMessage, BrokerError> {
    let h = &message.headers;
    let task = producing
        .names
        .get(h.task.as_str())
        .cloned()
        .unwrap_or_else(|| h.task.clone());
    let body: Value = serde_json::from_slice(&message.raw_body)?;
    let args = body
        .get(0)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let kwargs = body
        .get(1)
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let headers = [
        ("lang", json!("py")),
        ("task", json!(task)),
        ("id", json!(h.id)),
        ("shadow", json!(h.shadow)),
        ("eta", json!(h.eta.map(isoformat))),
        ("expires", json!(h.expires.map(isoformat))),
        ("group", json!(h.group)),
        ("group_index", Value::Null),
        ("retries", json!(h.retries.unwrap_or(0))),
        ("timelimit", json!(h.timelimit)),
        ("root_id", json!(h.root_id.as_ref().unwrap_or(&h.id))),
        ("parent_id", json!(h.parent_id)),
        ("argsrepr", json!(repr::shorten(&repr::tuple(&args)))),
        ("kwargsrepr", json!(repr::shorten(&repr::dict(&kwargs)))),
        ("origin", json!(h.origin)),
        ("ignore_result", Value::Null),
        ("replaced_task_nesting", json!(0)),
        ("stamped_headers", Value::Null),
        ("stamps", json!({})),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    Ok(RawMessage {
        headers: headers.into_iter().collect(),
        properties: Properties {
            content_type: Some(message.properties.content_type.clone()),
            content_encoding: Some(message.properties.content_encoding.clone()),
            correlation_id: Some(message.properties.correlation_id.clone()),
            reply_to: message
                .properties
                .reply_to
                .clone()
                .or_else(|| producing.reply_to.clone()),
            priority: Some(0),
            expiration: None,
            persistent: true,
            ..Properties::default()
        },
        body: message.raw_body.clone(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use celery::task::{Request, Signature, Task, TaskOptions, TaskResult};
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::broker::NoPropagation;
    use crate::broker::memory::MemoryBroker;
    use crate::broker::{Declaration, Queue};
    use celery_protocol::content::Accept;
    use celery_protocol::message::decode;

    #[derive(Clone, Serialize, Deserialize)]
    struct Params {
        x: i64,
    }

    struct Add(Request<Self>, TaskOptions);

    #[async_trait]
    impl Task for Add {
        const NAME: &'static str = "add";
        const ARGS: &'static [&'static str] = &["x"];
        type Params = Params;
        type Returns = i64;

        fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
            Self(request, options)
        }
        fn request(&self) -> &Request<Self> {
            &self.0
        }
        fn options(&self) -> &TaskOptions {
            &self.1
        }
        async fn run(&self, params: Params) -> TaskResult<i64> {
            Ok(params.x)
        }
    }

    /// Checks the pinned version of the crate: an app is created without a Redis server, and publishes through this
    /// crate's [`Broker`].
    #[tokio::test]
    async fn an_app_without_the_crates_brokers() {
        let broker = MemoryBroker::recording();
        let producing = Producing {
            hostname: "celery@test".into(),
            default_queue: "q".into(),
            names: HashMap::from([("add", "package.add".to_owned())]),
            queues: TaskQueues::default(),
            reply_to: Some("replies".into()),
            within: Duration::from_secs(1),
            propagation: Arc::new(NoPropagation),
        };
        let app = build(Arc::new(broker.clone()), producing).await.unwrap();
        let result = app
            .send_task(Signature::<Add>::new(Params { x: 4 }))
            .await
            .unwrap();

        let publication = broker.take_recorded().pop().unwrap();
        assert_eq!(
            (publication.routing_key.as_str(), publication.mandatory),
            ("q", true)
        );
        assert_eq!(
            publication.declare,
            Some(Declaration::Queue(Queue::tasks("q")))
        );
        let message = decode(&publication.message, &Accept::json(1 << 20)).unwrap();
        assert_eq!(message.id, result.task_id);
        assert_eq!(message.task, "package.add");
        assert_eq!(message.kwargs, json!({"x": 4}));
        assert_eq!(message.root_id.as_deref(), Some(result.task_id.as_str()));
        assert_eq!(message.argsrepr.as_deref(), Some("()"));
        assert_eq!(message.kwargsrepr.as_deref(), Some("{'x': 4}"));
        assert_eq!(message.reply_to.as_deref(), Some("replies"));
        assert_eq!(publication.message.headers["lang"], "py");
    }
}
