//! Redis as kombu uses it: order, the record of held messages, channels, and what is not a message.

use celery_protocol::Properties;
use celery_worker::broker::redis::RedisTransportOptions;
use celery_worker::broker::{Binding, Exchange, ExchangeKind};
use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;
use support::until;

use super::*;

/// A client whose keys no other test uses.
fn private(url: &str, change: impl FnOnce(&mut RedisTransportOptions)) -> (RedisBroker, String) {
    let prefix = unique("private:");
    let mut options = RedisBrokerOptions::new(url, &prefix);
    options.transport.global_keyprefix.clone_from(&prefix);
    change(&mut options.transport);
    (RedisBroker::new(&options).unwrap(), prefix)
}

/// Another client of the same keys.
fn beside(url: &str, prefix: &str, change: impl FnOnce(&mut RedisTransportOptions)) -> RedisBroker {
    let mut options = RedisBrokerOptions::new(url, prefix);
    options.transport.global_keyprefix = prefix.into();
    change(&mut options.transport);
    RedisBroker::new(&options).unwrap()
}

async fn held(connection: &mut MultiplexedConnection, prefix: &str) -> (usize, usize) {
    let record = connection.hlen(format!("{prefix}unacked")).await.unwrap();
    let index = connection
        .zcard(format!("{prefix}unacked_index"))
        .await
        .unwrap();
    (record, index)
}

#[tokio::test]
async fn messages_are_recorded_until_they_are_settled() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let mut connection = redis_connection().await;
    let queue = Queue::tasks("q");
    for priority in [9, 4, 0, 3] {
        let message = RawMessage {
            body: priority.to_string().into(),
            properties: Properties {
                priority: Some(priority),
                ..Properties::default()
            },
            ..RawMessage::default()
        };
        broker
            .publish(&publication(&queue, message), PATIENCE)
            .await
            .unwrap();
    }
    let members: Vec<String> = connection
        .smembers(format!("{prefix}_kombu.binding.q"))
        .await
        .unwrap();
    assert_eq!(members, ["q\u{6}\u{16}\u{6}\u{16}q"]);
    let depth = broker.survey(&["q".into()]).await.unwrap();
    assert_eq!(depth[0].messages, 4);
    let mut consumer = consume(&broker, &[&queue], 0).await;
    let mut deliveries = Vec::new();
    for expected in ["0", "4", "3", "9"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), expected);
        deliveries.push(delivery);
    }
    assert_eq!(held(&mut connection, &prefix).await, (4, 4));
    // A requeued message is delivered last, and is marked as redelivered.
    deliveries.remove(0).settle(Disposition::Requeue).await;
    let again = next(&mut consumer).await;
    assert!(again.redelivered && body(&again) == "0");
    again.settle(Disposition::Reject).await;
    for delivery in deliveries {
        delivery.settle(Disposition::Ack).await;
    }
    assert_eq!(held(&mut connection, &prefix).await, (0, 0));
    broker.close().await;
}

#[tokio::test]
async fn a_closed_broker_returns_messages_in_their_old_order() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let queue = Queue::tasks("q");
    for n in 0..6 {
        publish(&broker, &queue, &n.to_string()).await;
    }
    let mut consumer = consume(&broker, &[&queue], 4).await;
    let mut deliveries = Vec::new();
    for _ in 0..4 {
        deliveries.push(next(&mut consumer).await);
    }
    deliveries.remove(1).settle(Disposition::Ack).await;
    broker.close().await;
    assert!(deliveries.iter().all(Delivery::is_void));
    drop(deliveries);
    let mut connection = redis_connection().await;
    assert_eq!(held(&mut connection, &prefix).await, (0, 0));
    let other = beside(&url, &prefix, |_| ());
    let mut consumer = consume(&other, &[&queue], 0).await;
    for expected in ["0", "2", "3", "4", "5"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), expected);
        assert!(delivery.redelivered || ["4", "5"].contains(&expected));
        delivery.settle(Disposition::Ack).await;
    }
    other.close().await;
}

#[tokio::test]
async fn a_held_message_is_renewed_and_that_of_a_dead_worker_returned() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let quickly = |options: &mut RedisTransportOptions| {
        options.visibility_timeout = 1;
        options.unacked_restore_interval = 1;
        options.unacked_restore_throttle = 1;
    };
    let (broker, prefix) = private(&url, quickly);
    let queue = Queue::tasks("q");
    publish(&broker, &queue, "mine").await;
    let mut consumer = consume(&broker, &[&queue], 0).await;
    let mine = next(&mut consumer).await;
    // A worker that has died.
    let mut connection = redis_connection().await;
    let entry: Vec<Vec<u8>> = connection.hvals(format!("{prefix}unacked")).await.unwrap();
    let () = connection
        .hset(format!("{prefix}unacked"), "dead", &entry[0])
        .await
        .unwrap();
    let () = connection
        .zadd(format!("{prefix}unacked_index"), "dead", 1)
        .await
        .unwrap();
    let back = next(&mut consumer).await;
    assert!(back.redelivered && body(&back) == "mine");
    back.settle(Disposition::Ack).await;
    // Another worker searches all the time, for longer than the timeout.
    let other = beside(&url, &prefix, quickly);
    let mut others = consume(&other, &[&queue], 0).await;
    let longer = timeout(Duration::from_secs(3), others.next()).await;
    assert!(longer.is_err() && !mine.is_void());
    // One that is taken over is noticed.
    let () = connection.del(format!("{prefix}unacked")).await.unwrap();
    until("the loss is noticed", async || mine.is_void()).await;
    mine.settle(Disposition::Ack).await;
    broker.close().await;
    other.close().await;
}

#[tokio::test]
async fn what_is_no_message_is_kept_aside() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let mut connection = redis_connection().await;
    let queue = Queue::tasks("q");
    let list = format!("{prefix}q");
    let not_base64 = r#"{"body": "?", "headers": {}, "properties": {"delivery_tag": "t", "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "q"}}}"#;
    for garbage in ["not JSON", "[]", r#"{"body": ""}"#, not_base64] {
        let () = connection.lpush(&list, garbage).await.unwrap();
    }
    publish(&broker, &queue, "good").await;
    let mut consumer = consume(&broker, &[&queue], 1).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(body(&delivery), "good");
    delivery.settle(Disposition::Ack).await;
    let parked = format!("{prefix}celery-worker.parked.q");
    until("all are parked", async || {
        connection.llen::<_, usize>(&parked).await.unwrap() == 4
    })
    .await;
    until("nothing is held", async || {
        held(&mut connection, &prefix).await == (0, 0)
    })
    .await;
    broker.close().await;
}

#[tokio::test]
async fn broadcasts_and_replies_need_no_settlement() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let mut connection = redis_connection().await;
    let events = Queue {
        binding: Some(Binding {
            exchange: Exchange::events(),
            key: "worker.#".into(),
        }),
        ..Queue::control("node", "tag")
    };
    let reply = Exchange {
        name: "reply.celery.pidbox".into(),
        kind: ExchangeKind::Direct,
        durable: false,
    };
    let replies = Queue {
        binding: Some(Binding {
            exchange: reply,
            key: "oid".into(),
        }),
        ..Queue::control("oid", "reply")
    };
    let mut consumer = consume(&broker, &[&events, &replies], 0).await;
    let to = |exchange: &str, key: &str| Publication::new(exchange, key, RawMessage::default());
    let publish =
        async |publication: Publication| broker.publish(&publication, PATIENCE).await.unwrap();
    publish(to("celeryev", "task.sent")).await;
    publish(to("celeryev", "worker.online")).await;
    let event = next(&mut consumer).await;
    assert_eq!(
        (&*event.exchange, &*event.routing_key),
        ("celeryev", "worker.online")
    );
    assert_eq!(event.queue, events.name);
    event.settle(Disposition::Ack).await;
    // A reply finds its queue by the binding; one to a client that is gone creates no key.
    publish(to("reply.celery.pidbox", "gone")).await;
    publish(to("reply.celery.pidbox", "oid")).await;
    let answer = next(&mut consumer).await;
    assert_eq!(answer.queue, replies.name);
    answer.settle(Disposition::Ack).await;
    assert_eq!(held(&mut connection, &prefix).await, (0, 0));
    // Both survive their connections.
    kill_clients(&prefix).await;
    until("events and replies arrive again", async || {
        publish(to("celeryev", "worker.online")).await;
        publish(to("reply.celery.pidbox", "oid")).await;
        let mut queues = HashSet::new();
        while let Ok(Some(delivery)) = timeout(QUIET, consumer.next()).await {
            queues.insert(delivery.queue.clone());
        }
        queues.len() == 2
    })
    .await;
    consumer.cancel();
    broker.close().await;
    let left: Vec<String> = connection
        .keys(format!("{prefix}*celery.pidbox"))
        .await
        .unwrap();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn killed_connections_lose_and_double_nothing() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let queue = Queue::tasks("q");
    let mut consumer = consume(&broker, &[&queue], 8).await;
    let publishing = async {
        for n in 0..400 {
            publish(&broker, &queue, &n.to_string()).await;
        }
    };
    let killing = async {
        for _ in 0..15 {
            kill_clients(&prefix).await;
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    let consuming = async {
        let mut seen = HashSet::new();
        while seen.len() < 400 {
            let delivery = next(&mut consumer).await;
            assert!(
                seen.insert(body(&delivery).to_owned()),
                "{delivery:?} came twice"
            );
            delivery.settle(Disposition::Ack).await;
        }
    };
    tokio::join!(publishing, killing, consuming);
    nothing(&mut consumer).await;
    broker.close().await;
    let mut connection = redis_connection().await;
    assert_eq!(held(&mut connection, &prefix).await, (0, 0));
}

/// Elements of a list with a body of 20,000 bytes, and what a worker gets of each.
#[tokio::test]
async fn bodies_above_the_limits_stay_in_redis() {
    let Some(url) = service("TEST_REDIS_URL") else {
        return;
    };
    let (broker, prefix) = private(&url, |_| ());
    let mut connection = redis_connection().await;
    let size = 20_000;
    let element = |encoding: &str, body: String, headers: serde_json::Value| {
        json!({"properties": {"body_encoding": encoding, "delivery_tag": "t",
            "delivery_info": {"exchange": "", "routing_key": "q"}}, "headers": headers, "body": body, "x": [[], 1.5]})
        .to_string()
    };
    let base64 = "eHh4".repeat(size / 3) + "eHg=";
    let with_quotes = r#""\"#.repeat(size / 2);
    let eta = |year: u16| json!({"task": "t", "id": "i", "eta": format!("{year}-01-01T00:00:00+00:00"), "empty": []});
    let list = format!("{prefix}q");
    let queue = Queue::tasks("q");
    for (max_body, text, expected) in [
        (
            1000,
            element("base64", base64.clone(), json!({})),
            Some((size, false)),
        ),
        (
            1000,
            element("utf-8", with_quotes.clone(), json!({})),
            Some((size, false)),
        ),
        (size, element("base64", base64.clone(), eta(2000)), None),
        (
            size,
            element("base64", base64, eta(9000)),
            Some((size, true)),
        ),
        (
            size,
            element("utf-8", with_quotes, eta(9000)),
            Some((size, true)),
        ),
    ] {
        let () = connection.lpush(&list, &text).await.unwrap();
        let mut subscription = subscription(&[&queue], 1);
        subscription.max_body_bytes = Some(max_body);
        subscription.max_waiting_body_bytes = Some(100);
        let mut consumer = broker.consume(subscription);
        let delivery = next(&mut consumer).await;
        let omitted = delivery.damage.as_deref();
        let omitted =
            omitted.map(|damage| (damage.body_bytes.unwrap() as usize, damage.awaits_eta));
        assert_eq!(omitted, expected, "{text:.200}");
        let kept = if expected.is_none() { size } else { 0 };
        assert_eq!(delivery.message.body.len(), kept);
        // It returns unchanged, except for the flags.
        consumer.cancel();
        delivery.settle(Disposition::Requeue).await;
        let returned: Vec<u8> = connection.rpop(&list, None).await.unwrap();
        let mut expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        expected["headers"]["redelivered"] = true.into();
        expected["properties"]["delivery_info"]["redelivered"] = true.into();
        let returned: serde_json::Value = serde_json::from_slice(&returned).unwrap();
        assert!(returned == expected, "{text:.200}");
    }
    // The rest of a message is limited, too.
    let headers = json!({"x": "x".repeat(size)});
    let text = element("base64", String::new(), headers);
    let () = connection.lpush(&list, &text).await.unwrap();
    let mut subscription = subscription(&[&queue], 1);
    subscription.max_body_bytes = Some(1000);
    let _consumer = broker.consume(subscription);
    let parked = format!("{prefix}celery-worker.parked.q");
    until("it is parked", async || {
        connection.llen::<_, usize>(&parked).await.unwrap() == 1
    })
    .await;
    assert_eq!(
        connection.rpop::<_, String>(&parked, None).await.unwrap(),
        text
    );
    assert_eq!(held(&mut connection, &prefix).await, (0, 0));
    broker.close().await;
}
