//! The worker against a real RabbitMQ and Redis, with tasks that have nothing to do with transfers.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod admission;
mod outages;
mod outcomes;
mod shutdown;
#[path = "../support/mod.rs"]
mod support;
mod tasks;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use celery::Celery;
use celery::task::Signature;
use celery_protocol::content::Accept;
use celery_protocol::{Properties, RawMessage};
use celery_worker::broker::{
    Broker, BrokerError, Declaration, Disposition, NoPropagation, Publication, Queue, Subscription,
};
use celery_worker::celery_crate::app::{Producing, build};
use celery_worker::results::{self, ResultReader};
use celery_worker::task::Registry;
use celery_worker::worker::{Config, Shutdown, Worker};
use serde_json::{Value, json};
use support::{amqp, service, unique, until};
use tasks::{Do, Params, Probe};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(30);

/// A worker on a queue of its own, and a producer that waits for results.
struct Bench {
    queue: String,
    probe: Arc<Probe>,
    shutdown: Shutdown,
    worker: JoinHandle<()>,
    broker: Arc<dyn Broker>,
    reader: ResultReader,
    producer: Celery,
}

impl Bench {
    async fn new(amqp_url: &str, backend: &str, concurrency: usize) -> Self {
        let queue = unique("tests");
        let broker: Arc<dyn Broker> = Arc::new(amqp(amqp_url, "producer"));
        let reader = ResultReader::open(&results::ResultOptions::new(backend), &broker, PATIENCE)
            .await
            .unwrap();
        let producer = build(
            broker.clone(),
            Producing {
                hostname: "gen@tests".into(),
                default_queue: queue.clone(),
                names: Default::default(),
                queues: Default::default(),
                reply_to: reader.reply_to().map(str::to_owned),
                within: PATIENCE,
                propagation: Arc::new(NoPropagation),
            },
        )
        .await
        .unwrap();
        let probe = Arc::new(Probe::default());
        let shutdown = Shutdown::default();
        let worker = worker(amqp_url, backend, &queue, concurrency, &probe, &shutdown).await;
        Self {
            queue,
            probe,
            shutdown,
            worker,
            broker,
            reader,
            producer,
        }
    }

    async fn send(&self, what: &str, value: Value) -> String {
        let signature = Signature::<Do>::new(Params {
            what: what.into(),
            value,
        });
        self.producer.send_task(signature).await.unwrap().task_id
    }

    async fn publish(&self, message: RawMessage) {
        let mut publication = Publication::new("", &*self.queue, message);
        publication.declare = Some(Declaration::Queue(Queue::tasks(&self.queue)));
        publication.mandatory = true;
        self.broker.publish(&publication, PATIENCE).await.unwrap();
    }

    async fn result(&mut self, id: &str) -> Value {
        self.reader.wait(id, PATIENCE).await.unwrap()
    }

    async fn call(&mut self, what: &str, value: Value) -> Value {
        let id = self.send(what, value).await;
        self.result(&id).await
    }

    async fn stop(self) {
        self.shutdown.warm();
        self.worker.await.unwrap();
        self.broker.close().await;
    }
}

async fn worker(
    amqp_url: &str,
    backend: &str,
    queue: &str,
    concurrency: usize,
    probe: &Arc<Probe>,
    shutdown: &Shutdown,
) -> JoinHandle<()> {
    let broker: Arc<dyn Broker> = Arc::new(amqp(amqp_url, &format!("worker-{queue}")));
    let producing = Producing {
        hostname: "celery@tests".into(),
        default_queue: queue.into(),
        names: Default::default(),
        queues: Default::default(),
        reply_to: None,
        within: PATIENCE,
        propagation: Arc::new(NoPropagation),
    };
    let app = Arc::new(build(broker.clone(), producing).await.unwrap());
    let mut registry = Registry::default();
    registry
        .register_celery(&app, Do::registration(probe))
        .await
        .unwrap();
    let results = results::open(&results::ResultOptions::new(backend), broker.clone()).unwrap();
    let mut config = Config::new("celery@tests", vec![queue.into()]);
    config.concurrency = concurrency;
    config.prefetch_multiplier = 1;
    config.accept = Accept::json(10_000);
    config.tasks.track_started = true;
    config.task_events = true;
    let worker = Worker::new(registry, broker, results, config, shutdown.clone());
    tokio::spawn(async move { worker.run().await.unwrap() })
}

/// A queue whose rejects end in a queue of the same name with `.dead`.
async fn with_dead_letters(broker: &dyn Broker, queue: &str) -> String {
    let dead = format!("{queue}.dead");
    let mut letters = Queue::tasks(queue);
    letters
        .arguments
        .insert("x-dead-letter-exchange".into(), json!(""));
    letters
        .arguments
        .insert("x-dead-letter-routing-key".into(), json!(dead));
    for queue in [Queue::tasks(&dead), letters] {
        let mut subscription = Subscription::new("a test", vec![queue]);
        subscription.prefetch = 1;
        let consumer = broker.consume(subscription);
        let mut connected = consumer.connected();
        connected.wait_for(|up| *up).await.unwrap();
        consumer.cancel();
    }
    dead
}

fn task_message(id: &str, body: &[u8]) -> RawMessage {
    let headers = json!({"task": "tests.do", "id": id});
    RawMessage {
        headers: serde_json::from_value(headers).unwrap(),
        properties: Properties {
            content_type: Some("application/json".into()),
            ..Properties::default()
        },
        body: body.into(),
    }
}

/// Messages that wait in a queue.
async fn depth(broker: &dyn Broker, queue: &str) -> u32 {
    let found = broker.survey(&[queue.to_owned()]).await.unwrap();
    found.first().map_or(0, |found| found.messages)
}

fn rabbitmqctl(ctl: &str, arguments: &[&str]) -> String {
    let output = Command::new(ctl).arg("-q").args(arguments).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

/// Closes the connection that a bench's worker consumes on, as a broker does.
async fn close_consumer(ctl: &str, queue: &str) {
    let name = format!("worker-{queue} consumer");
    let mut pid = String::new();
    // The broker lists a connection a moment after it has accepted it.
    until("the connection is listed", async || {
        let connections = rabbitmqctl(ctl, &["list_connections", "pid", "client_properties"]);
        let mut rows = connections.lines().filter_map(|line| line.split_once('\t'));
        pid = rows
            .find(|row| row.1.contains(&name))
            .map(|row| row.0.to_owned())
            .unwrap_or_default();
        !pid.is_empty()
    })
    .await;
    rabbitmqctl(ctl, &["close_connection", &pid, "test"]);
}
