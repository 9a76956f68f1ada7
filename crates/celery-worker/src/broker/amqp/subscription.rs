//! A subscription, which may use several connections one after another.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::{FutureExt, StreamExt};
use lapin::{Connection, Event};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::connector::{Connector, goodbye};
use super::queue_consumer::QueueConsumer;
use super::screen::{Bodies, Notes};
use super::{RECONNECT, Reconnect};
use crate::broker::QueueType;
use crate::broker::consumer::{Feed, Reports, Served};
use crate::broker::{BrokerError, Delivery, Queue, delayed};
use crate::liveness::{self, Liveness};
use service_connection::backoff::{RetryState, Setback, in_seconds};
use service_connection::error_chain::{chain, panic_text};

/// Serves a subscription until it is cancelled.
pub(super) struct Subscriber {
    pub(super) connector: Arc<Connector>,
    pub(super) reconnect: Reconnect,
    pub(super) purpose: &'static str,
    pub(super) delayed: Option<QueueType>,
    pub(super) bodies: Bodies,
    pub(super) closing: CancellationToken,
}

impl Subscriber {
    /// Runs until the subscription is cancelled and settled, or reconnecting has ended.
    pub(super) async fn run(self, feed: Feed, liveness: &Liveness) {
        let Feed {
            deliveries,
            reports,
            cancelled,
        } = feed;
        // No `RetryLoop`: an attempt is the whole lifetime of a connection, and counts as a success if it is long.
        let mut attempts = RetryState::new(RECONNECT);
        let mut failed = 0;
        let mut was_connected = false;
        loop {
            liveness.tick();
            let notes = Arc::new(Notes::default());
            let opened = tokio::select! {
                () = cancelled.cancelled() => return,
                opened = self.connector.connect_to_consume("consumer", self.bodies, &notes) => opened,
            };
            let error = match opened {
                Ok(connection) => {
                    was_connected = true;
                    failed = 0;
                    let began = Instant::now();
                    let mut session = Session {
                        subscriber: &self,
                        liveness,
                        connection: Arc::new(connection),
                        notes,
                        reports: &reports,
                        consumers: JoinSet::new(),
                        tokens: HashMap::new(),
                    };
                    match session.serve(&deliveries, &cancelled).await {
                        Some(error) => {
                            attempts.succeeded_for(began.elapsed());
                            session.close_broken().await;
                            error
                        }
                        None => {
                            // The subscription ends once its queue consumers have dropped it, too.
                            drop(deliveries);
                            return session.finish().await;
                        }
                    }
                }
                Err(error) => {
                    failed += 1;
                    error
                }
            };
            if let Some(option) = self.reconnect.forbids(was_connected, failed) {
                return reports.fail(BrokerError::GivenUp {
                    attempts: failed,
                    option,
                    source: Arc::new(error),
                });
            }
            let Setback { pause, should_log } = attempts.failed(&error);
            if should_log {
                tracing::warn!(
                    broker = self.connector.masked(),
                    purpose = self.purpose,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "no connection to the broker; retrying, running tasks continue"
                );
            }
            tokio::select! {
                () = cancelled.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }
}

/// One connection with a consumer for each queue.
struct Session<'a> {
    subscriber: &'a Subscriber,
    liveness: &'a Liveness,
    connection: Arc<Connection>,
    notes: Arc<Notes>,
    reports: &'a Arc<Reports>,
    consumers: JoinSet<ConsumerEnd>,
    /// Tokens that end the consumers of the subscribed queues.
    tokens: HashMap<String, CancellationToken>,
}

/// Way in which the consumer of a queue ended.
enum ConsumerEnd {
    /// The queue is no longer subscribed, or its connection has ended.
    Ended(Option<BrokerError>),
    /// The consumer panicked. Deliveries that it has not forwarded stay unacknowledged until its connection ends.
    Panicked { queue: String, panic: String },
}

async fn run(consumer: QueueConsumer) -> ConsumerEnd {
    let queue = consumer.queue.name.clone();
    match AssertUnwindSafe(consumer.run()).catch_unwind().await {
        Ok(ended) => ConsumerEnd::Ended(ended),
        Err(panic) => ConsumerEnd::Panicked {
            queue,
            panic: panic_text(&*panic).to_owned(),
        },
    }
}

impl Session<'_> {
    /// Serves the subscribed queues until the subscription is cancelled (`None`) or the connection has ended.
    async fn serve(
        &mut self,
        deliveries: &mpsc::Sender<Delivery>,
        cancelled: &CancellationToken,
    ) -> Option<BrokerError> {
        let connector = &self.subscriber.connector;
        let mut events = self.connection.events_listener();
        if let Some(kind) = self.subscriber.delayed {
            let made = connector
                .make(&self.connection, &delayed::topology(kind))
                .await;
            if let Err(error) = made {
                tracing::warn!(
                    error = %chain(&error),
                    "delayed delivery could not be set up; the worker holds delayed tasks"
                );
            }
        }
        self.reports.update(|served| served.connected = true);
        let mut desired = self.reports.desired();
        let mut ticks = tokio::time::interval(liveness::EVERY);
        loop {
            self.liveness.tick();
            panic_point!(Subscription);
            let queues = desired.borrow_and_update().queues.clone();
            self.reconcile(queues, deliveries, cancelled);
            let ended = tokio::select! {
                biased;
                () = cancelled.cancelled() => return None,
                Ok(()) = desired.changed() => None,
                _ = ticks.tick() => None,
                Some(consumer) = self.consumers.join_next() => match consumer {
                    Ok(ConsumerEnd::Ended(ended)) => ended,
                    Ok(ConsumerEnd::Panicked { queue, panic }) => {
                        tracing::error!(
                            queue,
                            panic,
                            "consumer of a queue panicked, which is a bug; reconnecting"
                        );
                        return Some(connector.lost("the consumer of a queue panicked"));
                    }
                    Err(error) => return Some(connector.lost(&error.to_string())),
                },
                event = events.next() => match event {
                    Some(Event::Error(error)) => Some(connector.error(error, "the connection")),
                    Some(_) => None,
                    None => Some(connector.lost("the connection is closed")),
                },
            };
            // A consumer opens its own channel again.
            if !self.connection.status().connected() {
                return Some(ended.unwrap_or_else(|| connector.lost("the connection is closed")));
            }
        }
    }

    /// Starts missing consumers and ends those of queues that are no longer subscribed.
    fn reconcile(
        &mut self,
        queues: Vec<Queue>,
        deliveries: &mpsc::Sender<Delivery>,
        cancelled: &CancellationToken,
    ) {
        self.tokens.retain(|name, token| {
            let desired = queues.iter().any(|queue| queue.name == *name);
            if !desired {
                token.cancel();
            }
            desired
        });
        for queue in queues {
            if self.tokens.contains_key(&queue.name) {
                continue;
            }
            let token = cancelled.child_token();
            self.tokens.insert(queue.name.clone(), token.clone());
            let consumer = QueueConsumer {
                connector: self.subscriber.connector.clone(),
                connection: self.connection.clone(),
                notes: self.notes.clone(),
                queue,
                delayed: self.subscriber.delayed.is_some(),
                reports: self.reports.clone(),
                deliveries: deliveries.clone(),
                cancelled: token,
                closing: self.subscriber.closing.clone(),
            };
            self.consumers.spawn(run(consumer));
        }
    }

    /// Releases a connection that has ended.
    async fn close_broken(mut self) {
        self.reports.update(|served| *served = Served::default());
        self.consumers.shutdown().await;
        goodbye(&self.connection).await;
    }

    /// Closes a healthy connection after everything is settled.
    async fn finish(mut self) {
        while self.consumers.join_next().await.is_some() {}
        self.reports.update(|served| *served = Served::default());
        goodbye(&self.connection).await;
    }
}
