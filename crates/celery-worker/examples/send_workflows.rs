//! Sends tasks, a chain, a group and a chord to any Celery worker, and prints their results.
//!
//! ```text
//! cargo run --example send_workflows --features redis,database -- amqp://localhost// rpc:// my-queue
//! ```
//!
//! The worker needs the tasks `tasks.add`, `tasks.echo` and `tasks.fail`.

use std::error::Error;
use std::time::Duration;

use celery_protocol::canvas::{Signature, chord, group};
use celery_worker::client::{Client, GetError, IfRunning};
use celery_worker::results::ReadError;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what| arguments.next().ok_or(format!("{what} is missing"));
    let (broker, results, queue) = (next("broker URL")?, next("result URL")?, next("queue")?);
    let client = Client::builder(broker)
        .results(&results)
        .default_queue(&queue)
        .build()
        .await?;
    let add = |x: i64| Signature::new("tasks.add").arg(x).queue(&queue);
    let echo = || Signature::new("tasks.echo").queue(&queue);

    let sum = client.send(add(2).arg(3)).await?;
    let sum: i64 = sum.get(PATIENCE).await?;

    let chain = client.send(add(1).arg(1) | add(10) | add(100)).await?;
    let last: i64 = chain.get(PATIENCE).await?;
    let before = chain.parent().ok_or("a chain has steps")?;
    let before: i64 = before.get(PATIENCE).await?;

    let sums = client.send(group((0..5).map(|x| add(x).arg(x)))).await?;
    let sums: Vec<i64> = sums.get(PATIENCE).await?;

    let failed = client
        .send(Signature::new("tasks.fail").arg("no").queue(&queue))
        .await?;
    let error = match failed.get::<Value>(PATIENCE).await {
        Err(GetError::Failed { exception, .. }) => exception.headline(),
        other => return Err(format!("the task should have failed: {other:?}").into()),
    };

    // The parts of a chord are counted by Redis, or watched by a task; `rpc://` does neither.
    let chorded = match results.starts_with("rpc") {
        true => Value::Null,
        false => {
            let chord = chord((0..3).map(|x| add(x).arg(1)), echo()) | echo();
            client.send(chord).await?.get(PATIENCE).await?
        }
    };
    let state = failed.state().await?;
    failed.forget().await?;
    let forgotten = failed.state().await?;
    let never = client
        .send(add(1).arg(1).queue(format!("{queue}-without-worker")))
        .await?;
    let timeout = never.get::<i64>(Duration::from_millis(300)).await;
    let is_late = matches!(timeout, Err(GetError::Timeout { .. }));
    let unread = matches!(never.info().await, Ok(None) | Err(ReadError::Disabled));
    // After it, a Python worker may store REVOKED.
    never.revoke(IfRunning::Continue).await?;

    println!(
        "{}",
        json!({
            "add": sum, "chain": last, "step": before, "group": sums, "error": error,
            "chord": chorded, "state": state, "forgotten": forgotten, "late": is_late && unread,
        })
    );
    client.close().await;
    Ok(())
}
