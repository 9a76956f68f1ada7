//! Canvas: the follow-up tasks of a task, from signatures to messages.
//!
//! A message contains the signatures of its task's follow-up tasks ([`super::message::Embed`]): callbacks, errbacks,
//! the rest of its chain, the body of its chord. Each of them can be a chain, a group or a chord itself. A worker that
//! applies it must do the same as a Python client: assign ids to its parts, turn a group with a following step into a
//! chord, pass the rest on. This module does so by the rules of `celery.canvas`: [`after_success`], [`after_failure`]
//! and [`chord_body`] return a [`Plan`] with the messages to send and the data to store, and send nothing themselves.
//!
//! Code builds signatures ([`Signature::new`], [`chain`], [`group`], [`chord`], `|`), and a client or a running task
//! applies them ([`apply`]). A signature can replace a running task ([`replace`]) or extend the chord that the task
//! belongs to ([`add_to_chord`]).
//!
//! Ids that a signature does not contain are derived from the id of the task that applies it ([`Call::parent_id`]);
//! they are not random. A task that runs again, because its worker died before the message was acknowledged, sends its
//! follow-up tasks again with the same ids, so that results do not multiply and each part of a chord is counted once.
//!
//! Signatures come from the network. Their nesting depth and the number of messages that one of them can cause are
//! limited.

mod apply;
mod builder;
mod compose;
mod failure;
mod freeze;
mod outgoing;
mod plan;
mod replace;
mod results;
mod signature;

pub use apply::{after_failure, after_success, apply, apply_all, chord_body};
pub use builder::Expiry;
pub use compose::{chain, chord, group};
pub use failure::{BodyFailure, body_failures, chord_error, failed_steps};
pub use freeze::freeze;
pub use outgoing::{Outgoing, Route};
pub use plan::{Call, Effect, Header, Plan, occasion};
pub use replace::{add_to_chord, replace};
pub use results::ResultNode;
pub use signature::{Form, Signature};

/// Maximum nesting depth of signatures.
const MAX_DEPTH: usize = 64;

/// Maximum number of messages that applying one signature may send.
const MAX_MESSAGES: usize = 100_000;

/// Maximum number of bytes of messages that applying one signature may send; every part of a chord contains the body of
/// the chord.
const MAX_BYTES: usize = 64 << 20;

/// Maximum memory of signatures that are read, in bytes; see [`super::weight`].
const MAX_WEIGHT: usize = 64 << 20;

/// Maximum memory of their copies while they are applied, in bytes. Each copy is counted before it is made.
const MAX_MEMORY: usize = 128 << 20;

/// Maximum number of bytes that are copied in total, one after the other.
const MAX_COPIED: usize = 1 << 30;

/// Maximum number of callbacks or errbacks that one signature passes to others. Each is compared with all existing
/// ones.
const MAX_LINKS: usize = 1000;

/// Reason why a signature cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// Part of the signature has the wrong form.
    #[error("{what} of a signature is not {expected}")]
    Form {
        /// Name of the part.
        what: &'static str,
        /// Expected form.
        expected: &'static str,
    },
    /// An argument or option is not JSON.
    #[error("an argument of `{task}` cannot be sent as JSON: {reason}")]
    Argument {
        /// Name of the task.
        task: String,
        /// Error of the serializer.
        reason: String,
    },
    /// The replacement of a task is part of a chord.
    #[error("a replacement must not be part of a chord; replace the task by the whole chord")]
    ReplacedByPart,
    /// The replacement of a task is an empty chain.
    #[error("a task cannot be replaced by an empty chain")]
    ReplacedByNothing,
    /// A task that is not part of a chord tried to add a task to its chord.
    #[error("the task is not part of a chord, so nothing can be added to it")]
    NotInChord,
    /// The chord cannot be extended, because the backend does not count its parts.
    #[error(
        "only the redis result backend counts the parts of a chord, so that it can be extended"
    )]
    NotExtensible,
    /// The kind of the signature is unknown.
    #[error("signature has unknown type `{0}`")]
    Type(String),
    /// The nesting is too deep.
    #[error("signatures are nested more than {MAX_DEPTH} deep")]
    Depth,
    /// Applying the signature would exceed the limit for messages.
    #[error(
        "signature would send more than {MAX_MESSAGES} messages or {} MB",
        MAX_BYTES >> 20
    )]
    Size,
    /// The signature would take too much memory.
    #[error(
        "signature would need more than {} MB of memory with all its copies",
        MAX_MEMORY >> 20
    )]
    Memory,
    /// The signature has too many callbacks or errbacks.
    #[error("signature passes more than {MAX_LINKS} callbacks or errbacks to other tasks")]
    Links,
    /// The signature requires a serializer for its messages that this crate cannot write.
    #[error("signature of `{task}` asks for serializer `{serializer}`; only `json` is supported")]
    Serializer {
        /// Name of the task.
        task: String,
        /// Name of the serializer.
        serializer: String,
    },
    /// The signature contains a chord, but the backend does not support chords.
    #[error(
        "chords (and groups that something follows) need a result backend that counts their parts: redis or a database"
    )]
    NoChords,
}

use SignatureError as Error;

#[cfg(test)]
mod limits;
#[cfg(test)]
mod tests;
