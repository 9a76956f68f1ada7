//! A request: a task message that was read, with the information about its delivery.

use std::sync::Arc;

use super::identity::Identity;
use crate::broker::Delivery;
use celery_protocol::RawMessage;
use celery_protocol::message::TaskMessage;

/// A task message and its delivery information.
pub(crate) struct Request {
    /// Identity of the task, which all of its deliveries have in common.
    pub(crate) identity: Identity,
    /// The decoded message.
    pub(crate) message: Arc<TaskMessage>,
    /// The message as it was received.
    pub(crate) raw: RawMessage,
    /// Exchange of the message.
    pub(crate) exchange: String,
    /// Routing key of the message.
    pub(crate) routing_key: String,
    /// Queue of the delivery.
    pub(crate) queue: String,
    /// True if the broker has marked the message as delivered before.
    pub(crate) redelivered: bool,
}

impl Request {
    /// Takes the message out of its delivery; `message` is the decoded form. The identity is passed on, since its
    /// computation takes some time for a large message.
    pub(crate) fn new(delivery: &mut Delivery, identity: Identity, message: TaskMessage) -> Self {
        Self {
            identity,
            message: Arc::new(message),
            raw: std::mem::take(&mut delivery.message),
            exchange: std::mem::take(&mut delivery.exchange),
            routing_key: std::mem::take(&mut delivery.routing_key),
            // A copy: the delivery needs the name of its queue when it is settled or published again.
            queue: delivery.queue.clone(),
            redelivered: delivery.redelivered,
        }
    }
}
