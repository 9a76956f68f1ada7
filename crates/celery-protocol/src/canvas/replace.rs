//! Replaces a running task by a signature, or extends the chord that it is a part of.

use serde_json::{Map, Value, json};

use super::apply::Applying;
use super::plan::nesting;
use super::signature::{listed, text};
use super::{Call, Effect, Error, Form, Plan, Signature};
use crate::message::TaskMessage;

/// Celery's task that combines the results of a group into one result.
const ACCUMULATE: &str = "celery.accumulate";

/// Replaces a running task by a signature, as Python's `Task.replace`.
///
/// The replacement takes over the id and thereby the result, the callbacks and errbacks, the rest of the chain, the
/// chord and the index in the group. A group is followed by `celery.accumulate`, which returns the list of its results;
/// of an empty group, the empty list.
/// After the plan is executed, the task itself ends without a result.
///
/// `call.role` is extended by the numbers of retries and replacements, so that a task can be replaced
/// more than once.
///
/// ```
/// # use celery_protocol::{canvas::{Call, Effect, Signature, replace}, message::TaskMessage};
/// # let call = Call { parent_id: None, root_id: None, role: "replace", reply_to: "replies",
/// #     origin: "gen1@host", now: chrono::DateTime::UNIX_EPOCH, chords: true };
/// let mut running = TaskMessage::default();
/// running.id = "the-task".into();
/// let plan = replace(&running, Signature::new("tasks.add").args((2, 3)), &call)?;
/// let [Effect::Send(message)] = plan.effects.as_slice() else { panic!() };
/// assert_eq!(message.message.headers["id"], "the-task");
/// # Ok::<(), celery_protocol::canvas::SignatureError>(())
/// ```
///
/// # Errors
/// [`SignatureError`](super::SignatureError) if the replacement is an empty chain or a part of a chord, or
/// cannot be applied.
pub fn replace(
    message: &TaskMessage,
    replacement: Signature,
    call: &Call<'_>,
) -> Result<Plan, Error> {
    replacement.check()?;
    if replacement.options.contains_key("chord") {
        return Err(Error::ReplacedByPart);
    }
    if matches!(&replacement.form, Form::Chain(steps) if steps.is_empty()) {
        return Err(Error::ReplacedByNothing);
    }
    let replaced = nesting(message) + 1;
    let role = format!("{}/{replaced}.{}", call.role, message.retries);
    let call = call.for_task(message, &role);
    let mut signature = with_one_result(replacement);

    for callback in &message.embed.callbacks {
        signature.add_callback(callback.clone());
    }
    for errback in &message.embed.errbacks {
        signature.add_errback(errback);
    }
    // These options belong to the last step of the replacement, not to the tasks after it.
    if let Form::Chain(steps) = &mut signature.form
        && let Some(last) = steps.last_mut()
        && let Some(callbacks) = listed(signature.options.remove("link"))
    {
        let mut links = listed(last.options.remove("link")).unwrap_or_default();
        links.extend(callbacks);
        last.options.insert("link".into(), links.into());
    }

    let mut applying = Applying::new(call);
    applying.freeze_with_id(&mut signature, &message.id)?;
    let place = workflow_options(message);
    signature.options.extend(place);
    let mark = |signature: &mut Signature| {
        let options = &mut signature.options;
        options.insert("replaced_task_nesting".into(), replaced.into());
    };
    mark(&mut signature);
    if let Form::Chain(steps) = &mut signature.form {
        steps.iter_mut().for_each(mark);
    }
    for step in message.embed.chain.iter().flatten().rev() {
        let mut step = Signature::parse(step)?;
        mark(&mut step);
        signature = signature.then(step);
    }
    applying.apply_alone(signature)?;
    Ok(applying.plan)
}

/// Adds a task to the chord that the running task is a part of: the body also waits for it, as with Python's
/// `Task.add_to_chord`.
///
/// The plan begins with [`Effect::ChordGrows`]; only a backend that counts the parts of chords can execute it.
///
/// # Errors
/// [`SignatureError`](super::SignatureError) if the task is not part of a chord, or the signature
/// cannot be applied.
pub fn add_to_chord(
    message: &TaskMessage,
    mut signature: Signature,
    call: &Call<'_>,
) -> Result<Plan, Error> {
    signature.check()?;
    let (Some(_), Some(group_id)) = (&message.embed.chord, &message.group) else {
        return Err(Error::NotInChord);
    };
    signature.options.extend(workflow_options(message));
    let mut applying = Applying::new(*call);
    let task_id = match text(&signature.options, "task_id") {
        Some(id) => id.to_owned(),
        None => applying.fresh_id(),
    };
    applying.freeze_with_id(&mut signature, &task_id)?;
    applying.plan.effects.push(Effect::ChordGrows {
        group_id: group_id.clone(),
        task_id,
    });
    applying.apply_alone(signature)?;
    Ok(applying.plan)
}

/// Turns a group into a chord, so that callbacks can be added and the result is a single one.
fn with_one_result(mut signature: Signature) -> Signature {
    let accumulate = || Signature::new(ACCUMULATE).kwarg("index", 0);
    match &mut signature.form {
        Form::Group(_) => signature.then(accumulate()),
        Form::Chain(steps) => {
            if let Some(last) = steps.pop_if(|last| matches!(last.form, Form::Group(_))) {
                steps.push(last.then(accumulate()));
            }
            signature
        }
        _ => signature,
    }
}

/// The place of a task in its workflow, as options of the signature that takes it over. Missing values are null, as in
/// Python: the body of a chord that replaces the task must not get the chord's own group.
fn workflow_options(message: &TaskMessage) -> Map<String, Value> {
    let place = [
        ("chord", json!(message.embed.chord)),
        ("group_id", json!(message.group)),
        ("group_index", json!(message.group_index)),
        ("root_id", json!(message.root_id)),
    ];
    place
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
