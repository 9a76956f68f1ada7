//! The channel and the consumer of one queue, until their connection ends.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::{DeliveryTag, FieldTable, ShortString};
use lapin::{Channel, Connection};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::ack_batcher::AckBatcher;
use super::connector::{self, Connector};
use super::prefetch::{PrefetchSlot, PrefetchWindow};
use super::screen::Notes;
use super::{RECONNECT, convert, short};
use crate::broker::consumer::{Damage, DesiredQueues, Reports, Settled};
use crate::broker::{BrokerError, Delivery, Disposition, Queue, Settlement};
use service_connection::backoff::{RetryState, in_seconds};
use service_connection::error_chain::chain;

/// Time limit for closing a channel.
const CLOSING: Duration = Duration::from_secs(5);

/// Consumes from one queue over one connection.
pub(super) struct QueueConsumer {
    pub(super) connector: Arc<Connector>,
    pub(super) connection: Arc<Connection>,
    /// Changes that were made to deliveries in order to read them.
    pub(super) notes: Arc<Notes>,
    pub(super) queue: Queue,
    /// True if delayed messages must be routed to the queue.
    pub(super) delayed: bool,
    pub(super) reports: Arc<Reports>,
    pub(super) deliveries: mpsc::Sender<Delivery>,
    /// Cancelled when the queue is no longer consumed.
    pub(super) cancelled: CancellationToken,
    /// Cancelled when no delivery will be settled any more.
    pub(super) closing: CancellationToken,
}

type Items = stream::SelectAll<stream::BoxStream<'static, Item>>;

/// An item from a consumer's stream, with the consumer's number.
enum Item {
    Delivery(u32, Box<lapin::message::Delivery>),
    Error(lapin::Error),
    End(u32),
}

/// An open channel with its consumer.
struct Open {
    channel: Channel,
    acks: AckBatcher,
    window: Arc<PrefetchWindow>,
    items: Items,
    /// Number and tag of the current consumer, if one exists.
    consumer: Option<(u32, ShortString)>,
}

impl QueueConsumer {
    /// Runs until the queue is no longer consumed and all of its deliveries are settled, or until the connection has
    /// ended, with the reason.
    pub(super) async fn run(self) -> Option<BrokerError> {
        // No `RetryLoop`: an attempt is the whole lifetime of a channel, and counts as a success if it is long.
        let mut attempts = RetryState::new(RECONNECT);
        loop {
            let began = Instant::now();
            let opened = tokio::select! {
                () = self.cancelled.cancelled() => return None,
                opened = self.open() => opened,
            };
            let error = match opened {
                Ok(mut open) => {
                    self.report(true);
                    let ended = self.pump(&mut open).await;
                    self.report_closed();
                    match ended {
                        Ok(()) => {
                            self.finish(open).await;
                            return None;
                        }
                        Err(ended) => ended,
                    }
                }
                Err(error) => {
                    self.report(false);
                    Ended::Error(error)
                }
            };
            if !self.connection.status().connected() {
                return Some(match error {
                    Ended::Error(error) => error,
                    Ended::HeldTooLong => self.connector.lost("a delivery was held for too long"),
                });
            }
            let pause = self.log_failure(&error, began.elapsed(), &mut attempts);
            tokio::select! {
                () = self.cancelled.cancelled() => return None,
                () = sleep(pause) => {}
            }
        }
    }

    /// Logs the reason why a channel ended, and the time that it was open. Returns the pause before the next channel.
    fn log_failure(&self, ended: &Ended, time: Duration, attempts: &mut RetryState) -> Duration {
        let was_good = attempts.succeeded_for(time);
        let queue = self.queue.name.as_str();
        let error = match ended {
            Ended::HeldTooLong => {
                tracing::warn!(
                    queue,
                    "the broker requeued messages that were unacknowledged for longer than its consumer_timeout; \
                     running tasks continue, and redelivered messages join them. For longer tasks raise \
                     consumer_timeout in rabbitmq.conf or the queue argument x-consumer-timeout"
                );
                return Duration::ZERO;
            }
            Ended::Error(error) => error,
        };
        let mut setback = attempts.failed(error);
        if was_good {
            setback.pause = Duration::ZERO;
        }
        if setback.should_log {
            tracing::warn!(
                queue,
                error = %chain(error),
                retry_in_s = in_seconds(setback.pause),
                "queue is not consumed; retrying, running tasks continue"
            );
        }
        setback.pause
    }

    fn report(&self, served: bool) {
        let name = &self.queue.name;
        self.reports.update(|all| {
            let (into, out_of) = match served {
                true => (&mut all.queues, &mut all.failed),
                false => (&mut all.failed, &mut all.queues),
            };
            out_of.remove(name);
            into.insert(name.clone());
        });
    }

    fn report_closed(&self) {
        self.reports.update(|all| {
            all.queues.remove(&self.queue.name);
        });
    }

    async fn open(&self) -> Result<Open, BrokerError> {
        self.connector
            .declare_with_delay(&self.connection, &self.queue, self.delayed)
            .await?;
        let channel = self
            .connection
            .create_channel()
            .await
            .map_err(|e| self.connector.error(e, "a channel for consuming"))?;
        let prefetch = self.reports.desired().borrow().prefetch;
        let window = PrefetchWindow::new(prefetch);
        let mut open = Open {
            acks: AckBatcher::new(channel.clone(), self.connector.clone(), window.clone()),
            channel,
            window,
            items: stream::SelectAll::new(),
            consumer: None,
        };
        self.subscribe(&mut open, prefetch).await?;
        Ok(open)
    }

    /// Starts a new consumer with the prefetch limit `limit`, which replaces the old one.
    async fn subscribe(&self, open: &mut Open, limit: u16) -> Result<(), BrokerError> {
        let what = || format!("to consume from `{}`", self.queue.name);
        let error = |e| self.connector.error(e, &what());
        // A limit for each consumer instead of a global one: quorum queues and RabbitMQ 4 allow no other kind. It
        // applies to consumers that are created later.
        let qos = BasicQosOptions { global: false };
        open.channel.basic_qos(limit, qos).await.map_err(error)?;
        let consumer = open
            .channel
            .basic_consume(
                short(&self.queue.name)?,
                ShortString::default(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
            .map_err(error)?;
        let number = open.window.renewed(limit);
        let before = open.consumer.replace((number, consumer.tag()));
        let items = consumer.map(move |item| match item {
            Ok(delivery) => Item::Delivery(number, Box::new(delivery)),
            Err(error) => Item::Error(error),
        });
        let end = stream::once(async move { Item::End(number) });
        open.items.push(items.chain(end).boxed());
        // Cancelled only now: a queue that is deleted with its last consumer must always have one.
        if let Some((_, tag)) = before {
            self.unsubscribe(&open.channel, tag).await?;
        }
        Ok(())
    }

    async fn unsubscribe(&self, channel: &Channel, tag: ShortString) -> Result<(), BrokerError> {
        channel
            .basic_cancel(tag, BasicCancelOptions::default())
            .await
            .map_err(|e| self.connector.error(e, "to cancel a consumer"))
    }

    /// Forwards deliveries until the queue is no longer consumed or the channel ends.
    async fn pump(&self, open: &mut Open) -> Result<(), Ended> {
        let mut desired = self.reports.desired();
        let window = open.window.clone();
        loop {
            tokio::select! {
                biased;
                () = self.cancelled.cancelled() => return Ok(()),
                prefetch = changed(&mut desired) => window.set_target(prefetch),
                () = window.changed() => {}
                Some(item) = open.items.next() => match item {
                    Item::Delivery(number, delivery) => {
                        panic_point!(QueueConsumer);
                        let slot = window.take(number);
                        let damage = self.notes.take(open.channel.id(), delivery.delivery_tag);
                        self.forward(*delivery, damage, slot, &open.acks).await;
                    }
                    Item::Error(error) if connector::is_held_too_long(&error) => {
                        return Err(Ended::HeldTooLong);
                    }
                    Item::Error(error) => {
                        return Err(self.connector.error(error, "to deliver").into());
                    }
                    Item::End(number) => {
                        if open.consumer.as_ref().is_some_and(|(of, _)| *of == number) {
                            return Err(self.connector.lost("the consumer was cancelled; was the queue deleted?").into());
                        }
                    }
                },
            }
            self.renew(open).await?;
        }
    }

    /// Adjusts the consumer's limit to the prefetch window.
    async fn renew(&self, open: &mut Open) -> Result<(), BrokerError> {
        if !open.window.may_go_on()
            && let Some((_, tag)) = open.consumer.take()
        {
            self.unsubscribe(&open.channel, tag).await?;
            open.window.ended();
        }
        match open.window.due() {
            Some(limit) => self.subscribe(open, limit).await,
            None => Ok(()),
        }
    }

    async fn forward(
        &self,
        delivery: lapin::message::Delivery,
        damage: Option<Damage>,
        slot: PrefetchSlot,
        acks: &AckBatcher,
    ) {
        let tag = delivery.delivery_tag;
        let (message, acker) = convert::delivery(delivery);
        let settlement = Box::new(Acker {
            acker,
            tag,
            acks: acks.clone(),
            slot,
        });
        let mut delivery = Delivery::new(
            message.raw,
            self.queue.name.clone(),
            (message.exchange, message.routing_key),
            settlement,
        );
        delivery.redelivered = message.redelivered;
        delivery.damage = damage.map(Box::new);
        report_damage(&delivery);
        // Dropping the delivery requeues it: if the queue is cancelled, or the receiver no longer exists.
        tokio::select! {
            biased;
            () = self.cancelled.cancelled() => {}
            _ = self.deliveries.send(delivery) => {}
        }
    }

    /// Ends a healthy channel: stops new deliveries, requeues those on the way, and waits until those that are held are
    /// settled or the broker is closed.
    async fn finish(self, mut open: Open) {
        let Self {
            connector,
            deliveries,
            closing,
            ..
        } = self;
        drop(deliveries);
        if let Some((_, tag)) = open.consumer.take() {
            let cancelled = open
                .channel
                .basic_cancel(tag, BasicCancelOptions::default())
                .await;
            if let Err(error) = cancelled {
                tracing::debug!(
                    error = %connector.error(error, "basic.cancel"),
                    "consumer was not cancelled before its channel was closed"
                );
            }
        }
        // Every consumer is cancelled, so that each stream ends.
        while let Some(item) = open.items.next().await {
            if let Item::Delivery(_, delivery) = item {
                let back = BasicNackOptions {
                    multiple: false,
                    requeue: true,
                };
                // If the channel has ended, the broker has requeued the delivery already.
                let _ = delivery.acker.nack(back).await;
            }
        }
        while !open.window.is_empty() && open.channel.status().connected() {
            tokio::select! {
                () = closing.cancelled() => break,
                () = open.window.changed() => {}
            }
        }
        if let Err(error) = timeout(CLOSING, open.channel.close(200, "bye".into())).await {
            tracing::debug!(%error, "channel did not close in time");
        }
    }
}

/// Logs the changes that were made to a delivery in order to read it.
fn report_damage(delivery: &Delivery) {
    let Some(damage) = delivery.damage.as_deref() else {
        return;
    };
    let Delivery {
        message,
        queue,
        exchange,
        routing_key,
        ..
    } = delivery;
    let task_id = message.headers.get("id").and_then(Value::as_str);
    if damage.is_not_utf8 {
        tracing::warn!(
            queue,
            exchange,
            routing_key,
            task_id,
            "names or properties of a message are not UTF-8; each invalid byte is replaced by a question mark"
        );
    }
    if damage.is_too_deep {
        tracing::warn!(
            queue,
            exchange,
            routing_key,
            task_id,
            "headers of a message are nested too deeply; the values at greater depth are read as bytes"
        );
    }
}

/// Waits for another prefetch limit; never returns when no other can follow.
async fn changed(desired: &mut watch::Receiver<DesiredQueues>) -> u16 {
    match desired.changed().await {
        Ok(()) => desired.borrow_and_update().prefetch,
        Err(_) => std::future::pending().await,
    }
}

/// Reason why a channel has ended.
enum Ended {
    /// The broker's `consumer_timeout` was exceeded.
    HeldTooLong,
    /// Another error.
    Error(BrokerError),
}

impl From<BrokerError> for Ended {
    fn from(error: BrokerError) -> Self {
        Self::Error(error)
    }
}

/// Settles one delivery on the channel that delivered it.
struct Acker {
    acker: lapin::Acker,
    tag: DeliveryTag,
    acks: AckBatcher,
    slot: PrefetchSlot,
}

impl Settlement for Acker {
    fn settle(self: Box<Self>, disposition: Disposition) -> Settled {
        self.acks.settle(self.tag, disposition, self.slot)
    }

    fn is_void(&self) -> bool {
        self.acker.poisoned()
    }

    fn set_exempt(&self, is_exempt: bool) {
        self.slot.set_exempt(is_exempt);
    }
}
