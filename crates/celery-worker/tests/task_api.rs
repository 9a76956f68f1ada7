//! Tasks in a running worker: what they send, how they end, what their results contain.
//!
//! Broker and results are in memory.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use celery_protocol::canvas::{Signature, group};
use celery_protocol::message::TaskMessage;
use celery_worker::client::{AsyncResult, Client, GetError};
use celery_worker::prelude::*;
use celery_worker::task::Discarded;
use celery_worker::worker::{Shutdown, WorkerBuilder};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

#[task]
async fn add(x: i64, y: i64) -> TaskResult<i64> {
    Ok(x + y)
}

#[task]
async fn everything(
    a: i64,
    b: Option<String>,
    #[default = 7] c: u8,
    #[args] rest: Vec<i64>,
    k: bool,
    #[kwargs] more: serde_json::Map<String, Value>,
) -> TaskResult<Value> {
    Ok(json!([a, b, c, rest, k, more]))
}

#[task]
async fn parent(cx: TaskContext) -> TaskResult<String> {
    let child = cx.client().send(add::s(20, 22)).await?;
    Ok(child.id().to_owned())
}

#[task]
async fn becomes_add(x: i64, cx: TaskContext) -> TaskResult<i64> {
    cx.replace(add::s(x, 1)).await
}

#[task]
async fn becomes_group(cx: TaskContext) -> TaskResult<Vec<i64>> {
    cx.replace(group([add::s(1, 1), add::s(2, 2)])).await
}

#[task]
async fn std_error(text: String) -> TaskResult<i64> {
    Ok(text.parse()?)
}

#[task]
async fn typed(cx: TaskContext) -> Result<(), Exception> {
    let _ = cx;
    Err(Exception::new("shop.errors", "SoldOut", "none left").with_args(vec![json!(3)]))
}

#[task(max_retries = 2)]
async fn third_time(#[state] runs: &AtomicU32, cx: TaskContext) -> TaskResult<u32> {
    match runs.fetch_add(1, Ordering::SeqCst) {
        2 => Ok(cx.request().retries),
        _ => Err(cx.retry().countdown(Duration::ZERO).into()),
    }
}

/// Reports the given states; of each it returns what the client saw meanwhile.
#[task]
async fn states(
    names: Vec<String>,
    #[state] client: &Client,
    cx: TaskContext,
) -> TaskResult<Value> {
    let mut seen = Vec::new();
    for (step, name) in names.iter().enumerate() {
        cx.update_state(name, json!({ "step": step })).await?;
        let info = client.result(&cx.request().id).info().await?;
        let info = info.unwrap_or_default();
        seen.push(json!([info["status"], info["result"]["step"]]));
    }
    Ok(seen.into())
}

#[derive(TaskArgs)]
struct RefusingArgs {
    x: i64,
}

/// Notes the number of retries at each call of `discard`.
struct Refusing(Arc<Mutex<Vec<u32>>>);

impl Task for Refusing {
    const NAME: &'static str = "tasks.refusing";
    const OPTIONS: TaskOptions = TaskOptions::DEFAULT
        .autoretry_for(&["TypeError"])
        .max_retries(2)
        .default_retry_delay(Duration::ZERO);
    type Args = RefusingArgs;
    type Output = ();

    async fn run(&self, args: RefusingArgs, _: TaskContext) -> TaskResult<()> {
        let _ = args.x;
        Ok(())
    }

    async fn discard(&self, message: &TaskMessage, reason: &Discarded) {
        assert!(matches!(reason, Discarded::WrongArguments(_)));
        self.0.lock().unwrap().push(message.retries);
    }
}

#[task(name = "tasks.logs")]
async fn logs() -> TaskResult<()> {
    tracing::warn!(n = 1, "a line of the task");
    Ok(())
}

/// A worker and a client that share a broker of this name. The worker ends with the returned value.
async fn start(name: &str) -> (Client, Running) {
    let url = format!("memory://{name}");
    let client = Client::builder(&url).results(&url).build().await.unwrap();
    let worker = Worker::builder(&url)
        .results(&url)
        .task(add)
        .task(everything)
        .task(parent)
        .task(becomes_add)
        .task(becomes_group)
        .task(std_error)
        .task(typed)
        .task(third_time {
            runs: AtomicU32::new(0),
        })
        .task(states {
            client: client.clone(),
        })
        .task(logs);
    (client, Running::of(worker))
}

struct Running(Shutdown);

impl Running {
    fn of(worker: WorkerBuilder) -> Self {
        let shutdown = Shutdown::default();
        let worker = worker.build(shutdown.clone()).unwrap();
        tokio::spawn(worker.run());
        Self(shutdown)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.cold();
    }
}

async fn exception(result: AsyncResult) -> (String, String) {
    match result.get::<Value>(LIMIT).await {
        Err(GetError::Failed { exception, .. }) => (exception.class(), exception.text()),
        other => unreachable!("{other:?}"),
    }
}

#[tokio::test]
async fn every_kind_of_parameter_is_bound() {
    let (client, _worker) = start("parameters").await;
    let more = json!({"x": 1}).as_object().cloned().unwrap();
    let call = everything::s(1, Some("b".into()), 3, vec![4, 5], true, more);
    let result: Value = client.send(call).await.unwrap().get(LIMIT).await.unwrap();
    assert_eq!(result, json!([1, "b", 3, [4, 5], true, {"x": 1}]));

    let short = Signature::new("everything").arg(1).kwarg("k", false);
    let result: Value = client.send(short).await.unwrap().get(LIMIT).await.unwrap();
    assert_eq!(result, json!([1, null, 7, [], false, {}]));

    let wrong = client
        .send(Signature::new("everything").arg(1))
        .await
        .unwrap();
    let (class, text) = exception(wrong).await;
    assert_eq!(class, "TypeError");
    assert_eq!(
        text,
        "everything() missing 1 required keyword-only argument: 'k'"
    );
}

#[tokio::test]
async fn task_sent_by_a_task_is_its_child() {
    let (client, _worker) = start("children").await;
    let result = client.send(parent::s()).await.unwrap();
    let child_id: String = result.get(LIMIT).await.unwrap();
    let children = result.children().await.unwrap();
    let ids: Vec<_> = children.iter().map(AsyncResult::id).collect();
    assert_eq!(ids, [child_id]);
    assert_eq!(children[0].get::<i64>(LIMIT).await.unwrap(), 42);
}

#[tokio::test]
async fn a_replacement_answers_for_the_task() {
    let (client, _worker) = start("replace").await;
    let single = client.send(becomes_add::s(4)).await.unwrap();
    assert_eq!(single.get::<i64>(LIMIT).await.unwrap(), 5);

    let chained = client
        .send(becomes_add::s(4) | Signature::new("add").arg(10))
        .await;
    assert_eq!(chained.unwrap().get::<i64>(LIMIT).await.unwrap(), 15);

    let several = client.send(becomes_group::s()).await.unwrap();
    assert_eq!(several.get::<Vec<i64>>(LIMIT).await.unwrap(), [2, 4]);
}

#[tokio::test]
async fn failures_keep_their_types() {
    let (client, _worker) = start("failures").await;
    let (class, text) = exception(client.send(std_error::s("x".into())).await.unwrap()).await;
    assert_eq!(class, "RuntimeError");
    assert_eq!(text, "invalid digit found in string");
    let (class, text) = exception(client.send(typed::s()).await.unwrap()).await;
    assert_eq!(
        (class.as_str(), text.as_str()),
        ("shop.errors.SoldOut", "3")
    );
}

#[tokio::test]
async fn a_retry_runs_again_and_counts() {
    let (client, _worker) = start("retry").await;
    let result = client.send(third_time::s()).await.unwrap();
    assert_eq!(result.get::<u32>(LIMIT).await.unwrap(), 2);
}

/// A message with wrong arguments may be retried; it ends, and is discarded, after the last retry.
#[tokio::test]
async fn a_message_is_discarded_after_its_last_retry() {
    let url = "memory://discarded";
    let client = Client::builder(url).results(url).build().await.unwrap();
    let discarded = Arc::new(Mutex::new(Vec::new()));
    let worker = Worker::builder(url).results(url);
    let _worker = Running::of(worker.task(Refusing(discarded.clone())));
    let result = client.send(Signature::new("tasks.refusing")).await.unwrap();
    let (class, _) = exception(result).await;
    assert_eq!(class, "TypeError");
    assert_eq!(*discarded.lock().unwrap(), [2]);
}

#[tokio::test]
async fn custom_states_are_stored_when_set() {
    let (client, _worker) = start("states").await;
    let names = ["MOVING", "VERIFYING", "MOVING"]
        .map(str::to_owned)
        .to_vec();
    let result = client.send(states::s(names)).await.unwrap();
    let seen: Value = result.get(LIMIT).await.unwrap();
    assert_eq!(
        seen,
        json!([["MOVING", 0], ["VERIFYING", 1], ["MOVING", 2]])
    );
    assert_eq!(result.state().await.unwrap(), "SUCCESS");

    let (class, text) = exception(client.send(states::s(vec![String::new()])).await.unwrap()).await;
    assert_eq!(class, "RuntimeError");
    assert!(text.contains("1 to 50 characters"), "{text}");
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn log_lines_of_a_task_have_its_id_and_name() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // One thread runs this test and the worker.
    let _logging = tracing::subscriber::set_default(subscriber);
    let (client, _worker) = start("logs").await;
    // `tracing` remembers a span as off if a thread without a subscriber, of another test, has used it first.
    client
        .send(logs::s())
        .await
        .unwrap()
        .get::<()>(LIMIT)
        .await
        .unwrap();
    tracing::callsite::rebuild_interest_cache();
    lines.0.lock().unwrap().clear();
    let result = client.send(logs::s()).await.unwrap();
    result.get::<()>(LIMIT).await.unwrap();
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let span = format!(r#"task{{task="tasks.logs" task_id="{}"}}:"#, result.id());
    let line = text
        .lines()
        .find(|line| line.contains("a line of the task"));
    // And none of the fields of the span for traces.
    let prefix = line.and_then(|line| line.split_once(" WARN "));
    assert!(
        prefix.is_some_and(|(_, rest)| rest.starts_with(&span)),
        "{text}"
    );
}
