//! Tasks that send others, become others, or return signatures.

use celery_worker::client::AsyncResult;
use celery_worker::prelude::*;
use serde_json::Value;

use crate::INTEGRATION;
use crate::failures::raise_error;
use crate::recorded::redis_echo;
use crate::values::{add, identity, tsum};

/// A signature of a task of the suite, without arguments.
pub(crate) fn task(name: &str) -> Signature {
    Signature::new(format!("{INTEGRATION}.{name}"))
}

/// A signature of `add`, with some of its arguments.
fn sum(args: impl serde::Serialize) -> Signature {
    task(add::NAME).args(args)
}

#[task]
pub(crate) async fn chain_add(x: Value, y: Value, cx: TaskContext) -> TaskResult<()> {
    cx.client().send(sum((&x, &x)) | sum((y,))).await?;
    Ok(())
}

#[task]
pub(crate) async fn chord_add(x: Value, y: Value, cx: TaskContext) -> TaskResult<()> {
    let sums = chord([sum((&x, &x))], sum((y,)));
    cx.client().send(sums).await?;
    Ok(())
}

#[task]
pub(crate) async fn add_replaced(x: Value, y: Value, cx: TaskContext) -> TaskResult<()> {
    cx.replace(sum((x, y))).await
}

#[task]
pub(crate) async fn add_replaced_with_chain(x: Value, y: Value, cx: TaskContext) -> TaskResult<()> {
    cx.replace(sum((x, y)) | task(identity::NAME)).await
}

/// Replaces itself `replacements` times, and returns how deeply each run was nested.
#[task]
pub(crate) async fn record_replaced_task_nesting(
    replacements: u32,
    nesting: Option<Vec<Value>>,
    cx: TaskContext,
) -> TaskResult<Vec<Value>> {
    let mut nesting = nesting.unwrap_or_default();
    let request = cx.request();
    let level = request.headers.get("replaced_task_nesting");
    nesting.push(level.cloned().unwrap_or_else(|| 0.into()));
    if replacements == 0 {
        return Ok(nesting);
    }
    let next = task(record_replaced_task_nesting::NAME).args((replacements - 1, nesting));
    cx.replace(next.option("reply_to", &request.reply_to)).await
}

/// Becomes a chain of two tasks, with a callback or an errback that writes to Redis.
async fn become_chain(
    cx: &TaskContext,
    second: &str,
    args: Vec<Value>,
    message: Option<String>,
    attach: fn(Signature, Signature) -> Signature,
) -> TaskResult<()> {
    let echo = task(redis_echo::NAME);
    let echo = match message {
        Some(message) => echo.arg(message).immutable(),
        None => echo,
    };
    let steps = task(identity::NAME).args(args) | task(second);
    cx.replace(attach(steps, echo)).await
}

#[task]
pub(crate) async fn replace_with_chain(
    #[args] args: Vec<Value>,
    link_msg: Option<String>,
    cx: TaskContext,
) -> TaskResult<()> {
    become_chain(&cx, identity::NAME, args, link_msg, Signature::link).await
}

#[task]
pub(crate) async fn replace_with_chain_which_raises(
    #[args] args: Vec<Value>,
    link_msg: Option<String>,
    cx: TaskContext,
) -> TaskResult<()> {
    become_chain(
        &cx,
        raise_error::NAME,
        args,
        link_msg,
        Signature::link_error,
    )
    .await
}

#[task]
pub(crate) async fn replace_with_empty_chain(
    #[args] _rest: Vec<Value>,
    cx: TaskContext,
) -> TaskResult<()> {
    cx.replace(chain(Vec::<Signature>::new())).await
}

#[task]
pub(crate) async fn replace_with_chain_which_contains_a_group(cx: TaskContext) -> TaskResult<()> {
    let sums = group([sum((1,)), sum((1,))]);
    cx.replace(sum((1, 2)) | sums).await
}

/// Adds a value to each number, in a group.
#[task]
pub(crate) async fn add_to_all(nums: Vec<Value>, val: Value, cx: TaskContext) -> TaskResult<()> {
    let sums = nums.into_iter().map(|num| sum((num, &val)));
    cx.replace(group(sums)).await
}

#[task]
pub(crate) async fn add_to_all_to_chord(
    nums: Vec<Value>,
    val: Value,
    cx: TaskContext,
) -> TaskResult<u32> {
    for num in nums {
        cx.add_to_chord(sum((num, &val))).await?;
    }
    Ok(0)
}

#[task]
pub(crate) async fn add_chord_to_chord(
    nums: Vec<Value>,
    val: Value,
    cx: TaskContext,
) -> TaskResult<u32> {
    let sums = group(nums.into_iter().map(|num| sum((num, &val))));
    cx.add_to_chord(sums | task(tsum::NAME)).await?;
    Ok(0)
}

/// Sends a chain and returns its result as a tree of ids.
#[task]
pub(crate) async fn build_chain_inside_task(cx: TaskContext) -> TaskResult<AsyncResult> {
    let sums = group([sum((3,)), sum((4,))]);
    let steps = sum((1, 1)) | sum((2,)) | sums | sum((5,));
    Ok(cx.client().send(steps).await?)
}

#[task]
pub(crate) async fn replaced_with_me() -> TaskResult<bool> {
    Ok(true)
}

/// The signature of an argument, or that of `replaced_with_me`.
fn replacement(signature: Option<Value>) -> TaskResult<Signature> {
    match signature {
        Some(value) => Ok(Signature::parse(&value)?),
        None => Ok(task(replaced_with_me::NAME)),
    }
}

#[task]
pub(crate) async fn replace_with_stamped_task(
    replace_with: Option<Value>,
    cx: TaskContext,
) -> TaskResult<()> {
    let stamped = replacement(replace_with)?.stamp("StampOnReplace", "This is the replaced task");
    cx.replace(stamped).await
}

#[task]
pub(crate) async fn replace_with_task(
    replace_with: Option<Value>,
    cx: TaskContext,
) -> TaskResult<()> {
    cx.replace(replacement(replace_with)?).await
}

#[task]
pub(crate) async fn rebuild_signature(sig_dict: Value) -> TaskResult<()> {
    Signature::parse(&sig_dict)?.check()?;
    Ok(())
}

/// Returns the signature that it was registered with.
#[task]
pub(crate) async fn return_signature(#[state] signature: Signature) -> TaskResult<Signature> {
    Ok(signature)
}

/// The tasks that return a signature in another one, by name.
pub(crate) fn nested() -> impl Iterator<Item = (String, return_signature)> {
    const FORMS: [&str; 3] = ["chain", "group", "chord"];
    let wrapped = |form, part: Signature| match form {
        "chain" => chain([part]),
        "group" => group([part]),
        _ => chord([part], sum(())),
    };
    let pairs = FORMS
        .iter()
        .flat_map(|outer| FORMS.map(|inner| (*outer, inner)));
    pairs.map(move |(outer, inner)| {
        let signature = wrapped(outer, wrapped(inner, sum(())));
        let name = format!("{INTEGRATION}.return_nested_signature_{outer}_{inner}");
        (name, return_signature { signature })
    })
}
