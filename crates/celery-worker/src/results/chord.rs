//! Counting the parts of a chord, for result backends that support it.

use async_trait::async_trait;
use serde_json::Value;

use super::ResultError;
use celery_protocol::canvas::ResultNode;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::State;

/// A part of a chord that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Id of the part's task.
    pub task_id: String,
    /// Celery's name of the part's state.
    pub state: String,
    /// Result of the part, or its exception as a mapping.
    pub result: Value,
}

/// Result of counting a part.
#[derive(Debug, Clone, PartialEq)]
pub enum Counted {
    /// Further parts are missing, or the chord has ended.
    NotLast,
    /// The part was the last one. The caller applies the body.
    Last(Claim),
    /// The part was counted before and all parts have ended, but another worker holds the claim. If that worker dies,
    /// the claim ends after some time.
    Held,
}

/// Exclusive right to apply a chord's body, for a limited time.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    pub(super) group_id: String,
    pub(super) token: String,
}

/// Counts the parts of chords that have ended, so that exactly one worker applies the body.
#[async_trait]
pub trait ChordCounter: Send + Sync {
    /// Records a chord before its header is sent: the number of its parts, and the structure of their results if the
    /// header contains groups.
    ///
    /// # Errors
    /// The backend reported an error. The call may be repeated.
    async fn begin(
        &self,
        group_id: &str,
        size: usize,
        results: &[ResultNode],
    ) -> Result<(), ResultError>;

    /// Adds one task to a chord, which a part of the chord is about to send, as Celery's `add_to_chord` does at this
    /// point.
    ///
    /// # Errors
    /// The backend reported an error. The call may be repeated for the same task.
    async fn grow(&self, group_id: &str, task_id: &str) -> Result<(), ResultError>;

    /// Counts a part. A task without a group is not part of a chord.
    ///
    /// # Errors
    /// The backend reported an error. The call may be repeated.
    async fn count(
        &self,
        message: &TaskMessage,
        state: &State,
        claim_seconds: u64,
    ) -> Result<Counted, ResultError>;

    /// Returns the structure of the results if the header contains groups.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn saved(&self, claim: &Claim) -> Result<Option<ResultNode>, ResultError>;

    /// Returns all parts, in order.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn parts(&self, claim: &Claim) -> Result<Vec<Part>, ResultError>;

    /// Extends a claim. Returns true if the caller holds it.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn keep(&self, claim: &Claim, seconds: u64) -> Result<bool, ResultError>;

    /// Removes the records of a chord whose body was applied.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn finish(&self, claim: &Claim, claim_seconds: u64) -> Result<bool, ResultError>;

    /// Ends a chord that failed: parts that are counted again have no effect. The results of the parts are kept, as in
    /// Python.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn fail(&self, claim: &Claim) -> Result<(), ResultError>;
}
