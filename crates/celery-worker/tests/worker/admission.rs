//! Slots, and messages with the same id.

use super::*;

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
async fn task_with_the_same_id_runs_once_at_a_time() {
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
    let queues = callers.iter().map(Queue::tasks).collect();
    let mut replies = bench.broker.consume(Subscription::new("a test", queues));
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
// On several threads: the worker continues while the test waits for `rabbitmqctl`.
#[tokio::test(flavor = "multi_thread")]
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
