//! A broker that blocks publishers or closes connections.

use super::*;

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

/// A broker with a memory alarm reads nothing from publishers. Each publication during the alarm arrives
/// once, not once per try.
// On several threads: the worker continues while the test waits for `rabbitmqctl`.
#[tokio::test(flavor = "multi_thread")]
async fn blocked_broker_receives_every_message_once() {
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
    let publication = |queue: &str| {
        let mut publication = Publication::new("", queue, message("echo"));
        publication.declare = Some(Declaration::Queue(Queue::tasks(queue)));
        publication
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

/// The broker closes the connection while a task runs: the task goes on, the message that comes
/// back joins it, and it is acknowledged.
// On several threads: the worker continues while the test waits for `rabbitmqctl`.
#[tokio::test(flavor = "multi_thread")]
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
