//! Counting the parts of a chord, by result backends that can.

use async_trait::async_trait;
use serde_json::Value;

use super::ResultError;
use celery_protocol::canvas::ResultNode;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::State;

/// A part that returned.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its task.
    pub task_id: String,
    /// Celery's name of its state.
    pub state: String,
    /// What it returned, or the exception as a mapping.
    pub result: Value,
}

/// What a part found when it was counted.
#[derive(Debug, Clone, PartialEq)]
pub enum Counted {
    /// Others are awaited, or the chord is over.
    NotLast,
    /// It was the last, and whoever counted it applies the body.
    Last(Claim),
    /// It was counted before and all are there, but somebody else is applying the body. If that one
    /// dies, nobody does.
    Held,
}

/// The right to apply a chord's body.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    pub(super) group_id: String,
    pub(super) token: String,
}

/// Counts the parts of chords as they return, so that exactly one worker applies the body.
#[async_trait]
pub trait ChordCounter: Send + Sync {
    /// Notes a chord before its header is sent: how many parts return, and the form of their
    /// results if there are groups among them.
    ///
    /// # Errors
    /// The backend's. Repeating it does no harm.
    async fn begin(
        &self,
        group_id: &str,
        size: usize,
        results: &[ResultNode],
    ) -> Result<(), ResultError>;

    /// Makes a chord wait for one more task, which a part of it is about to send. Celery's
    /// `add_to_chord` counts in the same place.
    ///
    /// # Errors
    /// The backend's. Repeating it for the same task does no harm.
    async fn grow(&self, group_id: &str, task_id: &str) -> Result<(), ResultError>;

    /// Counts a part. One that is no part of a group is none of a chord either.
    ///
    /// # Errors
    /// The backend's. Repeating it does no harm.
    async fn count(
        &self,
        message: &TaskMessage,
        state: &State,
        claim_seconds: u64,
    ) -> Result<Counted, ResultError>;

    /// The form of the results, where groups are among them.
    ///
    /// # Errors
    /// The backend's.
    async fn saved(&self, claim: &Claim) -> Result<Option<ResultNode>, ResultError>;

    /// All parts, in order.
    ///
    /// # Errors
    /// The backend's.
    async fn parts(&self, claim: &Claim) -> Result<Vec<Part>, ResultError>;

    /// Prolongs a claim; whether it still holds.
    ///
    /// # Errors
    /// The backend's.
    async fn keep(&self, claim: &Claim, seconds: u64) -> Result<bool, ResultError>;

    /// Clears a chord away whose body is applied.
    ///
    /// # Errors
    /// The backend's.
    async fn finish(&self, claim: &Claim, claim_seconds: u64) -> Result<bool, ResultError>;

    /// Ends a chord that failed: parts that come again find nothing to count against. What they
    /// returned stays, as with Python.
    ///
    /// # Errors
    /// The backend's.
    async fn fail(&self, claim: &Claim) -> Result<(), ResultError>;
}
