//! The caller of a signature, and the plan that results from applying it.

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::{Outgoing, ResultNode};
use crate::message::TaskMessage;

/// The caller that applies a signature: a client or a running task.
///
/// Ids that a signature does not contain are derived from [`Call::parent_id`] and [`Call::role`]. For a client, the
/// role is a new random text for each call. For a task, it identifies the occasion ([`Call::for_task`]), so that a
/// second run of the same message produces the same ids.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Id of the task that applies the signature; none for a client.
    pub parent_id: Option<&'a str>,
    /// Id of the workflow's first task; without it, each task is its own root.
    pub root_id: Option<&'a str>,
    /// The occasion: `link`, `chain` …; a random text for a client.
    pub role: &'a str,
    /// Value of `reply_to` for tasks that do not set it themselves.
    pub reply_to: &'a str,
    /// Name of the sending process, e.g. `gen123@host`.
    pub origin: &'a str,
    /// Current time, from which a countdown is measured.
    pub now: DateTime<Utc>,
    /// True if the result backend supports chords.
    pub chords: bool,
}

impl<'a> Call<'a> {
    /// The same call for a running task: its id is the parent, its root is the root.
    ///
    /// `role` must be different for each signature that the task applies, and equal for the same signature when the
    /// message is redelivered; [`occasion`] creates one from a counter.
    #[must_use]
    pub fn for_task(self, message: &'a TaskMessage, role: &'a str) -> Self {
        Self {
            parent_id: Some(&message.id),
            root_id: Some(message.root_id.as_deref().unwrap_or(&message.id)),
            role,
            ..self
        }
    }
}

/// Role of the `number`th signature that a run of a task applies.
///
/// It contains the numbers of retries and replacements: those runs have the id of the first one, but send new tasks. A
/// redelivered message has the same numbers, so a run that applies the same signatures in the same order sends the same
/// ids, and no result exists twice.
#[must_use]
pub fn occasion(message: &TaskMessage, number: u64) -> String {
    format!("send/{}.{}/{number}", nesting(message), message.retries)
}

/// Number of replacements of the task before this message.
pub(super) fn nesting(message: &TaskMessage) -> u64 {
    let nesting = message.headers.get("replaced_task_nesting");
    nesting.and_then(Value::as_u64).unwrap_or(0)
}

/// Effects of applying a signature, not executed yet.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// The effects, in order.
    pub effects: Vec<Effect>,
    /// Results of the tasks that are sent, for the `children` of the task that applies the signature.
    pub children: Vec<ResultNode>,
    /// Result of the last signature applied: of the last step of a chain, of the body of a chord. None if no task is
    /// sent.
    pub result: Option<ResultNode>,
}

/// One effect of applying a signature.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// A message is sent.
    Send(Box<Outgoing>),
    /// A chord begins. It must be recorded before its header is sent.
    Chord(Box<Header>),
    /// A chord waits for one more task. It must be recorded before the task is sent. Repeating it for the same task
    /// must have no further effect.
    ChordGrows {
        /// Id of the chord's group.
        group_id: String,
        /// Id of the additional task.
        task_id: String,
    },
}

/// A chord that begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Id of the group of its parts.
    pub group_id: String,
    /// Number of parts that are counted.
    pub size: usize,
    /// The results of the parts.
    pub results: Vec<ResultNode>,
    /// Message of `celery.chord_unlock`, for backends that do not count the parts.
    pub unlock: Outgoing,
}
