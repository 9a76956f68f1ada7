//! A worker in ten lines.
//!
//! ```text
//! cargo run -p celery-worker --example hello_worker
//! ```
//!
//! It consumes the queue `celery` of a RabbitMQ on this host and answers `add.delay(2, 3).get()` of a Python client with
//! the result backend `rpc://`.

use celery_worker::prelude::*;

#[task(name = "tasks.add")]
async fn add(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x + y)
}

#[tokio::main]
async fn main() -> Result<(), WorkerError> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .init();
    let url = std::env::var("BROKER_URL").unwrap_or_else(|_| "amqp://localhost//".into());
    let worker = Worker::builder(url).results("rpc://").task(add);
    worker.run_until_signal().await
}
