//! Publications of task messages, with their route, and of events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use celery_protocol::canvas::{Outgoing, Route};
use celery_protocol::event::{SentTask, Stamp};
use celery_protocol::message::JSON;
use celery_protocol::{Properties, RawMessage};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::broker::{Broker, Declaration, Exchange, Publication, TaskQueues, TaskRoute};
use crate::clock;
use service_connection::error_chain::chain;

/// Time limit for publishing an event.
const WITHIN: Duration = Duration::from_secs(5);

/// Makes publications of the tasks that a client or a worker sends.
pub(crate) struct TaskPublisher {
    default_queue: String,
    queues: TaskQueues,
    origin: String,
    /// Lamport clock of the events `task-sent`; `None` if they are not wanted.
    sent_events: Option<AtomicU64>,
}

impl TaskPublisher {
    /// A publisher for the process on a host; of a node name, the part behind `@` is the host.
    pub(crate) fn new(
        hostname: &str,
        default_queue: String,
        queues: TaskQueues,
        sent_events: bool,
    ) -> Self {
        let host = hostname.rsplit('@').next().unwrap_or_default();
        Self {
            default_queue,
            queues,
            origin: format!("gen{}@{host}", std::process::id()),
            sent_events: sent_events.then(AtomicU64::default),
        }
    }

    /// Name of the sender in the header `origin` and in events, as Celery's clients have it.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// A message with its route; a queue is declared first.
    pub(crate) fn publication(&self, Outgoing { message, route }: Outgoing) -> Publication {
        let to_exchange = |exchange: &str, routing_key: &str, message| Publication {
            exchange: exchange.to_owned(),
            routing_key: routing_key.to_owned(),
            message,
            declare: None,
            mandatory: true,
            queue_lifetime: None,
        };
        let task = message.headers.get("task").and_then(Value::as_str);
        let queue = match &route {
            Route::Exchange { name, routing_key } => {
                return to_exchange(name, routing_key, message);
            }
            Route::Queue(queue) => queue,
            Route::Default => match task.and_then(|task| self.queues.task_route(task)) {
                Some(TaskRoute::Exchange {
                    exchange,
                    routing_key,
                }) => return to_exchange(exchange, routing_key, message),
                Some(TaskRoute::Queue(queue)) => queue,
                None => &self.default_queue,
            },
        };
        let eta = message.headers.get("eta").and_then(Value::as_str);
        let eta = eta.and_then(|eta| DateTime::parse_from_rfc3339(eta).ok());
        let delay = eta.and_then(|eta| (eta.to_utc() - clock::now()).to_std().ok());
        let route = self.queues.route(queue, delay.unwrap_or_default());
        Publication {
            exchange: route.exchange,
            routing_key: route.routing_key,
            message,
            declare: Some(route.declare),
            mandatory: true,
            queue_lifetime: None,
        }
    }

    /// The event `task-sent` of a message that was published; `None` if such events are not wanted.
    pub(crate) fn sent_event(&self, sent: &Publication) -> Option<Publication> {
        let clock = self.sent_events.as_ref()?;
        let event = SentTask {
            headers: &sent.message.headers,
            queue: match &sent.declare {
                Some(Declaration::Queue(queue) | Declaration::Delayed(queue, _)) => &queue.name,
                // As in Celery, also for a message that goes through an exchange.
                Some(Declaration::Exchange(_)) | None => &self.default_queue,
            },
            exchange: &sent.exchange,
            routing_key: &sent.routing_key,
        };
        let clock = clock.fetch_add(1, Ordering::Relaxed) + 1;
        let body = serde_json::to_string(&event.stamped(stamp(&self.origin, clock))).ok()?;
        Some(event_publication(
            &self.origin,
            SentTask::EVENT_KEY.into(),
            body,
        ))
    }
}

/// Publishes an event. A failure is ignored: what the event reports has happened, and later it would be outdated.
pub(crate) async fn send_event(broker: &dyn Broker, event: &Publication) {
    if broker.blocked().is_none()
        && let Err(error) = broker.publish(event, WITHIN).await
    {
        tracing::debug!(error = %chain(&error), "events were not sent");
    }
}

/// The stamp of an event that happens now.
pub(crate) fn stamp(hostname: &str, clock: u64) -> Stamp<'_> {
    Stamp {
        hostname,
        pid: std::process::id(),
        clock,
        timestamp: unix_seconds(clock::now()),
        // The integer is negated: a float would become -0.0.
        utcoffset: f64::from(-clock::local_offset()) / 3600.0,
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_micros() as f64 / 1e6
}

/// One event or a list of events, for the exchange of events.
pub(crate) fn event_publication(hostname: &str, routing_key: String, body: String) -> Publication {
    let exchange = Exchange::events();
    let headers = [("hostname".to_owned(), json!(hostname))];
    Publication {
        exchange: exchange.name.clone(),
        routing_key,
        message: RawMessage {
            headers: headers.into_iter().collect(),
            properties: Properties {
                content_type: Some(JSON.into()),
                content_encoding: Some("utf-8".into()),
                priority: Some(0),
                ..Properties::default()
            },
            body: body.into_bytes(),
        },
        declare: Some(Declaration::Exchange(exchange)),
        mandatory: false,
        queue_lifetime: None,
    }
}
