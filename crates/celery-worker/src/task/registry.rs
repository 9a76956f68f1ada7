//! The tasks of a worker.

use std::borrow::Cow;
use std::collections::{HashMap, hash_map};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use celery_protocol::arguments::{FunctionSignature, Parameter};
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use serde_json::Value;
use service_connection::error_chain::panic_text;
use tokio_util::sync::CancellationToken;

use super::{
    Arguments, Autoretry, Discarded, Task, TaskArgs, TaskContext, TaskError, TaskOptions,
    TaskResult,
};
use crate::offload::{is_large, offload};

/// End of a run: the value that the task returned, or its failure.
pub(crate) type Outcome = Result<Value, Failure>;

/// Reason why a run has no value.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The task returned an error.
    Task(TaskError),
    /// The arguments do not fit, so that the task did not run.
    WrongArguments(Exception),
}

impl From<TaskError> for Failure {
    fn from(error: TaskError) -> Self {
        Self::Task(error)
    }
}

/// Runs a task.
pub(crate) type Run = Arc<dyn Fn(TaskContext) -> BoxFuture<'static, Outcome> + Send + Sync>;

/// Acts on a message that ends without a run.
pub(crate) type Discard =
    Arc<dyn Fn(Arc<TaskMessage>, Discarded) -> BoxFuture<'static, ()> + Send + Sync>;

/// The tasks that a worker runs, by their names in messages.
#[derive(Clone, Default)]
pub struct Registry {
    tasks: HashMap<String, RegisteredTask>,
}

/// A registered task.
#[derive(Clone)]
pub(crate) struct RegisteredTask {
    pub(crate) function: Cow<'static, str>,
    pub(crate) parameters: Cow<'static, [Parameter]>,
    pub(crate) options: TaskOptions,
    pub(crate) autoretry: Autoretry,
    pub(crate) run: Run,
    pub(crate) discard: Discard,
}

/// Error of a registration: there is a task of this name already.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("two tasks have the name `{0}`; give one of them another name")]
pub struct DuplicateTask(pub String);

impl Registry {
    /// Registers a task under its own name.
    ///
    /// # Errors
    /// [`DuplicateTask`]
    pub fn register<T: Task>(&mut self, task: T) -> Result<(), DuplicateTask> {
        self.register_as([T::NAME], task)
    }

    /// Registers a task under other names.
    ///
    /// # Errors
    /// [`DuplicateTask`]
    pub fn register_as<T: Task>(
        &mut self,
        names: impl IntoIterator<Item = impl Into<String>>,
        task: T,
    ) -> Result<(), DuplicateTask> {
        let task = Arc::new(task);
        let run: Run = {
            let task = task.clone();
            Arc::new(move |cx| run(task.clone(), cx).boxed())
        };
        let discard: Discard = Arc::new(move |message, reason| {
            let task = task.clone();
            async move { task.discard(&message, &reason).await }.boxed()
        });
        let registered = RegisteredTask {
            function: T::FUNCTION.into(),
            parameters: T::Args::PARAMETERS.into(),
            options: T::OPTIONS,
            autoretry: Autoretry::new(&T::OPTIONS),
            run,
            discard,
        };
        self.enter(names, &registered)
    }

    pub(crate) fn enter(
        &mut self,
        names: impl IntoIterator<Item = impl Into<String>>,
        registered: &RegisteredTask,
    ) -> Result<(), DuplicateTask> {
        for name in names {
            match self.tasks.entry(name.into()) {
                hash_map::Entry::Occupied(taken) => {
                    return Err(DuplicateTask(taken.key().clone()));
                }
                hash_map::Entry::Vacant(free) => {
                    free.insert(registered.clone());
                }
            }
        }
        Ok(())
    }

    /// Names of the tasks, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tasks.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    pub(crate) fn get(&self, name: &str) -> Option<&RegisteredTask> {
        self.tasks.get(name)
    }

    pub(crate) fn tasks(&self) -> impl Iterator<Item = (&str, &RegisteredTask)> {
        self.tasks.iter().map(|(name, task)| (name.as_str(), task))
    }
}

async fn run<T: Task>(task: Arc<T>, cx: TaskContext) -> Outcome {
    let signature = FunctionSignature {
        function: Cow::Borrowed(T::FUNCTION),
        parameters: Cow::Borrowed(T::Args::PARAMETERS),
        bound: T::BIND,
    };
    let args = arguments(&signature, cx.request(), T::Args::from_bound);
    let args = args.map_err(Failure::WrongArguments)?;
    let stop = (!T::OPTIONS.cooperative).then(|| cx.cancelled().clone());
    let running = AssertUnwindSafe(task.run(args, cx)).catch_unwind();
    match unless_stopped(stop, running).await {
        None => Err(TaskError::Stopped.into()),
        Some(Ok(Ok(returned))) => Ok(returned_value(&returned)?),
        Some(Ok(Err(error))) => Err(error.into()),
        Some(Err(panic)) => Err(TaskError::Raised(panicked(&*panic)).into()),
    }
}

/// The arguments of a message, bound to the parameters of a function and converted.
pub(crate) fn arguments<A>(
    signature: &FunctionSignature,
    message: &TaskMessage,
    convert: impl FnOnce(Arguments<'_>) -> Result<A, serde_json::Error>,
) -> Result<A, Exception> {
    offload(is_large([&message.args, &message.kwargs]), || {
        let bound = Arguments::bind(signature, &message.args, &message.kwargs);
        let bound = bound.map_err(Exception::type_error)?;
        convert(bound).map_err(|error| {
            let text = format_args!("argument of wrong type: {error}");
            Exception::type_error(signature.type_error(text))
        })
    })
}

/// Runs a future to its end, or drops it where it waits when `stop` is cancelled.
pub(crate) async fn unless_stopped<R>(
    stop: Option<CancellationToken>,
    running: impl Future<Output = R>,
) -> Option<R> {
    match stop {
        None => Some(running.await),
        Some(stop) => stop.run_until_cancelled(running).await,
    }
}

/// The value that a task returned, as JSON.
pub(crate) fn returned_value(returned: &impl Serialize) -> TaskResult<Value> {
    serde_json::to_value(returned).map_err(|error| {
        TaskError::Raised(Exception::new(
            "kombu.exceptions",
            "EncodeError",
            format!("result is not JSON: {error}"),
        ))
    })
}

/// The exception of a panic.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Exception {
    Exception::runtime_error(format!("task panicked: {}", panic_text(panic)))
}
