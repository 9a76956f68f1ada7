//! Freezing: assigns ids to a signature and its parts before anything is sent.
//!
//! Every task gets an id; in a group, also the id of the group and its index there. The last task of each part of a chord
//! gets the body of the chord. Only then can the signature be split, since tasks that are sent later must have the ids that earlier
//! messages contain. A signature that was frozen before stays unchanged.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::apply::{Applying, OF_THE_CHAIN, Options};
use super::signature::{links, text};
use super::{Call, Error, Form, MAX_DEPTH, ResultNode, Signature, chord};
use crate::weight;

/// Values that freezing assigns to a signature.
#[derive(Clone, Copy, Default)]
pub(super) struct Place<'a> {
    pub(super) id: Option<&'a str>,
    pub(super) root_id: Option<&'a str>,
    pub(super) group_id: Option<&'a str>,
    pub(super) group_index: Option<usize>,
    pub(super) chord: Option<&'a Value>,
}

impl Place<'_> {
    /// Memory of the values that are copied into the options, in bytes.
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

/// Assigns ids to a signature and its parts, without applying it. Returns its result: a frozen signature can be stored
/// together with it, and applied later.
///
/// ```
/// # use celery_protocol::canvas::{Call, Signature, apply, freeze};
/// # let call = Call { parent_id: None, root_id: None, role: "random", reply_to: "replies",
/// #     origin: "gen1@host", now: chrono::DateTime::UNIX_EPOCH, chords: true };
/// let mut workflow = Signature::new("tasks.add").args((2, 3)) | Signature::new("tasks.show");
/// let result = freeze(&mut workflow, &call)?.unwrap();
/// assert_eq!(apply(workflow, &call)?.result.unwrap().id, result.id);
/// # Ok::<(), celery_protocol::canvas::SignatureError>(())
/// ```
///
/// # Errors
/// [`SignatureError`](super::SignatureError) if it cannot be applied.
pub fn freeze(signature: &mut Signature, call: &Call<'_>) -> Result<Option<ResultNode>, Error> {
    signature.check()?;
    Applying::new(*call).freeze(signature, Place::default())
}

impl Applying<'_> {
    /// Freezes a signature whose result has this id.
    pub(super) fn freeze_with_id(
        &mut self,
        signature: &mut Signature,
        id: &str,
    ) -> Result<Option<ResultNode>, Error> {
        let place = Place {
            id: Some(id),
            ..Place::default()
        };
        self.freeze(signature, place)
    }

    /// Assigns missing ids to a signature and its parts. Returns its result, if it has one.
    pub(super) fn freeze(
        &mut self,
        signature: &mut Signature,
        place: Place<'_>,
    ) -> Result<Option<ResultNode>, Error> {
        let options = &mut signature.options;
        match &mut signature.form {
            Form::Task => {
                self.reserve_memory(place.weight())?;
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
                self.reserve_memory(place.weight())?;
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

    /// Freezes the steps of a chain, from the last to the first. The last one takes the chain's place in the workflow. Returns the result
    /// of the last one.
    pub(super) fn freeze_steps(
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
    pub(super) fn steps(&mut self, tasks: Vec<Signature>) -> Result<Vec<Signature>, Error> {
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
                    // The rest of the body must not be copied into every part of the header.
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
                // Each chord is nested in the body of the previous one.
                nested += 1;
                if nested > MAX_DEPTH {
                    return Err(Error::Depth);
                }
                task = chord(std::mem::take(header), body);
            } else {
                nested = 0;
            }
            steps.push_front(task);
        }
        Ok(steps.into())
    }

    /// First task of a chain and the other tasks, with the options that the chain passes to them.
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
                .for_each(|callback| last.add_callback(callback));
        }
        self.link_errors(&links(options.remove("link_error"))?, &mut tasks)?;
        let mut first = tasks.remove(0);
        for name in OF_THE_CHAIN {
            options.remove(name);
        }
        first.options = first.merged(&options);
        Ok((first, tasks))
    }
}

fn prepend<I>(waiting: &mut VecDeque<Signature>, tasks: I)
where
    I: IntoIterator<Item = Signature, IntoIter: DoubleEndedIterator>,
{
    for task in tasks.into_iter().rev() {
        waiting.push_front(task);
    }
}

/// True if a body is a chain with a single task at its beginning. A group at that position runs the following steps
/// once for each of its tasks, and must not be split.
fn is_led_by_a_task(body: &Signature) -> bool {
    matches!(&body.form, Form::Chain(tasks)
        if tasks.first().is_some_and(|first| !matches!(first.form, Form::Group(_))))
}

/// A header's tasks; nested groups are flattened. As in Python, the tasks of a nested group are reversed, and with them
/// the list that the body receives.
pub(super) fn flatten_for_chord(tasks: Vec<Signature>) -> Vec<Signature> {
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
