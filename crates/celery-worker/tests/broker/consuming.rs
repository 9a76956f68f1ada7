//! Subscriptions: queues, deliveries and their settlement.

use rstest::rstest;

use super::*;

#[rstest]
#[tokio::test]
async fn exempt_deliveries_use_no_slot(#[values(Kind::RabbitMq, Kind::Redis)] kind: Kind) {
    let Some(broker) = kind.open("exempt") else {
        return;
    };
    let broker = &*broker;
    for queue in [Queue::tasks(unique("exempt")), quorum(&unique("exempt"))] {
        for n in 0..8 {
            publish(broker, &queue, &n.to_string()).await;
        }
        let mut consumer = consume(broker, &[&queue], 2).await;
        let mut held = vec![next(&mut consumer).await, next(&mut consumer).await];
        nothing(&mut consumer).await;
        for _ in 0..3 {
            held.last().unwrap().set_exempt(true);
            held.push(next(&mut consumer).await);
            nothing(&mut consumer).await;
        }
        // The first one, of the first consumer, frees the place of one of the last.
        let first = held.remove(0);
        assert_eq!(
            (body(&first), first.queue.as_str()),
            ("0", queue.name.as_str())
        );
        first.settle(Disposition::Ack).await;
        held.push(next(&mut consumer).await);
        nothing(&mut consumer).await;
        // One whose time has come counts again.
        held[0].set_exempt(false);
        nothing(&mut consumer).await;
        held.pop().unwrap().settle(Disposition::Ack).await;
        nothing(&mut consumer).await;
        held.remove(0).settle(Disposition::Ack).await;
        held.push(next(&mut consumer).await);
        let bodies: Vec<&str> = held.iter().map(body).collect();
        assert_eq!(bodies, ["2", "3", "4", "6"]);
        for delivery in held {
            delivery.settle(Disposition::Ack).await;
        }
        next(&mut consumer).await.settle(Disposition::Ack).await;
        consumer.cancel();
        assert!(timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
    }
    broker.close().await;
}

#[rstest]
#[tokio::test]
async fn queues_are_added_and_removed_while_consuming(
    #[values(Kind::RabbitMq, Kind::Redis)] kind: Kind,
) {
    let name = unique("dynamic");
    let Some(broker) = kind.open(&name) else {
        return;
    };
    let broker = &*broker;
    let [first, second] = [Queue::tasks(unique("one")), Queue::tasks(unique("two"))];
    let mut consumer = consume(broker, &[&first], 1).await;
    let handle = consumer.handle();
    handle.add(second.clone()).await;
    assert_eq!(handle.queues(), [first.clone(), second.clone()]);

    publish(broker, &second, "a").await;
    let held = next(&mut consumer).await;
    assert_eq!(held.queue, second.name);
    publish(broker, &second, "b").await;
    nothing(&mut consumer).await;
    // A larger window.
    handle.set_prefetch(2);
    let other = next(&mut consumer).await;
    assert_eq!(body(&other), "b");

    handle.cancel_queue(&second.name).await;
    publish(broker, &second, "c").await;
    other.settle(Disposition::Ack).await;
    nothing(&mut consumer).await;
    held.settle(Disposition::Ack).await;
    publish(broker, &first, "d").await;
    next(&mut consumer).await.settle(Disposition::Ack).await;

    // Both changes outlive the connection.
    let mut connected = consumer.connected();
    connected.borrow_and_update();
    kind.close_connections(&name).await;
    handle.add(second.clone()).await;
    handle.cancel_queue(&first.name).await;
    let back = next(&mut consumer).await;
    assert_eq!((body(&back), &back.queue), ("c", &second.name));
    back.settle(Disposition::Ack).await;
    publish(broker, &first, "e").await;
    nothing(&mut consumer).await;
    assert_eq!(handle.queues(), [second]);
    broker.close().await;
}

#[tokio::test]
async fn deleted_queues_are_declared_again() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "deleted");
    let [queue, other] = [
        Queue::tasks(unique("deleted")),
        Queue::tasks(unique("beside")),
    ];
    let mut consumer = consume(&broker, &[&queue, &other], 1).await;
    publish(&broker, &other, "held").await;
    let held = next(&mut consumer).await;
    let connected = consumer.connected();
    for n in 0..2 {
        ctl(&["delete_queue", &queue.name]).await;
        let producer = amqp(&url, "deleted-producer");
        publish(&producer, &queue, &n.to_string()).await;
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), n.to_string());
        delivery.settle(Disposition::Ack).await;
        producer.close().await;
    }
    // The other queue has seen nothing of it.
    assert!(!held.is_void() && *connected.borrow());
    held.settle(Disposition::Ack).await;
    broker.close().await;
}

#[tokio::test]
async fn rejects_reach_the_dead_letter_exchange() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "dead");
    for mut queue in [Queue::tasks(unique("alive")), quorum(&unique("alive"))] {
        let dead = Queue::tasks(unique("dead"));
        let exchange = dead.binding.as_ref().unwrap().exchange.name.clone();
        queue
            .arguments
            .insert("x-dead-letter-exchange".into(), exchange.into());
        queue
            .arguments
            .insert("x-dead-letter-routing-key".into(), dead.name.clone().into());
        let mut graves = consume(&broker, &[&dead], 1).await;
        let mut consumer = consume(&broker, &[&queue], 1).await;
        publish(&broker, &queue, "poison").await;
        next(&mut consumer).await.settle(Disposition::Reject).await;
        let buried = next(&mut graves).await;
        assert_eq!(body(&buried), "poison");
        assert_eq!(buried.message.headers["x-death"][0]["reason"], "rejected");
        assert_eq!(buried.message.headers["x-death"][0]["queue"], queue.name);
        buried.settle(Disposition::Ack).await;
        // What is given back is not.
        publish(&broker, &queue, "again").await;
        next(&mut consumer).await.settle(Disposition::Requeue).await;
        let back = next(&mut consumer).await;
        assert!(back.redelivered);
        back.settle(Disposition::Ack).await;
        nothing(&mut graves).await;
    }
    broker.close().await;
}

/// A queue that exists with other arguments is used unchanged.
#[tokio::test]
async fn queue_with_other_arguments_is_used_unchanged() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "other-arguments");
    let mut there = Queue::tasks(unique("priority"));
    there.arguments.insert("x-max-priority".into(), 3.into());
    publish(&broker, &there, "1").await;
    broker.close().await;

    let broker = amqp(&url, "other-arguments");
    let mut wanted = Queue::tasks(&there.name);
    let binding = wanted.binding.as_mut().unwrap();
    binding.exchange.kind = celery_worker::broker::ExchangeKind::Topic;
    publish(&broker, &wanted, "2").await;
    let mut consumer = consume(&broker, &[&wanted], 2).await;
    for expected in ["1", "2"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), expected);
        delivery.settle(Disposition::Ack).await;
    }
    broker.close().await;
}

#[tokio::test]
async fn missing_queue_is_awaited_without_declaring() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let mut options = AmqpOptions::new(url.as_str(), "passive");
    options.no_declare = true;
    let broker = Amqp::new(&options).unwrap();
    let [there, missing] = [
        Queue::tasks(unique("there")),
        Queue::tasks(unique("missing")),
    ];
    let declaring = amqp(&url, "declaring");
    publish(&declaring, &there, "1").await;

    let publication = publication(&missing, RawMessage::default());
    let refused = broker.publish(&publication, PATIENCE).await.unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains(&missing.name) && text.contains("no_declare"),
        "{text}"
    );

    let mut consumer = broker.consume(subscription(&[&there, &missing], 1));
    next(&mut consumer).await.settle(Disposition::Ack).await;
    assert!(!*consumer.connected().borrow());
    publish(&declaring, &missing, "2").await;
    let delivery = next(&mut consumer).await;
    assert_eq!(body(&delivery), "2");
    delivery.settle(Disposition::Ack).await;
    // Our own queues are made all the same.
    let own = Queue::control("celery@passive", &unique("tag"));
    drop(consume(&broker, &[&own], 0).await);
    broker.close().await;
    declaring.close().await;
}

/// Larger than the frames that a connection begins with, and almost as large as RabbitMQ takes.
#[tokio::test]
async fn large_headers_pass() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "headers");
    let queue = Queue::tasks(unique("headers"));
    let mut consumer = consume(&broker, &[&queue], 4).await;
    publish(&broker, &queue, "before").await;
    let held = next(&mut consumer).await;
    let large = |size: usize| {
        let header = ("large".to_owned(), json!("x".repeat(size)));
        let message = RawMessage {
            headers: [header].into_iter().collect(),
            ..RawMessage::default()
        };
        publication(&queue, message)
    };
    // Several at once: all of them are on the connection that the first one ends.
    let sizes = [20_000, 40_000, 130_000, 100];
    let letters = sizes.map(large);
    let sent = letters
        .iter()
        .map(|letter| broker.publish(letter, PATIENCE));
    futures_util::future::try_join_all(sent).await.unwrap();
    // What was held comes again. What was sent may come twice, too: whose confirmation was lost, is sent again.
    let mut left = HashSet::from([0, 20_000, 40_000, 130_000, 100]);
    while !left.is_empty() {
        let delivery = next(&mut consumer).await;
        let size = match body(&delivery) {
            "before" => 0,
            _ => delivery.message.headers["large"].as_str().unwrap().len(),
        };
        left.remove(&size);
        delivery.settle(Disposition::Ack).await;
    }
    assert!(held.is_void());
    broker.close().await;
}

#[rstest]
#[tokio::test]
async fn unstarted_deliveries_return_at_once(#[values(Kind::RabbitMq, Kind::Redis)] kind: Kind) {
    let Some(broker) = kind.open("back") else {
        return;
    };
    let broker = &*broker;
    let queue = Queue::tasks(unique("back"));
    for n in 0..6 {
        publish(broker, &queue, &n.to_string()).await;
    }
    let mut consumer = consume(broker, &[&queue], 6).await;
    let held = next(&mut consumer).await;
    consumer.cancel();
    while let Some(delivery) = timeout(PATIENCE, consumer.next()).await.unwrap() {
        drop(delivery);
    }
    // Another gets the rest while the first one is still held, and that can still be settled.
    let other = kind.open("back-other").unwrap();
    let other = &*other;
    let mut rest = consume(other, &[&queue], 0).await;
    for _ in 0..5 {
        next(&mut rest).await.settle(Disposition::Ack).await;
    }
    assert!(!held.is_void());
    held.settle(Disposition::Ack).await;
    broker.close().await;
    nothing(&mut rest).await;
    other.close().await;
}
