//! Tasks: the crate's [`Task`] trait, what a worker needs beyond it, and the registry.
//!
//! The crate's trait has no Python signature, no typed exception and no way to be told to stop;
//! [`WorkerTask`] adds them. A worker runs a task through [`Registry`], never through the crate's
//! own tracer, which loses messages whose arguments do not fit and leaks those that panic.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use celery::Celery;
use celery::error::{CeleryError, TaskError};
use celery::protocol::{Message, MessageHeaders, MessageProperties};
use celery::task::{Request, Task, TaskOptions};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::telemetry::panic_text;
use crate::wire::arguments::Signature;
use crate::wire::exception::{BUILTINS, Exception};
use crate::wire::message::TaskMessage;

/// A [`Task`] that this worker can run.
pub trait WorkerTask: Task<Returns: Serialize> + 'static {
    /// The Python function that producers believe they call.
    const SIGNATURE: Signature;

    /// What the task needs from the process that runs it, e.g. a database.
    type Context: Clone + Send + Sync + 'static;

    /// Completes what [`Task::from_request`] made.
    #[must_use]
    fn prepare(self, context: Self::Context, control: Control) -> Self;

    /// What a failed [`Task::run`] means. Called after [`Task::on_failure`], so that a task can
    /// say here whether that went well. By default an exception of Python's own kind.
    fn judge(&self, error: &TaskError) -> Failure {
        Failure::Raised(match error {
            TaskError::ExpectedError(text) | TaskError::UnexpectedError(text) => {
                Exception::new(BUILTINS, "RuntimeError", text)
            }
            other => Exception::new(BUILTINS, "RuntimeError", other.to_string()),
        })
    }
}

/// What the worker tells a running task.
#[derive(Debug, Clone)]
pub struct Control {
    /// The worker's node name.
    pub hostname: Arc<str>,
    /// Cancelled when the task has to stop now.
    pub cancelled: CancellationToken,
    /// Cancelled before [`Control::cancelled`] when its message does not go back to the queue:
    /// somebody terminated it.
    pub terminated: CancellationToken,
    /// Whether the broker delivered the message before, so that another run may have begun.
    pub redelivered: bool,
}

/// How a task failed.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// It raised: the result is FAILURE.
    Raised(Exception),
    /// It was stopped before its end and can be run again: the message goes back to the queue
    /// and there is no result yet.
    Interrupted,
    /// The result is somebody else's to tell: the message is done with, nothing is stored.
    Ignored,
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
    pub(super) run: Run,
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
        let run: Run = Arc::new(move |invocation| run::<T>(invocation, context.clone()).boxed());
        for name in names {
            let entry = Entry {
                function: T::SIGNATURE.function,
                run: run.clone(),
            };
            if self.tasks.insert(name.clone(), entry).is_some() {
                return Err(CeleryError::TaskRegistrationError(name.clone()));
            }
        }
        Ok(())
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
}

async fn run<T: WorkerTask>(invocation: Invocation, context: T::Context) -> Outcome {
    let Invocation {
        app,
        message,
        control,
    } = invocation;
    let bound = match T::SIGNATURE.bind(&message.args, &message.kwargs) {
        Ok(bound) => bound,
        Err(text) => return Outcome::raised(Exception::type_error(text)),
    };
    let params: T::Params = match serde_json::from_value(Value::Object(bound)) {
        Ok(params) => params,
        Err(error) => {
            let text = format!(
                "{}() argument of wrong type: {error}",
                T::SIGNATURE.function
            );
            return Outcome::raised(Exception::type_error(text));
        }
    };
    let options = merged(T::DEFAULTS, &app.task_options);
    let request = Request::new(app, crate_message(&message), params.clone());
    let task = T::from_request(request, options).prepare(context, control);

    // A panic is a failure like any other: the task's own `on_failure` must still hear of it.
    let result = AssertUnwindSafe(task.run(params))
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| {
            Err(TaskError::UnexpectedError(format!(
                "task panicked: {}",
                panic_text(&*panic)
            )))
        });
    match result {
        Ok(returned) => {
            task.on_success(&returned).await;
            match serde_json::to_value(&returned) {
                Ok(value) => Outcome::Returned(value),
                Err(error) => Outcome::raised(Exception::new(
                    "kombu.exceptions",
                    "EncodeError",
                    format!("result is not JSON: {error}"),
                )),
            }
        }
        Err(error) => {
            task.on_failure(&error).await;
            Outcome::Failed(task.judge(&error))
        }
    }
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
fn crate_message(message: &TaskMessage) -> Message {
    Message {
        properties: MessageProperties {
            correlation_id: message.correlation_id.clone(),
            content_type: crate::wire::message::JSON.into(),
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
