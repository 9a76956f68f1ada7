//! Signatures: a task that is not sent yet, or a workflow of several tasks.
//!
//! This module has the type and its form in messages; [`super::builder`] and [`super::compose`] create signatures in
//! code.

use std::collections::HashSet;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::{Error, MAX_DEPTH, MAX_LINKS, MAX_WEIGHT, chord};
use crate::weight;

/// Options of a signature that a caller must not change: they identify the group of a chord's parts.
const KEPT: [&str; 2] = ["group_id", "stamped_headers"];

/// A task that is not sent yet, or a workflow of several: a chain, a group or a chord.
///
/// A signature can be built, cloned, put into a larger workflow, converted to JSON and read again. Nothing is sent
/// until a client or a worker applies it.
///
/// ```
/// use celery_protocol::canvas::{Signature, group};
///
/// let add = Signature::new("tasks.add").args((2, 3)).queue("fast").priority(5);
/// let workflow = group([add.clone(), add.arg(4)]) | Signature::new("tasks.sum");
/// assert_eq!(workflow.to_json()["subtask_type"], "chord");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Signature {
    /// Name of the task; only used for a single task.
    pub task: String,
    /// Positional arguments.
    pub args: Vec<Value>,
    /// Keyword arguments; for a chord those of its header.
    pub kwargs: Map<String, Value>,
    /// Options for sending, by the names of `apply_async`.
    pub options: Map<String, Value>,
    /// True if the signature accepts no further arguments.
    pub immutable: bool,
    /// Kind of the signature: a single task or a workflow.
    pub form: Form,
    /// First error of the builder, reported when the signature is applied.
    pub(super) defect: Option<Error>,
}

/// The form of a signature.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// One task.
    Task,
    /// Tasks that run one after the other, each with the result of the previous one.
    Chain(Vec<Signature>),
    /// Tasks that run concurrently.
    Group(Vec<Signature>),
    /// Tasks that run concurrently, and then one with the list of their results.
    Chord {
        /// The tasks that run concurrently.
        header: Vec<Signature>,
        /// The signature that receives their results.
        body: Box<Signature>,
    },
}

impl Signature {
    /// Parses a signature from a message. This function is for untrusted input: depth and memory are limited.
    ///
    /// ```
    /// use celery_protocol::canvas::{Signature, SignatureError};
    ///
    /// let add = serde_json::json!({"task": "tasks.add", "args": [2, 3], "options": {"queue": "fast"}});
    /// assert_eq!(Signature::parse(&add)?, Signature::new("tasks.add").args((2, 3)).queue("fast"));
    /// assert!(Signature::parse(&serde_json::json!({"args": [2, 3]})).is_err());
    /// # Ok::<(), SignatureError>(())
    /// ```
    ///
    /// # Errors
    /// [`SignatureError`](super::SignatureError) for a value that is not a signature, and for one that is nested too
    /// deep.
    pub fn parse(value: &Value) -> Result<Self, Error> {
        if weight::of_value(value) > MAX_WEIGHT {
            return Err(Error::Memory);
        }
        parse(value, MAX_DEPTH)
    }

    /// Parses several signatures.
    ///
    /// # Errors
    /// The errors of [`Signature::parse`]. The limit of one signature applies to all of them together.
    pub fn parse_all(values: &[Value]) -> Result<Vec<Self>, Error> {
        if values.iter().map(weight::of_value).sum::<usize>() > MAX_WEIGHT {
            return Err(Error::Memory);
        }
        values.iter().map(|value| parse(value, MAX_DEPTH)).collect()
    }

    pub(super) fn compound(task: &str, form: Form, options: Map<String, Value>) -> Self {
        Self {
            task: task.to_owned(),
            args: Vec::new(),
            kwargs: Map::new(),
            options,
            immutable: false,
            form,
            defect: None,
        }
    }

    /// The mapping that Python reads.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let add = Signature::new("tasks.add").arg(2).kwarg("y", 3).immutable();
    /// assert_eq!(
    ///     add.to_json(),
    ///     serde_json::json!({
    ///         "task": "tasks.add", "args": [2], "kwargs": {"y": 3}, "options": {},
    ///         "subtask_type": null, "immutable": true,
    ///     })
    /// );
    /// ```
    #[must_use]
    pub fn to_json(&self) -> Value {
        let list = |tasks: &[Self]| -> Value { tasks.iter().map(Self::to_json).collect() };
        let (kwargs, kind) = match &self.form {
            Form::Task => (json!(self.kwargs), Value::Null),
            Form::Chain(tasks) => (json!({"tasks": list(tasks)}), "chain".into()),
            Form::Group(tasks) => (json!({"tasks": list(tasks)}), "group".into()),
            Form::Chord { header, body } => (
                json!({"kwargs": self.kwargs, "header": list(header), "body": body.to_json()}),
                "chord".into(),
            ),
        };
        json!({
            "task": self.task,
            "args": self.args,
            "kwargs": kwargs,
            "options": self.options,
            "subtask_type": kind,
            "immutable": self.immutable,
        })
    }

    /// Value of an option that is a text.
    pub(super) fn text(&self, option: &str) -> Option<&str> {
        text(&self.options, option)
    }

    /// The signature's options, overridden by those of the caller, except for the ones that a caller must not change.
    pub(super) fn merged(&self, options: &Map<String, Value>) -> Map<String, Value> {
        let stamps: HashSet<&str> = names(&self.options, "stamped_headers").collect();
        let mut merged = self.options.clone();
        for (name, value) in options {
            let kept = (KEPT.contains(&name.as_str()) || stamps.contains(name.as_str()))
                && self.options.contains_key(name);
            // Python ignores options that are `None`.
            if !kept && !value.is_null() {
                merged.insert(name.clone(), value.clone());
            }
        }
        merged
    }

    /// Adds a callback, applied on success.
    pub(super) fn add_callback(&mut self, callback: Value) {
        match &mut self.form {
            Form::Task | Form::Chain(_) => append(&mut self.options, "link", callback),
            // The first task of a group does not have the results of all tasks: the callback gets none.
            Form::Group(tasks) => {
                if let Some(first) = tasks.first_mut() {
                    let mut callback = callback;
                    callback["immutable"] = true.into();
                    first.add_callback(callback);
                }
            }
            Form::Chord { body, .. } => body.add_callback(callback),
        }
    }

    /// Adds an errback, applied on failure: to each task of a group, to the body of a chord.
    pub(super) fn add_errback(&mut self, errback: &Value) {
        match &mut self.form {
            Form::Task | Form::Chain(_) => append(&mut self.options, "link_error", errback.clone()),
            Form::Group(tasks) => tasks.iter_mut().for_each(|task| task.add_errback(errback)),
            Form::Chord { header, body } => {
                for task in header {
                    if matches!(task.form, Form::Chord { .. }) {
                        task.add_errback(errback);
                    }
                }
                body.add_errback(errback);
            }
        }
    }

    /// Number of copies of an errback that [`Signature::add_errback`] makes.
    pub(super) fn errback_copies(&self) -> usize {
        match &self.form {
            Form::Task | Form::Chain(_) => 1,
            Form::Group(tasks) => tasks.iter().map(Self::errback_copies).sum(),
            Form::Chord { header, body } => {
                let in_header = header
                    .iter()
                    .filter(|task| matches!(task.form, Form::Chord { .. }))
                    .map(Self::errback_copies);
                in_header.sum::<usize>() + body.errback_copies()
            }
        }
    }

    /// Number of parts that a chord waits for because of this signature in its header.
    pub(super) fn parts(&self) -> usize {
        match &self.form {
            Form::Task => 1,
            Form::Group(tasks) => tasks.iter().map(Self::parts).sum(),
            // A chain counts as its last step.
            Form::Chain(tasks) => {
                let parts = tasks.iter().rev().map(Self::parts);
                parts.into_iter().find(|parts| *parts > 0).unwrap_or(0)
            }
            Form::Chord { body, .. } => body.parts(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.form, Form::Group(tasks) | Form::Chain(tasks) if tasks.is_empty())
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.check() {
            Ok(()) => self.to_json().serialize(serializer),
            Err(error) => Err(serde::ser::Error::custom(error)),
        }
    }
}

impl<'de> Deserialize<'de> for Signature {
    /// Parses with [`Signature::parse`] and its limits.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::parse(&value).map_err(serde::de::Error::custom)
    }
}

/// Value of an option that is a text and not empty.
pub(super) fn text<'a>(options: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    options
        .get(name)
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty())
}

/// Value of an option that is a list of texts.
pub(super) fn names<'a>(
    options: &'a Map<String, Value>,
    name: &str,
) -> impl Iterator<Item = &'a str> {
    let list = options.get(name).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str)
}

/// Value of an option that is a list, or of a single value that counts as a list with one element.
pub(super) fn listed(value: Option<Value>) -> Option<Vec<Value>> {
    match value {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) => Some(list),
        Some(one) => Some(vec![one]),
    }
}

/// The callbacks or errbacks that a signature passes to others.
pub(super) fn links(value: Option<Value>) -> Result<Vec<Value>, Error> {
    let links = listed(value).unwrap_or_default();
    match links.len() > MAX_LINKS {
        true => Err(Error::Links),
        false => Ok(links),
    }
}

/// Adds an errback to a signature's own, unless it is present.
pub(super) fn append_errback(options: &mut Map<String, Value>, errback: &Value) {
    let mut errbacks = listed(options.remove("link_error")).unwrap_or_default();
    if !errbacks.contains(errback) {
        errbacks.push(errback.clone());
    }
    options.insert("link_error".into(), errbacks.into());
}

/// Adds an errback to each task of a group that is the body of a chord. A group with errbacks of its own replaces those
/// of its tasks by them, so it gets the new one as well.
pub(super) fn link_error_to_tasks(signature: &mut Signature, errback: &Value, runs_as_group: bool) {
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
        Form::Task | Form::Chain(_) => signature.add_errback(errback),
    }
}

fn append(options: &mut Map<String, Value>, name: &str, value: Value) {
    let mut list = listed(options.remove(name)).unwrap_or_default();
    if !list.contains(&value) {
        list.push(value);
    }
    options.insert(name.to_owned(), list.into());
}

fn parse(value: &Value, depth: usize) -> Result<Signature, Error> {
    let depth = depth.checked_sub(1).ok_or(Error::Depth)?;
    let fields = value.as_object().ok_or(Error::Form {
        what: "the whole",
        expected: "a mapping",
    })?;
    let nothing = Map::new();
    let mapping = |what| match fields.get(what) {
        None | Some(Value::Null) => Ok(&nothing),
        Some(Value::Object(map)) => Ok(map),
        Some(_) => Err(Error::Form {
            what,
            expected: "a mapping",
        }),
    };
    let args = match fields.get("args") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(args)) => args.clone(),
        Some(_) => {
            return Err(Error::Form {
                what: "args",
                expected: "a list",
            });
        }
    };
    let (options, immutable) = (
        mapping("options")?.clone(),
        fields.get("immutable") == Some(&Value::Bool(true)),
    );
    // Nested parts are parsed in place, without a copy.
    let kwargs = mapping("kwargs")?;
    let kind = match fields.get("subtask_type") {
        None | Some(Value::Null) => "",
        Some(Value::String(kind)) => kind,
        Some(other) => return Err(Error::Type(other.to_string())),
    };
    // Python creates chains and groups again from their tasks and options only.
    Ok(match kind {
        "" => Signature {
            task: text(fields, "task")
                .ok_or(Error::Form {
                    what: "task",
                    expected: "a name",
                })?
                .to_owned(),
            args,
            kwargs: kwargs.clone(),
            options,
            immutable,
            form: Form::Task,
            defect: None,
        },
        "chain" => {
            let tasks = tasks(kwargs.get("tasks"), "tasks", depth)?;
            Signature::compound("celery.chain", Form::Chain(tasks), options)
        }
        "group" => {
            let tasks = tasks(kwargs.get("tasks"), "tasks", depth)?;
            Signature::compound("celery.group", Form::Group(tasks), options)
        }
        "chord" => {
            let header = match kwargs.get("header") {
                Some(one @ Value::Object(_)) => match parse(one, depth)? {
                    Signature {
                        form: Form::Group(tasks) | Form::Chain(tasks),
                        ..
                    } => tasks,
                    single => vec![single],
                },
                list => tasks(list, "header", depth)?,
            };
            let body = parse(kwargs.get("body").unwrap_or(&Value::Null), depth)?;
            let inner = match kwargs.get("kwargs") {
                Some(Value::Object(inner)) => inner.clone(),
                _ => Map::new(),
            };
            Signature {
                args,
                kwargs: inner,
                options,
                immutable,
                ..chord(header, body)
            }
        }
        other => return Err(Error::Type(other.to_owned())),
    })
}

fn tasks(value: Option<&Value>, what: &'static str, depth: usize) -> Result<Vec<Signature>, Error> {
    let list = value.and_then(Value::as_array).ok_or(Error::Form {
        what,
        expected: "a list",
    })?;
    list.iter().map(|task| parse(task, depth)).collect()
}
