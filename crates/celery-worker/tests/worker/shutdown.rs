//! Warm and cold shutdown.

use super::*;

#[tokio::test]
async fn warm_shutdown_finishes_running_tasks_and_returns_waiting_ones() {
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
async fn cold_shutdown_stops_tasks_and_returns_their_messages() {
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
