//! The order of requests and tasks: a task starts after the requests that were published before it.
//!
//! Both arrive in different queues. Before a task starts, a *marker* is published, which arrives behind every request
//! that the broker had routed by then: with RabbitMQ in the queue of the requests itself, with Redis over the connection
//! that receives them. This takes one round trip to the broker. Tasks that arrive until a marker is sent wait for the same
//! one; those that arrive later need the next one. A busy worker publishes none: with many short tasks, a round trip for
//! each would take a large part of the time. There, a request that was published a few milliseconds before a task may take
//! effect after its start.

use std::convert::Infallible;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::broker::{Binding, Broker, Exchange, ExchangeKind, Publication, Queue};
use celery_protocol::RawMessage;

/// Time without a task, after which a worker is not busy.
const IDLE: Duration = Duration::from_millis(50);

/// Number of markers until a worker is busy.
const MARKERS: u32 = 20;

/// Pause after a marker that could not be published.
const PAUSE: Duration = Duration::from_secs(60);

/// Maximum wait of a task for a marker, for a broker that is slow.
const WITHIN: Duration = Duration::from_secs(1);

/// Header of a marker.
const HEADER: &str = "celery-worker-marker";

/// Orders the start of tasks behind requests of the remote control.
pub(crate) struct RequestOrder {
    /// Identifies the markers of this worker.
    tag: String,
    state: Mutex<State>,
    /// Wakes the publisher.
    wanted: Notify,
    /// Number of the last marker that has arrived.
    arrived: watch::Sender<u64>,
}

struct State {
    /// True while requests are received.
    is_receiving: bool,
    /// Number of the last marker that a task waits for.
    number: u64,
    /// Number of the last marker that was sent.
    sent: u64,
    /// Number of markers that are left until the worker is busy.
    left: u32,
    /// Time at which the last task arrived; later after a failure.
    last: Instant,
}

impl Default for RequestOrder {
    fn default() -> Self {
        Self {
            tag: Uuid::new_v4().simple().to_string(),
            state: Mutex::new(State {
                is_receiving: false,
                number: 0,
                sent: 0,
                left: MARKERS,
                last: Instant::now(),
            }),
            wanted: Notify::new(),
            arrived: watch::Sender::new(0),
        }
    }
}

impl RequestOrder {
    /// Waits until the requests have taken effect that were published before a task that has just arrived. Returns at
    /// once if no requests are received, or if the worker is too busy for a marker.
    pub(crate) async fn follow(&self) {
        let Some(number) = self.next_marker(Instant::now()) else {
            return;
        };
        let mut arrived = self.arrived.subscribe();
        let arriving = arrived.wait_for(|arrived| *arrived >= number);
        // The sender exists as long as this value.
        let in_time = timeout(WITHIN, arriving).await.is_ok();
        if !in_time {
            tracing::debug!(
                "requests of the remote control may arrive after a task that was sent later"
            );
            self.note_arrived(number);
        }
    }

    /// The marker to wait for: one that is not sent yet, or a new one if the worker is not busy.
    fn next_marker(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        if !state.is_receiving {
            return None;
        }
        if state.sent < state.number && *self.arrived.borrow() < state.number {
            return Some(state.number);
        }
        if now.saturating_duration_since(state.last) >= IDLE {
            state.left = MARKERS;
        }
        state.last = state.last.max(now);
        state.left = state.left.checked_sub(1)?;
        state.number += 1;
        self.wanted.notify_one();
        Some(state.number)
    }

    /// The number of the marker that is sent now.
    fn send(&self) -> u64 {
        let mut state = self.state.lock();
        state.sent = state.number;
        state.number
    }

    /// Sets whether requests are received.
    pub(super) fn set_receiving(&self, is_receiving: bool) {
        let mut state = self.state.lock();
        state.is_receiving = is_receiving;
        let number = state.number;
        drop(state);
        if !is_receiving {
            // A marker under way may be lost.
            self.note_arrived(number);
        }
    }

    /// Takes a message that is a marker; returns false for another one.
    pub(super) fn take(&self, message: &RawMessage) -> bool {
        let marker = message.headers.get(HEADER).and_then(Value::as_array);
        let Some([tag, number]) = marker.map(Vec::as_slice) else {
            return false;
        };
        if *tag == *self.tag
            && let Some(number) = number.as_u64()
        {
            self.note_arrived(number);
        }
        true
    }

    fn note_arrived(&self, number: u64) {
        self.arrived.send_if_modified(|arrived| {
            let is_later = number > *arrived;
            *arrived = number.max(*arrived);
            is_later
        });
    }

    /// The queue for markers, if the broker needs one besides that of the requests.
    pub(super) fn queue(&self, broker: &dyn Broker) -> Option<Queue> {
        let name = format!("{}.marker", self.tag);
        (broker.transport() == "redis").then(|| Queue {
            name: name.clone(),
            durable: false,
            exclusive: true,
            auto_delete: true,
            arguments: Default::default(),
            binding: Some(Binding {
                exchange: Exchange {
                    name,
                    kind: ExchangeKind::Fanout,
                    durable: false,
                },
                key: String::new(),
            }),
        })
    }

    /// Publishes the markers for the queue `requests` until it is dropped.
    pub(super) async fn publish(&self, broker: &dyn Broker, requests: &str) -> Infallible {
        let own = self.queue(broker).map(|queue| queue.name);
        loop {
            self.wanted.notified().await;
            let number = self.send();
            let (exchange, routing_key) = match &own {
                Some(exchange) => (exchange.as_str(), ""),
                None => ("", requests),
            };
            let mut message = RawMessage::default();
            message
                .headers
                .insert(HEADER.into(), json!([self.tag, number]));
            let publication = Publication::new(exchange, routing_key, message);
            let published = match broker.blocked() {
                None => broker.publish(&publication, WITHIN).await.is_ok(),
                Some(_) => false,
            };
            if !published {
                let mut state = self.state.lock();
                state.left = 0;
                state.last = Instant::now() + PAUSE;
                drop(state);
                self.note_arrived(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marker(tag: &str, number: u64) -> RawMessage {
        let mut message = RawMessage::default();
        message.headers.insert(HEADER.into(), json!([tag, number]));
        message
    }

    #[tokio::test]
    async fn tasks_wait_for_a_marker_that_was_sent_after_them() {
        let order = RequestOrder::default();
        order.follow().await;
        order.set_receiving(true);
        let (mut first, mut second) = (Box::pin(order.follow()), Box::pin(order.follow()));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert!(futures_util::poll!(&mut second).is_pending());
        assert_eq!(order.send(), 1);
        let mut late = Box::pin(order.follow());
        assert!(futures_util::poll!(&mut late).is_pending());
        // That of another worker, or of none.
        assert!(order.take(&marker("other", 1)));
        assert!(!order.take(&RawMessage::default()));
        assert!(futures_util::poll!(&mut first).is_pending());
        assert!(order.take(&marker(&order.tag, 1)));
        first.await;
        second.await;
        assert!(futures_util::poll!(&mut late).is_pending());
        assert_eq!(order.send(), 2);
        assert!(order.take(&marker(&order.tag, 2)));
        late.await;
        let mut third = Box::pin(order.follow());
        assert!(futures_util::poll!(&mut third).is_pending());
        order.set_receiving(false);
        third.await;
    }

    #[test]
    fn a_busy_worker_does_not_wait() {
        let order = RequestOrder::default();
        order.set_receiving(true);
        let now = Instant::now();
        let markers = |at: Instant| {
            let found = (0..100).filter_map(|_| order.next_marker(at));
            found
                .inspect(|number| order.note_arrived(*number))
                .inspect(|_| assert!(order.send() > 0))
                .count()
        };
        assert_eq!(markers(now), 20);
        assert_eq!(markers(now + IDLE / 2), 0);
        assert_eq!(markers(now + IDLE * 2), 20);
    }
}
