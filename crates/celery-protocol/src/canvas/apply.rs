//! Applying signatures, as a client's `apply_async` does.
//!
//! A client *freezes* a signature before it sends anything ([`super::freeze`]), and then sends the tasks that can run
//! at once. Their messages contain the rest of the signature.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::freeze::{Place, flatten_for_chord};
use super::signature::{append_errback, link_error_to_tasks, links, listed, text};
use super::{
    Call, Effect, Error, Form, Header, MAX_BYTES, MAX_COPIED, MAX_MEMORY, MAX_MESSAGES, Outgoing,
    Plan, ResultNode, Signature, group,
};
use crate::message::TaskMessage;
use crate::weight;

/// Options of a chain that do not apply to its first task.
pub(super) const OF_THE_CHAIN: [&str; 8] = [
    "chord",
    "group_id",
    "group_index",
    "link",
    "link_error",
    "parent_id",
    "root_id",
    "task_id",
];

pub(super) type Options = Map<String, Value>;

/// Applies a signature for a client or for a running task.
///
/// ```
/// use celery_protocol::canvas::{Call, Effect, Signature, apply};
///
/// let call = Call {
///     parent_id: None,
///     root_id: None,
///     role: "0d6c4f3c-8b8a-4a5e-b0f6-3d2d6f7b9a11", // random
///     reply_to: "replies",
///     origin: "gen1@host",
///     now: chrono::DateTime::UNIX_EPOCH,
///     chords: true,
/// };
/// let plan = apply(Signature::new("tasks.add").args((2, 3)) | Signature::new("tasks.show"), &call)?;
/// // One message is sent, which carries the second step along; the result is that of the second.
/// let [Effect::Send(first)] = plan.effects.as_slice() else { panic!() };
/// assert_eq!(first.message.headers["task"], "tasks.add");
/// let result = plan.result.unwrap();
/// assert_eq!(first.message.headers["id"], result.parent.unwrap().id);
/// # Ok::<(), celery_protocol::canvas::SignatureError>(())
/// ```
///
/// # Errors
/// [`SignatureError`](super::SignatureError) if it cannot be applied. The caller must not send anything in this case.
pub fn apply(signature: Signature, call: &Call<'_>) -> Result<Plan, Error> {
    apply_all([signature], call)
}

/// Applies several signatures, to which the limits of one apply together. The result of the plan is that of the last one.
///
/// # Errors
/// [`SignatureError`](super::SignatureError) if one of them cannot be applied. The caller must not send anything in this
/// case.
pub fn apply_all(
    signatures: impl IntoIterator<Item = Signature>,
    call: &Call<'_>,
) -> Result<Plan, Error> {
    let mut applying = Applying::new(*call);
    for signature in signatures {
        signature.check()?;
        applying.apply_alone(signature)?;
    }
    Ok(applying.plan)
}

/// Plans the follow-up tasks of a task that succeeded: its callbacks, then the next step of its chain.
///
/// # Errors
/// [`Error`] if one of the signatures cannot be applied. The caller must not send anything in this case.
pub fn after_success(
    message: &TaskMessage,
    returned: &Value,
    call: &Call<'_>,
) -> Result<Plan, Error> {
    let partial = Partial {
        args: vec![returned.clone()],
        kwargs: Map::new(),
    };
    let mut applying = Applying::new(Call {
        role: "link",
        ..*call
    });
    let options = inherited(call);
    let mut callbacks = Signature::parse_all(&message.embed.callbacks)?;
    if callbacks.len() > 1 {
        // Several callbacks are applied as one group, except for those that are groups themselves.
        let is_group = |one: &Signature| matches!(one.form, Form::Group(_));
        let (groups, single): (Vec<_>, Vec<_>) = callbacks.into_iter().partition(is_group);
        callbacks = groups;
        if !single.is_empty() {
            callbacks.push(group(single));
        }
    }
    for callback in callbacks {
        applying.apply_child(callback, &partial, options.clone())?;
    }
    let mut plan = applying.plan;

    if let Some((next, rest)) = message.embed.chain.as_deref().and_then(<[_]>::split_last) {
        let mut applying = Applying::new(Call {
            role: "chain",
            ..*call
        });
        applying.reserve_memory(rest.iter().map(weight::of_value).sum())?;
        let mut options = options;
        options.insert("chain".into(), rest.into());
        applying.apply_child(Signature::parse(next)?, &partial, options)?;
        plan.effects.append(&mut applying.plan.effects);
        plan.children.append(&mut applying.plan.children);
        plan.result = applying.plan.result;
    }
    Ok(plan)
}

/// Plans the follow-up tasks of a task that failed: its errbacks, as one group, each with the id of the failed task.
/// `task_id` differs from the caller's id if the body of a chord fails because of its header.
///
/// # Errors
/// [`Error`] if one of the signatures cannot be applied.
pub fn after_failure(task_id: &str, errbacks: &[Value], call: &Call<'_>) -> Result<Plan, Error> {
    if errbacks.is_empty() {
        return Ok(Plan::default());
    }
    let group = group(Signature::parse_all(errbacks)?);
    let mut applying = Applying::new(*call);
    let partial = Partial {
        args: vec![json!(task_id)],
        kwargs: Map::new(),
    };
    applying.apply_child(group, &partial, inherited(call))?;
    Ok(applying.plan)
}

/// Applies the body of a chord to the results of its header.
///
/// # Errors
/// [`Error`] if it cannot be applied.
pub fn chord_body(body: &Value, results: Value, call: &Call<'_>) -> Result<Plan, Error> {
    let mut applying = Applying::new(*call);
    let partial = Partial {
        args: vec![results],
        kwargs: Map::new(),
    };
    applying.apply_child(Signature::parse(body)?, &partial, Options::new())?;
    Ok(applying.plan)
}

/// The options that a task passes on to its follow-up tasks.
fn inherited(call: &Call<'_>) -> Options {
    let ids = [("parent_id", call.parent_id), ("root_id", call.root_id)];
    let known = ids
        .into_iter()
        .filter_map(|(name, id)| Some((name.to_owned(), json!(id?))));
    known.collect()
}

/// Arguments that are added to a signature's own.
#[derive(Debug, Default)]
struct Partial {
    args: Vec<Value>,
    kwargs: Map<String, Value>,
}

/// Results of an applied signature.
struct Applied {
    /// The tasks that are sent now: the caller's child.
    child: ResultNode,
    /// The task that runs last: the result that the caller waits for.
    result: ResultNode,
}

impl From<ResultNode> for Applied {
    fn from(node: ResultNode) -> Self {
        Self {
            child: node.clone(),
            result: node,
        }
    }
}

pub(super) struct Applying<'a> {
    pub(super) call: Call<'a>,
    pub(super) plan: Plan,
    ids: u32,
    messages: usize,
    bytes: usize,
    /// Current memory of the copies, in bytes.
    held: usize,
    /// Total number of copied bytes.
    copied: usize,
}

impl<'a> Applying<'a> {
    pub(super) fn new(call: Call<'a>) -> Self {
        Self {
            call,
            plan: Plan::default(),
            ids: 0,
            messages: 0,
            bytes: 0,
            held: 0,
            copied: 0,
        }
    }

    /// Returns an id that is the same for each run of the same task if it applies the same signature with the same
    /// role.
    pub(super) fn fresh_id(&mut self) -> String {
        let parent_id = self.call.parent_id.unwrap_or_default();
        let name = format!("{parent_id}/{}/{}", self.call.role, self.ids);
        self.ids += 1;
        Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()).to_string()
    }

    /// Counts memory for copies before they are made.
    pub(super) fn reserve_memory(&mut self, bytes: usize) -> Result<(), Error> {
        self.held = self.held.saturating_add(bytes);
        self.copied = self.copied.saturating_add(bytes);
        match self.held > MAX_MEMORY || self.copied > MAX_COPIED {
            true => Err(Error::Memory),
            false => Ok(()),
        }
    }

    /// Adds errbacks to signatures.
    pub(super) fn link_errors(
        &mut self,
        errbacks: &[Value],
        to: &mut [Signature],
    ) -> Result<(), Error> {
        let copies: usize = to.iter().map(Signature::errback_copies).sum();
        for errback in errbacks {
            self.reserve_memory(weight::of_value(errback).saturating_mul(copies))?;
            to.iter_mut().for_each(|one| one.add_errback(errback));
        }
        Ok(())
    }

    /// Counts messages and bytes before they are sent.
    fn budget(&mut self, messages: usize, bytes: usize) -> Result<(), Error> {
        self.messages = self.messages.saturating_add(messages);
        self.bytes = self.bytes.saturating_add(bytes);
        match self.messages > MAX_MESSAGES || self.bytes > MAX_BYTES {
            true => Err(Error::Size),
            false => Ok(()),
        }
    }

    /// Applies a signature with its own arguments and options.
    pub(super) fn apply_alone(&mut self, signature: Signature) -> Result<(), Error> {
        self.apply_child(signature, &Partial::default(), Options::new())
    }

    /// Applies a signature whose result is one of the caller's children.
    fn apply_child(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<(), Error> {
        if let Some(Applied { child, result }) = self.apply(signature, partial, options)? {
            self.plan.children.push(child);
            self.plan.result = Some(result);
        }
        Ok(())
    }

    /// Applies a signature and returns its results, or none if no task is sent.
    fn apply(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<Option<Applied>, Error> {
        // The caller's arguments are copied and merged with the signature's own.
        let held = self.held;
        self.reserve_memory(weight::of_map(&options).saturating_mul(2))?;
        let result = match signature.form {
            Form::Task => {
                let sent = self.send(&signature, partial, &options)?;
                Ok(Some(sent.into()))
            }
            Form::Chain(_) => self.apply_chain(signature, partial, options),
            Form::Group(_) => self.apply_group(signature, partial, &options),
            Form::Chord { .. } => self.apply_chord(signature, partial, options),
        };
        // Everything that was counted since is sent or written to messages by now.
        self.held = held;
        result
    }

    fn send(
        &mut self,
        signature: &Signature,
        partial: &Partial,
        options: &Options,
    ) -> Result<ResultNode, Error> {
        let options = signature.merged(options);
        let (mut args, mut kwargs) = (Vec::new(), signature.kwargs.clone());
        if !signature.immutable {
            args.extend_from_slice(&partial.args);
            kwargs.extend(partial.kwargs.clone());
        }
        args.extend_from_slice(&signature.args);
        let id = match text(&options, "task_id") {
            Some(id) => id.to_owned(),
            None => self.fresh_id(),
        };
        let outgoing = Outgoing::new(&signature.task, &id, &args, &kwargs, &options, &self.call)?;
        self.budget(1, outgoing.bytes())?;
        self.plan.effects.push(Effect::Send(Box::new(outgoing)));
        Ok(ResultNode::task(id))
    }

    /// Sends the first step, whose message contains the rest.
    fn apply_chain(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<Option<Applied>, Error> {
        let Form::Chain(tasks) = signature.form else {
            return Ok(None);
        };
        let mut options: Options = signature.options.into_iter().chain(options).collect();
        let mut own = OF_THE_CHAIN.map(|name| options.remove(name).unwrap_or_default());
        let [
            chord,
            group_id,
            group_index,
            link,
            link_error,
            _,
            root_id,
            task_id,
        ] = &mut own;
        let mut steps = self.steps(tasks)?;
        let place = Place {
            id: task_id.as_str(),
            root_id: root_id.as_str(),
            group_id: group_id.as_str(),
            group_index: index(group_index),
            chord: Some(&*chord).filter(|chord| !chord.is_null()),
        };
        let Some(result) = self.freeze_steps(&mut steps, place)? else {
            return Ok(None);
        };
        self.link_errors(&links(Some(link_error.take()))?, &mut steps)?;
        if let Some(last) = steps.last_mut() {
            for callback in links(Some(link.take()))? {
                match &last.form {
                    Form::Chord { .. } => last.add_callback(callback),
                    _ => link_option(&mut last.options, callback),
                }
            }
        }
        let mut steps = steps.into_iter();
        let Some(first) = steps.next() else {
            return Ok(None);
        };
        // The follow-up tasks of the whole chain run after its own steps; the list is read from its end.
        let mut rest = listed(options.remove("chain")).unwrap_or_default();
        rest.extend(steps.rev().map(|step| step.to_json()));
        let is_single = rest.is_empty();
        options.insert("chain".into(), rest.into());
        let applied = self.apply(first, partial, options)?;
        Ok(applied.map(|applied| match is_single {
            true => applied,
            false => Applied { result, ..applied },
        }))
    }

    fn apply_group(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: &Options,
    ) -> Result<Option<Applied>, Error> {
        if signature.is_empty() {
            return Ok(None);
        }
        let mut options = signature.merged(options);
        let group_id = match options.remove("task_id") {
            Some(Value::String(id)) => id,
            _ => self.fresh_id(),
        };
        options.insert("group_id".into(), json!(group_id));
        options.remove("group_index");
        let root_id = text(&options, "root_id").map(str::to_owned);
        let mut tasks = Vec::new();
        flatten_in_order(signature, &mut tasks);
        let mut results = Vec::with_capacity(tasks.len());
        for (index, task) in &mut tasks {
            let place = Place {
                root_id: root_id.as_deref(),
                group_id: Some(&group_id),
                group_index: Some(*index),
                ..Place::default()
            };
            results.extend(self.freeze(task, place)?);
        }
        for (_, task) in tasks {
            self.apply(task, partial, options.clone())?;
        }
        // Python's rule for a group of a single chain that ends in a group.
        let result = match results.as_slice() {
            [only] if only.members.is_some() => only.clone(),
            _ => ResultNode::group(group_id, results),
        };
        Ok(Some(result.into()))
    }

    fn apply_chord(
        &mut self,
        signature: Signature,
        partial: &Partial,
        mut options: Options,
    ) -> Result<Option<Applied>, Error> {
        if !self.call.chords {
            return Err(Error::NoChords);
        }
        let Signature {
            args,
            kwargs,
            options: mut own,
            immutable,
            form: Form::Chord { header, body },
            ..
        } = signature
        else {
            return Ok(None);
        };
        let mut partial_args = Vec::new();
        if !immutable {
            partial_args.extend_from_slice(&partial.args);
        }
        partial_args.extend(args);
        let mut partial_kwargs = kwargs;
        partial_kwargs.extend(partial.kwargs.clone());

        // A delay applies to the header, both the chord's own and the caller's, because the header is sent now.
        let mut delay = Options::new();
        for name in ["countdown", "eta"] {
            let (inner, outer) = (own.remove(name), options.remove(name));
            let given = outer.filter(|value| !value.is_null()).or(inner);
            delay.extend(given.map(|value| (name.to_owned(), value)));
        }
        let group_id = match own.remove("task_id") {
            Some(Value::String(id)) => id,
            _ => self.fresh_id(),
        };
        let body_id = match options.remove("task_id") {
            Some(Value::String(id)) => id,
            _ => self.fresh_id(),
        };
        let mut body = *body;
        let mut to_body = options.clone();
        for name in ["parent_id", "link", "link_error"] {
            to_body.remove(name);
        }
        body.options = body.merged(&to_body);
        let root_id = body.text("root_id").map(str::to_owned);

        own.extend(options);
        let mut shared = own;
        // The body gets these options. They are written once for its parts and once for their observer.
        self.reserve_memory(weight::of_map(&shared).saturating_mul(3))?;
        self.add_callbacks(&mut body, &mut shared)?;
        let to_body = shared.iter().filter(|(name, _)| *name != "parent_id");
        let to_body = to_body.map(|(name, value)| (name.clone(), value.clone()));
        body.options.extend(to_body.collect::<Vec<_>>());
        // The chain after the chord and the surrounding chord do not concern the header.
        shared.remove("chain");
        shared.remove("chord");

        let place = Place {
            id: Some(&body_id),
            group_id: Some(&group_id),
            root_id: root_id.as_deref(),
            ..Place::default()
        };
        let mut result = self.freeze(&mut body, place)?;
        let mut tasks = flatten_for_chord(header);
        if tasks.is_empty() {
            let partial = Partial {
                args: vec![json!([])],
                kwargs: Map::new(),
            };
            return self.apply(body, &partial, Options::new());
        }
        let chord = body.to_json();
        self.reserve_memory(weight::of_value(&chord).saturating_mul(2))?;
        // Checked before the body is copied into every part.
        let copies = chord.to_string().len().saturating_mul(tasks.len());
        if copies > MAX_BYTES || tasks.len() > MAX_MESSAGES {
            return Err(Error::Size);
        }
        let mut results = Vec::with_capacity(tasks.len());
        for (index, task) in tasks.iter_mut().enumerate() {
            let place = Place {
                root_id: root_id.as_deref(),
                group_id: Some(&group_id),
                group_index: Some(index),
                // Each part gets its copy when it is sent, so that the copies do not exist at the same time.
                chord: None,
                id: None,
            };
            results.extend(self.freeze(task, place)?);
        }
        let unlock = Outgoing::chord_unlock(
            &self.fresh_id(),
            &group_id,
            results.iter().map(ResultNode::to_json).collect(),
            &body,
            &self.call,
        )?;
        self.budget(0, unlock.bytes())?;
        self.plan.effects.push(Effect::Chord(Box::new(Header {
            group_id: group_id.clone(),
            size: tasks.iter().map(Signature::parts).sum(),
            results: results.clone(),
            unlock,
        })));
        if let Some(result) = &mut result {
            result.after(ResultNode::group(group_id.clone(), results));
        }
        shared.extend(delay);
        shared.insert("chord".into(), chord);
        shared.insert("task_id".into(), json!(group_id));
        let partial = Partial {
            args: partial_args,
            kwargs: partial_kwargs,
        };
        let applied = self.apply_group(group(tasks), &partial, &shared)?;
        Ok(applied.map(|applied| match result {
            Some(result) => Applied { result, ..applied },
            None => applied,
        }))
    }

    /// Moves the callbacks of a chord to its body.
    fn add_callbacks(&mut self, body: &mut Signature, options: &mut Options) -> Result<(), Error> {
        for callback in links(options.remove("link"))? {
            if !callback.is_object() {
                let (what, expected) = ("link", "a signature");
                return Err(Error::Form { what, expected });
            }
            match body.is_empty() {
                true => link_option(&mut body.options, callback),
                false => body.add_callback(callback),
            }
        }
        for errback in links(options.remove("link_error"))? {
            self.reserve_memory(
                weight::of_value(&errback).saturating_mul(1 + body.errback_copies()),
            )?;
            match body.form {
                Form::Group(_) => link_error_to_tasks(body, &errback, true),
                _ => append_errback(&mut body.options, &errback),
            }
        }
        Ok(())
    }
}

fn index(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn link_option(options: &mut Options, callback: Value) {
    let mut links = listed(options.remove("link")).unwrap_or_default();
    links.push(callback);
    options.insert("link".into(), links.into());
}

/// Lists a group's tasks with their indexes; nested groups are flattened. As in Python, each nested group counts from
/// 0.
fn flatten_in_order(signature: Signature, into: &mut Vec<(usize, Signature)>) {
    let Form::Group(tasks) = signature.form else {
        return;
    };
    for (index, task) in tasks.into_iter().enumerate() {
        match &task.form {
            Form::Group(_) => flatten_in_order(task, into),
            _ if task.is_empty() => {}
            _ => into.push((index, task)),
        }
    }
}
