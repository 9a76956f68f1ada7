use super::*;
use crate::content::Accept;
use crate::{Properties, RawMessage};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::json;

fn with_body(body: &Value) -> RawMessage {
    RawMessage {
        headers: captured().headers,
        ..raw(json!({}), body)
    }
}

fn raw(headers: Value, body: &Value) -> RawMessage {
    RawMessage {
        headers: serde_json::from_value(headers).unwrap_or_default(),
        properties: Properties {
            content_type: Some(JSON.into()),
            content_encoding: Some("utf-8".into()),
            correlation_id: Some("8f8de068".into()),
            reply_to: Some("5dba047d".into()),
            ..Properties::default()
        },
        body: body.to_string().into_bytes(),
    }
}

/// As captured from a Celery 5.7 producer.
fn captured() -> RawMessage {
    raw(
        json!({
            "lang": "py", "task": "t.f", "id": "8f8de068", "shadow": null, "eta": null,
            "expires": null, "group": null, "group_index": null, "retries": 0,
            "timelimit": [null, null], "root_id": "8f8de068", "parent_id": null,
            "argsrepr": "[549362609]", "kwargsrepr": "{}", "origin": "gen30460@vm",
            "ignore_result": null, "replaced_task_nesting": 0, "stamped_headers": null,
            "stamps": {},
        }),
        &json!([[549362609], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]),
    )
}

fn refused(raw: &RawMessage) -> Refused {
    decode(raw, &Accept::json(1000)).err().unwrap_or(Refused {
        reason: Reason::Malformed("was accepted"),
        task: None,
        id: None,
        reply_to: None,
    })
}

#[test]
fn protocol_2_as_captured() {
    let message = decode(&captured(), &Accept::json(1000));
    assert_eq!(
        message,
        Ok(TaskMessage {
            id: "8f8de068".into(),
            task: "t.f".into(),
            args: json!([549362609]),
            kwargs: json!({}),
            headers: captured().headers,
            root_id: Some("8f8de068".into()),
            argsrepr: Some("[549362609]".into()),
            kwargsrepr: Some("{}".into()),
            origin: Some("gen30460@vm".into()),
            reply_to: Some("5dba047d".into()),
            correlation_id: "8f8de068".into(),
            ..TaskMessage::default()
        })
    );
}

#[test]
fn callbacks_are_read_and_written_unchanged() {
    let embed = json!({"callbacks": [{"task": "a"}], "errbacks": null, "chain": [], "chord": {"task": "b"}});
    let message = with_body(&json!([[], {}, embed]));
    let read = decode(&message, &Accept::json(1000))
        .unwrap_or_default()
        .embed;
    assert_eq!(read.callbacks, [json!({"task": "a"})]);
    assert_eq!(read.chain, Some(Vec::new()));
    assert_eq!(read.to_json(), embed);
    assert_eq!(
        Embed::default().to_json(),
        json!({"callbacks": null, "errbacks": null, "chain": null, "chord": null})
    );
}

#[test]
fn only_task_and_id_are_required() {
    let mut message = raw(json!({"task": "t.f", "id": "a"}), &json!([[], {}, null]));
    message.properties = Properties {
        content_type: Some(JSON.into()),
        ..Default::default()
    };
    let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
    assert_eq!(
        (message.correlation_id.as_str(), message.reply_to),
        ("a", None)
    );
}

#[test]
fn protocol_1() {
    let body = json!({"task": "t.f", "id": "a", "args": [1], "retries": 2, "taskset": "g",
                      "eta": "2026-11-24T04:13:55.482591"});
    let message = decode(&raw(json!({}), &body), &Accept::json(1000)).unwrap_or_default();
    assert_eq!(
        (message.task.as_str(), message.args, message.kwargs),
        ("t.f", json!([1]), json!({}))
    );
    assert_eq!((message.retries, message.group), (2, Some("g".into())));
    assert!(message.eta.is_some());
}

#[rstest]
#[case::not_json(b"{", Disposition::Ack)]
#[case::not_utf8(b"[\"\xff\"]", Disposition::Ack)]
#[case::empty(b"", Disposition::Reject)]
#[case::null(b"null", Disposition::Reject)]
#[case::two_elements(b"[[], {}]", Disposition::Reject)]
#[case::embed_a_list(b"[[], {}, [1]]", Disposition::Reject)]
#[case::embed_an_envelope(
    br#"[[], {}, {"__type__": "bytes", "__value__": ""}]"#,
    Disposition::Reject
)]
#[case::an_envelope(br#"{"__type__": "bytes", "__value__": ""}"#, Disposition::Reject)]
fn bad_bodies(#[case] body: &[u8], #[case] disposition: Disposition) {
    let mut message = captured();
    message.body = body.into();
    let refused = refused(&message);
    assert_eq!(refused.reason.disposition(), disposition, "{refused}");
    assert_eq!(refused.id.as_deref(), Some("8f8de068"));
}

#[rstest]
#[case::no_task(json!({"id": "a"}), Reason::NotATask)]
#[case::no_id(json!({"task": "t"}), Reason::NoId)]
#[case::id_null(json!({"task": "t", "id": null}), Reason::NoId)]
#[case::task_a_number(json!({"task": 7, "id": "a"}), Reason::NotATask)]
#[case::eta(json!({"task": "t", "id": "a", "eta": 17.5}), Reason::Time { header: "eta", value: "17.5".into() })]
#[case::expires(json!({"task": "t", "id": "a", "expires": "soon"}), Reason::Time { header: "expires", value: "soon".into() })]
#[case::timelimit(json!({"task": "t", "id": "a", "timelimit": 5}), Reason::Malformed("`timelimit` is not a pair"))]
fn bad_headers(#[case] headers: Value, #[case] reason: Reason) {
    let refused = refused(&raw(headers, &json!([[], {}, {}])));
    assert_eq!(refused.reason, reason);
    assert_eq!(refused.reason.disposition(), Disposition::Reject);
}

#[rstest]
#[case(None, "a text body")]
#[case(Some("application/data"), "bytes")]
#[case(Some("application/json"), "")]
fn bodies_that_end_pythons_worker_are_refused(
    #[case] content_type: Option<&str>,
    #[case] body: &str,
) {
    let mut message = captured();
    message.properties.content_type = content_type.map(str::to_owned);
    message.body = body.into();
    assert!(matches!(refused(&message).reason, Reason::Malformed(_)));
}

#[rstest]
#[case("application/x-python-serialize")]
#[case("application/x-msgpack")]
#[case("text/plain")]
fn content_types_that_are_not_accepted(#[case] content_type: &str) {
    let mut message = captured();
    message.properties.content_type = Some(content_type.into());
    assert_eq!(
        refused(&message).reason,
        Reason::ContentType(content_type.into())
    );
}

#[rstest]
#[case("application/x-msgpack", b"\x93\x91\xc4\x02\xff\x00\x80\xc0", json!(["/wA="]))]
#[case("application/x-yaml", b"[[2026-11-24], {}, null]", json!(["2026-11-24"]))]
#[case("application/json", br#"[[{"__type__": "bytes", "__value__": "b"}], {}, {}]"#, json!(["b"]))]
fn every_serializer(#[case] content_type: &str, #[case] body: &[u8], #[case] args: Value) {
    let mut message = captured();
    message.properties.content_type = Some(content_type.into());
    message.properties.content_encoding = Some("BINARY".into());
    message.body = body.into();
    let names = ["json", "application/x-msgpack", "yaml", "pickle"].map(str::to_owned);
    let message = decode(&message, &Accept::new(&names, 1000)).unwrap_or_default();
    assert_eq!(message.args, args);
    let typed = message.typed.unwrap_or_default();
    assert!(typed.0[0].is_object(), "{typed:?}");
}

#[test]
fn protocol_1_in_a_content_type_that_is_not_accepted() {
    let mut message = captured();
    message.properties.content_type = Some("application/x-python-serialize".into());
    message.headers.clear();
    assert_eq!(refused(&message).reason.disposition(), Disposition::Ack);
}

#[test]
fn an_envelope_of_an_unknown_type_does_not_decode() {
    let body = json!([[], {}, {"callbacks": [{"__type__": "set", "__value__": []}]}]);
    let refused = refused(&with_body(&body));
    assert_eq!(refused.reason.disposition(), Disposition::Ack);
}

#[test]
fn callbacks_keep_their_envelopes() {
    let signature = json!({"task": "a", "args": [{"__type__": "decimal", "__value__": "1"}]});
    let body = json!([[], {}, {"callbacks": [signature]}]);
    let message = with_body(&body);
    let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
    assert_eq!(message.embed.callbacks, [signature]);
    assert_eq!(message.typed, None);
}

/// Python decompresses first; the name of the task is looked up only afterwards.
#[test]
fn undecompressable_message_is_acknowledged_without_a_task() {
    let mut message = captured();
    message.headers.insert("compression".into(), json!("gzip"));
    let refused = refused(&message);
    assert_eq!(refused.reason.disposition(), Disposition::Ack);
    assert_eq!((refused.task, refused.id), (None, None));
}

#[test]
fn header_times_of_amqps_own_type() {
    let stamp = json!({"__type__": "datetime", "__value__": "2026-11-24T04:13:55"});
    let headers = json!({"task": "t", "id": "a", "eta": stamp});
    let message = decode(&raw(headers, &json!([[], {}, {}])), &Accept::json(1000));
    let eta = message.unwrap_or_default().eta.map(|eta| eta.timestamp());
    assert_eq!(eta, Some(1_795_493_635));
}

#[test]
fn invalid_protocol_1_message_keeps_its_task_name() {
    for (body, reason) in [
        (
            json!({"task": "t", "id": "a", "kwargs": [1]}),
            Reason::KeywordArguments,
        ),
        (
            json!({"task": "t", "id": "a", "eta": 7}),
            Reason::Time {
                header: "eta",
                value: "7".into(),
            },
        ),
        (json!({"task": "t"}), Reason::NoId),
    ] {
        let id = body.get("id").and_then(Value::as_str).map(str::to_owned);
        let refused = refused(&raw(json!({}), &body));
        assert_eq!(
            (refused.reason.clone(), refused.reason.disposition()),
            (reason, Disposition::Reject)
        );
        assert_eq!((refused.task.as_deref(), refused.id), (Some("t"), id));
    }
}

#[test]
fn headers_beside_protocol_1() {
    for (body, retries) in [
        (json!({"task": "t", "id": "a"}), 0),
        (json!({"task": "t", "id": "a", "args": []}), 7),
    ] {
        let message = decode(&raw(json!({"retries": 7}), &body), &Accept::json(1000));
        assert_eq!(message.unwrap_or_default().retries, retries);
    }
}

#[test]
fn reprs_are_absent_or_empty_by_protocol() {
    let one = raw(json!({}), &json!({"task": "t", "id": "a"}));
    let two = raw(json!({"task": "t", "id": 7}), &json!([[], {}, {}]));
    for (raw, id, argsrepr) in [(one, "a", None), (two, "7", Some(String::new()))] {
        let message = decode(&raw, &Accept::json(1000)).unwrap_or_default();
        assert_eq!((message.id.as_str(), message.argsrepr), (id, argsrepr));
    }
}

#[rstest]
#[case(json!("ab"), json!(["a", "b"]))]
#[case(json!({"k": 1}), json!(["k"]))]
#[case(json!(5), json!(5))]
fn arguments_are_any_value_that_python_iterates(#[case] given: Value, #[case] args: Value) {
    let message = with_body(&json!([given, {}, {}]));
    let message = decode(&message, &Accept::json(1000)).unwrap_or_default();
    assert_eq!(message.args, args);
}

#[test]
fn large_bodies_are_not_read() {
    let refused = decode(&captured(), &Accept::json(10))
        .err()
        .map(|r| r.reason);
    assert!(matches!(refused, Some(Reason::TooLarge { limit: 10, .. })));
}

proptest! {
    #[test]
    fn any_message_is_read_without_panic(
        body in proptest::collection::vec(any::<u8>(), 0..300),
        content_type in proptest::option::of("application/(json|x-msgpack|x-yaml|data)|.{0,20}"),
        header in proptest::sample::select(&["task", "id", "eta", "expires", "compression", "timelimit", "retries"][..]),
        value in proptest::sample::select(vec![
            Value::Null, json!(true), json!(-1), json!(1.5), json!(""), json!("gzip"), json!("xz"), json!([1, "a"]),
            json!({"__type__": "datetime", "__value__": "2026"}), json!({"__type__": [], "__value__": 1}),
        ]),
    ) {
        let accept = Accept::new(&["json", "msgpack", "yaml"].map(str::to_owned), 1000);
        let mut message = captured();
        message.body = body;
        message.properties.content_type = content_type;
        message.headers.insert(header.into(), value);
        let _ = decode(&message, &accept);
        message.headers.clear();
        let _ = decode(&message, &accept);
    }
}
