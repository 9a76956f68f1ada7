//! Queues, exchanges and bindings of a broker in memory.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::broker::topology::TopologyStep;
use crate::broker::{BrokerError, Exchange, ExchangeKind, Publication, Queue};
use celery_protocol::RawMessage;

#[derive(Debug, Default)]
pub(super) struct Topology {
    exchanges: HashMap<String, ExchangeKind>,
    pub(super) bindings: HashSet<Bound>,
    pub(super) queues: HashMap<String, QueueContents>,
}

/// A queue that is bound to an exchange.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Bound {
    exchange: String,
    key: String,
    pub(super) queue: String,
}

/// The messages of a queue.
#[derive(Debug, Default)]
pub(super) struct QueueContents {
    pub(super) messages: VecDeque<Stored>,
    pub(super) consumers: u32,
}

#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) message: RawMessage,
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) redelivered: bool,
}

impl Topology {
    fn declare_exchange(&mut self, exchange: &Exchange) {
        self.exchanges
            .entry(exchange.name.clone())
            .or_insert(exchange.kind);
    }

    pub(super) fn declare(&mut self, queue: &Queue) {
        if let Some(binding) = &queue.binding {
            self.declare_exchange(&binding.exchange);
            self.bindings.insert(Bound {
                exchange: binding.exchange.name.clone(),
                key: binding.key.clone(),
                queue: queue.name.clone(),
            });
        }
        self.queues.entry(queue.name.clone()).or_default();
    }

    fn take_step(&mut self, step: TopologyStep) {
        match step {
            TopologyStep::Exchange(exchange) => self.declare_exchange(&exchange),
            TopologyStep::Queue(queue) => self.declare(&queue),
            TopologyStep::BindQueue {
                source,
                destination,
                key,
            } => {
                self.bindings.insert(Bound {
                    exchange: source,
                    key,
                    queue: destination,
                });
            }
            // Only native delayed delivery binds exchanges, and this broker does not support it.
            TopologyStep::BindExchange { .. } => {}
        }
    }

    /// Names of the queues that get a message.
    fn route(&self, exchange: &str, routing_key: &str) -> HashSet<String> {
        if exchange.is_empty() {
            let queue = self.queues.contains_key(routing_key);
            return queue.then(|| routing_key.to_owned()).into_iter().collect();
        }
        let Some(kind) = self.exchanges.get(exchange) else {
            return HashSet::new();
        };
        let takes = |bound: &&Bound| {
            bound.exchange == exchange
                && match kind {
                    ExchangeKind::Direct => bound.key == routing_key,
                    ExchangeKind::Topic => matches(&bound.key, routing_key),
                    _ => true,
                }
        };
        let bound = self.bindings.iter().filter(takes);
        bound.map(|bound| bound.queue.clone()).collect()
    }

    pub(super) fn publish(&mut self, publication: &Publication) -> Result<(), BrokerError> {
        for step in publication
            .declare
            .iter()
            .flat_map(|declare| declare.steps())
        {
            self.take_step(step);
        }
        let (exchange, routing_key) = (&publication.exchange, &publication.routing_key);
        let queues = self.route(exchange, routing_key);
        if queues.is_empty() && publication.mandatory {
            return Err(BrokerError::Unroutable {
                exchange: exchange.clone(),
                routing_key: routing_key.clone(),
            });
        }
        for name in queues {
            if let Some(queue) = self.queues.get_mut(&name) {
                queue.messages.push_back(Stored {
                    message: publication.message.clone(),
                    exchange: exchange.clone(),
                    routing_key: routing_key.clone(),
                    redelivered: false,
                });
            }
        }
        Ok(())
    }

    pub(super) fn count_consumers(&mut self, queues: &[String], change: impl Fn(&mut u32)) {
        for name in queues {
            if let Some(queue) = self.queues.get_mut(name) {
                change(&mut queue.consumers);
            }
        }
    }
}

/// Matches a routing key against a topic pattern: `*` is one word, `#` any number of them.
fn matches(pattern: &str, routing_key: &str) -> bool {
    fn words(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), None) => words(rest, key),
            (Some((&"#", rest)), Some((_, after))) => words(rest, key) || words(pattern, after),
            (Some((word, rest)), Some((own, after))) => {
                (*word == "*" || word == own) && words(rest, after)
            }
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = routing_key.split('.').collect();
    words(&pattern, &key)
}
