//! Tasks: the crate's [`Task`] trait, what a worker needs beyond it, and the registry.
//!
//! The crate's trait has no Python signature, no typed exception and no way to be told to stop;
//! [`WorkerTask`] adds them. A worker runs a task through [`Registry`], never through the crate's
//! own tracer, which loses messages whose arguments do not fit and leaks those that panic.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use celery::Celery;
use celery::error::{CeleryError, TaskError};
use celery::protocol::{MessageHeaders, MessageProperties};
use celery::task::{Request, Task, TaskOptions};
use chrono::{DateTime, Utc};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::discard::{Discard, Discarded};
use super::rate::RateLimit;
use crate::aside::{aside, is_large};
use celery_protocol::arguments::Signature;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::isoformat;
use celery_protocol::message::TaskMessage;
use celery_protocol::retry::Changes;
use service_connection::error_chain::panic_text;

/// A [`Task`] that this worker can run.
pub trait WorkerTask: Task<Returns: Serialize> + 'static {
    /// The Python function that producers believe they call.
    const SIGNATURE: Signature;

    /// What differs from the worker's settings, beyond the crate's [`Task::DEFAULTS`].
    const ATTRIBUTES: Attributes = Attributes::NONE;

    /// What the task needs from the process that runs it, e.g. a database.
    type Context: Clone + Send + Sync + 'static;

    /// Completes what [`Task::from_request`] made.
    #[must_use]
    fn prepare(self, context: Self::Context, control: Control) -> Self;

    /// Does the task's part in the end of a message that is not run: it is revoked, it has expired, or
    /// its arguments do not fit. Called before the message is acknowledged, which waits for this; where
    /// the worker stops meanwhile, the message goes back.
    fn discard(
        _message: &TaskMessage,
        _context: &Self::Context,
        _reason: &Discarded,
    ) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// What a failed [`Task::run`] means. Called after [`Task::on_failure`], so that a task can
    /// say here whether that went well. By default [`TaskError::Retry`] is a retry, and everything
    /// else an exception of Python's own kind.
    fn judge(&self, error: &TaskError) -> Failure {
        match error {
            TaskError::Retry(eta) => Retry {
                when: eta.map(When::At),
                ..Retry::default()
            }
            .into(),
            TaskError::ExpectedError(text) | TaskError::UnexpectedError(text) => {
                Failure::Raised(Exception::new(BUILTINS, "RuntimeError", text))
            }
            other => Failure::Raised(Exception::new(BUILTINS, "RuntimeError", other.to_string())),
        }
    }
}

/// What a task has otherwise than the worker's settings say, by Celery's names. `None` leaves a
/// thing to the setting.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    /// Whether the message is acknowledged after the run rather than before.
    pub acks_late: Option<bool>,
    /// Whether, with late acknowledgement, a failure is acknowledged rather than rejected.
    pub acks_on_failure: Option<bool>,
    /// Whether, with late acknowledgement, a run that was too long is acknowledged rather than
    /// requeued.
    pub acks_on_timeout: Option<bool>,
    /// Whether nothing is stored, where the message does not say.
    pub ignore_result: Option<bool>,
    /// Whether failures are stored all the same.
    pub store_errors_even_if_ignored: Option<bool>,
    /// Whether STARTED is stored.
    pub track_started: Option<bool>,
    /// Time limit in seconds, where the message has none.
    pub time_limit: Option<f64>,
    /// Soft time limit in seconds, likewise.
    pub soft_time_limit: Option<f64>,
    /// Retries before a task that asks for one fails. Celery's default is 3.
    pub max_retries: Option<u32>,
    /// Pause before a retry that names none. Celery's default is 180 s.
    pub default_retry_delay: Option<Duration>,
    /// How many may begin in a time.
    pub rate_limit: Option<RateLimit>,
    /// Whether the task watches [`Control::cancelled`] and puts things in order when it has to
    /// stop. Any other task is dropped at the point where it waits.
    pub stops_itself: bool,
}

impl Attributes {
    /// Everything as the settings say.
    pub const NONE: Self = Self {
        acks_late: None,
        acks_on_failure: None,
        acks_on_timeout: None,
        ignore_result: None,
        store_errors_even_if_ignored: None,
        track_started: None,
        time_limit: None,
        soft_time_limit: None,
        max_retries: None,
        default_retry_delay: None,
        rate_limit: None,
        stops_itself: false,
    };

    /// Completed from what the crate has names for.
    fn or(self, crates: &TaskOptions) -> Self {
        Self {
            acks_late: self.acks_late.or(crates.acks_late),
            time_limit: self.time_limit.or(crates.hard_time_limit.map(f64::from)),
            soft_time_limit: self.soft_time_limit.or(crates.time_limit.map(f64::from)),
            max_retries: self.max_retries.or(crates.max_retries),
            default_retry_delay: self.default_retry_delay.or(crates
                .min_retry_delay
                .map(|seconds| Duration::from_secs(seconds.into()))),
            ..self
        }
    }
}

/// What the worker tells a running task, and what it hears from it.
#[derive(Debug, Clone)]
pub struct Control {
    /// The worker's node name.
    pub hostname: Arc<str>,
    /// The message that asked for the run.
    pub request: Arc<TaskMessage>,
    /// Cancelled when the task has to stop now.
    pub cancelled: CancellationToken,
    /// Cancelled before [`Control::cancelled`] when its message does not go back to the queue:
    /// somebody terminated it, or it ran too long.
    pub terminated: CancellationToken,
    /// Cancelled when a shutdown begins, warm or cold. A task that has not begun its work, and waits for
    /// something, is interrupted then, so that another worker can do it.
    pub shutting_down: CancellationToken,
    /// Whether the broker delivered the message before, so that another run may have begun.
    pub redelivered: bool,
    /// Takes how far the task is.
    pub progress: Progress,
    /// Tells what becomes of the message if the task is interrupted.
    pub message: Message,
}

/// The message of a running task, as far as the task may want to know of it.
#[derive(Clone)]
pub struct Message(pub(super) Arc<dyn Fn() -> bool + Send + Sync>);

impl Message {
    /// Whether it goes back to its queue if the task is interrupted now. False once it was
    /// acknowledged, and when the connection that it came by is lost: the broker has then given it
    /// to somebody, who may have found the task running and let it go.
    #[must_use]
    pub fn goes_back(&self) -> bool {
        (self.0)()
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("goes_back", &self.goes_back())
            .finish()
    }
}

/// Takes a running task's progress: a mapping, which becomes the result of the state PROGRESS and
/// the field `progress` of a `progress-reported` event.
#[derive(Debug, Clone)]
pub struct Progress(pub(super) watch::Sender<Option<Map<String, Value>>>);

impl Progress {
    /// Notes how far the task is. Never waits, and may be called at any rate: what is passed on is
    /// the last word, every so often.
    pub fn report(&self, progress: Map<String, Value>) {
        self.0.send_replace(Some(progress));
    }
}

/// How a task failed.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// It raised: the result is FAILURE.
    Raised(Exception),
    /// It wants to be run again later.
    Retry(Box<Retry>),
    /// It refuses its message: to the dead-letter exchange, or back to the queue.
    Rejected {
        /// Why.
        reason: Value,
        /// Whether it goes back.
        requeue: bool,
    },
    /// It was stopped before its end and can be run again: the message goes back to the queue
    /// and there is no result yet.
    Interrupted,
    /// The result is somebody else's to tell: the message is done with, nothing is stored.
    Ignored,
}

impl From<Exception> for Failure {
    fn from(exception: Exception) -> Self {
        Self::Raised(exception)
    }
}

impl From<Retry> for Failure {
    fn from(retry: Retry) -> Self {
        Self::Retry(Box::new(retry))
    }
}

/// A wish to be run again.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Retry {
    /// What went wrong; it is the result once there are no more retries.
    pub exception: Option<Exception>,
    /// When; by default after the task's `default_retry_delay`.
    pub when: Option<When>,
    /// How often at most, in place of the task's own limit. `u32::MAX` is without limit.
    pub max_retries: Option<u32>,
    /// What is different in the next run.
    pub changes: Changes,
}

/// When a task is run again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// After this time (`countdown`).
    In(Duration),
    /// At this time (`eta`).
    At(DateTime<Utc>),
}

impl fmt::Display for When {
    /// As Celery's `Retry` says it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In(delay) => write!(f, "in {}s", delay.as_secs_f64()),
            Self::At(eta) => write!(f, "at {}", isoformat(*eta).replacen('T', " ", 1)),
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It returned.
    Returned(Value),
    /// It did not.
    Failed(Failure),
}

impl Outcome {
    fn raised(exception: Exception) -> Self {
        Self::Failed(Failure::Raised(exception))
    }
}

/// One run of a task.
pub(super) struct Invocation {
    pub(super) app: Arc<Celery>,
    pub(super) message: Arc<TaskMessage>,
    pub(super) control: Control,
}

type Run = Arc<dyn Fn(Invocation) -> BoxFuture<'static, Outcome> + Send + Sync>;

/// The tasks that a worker answers, by the names on the wire.
#[derive(Clone, Default)]
pub struct Registry {
    tasks: HashMap<String, Entry>,
}

/// A registered task.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) function: &'static str,
    pub(super) attributes: Attributes,
    pub(super) run: Run,
    /// None where the task has no part in the end of messages that are not run.
    pub(super) discard: Option<Discard>,
}

impl Registry {
    /// Registers `T` with the app, and under every one of `names` for messages.
    ///
    /// # Errors
    /// [`CeleryError::TaskRegistrationError`] if the app or another task has such a name.
    pub async fn register<T: WorkerTask>(
        &mut self,
        app: &Celery,
        names: &[String],
        context: T::Context,
    ) -> Result<(), CeleryError> {
        app.register_task::<T>().await?;
        let discard: Discard = {
            let context = context.clone();
            Arc::new(move |message, reason| {
                let context = context.clone();
                async move { T::discard(&message, &context, &reason).await }.boxed()
            })
        };
        let run: Run = Arc::new(move |invocation| run::<T>(invocation, context.clone()).boxed());
        for name in names {
            self.enter(
                name,
                Entry {
                    function: T::SIGNATURE.function,
                    attributes: T::ATTRIBUTES.or(&T::DEFAULTS),
                    run: run.clone(),
                    discard: Some(discard.clone()),
                },
            )?;
        }
        Ok(())
    }

    /// Registers a function as the task `name`, without a type of its own: for tasks that need no
    /// more of the crate's task model than to be run. Its arguments come as a tuple, in the order
    /// of `signature`, with null for those that were not given.
    ///
    /// # Errors
    /// [`CeleryError::TaskRegistrationError`] if there is a task of that name.
    pub fn function<P, R, F>(
        &mut self,
        name: &str,
        signature: Signature,
        attributes: Attributes,
        function: impl Fn(P, Control) -> F + Send + Sync + 'static,
    ) -> Result<(), CeleryError>
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize + 'static,
        F: Future<Output = Result<R, Failure>> + Send + 'static,
    {
        let function = Arc::new(function);
        let run: Run = Arc::new(move |invocation: Invocation| {
            let function = function.clone();
            async move {
                let Invocation {
                    message, control, ..
                } = invocation;
                let stop = (!attributes.stops_itself).then(|| control.cancelled.clone());
                let arguments = match arguments(&signature, &message, Signature::in_order) {
                    Ok(arguments) => arguments,
                    Err(exception) => return Outcome::raised(exception),
                };
                let running = AssertUnwindSafe(function(arguments, control)).catch_unwind();
                match unless_stopped(stop, running).await {
                    None => Outcome::Failed(Failure::Interrupted),
                    Some(Ok(Ok(returned))) => returned_value(&returned),
                    Some(Ok(Err(failure))) => Outcome::Failed(failure),
                    Some(Err(panic)) => Outcome::raised(panicked(&*panic)),
                }
            }
            .boxed()
        });
        self.enter(
            name,
            Entry {
                function: signature.function,
                attributes,
                run,
                discard: None,
            },
        )
    }

    fn enter(&mut self, name: &str, entry: Entry) -> Result<(), CeleryError> {
        match self.tasks.entry(name.to_owned()) {
            hash_map::Entry::Occupied(_) => {
                Err(CeleryError::TaskRegistrationError(name.to_owned()))
            }
            hash_map::Entry::Vacant(free) => {
                free.insert(entry);
                Ok(())
            }
        }
    }

    /// The names, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tasks.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        self.tasks.get(name)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tasks
            .iter()
            .map(|(name, entry)| (name.as_str(), entry))
    }
}

async fn run<T: WorkerTask>(invocation: Invocation, context: T::Context) -> Outcome {
    let Invocation {
        app,
        message,
        control,
    } = invocation;
    let params: T::Params = match arguments(&T::SIGNATURE, &message, |_, bound| bound.into()) {
        Ok(params) => params,
        Err(exception) => {
            let reason = Discarded::WrongArguments(exception.headline());
            let discarding = T::discard(&message, &context, &reason);
            return match control.cancelled.run_until_cancelled(discarding).await {
                Some(()) => Outcome::raised(exception),
                None => Outcome::Failed(Failure::Interrupted),
            };
        }
    };
    let stop = (!T::ATTRIBUTES.stops_itself).then(|| control.cancelled.clone());
    let options = merged(T::DEFAULTS, &app.task_options);
    let request = Request::new(app, crate_message(&message), params.clone());
    let task = T::from_request(request, options).prepare(context, control);

    // A panic is a failure like any other: the task's own `on_failure` must still hear of it.
    let running = AssertUnwindSafe(task.run(params)).catch_unwind();
    let Some(result) = unless_stopped(stop, running).await else {
        return Outcome::Failed(Failure::Interrupted);
    };
    let result = result.unwrap_or_else(|panic| {
        Err(TaskError::UnexpectedError(format!(
            "task panicked: {}",
            panic_text(&*panic)
        )))
    });
    match result {
        Ok(returned) => {
            task.on_success(&returned).await;
            returned_value(&returned)
        }
        Err(error) => {
            task.on_failure(&error).await;
            Outcome::Failed(task.judge(&error))
        }
    }
}

/// A message's arguments, bound to the parameters and put into the form `shape`.
fn arguments<P: DeserializeOwned>(
    signature: &Signature,
    message: &TaskMessage,
    shape: impl Fn(&Signature, Map<String, Value>) -> Value,
) -> Result<P, Exception> {
    aside(is_large([&message.args, &message.kwargs]), || {
        let bound = signature
            .bind(&message.args, &message.kwargs)
            .map_err(Exception::type_error)?;
        serde_json::from_value(shape(signature, bound)).map_err(|error| {
            Exception::type_error(format!(
                "{}() argument of wrong type: {error}",
                signature.function
            ))
        })
    })
}

/// Runs to the end, or drops it where it waits when `stop` is cancelled.
async fn unless_stopped<R>(
    stop: Option<CancellationToken>,
    running: impl Future<Output = R>,
) -> Option<R> {
    match stop {
        None => Some(running.await),
        Some(stop) => stop.run_until_cancelled(running).await,
    }
}

fn returned_value(returned: &impl Serialize) -> Outcome {
    match serde_json::to_value(returned) {
        Ok(value) => Outcome::Returned(value),
        Err(error) => Outcome::raised(Exception::new(
            "kombu.exceptions",
            "EncodeError",
            format!("result is not JSON: {error}"),
        )),
    }
}

/// The exception of a panic.
pub(super) fn panicked(panic: &(dyn std::any::Any + Send)) -> Exception {
    let text = format!("task panicked: {}", panic_text(panic));
    Exception::new(BUILTINS, "RuntimeError", text)
}

/// A task's own options, completed from the app's.
fn merged(own: TaskOptions, app: &TaskOptions) -> TaskOptions {
    TaskOptions {
        time_limit: own.time_limit.or(app.time_limit),
        hard_time_limit: own.hard_time_limit.or(app.hard_time_limit),
        max_retries: own.max_retries.or(app.max_retries),
        min_retry_delay: own.min_retry_delay.or(app.min_retry_delay),
        max_retry_delay: own.max_retry_delay.or(app.max_retry_delay),
        retry_for_unexpected: own.retry_for_unexpected.or(app.retry_for_unexpected),
        acks_late: own.acks_late.or(app.acks_late),
        content_type: own.content_type.or(app.content_type),
    }
}

/// The message in the crate's own form, which [`Request::new`] reads. The body stays behind: it is
/// bound already.
fn crate_message(message: &TaskMessage) -> celery::protocol::Message {
    celery::protocol::Message {
        properties: MessageProperties {
            correlation_id: message.correlation_id.clone(),
            content_type: celery_protocol::message::JSON.into(),
            content_encoding: "utf-8".into(),
            reply_to: message.reply_to.clone(),
        },
        headers: MessageHeaders {
            id: message.id.clone(),
            task: message.task.clone(),
            lang: None,
            root_id: message.root_id.clone(),
            parent_id: message.parent_id.clone(),
            group: message.group.clone(),
            meth: None,
            shadow: message.shadow.clone(),
            eta: message.eta,
            expires: message.expires,
            retries: Some(message.retries),
            timelimit: (
                whole_seconds(message.time_limit.0),
                whole_seconds(message.time_limit.1),
            ),
            argsrepr: message.argsrepr.clone(),
            kwargsrepr: message.kwargsrepr.clone(),
            origin: message.origin.clone(),
        },
        raw_body: Vec::new(),
    }
}

/// The crate counts time limits in whole seconds; a fraction is rounded up.
fn whole_seconds(limit: Option<f64>) -> Option<u32> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "casts saturate"
    )]
    limit.map(|seconds| seconds.ceil() as u32)
}
