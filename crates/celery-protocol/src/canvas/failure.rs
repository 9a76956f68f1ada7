//! Tasks that fail together with a task: the rest of its chain, the body of its chord.

use serde_json::{Map, Value};

use super::signature::{links, text};
use super::{Error, Form, MAX_DEPTH, MAX_MEMORY, Signature};
use crate::exception::Exception;
use crate::message::{Embed, TaskMessage};
use crate::weight;

/// A task that failed before it was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyFailure {
    /// The task's message, with the fields that its result needs.
    pub message: TaskMessage,
    /// The error of the task.
    pub exception: Exception,
    /// The errbacks of the task.
    pub errbacks: Vec<Value>,
}

/// `ChordError`, the error of a chord's body.
#[must_use]
pub fn chord_error(text: String) -> Exception {
    Exception::new("celery.exceptions", "ChordError", text)
}

/// The remaining steps of a chain that fail after a failed step, if they have ids: a client that waits for the chain's
/// result waits for the last of them. The body of a chord among them fails, too.
#[must_use]
pub fn failed_steps(chain: &[Value]) -> Vec<TaskMessage> {
    let mut failed = Vec::new();
    for step in chain {
        let mut next = Some(step);
        for _ in 0..MAX_DEPTH {
            let Some(step) = next else { break };
            if let Some(Value::Object(options)) = step.get("options") {
                failed.extend(unsent(options));
            }
            next = (step["subtask_type"] == "chord").then(|| &step["kwargs"]["body"]);
        }
    }
    failed
}

/// The tasks that fail with `error` if the body of a chord cannot be applied. If the body is a group, its tasks fail
/// with `cause`.
///
/// # Errors
/// [`Error`] if the body is not a signature.
pub fn body_failures(
    body: &Value,
    error: &Exception,
    cause: &Exception,
) -> Result<Vec<BodyFailure>, Error> {
    let mut failures = Vec::new();
    let body = Signature::parse(body)?;
    let mut room = MAX_MEMORY;
    collect(&body, error, cause, Vec::new(), &mut failures, &mut room)?;
    Ok(failures)
}

/// Counts memory for copies before they are made.
fn reserve_memory<'a>(
    room: &mut usize,
    values: impl Iterator<Item = &'a Value>,
) -> Result<(), Error> {
    let bytes = values.map(weight::of_value).sum();
    *room = room.checked_sub(bytes).ok_or(Error::Memory)?;
    Ok(())
}

fn collect(
    body: &Signature,
    error: &Exception,
    cause: &Exception,
    mut errbacks: Vec<Value>,
    into: &mut Vec<BodyFailure>,
    room: &mut usize,
) -> Result<(), Error> {
    reserve_memory(
        room,
        ["link_error", "chord"]
            .iter()
            .filter_map(|name| body.options.get(*name)),
    )?;
    for errback in links(body.options.get("link_error").cloned())? {
        if !errbacks.contains(&errback) {
            errbacks.push(errback);
        }
    }
    match &body.form {
        Form::Task => {
            if let Some(message) = unsent(&body.options) {
                into.push(BodyFailure {
                    message,
                    exception: error.clone(),
                    errbacks,
                });
            }
        }
        // The result of a chain is that of its last step, which also has the chain's place in the workflow.
        Form::Chain(tasks) => {
            if let Some(last) = tasks.last() {
                // One copy of all nested signatures.
                reserve_memory(room, std::iter::once(&last.to_json()))?;
                let mut last = last.clone();
                last.options.remove("link_error");
                collect(&last, error, cause, errbacks, into, room)?;
            }
        }
        Form::Chord { body, .. } => collect(body, error, cause, errbacks, into, room)?,
        Form::Group(tasks) => {
            for task in tasks {
                reserve_memory(room, errbacks.iter())?;
                collect(task, cause, cause, errbacks.clone(), into, room)?;
            }
            if let Some(mut message) = unsent(&body.options) {
                // The tasks of the group are the parts of the surrounding chord.
                message.embed.chord = None;
                into.push(BodyFailure {
                    message,
                    exception: cause.clone(),
                    errbacks: Vec::new(),
                });
            }
        }
    }
    Ok(())
}

/// Message of a task that was not sent, with its known fields; none without an id.
fn unsent(options: &Map<String, Value>) -> Option<TaskMessage> {
    let own = |name: &str| text(options, name).map(str::to_owned);
    let id = own("task_id")?;
    Some(TaskMessage {
        correlation_id: id.clone(),
        id,
        root_id: own("root_id"),
        parent_id: own("parent_id"),
        group: own("group_id"),
        group_index: options.get("group_index").and_then(Value::as_i64),
        reply_to: own("reply_to"),
        ignore_result: options.get("ignore_result").and_then(Value::as_bool),
        embed: Embed {
            chord: options
                .get("chord")
                .filter(|chord| chord.is_object())
                .cloned(),
            ..Embed::default()
        },
        ..TaskMessage::default()
    })
}
