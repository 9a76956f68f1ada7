//! What workers tell each other: mingle and gossip.
//!
//! *Mingle*: a node that starts greets the others (`hello`) and learns what they have revoked.
//! *Gossip*: nodes hear each other's events, keep their clocks together, and answer when one wants
//! to hold an election; a node that does not answer would stall it for all. This worker wants none
//! itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Worker;
use super::control::ids;
use crate::broker::{Binding, Exchange, ExchangeKind, Publication, Queue};
use celery_protocol::RawMessage;
use celery_protocol::event::Event;
use celery_protocol::pidbox::{self, Request};
use service_connection::error_chain::chain;

/// Largest event that is read, in bytes: events of workers have some hundred.
const MAX_EVENT: usize = 64 << 10;

/// Minimum interval of reports about a second worker with the same name.
const REPORT_EVERY: Duration = Duration::from_secs(600);

/// The exchange of replies to requests.
const REPLIES: &str = "reply.celery.pidbox";

/// The queues by which a node hears the others.
pub(super) struct Ears {
    /// Routing key of the replies to this node's greeting.
    replies: String,
    /// True if the node's answer to itself has arrived.
    has_own_answer: AtomicBool,
}

/// Other workers with the same name as this one.
#[derive(Default)]
pub(super) struct Namesakes(Mutex<Option<Instant>>);

impl Namesakes {
    /// Reports another worker, unless the last report was recent.
    fn report(&self, hostname: &str, pid: Option<u64>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < REPORT_EVERY) {
            return;
        }
        *last = Some(Instant::now());
        tracing::warn!(
            hostname,
            pid,
            "another worker has the same node name; monitors and remote control cannot tell them apart"
        );
    }
}

impl Ears {
    pub(super) fn new() -> Self {
        Self {
            replies: Uuid::new_v4().to_string(),
            has_own_answer: AtomicBool::new(false),
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
        let body = &message.body;
        if exchange == REPLIES {
            if let Some(reply) = pidbox::decode(body) {
                self.welcomed(worker, &reply);
            }
        } else if exchange == Exchange::events().name {
            if body.len() <= MAX_EVENT
                && let Some(event) = pidbox::decode(body)
            {
                overheard(worker, &event);
            }
        } else {
            return false;
        }
        true
    }

    /// The answer of another node: `{node: {"revoked": [id], "clock": n}}`.
    fn welcomed(&self, worker: &Worker, reply: &Map<String, Value>) {
        for (node, told) in reply {
            if **node == *worker.hostname {
                // The node receives its own greeting, too, and answers it once.
                if self.has_own_answer.swap(true, Ordering::Relaxed) {
                    worker.namesakes.report(node, None);
                }
                continue;
            }
            tracing::debug!(node, "another worker is here");
            worker.revoked.add(ids(&told["revoked"]));
            if let Some(clock) = told["clock"].as_u64() {
                worker.events.observe(clock);
            }
        }
    }
}

/// An event of another node.
fn overheard(worker: &Worker, event: &Map<String, Value>) {
    let text = |name: &str| event.get(name).and_then(Value::as_str);
    let number = |name: &str| event.get(name).and_then(Value::as_u64);
    if text("hostname") == Some(&worker.hostname) {
        let pid = number("pid");
        // Processes in containers may have the same id; their greetings distinguish them.
        if pid.is_some_and(|pid| pid != u64::from(std::process::id())) {
            worker.namesakes.report(&worker.hostname, pid);
        }
        return;
    }
    if let Some(clock) = number("clock") {
        worker.events.observe(clock);
    }
    if let (Some("worker-elect"), Some(id)) = (text("type"), text("id")) {
        worker.events.send(&Event::WorkerElectAck(id));
    }
}

impl Worker {
    /// Handles a new node's greeting: both nodes exchange their revoked tasks.
    pub(super) fn hello(&self, request: &Request, ears: Option<&Ears>) -> Value {
        if *request.argument("from_node") == *self.hostname {
            let reply_to = request.reply_to.as_ref().map(|to| to.routing_key.as_str());
            if reply_to != ears.map(|ears| ears.replies.as_str()) {
                self.namesakes.report(&self.hostname, None);
            }
            return Value::Null;
        }
        let known = self.revoked.list();
        self.revoked.add(ids(request.argument("revoked")));
        json!({"revoked": known, "clock": self.events.tick()})
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
