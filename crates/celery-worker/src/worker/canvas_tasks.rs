//! Celery's own tasks that call or send the signatures in their arguments: `Task.map`, `starmap` and `chunks`, and the
//! forms in which earlier versions of Celery sent groups, chains and chords.

use celery_protocol::canvas::{Form, Signature, SignatureError, chord, group};
use celery_protocol::exception::Exception;
use celery_protocol::weight;
use celery_worker_macros::task;
use serde_json::{Map, Value, json};
use tokio::task::coop::consume_budget;

use crate::client::AsyncResult;
use crate::task::{Registry, TaskContext, TaskError, TaskResult};

/// Maximum memory of what one run copies, or collects from the tasks that it calls, in bytes: a small message can name
/// many copies of one large value.
const MAX_COPIES: usize = 128 << 20;

/// Memory of a signature without its arguments, in bytes, rounded up.
const SIGNATURE: usize = 1 << 10;

/// Registers the tasks. A task of the program with such a name takes precedence.
pub(super) fn register(registry: &mut Registry) {
    // The only possible error is that the name is registered already.
    let _ = registry.register(xmap);
    let _ = registry.register(xstarmap);
    let _ = registry.register(chunks);
    let _ = registry.register(send_group);
    let _ = registry.register(send_chain);
    let _ = registry.register(send_chord);
}

/// Calls a task in this one, with each item as its argument.
#[task(name = "celery.map", cooperative)]
async fn xmap(task: Value, it: Vec<Value>, cx: TaskContext) -> TaskResult<Vec<Value>> {
    call_each(&task, it, |item| json!([item]), &cx).await
}

/// Calls a task in this one, with each item as the list of its arguments.
#[task(name = "celery.starmap", cooperative)]
async fn xstarmap(task: Value, it: Vec<Value>, cx: TaskContext) -> TaskResult<Vec<Value>> {
    call_each(&task, it, |item| item, &cx).await
}

/// Calls a task for each item, with `arguments` of it. Returns the results.
async fn call_each(
    task: &Value,
    items: Vec<Value>,
    arguments: impl Fn(Value) -> Value,
    cx: &TaskContext,
) -> TaskResult<Vec<Value>> {
    let name = Signature::parse(task)?.task;
    if name.starts_with("celery.") {
        // Each of these can multiply its arguments, up to a limit for one message.
        let text = format!("`{name}` cannot be called by `{}`", cx.request().task);
        return Err(Exception::builtin("NotImplementedError", text).into());
    }
    let mut room = MAX_COPIES;
    let mut results = Vec::new();
    for item in items {
        let result = cx.call(&name, arguments(item)).await?;
        room = room
            .checked_sub(weight::of_value(&result))
            .ok_or_else(|| Exception::builtin("MemoryError", "the results take too much memory"))?;
        results.push(result);
        // A task that never waits would otherwise keep the thread from other tasks.
        consume_budget().await;
    }
    Ok(results)
}

/// Sends a group of `celery.starmap`, each with `n` of the items, and returns its result as a tree of ids.
#[task(name = "celery.chunks")]
async fn chunks(task: Value, it: Vec<Value>, n: i64, cx: TaskContext) -> TaskResult<AsyncResult> {
    let size = usize::try_from(n).ok().filter(|size| *size > 0);
    let size = size.ok_or_else(|| {
        let text = "Stop argument for islice() must be None or an integer: 0 <= x <= sys.maxsize.";
        Exception::value_error(text)
    })?;
    check_copies([&task], it.len().div_ceil(size))?;
    let parts = it.chunks(size).map(|part| {
        let signature = Signature::new(xstarmap::NAME).kwargs(json!({"task": task, "it": part}));
        signature.immutable()
    });
    Ok(cx.client().send(group(parts)).await?)
}

/// Sends the tasks of a group, whose result exists already.
#[task(name = "celery.group", bind)]
async fn send_group(
    tasks: Vec<Value>,
    result: Value,
    group_id: Value,
    partial_args: Vec<Value>,
    #[default = true] add_to_parent: bool,
    cx: TaskContext,
) -> TaskResult<Value> {
    // What a task sends is always listed in its result.
    let _ = add_to_parent;
    check_copies([&group_id], tasks.len())?;
    let tasks = with_arguments(Signature::parse_all(&tasks)?, &partial_args)?;
    let tasks = tasks
        .into_iter()
        .map(|task| task.option("group_id", &group_id));
    cx.client().send_all(tasks.collect()).await?;
    Ok(result)
}

#[task(name = "celery.chain")]
async fn send_chain(
    #[args] _args: Vec<Value>,
    #[kwargs] _kwargs: Map<String, Value>,
) -> TaskResult<()> {
    Err(Exception::builtin("NotImplementedError", "chain is not a real task").into())
}

/// Sends a chord, and returns its result as a tree of ids.
#[task(name = "celery.chord", bind)]
async fn send_chord(
    header: Value,
    body: Value,
    #[default] partial_args: Vec<Value>,
    #[kwargs] _more: Map<String, Value>,
    cx: TaskContext,
) -> TaskResult<AsyncResult> {
    let tasks = match &header {
        Value::Array(tasks) => Signature::parse_all(tasks)?,
        one => match Signature::parse(one)? {
            Signature {
                form: Form::Group(tasks),
                ..
            } => tasks,
            task => vec![task],
        },
    };
    let sent = chord(
        with_arguments(tasks, &partial_args)?,
        Signature::parse(&body)?,
    );
    Ok(cx.client().send(sent).await?)
}

/// The signatures with further arguments before their own, unless they are immutable.
fn with_arguments(mut signatures: Vec<Signature>, further: &[Value]) -> TaskResult<Vec<Signature>> {
    check_copies(further, signatures.len())?;
    for signature in &mut signatures {
        if !signature.immutable {
            signature.args.splice(0..0, further.iter().cloned());
        }
    }
    Ok(signatures)
}

/// Checks the memory of signatures that each get a copy of the values, before they are made.
fn check_copies<'v>(
    values: impl IntoIterator<Item = &'v Value>,
    signatures: usize,
) -> Result<(), TaskError> {
    let of_one = MAX_COPIES / signatures.max(1);
    match of_one < SIGNATURE || weight::exceeds(values, of_one - SIGNATURE) {
        true => Err(SignatureError::Memory.into()),
        false => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use rstest::rstest;

    use super::*;
    use crate::broker::memory::MemoryBroker;
    use crate::client::{Client, GetError};
    use crate::prelude::*;
    use crate::worker::Shutdown;

    #[task(name = "big")]
    async fn big(x: Value) -> TaskResult<String> {
        let _ = x;
        Ok("x".repeat(1 << 20))
    }

    fn large() -> Value {
        json!("x".repeat(1 << 20))
    }

    fn many(count: usize) -> Vec<Value> {
        vec![json!([]); count]
    }

    fn task(args: Value) -> Value {
        json!({"task": "sent", "args": args, "options": {"queue": "elsewhere"}})
    }

    /// Each of these messages is below 4 MB, and would need or send gigabytes, or send a part of what it contains.
    #[rstest]
    #[case::parts_of_a_large_task("celery.chunks", json!({"task": task(json!([large()])), "it": many(10_000), "n": 1}))]
    #[case::many_parts("celery.chunks", json!({"task": task(json!([])), "it": many(500_000), "n": 1}))]
    #[case::large_arguments_of_a_group(
        "celery.group",
        json!({"tasks": vec![task(json!([])); 10_000], "result": 0, "group_id": "g", "partial_args": [large()]})
    )]
    #[case::large_id_of_a_group(
        "celery.group",
        json!({"tasks": vec![task(json!([])); 10_000], "result": 0, "group_id": large(), "partial_args": []})
    )]
    #[case::a_group_whose_last_task_is_none(
        "celery.group",
        json!({"tasks": [task(json!([])), {"task": 5}], "result": 0, "group_id": "g", "partial_args": []})
    )]
    #[case::a_group_whose_messages_exceed_the_limit_together(
        "celery.group",
        json!({"tasks": vec![task(json!([])); 100], "result": 0, "group_id": "g", "partial_args": [large()]})
    )]
    #[case::large_arguments_of_a_chord(
        "celery.chord",
        json!({"header": vec![task(json!([])); 10_000], "body": task(json!([])), "partial_args": [large()]})
    )]
    #[case::large_results("celery.map", json!({"task": {"task": "big"}, "it": many(1000)}))]
    #[case::chunks_of_chunks(
        "celery.starmap",
        json!({"task": {"task": "celery.chunks"}, "it": vec![json!([task(json!([])), [[1]], 1]); 1000]})
    )]
    #[tokio::test]
    async fn message_that_multiplies_fails_and_sends_nothing(
        #[case] name: &str,
        #[case] kwargs: Value,
    ) {
        let url = format!("memory://multiplying-{}", uuid::Uuid::new_v4());
        let client = Client::builder(&url).results(&url).build().await.unwrap();
        let shutdown = Shutdown::default();
        let worker = Worker::builder(&url).results(&url).task(big);
        let running = tokio::spawn(worker.build(shutdown.clone()).unwrap().run());
        assert!(kwargs.to_string().len() < 4 << 20);
        let sent = Signature::new(name).kwargs(kwargs);
        let result = client.send(sent).await.unwrap();
        let ended = result.get::<Value>(Duration::from_secs(60)).await;
        assert!(matches!(ended, Err(GetError::Failed { .. })), "{ended:?}");
        let broker = MemoryBroker::named(&url).unwrap();
        assert!(broker.messages("elsewhere").is_empty());
        shutdown.cold();
        running.await.unwrap().unwrap();
    }
}
