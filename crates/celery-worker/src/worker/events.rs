//! Sends events to monitors.
//!
//! Events are news: they are sent in order, as far as the broker takes them in time, and dropped
//! when it is away. Nothing a task does waits for them. Those of tasks go in lists, as Python's: what
//! has come while the broker confirmed the list before, and a moment longer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use chrono::{Local, Offset, Utc};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::bounded_queue::{BoundedQueue, Queued};
use crate::broker::{Broker, Declaration, Exchange, Publication};
use celery_protocol::event::{self, Event, Stamp};
use celery_protocol::message::JSON;
use celery_protocol::{Properties, RawMessage};
use service_connection::error_chain::chain;

/// Events on their way to the broker.
const QUEUE: usize = 10_000;

/// The same limit in bytes: senders of tasks choose the length of arguments in events.
const QUEUE_BYTES: usize = 8 << 20;

/// Largest accepted value of a clock. Larger integers are not exact in every implementation of JSON, and the
/// clock needs room to count.
const MAX_CLOCK: u64 = 1 << 52;

/// How long events gather after a list, so that a busy worker sends few long lists and not many short ones:
/// each costs the broker, the worker and every monitor the same. The first event of a quiet worker goes at once.
const GATHERING: Duration = Duration::from_millis(10);

/// How long the broker may take for one.
const WITHIN: Duration = Duration::from_secs(5);

/// How long the last ones may take.
const CLOSING: Duration = Duration::from_secs(2);

/// Stamps events and puts them in line.
pub(crate) struct Events {
    hostname: Arc<str>,
    tasks: AtomicBool,
    clock: AtomicU64,
    line: BoundedQueue<InLine>,
    closing: CancellationToken,
    sending: TaskTracker,
}

impl Events {
    /// Events of a node; those of tasks only if `tasks`.
    pub(crate) fn new(hostname: Arc<str>, tasks: bool, broker: Arc<dyn Broker>) -> Self {
        let (line, events) = BoundedQueue::new(QUEUE, QUEUE_BYTES);
        let closing = CancellationToken::new();
        let sending = TaskTracker::new();
        sending.spawn(send(events, hostname.clone(), broker, closing.clone()));
        sending.close();
        Self {
            hostname,
            tasks: AtomicBool::new(tasks),
            clock: AtomicU64::new(0),
            line,
            closing,
            sending,
        }
    }

    /// Sends what is in line, and then nothing more; for a limited time.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        if timeout(CLOSING, self.sending.wait()).await.is_err() {
            tracing::debug!("the last events were not sent in time");
        }
    }

    /// Sends an event, if it is wanted and there is room.
    pub(crate) fn send(&self, event: &Event<'_>) {
        if !event.is_worker() && !self.tasks.load(Ordering::Relaxed) {
            return;
        }
        let stamp = Stamp {
            hostname: &self.hostname,
            pid: std::process::id(),
            clock: self.tick(),
            timestamp: super::unix_seconds(Utc::now()),
            utcoffset: -f64::from(Local::now().offset().fix().local_minus_utc()) / 3600.0,
        };
        // It cannot fail: all keys are text.
        let Ok(body) = serde_json::to_string(&event.stamped(stamp)) else {
            return;
        };
        // A full line means that the broker is away, and the news old.
        let bytes = body.len();
        let alone = (!event.is_listed()).then(|| event.routing_key());
        self.line.put(InLine { alone, body }, bytes);
    }

    /// Turns the events of tasks on or off; whether that changed anything.
    pub(crate) fn enable_tasks(&self, on: bool) -> bool {
        self.tasks.swap(on, Ordering::Relaxed) != on
    }

    /// The node's Lamport clock, moved on by one.
    pub(crate) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Moves the clock past that of another node, unless that is beyond what numbers in JSON can count:
    /// anyone can send one.
    pub(crate) fn observe(&self, clock: u64) {
        if clock < MAX_CLOCK {
            self.clock.fetch_max(clock, Ordering::Relaxed);
        }
    }
}

/// An event in line.
struct InLine {
    /// Its routing key, if it goes by itself.
    alone: Option<String>,
    /// As JSON.
    body: String,
}

async fn send(
    mut events: mpsc::Receiver<Queued<InLine>>,
    hostname: Arc<str>,
    broker: Arc<dyn Broker>,
    closing: CancellationToken,
) {
    let mut next = None;
    loop {
        let first = match next.take() {
            Some(first) => first,
            None => tokio::select! {
                // First, so that the line is empty at the end.
                biased;
                Some(first) = events.recv() => first,
                () = closing.cancelled() => return,
            },
        };
        let (routing_key, body) = match first.item {
            InLine {
                alone: Some(routing_key),
                body,
            } => (routing_key, body),
            first => {
                let mut body = format!("[{}", first.body);
                for _ in 1..event::LISTED {
                    match events.try_recv() {
                        Ok(Queued { item, .. }) if item.alone.is_none() => {
                            body.push(',');
                            body.push_str(&item.body);
                        }
                        other => {
                            next = other.ok();
                            break;
                        }
                    }
                }
                body.push(']');
                (event::LIST.to_owned(), body)
            }
        };
        let gather = routing_key == event::LIST && next.is_none() && events.is_empty();
        // An event that cannot be sent now would be outdated later.
        if broker.blocked().is_some() {
            continue;
        }
        let publication = publication(&hostname, routing_key, body);
        if let Err(error) = broker.publish(&publication, WITHIN).await {
            tracing::debug!(error = %chain(&error), "events were not sent");
        }
        if gather {
            // Until then, or until the worker ends.
            let _elapsed = timeout(GATHERING, closing.cancelled()).await;
        }
    }
}

fn publication(hostname: &str, routing_key: String, body: String) -> Publication {
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
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::broker::recorder::Recorder;

    /// Short ones, one for each of the broker's confirms, could not keep up with a fast worker.
    #[tokio::test]
    async fn what_has_gathered_goes_in_long_lists() -> Result<(), serde_json::Error> {
        let recorder = Arc::new(Recorder::default());
        let events = Events::new("celery@test".into(), true, recorder.clone());
        for _ in 0..QUEUE {
            events.send(&Event::TaskStarted("a"));
        }
        events.close().await;
        let lists: Vec<Vec<Value>> = recorder
            .take()
            .iter()
            .map(|list| serde_json::from_slice(&list.message.body))
            .collect::<Result<_, _>>()?;
        assert!(lists.len() <= QUEUE / 100, "{} lists", lists.len());
        let clocks = lists.iter().flatten().map(|event| event["clock"].as_u64());
        assert!(
            clocks.eq((1..=QUEUE as u64).map(Some)),
            "in order, and none lost"
        );
        Ok(())
    }
}
