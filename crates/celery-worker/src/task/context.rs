//! Context of a running task.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use celery_protocol::Properties;
use celery_protocol::canvas::{Signature, SignatureError};
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::StateName;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::error::{Retry, TaskError, TaskResult};
use super::registry::{Failure, Registry};
use super::state_updates::{StateUpdates, UpdateStateError};
use crate::client::{AsyncResult, Client, SendError};
use crate::worker::Request;

tokio::task_local! {
    static CURRENT: TaskContext;
}

/// Failure of a task in the `celery` crate's types, as it was given to [`TaskContext::raise`].
#[cfg(feature = "celery-crate")]
pub(crate) type RaisedSlot = Arc<parking_lot::Mutex<Option<TaskError>>>;

/// Context of a running task: its message, and its connection to the worker.
///
/// A task receives it as an argument. Code that runs in a task of the `celery` crate, whose trait has no such
/// argument, calls [`TaskContext::current`].
#[derive(Clone)]
pub struct TaskContext {
    pub(crate) run: Arc<TaskRun>,
    /// Message of a call within the run, in place of the run's own; see [`TaskContext::call`].
    pub(crate) called: Option<Arc<TaskMessage>>,
    /// State of a task of the `celery` crate.
    pub(crate) state: Option<Arc<dyn Any + Send + Sync>>,
    #[cfg(feature = "celery-crate")]
    pub(crate) raised: Option<RaisedSlot>,
}

/// One run of a task, as the worker hands it to the task.
pub(crate) struct TaskRun {
    pub(crate) hostname: Arc<str>,
    pub(crate) request: Arc<Request>,
    /// Hard and soft time limit in seconds, of the message or of the task.
    pub(crate) limits: (Option<f64>, Option<f64>),
    pub(crate) signals: Signals,
    pub(crate) state_updates: StateUpdates,
    pub(crate) will_requeue: Box<dyn Fn() -> bool + Send + Sync>,
    /// The tasks of the worker.
    pub(crate) registry: Arc<Registry>,
    /// Client of the worker, from which that of this run is made when it is first used.
    pub(crate) worker_client: Client,
    pub(crate) client: OnceLock<Client>,
}

/// Requests to a running task to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    pub(crate) cancelled: CancellationToken,
    pub(crate) terminated: CancellationToken,
    pub(crate) soft_time_limit: CancellationToken,
    pub(crate) last: CancellationToken,
    pub(crate) shutting_down: CancellationToken,
}

impl TaskContext {
    pub(crate) fn new(run: TaskRun) -> Self {
        Self {
            run: Arc::new(run),
            called: None,
            state: None,
            #[cfg(feature = "celery-crate")]
            raised: None,
        }
    }

    /// The context of the task that runs the calling code; `None` outside of a task of the `celery` crate.
    #[must_use]
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Self::clone).ok()
    }

    /// Runs a future in which [`TaskContext::current`] returns this context.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        CURRENT.scope(self, future).await
    }

    /// The message that requested this run, named as in Celery: id, arguments, retries, group and so on.
    #[must_use]
    pub fn request(&self) -> &Arc<TaskMessage> {
        self.called.as_ref().unwrap_or(&self.run.request.message)
    }

    /// Node name of the worker, e.g. `celery@host`.
    #[must_use]
    pub fn hostname(&self) -> &str {
        &self.run.hostname
    }

    /// True if the broker delivered the message before, so that another run may have begun.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.run.request.redelivered
    }

    /// The properties of the message, as its sender set them.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        &self.run.request.raw.properties
    }

    /// Exchange to which the message was sent; empty for the default exchange.
    #[must_use]
    pub fn exchange(&self) -> &str {
        &self.run.request.exchange
    }

    /// Routing key with which the message was sent.
    #[must_use]
    pub fn routing_key(&self) -> &str {
        &self.run.request.routing_key
    }

    /// Time limit of this run, of the message or of the task.
    #[must_use]
    pub fn time_limit(&self) -> Option<Duration> {
        let (hard, _) = self.run.limits;
        hard.and_then(|limit| Duration::try_from_secs_f64(limit).ok())
    }

    /// Soft time limit of this run, of the message or of the task.
    #[must_use]
    pub fn soft_time_limit(&self) -> Option<Duration> {
        let (_, soft) = self.run.limits;
        soft.and_then(|limit| Duration::try_from_secs_f64(limit).ok())
    }

    /// Cancelled when the task has to stop now. A [cooperative](super::TaskOptions::cooperative) task ends by itself
    /// then; any other task is dropped where it waits.
    ///
    /// A task that has stopped early returns [`TaskError::Stopped`](super::TaskError::Stopped). After `terminate` its
    /// state is REVOKED, after a time limit FAILURE, and after a shutdown its message returns to the queue. Any other
    /// outcome counts as usual: a value is a success, an exception a failure.
    ///
    /// ```
    /// use celery_worker::prelude::*;
    /// use std::time::Duration;
    ///
    /// #[task(cooperative, acks_late)]
    /// async fn count_to(n: u32, cx: TaskContext) -> TaskResult<u32> {
    ///     for done in 0..n {
    ///         tokio::select! {
    ///             () = cx.cancelled().cancelled() => return Err(TaskError::Stopped),
    ///             () = tokio::time::sleep(Duration::from_secs(1)) => cx.progress(serde_json::json!({"done": done})),
    ///         }
    ///     }
    ///     Ok(n)
    /// }
    /// # let _ = count_to;
    /// ```
    #[must_use]
    pub fn cancelled(&self) -> &CancellationToken {
        &self.run.signals.cancelled
    }

    /// Cancelled before [`TaskContext::cancelled`] if the task is stopped for good, by `terminate` or a time limit: its
    /// message does not return to the queue.
    #[must_use]
    pub fn terminated(&self) -> &CancellationToken {
        &self.run.signals.terminated
    }

    /// Cancelled before [`TaskContext::cancelled`] if the reason is the soft time limit, as Python raises
    /// `SoftTimeLimitExceeded`. A [cooperative](super::TaskOptions::cooperative) task can catch it: it may continue until
    /// [`TaskContext::must_stop`], and its outcome counts as usual. It does not run again: if it returns
    /// [`TaskError::Stopped`](super::TaskError::Stopped), its exception is `SoftTimeLimitExceeded`, also at a shutdown.
    ///
    /// ```
    /// use celery_worker::prelude::*;
    /// use std::time::Duration;
    ///
    /// #[task(cooperative, soft_time_limit = 10)]
    /// async fn count(cx: TaskContext) -> TaskResult<u32> {
    ///     let mut done = 0;
    ///     while !cx.cancelled().is_cancelled() {
    ///         tokio::time::sleep(Duration::from_millis(100)).await;
    ///         done += 1;
    ///     }
    ///     match cx.soft_time_limit_exceeded().is_cancelled() {
    ///         true => Ok(done),
    ///         false => Err(TaskError::Stopped),
    ///     }
    /// }
    /// # let _ = count;
    /// ```
    #[must_use]
    pub fn soft_time_limit_exceeded(&self) -> &CancellationToken {
        &self.run.signals.soft_time_limit
    }

    /// Cancelled, like [`TaskContext::cancelled`], when the task has to stop now, but not by its soft time limit: by
    /// `terminate`, by its time limit or by a cold shutdown. A task that has caught its soft time limit observes it.
    ///
    /// ```
    /// use celery_worker::prelude::*;
    /// use std::time::Duration;
    ///
    /// #[task(cooperative, soft_time_limit = 10)]
    /// async fn copy(cx: TaskContext) -> TaskResult<&'static str> {
    ///     tokio::select! {
    ///         () = tokio::time::sleep(Duration::from_secs(60)) => return Ok("copied"),
    ///         () = cx.cancelled().cancelled() => {}
    ///     }
    ///     tokio::select! {
    ///         () = tokio::time::sleep(Duration::from_secs(5)) => Ok("saved what was copied"),
    ///         () = cx.must_stop().cancelled() => Err(TaskError::Stopped),
    ///     }
    /// }
    /// # let _ = copy;
    /// ```
    #[must_use]
    pub fn must_stop(&self) -> &CancellationToken {
        &self.run.signals.last
    }

    /// Cancelled when the worker begins to shut down, warm or cold. A task that waits for something and has not
    /// begun its work should end, so that another worker can do it.
    #[must_use]
    pub fn shutting_down(&self) -> &CancellationToken {
        &self.run.signals.shutting_down
    }

    /// True if the message returns to its queue if the task ends with [`TaskError::Stopped`](super::TaskError::Stopped)
    /// now. False once it is acknowledged or the task is [terminated](Self::terminated), and after the connection was
    /// lost by which it came: the broker has then given it to another worker, or to this one again.
    #[must_use]
    pub fn will_requeue(&self) -> bool {
        !self.terminated().is_cancelled() && (self.run.will_requeue)()
    }

    /// Reports progress: it becomes the result of the state PROGRESS and the field `progress` of an event
    /// `task-progress-reported`. Never waits, and can be called at any rate: the worker passes on the most recent value,
    /// at most every two seconds. A value other than a mapping is reported as `{"progress": value}`.
    pub fn progress(&self, value: impl Serialize) {
        let value = serde_json::to_value(value).unwrap_or_default();
        let progress = match value {
            Value::Object(map) => map,
            other => Map::from_iter([("progress".to_owned(), json!(other))]),
        };
        let updates = &self.run.state_updates;
        updates.report(StateName::PROGRESS, Value::Object(progress));
    }

    /// Sets the state of the task, as `self.update_state(state=…, meta=…)` does in Celery: clients see the name as the
    /// state and `meta` as the result. Returns when the state is stored, or when a later one has taken its place. A
    /// backend that cannot be reached does not fail the task: the worker logs it.
    ///
    /// ```
    /// use celery_worker::prelude::*;
    ///
    /// #[task]
    /// async fn relocate(files: Vec<String>, cx: TaskContext) -> TaskResult<()> {
    ///     cx.update_state("MOVING", serde_json::json!({"of": files.len()})).await?;
    ///     cx.update_state("VERIFYING", ()).await?;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    /// [`UpdateStateError`] if the name cannot be that of a state, or the value is not JSON.
    pub async fn update_state(
        &self,
        name: &str,
        meta: impl Serialize,
    ) -> Result<(), UpdateStateError> {
        let name = StateName::new(name.to_owned())?;
        let meta = serde_json::to_value(meta)?;
        self.run.state_updates.pass_on(name, meta).await;
        Ok(())
    }

    /// A client that sends tasks as children of this one: with its id as their parent, and with its root.
    ///
    /// ```
    /// use celery_worker::prelude::*;
    ///
    /// #[task]
    /// async fn thumbnail(image: String, width: u32) -> TaskResult<String> {
    ///     Ok(format!("{image}-{width}"))
    /// }
    ///
    /// #[task]
    /// async fn thumbnails(image: String, cx: TaskContext) -> TaskResult<()> {
    ///     for width in [64, 256] {
    ///         cx.client().send(thumbnail::s(image.clone(), width)).await?;
    ///     }
    ///     Ok(())
    /// }
    /// ```
    #[must_use]
    pub fn client(&self) -> &Client {
        let run = &self.run;
        run.client
            .get_or_init(|| run.worker_client.for_task(run.request.message.clone()))
    }

    /// Calls a task of the worker within this run, as Python code calls its function: with the arguments `args`, a list,
    /// and without the options of the task.
    pub(crate) async fn call(&self, task: &str, args: Value) -> TaskResult<Value> {
        let Some(registered) = self.run.registry.get(task) else {
            return Err(Exception::not_registered(task).into());
        };
        let message = TaskMessage {
            task: task.to_owned(),
            args,
            kwargs: Value::Object(Map::new()),
            ..self.run.request.message.outline()
        };
        let called = Self {
            called: Some(Arc::new(message)),
            ..self.clone()
        };
        match (registered.run)(called).await {
            // There is no message that could be sent again.
            Err(Failure::Task(TaskError::Retry(retry))) => {
                let cause = retry.exception;
                let error = cause.unwrap_or_else(|| Exception::retry("in the caller", None));
                Err(error.into())
            }
            Err(Failure::Task(error)) => Err(error),
            Err(Failure::WrongArguments(exception)) => Err(exception.into()),
            Ok(value) => Ok(value),
        }
    }

    /// Results of the tasks that this run has sent.
    pub(crate) fn sent(&self) -> Vec<Value> {
        let client = self.run.client.get();
        client.map(Client::children).unwrap_or_default()
    }

    /// Replaces this task by a signature: it gets the task's id, callbacks and place in a chain or chord, and this run
    /// ends without a result. Always returns an error, to be returned by the task: `return cx.replace(add::s(1, 2)).await`.
    ///
    /// The caller needs a result backend that stores results: over `rpc://` the replacement's result does not reach it,
    /// as with Celery.
    ///
    /// # Errors
    /// [`TaskError::Ignore`] once the replacement is sent; an exception if it cannot be sent.
    pub async fn replace<T>(&self, signature: impl Into<Signature>) -> TaskResult<T> {
        let client = self.client();
        let replaced = client
            .replace(&self.run.request.message, signature.into())
            .await;
        match replaced {
            Ok(_) => Err(TaskError::Ignore),
            Err(SendError::Signature(error)) => Err(not_a_replacement(error)),
            Err(error) => Err(error.into()),
        }
    }

    /// Adds a task to the chord that this task belongs to. Needs a result backend that counts the parts of chords.
    ///
    /// # Errors
    /// [`SendError`]
    pub async fn add_to_chord(
        &self,
        signature: impl Into<Signature>,
    ) -> Result<AsyncResult, SendError> {
        let client = self.client();
        client
            .add_to_chord(&self.run.request.message, signature.into())
            .await
    }

    /// Begins a request to run this task again later: `return Err(cx.retry().countdown(pause).into())`.
    #[must_use]
    pub fn retry(&self) -> Retry {
        Retry::default()
    }

    /// State with which a task of the `celery` crate was registered, if it is a `T`.
    #[must_use]
    pub fn state<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.state.clone()?.downcast().ok()
    }
}

/// The error of a signature that cannot replace a task, in Celery's words.
fn not_a_replacement(error: SignatureError) -> TaskError {
    let text = match error {
        SignatureError::ReplacedByNothing => "Cannot replace with an empty chain",
        SignatureError::ReplacedByPart => {
            "A signature replacing a task must not be part of a chord"
        }
        error => return error.into(),
    };
    Exception::new("celery.exceptions", "ImproperlyConfigured", text).into()
}

impl fmt::Debug for TaskContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskContext")
            .field("task", &self.run.request.message.task)
            .field("id", &self.run.request.message.id)
            .field("redelivered", &self.run.request.redelivered)
            .field("signals", &self.run.signals)
            .finish_non_exhaustive()
    }
}
