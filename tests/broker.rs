//! The broker against a real RabbitMQ.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod support;

use std::collections::HashSet;
use std::process::Command;
use std::time::Duration;

use celery_protocol::RawMessage;
use celery_worker::broker::amqp::{Amqp, AmqpOptions, AmqpTls, Reconnect};
use celery_worker::broker::{
    Broker, BrokerError, Consumer, Declaration, Delivery, Disposition, Publication, Queue,
    Subscription,
};
use serde_json::json;
use support::{amqp, service, unique};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

/// Long enough for a delivery that must not come.
const QUIET: Duration = Duration::from_millis(300);

fn subscription(queues: &[&Queue], prefetch: u16) -> Subscription {
    Subscription {
        purpose: "a test",
        queues: queues.iter().copied().cloned().collect(),
        prefetch,
        delayed: None,
        max_body_bytes: None,
        max_waiting_body_bytes: None,
    }
}

async fn consume(broker: &Amqp, queues: &[&Queue], prefetch: u16) -> Consumer {
    let consumer = broker.consume(subscription(queues, prefetch));
    let mut connected = consumer.connected();
    timeout(PATIENCE, connected.wait_for(|up| *up))
        .await
        .expect("served in time")
        .unwrap();
    consumer
}

async fn publish(broker: &Amqp, queue: &Queue, body: &str) {
    let message = RawMessage {
        body: body.into(),
        ..RawMessage::default()
    };
    let publication = publication(queue, message);
    broker.publish(&publication, PATIENCE).await.unwrap();
}

/// A message for a queue, which is declared.
fn publication(queue: &Queue, message: RawMessage) -> Publication {
    Publication {
        exchange: String::new(),
        routing_key: queue.name.clone(),
        message,
        declare: Some(Declaration::Queue(queue.clone())),
        mandatory: true,
    }
}

async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(PATIENCE, consumer.next())
        .await
        .expect("a delivery in time")
        .expect("a delivery")
}

async fn nothing(consumer: &mut Consumer) {
    let delivery = timeout(QUIET, consumer.next()).await;
    assert!(delivery.is_err(), "got {delivery:?}");
}

fn body(delivery: &Delivery) -> &str {
    std::str::from_utf8(&delivery.message.body).unwrap()
}

fn quorum(name: &str) -> Queue {
    let mut queue = Queue::tasks(name);
    queue
        .arguments
        .insert("x-queue-type".into(), json!("quorum"));
    queue
}

async fn ctl(words: &[&str]) -> String {
    let program = service("RABBITMQCTL").unwrap();
    let words: Vec<String> = words.iter().map(|word| (*word).into()).collect();
    tokio::task::spawn_blocking(move || {
        let done = Command::new(program).args(words).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    })
    .await
    .unwrap()
}

/// Closes the connections of one broker.
async fn close_connections(name: &str) {
    let listed = ctl(&[
        "list_connections",
        "-q",
        "--no-table-headers",
        "pid",
        "client_properties",
    ])
    .await;
    for line in listed.lines().filter(|line| line.contains(name)) {
        let (pid, _) = line.split_once('\t').unwrap();
        ctl(&["close_connection", pid, "a test"]).await;
    }
}

#[tokio::test]
async fn parked_deliveries_take_no_place() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "parking");
    for queue in [Queue::tasks(unique("park")), quorum(&unique("park"))] {
        for n in 0..8 {
            publish(&broker, &queue, &n.to_string()).await;
        }
        let mut consumer = consume(&broker, &[&queue], 2).await;
        let mut held = vec![next(&mut consumer).await, next(&mut consumer).await];
        nothing(&mut consumer).await;
        for _ in 0..3 {
            held.last().unwrap().park();
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
        held[0].unpark();
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

#[tokio::test]
async fn queues_come_and_go_under_a_running_consumer() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let name = unique("dynamic");
    let broker = amqp(&url, &name);
    let [first, second] = [Queue::tasks(unique("one")), Queue::tasks(unique("two"))];
    let mut consumer = consume(&broker, &[&first], 1).await;
    let handle = consumer.handle();
    handle.add(second.clone()).await;
    assert_eq!(handle.queues(), [first.clone(), second.clone()]);

    publish(&broker, &second, "a").await;
    let held = next(&mut consumer).await;
    assert_eq!(held.queue, second.name);
    publish(&broker, &second, "b").await;
    nothing(&mut consumer).await;
    // A larger window.
    handle.set_prefetch(2);
    let other = next(&mut consumer).await;
    assert_eq!(body(&other), "b");

    handle.cancel_queue(&second.name).await;
    publish(&broker, &second, "c").await;
    other.settle(Disposition::Ack).await;
    nothing(&mut consumer).await;
    held.settle(Disposition::Ack).await;
    publish(&broker, &first, "d").await;
    next(&mut consumer).await.settle(Disposition::Ack).await;

    // Both changes outlive the connection.
    let mut connected = consumer.connected();
    connected.borrow_and_update();
    close_connections(&name).await;
    handle.add(second.clone()).await;
    handle.cancel_queue(&first.name).await;
    let back = next(&mut consumer).await;
    assert_eq!((body(&back), &back.queue), ("c", &second.name));
    back.settle(Disposition::Ack).await;
    publish(&broker, &first, "e").await;
    nothing(&mut consumer).await;
    assert_eq!(handle.queues(), [second]);
    broker.close().await;
}

#[tokio::test]
async fn deleted_queues_are_declared_anew() {
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

/// A queue is deleted while the connection of its producer stays open.
#[tokio::test]
async fn a_publication_declares_what_was_deleted() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "declared-before");
    let queue = Queue::tasks(unique("declared"));
    publish(&broker, &queue, "first").await;
    ctl(&["delete_queue", &queue.name]).await;
    publish(&broker, &queue, "second").await;
    let depth = broker.survey(std::slice::from_ref(&queue.name)).await;
    assert_eq!(depth.unwrap()[0].messages, 1);
    // Also for the queue's own exchange, which the test's connection deletes.
    let through_exchange = Publication {
        exchange: queue.name.clone(),
        routing_key: queue.name.clone(),
        message: RawMessage::default(),
        declare: Some(Declaration::Queue(queue.clone())),
        mandatory: true,
    };
    broker.publish(&through_exchange, PATIENCE).await.unwrap();
    let eval = format!(
        "rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, <<\"{}\">>), false, <<\"test\">>).",
        queue.name
    );
    ctl(&["eval", &eval]).await;
    broker.publish(&through_exchange, PATIENCE).await.unwrap();
    let depth = broker.survey(std::slice::from_ref(&queue.name)).await;
    assert_eq!(depth.unwrap()[0].messages, 3);
    broker.close().await;
}

/// What one message closes a channel for is not another's failure.
#[tokio::test]
async fn a_missing_exchange_fails_its_own_message_only() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "foreign");
    let queue = Queue::tasks(unique("own"));
    let wrong = Publication {
        exchange: unique("nowhere"),
        routing_key: "x".into(),
        message: RawMessage::default(),
        declare: None,
        mandatory: false,
    };
    publish(&broker, &queue, "first").await;
    let good = async {
        for n in 0..50 {
            publish(&broker, &queue, &n.to_string()).await;
        }
    };
    let bad = async {
        for _ in 0..20 {
            let refused = broker.publish(&wrong, PATIENCE).await;
            assert!(
                matches!(refused, Err(BrokerError::Refused { .. })),
                "{refused:?}"
            );
        }
    };
    // One that is there shares the channel with those that are not.
    let topic = Publication {
        exchange: "amq.topic".into(),
        ..wrong.clone()
    };
    let known = async {
        for _ in 0..20 {
            broker.publish(&topic, PATIENCE).await.unwrap();
        }
    };
    tokio::join!(good, bad, known);
    let mut consumer = consume(&broker, &[&queue], 0).await;
    for expected in ["first", "0", "1"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(body(&delivery), expected);
        delivery.settle(Disposition::Ack).await;
    }
    broker.close().await;
}

/// Publishers do not wait for each other's confirms.
#[tokio::test]
async fn many_publications_are_under_way_at_once() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "pipeline");
    let queue = quorum(&unique("pipeline"));
    publish(&broker, &queue, "0").await;
    let began = std::time::Instant::now();
    for _ in 0..50 {
        publish(&broker, &queue, "x").await;
    }
    let one_by_one = began.elapsed();
    let began = std::time::Instant::now();
    futures_util::future::join_all((0..50).map(|_| publish(&broker, &queue, "x"))).await;
    let together = began.elapsed();
    assert!(together < one_by_one, "{together:?} against {one_by_one:?}");
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

/// A queue that exists otherwise is used as it is.
#[tokio::test]
async fn other_arguments_are_lived_with() {
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
async fn without_declaring_a_missing_queue_is_waited_for() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let options = AmqpOptions {
        no_declare: true,
        ..AmqpOptions::new(&url, "passive")
    };
    let broker = Amqp::new(&options).unwrap();
    let [there, missing] = [
        Queue::tasks(unique("there")),
        Queue::tasks(unique("missing")),
    ];
    let declaring = amqp(&url, "declaring");
    publish(&declaring, &there, "1").await;

    let publication = Publication {
        exchange: String::new(),
        routing_key: missing.name.clone(),
        message: RawMessage::default(),
        declare: Some(Declaration::Queue(missing.clone())),
        mandatory: true,
    };
    let refused = broker.publish(&publication, PATIENCE).await.unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains(&missing.name) && text.contains("celery.no_declare"),
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

#[tokio::test]
async fn what_was_not_begun_goes_back_at_once() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let broker = amqp(&url, "back");
    let queue = Queue::tasks(unique("back"));
    for n in 0..6 {
        publish(&broker, &queue, &n.to_string()).await;
    }
    let mut consumer = consume(&broker, &[&queue], 6).await;
    let held = next(&mut consumer).await;
    consumer.cancel();
    while let Some(delivery) = timeout(PATIENCE, consumer.next()).await.unwrap() {
        drop(delivery);
    }
    // Another gets the rest while the first one is still held, and that can still be settled.
    let other = amqp(&url, "back-other");
    let mut rest = consume(&other, &[&queue], 0).await;
    for _ in 0..5 {
        next(&mut rest).await.settle(Disposition::Ack).await;
    }
    assert!(!held.is_void());
    held.settle(Disposition::Ack).await;
    broker.close().await;
    nothing(&mut rest).await;
    other.close().await;
}

#[tokio::test]
async fn a_broker_is_given_up_where_the_settings_say_so() {
    // Nobody listens there.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let reconnect = Reconnect::default();
    for (reconnect, setting) in [
        (
            Reconnect {
                on_startup: false,
                ..reconnect
            },
            "celery.broker_connection_retry_on_startup",
        ),
        (
            Reconnect {
                max_retries: 1,
                ..reconnect
            },
            "celery.broker_connection_max_retries",
        ),
    ] {
        let options = AmqpOptions {
            reconnect,
            ..AmqpOptions::new(format!("amqp://127.0.0.1:{port}"), "given-up")
        };
        let broker = Amqp::new(&options).unwrap();
        let mut consumer = broker.consume(subscription(&[&Queue::tasks("q")], 1));
        assert!(timeout(PATIENCE, consumer.next()).await.unwrap().is_none());
        let failure = consumer.failure().unwrap();
        assert!(failure.to_string().contains(setting), "{failure}");
    }
}

/// A password that changes under a running consumer: said, and tried again until it is right.
#[tokio::test]
async fn a_changed_password_is_waited_for() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let user = unique("user");
    ctl(&["add_user", &user, "first"]).await;
    ctl(&["set_permissions", &user, ".*", ".*", ".*"]).await;
    let url = url.replace("guest:guest", &format!("{user}:first"));
    let broker = amqp(&url, &user);
    let queue = Queue::tasks(unique("password"));
    let mut consumer = consume(&broker, &[&queue], 1).await;
    ctl(&["change_password", &user, "second"]).await;
    close_connections(&user).await;
    let mut connected = consumer.connected();
    timeout(PATIENCE, connected.wait_for(|up| !up))
        .await
        .unwrap()
        .unwrap();

    let other = amqp(&url, &format!("{user}-other"));
    let publication = Publication {
        exchange: String::new(),
        routing_key: queue.name.clone(),
        message: RawMessage::default(),
        declare: None,
        mandatory: true,
    };
    let refused = other.publish(&publication, PATIENCE).await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("check user, password"), "{text}");
    assert!(
        !format!("{refused:?}{text}").contains("first"),
        "{refused:?}"
    );

    ctl(&["change_password", &user, "first"]).await;
    publish(&other, &queue, "x").await;
    next(&mut consumer).await.settle(Disposition::Ack).await;
    broker.close().await;
    other.close().await;
    ctl(&["delete_user", &user]).await;
}

#[tokio::test]
async fn tls_with_and_without_a_certificate_of_our_own() {
    let (Some(port), Some(files)) = (service("TEST_AMQPS_PORT"), service("TEST_TLS")) else {
        return;
    };
    let file = |name: &str| format!("{files}/{name}");
    let trusting = AmqpTls {
        ca_file: file("ca.pem"),
        ..AmqpTls::default()
    };
    let client = AmqpTls {
        cert_file: file("client.pem"),
        key_file: file("client.key"),
        ..trusting.clone()
    };
    // The user that the broker takes from the certificate.
    let users = ctl(&["list_users", "-q"]).await;
    if !users.contains("tls-client") {
        ctl(&["add_user", "tls-client", &unique("unknown")]).await;
        ctl(&["set_permissions", "tls-client", ".*", ".*", ".*"]).await;
    }
    let guest = format!("amqps://guest:guest@localhost:{port}//");
    let external = format!("amqps://localhost:{port}//?auth_mechanism=external");
    let wrong_host = format!("amqps://guest:guest@127.0.0.1:{port}//");
    for (url, tls, works) in [
        (&guest, &trusting, true),
        (&guest, &client, true),
        (&external, &client, true),
        (&external, &trusting, false),
        (&guest, &AmqpTls::default(), false),
        (&wrong_host, &trusting, false),
    ] {
        let options = AmqpOptions {
            tls: tls.clone(),
            ..AmqpOptions::new(url, "tls")
        };
        let broker = Amqp::new(&options).unwrap();
        let queue = Queue::tasks(unique("tls"));
        let publication = Publication {
            exchange: String::new(),
            routing_key: queue.name.clone(),
            message: RawMessage::default(),
            declare: Some(Declaration::Queue(queue.clone())),
            mandatory: true,
        };
        let within = if works {
            PATIENCE
        } else {
            Duration::from_secs(2)
        };
        let published = broker.publish(&publication, within).await;
        assert_eq!(published.is_ok(), works, "{url} {tls:?}: {published:?}");
        if works {
            let mut consumer = consume(&broker, &[&queue], 1).await;
            next(&mut consumer).await.settle(Disposition::Ack).await;
        }
        broker.close().await;
    }
    let missing = AmqpOptions {
        tls: AmqpTls {
            ca_file: file("none.pem"),
            ..AmqpTls::default()
        },
        ..AmqpOptions::new(&guest, "tls")
    };
    let Err(error) = Amqp::new(&missing) else {
        panic!("a missing file is told");
    };
    assert!(
        error.to_string().contains("celery.broker_ssl_ca_file"),
        "{error}"
    );
}
