//! The brokers against a real RabbitMQ and a real Redis.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod connecting;
mod consuming;
mod publishing;
mod redis_layout;
#[path = "../support/mod.rs"]
mod support;

use std::collections::HashSet;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use celery_protocol::RawMessage;
use celery_worker::broker::amqp::{Amqp, AmqpOptions, AmqpTls, Reconnect};
use celery_worker::broker::redis::{RedisBroker, RedisBrokerOptions};
use celery_worker::broker::{
    Broker, BrokerError, Consumer, Declaration, Delivery, Disposition, Publication, Queue,
    Subscription,
};
use serde_json::json;
use support::{amqp, service, unique};
use tokio::time::timeout;

/// A kind of broker, for the tests of their common behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    RabbitMq,
    Redis,
}

impl Kind {
    /// Creates a client of the test broker; none if there is no such server.
    fn open(self, name: &str) -> Option<Arc<dyn Broker>> {
        Some(match self {
            Self::RabbitMq => Arc::new(amqp(&service("TEST_AMQP_URL")?, name)),
            Self::Redis => Arc::new(redis_broker(&service("TEST_REDIS_URL")?, name)),
        })
    }

    /// Ends the connections of one client.
    async fn close_connections(self, name: &str) {
        match self {
            Self::RabbitMq => close_connections(name).await,
            Self::Redis => kill_clients(name).await,
        }
    }
}

fn redis_broker(url: &str, name: &str) -> RedisBroker {
    RedisBroker::new(&RedisBrokerOptions::new(url, name)).unwrap()
}

async fn redis_connection() -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(service("TEST_REDIS_URL").unwrap()).unwrap();
    client.get_multiplexed_async_connection().await.unwrap()
}

/// Ends the connections of one client of Redis.
async fn kill_clients(name: &str) {
    let mut connection = redis_connection().await;
    let list: String = redis::cmd("CLIENT")
        .arg("LIST")
        .query_async(&mut connection)
        .await
        .unwrap();
    let field = |line: &str, key: &str| {
        let mut fields = line.split(' ');
        fields.find_map(|field| field.strip_prefix(key).map(str::to_owned))
    };
    for line in list.lines() {
        if field(line, "name=").as_deref() == Some(name) {
            let id = field(line, "id=").unwrap();
            let mut kill = redis::cmd("CLIENT");
            kill.arg("KILL").arg("ID").arg(id);
            let _: i64 = kill.query_async(&mut connection).await.unwrap();
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

/// Long enough for a delivery that must not come.
const QUIET: Duration = Duration::from_millis(300);

fn subscription(queues: &[&Queue], prefetch: u16) -> Subscription {
    let queues = queues.iter().copied().cloned().collect();
    let mut subscription = Subscription::new("a test", queues);
    subscription.prefetch = prefetch;
    subscription
}

async fn consume(broker: &dyn Broker, queues: &[&Queue], prefetch: u16) -> Consumer {
    let consumer = broker.consume(subscription(queues, prefetch));
    let mut connected = consumer.connected();
    timeout(PATIENCE, connected.wait_for(|up| *up))
        .await
        .expect("served in time")
        .unwrap();
    consumer
}

async fn publish(broker: &dyn Broker, queue: &Queue, body: &str) {
    let message = RawMessage {
        body: body.into(),
        ..RawMessage::default()
    };
    let publication = publication(queue, message);
    broker.publish(&publication, PATIENCE).await.unwrap();
}

/// A message for a queue, which is declared.
fn publication(queue: &Queue, message: RawMessage) -> Publication {
    let mut publication = Publication::new("", &*queue.name, message);
    publication.declare = Some(Declaration::Queue(queue.clone()));
    publication.mandatory = true;
    publication
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
