//! Settings of the queues, by Celery's names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Kind of an exchange, in AMQP's terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExchangeKind {
    /// By equal routing key.
    #[default]
    Direct,
    /// To every bound queue.
    Fanout,
    /// By pattern.
    Topic,
    /// By headers.
    Headers,
}

impl ExchangeKind {
    /// Its name in AMQP.
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
pub enum QueueType {
    /// On one node.
    #[default]
    Classic,
    /// Replicated.
    Quorum,
}

impl QueueType {
    /// Its name in `x-queue-type`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// When the queues for native delayed delivery are declared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DelayedDelivery {
    /// When a task queue is a quorum queue, as in Celery.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Declaration of one queue.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskQueue {
    /// Its exchange; otherwise the default exchange, or one of its own name.
    pub exchange: Option<String>,
    /// The exchange's kind.
    pub exchange_type: Option<ExchangeKind>,
    /// Binding key; otherwise its name.
    pub routing_key: Option<String>,
    /// Queue arguments, e.g. `x-max-priority`.
    #[serde(default)]
    pub arguments: serde_json::Map<String, serde_json::Value>,
}

/// Settings from which the declarations of all queues follow; each field is Celery's setting of that name.
#[derive(Debug, Clone, Default)]
pub struct QueueSettings {
    /// `task_queues`
    pub task_queues: BTreeMap<String, TaskQueue>,
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
