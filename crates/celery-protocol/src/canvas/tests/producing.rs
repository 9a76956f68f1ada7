//! Tests of signatures that are built in code, and of those that a client or a running task applies.

use super::*;

fn s(name: &str) -> Signature {
    Signature::new(name)
}

fn client<'a>(golden: &'a Value) -> Call<'a> {
    Call {
        parent_id: None,
        root_id: None,
        role: "a random text",
        reply_to: golden["sent"][0]["reply_to"].as_str().unwrap(),
        origin: golden["sent"][0]["headers"]["origin"].as_str().unwrap(),
        now: DateTime::from_timestamp(1_795_493_153, 751_852_000).unwrap(),
        chords: true,
    }
}

/// Removes sizes that Celery stores for groups which are not chords; no reader uses them.
fn without_unread_sizes(golden: &Value) -> Value {
    let mut expected = golden.clone();
    let unlocks = golden["sent"].as_array().unwrap().iter();
    let unlocks = unlocks.filter(|message| message["headers"]["task"] == "celery.chord_unlock");
    let begun: Vec<&Value> = unlocks.map(|message| &message["body"][0][0]).collect();
    let sizes = expected["sizes"].as_array_mut().unwrap();
    sizes.retain(|size| begun.contains(&&size[0]));
    expected
}

#[test]
fn client_sends_what_python_sends() {
    let goldens = goldens(&["client"]);
    assert!(goldens.len() > 20);
    let mut wrong = Vec::new();
    for golden in &goldens {
        let signature = Signature::parse(&golden["signature"]).unwrap();
        let plan = apply(signature, &client(golden)).unwrap();
        let (mut expected, mut got) = (without_unread_sizes(golden), shown(&plan));
        // A client has no children; the result that it waits for is compared instead.
        expected["children"] = golden["result"].clone();
        got["children"] = plan.result.unwrap().to_json();
        wrong.extend(differing(golden, &expected, &got));
    }
    assert_none(&wrong, goldens.len());
}

#[test]
fn replaced_task_sends_what_python_sends() {
    let goldens = goldens(&["replace", "add_to_chord"]);
    assert!(goldens.len() > 80);
    let mut wrong = Vec::new();
    for golden in &goldens {
        let message = decode(&raw(&golden["message"]), &Accept::json(1 << 20)).unwrap();
        let signature = Signature::parse(&golden["signature"]).unwrap();
        let call = client(golden);
        let plan = match golden["kind"] == "replace" {
            true => replace(&message, signature, &call).unwrap(),
            false => {
                let role = occasion(&message, 0);
                let plan = add_to_chord(&message, signature, &call.for_task(&message, &role));
                plan.unwrap()
            }
        };
        let (mut expected, mut got) = (without_unread_sizes(golden), shown(&plan));
        expected["children"] = golden["grown"].clone();
        let grown = plan.effects.iter().filter_map(|effect| match effect {
            Effect::ChordGrows { group_id, task_id } => Some(json!([group_id, task_id])),
            _ => None,
        });
        let grown: Vec<Value> = grown.collect();
        got["children"] = match grown.is_empty() {
            true => Value::Null,
            false => grown.into(),
        };
        wrong.extend(differing(golden, &expected, &got));
    }
    assert_none(&wrong, goldens.len());
}

/// The workflows of `COMPOSED` in `canvas_goldens.py`.
fn composed(name: &str) -> Signature {
    let [a, b, c, d, e, f] = ["a", "b", "c", "d", "e", "f"].map(s);
    let two = |first: &Signature, second: &Signature| group([first, second]);
    let chord_of =
        |first: &Signature, second: &Signature, body: &Signature| chord([first, second], body);
    match name {
        "task | task" => a | b,
        "task | task | task" => a | b | c,
        "task | (task | task)" => a | (b | c),
        "task | group" => a | two(&b, &c),
        "task | group of one" => a | group([b]),
        "task | group | task" => a | two(&b, &c) | d,
        "task | group | task | task" => a | two(&b, &c) | d | e,
        "task | group | group" => a | two(&b, &c) | two(&d, &e),
        "group | task" => two(&a, &b) | c,
        "group | group" => two(&a, &b) | two(&c, &d),
        "group | task | task" => two(&a, &b) | c | d,
        "group | (task | task)" => two(&a, &b) | (c | d),
        "chord | task" => chord_of(&a, &b, &c) | d,
        "chord | group" => chord_of(&a, &b, &c) | two(&d, &e),
        "chord | chord" => chord_of(&a, &b, &c) | chord_of(&d, &e, &f),
        "task | chord" => a | chord_of(&b, &c, &d),
        "task | chord | task" => a | chord_of(&b, &c, &d) | e,
        "chain(task, task)" => chain([a, b]),
        "chain(group, task)" => chain([two(&a, &b), c]),
        "chain(task, chain(task, task), task)" => chain([a, chain([b, c]), d]),
        "chain(task, group, task)" => chain([a, two(&b, &c), d]),
        "chain(task, empty group, task)" => chain([a, group::<Signature>([]), b]),
        "chain(task, group of one, task)" => chain([a, group([b]), c]),
        "linked chain | task" => chain([a, b]).link(s("x")).link_error(e) | c,
        name => panic!("{name}"),
    }
}

#[test]
fn composed_signatures_are_those_of_python() {
    let goldens = goldens(&["signature"]);
    assert!(goldens.len() > 20);
    for golden in &goldens {
        let name = golden["name"].as_str().unwrap();
        assert_eq!(composed(name).to_json(), golden["signature"], "{name}");
    }
}

#[test]
fn signature_is_serialized_as_python_reads_it() {
    let workflow = group([s("a"), s("b")]) | s("c").link_error(s("e"));
    let text = serde_json::to_string(&workflow).unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        workflow.to_json()
    );
    assert_eq!(
        serde_json::from_str::<Signature>(&text).unwrap().to_json(),
        workflow.to_json()
    );
    let error = serde_json::from_value::<Signature>(nested(100)).unwrap_err();
    assert!(error.to_string().contains("nested"), "{error}");
}

#[test]
fn value_that_is_not_json_is_reported_when_it_is_sent() {
    let map = HashMap::from([((1, 2), 3)]);
    let bad = s("a").arg(&map);
    for signature in [
        bad.clone(),
        bad.clone() | s("b"),
        s("b") | bad.clone(),
        s("b").link(&bad),
        group([bad.clone(), s("b")]) | s("c"),
        group([bad.clone()]).then(s("b")),
        chain([chain([bad.clone()]), s("b")]),
        chord([s("b")], &bad),
    ] {
        let message = TaskMessage::default();
        let call = call(&message, "q", "o");
        let error = apply(signature.clone(), &call).unwrap_err();
        assert!(
            matches!(&error, SignatureError::Argument { task, .. } if task == "a"),
            "{error}: {signature:?}"
        );
        assert!(serde_json::to_value(&signature).is_err());
    }
    let scalar = s("a").args(5);
    assert!(matches!(
        scalar.check(),
        Err(SignatureError::Argument { .. })
    ));
    assert!(s("").check().is_err());
}

fn ids_of(plan: &Plan) -> Vec<Value> {
    let sent = plan.effects.iter().filter_map(|effect| match effect {
        Effect::Send(outgoing) => Some(outgoing.message.headers["id"].clone()),
        _ => None,
    });
    sent.collect()
}

#[test]
fn each_application_has_its_own_ids() {
    let mut message = TaskMessage {
        id: "parent".into(),
        ..TaskMessage::default()
    };
    let send = |message: &TaskMessage, number| {
        let role = occasion(message, number);
        let call = call(message, "q", "o").for_task(message, &role);
        ids_of(&apply(group([s("a"), s("b")]), &call).unwrap())
    };
    let first = send(&message, 0);
    assert_eq!(first.len(), 2);
    assert_eq!(
        send(&message, 0),
        first,
        "a message that is delivered again"
    );
    let second = send(&message, 1);
    message.retries = 1;
    let retried = send(&message, 0);
    message.retries = 0;
    message
        .headers
        .insert("replaced_task_nesting".into(), json!(1));
    let replaced = send(&message, 0);
    let all: Vec<&Value> = [&first, &second, &retried, &replaced]
        .into_iter()
        .flatten()
        .collect();
    let different: BTreeSet<String> = all.iter().map(|id| id.to_string()).collect();
    assert_eq!(different.len(), all.len());
}

#[test]
fn task_is_not_replaced_by_an_empty_chain_or_a_chord_part() {
    let message = TaskMessage {
        id: "parent".into(),
        ..TaskMessage::default()
    };
    let call = call(&message, "q", "o");
    assert_eq!(
        replace(&message, chain::<Signature>([]), &call),
        Err(SignatureError::ReplacedByNothing)
    );
    // An empty group has a result: the empty list.
    let plan = replace(&message, group::<Signature>([]), &call);
    let messages = plan.map(|plan| plan.effects.len());
    assert_eq!(messages, Ok(1));
    let part = s("a").option("chord", json!({"task": "b"}));
    assert_eq!(
        replace(&message, part, &call),
        Err(SignatureError::ReplacedByPart)
    );
    assert_eq!(
        add_to_chord(&message, s("a"), &call),
        Err(SignatureError::NotInChord)
    );
}

#[test]
fn stamps_reach_every_task_and_callback() {
    let workflow = chord([s("a").link(s("x")), s("b")], s("c") | s("d")).stamp("night", 7);
    let text = workflow.to_json().to_string();
    assert_eq!(text.matches(r#""night":7"#).count(), 5, "{text}");
    assert_eq!(text.matches(r#""stamped_headers":["night"]"#).count(), 5);
    let twice = s("a")
        .stamp("night", 7)
        .stamp("night", 8)
        .stamp("site", "x");
    assert_eq!(twice.options["stamped_headers"], json!(["night", "site"]));
    assert_eq!(twice.options["night"], 8);
}
