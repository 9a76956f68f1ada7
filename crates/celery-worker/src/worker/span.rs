//! The span of an attempt at a task: from the moment that it begins until what follows it is done.
//!
//! Its name and its `celery.` attributes are those that `opentelemetry-instrumentation-celery` gives a
//! Python worker's, so that traces of both look alike; the others are OpenTelemetry's conventions for
//! messaging, which that package does not know yet.

use serde_json::json;

use opentelemetry::{Array, StringValue, Value};

use super::accepted::Received;
use crate::broker::Verdict;
use celery_protocol::exception::Exception;
use celery_protocol::isoformat;
use celery_protocol::message::Protocol;
use celery_protocol::repr;
use celery_protocol::result::State;
use traces::{self, Explain, KeyValue, Remote, Span, SpanKind};

const OPERATION: &str = "run";

/// The span that the message came from. With protocol 1 its id may stand in the body.
pub(super) fn sender(received: &Received) -> Option<Remote> {
    let message = &received.message;
    Remote::of(&received.raw.headers).or_else(|| match message.protocol {
        Protocol::One => Remote::of(&message.headers),
        Protocol::Two => None,
    })
}

/// Begins the span of an attempt, if anything is traced.
pub(super) fn begin(received: &Received, hostname: &str) -> Option<Span> {
    if !traces::is_on() {
        return None;
    }
    let name = format!("{OPERATION}/{}", received.message.task);
    let parent = sender(received);
    let attributes = attributes(received, hostname);
    Span::begin(SpanKind::Consumer, name, parent.as_ref(), attributes)
}

fn attributes(received: &Received, hostname: &str) -> Vec<KeyValue> {
    let Received {
        message,
        raw,
        exchange,
        routing_key,
        queue,
        redelivered,
        ..
    } = received;
    let delivery_info = json!({
        "exchange": exchange,
        "routing_key": routing_key,
        "priority": message.priority,
        "redelivered": redelivered,
    });
    let destination = match exchange.as_str() {
        "" => queue.clone(),
        exchange => format!("{exchange}:{routing_key}:{queue}"),
    };
    let size = i64::try_from(raw.body.len()).unwrap_or(i64::MAX);
    let mut attributes = vec![
        KeyValue::new("celery.action", OPERATION),
        KeyValue::new("celery.task_name", message.task.clone()),
        KeyValue::new("celery.hostname", hostname.to_owned()),
        KeyValue::new("celery.delivery_info", repr::value(&delivery_info)),
        KeyValue::new("messaging.message.id", message.id.clone()),
        KeyValue::new("messaging.conversation_id", message.correlation_id.clone()),
        KeyValue::new("messaging.destination", routing_key.clone()),
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.operation.type", "process"),
        KeyValue::new("messaging.operation.name", OPERATION),
        KeyValue::new("messaging.destination.name", destination),
        KeyValue::new(
            "messaging.rabbitmq.destination.routing_key",
            routing_key.clone(),
        ),
        KeyValue::new(
            "messaging.message.conversation_id",
            message.correlation_id.clone(),
        ),
        KeyValue::new("messaging.message.body.size", size),
    ];
    let mut add = |name: &'static str, value: Option<String>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    add("celery.reply_to", message.reply_to.clone());
    add("celery.eta", message.eta.map(isoformat));
    add("celery.expires", message.expires.map(isoformat));
    if message.retries > 0 {
        let retries = i64::from(message.retries);
        attributes.push(KeyValue::new("celery.retries", retries));
    }
    let (limit, soft) = message.time_limit;
    if limit.is_some() || soft.is_some() {
        let text = |seconds: Option<f64>| seconds.map(|s| s.to_string()).unwrap_or_default();
        let limits = [limit, soft].map(text).map(StringValue::from).to_vec();
        attributes.push(KeyValue::new(
            "celery.timelimit",
            Value::Array(Array::String(limits)),
        ));
    }
    attributes
}

/// Notes the state that an attempt has come to.
pub(super) fn note_state(state: &State) {
    traces::note(|| vec![KeyValue::new("celery.state", state.name())]);
    match state {
        State::Failure { exception, .. } | State::Retry { exception, .. } => {
            traces::note_failure(&Raised(exception));
        }
        State::Revoked(cause) => {
            traces::note(|| vec![KeyValue::new("celery.revoked.reason", cause.as_str())]);
        }
        State::Started { .. } | State::Progress(_) | State::Success(_) => {}
    }
}

/// Notes why an attempt is followed by another one.
pub(super) fn note_retry(reason: &Exception) {
    traces::note(|| vec![KeyValue::new("celery.retry.reason", reason.text())]);
}

/// Notes what becomes of the message.
pub(super) fn note_verdict(verdict: Verdict) {
    let word = match verdict {
        Verdict::Ack => "ack",
        Verdict::Reject => "reject",
        Verdict::Requeue => "requeue",
    };
    traces::note(|| vec![KeyValue::new("ccat.message", word)]);
}

/// An exception, as a span shows it.
struct Raised<'a>(&'a Exception);

impl Explain for Raised<'_> {
    fn kind(&self) -> String {
        self.0.class()
    }

    fn message(&self) -> String {
        self.0.text()
    }
}
