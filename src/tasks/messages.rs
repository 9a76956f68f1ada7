//! Messages of transfers in queues and at workers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::TransferFilesBbcp;
use crate::manager::{FindError, FindMessages, HeldMessages};
use crate::settings;
use crate::transfer::id::TransferId;
use celery_protocol::RawMessage;
use celery_protocol::pidbox;
use celery_worker::broker::{
    Binding, Broker, BrokerError, Consumer, Declaration, Disposition, Exchange, ExchangeKind,
    Publication, Queue, Subscription,
};

/// Exchange of replies to remote control.
const REPLIES: &str = "reply.celery.pidbox";

/// Requests whose answers together contain all messages that a worker holds.
const METHODS: [&str; 3] = ["active", "reserved", "scheduled"];

/// Time limit for the answers of workers; Celery's `inspect` waits for one second.
const REPLY_TIMEOUT: Duration = Duration::from_millis(1500);

/// Time limit for any other answer of the broker.
const BROKER_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of bytes of answers. Later answers are ignored.
const MAX_BYTES: usize = 32 << 20;

/// Searcher for messages through a broker.
pub struct Messages {
    broker: Arc<dyn Broker>,
    /// Names of `transfer_files_bbcp` on the wire.
    names: HashSet<String>,
}

impl Messages {
    /// Creates a searcher that uses `broker`; the settings contain the names of the tasks.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, settings: &settings::Celery) -> Self {
        let names = settings.task_names.get(TransferFilesBbcp::KEY);
        Self {
            broker,
            names: names.into_iter().flatten().cloned().collect(),
        }
    }

    async fn ask(&self, consumer: &mut Consumer, key: &str) -> Result<HeldMessages, FindError> {
        let mut connected = consumer.connected();
        match timeout(BROKER_TIMEOUT, connected.wait_for(|up| *up)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => {
                return Err(FindError("no connection for the replies of workers".into()));
            }
        }
        for method in METHODS {
            match self
                .broker
                .publish(&control_request(method, key), BROKER_TIMEOUT)
                .await
            {
                Ok(()) => {}
                // The exchange for remote control does not exist, so no worker listens to it.
                Err(BrokerError::Refused { .. }) => return Ok(HeldMessages::default()),
                Err(error) => return Err(FindError(error.into())),
            }
        }
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut held = HeldMessages::default();
        let mut nodes = HashSet::new();
        let mut left = MAX_BYTES;
        while let Ok(Some(delivery)) = timeout_at(deadline, consumer.next()).await {
            let bytes = delivery.message.body.len();
            if bytes > left {
                tracing::warn!(
                    bytes = MAX_BYTES,
                    "replies of workers about their messages are too large; the rest is ignored"
                );
                break;
            }
            left -= bytes;
            self.read(&delivery.message, &mut held, &mut nodes);
            delivery.settle(Disposition::Ack).await;
        }
        held.workers = nodes.len();
        Ok(held)
    }

    /// Reads an answer: `{node: [task]}`. Other text is skipped.
    fn read(&self, message: &RawMessage, held: &mut HeldMessages, nodes: &mut HashSet<String>) {
        let Ok(Value::Object(answer)) = serde_json::from_slice(&message.body) else {
            return;
        };
        for (node, tasks) in answer {
            nodes.insert(node);
            let Value::Array(tasks) = tasks else { continue };
            for task in tasks {
                let Ok(shown) = serde_json::from_value::<ShownEntry>(task) else {
                    continue;
                };
                // An entry of a task with an ETA contains the task in a field.
                let shown = shown.request.map_or(shown.task, |wrapped| *wrapped);
                if !self.names.contains(&shown.kind) && !self.names.contains(&shown.name) {
                    continue;
                }
                held.transfers
                    .extend(data_transfer_id(&shown.args, &shown.kwargs));
                held.task_ids.insert(shown.id);
            }
        }
    }
}

#[async_trait]
impl FindMessages for Messages {
    async fn ready(&self, queues: &[String]) -> Result<HashMap<String, u64>, FindError> {
        let survey = timeout(BROKER_TIMEOUT, self.broker.survey(queues)).await;
        let depths = match survey {
            Ok(Ok(depths)) => depths,
            Ok(Err(error)) => return Err(FindError(error.into())),
            Err(_) => {
                return Err(FindError(
                    "the broker did not return the number of messages in time".into(),
                ));
            }
        };
        let messages = depths.into_iter().map(|d| (d.queue, d.messages.into()));
        Ok(messages.collect())
    }

    async fn held(&self) -> Result<HeldMessages, FindError> {
        let key = Uuid::new_v4().to_string();
        let mut answers = Subscription::new("answers of workers", vec![replies(&key)]);
        answers.max_body_bytes = Some(MAX_BYTES);
        let mut consumer = self.broker.consume(answers);
        let held = self.ask(&mut consumer, &key).await;
        consumer.cancel();
        held
    }
}

/// A task in a worker's answer, possibly inside of an entry with its ETA.
#[derive(Deserialize)]
struct ShownEntry {
    #[serde(flatten)]
    task: ShownTask,
    request: Option<Box<ShownTask>>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct ShownTask {
    id: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    args: Value,
    kwargs: Value,
}

/// Reads the transfer's id from a message's arguments, even if other arguments do not fit. A worker may show
/// the arguments as Python prints them.
pub(super) fn data_transfer_id(args: &Value, kwargs: &Value) -> Option<TransferId> {
    let by_name = match kwargs {
        Value::Object(kwargs) => kwargs.get("data_transfer_id").and_then(integer),
        Value::String(printed) => printed
            .split_once("'data_transfer_id':")
            .and_then(|(_, value)| leading_integer(value)),
        _ => None,
    };
    let id = by_name.or_else(|| match args {
        Value::Array(args) => args.first().and_then(integer),
        Value::String(printed) => leading_integer(printed),
        _ => None,
    });
    id.map(TransferId::new)
}

fn integer(value: &Value) -> Option<i64> {
    value
        .as_i64()
        .or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()))
}

/// Parses the number at the beginning of a printed sequence or value.
fn leading_integer(printed: &str) -> Option<i64> {
    let printed = printed.trim_start_matches(['(', '[', ' ', '\'', '"']);
    let end = printed
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(printed.len());
    printed.get(..end)?.parse().ok()
}

fn exchange(name: &str, kind: ExchangeKind) -> Exchange {
    Exchange {
        name: name.into(),
        kind,
        durable: false,
    }
}

/// Creates a request to all workers.
fn control_request(method: &str, key: &str) -> Publication {
    let reply_to = pidbox::ReplyTo {
        exchange: REPLIES.into(),
        routing_key: key.into(),
    };
    let message = pidbox::request(method, &json!({}), key, &reply_to, 0);
    let declared = exchange(pidbox::EXCHANGE, ExchangeKind::Fanout);
    let mut publication = Publication::new(pidbox::EXCHANGE, "", message);
    publication.declare = Some(Declaration::Exchange(declared));
    publication
}

/// Creates the queue for the answers, with the arguments that Celery uses.
fn replies(key: &str) -> Queue {
    let arguments = [
        ("x-message-ttl".to_owned(), json!(300_000)),
        ("x-expires".to_owned(), json!(10_000)),
    ];
    Queue {
        name: format!("{key}.{REPLIES}"),
        durable: false,
        exclusive: true,
        auto_delete: true,
        arguments: Map::from_iter(arguments),
        binding: Some(Binding {
            exchange: exchange(REPLIES, ExchangeKind::Direct),
            key: key.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(json!([42]), json!({}), Some(42))]
    #[case(json!([]), json!({"data_transfer_id": 42, "session": null}), Some(42))]
    #[case(json!(["42"]), json!({}), Some(42))]
    #[case(json!("(42,)"), json!("{}"), Some(42))]
    #[case(json!("[42]"), json!("{}"), Some(42))]
    #[case(json!("()"), json!("{'session': None, 'data_transfer_id': 42}"), Some(42))]
    #[case(json!("()"), json!("{}"), None)]
    #[case(json!([{}]), json!([]), None)]
    #[case(json!(null), json!(null), None)]
    fn arguments_name_a_transfer(
        #[case] args: Value,
        #[case] kwargs: Value,
        #[case] expected: Option<i64>,
    ) {
        let expected = expected.map(TransferId::new);
        assert_eq!(data_transfer_id(&args, &kwargs), expected);
    }

    fn messages() -> Messages {
        Messages {
            broker: Arc::new(celery_worker::broker::memory::MemoryBroker::new()),
            names: HashSet::from(["transfer".to_owned()]),
        }
    }

    fn read(body: &[u8]) -> (HeldMessages, HashSet<String>) {
        let (mut held, mut nodes) = (HeldMessages::default(), HashSet::new());
        let message = RawMessage {
            body: body.to_vec(),
            ..RawMessage::default()
        };
        messages().read(&message, &mut held, &mut nodes);
        (held, nodes)
    }

    #[test]
    fn replies_of_both_kinds_are_read() {
        let answer = json!({
            "celery@a": [
                {"id": "1", "name": "transfer", "type": "transfer", "args": [7], "kwargs": {}},
                {"id": "2", "name": "other", "type": "other", "args": [8], "kwargs": {}},
                "no task",
            ],
            "celery@b": [
                {"eta": "later", "priority": 6,
                 "request": {"id": "3", "name": "transfer", "args": "(9,)", "kwargs": "{}"}},
            ],
            "celery@c": {"error": "KeyError('active')"},
        });
        let (held, nodes) = read(answer.to_string().as_bytes());
        assert_eq!(held.transfers, [7, 9].map(TransferId::new).into());
        assert_eq!(
            held.task_ids,
            HashSet::from(["1".to_owned(), "3".to_owned()])
        );
        assert_eq!(nodes.len(), 3);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(body: Vec<u8>, text in ".*") {
            read(&body);
            read(json!({"n": [{"args": text, "kwargs": text}]}).to_string().as_bytes());
            leading_integer(&text);
        }
    }
}
