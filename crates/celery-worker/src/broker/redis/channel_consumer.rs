//! Consuming from channels: queues that are bound to a fanout exchange, such as those of remote control and events.
//!
//! Redis sends a message to those who subscribe at that moment, and keeps none. There is nothing to settle.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::{FromRedisValue, PushInfo, PushKind, RedisResult, Value, cmd};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::connecting::Link;
use super::held::Unrecorded;
use super::shared::{MessageLimits, SharedState};
use super::supervisor::RedisSession;
use super::window::Window;
use crate::broker::consumer::{DesiredQueues, Feed};
use crate::broker::{BrokerError, Queue};
use crate::liveness::Liveness;
use celery_protocol::virtual_message;

/// Longest interval between two checks of an idle connection.
const CHECK_EVERY: Duration = Duration::from_secs(10);

/// Consumes from the channels of one subscription.
pub(super) struct ChannelConsumer {
    pub(super) shared: Arc<SharedState>,
    pub(super) feed: Arc<Feed>,
    pub(super) liveness: Liveness,
    pub(super) limits: MessageLimits,
    pub(super) check_every: Duration,
}

/// The names of the consumed queues by the pattern of their channels.
type Patterns = BTreeMap<String, Vec<String>>;

impl ChannelConsumer {
    fn patterns(&self, desired: &DesiredQueues) -> Patterns {
        let mut patterns = Patterns::new();
        for queue in desired.queues.iter().filter(|queue| self.serves(queue)) {
            if let Some(pattern) = self.shared.names.channel_pattern(queue) {
                patterns
                    .entry(pattern)
                    .or_default()
                    .push(queue.name.clone());
            }
        }
        patterns
    }

    /// Subscribes to new patterns and ends the subscriptions to others.
    async fn subscribe(
        &self,
        link: &mut Link,
        before: &Patterns,
        desired: &DesiredQueues,
    ) -> Result<Patterns, BrokerError> {
        let now = self.patterns(desired);
        let error = |e| self.shared.connector.error(e, "to subscribe");
        let new: Vec<_> = now
            .keys()
            .filter(|name| !before.contains_key(*name))
            .collect();
        if !new.is_empty() {
            link.connection.psubscribe(new).await.map_err(error)?;
        }
        let old: Vec<_> = before
            .keys()
            .filter(|name| !now.contains_key(*name))
            .collect();
        if !old.is_empty() {
            link.connection.punsubscribe(old).await.map_err(error)?;
        }
        self.feed.reports.update(|served| {
            served.connected = true;
            served
                .queues
                .retain(|name| desired.queues.iter().any(|queue| queue.name == *name));
            served.queues.extend(now.values().flatten().cloned());
        });
        Ok(now)
    }

    /// Forwards a message to the queues that its pattern belongs to.
    async fn forward(&self, push: PushInfo, patterns: &Patterns) {
        let Some((pattern, text)) = pattern_message(push) else {
            return;
        };
        let queues = patterns.get(&pattern).into_iter().flatten();
        let message = match virtual_message::decode(&text, self.limits.max_body) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(pattern, %error, "a message on a channel is dropped: it is not one of kombu's");
                return;
            }
        };
        for queue in queues {
            // Nothing limits the deliveries of a channel.
            let slot = Window::new(Arc::new(Notify::new())).take();
            let settlement = Box::new(Unrecorded { slot });
            let delivery = self.limits.delivery(message.clone(), queue, settlement);
            tokio::select! {
                biased;
                () = self.feed.cancelled.cancelled() => return,
                _ = self.feed.deliveries.send(delivery) => {}
            }
        }
    }
}

/// Pattern and text of a message on a channel.
fn pattern_message(push: PushInfo) -> Option<(String, Vec<u8>)> {
    if push.kind != PushKind::PMessage {
        return None;
    }
    let [pattern, _, text] = <[Value; 3]>::try_from(push.data).ok()?;
    let pattern = String::from_redis_value(pattern).ok()?;
    Some((pattern, Vec::from_redis_value(text).ok()?))
}

impl RedisSession for ChannelConsumer {
    fn serves(&self, queue: &Queue) -> bool {
        self.shared.publisher.is_broadcast(queue)
    }

    async fn serve(&mut self, mut link: Link) -> Result<(), BrokerError> {
        let mut desired = self.feed.reports.desired();
        let current = desired.borrow_and_update().clone();
        let mut patterns = self
            .subscribe(&mut link, &Patterns::new(), &current)
            .await?;
        let check_every = self.check_every.min(CHECK_EVERY);
        let mut check = Instant::now() + check_every;
        loop {
            self.liveness.tick();
            let tick = (Instant::now() + crate::liveness::EVERY).min(check);
            tokio::select! {
                biased;
                () = self.feed.cancelled.cancelled() => return Ok(()),
                changed = desired.changed() => {
                    // An error means that the consumer is gone; it has cancelled the subscription.
                    if changed.is_err() {
                        self.feed.cancelled.cancelled().await;
                        return Ok(());
                    }
                    let current = desired.borrow_and_update().clone();
                    patterns = self.subscribe(&mut link, &patterns, &current).await?;
                }
                push = link.next() => match push {
                    Some(push) => self.forward(push, &patterns).await,
                    None => return Err(self.shared.connector.lost("the connection is closed")),
                },
                () = sleep_until(tick) => if tick == check {
                    let pong: RedisResult<()> = cmd("PING").query_async(&mut link.connection).await;
                    pong.map_err(|e| self.shared.connector.error(e, "a check"))?;
                    check = Instant::now() + check_every;
                },
            }
        }
    }

    async fn finish(&mut self) {}
}
