//! Tasks: the trait that a type implements, its arguments, its context and its failures.

mod args;
mod autoretry;
mod context;
mod error;
mod options;
mod rate_limit;
mod registry;
mod state_updates;

use celery_protocol::message::TaskMessage;
use serde::Serialize;

pub use args::{Arguments, TaskArgs};
pub(crate) use autoretry::Autoretry;
pub use celery_protocol::arguments::{FunctionSignature, Parameter};
pub use celery_worker_macros::TaskArgs;
#[cfg(feature = "celery-crate")]
pub(crate) use context::RaisedSlot;
pub use context::TaskContext;
pub(crate) use context::{Signals, TaskRun};
#[doc(hidden)]
pub use error::TaskReturn;
pub use error::{Ignore, Reject, Retry, TaskError, TaskResult, When};
pub use options::TaskOptions;
pub use rate_limit::RateLimit;
pub use registry::{DuplicateTask, Registry};
pub(crate) use registry::{Failure, Outcome, RegisteredTask, panicked};
#[cfg(feature = "celery-crate")]
pub(crate) use registry::{Run, arguments, returned_value, unless_stopped};
pub use state_updates::UpdateStateError;
pub(crate) use state_updates::{StateUpdate, StateUpdates};

/// A task of a worker: a value, so that its state is a field of it.
///
/// `#[task]` implements it for a function. A type that holds state can also implement it by hand:
///
/// ```
/// use celery_worker::prelude::*;
///
/// struct Greet {
///     greeting: String,
/// }
///
/// #[derive(TaskArgs)]
/// struct GreetArgs {
///     name: String,
/// }
///
/// impl Task for Greet {
///     const NAME: &'static str = "tasks.greet";
///     type Args = GreetArgs;
///     type Output = String;
///
///     async fn run(&self, args: GreetArgs, _cx: TaskContext) -> TaskResult<String> {
///         Ok(format!("{}, {}!", self.greeting, args.name))
///     }
/// }
///
/// let mut registry = Registry::default();
/// registry.register(Greet { greeting: "Hello".into() })?;
/// # Ok::<(), celery_worker::task::DuplicateTask>(())
/// ```
pub trait Task: Send + Sync + 'static {
    /// Name in messages.
    const NAME: &'static str;

    /// Name of the Python function, with which CPython's texts of `TypeError` begin: by default, the last part of
    /// [`Task::NAME`].
    const FUNCTION: &'static str = last_part(Self::NAME);

    /// True if the Python function takes `self` (`bind=True`), which counts in CPython's texts of `TypeError`.
    const BIND: bool = false;

    /// Options of the task.
    const OPTIONS: TaskOptions = TaskOptions::DEFAULT;

    /// Arguments.
    type Args: TaskArgs;

    /// Value that the task returns. It must serialize as JSON.
    type Output: Serialize + Send;

    /// Runs the task.
    ///
    /// # Errors
    /// [`TaskError`]: the failure, or the request to run again, to refuse the message, and so on.
    fn run(
        &self,
        args: Self::Args,
        cx: TaskContext,
    ) -> impl Future<Output = TaskResult<Self::Output>> + Send;

    /// Acts on a message that ends without a run: its task is revoked, it has expired, or its arguments do not
    /// fit and it is not retried. The worker calls it before the message's state is stored, and waits for it; a shutdown ends
    /// the wait and returns the message to its queue.
    fn discard(
        &self,
        _message: &TaskMessage,
        _reason: &Discarded,
    ) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// Reason why a message ends without a run of its task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discarded {
    /// The time until which it may begin (`expires`) has passed.
    Expired,
    /// The task was revoked through remote control, by its id or by a stamp. Such a request does not
    /// contain its sender.
    Revoked,
    /// Its arguments do not fit the task; CPython's text.
    WrongArguments(String),
}

/// The part of a dotted name behind the last dot.
const fn last_part(name: &'static str) -> &'static str {
    let bytes = name.as_bytes();
    let mut start = bytes.len();
    while start > 0 && bytes[start - 1] != b'.' {
        start -= 1;
    }
    name.split_at(start).1
}
