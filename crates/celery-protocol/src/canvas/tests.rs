//! Compares with `tests/golden/canvas.json`: the messages that real Celery sent, written by
//! `tests/python/canvas_goldens.py`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeSet, HashMap};

use chrono::DateTime;
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Map, Value, json};

use super::*;
use crate::content::Accept;
use crate::message::{JSON, TaskMessage, decode};
use crate::{Properties, RawMessage};

mod producing;

const GOLDENS: &str = include_str!("../../tests/golden/canvas.json");

fn raw(message: &Value) -> RawMessage {
    RawMessage {
        headers: message["headers"].as_object().unwrap().clone().into(),
        properties: Properties {
            content_type: Some(JSON.into()),
            reply_to: message["reply_to"].as_str().map(str::to_owned),
            ..Properties::default()
        },
        body: message["body"].to_string().into_bytes(),
    }
}

fn call<'a>(message: &'a TaskMessage, reply_to: &'a str, origin: &'a str) -> Call<'a> {
    Call {
        parent_id: Some(&message.id),
        root_id: Some(message.root_id.as_deref().unwrap_or(&message.id)),
        role: "test",
        reply_to,
        origin,
        now: DateTime::from_timestamp(1_795_493_153, 751_852_000).unwrap(),
        chords: true,
    }
}

/// A plan in the format of the goldens.
fn shown(plan: &Plan) -> Value {
    let message = |outgoing: &Outgoing| {
        let properties = &outgoing.message.properties;
        let body: Value = serde_json::from_slice(&outgoing.message.body).unwrap();
        json!({
            "headers": *outgoing.message.headers,
            "body": body,
            "reply_to": properties.reply_to,
            "correlation_id": properties.correlation_id,
            "priority": properties.priority,
            "expires": properties.expiration.is_some(),
            "route": match &outgoing.route {
                Route::Default => json!(["", "rust"]),
                Route::Queue(queue) => json!(["", queue]),
                Route::Exchange { name, routing_key } => json!([name, routing_key]),
            },
        })
    };
    let (mut sent, mut sizes) = (Vec::new(), Vec::new());
    for effect in &plan.effects {
        match effect {
            Effect::Send(outgoing) => sent.push(message(outgoing)),
            Effect::Chord(header) => {
                sizes.push(json!([header.group_id, header.size]));
                sent.push(message(&header.unlock));
            }
            Effect::ChordGrows { .. } => {}
        }
    }
    // The goldens come from a backend that does not count; there, this message is a child, too.
    let unlocks = plan.effects.iter().filter_map(|effect| match effect {
        Effect::Chord(header) => Some(json!([[header.unlock.message.headers["id"], null], null])),
        Effect::Send(_) | Effect::ChordGrows { .. } => None,
    });
    let children = plan.children.iter().map(ResultNode::to_json);
    let children: Vec<Value> = unlocks.chain(children).collect();
    json!({"sent": sent, "sizes": sizes, "children": children})
}

fn is_id(text: &str) -> bool {
    uuid::Uuid::parse_str(text).is_ok()
}

fn ids(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::String(text) if is_id(text) => {
            into.insert(text.clone());
        }
        Value::Array(values) => values.iter().for_each(|value| ids(value, into)),
        Value::Object(map) => map.values().for_each(|value| ids(value, into)),
        _ => {}
    }
}

/// The ids that a message contains for chords. Celery assigns another id to a frozen chord when it is applied; this
/// crate keeps the id that the client knows.
fn chord_ids(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| chord_ids(value, into)),
        Value::Object(map) => {
            if map.get("subtask_type").is_some_and(|kind| kind == "chord") {
                ids(&map["options"]["task_id"], into);
            }
            map.values().for_each(|value| chord_ids(value, into));
        }
        _ => {}
    }
}

/// Replaces ids that the message did not contain by numbers, in the order in which they appear, and removes values
/// without meaning: the structure of a chord's header, options that are `None`, flags for Python's own bookkeeping,
/// roots of tasks that are not sent yet, parents of results (chords, see above).
struct Normal {
    known: BTreeSet<String>,
    fresh: HashMap<String, usize>,
}

impl Normal {
    fn value(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) if is_id(text) && !self.known.contains(text) => {
                let next = self.fresh.len();
                json!(format!(
                    "#{}",
                    self.fresh.entry(text.clone()).or_insert(next)
                ))
            }
            Value::Array(values) => match ResultNode::parse(value) {
                Some(node) if values[0].is_array() && node.parent.is_none() => {
                    let members = node.members.iter().flatten().map(ResultNode::to_json);
                    let members: Vec<Value> = members.map(|member| self.value(&member)).collect();
                    json!([self.value(&json!(node.id)), members])
                }
                _ => values.iter().map(|value| self.value(value)).collect(),
            },
            Value::Object(map) if map.contains_key("subtask_type") => {
                let signature = Signature::parse(value).unwrap().to_json();
                self.map(signature.as_object().unwrap())
            }
            Value::Object(map) => self.map(map),
            other => other.clone(),
        }
    }

    /// Shows `[1]` as `(1,)`.
    fn as_tuple(&self, repr: &Value) -> String {
        let list: Vec<Value> = serde_json::from_str(repr.as_str().unwrap()).unwrap();
        crate::repr::tuple(&list)
    }

    fn map(&mut self, map: &Map<String, Value>) -> Value {
        let mut sorted: std::collections::BTreeMap<_, _> = map.iter().collect();
        // Python distinguishes lists and tuples, truncates deep values, and uses the current time.
        let is_list = |repr: &Value| repr.as_str().is_some_and(|repr| repr.starts_with('['));
        if map
            .get("task")
            .is_some_and(|task| task == "celery.chord_unlock")
        {
            sorted.retain(|name, _| !["argsrepr", "kwargsrepr", "eta"].contains(&name.as_str()));
        } else if map.get("argsrepr").is_some_and(is_list) {
            let plain = json!(self.as_tuple(&map["argsrepr"]));
            return self.map(&Map::from_iter(map.iter().map(|(name, value)| {
                let value = if name == "argsrepr" { &plain } else { value };
                (name.clone(), value.clone())
            })));
        }
        let mut out = Map::new();
        for (key, value) in sorted {
            if key == "options" {
                let mut options = value.as_object().unwrap().clone();
                options.retain(|name, value| {
                    !value.is_null() && name != "add_to_parent" && name != "root_id"
                });
                if map.get("subtask_type").is_some_and(|kind| kind == "chord") {
                    options.remove("task_id");
                }
                out.insert(key.clone(), self.map(&options));
            } else {
                out.insert(key.clone(), self.value(value));
            }
        }
        out.into()
    }
}

fn normal(input: &Value, output: &Value) -> Value {
    let mut known = BTreeSet::new();
    ids(&input["message"], &mut known);
    let mut chords = BTreeSet::new();
    chord_ids(&input["message"], &mut chords);
    let known = &known - &chords;
    let mut normal = Normal {
        known,
        fresh: HashMap::new(),
    };
    // In the order of sending.
    let mut parts = ["sent", "sizes", "children"].map(|part| normal.value(&output[part]));
    if let Value::Array(sizes) = &mut parts[1] {
        sizes.sort_by_key(Value::to_string);
    }
    parts.to_vec().into()
}

/// The recorded cases of some kinds.
fn goldens(kinds: &[&str]) -> Vec<Value> {
    let mut goldens: Vec<Value> = serde_json::from_str(GOLDENS).unwrap();
    goldens.retain(|golden| kinds.iter().any(|kind| golden["kind"] == *kind));
    goldens
}

/// Collects the paths at which two values differ.
fn compare(path: &str, celery: &Value, ours: &Value, into: &mut Vec<String>) {
    match (celery, ours) {
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                compare(&format!("{path}/{i}"), a, b, into);
            }
        }
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            for (key, a) in a {
                compare(&format!("{path}/{key}"), a, &b[key], into);
            }
        }
        (a, b) if a != b => into.push(format!("{path}: celery {a}, ours {b}")),
        _ => {}
    }
}

#[test]
fn follow_up_messages_equal_those_of_celery() {
    let goldens = goldens(&["success", "failure", "body"]);
    assert_eq!(goldens.len(), 67);
    let mut wrong = Vec::new();
    for golden in &goldens {
        let message = decode(&raw(&golden["message"]), &Accept::json(1 << 20)).unwrap();
        let reply_to = golden["sent"][0]["reply_to"].as_str().unwrap();
        let origin = golden["sent"][0]["headers"]["origin"].as_str().unwrap();
        let call = call(&message, reply_to, origin);
        let plan = match golden["kind"].as_str().unwrap() {
            "success" => after_success(&message, &golden["returned"], &call),
            "failure" => after_failure(&message.id, &message.embed.errbacks, &call),
            "body" => {
                let body = message.embed.chord.as_ref().unwrap();
                chord_body(body, golden["returned"].clone(), &call)
            }
            kind => panic!("{kind}"),
        };
        let mut expected = golden.clone();
        let mut got = shown(&plan.unwrap());
        // Celery also stores a size for a group at the end of a chord's part; no reader uses it.
        let sent = golden["sent"].as_array().unwrap();
        let begun = |m: &Value| match m["headers"]["task"] == "celery.chord_unlock" {
            true => m["body"][0][0].clone(),
            false => Value::Null,
        };
        let is_read = |size: &Value| sent.iter().any(|m| begun(m) == size[0]);
        expected["sizes"].as_array_mut().unwrap().retain(is_read);
        if golden["children"].is_null() {
            // Celery stores no children in this case.
            expected["children"] = Value::Null;
            got["children"] = Value::Null;
        }
        wrong.extend(differing(golden, &expected, &got));
    }
    assert_none(&wrong, goldens.len());
}

/// The differences between a case and its golden; none if they are equal.
fn differing(golden: &Value, expected: &Value, got: &Value) -> Option<String> {
    let mut differences = Vec::new();
    compare(
        "",
        &normal(golden, expected),
        &normal(golden, got),
        &mut differences,
    );
    let (name, kind) = (&golden["name"], &golden["kind"]);
    (!differences.is_empty()).then(|| format!("{name} ({kind}):\n  {}", differences.join("\n  ")))
}

fn assert_none(wrong: &[String], cases: usize) {
    let count = wrong.len();
    assert!(wrong.is_empty(), "{count} of {cases}\n{}", wrong.join("\n"));
}

fn parsed(value: &Value) -> Result<Signature, SignatureError> {
    Signature::parse(value)
}

#[rstest]
#[case::number(json!(5), SignatureError::Form { what: "the whole", expected: "a mapping" })]
#[case::no_task(json!({"args": []}), SignatureError::Form { what: "task", expected: "a name" })]
#[case::args(json!({"task": "a", "args": 5}), SignatureError::Form { what: "args", expected: "a list" })]
#[case::kwargs(json!({"task": "a", "kwargs": []}), SignatureError::Form { what: "kwargs", expected: "a mapping" })]
#[case::options(json!({"task": "a", "options": "x"}), SignatureError::Form { what: "options", expected: "a mapping" })]
#[case::kind(json!({"task": "a", "subtask_type": "knot"}), SignatureError::Type("knot".into()))]
#[case::no_tasks(json!({"subtask_type": "group"}), SignatureError::Form { what: "tasks", expected: "a list" })]
#[case::no_body(json!({"subtask_type": "chord", "kwargs": {"header": []}}), SignatureError::Form { what: "the whole", expected: "a mapping" })]
fn invalid_signatures_are_refused(#[case] value: Value, #[case] error: SignatureError) {
    assert_eq!(parsed(&value), Err(error));
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(
        json!({"task": "a"}),
        |inner, _| json!({"subtask_type": "group", "kwargs": {"tasks": [inner]}}),
    )
}

fn ones(tasks: usize) -> Vec<Value> {
    vec![json!({"task": "a"}); tasks]
}

fn follow(callback: Value, chords: bool) -> Result<Plan, SignatureError> {
    let mut message = TaskMessage {
        id: "parent".into(),
        ..TaskMessage::default()
    };
    message.embed.callbacks = vec![callback];
    let call = Call {
        chords,
        ..call(&message, "replies", "gen1@h")
    };
    after_success(&message, &json!(1), &call)
}

#[test]
fn depth_and_size_are_limited() {
    assert!(follow(nested(20), true).is_ok());
    assert_eq!(follow(nested(100), true), Err(SignatureError::Depth));
    // Each group is the header of a chord whose body is the next one: another form of nesting.
    let groups = vec![json!({"subtask_type": "group", "kwargs": {"tasks": ones(2)}}); 1000];
    let chain = json!({"subtask_type": "chain", "kwargs": {"tasks": groups}});
    assert_eq!(follow(chain, true), Err(SignatureError::Depth));
    // A small message that would grow to a terabyte.
    let body = json!({"task": "a", "args": ["x".repeat(1 << 20)]});
    let chord = json!({"subtask_type": "chord", "kwargs": {"header": ones(50_000), "body": body}});
    assert_eq!(follow(chord, true), Err(SignatureError::Size));
    // A chain may be long, because it is a flat list.
    let chain = json!({"subtask_type": "chain", "kwargs": {"tasks": ones(20_000)}});
    assert_eq!(follow(chain, true).unwrap().effects.len(), 1);
}

#[test]
fn unsupported_signatures_are_explained() {
    let chord =
        json!({"subtask_type": "chord", "kwargs": {"header": ones(2), "body": {"task": "b"}}});
    assert_eq!(follow(chord, false), Err(SignatureError::NoChords));
    let pickled = json!({"task": "b", "options": {"serializer": "pickle"}});
    assert!(matches!(
        follow(pickled, true),
        Err(SignatureError::Serializer { .. })
    ));
    let queue = json!({"task": "b", "options": {"queue": 7}});
    assert!(follow(queue, true).is_err());
}

#[test]
fn a_second_run_sends_the_same_ids() {
    let chord =
        json!({"subtask_type": "chord", "kwargs": {"header": ones(3), "body": {"task": "b"}}});
    let (first, second) = (follow(chord.clone(), true), follow(chord, true));
    assert_eq!(first, second);
    assert_eq!(first.unwrap().effects.len(), 4);
}

#[rstest]
#[case(json!({"countdown": 10}), json!("2026-11-24T04:06:03.751852+00:00"), json!(null), None)]
#[case(json!({"countdown": 0, "eta": "2026-11-24T05:00:00"}), json!("2026-11-24T05:00:00"), json!(null), None)]
#[case(json!({"expires": 1.5}), json!(null), json!("2026-11-24T04:05:55.251852+00:00"), Some("1500"))]
#[case(json!({"expires": "2026-11-24T04:00:00Z"}), json!(null), json!("2026-11-24T04:00:00Z"), Some("0"))]
#[case(json!({"expires": 1e9}), json!(null), json!("2058-08-02T05:52:33.751852+00:00"), Some("4294967295"))]
fn times(
    #[case] options: Value,
    #[case] eta: Value,
    #[case] expires: Value,
    #[case] expiration: Option<&str>,
) {
    let plan = follow(json!({"task": "b", "options": options}), false).unwrap();
    let [Effect::Send(outgoing)] = plan.effects.as_slice() else {
        panic!("{plan:?}")
    };
    let message = &outgoing.message;
    assert_eq!(
        (&message.headers["eta"], &message.headers["expires"]),
        (&eta, &expires)
    );
    assert_eq!(message.properties.expiration.as_deref(), expiration);
}

#[rstest]
#[case(json!({"countdown": "soon"}))]
#[case(json!({"countdown": 1e300}))]
#[case(json!({"eta": 17}))]
#[case(json!({"expires": "soon"}))]
fn bad_times(#[case] options: Value) {
    assert!(follow(json!({"task": "b", "options": options}), false).is_err());
}

#[test]
fn the_rest_of_a_chain_fails_with_a_step() {
    let body = json!({"task": "d", "options": {"task_id": "body", "chord": {"task": "e"}, "group_id": "g", "group_index": 2}});
    let chain = [
        json!({"task": "c", "options": {"task_id": "last", "reply_to": "q"}}),
        json!({"task": "celery.chord", "subtask_type": "chord", "options": {"task_id": "chord"},
               "kwargs": {"header": [], "body": body}}),
        json!({"task": "no id"}),
        json!(7),
    ];
    let failed = failed_steps(&chain);
    let ids: Vec<&str> = failed.iter().map(|message| message.id.as_str()).collect();
    assert_eq!(ids, ["last", "chord", "body"]);
    assert_eq!(failed[0].reply_to.as_deref(), Some("q"));
    assert_eq!(
        (failed[2].group.as_deref(), failed[2].group_index),
        (Some("g"), Some(2))
    );
    assert_eq!(failed[2].embed.chord, Some(json!({"task": "e"})));
}

#[test]
fn the_tasks_of_a_body_fail_each() {
    let errback = |name: &str| json!({"task": name});
    let body = json!({"subtask_type": "group", "options": {"task_id": "group", "link_error": [errback("all")]},
        "kwargs": {"tasks": [
            {"task": "a", "options": {"task_id": "a", "link_error": [errback("own"), errback("all")]}},
            {"subtask_type": "chain", "options": {"task_id": "c"}, "kwargs": {"tasks": [
                {"task": "b", "options": {"task_id": "b"}},
                {"task": "c", "options": {"task_id": "c", "group_index": 1}}]}}]}});
    let (error, cause) = (
        chord_error("x".into()),
        crate::exception::Exception::type_error("y"),
    );
    let failures = body_failures(&body, &error, &cause).unwrap();
    let ids: Vec<&str> = failures
        .iter()
        .map(|failure| failure.message.id.as_str())
        .collect();
    assert_eq!(ids, ["a", "c", "group"]);
    assert!(failures.iter().all(|failure| failure.exception == cause));
    assert_eq!(failures[0].errbacks, [errback("all"), errback("own")]);
    assert_eq!(failures[1].message.group_index, Some(1));
    assert!(failures[2].errbacks.is_empty());
}

#[test]
fn results_are_read_as_they_are_written() {
    let tuple = json!([
        ["g", null],
        [[["a", null], null], [["h", null], [[["b", null], null]]]]
    ]);
    let node = ResultNode::parse(&tuple).unwrap();
    assert_eq!(node.to_json(), tuple);
    assert_eq!(node.task_ids(), ["a", "b"]);
    let values = node.collect(&mut |id| Ok::<_, ()>(json!(id)));
    assert_eq!(values, Ok(json!(["a", ["b"]])));
    assert_eq!(
        ResultNode::parse(&json!([["a", [["b", null], null]], null]))
            .unwrap()
            .id,
        "a"
    );
    for none in [json!(7), json!([]), json!([7, null]), json!([["a"], 7])] {
        assert_eq!(ResultNode::parse(&none), None);
    }
}

/// JSON that often is a valid signature.
fn signatures() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        "[a-z]{0,5}".prop_map(Value::from),
        Just(json!({"task": "a"})),
        Just(
            json!({"task": "a", "args": [1], "immutable": true, "options": {"task_id": "x", "group_id": "g"}})
        ),
    ];
    leaf.prop_recursive(6, 64, 5, |inner| {
        let list = proptest::collection::vec(inner.clone(), 0..5);
        let option = prop_oneof![
            Just("link"), Just("link_error"), Just("chord"), Just("chain"), Just("task_id"), Just("queue"),
            Just("expires"), Just("stamped_headers"), Just("headers"), Just("group_id"), Just("root_id")
        ];
        let options = proptest::collection::hash_map(option, inner.clone(), 0..3)
            .prop_map(|options| json!(options));
        prop_oneof![
            (list.clone(), options.clone()).prop_map(|(tasks, options)| json!(
                {"task": "g", "subtask_type": "group", "kwargs": {"tasks": tasks}, "options": options})),
            (list.clone(), options.clone()).prop_map(|(tasks, options)| json!(
                {"task": "c", "subtask_type": "chain", "kwargs": {"tasks": tasks}, "options": options})),
            (list.clone(), inner, options.clone()).prop_map(|(tasks, body, options)| json!(
                {"task": "h", "subtask_type": "chord", "kwargs": {"header": tasks, "body": body}, "options": options})),
            options.prop_map(|options| json!({"task": "t", "options": options})),
            list.prop_map(Value::from),
        ]
    })
}

proptest! {
    #[test]
    fn any_signature_is_read_without_panic(callbacks in proptest::collection::vec(signatures(), 0..3), chain in signatures()) {
        let mut message = TaskMessage { id: "parent".into(), ..TaskMessage::default() };
        message.embed.callbacks = callbacks.clone();
        message.embed.chain = Some(vec![chain.clone()]);
        let call = call(&message, "replies", "gen1@h");
        if let Ok(plan) = after_success(&message, &json!(1), &call) {
            for effect in &plan.effects {
                let message = match effect {
                    Effect::Send(outgoing) => &outgoing.message,
                    Effect::Chord(header) => &header.unlock.message,
                    Effect::ChordGrows { .. } => continue,
                };
                // Every message that is sent can be read.
                prop_assert!(serde_json::from_slice::<Value>(&message.body).is_ok());
            }
        }
        let _ = after_failure("a", &callbacks, &call);
        let _ = chord_body(&chain, json!([1]), &call);
        let _ = failed_steps(&callbacks);
        let error = chord_error("x".into());
        let _ = body_failures(&chain, &error, &error);
        let _ = ResultNode::parse(&chain);
    }

    #[test]
    fn signatures_survive_writing(value in signatures()) {
        if let Ok(signature) = Signature::parse(&value) {
            prop_assert_eq!(Signature::parse(&signature.to_json()), Ok(signature));
        }
    }
}
