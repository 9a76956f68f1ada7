//! Chords: counts their parts, and applies or fails the body after the last part.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::unsent::UnsentTask;
use super::{Stopped, Workflow, WorkflowError};
use crate::offload::is_large;
use crate::results::ChordSupport;
use crate::results::chord::{ChordCounter, Claim, Counted, Part};
use celery_protocol::canvas::{self, Call, ResultNode, chord_error};
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{FinalState, State};
use service_connection::error_chain::chain;

/// Lifetime in seconds of the claim on a chord while its body is published.
const CLAIM_SECONDS: u64 = 60;
const CLAIM_RENEWAL: Duration = Duration::from_secs(20);

/// Pause between two checks whether another worker has acted.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Result of checking a chord's header.
#[derive(Debug)]
pub(crate) enum Unlock {
    /// The body was applied, or has failed.
    Done,
    /// Some of the header's tasks have not ended, or the backend cannot be queried.
    NotReady,
}

/// Failure of a chord.
#[derive(Debug)]
struct ChordFailure {
    /// Error that its body fails with.
    error: Exception,
    /// Cause of that error.
    cause: Exception,
}

/// The results of a chord's header, for its body.
type Joined = Result<Value, Box<ChordFailure>>;

impl Workflow {
    /// Checks if the tasks of a chord's header have ended, and applies the body in this case. `request` is the message
    /// of a `celery.chord_unlock` task.
    ///
    /// # Errors
    /// The worker stops.
    pub(crate) async fn unlock(
        &self,
        request: &TaskMessage,
        header: &ResultNode,
        body: &Value,
    ) -> Result<Unlock, Stopped> {
        let Some(found) = self.read_results(header).await else {
            return Ok(Unlock::NotReady);
        };
        let call = self.call(request, "chord");
        let failed = match collect(header, &found) {
            Ok(results) => match Box::pin(self.apply_body(body, results, &call)).await {
                Ok(()) => None,
                Err(WorkflowError::Stopped) => return Err(Stopped),
                Err(error) => Some(callback_error(&error)),
            },
            Err(failed) => Some(failed),
        };
        if let Some(failed) = failed {
            Box::pin(self.fail_chord(request, body, &failed)).await?;
        }
        Ok(Unlock::Done)
    }

    /// Fails the body of a chord when its header can no longer be polled.
    ///
    /// # Errors
    /// The worker stops.
    pub(crate) async fn fail_unpolled_chord(
        &self,
        request: &TaskMessage,
        body: &Value,
        why: &Exception,
    ) -> Result<(), Stopped> {
        let failed = ChordFailure::new("chord_unlock could not be retried: ", why.clone());
        Box::pin(self.fail_chord(request, body, &failed)).await
    }

    /// Fails the body of a chord and the tasks after it. Returns the failed tasks that are parts of other chords.
    async fn fail_body(
        &self,
        part: &TaskMessage,
        body: &Value,
        failed: &ChordFailure,
    ) -> Result<Vec<UnsentTask>, Stopped> {
        let ChordFailure { error, cause } = failed;
        tracing::error!(
            task_id = part.id,
            group_id = part.group,
            body = body["task"].as_str(),
            body_id = body["options"]["task_id"].as_str(),
            exception = error.headline(),
            "chord failed; its body is not applied"
        );
        let planning = || canvas::body_failures(body, error, cause);
        let failures = match self.large_work.work(is_large([body]), planning).await {
            Ok(failures) => failures,
            Err(error) => {
                tracing::error!(task_id = part.id, %error, "body of a chord is not a signature");
                return self.fail_unread(body, failed).await;
            }
        };
        let place = format!(
            "{} on {}, in chord",
            self.options.product.name, self.options.hostname
        );
        let state = |exception: &Exception| State::Failure {
            traceback: Some(exception.traceback(&place)),
            exception: exception.clone(),
        };
        let mut parts = Vec::new();
        for failure in failures {
            // Its errbacks run as if the body had run and failed. A caller that sees the failure finds them sent.
            let call = self.call(&failure.message, "link_error");
            let children = self
                .send_errbacks(&failure.message.id, &failure.errbacks, &call)
                .await?;
            let unsent = UnsentTask {
                state: state(&failure.exception),
                message: failure.message,
                children,
            };
            parts.extend(self.fail(unsent).await?);
        }
        if let Value::Array(rest) = &body["options"]["chain"] {
            for message in self.failed_steps(rest).await {
                parts.extend(self.fail(UnsentTask::new(message, state(error))).await?);
            }
        }
        Ok(parts)
    }

    /// Stores a failure for a chord body that is not a valid signature, if it has an id, because a caller may wait for
    /// its result.
    async fn fail_unread(
        &self,
        body: &Value,
        failed: &ChordFailure,
    ) -> Result<Vec<UnsentTask>, Stopped> {
        let state = State::Failure {
            exception: failed.error.clone(),
            traceback: None,
        };
        let mut parts = Vec::new();
        for message in self.failed_steps(std::slice::from_ref(body)).await {
            parts.extend(self.fail(UnsentTask::new(message, state.clone())).await?);
        }
        Ok(parts)
    }

    async fn fail_chord(
        &self,
        part: &TaskMessage,
        body: &Value,
        failed: &ChordFailure,
    ) -> Result<(), Stopped> {
        let parts = self.fail_body(part, body, failed).await?;
        self.count(parts).await
    }

    /// Counts parts of chords. A chord whose body fails can be a part of another chord, so the function repeats until
    /// no part remains.
    pub(super) async fn count(&self, mut parts: Vec<UnsentTask>) -> Result<(), Stopped> {
        let ChordSupport::Counted(chords) = &self.chords else {
            return Ok(());
        };
        while let Some(UnsentTask { message, state, .. }) = parts.pop() {
            let Some(body) = &message.embed.chord else {
                continue;
            };
            loop {
                let count = || chords.count(&message, &state, self.claim_seconds());
                let counted = self
                    .retry_until_reachable(&message.id, "a part of a chord is not counted", count)
                    .await?;
                match counted {
                    Some(Counted::Last(claim)) => {
                        let completing = self.complete(&**chords, &message, body, &claim);
                        parts.extend(Box::pin(completing).await?);
                        break;
                    }
                    // The message was redelivered, and the worker that had it before may have died while it held the
                    // claim, which ends by itself.
                    Some(Counted::Held) => self.pause(POLL_INTERVAL).await?,
                    Some(Counted::NotLast) | None => break,
                }
            }
        }
        Ok(())
    }

    /// Lifetime in seconds of a claim: long enough for the steps before publishing.
    fn claim_seconds(&self) -> u64 {
        self.options.join_timeout.as_secs().saturating_mul(2)
    }

    /// Applies the body of a chord whose parts have all ended, or fails it. Returns failed tasks that are parts of
    /// other chords.
    async fn complete(
        &self,
        chords: &dyn ChordCounter,
        part: &TaskMessage,
        body: &Value,
        claim: &Claim,
    ) -> Result<Vec<UnsentTask>, Stopped> {
        let task_id = part.id.as_str();
        let results = match self.join(chords, task_id, claim).await? {
            Ok(results) => results,
            Err(failed) => {
                let parts = self.fail_body(part, body, &failed).await?;
                let fail = || chords.fail(claim);
                self.retry_until_reachable(task_id, "a failed chord is not ended", fail)
                    .await?;
                return Ok(parts);
            }
        };
        let keep = || chords.keep(claim, CLAIM_SECONDS);
        let is_ours = self
            .retry_until_reachable(task_id, "a chord is not claimed", keep)
            .await?;
        let applied = match is_ours {
            Some(true) => {
                let call = self.call(part, "chord");
                tokio::select! {
                    applied = self.apply_body(body, results, &call) => Some(applied),
                    () = self.lose(chords, claim) => None,
                }
            }
            _ => None,
        };
        let Some(applied) = applied else {
            tracing::warn!(
                task_id,
                group_id = part.group,
                "the body of a chord was left to another worker, which has claimed it meanwhile"
            );
            return Ok(Vec::new());
        };
        let parts = match applied {
            Ok(()) => Vec::new(),
            Err(WorkflowError::Stopped) => return Err(Stopped),
            Err(error) => {
                let failed = callback_error(&error);
                self.fail_body(part, body, &failed).await?
            }
        };
        let finish = || chords.finish(claim, self.claim_seconds());
        self.retry_until_reachable(task_id, "a chord is not cleared away", finish)
            .await?;
        Ok(parts)
    }

    async fn apply_body(
        &self,
        body: &Value,
        results: Value,
        call: &Call<'_>,
    ) -> Result<(), WorkflowError> {
        let is_large = is_large([body, &results]);
        let planning = || canvas::chord_body(body, results, call);
        let plan = self.large_work.work(is_large, planning).await?;
        let task_id = call.parent_id.unwrap_or_default();
        self.carry_out(plan, task_id).await?;
        Ok(())
    }

    /// Renews a claim; returns when the claim is lost.
    async fn lose(&self, chords: &dyn ChordCounter, claim: &Claim) {
        loop {
            sleep(CLAIM_RENEWAL).await;
            // If the renewal fails, the claim remains valid for the rest of its lifetime.
            if let Ok(false) = chords.keep(claim, CLAIM_SECONDS).await {
                return;
            }
        }
    }

    /// Returns the results of a chord's parts, or the error for its body and the cause.
    async fn join(
        &self,
        chords: &dyn ChordCounter,
        task_id: &str,
        claim: &Claim,
    ) -> Result<Joined, Stopped> {
        let saved = || chords.saved(claim);
        let saved = self
            .retry_until_reachable(task_id, "a chord's header is not read", saved)
            .await?;
        if let Some(Some(header)) = saved {
            return self.join_groups(&header).await;
        }
        let parts = || chords.parts(claim);
        let parts = self
            .retry_until_reachable(task_id, "a chord's results are not read", parts)
            .await?;
        let values = parts.unwrap_or_default().into_iter().map(value_of);
        Ok(values.collect())
    }

    /// Returns the results of a header with groups, as nested lists. The results are stored before the parts are
    /// counted, but a replica of the backend may be behind.
    async fn join_groups(&self, header: &ResultNode) -> Result<Joined, Stopped> {
        let until = Instant::now() + self.options.join_timeout;
        loop {
            if let Some(found) = self.read_results(header).await {
                let joined = collect(header, &found);
                return Ok(joined.map_err(|failed| join_error(failed.cause)));
            }
            if Instant::now() >= until {
                let (class, text) = ("TimeoutError", "The operation timed out.");
                let timeout = Exception::new("celery.exceptions", class, text);
                return Ok(Err(join_error(timeout)));
            }
            self.pause(POLL_INTERVAL).await?;
        }
    }

    /// Returns the stored results of all tasks in a header; `None` unless all have ended.
    async fn read_results(&self, header: &ResultNode) -> Option<Vec<Value>> {
        let mut found = Vec::new();
        for task_id in header.task_ids() {
            match self.results.get(task_id).await {
                Ok(Some(meta)) if FinalState::of(&meta).is_some() => found.push(meta),
                Ok(_) => return None,
                Err(error) => {
                    tracing::warn!(
                        task_id,
                        error = %chain(&error),
                        "state of a part of a chord could not be read"
                    );
                    return None;
                }
            }
        }
        Some(found)
    }
}

impl ChordFailure {
    /// Creates a `ChordError` with a text that ends with the cause.
    fn new(text: &str, cause: Exception) -> Box<Self> {
        Box::new(Self {
            error: chord_error(format!("{text}{}", cause.repr())),
            cause,
        })
    }
}

/// Error of a chord with a failed part.
fn dependency_error(task_id: &str, cause: Exception) -> Box<ChordFailure> {
    ChordFailure::new(&format!("Dependency {task_id} raised "), cause)
}

/// Error of a chord with groups in its header whose results are failures or cannot be read.
fn join_error(cause: Exception) -> Box<ChordFailure> {
    ChordFailure::new("Join error: ", cause)
}

/// Error of a chord whose body cannot be sent.
fn callback_error(error: &WorkflowError) -> Box<ChordFailure> {
    ChordFailure::new("Callback error: ", error.exception())
}

fn value_of(part: Part) -> Joined {
    match FinalState::from_name(&part.state) {
        Some(state) if state.has_failed() => {
            Err(dependency_error(&part.task_id, exception(part.result)))
        }
        _ => Ok(part.result),
    }
}

/// Collects the values of stored results in the structure of the header; `found` has the header's order.
fn collect(header: &ResultNode, found: &[Value]) -> Joined {
    let mut found = found.iter();
    header.collect(&mut |task_id| {
        let meta = found.next().unwrap_or(&Value::Null);
        match FinalState::of(meta).is_some_and(FinalState::has_failed) {
            true => Err(dependency_error(task_id, exception(meta["result"].clone()))),
            false => Ok(meta["result"].clone()),
        }
    })
}

/// Converts a mapping into an exception.
fn exception(result: Value) -> Exception {
    serde_json::from_value(result).unwrap_or_else(|_| Exception::none())
}
