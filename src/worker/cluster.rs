//! What workers tell each other: mingle and gossip.
//!
//! *Mingle*: a node that starts greets the others (`hello`) and learns what they have revoked.
//! *Gossip*: nodes hear each other's events, keep their clocks together, and answer when one wants
//! to hold an election; a node that does not answer would stall it for all. This worker wants none
//! itself.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Worker;
use super::control::ids;
use crate::broker::{Binding, Exchange, ExchangeKind, Publication, Queue};
use crate::telemetry::chain;
use crate::wire::RawMessage;
use crate::wire::event::Event;
use crate::wire::pidbox;

/// The exchange of replies to requests.
const REPLIES: &str = "reply.celery.pidbox";

/// The queues by which a node hears the others.
pub(super) struct Ears {
    /// Routing key of the replies to this node's greeting.
    replies: String,
}

impl Ears {
    pub(super) fn new() -> Self {
        Self {
            replies: Uuid::new_v4().to_string(),
        }
    }

    /// The queues, as Celery declares them.
    pub(super) fn queues(&self) -> [Queue; 2] {
        [
            transient(
                format!("celeryev.{}", Uuid::new_v4()),
                (2_000, 60_000),
                Exchange::events(),
                "worker.#",
            ),
            transient(
                format!("{}.{REPLIES}", self.replies),
                (300_000, 10_000),
                Exchange {
                    name: REPLIES.into(),
                    kind: ExchangeKind::Direct,
                    durable: false,
                },
                &self.replies,
            ),
        ]
    }

    /// Greets the other nodes.
    pub(super) async fn greet(&self, worker: &Worker) {
        let arguments = json!({"from_node": &*worker.hostname, "revoked": worker.revoked.list()});
        let reply_to = pidbox::ReplyTo {
            exchange: REPLIES.into(),
            routing_key: self.replies.clone(),
        };
        let ticket = Uuid::new_v4().to_string();
        let publication = Publication {
            exchange: pidbox::EXCHANGE.into(),
            routing_key: String::new(),
            message: pidbox::request(
                "hello",
                &arguments,
                &ticket,
                &reply_to,
                worker.events.tick(),
            ),
            declare: None,
            mandatory: false,
        };
        if let Err(error) = worker
            .transport
            .publish(&publication, super::control::WITHIN)
            .await
        {
            tracing::warn!(error = %chain(&error), "the other workers were not greeted");
        }
    }

    /// Hears what came through one of the queues; whether it was for them at all.
    pub(super) fn hear(&self, worker: &Worker, exchange: &str, message: &RawMessage) -> bool {
        let heard = match exchange {
            REPLIES => Self::welcomed,
            events if events == Exchange::events().name => Self::overheard,
            _ => return false,
        };
        if let Ok(Value::Object(body)) = serde_json::from_slice(&message.body) {
            heard(worker, &body);
        }
        true
    }

    /// The answer of another node: `{node: {"revoked": [id], "clock": n}}`.
    fn welcomed(worker: &Worker, reply: &Map<String, Value>) {
        for (node, told) in reply {
            if **node == *worker.hostname {
                continue;
            }
            tracing::debug!(node, "another worker is here");
            worker.revoked.add(ids(&told["revoked"]));
            if let Some(clock) = told["clock"].as_u64() {
                worker.events.observe(clock);
            }
        }
    }

    /// An event of another node.
    fn overheard(worker: &Worker, event: &Map<String, Value>) {
        let text = |name: &str| event.get(name).and_then(Value::as_str);
        if text("hostname") == Some(&worker.hostname) {
            return;
        }
        if let Some(clock) = event.get("clock").and_then(Value::as_u64) {
            worker.events.observe(clock);
        }
        if let (Some("worker-elect"), Some(id)) = (text("type"), text("id")) {
            worker.events.send(&Event::WorkerElectAck(id));
        }
    }
}

/// A queue that belongs to this connection; its times in milliseconds.
fn transient(
    name: String,
    (message_ttl, expires): (u32, u32),
    exchange: Exchange,
    key: &str,
) -> Queue {
    let arguments = [
        ("x-message-ttl".to_owned(), json!(message_ttl)),
        ("x-expires".to_owned(), json!(expires)),
    ];
    Queue {
        name,
        durable: false,
        exclusive: true,
        auto_delete: true,
        arguments: Map::from_iter(arguments),
        binding: Some(Binding {
            exchange,
            key: key.into(),
        }),
    }
}
