//! The client on brokers and backends in memory.

#![allow(clippy::unwrap_used, reason = "tests")]

use celery_protocol::canvas::{chain, chord, group};
use celery_protocol::exception::Exception;
use celery_protocol::message::Embed;
use celery_protocol::result::State;

use super::*;
use crate::broker::memory::MemoryBroker;
use crate::broker::{Queue, Subscription};
use crate::results::memory::MemoryResults;
use crate::results::{Disabled, Rpc};

const SHORTLY: Duration = Duration::from_millis(200);

fn s(name: &str) -> Signature {
    Signature::new(name)
}

fn in_memory() -> (MemoryBroker, MemoryResults, Client) {
    let (broker, results) = (MemoryBroker::new(), MemoryResults::new());
    let client = Client::new(broker.clone(), results.clone(), ClientOptions::default());
    (broker, results, client)
}

fn running(id: &str) -> TaskMessage {
    TaskMessage {
        id: id.into(),
        root_id: Some("root".into()),
        priority: Some(7),
        ..TaskMessage::default()
    }
}

#[tokio::test]
async fn two_sends_have_different_ids_and_each_task_is_its_own_root() {
    let (broker, _, client) = in_memory();
    let first = client.send(s("a")).await.unwrap();
    let second = client.send(s("a").queue("other")).await.unwrap();
    assert_ne!(first.id(), second.id());
    for (queue, result) in [("celery", first), ("other", second)] {
        let messages = broker.messages(queue);
        let headers = &messages[0].headers;
        assert_eq!((messages.len(), &headers["id"]), (1, &json!(result.id())));
        assert_eq!(headers["root_id"], headers["id"]);
        assert!(headers["parent_id"].is_null());
    }
}

#[tokio::test]
async fn chord_is_sent_with_the_task_that_watches_it() {
    let (broker, results, client) = in_memory();
    let result = client.send(group([s("a"), s("b")]) | s("c")).await.unwrap();
    let sent = broker.messages("celery");
    let names: Vec<&str> = sent
        .iter()
        .map(|message| message.headers["task"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["celery.chord_unlock", "a", "b"]);
    assert_eq!(result.parent().unwrap().members().len(), 2);
    results.set(result.id(), State::Success(json!("body")));
    assert_eq!(result.get::<String>(SHORTLY).await.unwrap(), "body");
    assert_eq!(result.parent().unwrap().state().await.unwrap(), "PENDING");
}

#[tokio::test]
async fn invalid_signature_sends_nothing() {
    let broker = MemoryBroker::new();
    let client = Client::new(broker.clone(), Disabled, ClientOptions::default());
    let empty = client.send(chain::<Signature>([])).await;
    assert!(matches!(empty, Err(SendError::Empty)));
    let no_chords = client.send(chord([s("a")], s("b"))).await;
    let error = no_chords.unwrap_err();
    assert!(matches!(
        error,
        SendError::Signature(SignatureError::NoChords)
    ));
    let exchange = client.send(s("a").exchange("missing", "key")).await;
    assert!(matches!(
        exchange,
        Err(SendError::Broker(BrokerError::Unroutable { .. }))
    ));
    assert!(broker.messages("celery").is_empty());
    let result = client.send(s("a")).await.unwrap();
    assert!(matches!(
        result.get::<i64>(SHORTLY).await,
        Err(GetError::Read(ReadError::Disabled))
    ));
}

#[tokio::test]
async fn errors_of_get_are_distinct() {
    let (_, results, client) = in_memory();
    let result = client.send(group([s("a"), s("b")])).await.unwrap();
    let late = result.get::<Vec<i64>>(SHORTLY).await;
    assert!(matches!(late, Err(GetError::Timeout { waited, .. }) if waited == SHORTLY));
    results.set(result.members()[0].id(), State::Success(json!("text")));
    assert_eq!(result.state().await.unwrap(), "PENDING");
    let exception = Exception::new("app.errors", "DiskFull", "no room");
    let failed = State::Failure {
        exception,
        traceback: Some("Traceback".into()),
    };
    results.set(result.members()[1].id(), failed);
    assert_eq!(result.state().await.unwrap(), "FAILURE");
    let error = result.get::<Vec<String>>(SHORTLY).await.unwrap_err();
    assert!(error.to_string().contains("DiskFull"), "{error}");
    results.set(result.members()[1].id(), State::Success(json!("more")));
    let wrong = result.get::<Vec<i64>>(SHORTLY).await;
    assert!(matches!(wrong, Err(GetError::Type { .. })));
    assert_eq!(
        result.get::<Vec<String>>(SHORTLY).await.unwrap(),
        ["text", "more"]
    );
}

#[tokio::test]
async fn replies_come_to_the_queue_of_the_client() {
    let broker = MemoryBroker::new();
    let backend = Rpc::new(Arc::new(broker.clone()));
    let client = Client::new(broker.clone(), backend, ClientOptions::default());
    let result = client.send(s("a") | s("b")).await.unwrap();
    let sent = &broker.messages("celery")[0];
    let reply_to = sent.properties.reply_to.clone().unwrap();
    let rest: Value = serde_json::from_slice(&sent.body).unwrap();
    assert_eq!(rest[2]["chain"][0]["options"]["reply_to"], reply_to);
    let message = TaskMessage {
        id: result.id().into(),
        reply_to: Some(reply_to),
        correlation_id: result.id().into(),
        ..TaskMessage::default()
    };
    let state = State::Success(json!({"x": 1}));
    let meta = celery_protocol::result::ResultMeta::new(&message, state, clock::now());
    let worker = Rpc::new(Arc::new(broker.clone()));
    worker.store(&meta, &message).await.unwrap();
    let value: Value = result.get(SHORTLY * 10).await.unwrap();
    assert_eq!(value["x"], 1);
    // The value stays until it is forgotten.
    assert_eq!(result.state().await.unwrap(), "SUCCESS");
    result.forget().await.unwrap();
    assert_eq!(result.state().await.unwrap(), "PENDING");
}

#[tokio::test]
async fn second_run_of_a_task_sends_the_same_ids() {
    let (broker, _, client) = in_memory();
    let run = async || {
        let inside = client.for_task(Arc::new(running("parent")));
        inside.send(s("a")).await.unwrap();
        inside.send(group([s("b"), s("c")])).await.unwrap();
        inside.children()
    };
    let (first, second) = (run().await, run().await);
    assert_eq!(first, second);
    assert_eq!(first.len(), 2);
    let sent = broker.messages("celery");
    assert_eq!(sent.len(), 6);
    for message in &sent {
        let headers = &message.headers;
        assert_eq!(
            (&headers["parent_id"], &headers["root_id"]),
            (&json!("parent"), &json!("root"))
        );
        assert_eq!(message.properties.priority, Some(0));
    }
}

#[tokio::test]
async fn priority_is_inherited_if_enabled() {
    let broker = MemoryBroker::new();
    let options = ClientOptions {
        inherit_parent_priority: true,
        ..ClientOptions::default()
    };
    let client = Client::new(broker.clone(), Disabled, options);
    let inside = client.for_task(Arc::new(running("parent")));
    inside.send(group([s("a"), s("b")])).await.unwrap();
    inside.send(s("c").priority(2)).await.unwrap();
    let sent = broker.messages("celery");
    let priorities: Vec<_> = sent
        .iter()
        .map(|message| message.properties.priority.unwrap())
        .collect();
    assert_eq!(priorities, [7, 7, 2]);
}

#[tokio::test]
async fn sent_task_is_followed_by_its_event_if_enabled() {
    let broker = MemoryBroker::recording();
    let options = ClientOptions {
        task_sent_events: true,
        hostname: "celery@host".into(),
        ..ClientOptions::default()
    };
    let client = Client::new(broker.clone(), Disabled, options);
    let result = client.send(s("a").arg(1).queue("other")).await.unwrap();
    let sent = broker.take_recorded();
    let [task, event] = &*sent else {
        unreachable!("{sent:?}")
    };
    assert_eq!((&*task.routing_key, &*task.exchange), ("other", ""));
    assert_eq!(
        (&*event.routing_key, &*event.exchange),
        ("task.sent", "celeryev")
    );
    let origin = format!("gen{}@host", std::process::id());
    assert_eq!(task.message.headers["origin"], origin);
    let event: Value = serde_json::from_slice(&event.message.body).unwrap();
    let expected = json!([result.id(), "a", "(1,)", "{}", "other", "other", origin, 1]);
    let keys = [
        "uuid",
        "name",
        "args",
        "kwargs",
        "queue",
        "routing_key",
        "hostname",
        "clock",
    ];
    assert_eq!(
        Value::from(keys.map(|key| event[key].clone()).to_vec()),
        expected
    );
}

#[tokio::test]
async fn replacement_has_the_id_and_the_chain_of_the_task() {
    let (broker, _, client) = in_memory();
    let mut message = running("parent");
    message.embed = Embed {
        chain: Some(vec![s("next").task_id("next").to_json()]),
        ..Embed::default()
    };
    let message = Arc::new(message);
    let inside = client.for_task(message.clone());
    inside.replace(&message, s("a").arg(1)).await.unwrap();
    let sent = &broker.messages("celery")[0];
    assert_eq!(sent.headers["id"], "parent");
    assert_eq!(sent.headers["replaced_task_nesting"], 1);
    let body: Value = serde_json::from_slice(&sent.body).unwrap();
    assert_eq!(body[2]["chain"][0]["task"], "next");
    let error = inside.add_to_chord(&message, s("a")).await.unwrap_err();
    assert!(matches!(
        error,
        SendError::Signature(SignatureError::NotInChord)
    ));
}

#[tokio::test]
async fn revocation_reaches_every_worker() {
    let (broker, _, client) = in_memory();
    let mut workers: Vec<_> = ["one", "two"]
        .map(|name| {
            broker.consume(Subscription {
                purpose: "remote control",
                queues: vec![Queue::control(name, "tag")],
                prefetch: 0,
                delayed: None,
                max_body_bytes: None,
                max_waiting_body_bytes: None,
                permits: None,
            })
        })
        .into();
    for worker in &workers {
        worker.connected().wait_for(|served| *served).await.unwrap();
    }
    let result = client.send(group([s("a"), s("b")])).await.unwrap();
    result.revoke(IfRunning::Terminate).await.unwrap();
    for worker in &mut workers {
        let delivery = worker.next().await.unwrap();
        let request = pidbox::ControlRequest::decode(&delivery.message).unwrap();
        assert_eq!(request.method, "revoke");
        assert!(request.reply_to.is_none() && request.ticket.is_none());
        assert_eq!(request.argument("task_id").as_array().unwrap().len(), 2);
        assert_eq!(request.argument("terminate"), true);
        delivery.acknowledge();
    }
}
