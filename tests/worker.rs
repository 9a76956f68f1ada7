//! The worker against a real RabbitMQ and Redis, with tasks that have nothing to do with transfers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod support;

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
use celery_worker::worker::{Config, DefaultOptions, Shutdown, Worker};
use serde_json::{Value, json};
use support::tasks::{Do, Params, Probe};
use support::{amqp, service, unique, until};
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
        let publication = Publication {
            exchange: String::new(),
            routing_key: self.queue.clone(),
            message,
            declare: Some(Declaration::Queue(Queue::tasks(&self.queue))),
            mandatory: true,
        };
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
    let config = Config {
        concurrency,
        prefetch_multiplier: 1,
        accept: Accept::json(10_000),
        tasks: DefaultOptions {
            track_started: true,
            ..DefaultOptions::default()
        },
        task_events: true,
        ..Config::new("celery@tests", vec![queue.into()])
    };
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
        let consumer = broker.consume(Subscription {
            purpose: "a test",
            queues: vec![queue],
            prefetch: 1,
            delayed: None,
            max_body_bytes: None,
            max_waiting_body_bytes: None,
        });
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

#[tokio::test]
async fn results_by_rpc_and_redis() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    for backend in ["rpc://", &redis] {
        let mut bench = Bench::new(&url, backend, 2).await;
        let meta = bench.call("echo", json!({"a": [1, null]})).await;
        assert_eq!(meta["status"], "SUCCESS");
        assert_eq!(meta["result"], json!({"a": [1, null]}));

        let meta = bench.call("fail", Value::Null).await;
        assert_eq!(meta["status"], "FAILURE");
        assert_eq!(
            meta["result"],
            json!({"exc_type": "ValueError", "exc_message": ["as asked"], "exc_module": "builtins"})
        );
        assert!(
            meta["traceback"]
                .as_str()
                .unwrap()
                .starts_with("Traceback (most recent call last):")
        );
        bench.stop().await;
    }
}

#[tokio::test]
async fn a_panic_is_a_failure_and_frees_its_slot() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let mut bench = Bench::new(&url, "rpc://", 1).await;
    for _ in 0..3 {
        let meta = bench.call("panic", Value::Null).await;
        assert_eq!(meta["status"], "FAILURE");
        assert_eq!(
            meta["result"]["exc_message"],
            json!(["task panicked: as asked"])
        );
    }
    assert_eq!(bench.probe.failures_heard.load(Ordering::SeqCst), 3);
    assert_eq!(bench.call("echo", json!(1)).await["result"], json!(1));
    bench.stop().await;
}

#[tokio::test]
async fn what_is_no_task_meets_the_fate_that_python_gives_it() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    let queue = unique("tests-dead");
    let broker: Arc<dyn Broker> = Arc::new(amqp(&url, "tests"));
    let dead = with_dead_letters(&*broker, &queue).await;
    let (probe, shutdown) = (Arc::new(Probe::default()), Shutdown::default());
    let worker = worker(&url, &redis, &queue, 2, &probe, &shutdown).await;

    let good = br#"[["echo"], {}, null]"#;
    let changed = |change: &dyn Fn(&mut RawMessage)| {
        let mut message = task_message("x", good);
        change(&mut message);
        message
    };
    let acked = [
        task_message("not-json", b"{"),
        task_message("not-utf8", b"[\"\xff\"]"),
    ];
    let rejected = [
        changed(&|m| m.properties.content_type = Some("application/x-python-serialize".into())),
        changed(&|m| drop(m.headers.remove("task"))),
        changed(&|m| drop(m.headers.remove("id"))),
        changed(&|m| drop(m.headers.insert("eta".into(), json!(1.5)))),
        changed(&|m| m.body = vec![b' '; 20_000]),
        task_message("malformed", b"[[], {}]"),
        changed(&|m| {
            m.headers.insert("task".into(), json!("no.such.task"));
            m.headers.insert("id".into(), json!("unknown"));
            m.body = b"{".into();
        }),
    ];
    for message in acked.iter().chain(&rejected) {
        let publication = Publication {
            exchange: String::new(),
            routing_key: queue.clone(),
            message: message.clone(),
            declare: None,
            mandatory: true,
        };
        broker.publish(&publication, PATIENCE).await.unwrap();
    }

    let mut letters = broker.consume(Subscription {
        purpose: "a test",
        queues: vec![Queue::tasks(&dead)],
        prefetch: 0,
        delayed: None,
        max_body_bytes: None,
        max_waiting_body_bytes: None,
    });
    for _ in 0..rejected.len() {
        let letter = tokio::time::timeout(PATIENCE, letters.next())
            .await
            .unwrap()
            .unwrap();
        assert!(
            acked
                .iter()
                .all(|m| m.headers.get("id") != letter.message.headers.get("id"))
        );
        letter.settle(Disposition::Ack).await;
    }
    let reader = ResultReader::open(&results::ResultOptions::new(redis), &broker, PATIENCE)
        .await
        .unwrap();
    let meta = reader.wait("unknown", PATIENCE).await.unwrap();
    assert_eq!(
        meta["result"],
        json!({"exc_type": "NotRegistered", "exc_message": ["no.such.task"], "exc_module": "celery.exceptions"})
    );
    let meta = reader.wait("malformed", PATIENCE).await.unwrap();
    assert_eq!(meta["result"]["exc_type"], "InvalidTaskError");
    assert_eq!(probe.started(), 0);

    letters.cancel();
    shutdown.warm();
    worker.await.unwrap();
    broker.close().await;
}

#[tokio::test]
async fn wrong_arguments_are_a_type_error() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    let mut bench = Bench::new(&url, &redis, 1).await;
    for (body, text) in [
        (
            "[[], {}, null]",
            "do() missing 1 required positional argument: 'what'",
        ),
        (
            "[[1, 2, 3], {}, null]",
            "do() takes from 1 to 2 positional arguments but 3 were given",
        ),
        (
            "[[\"echo\"], {\"x\": 1}, null]",
            "do() got an unexpected keyword argument 'x'",
        ),
        (
            "[5, {}, null]",
            "do() argument after * must be an iterable, not int",
        ),
    ] {
        let id = unique("id");
        bench.publish(task_message(&id, body.as_bytes())).await;
        let meta = bench.result(&id).await;
        assert_eq!(meta["result"]["exc_type"], "TypeError");
        assert_eq!(meta["result"]["exc_message"], json!([text]));
    }
    bench.stop().await;
}

#[tokio::test]
async fn no_more_tasks_than_slots_run_at_once() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let mut bench = Bench::new(&url, "rpc://", 2).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(bench.send("wait", Value::Null).await);
    }
    until("two tasks run", async || bench.probe.started() == 2).await;
    for done in 1..=5 {
        bench.probe.gate.notify_one();
        until("one more is done", async || bench.probe.finished() == done).await;
        assert!(bench.probe.started() <= done + 2);
    }
    for id in ids {
        assert_eq!(bench.result(&id).await["result"], "opened");
    }
    bench.stop().await;
}

#[tokio::test]
async fn the_same_id_twice_runs_once_at_a_time() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    // Two places, and a prefetch limit of two: messages that join must not fill it.
    let mut bench = Bench::new(&url, &redis, 2).await;
    let id = unique("id");
    for _ in 0..3 {
        bench
            .publish(task_message(&id, br#"[["wait"], {}, null]"#))
            .await;
    }
    until("it runs", async || bench.probe.started() == 1).await;
    // A later message of the same queue has been received, and so have the copies before it.
    bench.call("echo", Value::Null).await;
    bench.probe.gate.notify_one();
    assert_eq!(bench.result(&id).await["status"], "SUCCESS");
    assert_eq!(bench.probe.started(), 2, "one wait and one echo");
    bench.stop().await;
}

/// The sender chooses a task id: other arguments or another caller make another task.
#[tokio::test]
async fn different_tasks_with_one_id_all_run_and_answer() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let bench = Bench::new(&url, "rpc://", 3).await;
    let callers = [unique("reply"), unique("reply")];
    let mut replies = bench.broker.consume(Subscription {
        purpose: "a test",
        queues: callers.iter().map(Queue::tasks).collect(),
        prefetch: 0,
        delayed: None,
        max_body_bytes: None,
        max_waiting_body_bytes: None,
    });
    replies.connected().wait_for(|up| *up).await.unwrap();
    let id = unique("id");
    let calls = [
        (&callers[0], "waits", r#"[["wait"], {}, null]"#),
        (&callers[0], "echoes", r#"[["echo", 1], {}, null]"#),
        (&callers[1], "waits too", r#"[["wait"], {}, null]"#),
    ];
    for (reply_to, correlation_id, body) in calls {
        let mut message = task_message(&id, body.as_bytes());
        message.properties.reply_to = Some(reply_to.clone());
        message.properties.correlation_id = Some(correlation_id.into());
        bench.publish(message).await;
    }
    until("all run", async || bench.probe.started() == 3).await;
    bench.probe.gate.notify_one();
    bench.probe.gate.notify_one();

    let mut answered = Vec::new();
    while answered.len() < calls.len() {
        let reply = tokio::time::timeout(PATIENCE, replies.next()).await;
        let reply = reply.expect("in time").expect("a reply");
        let meta: Value = serde_json::from_slice(&reply.message.body).unwrap();
        // STARTED is a reply, too.
        if meta["status"] == "SUCCESS" {
            let to = reply.message.properties.correlation_id.clone().unwrap();
            answered.push((reply.queue.clone(), to, meta["result"].clone()));
        }
        reply.settle(Disposition::Ack).await;
    }
    answered.sort_by(|a, b| a.1.cmp(&b.1));
    let [first, second] = callers;
    let expected = [
        (first.clone(), "echoes".to_owned(), json!(1)),
        (first, "waits".to_owned(), json!("opened")),
        (second, "waits too".to_owned(), json!("opened")),
    ];
    assert_eq!(answered, expected);
    bench.stop().await;
}

/// A message with an `eta` is delivered three times at a prefetch limit of one, and then once more each, as
/// after a lost connection.
#[tokio::test]
async fn deliveries_that_join_a_waiting_task_leave_room_for_others() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    let Some(ctl) = service("RABBITMQCTL") else {
        return;
    };
    let mut bench = Bench::new(&url, &redis, 1).await;
    let mut later = task_message(&unique("id"), br#"[["echo"], {}, null]"#);
    let eta = chrono::Utc::now() + chrono::Duration::hours(1);
    later.headers.insert("eta".into(), json!(eta.to_rfc3339()));
    for _ in 0..3 {
        bench.publish(later.clone()).await;
    }
    assert_eq!(bench.call("echo", json!(1)).await["result"], json!(1));

    close_consumer(&ctl, &bench.queue).await;
    assert_eq!(bench.call("echo", json!(2)).await["result"], json!(2));
    until("all are delivered again", async || {
        let held = rabbitmqctl(&ctl, &["list_queues", "name", "messages_unacknowledged"]);
        let row = [bench.queue.as_str(), "3"];
        held.lines().any(|line| line.split('\t').eq(row))
    })
    .await;
    assert_eq!(bench.call("echo", json!(3)).await["result"], json!(3));
    bench.stop().await;
}

#[tokio::test]
async fn warm_shutdown_finishes_what_runs_and_gives_back_what_waits() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let mut bench = Bench::new(&url, "rpc://", 1).await;
    let running = bench.send("wait", Value::Null).await;
    until("it runs", async || bench.probe.started() == 1).await;
    let waiting = bench.send("echo", json!("later")).await;

    bench.shutdown.warm();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(
        !bench.worker.is_finished(),
        "a running task must be waited for"
    );
    bench.probe.gate.notify_one();
    (&mut bench.worker).await.unwrap();
    assert_eq!(bench.result(&running).await["status"], "SUCCESS");
    assert_eq!(bench.probe.started(), 1);

    bench.shutdown = Shutdown::default();
    bench.worker = worker(
        &url,
        "rpc://",
        &bench.queue,
        1,
        &bench.probe,
        &bench.shutdown,
    )
    .await;
    assert_eq!(bench.result(&waiting).await["result"], "later");
    bench.stop().await;
}

#[tokio::test]
async fn cold_shutdown_stops_tasks_and_gives_their_messages_back() {
    let Some(url) = service("TEST_AMQP_URL") else {
        return;
    };
    let mut bench = Bench::new(&url, "rpc://", 1).await;
    let id = bench.send("wait", Value::Null).await;
    until("it runs", async || bench.probe.started() == 1).await;
    bench.shutdown.cold();
    (&mut bench.worker).await.unwrap();
    assert_eq!(bench.probe.finished(), 0);

    bench.shutdown = Shutdown::default();
    bench.worker = worker(
        &url,
        "rpc://",
        &bench.queue,
        1,
        &bench.probe,
        &bench.shutdown,
    )
    .await;
    until("it runs again", async || bench.probe.started() == 2).await;
    bench.probe.gate.notify_one();
    assert_eq!(bench.result(&id).await["status"], "SUCCESS");
    bench.stop().await;
}

/// A broker's memory alarm, until this is dropped.
struct Alarm<'a>(&'a str);

impl<'a> Alarm<'a> {
    fn raise(ctl: &'a str) -> Self {
        rabbitmqctl(ctl, &["set_vm_memory_high_watermark", "0.00001"]);
        Self(ctl)
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        rabbitmqctl(self.0, &["set_vm_memory_high_watermark", "0.4"]);
    }
}

/// Messages that wait in a queue.
async fn depth(broker: &dyn Broker, queue: &str) -> u32 {
    let found = broker.survey(&[queue.to_owned()]).await.unwrap();
    found.first().map_or(0, |found| found.messages)
}

/// A broker with a memory alarm reads nothing from publishers. Each publication during the alarm arrives
/// once, not once per try.
#[tokio::test]
async fn a_broker_that_blocks_publishers_gets_every_message_once() {
    // All connections to a broker are blocked, and other tests use the first one.
    let (Some(url), Some(redis), Some(ctl)) = (
        service("SECOND_TEST_AMQP_URL"),
        service("TEST_REDIS_URL"),
        service("SECOND_RABBITMQCTL"),
    ) else {
        return;
    };
    let mut bench = Bench::new(&url, &redis, 1).await;
    let [callbacks, given_up] = ["callbacks", "given-up"].map(unique);
    let callback = json!({"task": "tests.sink", "args": [], "kwargs": {}, "options": {"queue": callbacks},
                          "subtype": null, "immutable": true, "chord_size": null});
    let message = |what: &str| {
        let embed =
            json!({"callbacks": [callback], "errbacks": null, "chain": null, "chord": null});
        let body = json!([[what], {}, embed]).to_string();
        task_message(&unique("id"), body.as_bytes())
    };
    let publication = |queue: &str| Publication {
        exchange: String::new(),
        routing_key: queue.into(),
        message: message("echo"),
        declare: Some(Declaration::Queue(Queue::tasks(queue))),
        mandatory: false,
    };
    let withdrawn = publication(&given_up);
    // One of each before, so that both queues are declared.
    let first = bench.broker.publish(&withdrawn, PATIENCE).await;
    first.unwrap();
    let before = message("echo");
    bench.publish(before.clone()).await;
    let id = before.headers["id"].as_str().unwrap();
    assert_eq!(bench.result(id).await["status"], "SUCCESS");
    let waits = message("wait");
    bench.publish(waits.clone()).await;
    until("it runs", async || bench.probe.started() == 2).await;

    let alarm = Alarm::raise(&ctl);
    let noise = unique("noise");
    let moment = Duration::from_millis(200);
    until("the producer is blocked", async || {
        let _ = bench.broker.publish(&publication(&noise), moment).await;
        bench.broker.blocked().is_some()
    })
    .await;
    until("the worker is blocked", async || {
        let connections = rabbitmqctl(&ctl, &["list_connections", "client_properties", "state"]);
        let name = format!("worker-{} publisher", bench.queue);
        let mut rows = connections.lines();
        rows.any(|row| row.contains(&name) && row.ends_with("\tblocked"))
    })
    .await;

    // Longer than every former time limit for publishing.
    let long = tokio::time::Instant::now() + Duration::from_secs(11);
    bench.probe.gate.notify_one();
    for _ in 0..3 {
        let answer = bench.broker.publish(&withdrawn, moment).await;
        assert!(
            matches!(answer, Err(BrokerError::Blocked { .. })),
            "{answer:?}"
        );
    }
    let survey = bench.broker.survey(&[]).await;
    assert!(
        matches!(survey, Err(BrokerError::Blocked { .. })),
        "{survey:?}"
    );
    tokio::time::sleep_until(long).await;
    assert_eq!(bench.probe.finished(), 2);
    drop(alarm);

    let id = waits.headers["id"].as_str().unwrap();
    assert_eq!(bench.result(id).await["status"], "SUCCESS");
    bench.shutdown.warm();
    (&mut bench.worker).await.unwrap();
    let last = bench.broker.publish(&withdrawn, PATIENCE).await;
    last.unwrap();
    // All other publications arrive before it; together with the first ones there are two.
    assert_eq!(depth(&*bench.broker, &given_up).await, 2);
    assert_eq!(depth(&*bench.broker, &callbacks).await, 2);
    bench.broker.close().await;
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

/// The broker closes the connection while a task runs: the task goes on, the message that comes
/// back joins it, and it is acknowledged.
#[tokio::test]
async fn a_lost_connection_does_not_run_a_task_twice() {
    let (Some(url), Some(redis)) = (service("TEST_AMQP_URL"), service("TEST_REDIS_URL")) else {
        return;
    };
    let Some(ctl) = service("RABBITMQCTL") else {
        return;
    };
    let mut bench = Bench::new(&url, &redis, 1).await;
    let id = bench.send("wait", Value::Null).await;
    until("it runs", async || bench.probe.started() == 1).await;

    close_consumer(&ctl, &bench.queue).await;
    until("the worker consumes again", async || {
        rabbitmqctl(
            &ctl,
            &[
                "list_queues",
                "name",
                "messages_unacknowledged",
                "consumers",
            ],
        )
        .lines()
        .any(|line| line.split('\t').eq([bench.queue.as_str(), "1", "1"]))
    })
    .await;
    bench.probe.gate.notify_one();
    assert_eq!(bench.result(&id).await["status"], "SUCCESS");
    assert_eq!(bench.call("echo", json!(1)).await["result"], json!(1));
    assert_eq!(bench.probe.started(), 2, "one wait and one echo");
    until("the queue is empty", async || {
        rabbitmqctl(&ctl, &["list_queues", "name", "messages"])
            .lines()
            .any(|line| line.split('\t').eq([bench.queue.as_str(), "0"]))
    })
    .await;
    bench.stop().await;
}
