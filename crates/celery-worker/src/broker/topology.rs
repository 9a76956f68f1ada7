//! Exchanges, queues and bindings, as Celery declares them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use super::delayed;
use super::queue_settings::{DelayedDelivery, ExchangeKind, QueueSettings, QueueType, TaskQueue};
use super::routes::{TaskRoute, TaskRoutes};

/// Declaration of an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Name of the exchange.
    pub name: String,
    /// Type of the exchange.
    pub kind: ExchangeKind,
    /// True if it survives a restart of the broker.
    pub durable: bool,
}

impl Exchange {
    /// A durable exchange.
    pub fn durable(name: impl Into<String>, kind: ExchangeKind) -> Self {
        Self {
            name: name.into(),
            kind,
            durable: true,
        }
    }

    /// The exchange for events.
    #[must_use]
    pub fn events() -> Self {
        Self::durable("celeryev", ExchangeKind::Topic)
    }
}

/// A queue's binding to an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The exchange; declared before the queue.
    pub exchange: Exchange,
    /// Binding key.
    pub key: String,
}

/// Declaration of a queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// Name of the queue; the default exchange routes by it.
    pub name: String,
    /// True if it survives a restart of the broker.
    pub durable: bool,
    /// True if it belongs to one connection.
    pub exclusive: bool,
    /// True if it is deleted with its last consumer.
    pub auto_delete: bool,
    /// Queue arguments, e.g. `x-expires`.
    pub arguments: Map<String, Value>,
    /// Binding of the queue, if any.
    pub binding: Option<Binding>,
}

impl Queue {
    /// A task queue as Celery declares it: durable, with a direct exchange of the same name.
    pub fn tasks(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::bound(name.clone(), ExchangeKind::Direct, &name, &name)
    }

    /// A durable queue that is bound to a durable exchange.
    fn bound(name: String, kind: ExchangeKind, exchange: &str, key: &str) -> Self {
        Self {
            name,
            durable: true,
            exclusive: false,
            auto_delete: false,
            arguments: Map::new(),
            binding: Some(Binding {
                exchange: Exchange::durable(exchange, kind),
                key: key.into(),
            }),
        }
    }

    /// A reply queue as an `rpc://` client declares it; it expires a day after its last use.
    pub fn replies(name: impl Into<String>) -> Self {
        let arguments = [("x-expires".to_owned(), Value::from(86_400_000_i32))];
        Self {
            name: name.into(),
            durable: true,
            exclusive: false,
            auto_delete: true,
            arguments: Map::from_iter(arguments),
            binding: None,
        }
    }

    /// A worker's queue for remote control. Celery names it after the node alone; two quick starts of one node would
    /// then exclude each other, so `tag` makes the name unique.
    #[must_use]
    pub fn control(hostname: &str, tag: &str) -> Self {
        let arguments = [
            ("x-message-ttl".to_owned(), Value::from(300_000_i32)),
            ("x-expires".to_owned(), Value::from(10_000_i32)),
        ];
        Self {
            name: format!("{hostname}.{tag}.celery.pidbox"),
            durable: false,
            // RabbitMQ 4.3 refuses transient queues that are not exclusive.
            exclusive: true,
            auto_delete: true,
            arguments: Map::from_iter(arguments),
            binding: Some(Binding {
                exchange: Exchange {
                    name: "celery.pidbox".into(),
                    kind: ExchangeKind::Fanout,
                    durable: false,
                },
                key: String::new(),
            }),
        }
    }

    /// Returns true if the declaration is that of a quorum queue.
    #[must_use]
    pub fn is_quorum(&self) -> bool {
        self.arguments.get("x-queue-type").and_then(Value::as_str) == Some("quorum")
    }

    /// Returns true if the queue belongs to the process that declares it, and is deleted with it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.exclusive || self.auto_delete
    }
}

/// Declarations of the task queues, from the settings for single queues and for all others.
///
/// Worker and producers share them, so that both declare the same.
#[derive(Debug, Clone, Default)]
pub struct TaskQueues {
    named: BTreeMap<String, Queue>,
    routes: TaskRoutes,
    other_type: QueueType,
    other_exchange: ExchangeKind,
    max_priority: u8,
    delayed: (DelayedDelivery, QueueType),
}

impl TaskQueues {
    /// Destination of a task that names none itself, by `task_routes`.
    pub(crate) fn task_route(&self, task: &str) -> Option<&TaskRoute> {
        self.routes.find(task)
    }

    /// Creates the declarations by Celery's rules: a queue in `task_queues` is declared with the values there. Without
    /// that table, the default queue has the default exchange and key. Every other queue has an exchange with its own
    /// name.
    #[must_use]
    pub fn new(settings: &QueueSettings) -> Self {
        let named = match settings.task_queues.is_empty() {
            false => settings
                .task_queues
                .iter()
                .map(|(name, given)| (name.clone(), given_queue(name, given, settings)))
                .collect(),
            true => {
                let name = &settings.task_default_queue;
                let queue = Queue {
                    arguments: typed(settings.task_default_queue_type),
                    ..Queue::bound(
                        name.clone(),
                        settings.task_default_exchange_type,
                        or(&settings.task_default_exchange, name),
                        or(&settings.task_default_routing_key, name),
                    )
                };
                BTreeMap::from([(name.clone(), queue)])
            }
        };
        Self {
            named,
            routes: TaskRoutes::new(&settings.task_routes),
            other_type: settings.task_create_missing_queue_type,
            other_exchange: settings.task_create_missing_queue_exchange_type,
            max_priority: settings.task_queue_max_priority,
            delayed: (
                settings.broker_native_delayed_delivery,
                settings.broker_native_delayed_delivery_queue_type,
            ),
        }
    }

    /// The declaration of one queue.
    #[must_use]
    pub fn queue(&self, name: &str) -> Queue {
        let mut queue = self.named.get(name).cloned().unwrap_or_else(|| Queue {
            arguments: typed(self.other_type),
            ..Queue::bound(name.into(), self.other_exchange, name, name)
        });
        // Quorum queues do not support this argument, and RabbitMQ refuses their declaration with it.
        if self.max_priority > 0 && !queue.is_quorum() {
            queue
                .arguments
                .entry("x-max-priority")
                .or_insert(self.max_priority.into());
        }
        queue
    }

    /// The route to a queue for a message with the delay `delay`.
    ///
    /// For a delay below one second, and without delayed delivery, the route is the default exchange: the worker itself
    /// waits for the eta.
    #[must_use]
    pub fn route(&self, name: &str, delay: Duration) -> Route {
        let queue = self.queue(name);
        let seconds = u32::try_from(delay.as_secs()).unwrap_or(u32::MAX);
        let kind = self.delayed(std::slice::from_ref(&queue));
        match (&queue.binding, kind) {
            (Some(binding), Some(kind))
                if seconds > 0 && binding.exchange.kind != ExchangeKind::Direct =>
            {
                Route {
                    exchange: delayed::entrance(),
                    routing_key: delayed::routing_key(seconds, &binding.key),
                    declare: Declaration::Delayed(queue, kind),
                }
            }
            _ => Route {
                exchange: String::new(),
                routing_key: name.into(),
                declare: Declaration::Queue(queue),
            },
        }
    }

    /// The type of the queues for native delayed delivery, if one of `queues` or the settings require them.
    #[must_use]
    pub fn delayed(&self, queues: &[Queue]) -> Option<QueueType> {
        let (when, kind) = self.delayed;
        let wanted = match when {
            DelayedDelivery::Always => true,
            DelayedDelivery::Never => false,
            DelayedDelivery::Auto => queues.iter().any(Queue::is_quorum),
        };
        wanted.then_some(kind)
    }
}

fn given_queue(name: &str, given: &TaskQueue, settings: &QueueSettings) -> Queue {
    let (exchange, kind) = match &given.exchange {
        Some(exchange) => (exchange.as_str(), ExchangeKind::Direct),
        None => (
            or(&settings.task_default_exchange, name),
            settings.task_default_exchange_type,
        ),
    };
    let kind = given.exchange_type.unwrap_or(kind);
    let key = given.routing_key.as_deref().unwrap_or(name);
    Queue {
        arguments: given.arguments.clone(),
        ..Queue::bound(name.into(), kind, exchange, key)
    }
}

fn or<'a>(given: &'a str, otherwise: &'a str) -> &'a str {
    if given.is_empty() { otherwise } else { given }
}

/// The broker creates a classic queue if the type is missing; with the type, the declaration would differ from that of
/// a queue that was declared without it.
fn typed(kind: QueueType) -> Map<String, Value> {
    match kind {
        QueueType::Classic => Map::new(),
        QueueType::Quorum => Map::from_iter([("x-queue-type".to_owned(), "quorum".into())]),
    }
}

/// Objects to declare before a message is published, so that it is not lost.
#[derive(Debug, Clone, PartialEq)]
pub enum Declaration {
    /// The message's queue.
    Queue(Queue),
    /// The message's exchange.
    Exchange(Exchange),
    /// The message's queue, and the queues for native delayed delivery, which have this type.
    Delayed(Queue, QueueType),
}

impl Declaration {
    /// A unique name of the declaration.
    #[must_use]
    pub fn key(&self) -> (&'static str, &str) {
        match self {
            Self::Queue(queue) => ("queue", &queue.name),
            Self::Exchange(exchange) => ("exchange", &exchange.name),
            Self::Delayed(queue, _) => ("delayed", &queue.name),
        }
    }

    /// The steps of the declaration.
    #[must_use]
    pub fn steps(&self) -> Vec<TopologyStep> {
        match self {
            Self::Queue(queue) => vec![TopologyStep::Queue(queue.clone())],
            Self::Exchange(exchange) => vec![TopologyStep::Exchange(exchange.clone())],
            Self::Delayed(queue, kind) => {
                let mut steps = delayed::topology(*kind);
                steps.push(TopologyStep::Queue(queue.clone()));
                steps.extend(behind_delay(queue));
                steps
            }
        }
    }

    /// Returns true if the exchange `name` exists after the declaration.
    #[must_use]
    pub fn brings(&self, name: &str) -> bool {
        match self {
            Self::Exchange(exchange) => exchange.name == name,
            Self::Queue(queue) => queue
                .binding
                .as_ref()
                .is_some_and(|binding| binding.exchange.name == name),
            Self::Delayed(..) => name == delayed::entrance(),
        }
    }
}

/// Destination of a message.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Exchange; empty for the default one, which routes by queue name.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// Declaration to make before publishing.
    pub declare: Declaration,
}

/// One step in the declaration of a topology.
#[derive(Debug, Clone, PartialEq)]
pub enum TopologyStep {
    /// Declares an exchange.
    Exchange(Exchange),
    /// Declares a queue, with its exchange and binding.
    Queue(Queue),
    /// Binds the exchange `destination` to the exchange `source`.
    BindExchange {
        /// Exchange that the messages come from.
        source: String,
        /// Exchange that the messages go to.
        destination: String,
        /// Binding key.
        key: String,
    },
    /// Binds the queue `destination` to the exchange `source`.
    BindQueue {
        /// Exchange that the messages come from.
        source: String,
        /// Queue that the messages go to.
        destination: String,
        /// Binding key.
        key: String,
    },
}

impl fmt::Display for TopologyStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exchange(exchange) => write!(f, "exchange `{}`", exchange.name),
            Self::Queue(queue) => write!(f, "queue `{}`", queue.name),
            Self::BindExchange {
                source,
                destination,
                ..
            } => write!(f, "the binding of exchange `{destination}` to `{source}`"),
            Self::BindQueue {
                source,
                destination,
                ..
            } => write!(f, "the binding of queue `{destination}` to `{source}`"),
        }
    }
}

/// Bindings that route delayed messages to a task queue; none for a queue with a direct exchange, which does not
/// support patterns.
#[must_use]
pub fn behind_delay(queue: &Queue) -> Vec<TopologyStep> {
    let Some(binding) = &queue.binding else {
        return Vec::new();
    };
    let exchange = &binding.exchange;
    if exchange.kind == ExchangeKind::Direct {
        return Vec::new();
    }
    let key = delayed::behind(&binding.key);
    vec![
        TopologyStep::BindExchange {
            source: delayed::DELIVERY.into(),
            destination: exchange.name.clone(),
            key: key.clone(),
        },
        TopologyStep::BindQueue {
            source: exchange.name.clone(),
            destination: queue.name.clone(),
            key,
        },
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn quorum() -> Map<String, Value> {
        Map::from_iter([("x-queue-type".to_owned(), "quorum".into())])
    }

    fn queues<const N: usize>(
        named: [(&str, TaskQueue); N],
        change: impl FnOnce(&mut QueueSettings),
    ) -> TaskQueues {
        let mut settings = QueueSettings {
            task_queues: named.map(|(name, queue)| (name.to_owned(), queue)).into(),
            task_default_queue: "celery".into(),
            ..QueueSettings::default()
        };
        change(&mut settings);
        TaskQueues::new(&settings)
    }

    fn shape(queue: &Queue) -> Value {
        let binding = queue.binding.as_ref();
        json!([
            binding.map(|b| &b.exchange.name),
            binding.map(|b| b.exchange.kind.as_str()),
            binding.map(|b| &b.key),
            queue.arguments,
        ])
    }

    #[test]
    fn the_default_queue_and_others() {
        let of = queues([], |settings| {
            settings.task_default_queue = "work".into();
            settings.task_default_exchange = "e".into();
            settings.task_default_exchange_type = ExchangeKind::Topic;
            settings.task_default_routing_key = "k".into();
            settings.task_default_queue_type = QueueType::Quorum;
        });
        assert_eq!(
            shape(&of.queue("work")),
            json!(["e", "topic", "k", {"x-queue-type": "quorum"}])
        );
        assert_eq!(of.queue("other"), Queue::tasks("other"));
    }

    #[test]
    fn queues_of_the_table() {
        let arguments = json!({"x-max-priority": 9, "x-single-active-consumer": true});
        let fast = TaskQueue {
            exchange: Some("x".into()),
            exchange_type: Some(ExchangeKind::Headers),
            routing_key: Some("r".into()),
            arguments: arguments.as_object().cloned().unwrap(),
        };
        let of = queues(
            [("celery", TaskQueue::default()), ("fast", fast)],
            |settings| {
                settings.task_queue_max_priority = 5;
                settings.task_create_missing_queue_type = QueueType::Quorum;
                settings.task_create_missing_queue_exchange_type = ExchangeKind::Topic;
            },
        );
        assert_eq!(
            shape(&of.queue("celery")),
            json!(["celery", "direct", "celery", {"x-max-priority": 5}])
        );
        assert_eq!(
            shape(&of.queue("fast")),
            json!(["x", "headers", "r", {"x-max-priority": 9, "x-single-active-consumer": true}])
        );
        assert_eq!(
            shape(&of.queue("site")),
            json!(["site", "topic", "site", {"x-queue-type": "quorum"}])
        );
    }

    #[test]
    fn the_defaults_are_celerys() {
        for of in [queues([], |_| ()), TaskQueues::default()] {
            assert_eq!(of.queue("celery"), Queue::tasks("celery"));
        }
    }

    #[test]
    fn routes_with_and_without_a_delay() {
        let topic = TaskQueue {
            exchange_type: Some(ExchangeKind::Topic),
            routing_key: Some("k".into()),
            arguments: quorum(),
            ..TaskQueue::default()
        };
        let direct = TaskQueue {
            arguments: quorum(),
            ..TaskQueue::default()
        };
        let of = queues([("q", topic), ("d", direct)], |_| ());
        let way = |name: &str, milliseconds| {
            let route = of.route(name, Duration::from_millis(milliseconds));
            let declared = route.declare.key().0;
            (route.exchange, route.routing_key, declared)
        };
        let straight = |name: &str| (String::new(), name.to_owned(), "queue");
        assert_eq!(way("q", 999), straight("q"));
        assert_eq!(way("d", 5000), straight("d"));
        assert_eq!(way("other", 5000), straight("other"));
        let expected = (
            "celery_delayed_27".to_owned(),
            delayed::routing_key(5, "k"),
            "delayed",
        );
        assert_eq!(way("q", 5000), expected);
        assert!(
            of.route("q", Duration::MAX)
                .routing_key
                .starts_with("1.1.1.")
        );
    }

    #[test]
    fn delayed_delivery_follows_the_settings() {
        for (when, names, expected) in [
            (
                DelayedDelivery::Auto,
                &["q", "r"][..],
                Some(QueueType::Classic),
            ),
            (DelayedDelivery::Auto, &["r"], None),
            (DelayedDelivery::Never, &["q"], None),
            (DelayedDelivery::Always, &[], Some(QueueType::Classic)),
        ] {
            let queue = TaskQueue {
                arguments: quorum(),
                ..TaskQueue::default()
            };
            let of = queues([("q", queue)], |settings| {
                settings.broker_native_delayed_delivery = when;
                settings.broker_native_delayed_delivery_queue_type = QueueType::Classic;
            });
            let queues: Vec<Queue> = names.iter().map(|name| of.queue(name)).collect();
            assert_eq!(of.delayed(&queues), expected, "{when:?} {names:?}");
        }
    }
}
