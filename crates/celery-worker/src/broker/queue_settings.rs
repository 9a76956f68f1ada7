//! Settings of the queues, by Celery's names.

use std::collections::BTreeMap;

use super::routes::TaskRoute;
use serde::{Deserialize, Serialize};

/// Type of an exchange, in AMQP's terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ExchangeKind {
    /// Routes by equal routing key.
    #[default]
    Direct,
    /// Routes to every bound queue.
    Fanout,
    /// Routes by pattern.
    Topic,
    /// Routes by headers.
    Headers,
}

impl ExchangeKind {
    /// AMQP's name of the type.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::Headers => "headers",
        }
    }
}

/// Type of a queue, in RabbitMQ's terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum QueueType {
    /// Stored on one node.
    #[default]
    Classic,
    /// Replicated on several nodes.
    Quorum,
}

impl QueueType {
    /// The value of `x-queue-type`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// Condition for declaring the queues for native delayed delivery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DelayedDelivery {
    /// Declared if a task queue is a quorum queue, as in Celery.
    #[default]
    Auto,
    /// Always declared.
    Always,
    /// Never declared.
    Never,
}

/// Declaration of one queue.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TaskQueue {
    /// Name of the exchange; without it, the default exchange or one with the queue's name.
    pub exchange: Option<String>,
    /// Type of the exchange.
    pub exchange_type: Option<ExchangeKind>,
    /// Binding key; without it, the queue's name.
    pub routing_key: Option<String>,
    /// Queue arguments, e.g. `x-max-priority`.
    #[serde(default)]
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// Settings that determine the declarations of all queues; each field is Celery's setting of that name.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct QueueSettings {
    /// `task_queues`
    pub task_queues: BTreeMap<String, TaskQueue>,
    /// `task_routes`: destinations by the names of tasks, or by patterns with `*`, `?` and `[…]`.
    pub task_routes: BTreeMap<String, TaskRoute>,
    /// `task_default_queue`
    pub task_default_queue: String,
    /// `task_default_exchange`; empty for the name of the queue.
    pub task_default_exchange: String,
    /// `task_default_exchange_type`
    pub task_default_exchange_type: ExchangeKind,
    /// `task_default_routing_key`; empty for the name of the queue.
    pub task_default_routing_key: String,
    /// `task_default_queue_type`
    pub task_default_queue_type: QueueType,
    /// `task_create_missing_queue_type`
    pub task_create_missing_queue_type: QueueType,
    /// `task_create_missing_queue_exchange_type`
    pub task_create_missing_queue_exchange_type: ExchangeKind,
    /// `task_queue_max_priority`; 0 for none.
    pub task_queue_max_priority: u8,
    /// `broker_native_delayed_delivery`
    pub broker_native_delayed_delivery: DelayedDelivery,
    /// `broker_native_delayed_delivery_queue_type`
    pub broker_native_delayed_delivery_queue_type: QueueType,
}
