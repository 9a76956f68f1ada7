//! Builder for signatures, with the option names of Python's `apply_async`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Number, Value, json};

use super::{Error, Form, MAX_DEPTH, Signature};
use crate::isoformat;

/// Time after which a task must not start: a delay or a point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// After this delay, counted from sending.
    After(Duration),
    /// At this time.
    At(DateTime<Utc>),
}

impl From<Duration> for Expiry {
    fn from(delay: Duration) -> Self {
        Self::After(delay)
    }
}

impl From<DateTime<Utc>> for Expiry {
    fn from(at: DateTime<Utc>) -> Self {
        Self::At(at)
    }
}

impl From<&Signature> for Signature {
    fn from(signature: &Signature) -> Self {
        signature.clone()
    }
}

impl Signature {
    /// Creates the signature of one task, without arguments.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let add = Signature::new("tasks.add").arg(2).arg(3);
    /// assert_eq!((add.task.as_str(), add.args.len()), ("tasks.add", 2));
    /// ```
    #[must_use]
    pub fn new(task: impl Into<String>) -> Self {
        Self {
            task: task.into(),
            ..Self::compound("", Form::Task, Map::new())
        }
    }

    /// Appends a positional argument. A value that is not JSON (a map with keys that are not strings) is reported as an
    /// error when the signature is applied.
    ///
    /// The result of the previous step is inserted before a signature's own arguments, unless the signature is
    /// [immutable](Self::immutable).
    #[must_use]
    pub fn arg(mut self, value: impl Serialize) -> Self {
        if let Some(value) = self.converted(value) {
            self.args.push(value);
        }
        self
    }

    /// Appends positional arguments: a tuple, an array or a vector.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let copy = Signature::new("tasks.copy").args(("/from", "/to", 3));
    /// assert_eq!(copy.args.len(), 3);
    /// ```
    #[must_use]
    pub fn args(mut self, values: impl Serialize) -> Self {
        match self.converted(values) {
            Some(Value::Array(values)) => self.args.extend(values),
            Some(Value::Null) | None => {}
            Some(_) => self.report(Error::Argument {
                task: self.task.clone(),
                reason: "positional arguments are not a list or a tuple".into(),
            }),
        }
        self
    }

    /// Sets a keyword argument.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let add = Signature::new("tasks.add").kwarg("x", 2).kwarg("y", 3);
    /// assert_eq!(add.kwargs["y"], 3);
    /// ```
    #[must_use]
    pub fn kwarg(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        if let Some(value) = self.converted(value) {
            self.kwargs.insert(name.into(), value);
        }
        self
    }

    /// Sets keyword arguments: a map, or a struct by its fields.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// #[derive(serde::Serialize)]
    /// struct Copy { from: &'static str, retries: u32 }
    ///
    /// let copy = Signature::new("tasks.copy").kwargs(Copy { from: "/data", retries: 3 });
    /// assert_eq!(copy.kwargs["retries"], 3);
    /// ```
    #[must_use]
    pub fn kwargs(mut self, values: impl Serialize) -> Self {
        match self.converted(values) {
            Some(Value::Object(values)) => self.kwargs.extend(values),
            Some(Value::Null) | None => {}
            Some(_) => self.report(Error::Argument {
                task: self.task.clone(),
                reason: "keyword arguments are not a map or a struct".into(),
            }),
        }
        self
    }

    /// Sends to this queue. Without it, a client sends to its default queue.
    #[must_use]
    pub fn queue(self, queue: impl Into<String>) -> Self {
        self.option("queue", queue.into())
    }

    /// Sends through an exchange with a routing key, which must exist.
    #[must_use]
    pub fn exchange(self, exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        self.option("exchange", exchange.into())
            .option("routing_key", routing_key.into())
    }

    /// Delays the run, counted from sending. Takes precedence over [`Signature::eta`].
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// # use std::time::Duration;
    /// let later = Signature::new("tasks.add").countdown(Duration::from_millis(1500));
    /// assert_eq!(later.options["countdown"], 1.5);
    /// ```
    #[must_use]
    pub fn countdown(self, delay: Duration) -> Self {
        self.option("countdown", seconds(delay))
    }

    /// Delays the run until this time.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let at = chrono::DateTime::from_timestamp(1_800_000_000, 0).unwrap();
    /// let later = Signature::new("tasks.add").eta(at);
    /// assert_eq!(later.options["eta"], "2027-01-15T08:00:00.000000+00:00");
    /// ```
    #[must_use]
    pub fn eta(self, at: DateTime<Utc>) -> Self {
        self.option("eta", isoformat(at))
    }

    /// Sets the time after which the task must not start; its state is then `REVOKED`.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// # use std::time::Duration;
    /// let urgent = Signature::new("tasks.add").expires(Duration::from_secs(60));
    /// assert_eq!(urgent.options["expires"], 60);
    /// ```
    #[must_use]
    pub fn expires(self, expiry: impl Into<Expiry>) -> Self {
        match expiry.into() {
            Expiry::After(delay) => self.option("expires", seconds(delay)),
            Expiry::At(at) => self.option("expires", isoformat(at)),
        }
    }

    /// Sets the message priority, 0 to 255. On RabbitMQ higher is sooner, and only in queues declared
    /// with `x-max-priority`; on Redis 0 is the highest.
    #[must_use]
    pub fn priority(self, priority: u8) -> Self {
        self.option("priority", priority)
    }

    /// Sets the hard time limit, after which the worker stops the task.
    #[must_use]
    pub fn time_limit(self, limit: Duration) -> Self {
        self.option("time_limit", seconds(limit))
    }

    /// Sets the soft time limit, after which the task is asked to stop.
    #[must_use]
    pub fn soft_time_limit(self, limit: Duration) -> Self {
        self.option("soft_time_limit", seconds(limit))
    }

    /// Sets the id. Without it, a client chooses one that is unique.
    #[must_use]
    pub fn task_id(self, id: impl Into<String>) -> Self {
        self.option("task_id", id.into())
    }

    /// Controls storing of the result, in place of the task's own setting.
    #[must_use]
    pub fn ignore_result(self, ignore: bool) -> Self {
        self.option("ignore_result", ignore)
    }

    /// Sets the name that monitors show in place of the task's.
    #[must_use]
    pub fn shadow(self, name: impl Into<String>) -> Self {
        self.option("shadow", name.into())
    }

    /// Adds a message header.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let add = Signature::new("tasks.add").header("x-site", "chile");
    /// assert_eq!(add.options["headers"]["x-site"], "chile");
    /// ```
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        if let Some(value) = self.converted(value) {
            let headers = self.options.entry("headers").or_insert_with(|| json!({}));
            if !headers.is_object() {
                *headers = json!({});
            }
            headers[name.into()] = value;
        }
        self
    }

    /// Stamps every task of the signature and of its callbacks, so that they can be found, and revoked,
    /// together (`revoke_by_stamped_headers`). Callbacks linked later are not stamped.
    ///
    /// ```
    /// # use celery_protocol::canvas::{Signature, chain};
    /// let night = chain([Signature::new("tasks.a"), Signature::new("tasks.b")]).stamp("night", "2026-11-29");
    /// assert_eq!(night.to_json()["kwargs"]["tasks"][1]["options"]["night"], "2026-11-29");
    /// ```
    #[must_use]
    pub fn stamp(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        if let Some(value) = self.converted(value) {
            self.add_stamp(&name.into(), &value, MAX_DEPTH);
        }
        self
    }

    /// Ignores the result of the previous step: the signature runs with its own arguments only.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// // `notify` does not get the result of `add`.
    /// let workflow = Signature::new("tasks.add").args((2, 3)) | Signature::new("tasks.notify").immutable();
    /// assert_eq!(workflow.to_json()["kwargs"]["tasks"][1]["immutable"], true);
    /// ```
    #[must_use]
    pub fn immutable(mut self) -> Self {
        match &mut self.form {
            Form::Task | Form::Chord { .. } => self.immutable = true,
            Form::Group(tasks) => {
                for task in std::mem::take(tasks) {
                    tasks.push(task.immutable());
                }
            }
            // The first task of a chain receives the result of the previous step.
            Form::Chain(tasks) if tasks.is_empty() => {}
            Form::Chain(tasks) => {
                let first = tasks.remove(0);
                tasks.insert(0, first.immutable());
            }
        }
        self
    }

    /// Sets any option of Python's `apply_async` by its name.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let transient = Signature::new("tasks.add").option("delivery_mode", 1);
    /// assert_eq!(transient.options["delivery_mode"], 1);
    /// ```
    #[must_use]
    pub fn option(mut self, name: impl Into<String>, value: impl Serialize) -> Self {
        if let Some(value) = self.converted(value) {
            self.options.insert(name.into(), value);
        }
        self
    }

    /// Applies `callback` with the result when the task succeeds. The callbacks of a chain belong to
    /// its last task, those of a chord to its body; of a group, only the first task has them.
    ///
    /// ```
    /// # use celery_protocol::canvas::Signature;
    /// let add = Signature::new("tasks.add").args((2, 3)).link(Signature::new("tasks.report"));
    /// assert_eq!(add.options["link"][0]["task"], "tasks.report");
    /// ```
    #[must_use]
    pub fn link(mut self, callback: impl Into<Self>) -> Self {
        let callback = self.adopt(callback.into());
        self.add_callback(callback);
        self
    }

    /// Applies `errback` with the id of the failed task when a task of the signature fails.
    ///
    /// ```
    /// # use celery_protocol::canvas::{Signature, group};
    /// let tasks = group([Signature::new("tasks.a"), Signature::new("tasks.b")])
    ///     .link_error(Signature::new("tasks.alarm"));
    /// assert_eq!(tasks.to_json()["kwargs"]["tasks"][1]["options"]["link_error"][0]["task"], "tasks.alarm");
    /// ```
    #[must_use]
    pub fn link_error(mut self, errback: impl Into<Self>) -> Self {
        let errback = self.adopt(errback.into());
        self.add_errback(&errback);
        self
    }

    /// Checks that the signature can be sent: its arguments are JSON, and it is not nested too deep.
    ///
    /// # Errors
    /// The first error of the builder, or [`SignatureError::Depth`](super::SignatureError::Depth).
    pub fn check(&self) -> Result<(), Error> {
        self.check_within(MAX_DEPTH)
    }

    fn check_within(&self, depth: usize) -> Result<(), Error> {
        let depth = depth.checked_sub(1).ok_or(Error::Depth)?;
        if let Some(defect) = &self.defect {
            return Err(defect.clone());
        }
        match &self.form {
            Form::Task if self.task.is_empty() => Err(Error::Form {
                what: "task",
                expected: "a name",
            }),
            Form::Task => Ok(()),
            Form::Chain(tasks) | Form::Group(tasks) => {
                tasks.iter().try_for_each(|task| task.check_within(depth))
            }
            Form::Chord { header, body } => {
                header
                    .iter()
                    .try_for_each(|task| task.check_within(depth))?;
                body.check_within(depth)
            }
        }
    }

    /// A callback or errback as a value for the options. Its error becomes this signature's error.
    fn adopt(&mut self, other: Self) -> Value {
        match other.check() {
            Ok(()) => other.to_json(),
            Err(error) => {
                self.report(error);
                Value::Null
            }
        }
    }

    fn converted(&mut self, value: impl Serialize) -> Option<Value> {
        serde_json::to_value(value)
            .map_err(|error| {
                let (task, reason) = (self.task.clone(), error.to_string());
                self.report(Error::Argument { task, reason });
            })
            .ok()
    }

    /// Keeps an error, unless there is an earlier one.
    fn report(&mut self, error: Error) {
        self.defect.get_or_insert(error);
    }

    fn add_stamp(&mut self, name: &str, value: &Value, depth: usize) {
        let Some(depth) = depth.checked_sub(1) else {
            return self.report(Error::Depth);
        };
        for links in ["link", "link_error"] {
            let Some(Value::Array(links)) = self.options.get_mut(links) else {
                continue;
            };
            for link in links {
                if let Ok(mut signature) = Self::parse(link) {
                    signature.add_stamp(name, value, depth);
                    *link = signature.to_json();
                }
            }
        }
        match &mut self.form {
            Form::Task => {
                let names = self.options.entry("stamped_headers");
                let names = names.or_insert_with(|| json!([]));
                if let Value::Array(names) = names
                    && !names.iter().any(|known| known == name)
                {
                    names.push(name.into());
                }
                self.options.insert(name.to_owned(), value.clone());
            }
            Form::Chain(tasks) | Form::Group(tasks) => tasks
                .iter_mut()
                .for_each(|task| task.add_stamp(name, value, depth)),
            Form::Chord { header, body } => {
                let tasks = header.iter_mut().chain(std::iter::once(&mut **body));
                tasks.for_each(|task| task.add_stamp(name, value, depth));
            }
        }
    }
}

/// Seconds in Python's notation: as an integer if possible.
fn seconds(time: Duration) -> Value {
    match time.subsec_nanos() {
        0 => time.as_secs().into(),
        _ => Number::from_f64(time.as_secs_f64()).map_or(Value::Null, Value::Number),
    }
}
