#![allow(clippy::unwrap_used, reason = "tests")]

use tokio::time::timeout;

use super::*;
use crate::broker::{Binding, Declaration, Exchange, ExchangeKind};

const SHORTLY: Duration = Duration::from_millis(50);

fn to(exchange: &str, routing_key: &str, body: &str) -> Publication {
    Publication {
        exchange: exchange.into(),
        routing_key: routing_key.into(),
        message: RawMessage {
            body: body.into(),
            ..RawMessage::default()
        },
        declare: None,
        mandatory: true,
        queue_lifetime: None,
    }
}

fn bound(name: &str, kind: ExchangeKind, exchange: &str, key: &str) -> Queue {
    Queue {
        binding: Some(Binding {
            exchange: Exchange::durable(exchange, kind),
            key: key.into(),
        }),
        ..Queue::tasks(name)
    }
}

fn subscription(queues: &[&str], prefetch: u16) -> Subscription {
    Subscription {
        purpose: "tests",
        queues: queues.iter().map(|name| Queue::tasks(*name)).collect(),
        prefetch,
        delayed: None,
        max_body_bytes: None,
        max_waiting_body_bytes: None,
        permits: None,
    }
}

async fn publish(broker: &MemoryBroker, publication: Publication) -> Result<(), BrokerError> {
    broker.publish(&publication, SHORTLY).await
}

#[tokio::test]
async fn exchanges_route_as_those_of_amqp() {
    let broker = MemoryBroker::new();
    broker.declare(&bound("direct", ExchangeKind::Direct, "d", "key"));
    broker.declare(&bound("all", ExchangeKind::Fanout, "f", ""));
    broker.declare(&bound("tasks", ExchangeKind::Topic, "t", "task.#"));
    broker.declare(&bound("one", ExchangeKind::Topic, "t", "*.*"));
    for (exchange, key) in [
        ("d", "key"),
        ("f", "any"),
        ("t", "task"),
        ("t", "task.sent"),
    ] {
        publish(&broker, to(exchange, key, key)).await.unwrap();
    }
    publish(&broker, to("", "direct", "by name")).await.unwrap();
    let bodies = |queue: &str| -> Vec<String> {
        let messages = broker.messages(queue).into_iter();
        messages
            .map(|message| String::from_utf8(message.body).unwrap())
            .collect()
    };
    assert_eq!(bodies("direct"), ["key", "by name"]);
    assert_eq!(bodies("all"), ["any"]);
    assert_eq!(bodies("tasks"), ["task", "task.sent"]);
    assert_eq!(bodies("one"), ["task.sent"]);
    for (exchange, key) in [("d", "other"), ("", "missing"), ("missing", "key")] {
        let refused = publish(&broker, to(exchange, key, "")).await;
        assert!(matches!(refused, Err(BrokerError::Unroutable { .. })));
    }
    let declared = Publication {
        declare: Some(Declaration::Queue(Queue::tasks("new"))),
        ..to("", "new", "x")
    };
    publish(&broker, declared).await.unwrap();
    assert_eq!(bodies("new"), ["x"]);
}

#[tokio::test]
async fn prefetch_limits_held_messages_without_exempt_ones() {
    let broker = MemoryBroker::new();
    let mut consumer = broker.consume(subscription(&["q"], 1));
    broker.declare(&Queue::tasks("q"));
    for body in ["a", "b", "c"] {
        publish(&broker, to("", "q", body)).await.unwrap();
    }
    let first = consumer.next().await.unwrap();
    assert!(timeout(SHORTLY, consumer.next()).await.is_err());
    first.set_exempt(true);
    let second = consumer.next().await.unwrap();
    assert!(timeout(SHORTLY, consumer.next()).await.is_err());
    second.settle(Disposition::Ack).await;
    let third = consumer.next().await.unwrap();
    assert_eq!(third.message.body, b"c");
    // The exempt one is given back when it is dropped, in front of the queue.
    third.settle(Disposition::Reject).await;
    drop(first);
    let again = consumer.next().await.unwrap();
    assert!(again.redelivered && again.message.body == b"a");
    again.settle(Disposition::Ack).await;
    assert!(broker.messages("q").is_empty());
}

#[tokio::test]
async fn named_brokers_are_shared_and_closed_each() {
    let url = "memory://named_brokers_are_shared";
    let (worker, client) = (
        MemoryBroker::named(url).unwrap(),
        MemoryBroker::named(url).unwrap(),
    );
    let mut consumer = worker.consume(subscription(&["q"], 0));
    client.declare(&Queue::tasks("q"));
    publish(&client, to("", "q", "a")).await.unwrap();
    let held = consumer.next().await.unwrap();
    client.close().await;
    publish(&client, to("", "q", "b")).await.unwrap();
    let second = consumer.next().await.unwrap();
    assert_eq!(second.message.body, b"b");
    second.settle(Disposition::Ack).await;
    worker.close().await;
    drop(held);
    assert!(timeout(SHORTLY, consumer.next()).await.unwrap().is_none());
    // What was not acknowledged is there for the next consumer.
    assert_eq!(client.messages("q").len(), 1);
    assert!(MemoryBroker::named("redis://x").is_err());
}

#[tokio::test]
async fn survey_counts_messages_and_consumers() {
    let broker = MemoryBroker::new();
    let consumer = broker.consume(subscription(&["q"], 0));
    let mut connected = consumer.connected();
    connected.wait_for(|served| *served).await.unwrap();
    consumer.handle().add(Queue::tasks("other")).await;
    broker.declare(&Queue::tasks("idle"));
    publish(&broker, to("", "idle", "x")).await.unwrap();
    let names = ["q", "other", "idle", "missing"].map(str::to_owned);
    let depths = broker.survey(&names).await.unwrap();
    let counts: Vec<_> = depths
        .iter()
        .map(|depth| (depth.queue.as_str(), depth.messages, depth.consumers))
        .collect();
    assert_eq!(
        counts,
        [
            ("q", 0, Some(1)),
            ("other", 0, Some(1)),
            ("idle", 1, Some(0))
        ]
    );
}
