//! Mingle and gossip: messages between workers.
//!
//! *Mingle*: a node that starts asks the others (`hello`) for the tasks that they have revoked, and waits for the answers
//! before it runs a task.
//! *Gossip*: nodes receive each other's events, synchronise their clocks, and answer when one wants
//! to hold an election; a node that does not answer would stall it for all. This worker wants none
//! itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;
use uuid::Uuid;

use super::{RemoteControl, WITHIN, ids};
use crate::broker::{Binding, Exchange, ExchangeKind, Publication, Queue};
use celery_protocol::RawMessage;
use celery_protocol::event::Event;
use celery_protocol::pidbox::{self, ControlRequest};
use service_connection::error_chain::chain;

/// Largest event that is read, in bytes: events of workers have some hundred.
const MAX_EVENT: usize = 64 << 10;

/// Minimum interval of reports about a second worker with the same name.
const REPORT_EVERY: Duration = Duration::from_secs(600);

/// Maximum wait for the answers to the greeting, as in Celery, which always waits for this time.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

/// Wait for further answers after an answer.
const NEXT_ANSWER: Duration = Duration::from_millis(200);

/// The exchange of replies to requests.
const REPLIES: &str = "reply.celery.pidbox";

/// Mingle and gossip subscriptions of a node.
pub(super) struct ClusterQueues {
    /// Routing key of the replies to this node's greeting.
    replies: String,
    /// True if the node's answer to itself has arrived.
    has_own_answer: AtomicBool,
    /// An answer has arrived.
    answered: Notify,
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

impl ClusterQueues {
    pub(super) fn new() -> Self {
        Self {
            replies: Uuid::new_v4().to_string(),
            has_own_answer: AtomicBool::new(false),
            answered: Notify::new(),
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
    pub(super) async fn greet(&self, control: &RemoteControl) {
        let arguments = json!({"from_node": &*control.worker.hostname, "revoked": control.worker.revoked.list()});
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
                control.worker.events.tick(),
            ),
            declare: None,
            mandatory: false,
            queue_lifetime: None,
        };
        if let Err(error) = control.worker.broker.publish(&publication, WITHIN).await {
            tracing::warn!(
                error = %chain(&error),
                "mingle failed; tasks that other workers know as revoked may run"
            );
        }
    }

    /// Waits for the answers to the greeting.
    pub(super) async fn answers(&self) {
        let all = async {
            // The number of nodes is not known. But the broker sends the greeting to all of them when it sends it to this one.
            while !self.has_own_answer.load(Ordering::Relaxed) {
                self.answered.notified().await;
            }
            while timeout(NEXT_ANSWER, self.answered.notified()).await.is_ok() {}
        };
        if timeout(ANSWERED_WITHIN, all).await.is_err() {
            tracing::debug!("mingle: answers of other workers may be missing");
        }
    }

    /// Handles a message of one of the queues; returns false for other messages.
    pub(super) fn receive(
        &self,
        control: &RemoteControl,
        exchange: &str,
        message: &RawMessage,
    ) -> bool {
        let body = &message.body;
        if exchange == REPLIES {
            if let Some(reply) = pidbox::decode(body) {
                self.observe_reply(control, &reply);
                self.answered.notify_one();
            }
        } else if exchange == Exchange::events().name {
            if body.len() <= MAX_EVENT
                && let Some(event) = pidbox::decode(body)
            {
                observe_event(control, &event);
            }
        } else {
            return false;
        }
        true
    }

    /// The answer of another node: `{node: {"revoked": [id], "clock": n}}`.
    fn observe_reply(&self, control: &RemoteControl, reply: &Map<String, Value>) {
        for (node, answer) in reply {
            if **node == *control.worker.hostname {
                // The node receives its own greeting, too, and answers it once.
                if self.has_own_answer.swap(true, Ordering::Relaxed) {
                    control.namesakes.report(node, None);
                }
                continue;
            }
            tracing::debug!(node, "another worker answered");
            control.worker.revoked.add(revoked_ids(&answer["revoked"]));
            if let Some(clock) = answer["clock"].as_u64() {
                control.worker.events.observe(clock);
            }
        }
    }
}

/// An event of another node.
fn observe_event(control: &RemoteControl, event: &Map<String, Value>) {
    let text = |name: &str| event.get(name).and_then(Value::as_str);
    let number = |name: &str| event.get(name).and_then(Value::as_u64);
    if text("hostname") == Some(&control.worker.hostname) {
        let pid = number("pid");
        // Processes in containers may have the same id; their greetings distinguish them.
        if pid.is_some_and(|pid| pid != u64::from(std::process::id())) {
            control.namesakes.report(&control.worker.hostname, pid);
        }
        return;
    }
    if let Some(clock) = number("clock") {
        control.worker.events.observe(clock);
    }
    if let (Some("worker-elect"), Some(id)) = (text("type"), text("id")) {
        control.worker.events.send(&Event::WorkerElectAck(id));
    }
}

impl RemoteControl {
    /// Handles a new node's greeting: both nodes exchange their revoked tasks.
    pub(super) fn hello(&self, request: &ControlRequest) -> Value {
        if *request.argument("from_node") == *self.worker.hostname {
            let reply_to = request.reply_to.as_ref().map(|to| to.routing_key.as_str());
            if reply_to
                != self
                    .cluster
                    .as_ref()
                    .map(|cluster| cluster.replies.as_str())
            {
                self.namesakes.report(&self.worker.hostname, None);
            }
            return Value::Null;
        }
        self.worker
            .revoked
            .add(revoked_ids(request.argument("revoked")));
        let known = self.worker.revoked.list();
        json!({"revoked": known, "clock": self.worker.events.tick()})
    }
}

/// Ids of revoked tasks that another node sends: a list or, before Celery 5.7, a mapping `{id: [time, id]}`.
fn revoked_ids(revoked: &Value) -> Vec<String> {
    match revoked {
        Value::Object(times) => times.keys().cloned().collect(),
        list => ids(list),
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

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// In a greeting and in its answer, by Celery 5.7 and by earlier versions.
    #[rstest]
    #[case(json!(["a", "b"]), &["a", "b"])]
    #[case(json!({"a": [1795493630.7, "a"], "b": [1795493631.2, "b"]}), &["a", "b"])]
    #[case(json!([1, "a", null]), &["a"])]
    #[case(json!(null), &[])]
    #[case(json!(7), &[])]
    fn revoked_ids_of_other_nodes(#[case] revoked: Value, #[case] expected: &[&str]) {
        assert_eq!(revoked_ids(&revoked), expected);
    }
}
