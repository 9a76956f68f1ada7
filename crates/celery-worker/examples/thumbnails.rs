//! Tasks that send others, become others, fail with a Python exception and report what they do.
//!
//! ```text
//! cargo run -p celery-worker --example thumbnails
//! ```
//!
//! ```python
//! app.send_task("tasks.resize_all", [["a", "b"]])    # states PROGRESS and CHECKING, then 2; two children
//! app.send_task("tasks.best", ["a"]).get()           # 'a-1024'; with a stored backend, since rpc:// gets no
//!                                                    # result of a task that replaced itself, as in Celery
//! app.send_task("tasks.resize", ["a", 0]).get()      # images.errors.NoWidth: the width is 0
//! ```

use std::time::Duration;

use celery_worker::prelude::*;
use serde_json::json;

#[task(name = "tasks.resize")]
async fn resize(image: String, width: u32) -> TaskResult<String> {
    if width == 0 {
        return Err(Exception::new("images.errors", "NoWidth", "the width is 0").into());
    }
    Ok(format!("{image}-{width}"))
}

#[task(name = "tasks.resize_all")]
async fn resize_all(images: Vec<String>, cx: TaskContext) -> TaskResult<usize> {
    for (done, image) in images.iter().enumerate() {
        cx.client().send(resize::s(image.clone(), 64)).await?;
        cx.progress(json!({"done": done + 1, "of": images.len()}));
        tracing::info!(image, "resized");
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    cx.update_state("CHECKING", images.len()).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(images.len())
}

#[task(name = "tasks.best")]
async fn best(image: String, cx: TaskContext) -> TaskResult<String> {
    cx.replace(resize::s(image, 1024)).await
}

#[tokio::main]
async fn main() -> Result<(), WorkerError> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .init();
    let url = std::env::var("BROKER_URL").unwrap_or_else(|_| "amqp://localhost//".into());
    let worker = Worker::builder(url)
        .results("rpc://")
        .task_events(true)
        .task(resize)
        .task(resize_all)
        .task(best);
    worker.run_until_signal().await
}
