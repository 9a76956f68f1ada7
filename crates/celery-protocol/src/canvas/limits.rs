//! Tests of the limits for signatures that multiply: a message of a few hundred kilobytes must not exceed the limits of
//! messages and memory.

#![allow(clippy::unwrap_used, reason = "tests")]

use rstest::rstest;
use serde_json::{Value, json};

use super::*;
use crate::exception::Exception;
use crate::message::TaskMessage;

fn call() -> Call<'static> {
    Call {
        parent_id: Some("parent"),
        root_id: Some("root"),
        role: "test",
        reply_to: "replies",
        origin: "gen1@h",
        now: chrono::DateTime::UNIX_EPOCH,
        chords: true,
    }
}

/// A signature of about a hundred bytes that takes ten kilobytes of memory.
fn task(number: usize) -> Value {
    json!({"task": "t", "args": [number, vec![1; 100]], "kwargs": {}, "options": {}, "immutable": true})
}

fn tasks(count: usize) -> Vec<Value> {
    (0..count).map(task).collect()
}

fn compound(kind: &str, kwargs: Value, options: Value) -> Value {
    json!({"task": format!("celery.{kind}"), "args": [], "kwargs": kwargs, "options": options, "subtask_type": kind})
}

fn chain(tasks: Vec<Value>, options: Value) -> Value {
    compound("chain", json!({"tasks": tasks}), options)
}

fn group(tasks: Vec<Value>, options: Value) -> Value {
    compound("group", json!({"tasks": tasks}), options)
}

fn chord(header: Vec<Value>, body: Value, options: Value) -> Value {
    compound(
        "chord",
        json!({"header": header, "body": body, "kwargs": {}}),
        options,
    )
}

fn nested(levels: usize, around: impl Fn(Value) -> Value, core: Value) -> Value {
    (0..levels).fold(core, |inner, _| around(inner))
}

const COUNT: usize = 40;

#[rstest]
#[case::errbacks_of_a_chain(chain(tasks(COUNT), json!({"link_error": tasks(COUNT)})))]
#[case::errbacks_of_a_group_in_a_chain(chain(vec![group(tasks(COUNT), json!({})), task(0)], json!({"link_error": tasks(COUNT)})))]
#[case::errbacks_of_a_chord(chord(tasks(2), group(tasks(COUNT), json!({})), json!({"link_error": tasks(COUNT)})))]
#[case::errbacks_of_a_body_that_is_a_chain(chord(tasks(2), chain(tasks(COUNT), json!({"link_error": tasks(COUNT)})), json!({})))]
#[case::chords_in_a_header(chord((0..COUNT).map(|n| chord(tasks(1), task(n), json!({}))).collect(), task(0), json!({"link_error": tasks(COUNT)})))]
#[case::callbacks_of_a_group(chain(vec![task(0), group(tasks(COUNT), json!({"link_error": tasks(COUNT)}))], json!({"link_error": tasks(COUNT)})))]
#[case::a_body_for_each_part(chord(vec![json!({"task": "t"}); 500], chain(tasks(COUNT), json!({})), json!({})))]
#[case::a_last_step_that_is_a_group(chord(vec![chain(vec![task(0), group(vec![json!({"task": "t"}); 500], json!({}))], json!({}))], chain(tasks(COUNT), json!({})), json!({})))]
#[case::headers_of_a_group(group(vec![json!({"task": "t"}); 1000], json!({"headers": {"x": vec![1; 10_000]}})))]
#[case::stamps_of_a_group(group(vec![json!({"task": "t"}); 1000], json!({"stamped_headers": ["x"], "x": vec![1; 10_000]})))]
#[case::groups_in_groups(nested(50, |inner| chain(vec![task(0), group(vec![inner, task(1)], json!({"link_error": tasks(3)}))], json!({"link_error": tasks(3)})), task(2)))]
#[case::more_errbacks_than_are_compared(chain(tasks(1), json!({"link_error": (0..20_000).map(|n| json!({"task": n.to_string()})).collect::<Vec<_>>()})))]
#[case::one_stamp_named_often(json!({"task": "t", "options": {"stamped_headers": vec!["x"; 50_000], "x": vec![1; 10_000]}}))]
#[case::one_that_is_large_itself(chain(tasks(7000), json!({})))]
fn multiplying_signatures_are_bounded(#[case] signature: Value) {
    let errbacks = std::slice::from_ref(&signature);
    let mut message = TaskMessage::default();
    message.embed.callbacks = errbacks.to_vec();
    message.embed.chain = Some(vec![signature.clone(), task(0)]);
    let error = Exception::type_error("x");
    for plan in [
        after_failure("a", errbacks, &call()),
        after_success(&message, &json!(1), &call()),
        chord_body(&signature, json!([1]), &call()),
    ] {
        match plan {
            Ok(plan) => {
                let sizes = plan.effects.iter().map(|effect| match effect {
                    Effect::Send(outgoing) => outgoing.bytes(),
                    Effect::Chord(header) => header.unlock.bytes(),
                    Effect::ChordGrows { .. } => 0,
                });
                assert!(sizes.sum::<usize>() <= MAX_BYTES);
            }
            Err(error) => assert!(
                matches!(
                    error,
                    Error::Memory | Error::Size | Error::Links | Error::Depth
                ),
                "{error}"
            ),
        }
    }
    if let Ok(failures) = body_failures(&signature, &error, &error) {
        let errbacks = failures.iter().flat_map(|failure| &failure.errbacks);
        assert!(errbacks.map(crate::weight::of_value).sum::<usize>() <= MAX_MEMORY);
    }
}

/// A message of 350 kB that took 8 GB of memory without limits.
#[test]
fn errbacks_times_steps_are_refused_before_they_are_copied() {
    let task = |number| json!({"task": "t", "args": [number, vec![1; 500]], "options": {}});
    let tasks: Vec<Value> = (0..170).map(task).collect();
    let signature = chain(tasks.clone(), json!({"link_error": tasks}));
    assert!(signature.to_string().len() < 400_000);
    assert_eq!(
        after_failure("a", std::slice::from_ref(&signature), &call()),
        Err(Error::Memory)
    );
    assert_eq!(
        chord_body(&signature, json!([1]), &call()),
        Err(Error::Memory)
    );
}

/// Canvases of a usual size, and larger ones, are within the limits.
#[rstest]
#[case::a_large_chord(chord(vec![json!({"task": "t", "args": [1, "some text"], "kwargs": {"a": 1}}); 1000], task(0), json!({})))]
#[case::a_large_group(group(vec![json!({"task": "t", "args": [1, "some text"]}); 3000], json!({"link_error": [{"task": "e"}]})))]
#[case::a_long_chain(chain(vec![json!({"task": "t", "args": [1]}); 2000], json!({"link_error": [{"task": "e"}, {"task": "f"}]})))]
#[case::errbacks(group(tasks(COUNT), json!({})))]
fn large_signature_is_sent(#[case] signature: Value) {
    let plan = after_failure("a", &[signature], &call()).unwrap();
    assert!(!plan.effects.is_empty());
}
