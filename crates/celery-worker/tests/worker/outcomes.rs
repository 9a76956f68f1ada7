//! Results of tasks, and messages that are not tasks.

use super::*;

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
async fn messages_without_a_task_are_settled_as_in_python() {
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
        let mut publication = Publication::new("", &*queue, message.clone());
        publication.mandatory = true;
        broker.publish(&publication, PATIENCE).await.unwrap();
    }

    let mut letters = broker.consume(Subscription::new("a test", vec![Queue::tasks(&dead)]));
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
