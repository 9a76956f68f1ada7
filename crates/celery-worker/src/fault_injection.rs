//! Steps at which a test makes the worker fail. A release cannot have them.

use std::sync::OnceLock;

#[cfg(not(debug_assertions))]
compile_error!("fault injection is for tests: a build without debug assertions must not have it");

/// A step of the worker at which a fault can be injected, after the step has had its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A message was accepted.
    TaskAccepted,
    /// The result is stored, and the message is not acknowledged.
    ResultStored,
    /// The message is acknowledged.
    Acknowledged,
    /// A round of the loop that passes on the deliveries of one queue.
    QueueConsumer,
    /// A round of the loop that keeps a subscription connected.
    Subscription,
}

/// A fault that the step has to act out. Faults of the process (a signal, say) are the hook's own.
#[derive(Debug)]
pub enum Fault {
    /// The answer of the step is lost; the step fails with this error.
    Fail(AnswerLost),
    /// The step is made again.
    Repeat,
    /// The loop panics.
    Panic,
}

/// Error of a step whose answer was lost.
#[derive(Debug, thiserror::Error)]
#[error("fault injected at `{0}`")]
pub struct AnswerLost(pub &'static str);

/// Decides about each step that is reached.
pub type Hook = fn(Step) -> Option<Fault>;

static HOOK: OnceLock<Hook> = OnceLock::new();

/// Installs the hook of the process. Only the first call has an effect.
pub fn install(hook: Hook) {
    HOOK.get_or_init(|| hook);
}

/// Calls the hook.
pub(crate) fn reach(step: Step) -> Option<Fault> {
    HOOK.get().and_then(|hook| hook(step))
}

/// Drops the answer of a step.
pub(crate) fn lose<T>(_answer: T) {}
