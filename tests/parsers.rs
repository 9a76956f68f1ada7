//! Parsers of what comes from a network, from other programs and from files: with examples of what Python Celery,
//! bbcp, ssh and people write, with hostile ones (`tests/corpus`), and with damaged forms of both. No parser panics,
//! none takes more than a time in proportion to the size of its input, none makes something huge of something small,
//! and what is written is read as it was.
//!
//! Private parsers have a test of this kind beside them, with the same corpus: the remote shell's answers and the pid
//! file. AMQP frames have theirs in `src/broker/amqp/screen`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "support/mutations.rs"]
mod mutations;

use std::borrow::Cow;
use std::io::Write as _;

use ccat_transfer::settings;
use ccat_transfer::transfer::bbcp::outcome::{CopyPaths, Exit, FailureClassifier};
use ccat_transfer::transfer::bbcp::output::{Event, Lines, parse};
use ccat_transfer::transfer::endpoint::{AbsolutePath, Host, TemporaryName, is_login};
use ccat_transfer::transfer::error::Role;
use ccat_transfer::transfer::link::Window;
use ccat_transfer::transfer::repository::Place;
use ccat_transfer::transfer::topology::{LocationName, Topology};
use celery_protocol::arguments::{FunctionSignature, Parameter};
use celery_protocol::canvas::{
    self, Call, Effect, ResultNode, Signature, after_failure, after_success, body_failures,
    chord_body, failed_steps,
};
use celery_protocol::compression::Method;
use celery_protocol::content::{Accept, JSON};
use celery_protocol::exception::Exception;
use celery_protocol::message::{TaskMessage, decode, head};
use celery_protocol::retry::Changes;
use celery_protocol::{Properties, RawMessage, pidbox, repr, result, weight};
use celery_worker::worker::RateLimit;
use celery_worker_cli::traces::propagation;
use chrono::{DateTime, Utc};
use mutations::endures;
use serde_json::{Map, Value, json};
use service_connection::url;
use tracing::Span;

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
        let _ = propagation().extract(&Span::none(), &raw.headers);
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

#[test]
fn results() {
    endures("results", 4, |bytes| {
        let _ = result::read(bytes);
        let Ok(value) = result::decode(bytes) else {
            return;
        };
        let _ = ResultNode::parse(&value["children"][0]);
        // A bomb is not packed again.
        let small = memory(&value) < 100_000;
        let methods = [Method::Gzip, Method::Bzip2, Method::Zstd].map(Some);
        for method in [None]
            .into_iter()
            .chain(methods.into_iter().filter(|_| small))
        {
            let read = result::decode(&result::encode(&value, method));
            assert_eq!(read.unwrap_or_else(|e| panic!("{e}: {value}")), value);
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
        // As one, it is no time.
        let _ = of(&text);
    });
}

#[test]
fn urls() {
    endures("urls", 1, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let redacted = url::redacted(&text);
        assert!(redacted.len() <= 10 * text.len());
        for line in text.lines().take(20).chain([&*text]) {
            let _ = url::list(line).map(|urls| urls.len());
            for parts in [url::kombu(line), url::sqlalchemy(line)]
                .into_iter()
                .flatten()
            {
                let parameters = parts.query.iter().map(|(name, value)| (&**name, &**value));
                let written = url::libpq(parameters);
                let read = url::sqlalchemy(&written).expect("it reads what it writes");
                assert_eq!(read.query, parts.query);
                if let Some(host) = parts.host.as_deref() {
                    assert!(url::host_and_port(host, 1).len() < host.len() + 5);
                }
            }
            let masked = url::masked(line);
            assert!(masked.len() <= 10 * line.len() + url::MASK.len());
            assert_eq!(url::masked(&masked), masked);
            if let Some(filled) = url::with_password(line, "p/w@") {
                assert_eq!(url::masked(&filled), url::masked(&url::masked(&filled)));
            }
        }
    });
}

#[test]
fn output_of_bbcp() {
    let paths = CopyPaths {
        source: "/d/package.tar".into(),
        target: "/e/.t.part".into(),
        program: "/opt/bbcp".into(),
        remote: Some((Role::Destination, "h".into())),
    };
    endures("bbcp", 2, |bytes| {
        let mut lines = Lines::default();
        let mut classifier = FailureClassifier::new(paths.clone());
        let mut read = |line: &[u8]| match parse(line) {
            Event::Other(text) => {
                assert!(text.len() <= 3 * (8 << 10), "{} bytes", text.len());
                classifier.observe(&text);
            }
            Event::Progress { rate, average, .. } => {
                assert!([rate, average].into_iter().flatten().all(f64::is_finite));
            }
            _ => {}
        };
        for chunk in bytes.chunks(100) {
            lines.push(chunk, &mut read);
        }
        lines.finish(&mut read);
        let kept = format!("{classifier:?}").len();
        assert!(kept <= 20 * 4 * 510, "{kept} bytes are kept");
        let error = classifier.conclude(Exit::Code(7)).expect_err("no success");
        assert!(error.to_string().len() < 5000);
    });
}

#[test]
fn small_values() {
    endures("small", 1, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        for line in text.lines().take(20).chain([&*text]) {
            if let Some(name) = TemporaryName::of_entry(line) {
                let entries = [name.to_string(), name.checkpoints()];
                assert!(entries.iter().any(|entry| entry == line), "{line}");
            }
            if let Ok(host) = Host::new(line) {
                assert_eq!(
                    Host::new(&host.as_bbcp()).map(|h| h.to_string()),
                    Ok(host.to_string())
                );
                assert!(!host.as_ssh().starts_with('-'));
            }
            if let Ok(path) = AbsolutePath::new(line) {
                assert_eq!(AbsolutePath::new(path.as_str()), Ok(path.clone()));
                assert!(!path.as_str().contains("/../"));
            }
            assert!(!is_login(line) || !line.starts_with('-'));
            if let Ok(place) = line.parse::<Place>() {
                assert_eq!(place.to_string().parse(), Ok(place));
            }
            if let Ok(name) = line.parse::<LocationName>() {
                assert_eq!(name.to_string(), line);
            }
            let _ = line.parse::<Window>();
            let _ = line.parse::<RateLimit>();
            let headers = ["traceparent", "tracestate"].map(|name| (name.to_owned(), json!(line)));
            let _ = propagation().extract(&Span::none(), &headers.into_iter().collect());
        }
    });
}

/// The file of settings, the addresses in the environment, and the file of a topology.
#[test]
fn settings_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.toml");
    endures("settings", 40, |bytes| {
        std::fs::File::create(&path)
            .unwrap()
            .write_all(bytes)
            .unwrap();
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().next().unwrap_or_default();
        let variables = [
            "CCAT_DATA_TRANSFER_BROKER_URL",
            "CCAT_DATA_TRANSFER_RESULT_BACKEND",
        ];
        let environment = variables.map(|name| (name.to_owned(), line.to_owned()));
        if let Err(error) = settings::load(Some(&path), environment) {
            assert!(error.to_string().len() < 10_000 + 1000 * bytes.len());
        }
        let _ = text.parse::<Topology>();
    });
}
