//! Sends events to monitors.
//!
//! Events are sent in order, as fast as the broker accepts them, and dropped while it cannot be reached. No step of a
//! task waits for them. Events of tasks are sent in lists, as in Python: a list contains those that arrived while the
//! broker confirmed the previous one, and during a short time afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::bounded_queue::{BoundedQueue, Queued};
use crate::broker::Broker;
use crate::publication::{event_publication, stamp};
use celery_protocol::event::{self, Event};
use service_connection::error_chain::chain;

/// Maximum number of events that wait for the broker.
const QUEUE: usize = 10_000;

/// Maximum size of waiting events, in bytes: senders of tasks determine the length of the arguments in events.
const QUEUE_BYTES: usize = 8 << 20;

/// Maximum accepted value of a clock. Larger integers are not exact in every implementation of JSON, and the clock must
/// be able to count on.
const MAX_CLOCK: u64 = 1 << 52;

/// Time that events are collected after a list, so that a busy worker sends few long lists instead of many short ones:
/// each list costs the broker, the worker and every monitor the same. The first event of an idle worker is sent at
/// once.
const COLLECTION_TIME: Duration = Duration::from_millis(10);

/// Time limit for publishing one message.
const WITHIN: Duration = Duration::from_secs(5);

/// Time limit for the last events when the worker ends.
const CLOSING: Duration = Duration::from_secs(2);

/// Stamps events and queues them for sending.
pub(crate) struct Events {
    hostname: Arc<str>,
    tasks: AtomicBool,
    clock: AtomicU64,
    line: BoundedQueue<WaitingEvent>,
    closing: CancellationToken,
    sending: TaskTracker,
}

impl Events {
    /// Creates the sender for the events of a node; events of tasks are sent only if `tasks`.
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

    /// Sends the waiting events, for a limited time, and no further ones.
    pub(crate) async fn close(&self) {
        self.closing.cancel();
        if timeout(CLOSING, self.sending.wait()).await.is_err() {
            tracing::debug!("the last events were not sent in time");
        }
    }

    /// Queues an event, if it is enabled and the limits allow it.
    pub(crate) fn send(&self, event: &Event<'_>) {
        if !event.is_worker() && !self.tasks.load(Ordering::Relaxed) {
            return;
        }
        let stamp = stamp(&self.hostname, self.tick());
        // It cannot fail: all keys are text.
        let Ok(body) = serde_json::to_string(&event.stamped(stamp)) else {
            return;
        };
        // The event is dropped if the queue is full: the broker cannot be reached, and the event would be outdated.
        let bytes = body.len();
        let alone = (!event.is_listed()).then(|| event.routing_key());
        self.line.put(WaitingEvent { alone, body }, bytes);
    }

    /// Enables or disables the events of tasks; returns true if this changed the state.
    pub(crate) fn enable_tasks(&self, on: bool) -> bool {
        self.tasks.swap(on, Ordering::Relaxed) != on
    }

    /// Increments the node's Lamport clock and returns it.
    pub(crate) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Advances the clock past that of another node, unless that exceeds the range of exact integers in JSON: any
    /// sender can write such a value.
    pub(crate) fn observe(&self, clock: u64) {
        if clock < MAX_CLOCK {
            self.clock.fetch_max(clock, Ordering::Relaxed);
        }
    }
}

/// A waiting event.
struct WaitingEvent {
    /// Routing key of the event, if it is sent alone.
    alone: Option<String>,
    /// The event as JSON.
    body: String,
}

async fn send(
    mut events: mpsc::Receiver<Queued<WaitingEvent>>,
    hostname: Arc<str>,
    broker: Arc<dyn Broker>,
    closing: CancellationToken,
) {
    let mut next = None;
    loop {
        let first = match next.take() {
            Some(first) => first,
            None => tokio::select! {
                // `biased` with the events first, so that the queue is empty at the end.
                biased;
                Some(first) = events.recv() => first,
                () = closing.cancelled() => return,
            },
        };
        let (routing_key, body) = match first.item {
            WaitingEvent {
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
        let is_collected = routing_key == event::LIST && next.is_none() && events.is_empty();
        // An event that cannot be sent now would be outdated later.
        if broker.blocked().is_some() {
            continue;
        }
        let publication = event_publication(&hostname, routing_key, body);
        if let Err(error) = broker.publish(&publication, WITHIN).await {
            tracing::debug!(error = %chain(&error), "events were not sent");
        }
        if is_collected {
            // Waits for this time, or until the worker ends.
            let _elapsed = timeout(COLLECTION_TIME, closing.cancelled()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::broker::memory::MemoryBroker;

    /// Short lists, one for each confirm of the broker, would be too slow for a fast worker.
    #[tokio::test]
    async fn collected_events_are_sent_in_long_lists() -> Result<(), serde_json::Error> {
        let broker = MemoryBroker::recording();
        let events = Events::new("celery@test".into(), true, Arc::new(broker.clone()));
        for _ in 0..QUEUE {
            events.send(&Event::TaskStarted("a"));
        }
        events.close().await;
        let lists: Vec<Vec<Value>> = broker
            .take_recorded()
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
