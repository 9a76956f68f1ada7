//! Applying signatures, as a client's `apply_async` does.
//!
//! A client *freezes* a signature before it sends anything: every task in it gets an id, the id of
//! its group and its place there, and the last task of a part of a chord gets the chord's body. Only
//! then can the signature be cut up, since what is sent later has to have the ids that earlier
//! messages promise. A signature that a client has frozen is left as it is.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::signature::{links, listed, text};
use super::{
    Error, Form, MAX_BYTES, MAX_COPIED, MAX_DEPTH, MAX_MEMORY, MAX_MESSAGES, Outgoing, ResultNode,
    Signature,
};
use crate::message::TaskMessage;
use crate::weight;

/// Options of a chain that it does not hand to its first task.
const OF_THE_CHAIN: [&str; 8] = [
    "chord",
    "group_id",
    "group_index",
    "link",
    "link_error",
    "parent_id",
    "root_id",
    "task_id",
];

type Options = Map<String, Value>;

/// Who applies a signature, and when.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// The task that leads to the new ones.
    pub parent_id: &'a str,
    /// The first task of all.
    pub root_id: &'a str,
    /// What the signature is to the task: `link`, `chain` …. Ids are derived from this, too.
    pub role: &'static str,
    /// `reply_to` of tasks that say nothing of their own.
    pub reply_to: &'a str,
    /// Process that sends, as in `gen123@host`.
    pub origin: &'a str,
    /// From when on a countdown counts.
    pub now: DateTime<Utc>,
    /// Whether the result backend can do chords.
    pub chords: bool,
}

/// What applying a signature comes to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// What is to be done, in this order.
    pub effects: Vec<Effect>,
    /// Results of what is sent, for the `children` of the task that leads to it.
    pub children: Vec<ResultNode>,
}

/// A thing to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// A message is sent.
    Send(Box<Outgoing>),
    /// A chord begins: to be noted before its header is sent.
    Chord(Box<Header>),
}

/// A chord that begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Id of the group that its parts are.
    pub group_id: String,
    /// How many parts return.
    pub size: usize,
    /// The results of the parts.
    pub results: Vec<ResultNode>,
    /// What is sent where no backend counts: `celery.chord_unlock`.
    pub unlock: Outgoing,
}

/// What follows a task that returned: its callbacks, then the next step of its chain.
///
/// # Errors
/// [`Error`] if one of the signatures cannot be applied. Nothing is to be sent then.
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
        // Several are one group, except for those that are groups already.
        let is_group = |one: &Signature| matches!(one.form, Form::Group(_));
        let (groups, single): (Vec<_>, Vec<_>) = callbacks.into_iter().partition(is_group);
        callbacks = groups;
        if !single.is_empty() {
            callbacks.push(Signature::group(single));
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
        applying.hold(rest.iter().map(weight::of_value).sum())?;
        let mut options = options;
        options.insert("chain".into(), rest.into());
        applying.apply_child(Signature::parse(next)?, &partial, options)?;
        plan.effects.append(&mut applying.plan.effects);
        plan.children.append(&mut applying.plan.children);
    }
    Ok(plan)
}

/// What follows a task that failed: its errbacks, as one group, each with the task's id. `task_id`
/// is another than the caller's where the body of a chord fails for its header.
///
/// # Errors
/// [`Error`] if one of the signatures cannot be applied.
pub fn after_failure(task_id: &str, errbacks: &[Value], call: &Call<'_>) -> Result<Plan, Error> {
    if errbacks.is_empty() {
        return Ok(Plan::default());
    }
    let group = Signature::group(Signature::parse_all(errbacks)?);
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

/// The options that a task gives to what it leads to.
fn inherited(call: &Call<'_>) -> Options {
    let ids = [("parent_id", call.parent_id), ("root_id", call.root_id)];
    Options::from_iter(ids.map(|(name, id)| (name.to_owned(), json!(id))))
}

/// Arguments that come on top of a signature's own.
#[derive(Debug, Default)]
struct Partial {
    args: Vec<Value>,
    kwargs: Map<String, Value>,
}

/// What freezing gives to a signature.
#[derive(Clone, Copy, Default)]
struct Place<'a> {
    id: Option<&'a str>,
    root_id: Option<&'a str>,
    group_id: Option<&'a str>,
    group_index: Option<usize>,
    chord: Option<&'a Value>,
}

impl Place<'_> {
    /// Memory of a note, in bytes.
    fn weight(&self) -> usize {
        self.chord.map_or(0, weight::of_value)
    }

    fn note(&self, options: &mut Options) {
        if let Some(root_id) = self.root_id {
            options.insert("root_id".into(), root_id.into());
        }
        if let Some(group_id) = self.group_id {
            let entry = options.entry("group_id");
            entry.or_insert_with(|| group_id.into());
        }
        if let Some(index) = self.group_index {
            options.insert("group_index".into(), index.into());
        }
        if let Some(chord) = self.chord {
            options.insert("chord".into(), chord.clone());
        }
    }
}

struct Applying<'a> {
    call: Call<'a>,
    plan: Plan,
    ids: u32,
    messages: usize,
    bytes: usize,
    /// Current memory of the copies, in bytes.
    held: usize,
    /// Total number of copied bytes.
    copied: usize,
}

impl<'a> Applying<'a> {
    fn new(call: Call<'a>) -> Self {
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

    /// An id that is the same whenever the same task applies the same signature.
    fn fresh_id(&mut self) -> String {
        let name = format!("{}/{}/{}", self.call.parent_id, self.call.role, self.ids);
        self.ids += 1;
        Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()).to_string()
    }

    /// Counts memory that copies are about to take.
    fn hold(&mut self, bytes: usize) -> Result<(), Error> {
        self.held = self.held.saturating_add(bytes);
        self.copied = self.copied.saturating_add(bytes);
        match self.held > MAX_MEMORY || self.copied > MAX_COPIED {
            true => Err(Error::Memory),
            false => Ok(()),
        }
    }

    /// Hands errbacks to signatures.
    fn link_errors(&mut self, errbacks: &[Value], to: &mut [Signature]) -> Result<(), Error> {
        let copies: usize = to.iter().map(Signature::errback_copies).sum();
        for errback in errbacks {
            self.hold(weight::of_value(errback).saturating_mul(copies))?;
            to.iter_mut().for_each(|one| one.link_error(errback));
        }
        Ok(())
    }

    /// Counts what is to be sent.
    fn budget(&mut self, messages: usize, bytes: usize) -> Result<(), Error> {
        self.messages = self.messages.saturating_add(messages);
        self.bytes = self.bytes.saturating_add(bytes);
        match self.messages > MAX_MESSAGES || self.bytes > MAX_BYTES {
            true => Err(Error::Size),
            false => Ok(()),
        }
    }

    /// Applies a signature whose result is one of the caller's children.
    fn apply_child(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<(), Error> {
        let result = self.apply(signature, partial, options)?;
        self.plan.children.extend(result);
        Ok(())
    }

    /// Applies a signature; its result as the caller's child, if anything is sent.
    fn apply(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<Option<ResultNode>, Error> {
        // The caller's part comes with a copy and is merged with the signature's own.
        let held = self.held;
        self.hold(weight::of_map(&options).saturating_mul(2))?;
        let result = match signature.form {
            Form::Task => self.send(&signature, partial, &options).map(Some),
            Form::Chain(_) => self.apply_chain(signature, partial, options),
            Form::Group(_) => self.apply_group(signature, partial, &options),
            Form::Chord { .. } => self.apply_chord(signature, partial, options),
        };
        // All of this is sent by now, or written to messages.
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

    /// The first step is sent, and takes the rest with it.
    fn apply_chain(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: Options,
    ) -> Result<Option<ResultNode>, Error> {
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
        if self.freeze_steps(&mut steps, place)?.is_none() {
            return Ok(None);
        }
        self.link_errors(&links(Some(link_error.take()))?, &mut steps)?;
        if let Some(last) = steps.last_mut() {
            for callback in links(Some(link.take()))? {
                match &last.form {
                    Form::Chord { .. } => last.link(callback),
                    _ => link_option(&mut last.options, callback),
                }
            }
        }
        let mut steps = steps.into_iter();
        let Some(first) = steps.next() else {
            return Ok(None);
        };
        // What follows the whole chain comes after its own steps; the list is read from its end.
        let mut rest = listed(options.remove("chain")).unwrap_or_default();
        rest.extend(steps.rev().map(|step| step.to_json()));
        options.insert("chain".into(), rest.into());
        self.apply(first, partial, options)
    }

    fn apply_group(
        &mut self,
        signature: Signature,
        partial: &Partial,
        options: &Options,
    ) -> Result<Option<ResultNode>, Error> {
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
        Ok(Some(match results.as_slice() {
            [only] if only.members.is_some() => only.clone(),
            _ => ResultNode::group(group_id, results),
        }))
    }

    fn apply_chord(
        &mut self,
        signature: Signature,
        partial: &Partial,
        mut options: Options,
    ) -> Result<Option<ResultNode>, Error> {
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

        // A delay is the header's, whoever asks for it; the header is what is sent now.
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
        // The body gets these. It is written for its parts, and once more for its observer.
        self.hold(weight::of_map(&shared).saturating_mul(3))?;
        self.add_callbacks(&mut body, &mut shared)?;
        let to_body = shared.iter().filter(|(name, _)| *name != "parent_id");
        let to_body = to_body.map(|(name, value)| (name.clone(), value.clone()));
        body.options.extend(to_body.collect::<Vec<_>>());
        // Neither what follows the chord nor the chord around it is of the header's business.
        shared.remove("chain");
        shared.remove("chord");

        let place = Place {
            id: Some(&body_id),
            group_id: Some(&group_id),
            root_id: root_id.as_deref(),
            ..Place::default()
        };
        self.freeze(&mut body, place)?;
        let mut tasks = flatten_for_chord(header);
        if tasks.is_empty() {
            let partial = Partial {
                args: vec![json!([])],
                kwargs: Map::new(),
            };
            return self.apply(body, &partial, Options::new());
        }
        let chord = body.to_json();
        self.hold(weight::of_value(&chord).saturating_mul(2))?;
        // Before the body is copied into every part.
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
                // Each part gets a copy when it is sent, so the copies do not exist at the same time.
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
            results,
            unlock,
        })));
        shared.extend(delay);
        shared.insert("chord".into(), chord);
        shared.insert("task_id".into(), json!(group_id));
        let partial = Partial {
            args: partial_args,
            kwargs: partial_kwargs,
        };
        self.apply_group(Signature::group(tasks), &partial, &shared)
    }

    /// Gives a signature and its parts what they lack; their result, if there is one.
    fn freeze(
        &mut self,
        signature: &mut Signature,
        place: Place<'_>,
    ) -> Result<Option<ResultNode>, Error> {
        let options = &mut signature.options;
        match &mut signature.form {
            Form::Task => {
                self.hold(place.weight())?;
                place.note(options);
                let id = match text(options, "task_id") {
                    Some(id) => id.to_owned(),
                    None => place.id.map_or_else(|| self.fresh_id(), str::to_owned),
                };
                options.insert("task_id".into(), json!(id));
                let reply_to = || json!(self.call.reply_to);
                options.entry("reply_to").or_insert_with(reply_to);
                Ok(Some(ResultNode::task(id)))
            }
            Form::Chain(tasks) => {
                *tasks = self.steps(std::mem::take(tasks))?;
                let result = self.freeze_steps(tasks, place)?;
                if let Some(result) = &result {
                    options.insert("task_id".into(), json!(result.id));
                }
                Ok(result)
            }
            Form::Group(tasks) => {
                self.hold(place.weight())?;
                place.note(options);
                let id = match text(options, "task_id") {
                    Some(id) => id.to_owned(),
                    None => self.fresh_id(),
                };
                options.insert("task_id".into(), json!(id));
                *tasks = flatten_for_chord(std::mem::take(tasks));
                let mut results = Vec::with_capacity(tasks.len());
                for (index, task) in tasks.iter_mut().enumerate() {
                    let place = Place {
                        id: None,
                        group_index: Some(index),
                        ..place
                    };
                    results.extend(self.freeze(task, place)?);
                }
                Ok(Some(ResultNode::group(id, results)))
            }
            Form::Chord { header, body } => {
                let id = match text(options, "task_id") {
                    Some(id) => id.to_owned(),
                    None => self.fresh_id(),
                };
                options.insert("task_id".into(), json!(id));
                *header = flatten_for_chord(std::mem::take(header));
                let mut results = Vec::with_capacity(header.len());
                for (index, task) in header.iter_mut().enumerate() {
                    let place = Place {
                        root_id: place.root_id,
                        group_index: Some(index),
                        ..Place::default()
                    };
                    results.extend(self.freeze(task, place)?);
                }
                let mut result = self.freeze(body, place)?;
                if let Some(result) = &mut result {
                    result.after(ResultNode::group(id, results));
                }
                Ok(result)
            }
        }
    }

    /// Freezes the steps of a chain, from the last one, which is the one that has a place; the
    /// result is the last one's.
    fn freeze_steps(
        &mut self,
        steps: &mut [Signature],
        place: Place<'_>,
    ) -> Result<Option<ResultNode>, Error> {
        let root_id = place.root_id;
        let Some((last, earlier)) = steps.split_last_mut() else {
            return Ok(None);
        };
        let mut result = self.freeze(last, place)?;
        for step in earlier.iter_mut().rev() {
            let place = Place {
                root_id,
                ..Place::default()
            };
            let before = self.freeze(step, place)?;
            if let (Some(result), Some(before)) = (&mut result, before) {
                result.after(before);
            }
        }
        Ok(result)
    }

    /// The steps of a chain in the form in which they run: nested chains are inlined, a group with a
    /// following step becomes a chord, empty groups are left out.
    fn steps(&mut self, tasks: Vec<Signature>) -> Result<Vec<Signature>, Error> {
        let mut flat: Vec<Signature> = Vec::with_capacity(tasks.len());
        let mut empty = None;
        let mut waiting: VecDeque<Signature> = tasks.into();
        while let Some(mut task) = waiting.pop_front() {
            match task.form {
                Form::Chain(inner) => prepend(&mut waiting, inner),
                Form::Group(mut inner) if inner.len() == 1 => {
                    prepend(&mut waiting, inner.drain(..))
                }
                Form::Group(ref inner) if inner.is_empty() => empty = Some(task),
                Form::Chord { header, body } if is_led_by_a_task(&body) => {
                    // The rest of the body is not copied into every part of the header.
                    let (first, rest) = self.unchain(*body)?;
                    task.form = Form::Chord {
                        header,
                        body: Box::new(first),
                    };
                    prepend(&mut waiting, rest);
                    waiting.push_front(task);
                }
                _ => flat.push(task),
            }
        }
        if flat.is_empty() {
            // Only an empty group has no steps.
            return Ok(empty.into_iter().collect());
        }
        let mut steps: VecDeque<Signature> = VecDeque::with_capacity(flat.len());
        let mut nested = 0;
        for mut task in flat.into_iter().rev() {
            let follows = matches!(task.form, Form::Group(_))
                .then(|| steps.pop_front())
                .flatten();
            if let (Form::Group(header), Some(body)) = (&mut task.form, follows) {
                // Each chord is in the body of the one before.
                nested += 1;
                if nested > MAX_DEPTH {
                    return Err(Error::Depth);
                }
                task = Signature::chord(std::mem::take(header), body);
            } else {
                nested = 0;
            }
            steps.push_front(task);
        }
        Ok(steps.into())
    }

    /// First task of a chain and the others, with the options that the chain hands to them.
    fn unchain(&mut self, chain: Signature) -> Result<(Signature, Vec<Signature>), Error> {
        let Signature {
            mut options,
            form: Form::Chain(mut tasks),
            ..
        } = chain
        else {
            return Ok((chain, Vec::new()));
        };
        if let Some(last) = tasks.last_mut() {
            let callbacks = links(options.remove("link"))?;
            callbacks
                .into_iter()
                .for_each(|callback| last.link(callback));
        }
        self.link_errors(&links(options.remove("link_error"))?, &mut tasks)?;
        let mut first = tasks.remove(0);
        for name in OF_THE_CHAIN {
            options.remove(name);
        }
        first.options = first.merged(&options);
        Ok((first, tasks))
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
                false => body.link(callback),
            }
        }
        for errback in links(options.remove("link_error"))? {
            self.hold(weight::of_value(&errback).saturating_mul(1 + body.errback_copies()))?;
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

fn prepend<I>(waiting: &mut VecDeque<Signature>, tasks: I)
where
    I: IntoIterator<Item = Signature, IntoIter: DoubleEndedIterator>,
{
    for task in tasks.into_iter().rev() {
        waiting.push_front(task);
    }
}

/// Whether a body is a chain that goes on after its first task. A group in that place runs what
/// follows once for each of its tasks, and has to stay whole.
fn is_led_by_a_task(body: &Signature) -> bool {
    matches!(&body.form, Form::Chain(tasks)
        if tasks.first().is_some_and(|first| !matches!(first.form, Form::Group(_))))
}

/// A group's tasks with their places, groups in it taken apart. Python counts those anew.
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

/// A header's tasks, groups in it taken apart. Python puts the tasks of a group in a header in
/// reverse, and so the list that the body gets; so does this.
fn flatten_for_chord(tasks: Vec<Signature>) -> Vec<Signature> {
    let mut waiting: VecDeque<Signature> = tasks.into();
    let mut flat = Vec::with_capacity(waiting.len());
    while let Some(task) = waiting.pop_front() {
        match task.form {
            Form::Group(inner) => inner.into_iter().for_each(|task| waiting.push_front(task)),
            _ if task.is_empty() => {}
            _ => flat.push(task),
        }
    }
    flat
}

fn append_errback(options: &mut Options, errback: &Value) {
    let mut errbacks = listed(options.remove("link_error")).unwrap_or_default();
    if !errbacks.contains(errback) {
        errbacks.push(errback.clone());
    }
    options.insert("link_error".into(), errbacks.into());
}

/// An errback for each task of a group that is the body of a chord. A group that has errbacks of
/// its own hands them to its tasks in place of theirs, so it gets the new one as well.
fn link_error_to_tasks(signature: &mut Signature, errback: &Value, runs_as_group: bool) {
    let has_own = signature
        .options
        .get("link_error")
        .is_some_and(|own| !own.is_null());
    match &mut signature.form {
        Form::Group(_) if runs_as_group && has_own => {
            append_errback(&mut signature.options, errback);
        }
        Form::Group(tasks) => {
            for task in tasks {
                link_error_to_tasks(task, errback, false);
            }
        }
        Form::Chord { body, .. } => link_error_to_tasks(body, errback, true),
        Form::Task | Form::Chain(_) => signature.link_error(errback),
    }
}
