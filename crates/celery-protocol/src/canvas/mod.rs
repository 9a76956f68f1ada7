//! Canvas: what follows a task, from signatures to messages.
//!
//! A message carries signatures of the tasks that follow it ([`super::message::Embed`]): callbacks,
//! errbacks, the rest of its chain, the body of its chord. Any of them can be a chain, a group or a
//! chord itself, and whoever applies it has to do all that a Python client does: give ids to its
//! parts, make a chord of a group that something follows, hand the rest on. This does it by the rules
//! of `celery.canvas`: [`after_success`], [`after_failure`] and [`chord_body`] say what is to be sent
//! and what is to be noted ([`Plan`]), and send nothing.
//!
//! In code, signatures are built ([`Signature::new`], [`chain`], [`group`], [`chord`], `|`) and
//! applied by a client or a running task ([`apply`]); a running task can also be replaced
//! ([`replace`]), and extend the chord that it is a part of ([`add_to_chord`]).
//!
//! Ids that a signature leaves open are derived from the id of the task that applies it
//! ([`Call::parent_id`]), not drawn. A task that is run again, because its worker died before the
//! message was acknowledged, sends what follows it again; with the same ids, so that results do not
//! multiply and the parts of a chord are counted once.
//!
//! Signatures come from the network. How deep they are nested, and how much one of them can be made
//! to send, is limited.

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

pub use apply::{after_failure, after_success, apply, chord_body};
pub use builder::Expiry;
pub use compose::{chain, chord, group};
pub use failure::{BodyFailure, body_failures, chord_error, failed_steps};
pub use freeze::freeze;
pub use outgoing::{Outgoing, Route};
pub use plan::{Call, Effect, Header, Plan, occasion};
pub use replace::{add_to_chord, replace};
pub use results::ResultNode;
pub use signature::{Form, Signature};

/// Signatures within signatures.
const MAX_DEPTH: usize = 64;

/// Messages that applying one signature may send.
const MAX_MESSAGES: usize = 100_000;

/// Bytes of messages that applying one signature may send; every part of a chord carries the body
/// of the chord.
const MAX_BYTES: usize = 64 << 20;

/// Maximum memory of signatures that are read, in bytes; see [`super::weight`].
const MAX_WEIGHT: usize = 64 << 20;

/// Maximum memory of their copies while they are applied, in bytes. Each copy is counted before it is
/// made.
const MAX_MEMORY: usize = 128 << 20;

/// Maximum number of bytes that are copied in total, one after the other.
const MAX_COPIED: usize = 1 << 30;

/// Maximum number of callbacks or errbacks that one signature hands to others. Each is compared with all
/// existing ones.
const MAX_LINKS: usize = 1000;

/// Why a signature cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Not what a signature looks like.
    #[error("{what} of a signature is not {expected}")]
    Form {
        /// Which part.
        what: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// An argument or option that is not JSON.
    #[error("an argument of `{task}` cannot be sent as JSON: {reason}")]
    Argument {
        /// The task.
        task: String,
        /// The serializer's error.
        reason: String,
    },
    /// A task is replaced by a part of a chord.
    #[error("a replacement must not be part of a chord; replace the task by the whole chord")]
    ReplacedByPart,
    /// A task is replaced by nothing.
    #[error("a task cannot be replaced by an empty chain or group")]
    ReplacedByNothing,
    /// A task that is in no chord is to add to its chord.
    #[error("the task is not part of a chord, so nothing can be added to it")]
    NotInChord,
    /// A chord that is to be extended, where its parts are not counted.
    #[error(
        "only the redis result backend counts the parts of a chord, so that it can be extended"
    )]
    NotExtensible,
    /// A kind of signature that there is not.
    #[error("signature has unknown type `{0}`")]
    Type(String),
    /// Nested too deep.
    #[error("signatures are nested more than {MAX_DEPTH} deep")]
    Depth,
    /// It would send too much.
    #[error(
        "signature would send more than {MAX_MESSAGES} messages or {} MB",
        MAX_BYTES >> 20
    )]
    Size,
    /// The signature would take too much memory.
    #[error(
        "signature would take more than {} MB with all its copies",
        MAX_MEMORY >> 20
    )]
    Memory,
    /// The signature has too many callbacks or errbacks.
    #[error("signature hands more than {MAX_LINKS} callbacks or errbacks to others")]
    Links,
    /// The messages are to be written in a way that this worker does not write.
    #[error("signature of `{task}` asks for serializer `{serializer}`; there is only `json`")]
    Serializer {
        /// The task.
        task: String,
        /// The serializer.
        serializer: String,
    },
    /// A chord, where nobody would count its parts.
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
