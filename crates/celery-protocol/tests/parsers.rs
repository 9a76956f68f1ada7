//! Parsers of what a broker delivers and a result backend stores: with examples of what Python Celery writes, with
//! hostile ones (`tests/corpus`), and with damaged forms of both. No parser panics, none takes more than a time in
//! proportion to the size of its input, none makes something huge of something small, and what is written is read as it
//! was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::borrow::Cow;

use celery_protocol::arguments::{FunctionSignature, Parameter};
use celery_protocol::canvas::{
    self, Call, Effect, ResultNode, Signature, after_failure, after_success, body_failures,
    chord_body, failed_steps,
};
use celery_protocol::compression::Method;
use celery_protocol::content::{Accept, JSON, Serializer};
use celery_protocol::exception::Exception;
use celery_protocol::message::{TaskMessage, decode, head};
use celery_protocol::retry::Changes;
use celery_protocol::{Properties, RawMessage, pidbox, repr, result, weight};
use chrono::{DateTime, Utc};
use hostile_inputs::endures;
use rstest::rstest;
use serde_json::{Map, Value, json};

/// Bytes of a body.
const LIMIT: usize = 256 << 10;

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_795_493_153, 751_852_000).unwrap()
}

fn accept(limit: usize) -> Accept {
    Accept::new(&["json", "msgpack", "yaml"].map(str::to_owned), limit)
}

/// A message of the corpus: a line with its headers and properties in JSON, then its body. Where damage was done to
/// the line, the headers are those of a usual message.
fn message(bytes: &[u8]) -> RawMessage {
    let (line, body) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (&[][..], bytes),
    };
    let types = [JSON, "application/x-yaml", "application/x-msgpack"];
    let usual = || {
        json!({
            "headers": {"task": "tasks.add", "id": "i"},
            "properties": {"content_type": types[bytes.len() % types.len()]},
        })
    };
    let line: Value = serde_json::from_slice(line).unwrap_or_else(|_| usual());
    let property = |name: &str| line["properties"][name].as_str().map(str::to_owned);
    RawMessage {
        headers: line["headers"]
            .as_object()
            .cloned()
            .unwrap_or_default()
            .into(),
        properties: Properties {
            content_type: property("content_type"),
            content_encoding: property("content_encoding"),
            correlation_id: property("correlation_id"),
            reply_to: property("reply_to"),
            priority: line["properties"]["priority"]
                .as_u64()
                .and_then(|n| n.try_into().ok()),
            expiration: property("expiration"),
            persistent: true,
            ..Properties::default()
        },
        body: body.to_vec(),
    }
}

/// Bytes of memory, roughly.
fn memory(value: &Value) -> usize {
    100 + match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(memory).sum(),
        Value::Object(map) => map
            .iter()
            .map(|(name, value)| name.len() + memory(value))
            .sum(),
    }
}

fn call(parent_id: &str) -> Call<'_> {
    Call {
        parent_id: Some(parent_id),
        root_id: Some(parent_id),
        role: "test",
        reply_to: "replies",
        origin: "gen1@h",
        now: now(),
        chords: true,
    }
}

/// Plans made from signatures stay within the limits of the canvas.
fn is_bounded(plan: Result<canvas::Plan, canvas::SignatureError>, input: usize) {
    let Ok(plan) = plan else { return };
    let sent: usize = plan
        .effects
        .iter()
        .map(|effect| match effect {
            Effect::Send(outgoing) => outgoing.message.body.len(),
            Effect::Chord(header) => header.unlock.message.body.len(),
            Effect::ChordGrows { .. } => 0,
        })
        .sum();
    assert!(sent <= 64 << 20, "{sent} bytes are sent");
    // Signatures multiply, but not by depth.
    assert!(
        plan.effects.len() <= input,
        "{} messages",
        plan.effects.len()
    );
}

const ARGUMENTS: FunctionSignature = FunctionSignature {
    function: Cow::Borrowed("add"),
    parameters: Cow::Borrowed(&[Parameter::required("a"), Parameter::optional("b")]),
    bound: true,
};

#[test]
fn messages() {
    endures("messages", 4, |bytes| {
        let raw = message(bytes);
        let _ = head(&raw);
        let weight = weight::of(&raw, &accept(LIMIT));
        let Ok(task) = decode(&raw, &accept(LIMIT)) else {
            return;
        };
        let inflates = raw.headers.contains_key("compression") || raw.body.contains(&b'*');
        let size = if inflates { LIMIT } else { bytes.len() };
        let values = [&task.args, &task.kwargs, &task.embed.to_json()].map(memory);
        let taken: usize = values.iter().sum();
        assert!(taken < 10_000 + 500 * size, "{taken} bytes of memory");
        assert!(
            taken < 10_000 + 8 * weight,
            "{taken} bytes, of {weight} that were expected"
        );
        let shown = repr::value(&task.args).len() + repr::value(&task.kwargs).len();
        assert!(shown < 1000 + 100 * size, "{shown} bytes of text");
        if let Ok(bound) = ARGUMENTS.bind(&task.args, &task.kwargs) {
            assert!(bound.named.len() <= ARGUMENTS.parameters.len());
        }
        let _ = failed_steps(task.embed.chain.as_deref().unwrap_or_default());
        is_bounded(after_success(&task, &json!(1), &call(&task.id)), size);
        is_bounded(
            after_failure(&task.id, &task.embed.errbacks, &call(&task.id)),
            size,
        );

        let again = task.retry(&raw, Some(now()), now(), &Changes::default());
        let read = decode(&again, &accept(64 * LIMIT)).unwrap_or_else(|e| panic!("{e}: {again:?}"));
        assert_eq!(read.eta, Some(now()));
        assert_eq!(read.expires, task.expires);
        let content = |task: TaskMessage| (task.id, task.task, task.args, task.kwargs, task.embed);
        assert_eq!(content(read), content(task));
    });
}

#[test]
fn signatures() {
    endures("canvas", 4, |bytes| {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else {
            return;
        };
        if let Some(node) = ResultNode::parse(&value) {
            assert!(node.task_ids().len() <= bytes.len());
            assert_eq!(ResultNode::parse(&node.to_json()), Some(node));
        }
        if let Ok(signature) = Signature::parse(&value) {
            assert_eq!(Signature::parse(&signature.to_json()), Ok(signature));
        }
        let error = Exception::new("builtins", "ValueError", "no");
        let _ = body_failures(&value, &error, &error).map(|failed| {
            assert!(failed.len() <= bytes.len());
        });
        is_bounded(chord_body(&value, json!([1, 2]), &call("p")), bytes.len());
        is_bounded(
            after_failure("p", &[value.clone(), value], &call("p")),
            2 * bytes.len(),
        );
    });
}

#[test]
fn remote_control() {
    endures("pidbox", 2, |bytes| {
        let raw = RawMessage {
            body: bytes.to_vec(),
            ..RawMessage::default()
        };
        // Events, gossip and replies are mappings.
        let _ = pidbox::decode::<Map<String, Value>>(bytes);
        let Some(request) = pidbox::ControlRequest::decode(&raw) else {
            return;
        };
        let _ = request.addresses("celery@a");
        let Some(reply_to) = &request.reply_to else {
            return;
        };
        let arguments = json!(request.arguments);
        let ticket = request.ticket.as_deref().unwrap_or_default();
        let written = pidbox::request(&request.method, &arguments, ticket, reply_to, 1);
        let read = pidbox::ControlRequest::decode(&written).expect("it reads what it writes");
        assert_eq!(read.method, request.method);
        assert_eq!(json!(read.arguments), arguments);
    });
}

#[rstest]
fn results(
    #[values(Serializer::Json, Serializer::Msgpack, Serializer::Yaml)] serializer: Serializer,
) {
    endures("results", 8, |bytes| {
        let _ = result::read(bytes, serializer);
        let Ok(value) = result::decode(bytes, serializer) else {
            return;
        };
        let _ = ResultNode::parse(&value["children"][0]);
        // A bomb is not written again.
        if memory(&value) > 100_000 {
            return;
        }
        let methods = [Method::Gzip, Method::Bzip2, Method::Zstd].map(Some);
        for method in [None].into_iter().chain(methods) {
            let written = result::encode(&value, serializer, method);
            let read = result::decode(&written, serializer);
            let read = read.unwrap_or_else(|e| panic!("{e}: {value}"));
            // Only JSON keeps envelopes.
            if serializer == Serializer::Json {
                assert_eq!(read, value);
            }
        }
    });
}

/// A time comes in headers. One that is taken is written by a retry, and read again.
#[test]
fn times() {
    endures("times", 1, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let of = |text: &str| {
            let mut raw = message(b"\n[[], {}, {}]");
            raw.headers = [("task", "t"), ("id", "i"), ("eta", text), ("expires", text)]
                .map(|(name, text)| (name.to_owned(), json!(text)))
                .into_iter()
                .collect();
            raw.properties.content_type = Some(JSON.into());
            (decode(&raw, &accept(1000)), raw)
        };
        for line in text.lines().take(20) {
            let (Ok(task), raw) = of(line) else { continue };
            let eta = task.eta;
            let changes = Changes {
                expires: task.expires,
                ..Changes::default()
            };
            let again = task.retry(&raw, eta, now(), &changes);
            let read = decode(&again, &accept(1000)).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!((read.eta, read.expires), (eta, task.expires), "{line}");
        }
        // All lines together are not a time either.
        let _ = of(&text);
    });
}
