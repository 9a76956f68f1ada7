//! Celery's own tasks that call or send the signatures in their arguments: `Task.map`, `starmap` and `chunks`, and the
//! forms in which earlier versions of Celery sent groups, chains and chords.

use celery_protocol::canvas::{Form, Signature, chord, group};
use celery_protocol::exception::Exception;
use celery_worker_macros::task;
use serde_json::{Map, Value, json};

use crate::client::AsyncResult;
use crate::task::{Registry, TaskResult};

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
    let name = Signature::parse(&task)?.task;
    let mut results = Vec::new();
    for item in it {
        results.push(cx.call(&name, json!([item])).await?);
    }
    Ok(results)
}

/// Calls a task in this one, with each item as the list of its arguments.
#[task(name = "celery.starmap", cooperative)]
async fn xstarmap(task: Value, it: Vec<Value>, cx: TaskContext) -> TaskResult<Vec<Value>> {
    let name = Signature::parse(&task)?.task;
    let mut results = Vec::new();
    for arguments in it {
        results.push(cx.call(&name, arguments).await?);
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
    for task in tasks {
        let task = with_arguments(Signature::parse(&task)?, &partial_args);
        cx.client().send(task.option("group_id", &group_id)).await?;
    }
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
    let tasks = tasks
        .into_iter()
        .map(|task| with_arguments(task, &partial_args));
    let sent = chord(tasks, Signature::parse(&body)?);
    Ok(cx.client().send(sent).await?)
}

/// The signature with further arguments before its own, unless it is immutable.
fn with_arguments(mut signature: Signature, partial_args: &[Value]) -> Signature {
    if !signature.immutable {
        signature.args.splice(0..0, partial_args.iter().cloned());
    }
    signature
}
