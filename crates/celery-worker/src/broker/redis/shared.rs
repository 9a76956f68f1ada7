//! Parts that all subscriptions of a broker share.

use std::sync::Arc;

use serde_json::Value;

use super::connecting::{Commands, RedisConnector};
use super::held::Held;
use super::names::Names;
use super::options::QueueOrder;
use super::publisher::Publisher;
use crate::broker::consumer::{Damage, Settlement};
use crate::broker::{Delivery, Subscription};
use crate::clock;
use celery_protocol::virtual_message::VirtualMessage;
use celery_protocol::{RawMessage, message};

/// Parts of a broker.
pub(super) struct SharedState {
    pub(super) connector: Arc<RedisConnector>,
    pub(super) commands: Arc<Commands>,
    pub(super) names: Arc<Names>,
    pub(super) publisher: Publisher,
    pub(super) held: Arc<Held>,
    pub(super) order: QueueOrder,
}

/// Limits of the bodies of a subscription, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct MessageLimits {
    pub(super) max_body: usize,
    /// Limit for the body of a task whose eta has not been reached.
    pub(super) max_waiting_body: usize,
}

impl From<&Subscription> for MessageLimits {
    fn from(subscription: &Subscription) -> Self {
        Self {
            max_body: subscription.max_body_bytes.unwrap_or(usize::MAX),
            max_waiting_body: subscription.max_waiting_body_bytes.unwrap_or(usize::MAX),
        }
    }
}

impl MessageLimits {
    /// Creates a delivery, without a body above the limits.
    pub(super) fn delivery(
        self,
        message: VirtualMessage,
        queue: &str,
        settlement: Box<dyn Settlement>,
    ) -> Delivery {
        let mut raw = message.message;
        let mut damage = message.omitted_body.map(|bytes| Damage {
            body_bytes: Some(bytes as u64),
            awaits_eta: bytes <= self.max_body,
            ..Damage::default()
        });
        if damage.is_none() && raw.body.len() > self.max_waiting_body && awaits_eta(&raw) {
            let body = std::mem::take(&mut raw.body);
            damage = Some(Damage {
                body_bytes: Some(body.len() as u64),
                awaits_eta: true,
                ..Damage::default()
            });
        }
        let route = (message.exchange, message.routing_key);
        let mut delivery = Delivery::new(raw, queue.to_owned(), route, settlement);
        delivery.redelivered = message.redelivered;
        delivery.damage = damage.map(Box::new);
        delivery
    }
}

/// Returns true for a task whose eta has not been reached.
pub(super) fn awaits_eta(raw: &RawMessage) -> bool {
    let text = |name: &str| raw.headers.get(name).and_then(Value::as_str);
    let eta = text("eta").and_then(message::eta);
    text("task").is_some() && text("id").is_some() && eta.is_some_and(|eta| eta > clock::now())
}
