//! What follows a task: callbacks, chains, chords.
//!
//! [`celery_protocol::canvas`] says what is to be sent; this sends it, and keeps the books that chords
//! need. Everything is confirmed by the broker before the task's result is stored, or, of what
//! follows a failure, before the message is acknowledged. A broker or backend that is away is waited
//! for, until a shutdown ends the wait ([`super::SETTLED_WITHIN`]); the message then goes back to its
//! queue, and the worker that runs the task again sends the same ids again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::STORE_PAUSES;
use crate::aside::{Desk, is_large};
use crate::broker::{BrokerError, Publication, Sending, TaskQueues, TracePropagation, Transport};
use crate::results::chord::{Chords, Claim, Counted, Part};
use crate::results::{ChordSupport, ResultBackend, ResultError};
use celery_protocol::canvas::{
    self, Call, Effect, Outgoing, Plan, ResultNode, Route, SignatureError, chord_error,
};
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::message::{Embed, TaskMessage};
use celery_protocol::result::{ResultMeta, State};
use service_connection::backoff::{Attempts, Setback, in_seconds};
use service_connection::error_chain::chain;

/// Time limit for publishing before a failure is logged.
const PUBLISH_WITHIN: Duration = Duration::from_secs(10);

/// How often a message is offered that the broker refuses, e.g. because its queue is full.
/// Python's default is one try and three more.
const OFFERS: u32 = 4;

/// Messages that wait for the broker's confirm at a time.
const IN_FLIGHT: usize = 64;

/// How long the claim on a chord is kept while its body is published, in seconds, and how often it
/// is renewed.
const CLAIM_SECONDS: u64 = 60;
const CLAIM_RENEWAL: Duration = Duration::from_secs(20);

/// Pause between two looks at something that somebody else is about to do.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The worker stops at once: the message has to go back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stopped;

/// Why what follows a task was not sent.
#[derive(Debug)]
pub(super) enum CanvasError {
    /// The worker stops at once.
    Stopped,
    /// A signature cannot be applied.
    Signature(SignatureError),
    /// The broker refuses a message.
    Refused(BrokerError),
}

impl CanvasError {
    /// What the task fails with.
    pub(super) fn exception(&self) -> Exception {
        match self {
            Self::Signature(error @ SignatureError::NoChords) => {
                Exception::new(BUILTINS, "NotImplementedError", error.to_string())
            }
            Self::Signature(error @ SignatureError::Serializer { .. }) => {
                Exception::new("kombu.exceptions", "EncodeError", error.to_string())
            }
            Self::Signature(error) => Exception::invalid_task(error.to_string()),
            Self::Refused(_) | Self::Stopped => {
                Exception::new("kombu.exceptions", "OperationalError", self.to_string())
            }
        }
    }
}

impl fmt::Display for CanvasError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the worker stops"),
            Self::Signature(error) => error.fmt(f),
            Self::Refused(error) => chain(error).fmt(f),
        }
    }
}

impl From<Stopped> for CanvasError {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<SignatureError> for CanvasError {
    fn from(error: SignatureError) -> Self {
        Self::Signature(error)
    }
}

/// How the tasks that follow are sent.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// Node name of the worker.
    pub(super) hostname: Arc<str>,
    /// Queue of tasks that name none.
    pub(super) default_queue: String,
    /// How queues are declared.
    pub(super) queues: TaskQueues,
    /// How long the results of a chord's header may be on their way when all its parts have
    /// returned.
    pub(super) join_timeout: Duration,
    /// Carries a task's trace to those that follow it.
    pub(super) propagation: Arc<dyn TracePropagation>,
}

/// What a look at a chord's header found.
#[derive(Debug)]
pub(super) enum Unlock {
    /// The body is applied, or has failed.
    Done,
    /// Some of its tasks are not done, or the backend does not say.
    NotReady,
}

/// Does what follows a worker's tasks.
pub(super) struct Canvas {
    transport: Arc<dyn Transport>,
    results: Arc<dyn ResultBackend>,
    chords: ChordSupport,
    options: Options,
    /// Nobody reads it, as nobody reads a Python worker's.
    reply_to: String,
    origin: String,
    /// For signatures of which much may be made.
    desk: Desk,
    stopping: CancellationToken,
}

/// How a chord fails.
#[derive(Debug)]
struct ChordFailure {
    /// What its body fails with.
    error: Exception,
    /// What lies behind that.
    cause: Exception,
}

/// The results of a chord's header, for its body.
type Joined = Result<Value, Box<ChordFailure>>;

/// A task that was not sent, and fails.
struct Unsent {
    message: TaskMessage,
    state: State,
}

impl Canvas {
    pub(super) fn new(
        transport: Arc<dyn Transport>,
        results: Arc<dyn ResultBackend>,
        options: Options,
        stopping: CancellationToken,
    ) -> Self {
        let host = options.hostname.rsplit('@').next().unwrap_or_default();
        Self {
            origin: format!("gen{}@{host}", std::process::id()),
            chords: results.chords(),
            reply_to: Uuid::new_v4().to_string(),
            desk: Desk::default(),
            transport,
            results,
            options,
            stopping,
        }
    }

    /// Sends what follows a task that returned, before its SUCCESS is stored: the callbacks and the
    /// next step of its chain. The results of those are the task's children.
    ///
    /// # Errors
    /// [`CanvasError`]: the task fails, or, if the worker stops, goes back.
    pub(super) async fn succeeded(
        &self,
        message: &TaskMessage,
        returned: &Value,
    ) -> Result<Vec<Value>, CanvasError> {
        let embed = &message.embed;
        if embed.callbacks.is_empty() && embed.chain.as_ref().is_none_or(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let call = self.call(message, "link");
        let rest = embed.chain.iter().flatten();
        let values = embed.callbacks.iter().chain(rest).chain([returned]);
        let planning = || canvas::after_success(message, returned, &call);
        let plan = self.desk.work(is_large(values), planning).await?;
        // Boxed, here and below: most tasks are followed by nothing, and need not carry the room for it.
        Box::pin(self.carry_out(plan, &message.id)).await
    }

    /// Does what follows a task that failed, after its FAILURE is stored: the rest of its chain fails
    /// with it, and its errbacks are sent.
    ///
    /// # Errors
    /// That the worker stops.
    pub(super) async fn failed(
        &self,
        message: &TaskMessage,
        exception: &Exception,
        traceback: Option<&str>,
    ) -> Result<(), Stopped> {
        if let Some(rest) = &message.embed.chain {
            let state = State::Failure {
                exception: exception.clone(),
                traceback: traceback.map(str::to_owned),
            };
            let mut parts = Vec::new();
            for step in self.failed_steps(rest).await {
                let state = state.clone();
                let message = step;
                parts.extend(self.fail(Unsent { message, state }).await?);
            }
            self.count(parts).await?;
        }
        self.send_errbacks(
            &message.id,
            &message.embed.errbacks,
            &self.call(message, "link_error"),
        )
        .await
    }

    /// Counts a task for its chord, after its final state is stored; the last one applies the
    /// chord's body, or fails it.
    ///
    /// # Errors
    /// That the worker stops.
    pub(super) async fn returned(
        &self,
        message: &TaskMessage,
        state: &State,
    ) -> Result<(), Stopped> {
        if message.embed.chord.is_none() {
            return Ok(());
        }
        // Without its arguments, which can be large.
        let part = TaskMessage {
            id: message.id.clone(),
            root_id: message.root_id.clone(),
            group: message.group.clone(),
            group_index: message.group_index,
            embed: Embed {
                chord: message.embed.chord.clone(),
                ..Embed::default()
            },
            ..TaskMessage::default()
        };
        let part = Unsent {
            message: part,
            state: state.clone(),
        };
        Box::pin(self.count(vec![part])).await
    }

    /// Looks whether the tasks of a chord's header are done, and applies the body if so:
    /// `celery.chord_unlock`, of which `request` is the message.
    ///
    /// # Errors
    /// That the worker stops.
    pub(super) async fn unlock(
        &self,
        request: &TaskMessage,
        header: &ResultNode,
        body: &Value,
    ) -> Result<Unlock, Stopped> {
        let Some(found) = self.look(header).await else {
            return Ok(Unlock::NotReady);
        };
        let call = self.call(request, "chord");
        let failed = match gather(header, &found) {
            Ok(results) => match Box::pin(self.apply_body(body, results, &call)).await {
                Ok(()) => None,
                Err(CanvasError::Stopped) => return Err(Stopped),
                Err(error) => Some(callback_error(&error)),
            },
            Err(failed) => Some(failed),
        };
        if let Some(failed) = failed {
            Box::pin(self.fail_chord(request, body, &failed)).await?;
        }
        Ok(Unlock::Done)
    }

    /// Fails the body of a chord that cannot be watched any more.
    ///
    /// # Errors
    /// That the worker stops.
    pub(super) async fn give_up(
        &self,
        request: &TaskMessage,
        body: &Value,
        why: &Exception,
    ) -> Result<(), Stopped> {
        let failed = ChordFailure::new("chord_unlock could not be retried: ", why.clone());
        Box::pin(self.fail_chord(request, body, &failed)).await
    }

    fn call<'a>(&'a self, message: &'a TaskMessage, role: &'static str) -> Call<'a> {
        Call {
            parent_id: Some(&message.id),
            root_id: Some(message.root_id.as_deref().unwrap_or(&message.id)),
            role,
            reply_to: &self.reply_to,
            origin: &self.origin,
            now: Utc::now(),
            chords: !matches!(self.chords, ChordSupport::None),
        }
    }

    // ---------------------------------------------------------------- sending

    /// Does what a plan says; the children.
    async fn carry_out(&self, plan: Plan, task_id: &str) -> Result<Vec<Value>, CanvasError> {
        let mut children = Vec::new();
        let mut waiting = Vec::new();
        for effect in plan.effects {
            match effect {
                Effect::Send(outgoing) => waiting.push(*outgoing),
                Effect::Chord(header) => match &self.chords {
                    ChordSupport::Counted(chords) => {
                        let begin = || chords.begin(&header.group_id, header.size, &header.results);
                        self.patiently(task_id, "a chord is not noted", hopeless, begin)
                            .await?;
                    }
                    ChordSupport::Polled => {
                        children.extend(ResultNode::parse(&as_result(&header.unlock)));
                        waiting.push(header.unlock);
                    }
                    ChordSupport::None => return Err(SignatureError::NoChords.into()),
                },
                Effect::ChordGrows {
                    group_id,
                    task_id: added,
                } => {
                    let ChordSupport::Counted(chords) = &self.chords else {
                        return Err(SignatureError::NotExtensible.into());
                    };
                    let grow = || chords.grow(&group_id, &added);
                    self.patiently(task_id, "a chord is not extended", hopeless, grow)
                        .await?;
                }
            }
        }
        stream::iter(waiting)
            .map(|outgoing| self.send(outgoing, task_id))
            .buffered(IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        children.extend(plan.children);
        Ok(children.iter().map(ResultNode::to_json).collect())
    }

    async fn send(&self, outgoing: Outgoing, task_id: &str) -> Result<(), CanvasError> {
        let mut publication = self.publication(outgoing);
        let sending = Sending::begin(&mut publication, &*self.options.propagation);
        let sent = self.publish(&publication, task_id).await;
        sending.end(&sent);
        sent
    }

    /// Publishes the follow-up tasks of a task, and waits without a limit for the broker and its confirmation. A
    /// pending message is not published again.
    ///
    /// # Errors
    /// [`CanvasError::Refused`] for what the broker will never take, and [`CanvasError::Stopped`].
    pub(super) async fn publish(
        &self,
        publication: &Publication,
        task_id: &str,
    ) -> Result<(), CanvasError> {
        let mut attempts = Attempts::new(STORE_PAUSES);
        let mut refusals = 0;
        loop {
            let publishing = self
                .transport
                .publish_until_confirmed(publication, PUBLISH_WITHIN);
            let published = self.stopping.run_until_cancelled(publishing).await;
            let Err(error) = published.ok_or(Stopped)? else {
                return Ok(());
            };
            match error {
                BrokerError::Unreachable { .. }
                | BrokerError::Timeout { .. }
                | BrokerError::Blocked { .. } => {}
                BrokerError::Refused { .. } if refusals + 1 < OFFERS => refusals += 1,
                error => return Err(CanvasError::Refused(error)),
            }
            let Setback { pause, is_news } = attempts.failed(&error);
            if is_news {
                tracing::warn!(
                    task_id,
                    routing_key = publication.routing_key,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "what follows the task was not sent; its message stays unacknowledged until it is"
                );
            }
            self.pause(pause).await?;
        }
    }

    fn publication(&self, Outgoing { message, route }: Outgoing) -> Publication {
        let queue = match route {
            Route::Exchange { name, routing_key } => {
                return Publication {
                    exchange: name,
                    routing_key,
                    message,
                    declare: None,
                    mandatory: true,
                };
            }
            Route::Queue(queue) => queue,
            Route::Default => self.options.default_queue.clone(),
        };
        let delay = due_in(&message);
        let route = self.options.queues.route(&queue, delay);
        Publication {
            exchange: route.exchange,
            routing_key: route.routing_key,
            message,
            declare: Some(route.declare),
            mandatory: true,
        }
    }

    /// Sends the errbacks of a task. A broken one does not change that the task failed: it is
    /// reported here, and that is all.
    async fn send_errbacks(
        &self,
        task_id: &str,
        errbacks: &[Value],
        call: &Call<'_>,
    ) -> Result<(), Stopped> {
        let planning = || canvas::after_failure(task_id, errbacks, call);
        let sent = match self.desk.work(is_large(errbacks), planning).await {
            Ok(plan) => self.carry_out(plan, task_id).await,
            Err(error) => Err(error.into()),
        };
        match sent {
            Ok(_) => Ok(()),
            Err(CanvasError::Stopped) => Err(Stopped),
            Err(error) => {
                tracing::error!(task_id, %error, "errbacks of a failed task were not sent");
                Ok(())
            }
        }
    }

    // ---------------------------------------------------------------- failing

    async fn failed_steps(&self, chain: &[Value]) -> Vec<TaskMessage> {
        let looking = || canvas::failed_steps(chain);
        self.desk.work(is_large(chain), looking).await
    }

    /// Stores the failure of a task that was not sent. If it is a part of a chord and had not failed
    /// before, it is to be counted.
    async fn fail(&self, unsent: Unsent) -> Result<Option<Unsent>, Stopped> {
        let Unsent { message, state } = &unsent;
        let mut counts = message.embed.chord.is_some();
        if counts {
            let get = || self.results.get(&message.id);
            let stored = self
                .patiently(&message.id, "a result is not read", never, get)
                .await?
                .flatten();
            counts = !stored.is_some_and(|meta| has_failed(&meta));
        }
        if message.ignore_result != Some(true) {
            let meta = ResultMeta::new(message, state.clone(), Utc::now());
            let store = || self.results.store(&meta, message);
            self.patiently(&message.id, "a result is not stored", never, store)
                .await?;
        }
        Ok(counts.then_some(unsent))
    }

    /// Fails the body of a chord, and what follows it; the parts of other chords among that.
    async fn fail_body(
        &self,
        part: &TaskMessage,
        body: &Value,
        failed: &ChordFailure,
    ) -> Result<Vec<Unsent>, Stopped> {
        let ChordFailure { error, cause } = failed;
        tracing::error!(
            task_id = part.id,
            group_id = part.group,
            body = body["task"].as_str(),
            body_id = body["options"]["task_id"].as_str(),
            exception = error.headline(),
            "chord failed; its body is not applied"
        );
        let looking = || canvas::body_failures(body, error, cause);
        let failures = match self.desk.work(is_large([body]), looking).await {
            Ok(failures) => failures,
            Err(error) => {
                tracing::error!(task_id = part.id, %error, "the chord's body is no signature");
                return self.fail_unread(body, failed).await;
            }
        };
        let place = format!("ccat-transfer on {}, in chord", self.options.hostname);
        let state = |exception: &Exception| State::Failure {
            traceback: Some(exception.traceback(&place)),
            exception: exception.clone(),
        };
        let mut parts = Vec::new();
        for failure in failures {
            let unsent = Unsent {
                state: state(&failure.exception),
                message: failure.message.clone(),
            };
            parts.extend(self.fail(unsent).await?);
            // As if it had run.
            let call = self.call(&failure.message, "link_error");
            self.send_errbacks(&failure.message.id, &failure.errbacks, &call)
                .await?;
        }
        if let Value::Array(rest) = &body["options"]["chain"] {
            for message in self.failed_steps(rest).await {
                let state = state(error);
                parts.extend(self.fail(Unsent { message, state }).await?);
            }
        }
        Ok(parts)
    }

    /// Stores a failure for the body of a chord that cannot be read as a signature, if it has an id: a
    /// caller that waits for it must get an answer.
    async fn fail_unread(
        &self,
        body: &Value,
        failed: &ChordFailure,
    ) -> Result<Vec<Unsent>, Stopped> {
        let state = State::Failure {
            exception: failed.error.clone(),
            traceback: None,
        };
        let mut parts = Vec::new();
        for message in self.failed_steps(std::slice::from_ref(body)).await {
            let state = state.clone();
            parts.extend(self.fail(Unsent { message, state }).await?);
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

    // ---------------------------------------------------------------- chords

    /// Counts parts of chords. A chord whose body fails can be a part of another one, so this may go
    /// on for a while.
    async fn count(&self, mut parts: Vec<Unsent>) -> Result<(), Stopped> {
        let ChordSupport::Counted(chords) = &self.chords else {
            return Ok(());
        };
        while let Some(Unsent { message, state }) = parts.pop() {
            let Some(body) = &message.embed.chord else {
                continue;
            };
            loop {
                let count = || chords.count(&message, &state, self.claim_seconds());
                let counted = self
                    .patiently(
                        &message.id,
                        "a part of a chord is not counted",
                        hopeless,
                        count,
                    )
                    .await?;
                match counted {
                    Some(Counted::Last(claim)) => {
                        let completing = self.complete(chords, &message, body, &claim);
                        parts.extend(Box::pin(completing).await?);
                        break;
                    }
                    // This message is here for a second time, and the worker that had it before may
                    // have died over the chord. Its claim ends by itself.
                    Some(Counted::Held) => self.pause(LOOK_EVERY).await?,
                    Some(Counted::NotLast) | None => break,
                }
            }
        }
        Ok(())
    }

    /// Long enough for what comes before publishing.
    fn claim_seconds(&self) -> u64 {
        self.options.join_timeout.as_secs().saturating_mul(2)
    }

    /// Applies the body of a chord whose parts have all returned, or fails it.
    async fn complete(
        &self,
        chords: &Chords,
        part: &TaskMessage,
        body: &Value,
        claim: &Claim,
    ) -> Result<Vec<Unsent>, Stopped> {
        let task_id = part.id.as_str();
        let results = match self.join(chords, task_id, claim).await? {
            Ok(results) => results,
            Err(failed) => {
                let parts = self.fail_body(part, body, &failed).await?;
                let fail = || chords.fail(claim);
                self.patiently(task_id, "a failed chord is not ended", hopeless, fail)
                    .await?;
                return Ok(parts);
            }
        };
        let keep = || chords.keep(claim, CLAIM_SECONDS);
        let is_ours = self
            .patiently(task_id, "a chord is not claimed", hopeless, keep)
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
            Err(CanvasError::Stopped) => return Err(Stopped),
            Err(error) => {
                let failed = callback_error(&error);
                self.fail_body(part, body, &failed).await?
            }
        };
        let finish = || chords.finish(claim, self.claim_seconds());
        self.patiently(task_id, "a chord is not cleared away", hopeless, finish)
            .await?;
        Ok(parts)
    }

    async fn apply_body(
        &self,
        body: &Value,
        results: Value,
        call: &Call<'_>,
    ) -> Result<(), CanvasError> {
        let is_large = is_large([body, &results]);
        let planning = || canvas::chord_body(body, results, call);
        let plan = self.desk.work(is_large, planning).await?;
        let task_id = call.parent_id.unwrap_or_default();
        self.carry_out(plan, task_id).await?;
        Ok(())
    }

    /// Keeps a claim; ends when it is lost.
    async fn lose(&self, chords: &Chords, claim: &Claim) {
        loop {
            sleep(CLAIM_RENEWAL).await;
            // One that cannot be renewed still holds for a while.
            if let Ok(false) = chords.keep(claim, CLAIM_SECONDS).await {
                return;
            }
        }
    }

    /// The results of a chord's parts, or with what its body fails, and the cause of that.
    async fn join(&self, chords: &Chords, task_id: &str, claim: &Claim) -> Result<Joined, Stopped> {
        let saved = || chords.saved(claim);
        let saved = self
            .patiently(task_id, "a chord's header is not read", hopeless, saved)
            .await?;
        if let Some(Some(header)) = saved {
            return self.join_groups(&header).await;
        }
        let parts = || chords.parts(claim);
        let parts = self
            .patiently(task_id, "a chord's results are not read", hopeless, parts)
            .await?;
        let values = parts.unwrap_or_default().into_iter().map(value_of);
        Ok(values.collect())
    }

    /// The results of a header with groups in it, in lists as they are. They are stored by the time
    /// that they are counted, but a replica may be behind.
    async fn join_groups(&self, header: &ResultNode) -> Result<Joined, Stopped> {
        let until = Instant::now() + self.options.join_timeout;
        loop {
            if let Some(found) = self.look(header).await {
                let joined = gather(header, &found);
                return Ok(joined.map_err(|failed| join_error(failed.cause)));
            }
            if Instant::now() >= until {
                let (class, text) = ("TimeoutError", "The operation timed out.");
                let timeout = Exception::new("celery.exceptions", class, text);
                return Ok(Err(join_error(timeout)));
            }
            self.pause(LOOK_EVERY).await?;
        }
    }

    /// The stored results of all tasks in a header; `None` unless all are done.
    async fn look(&self, header: &ResultNode) -> Option<Vec<Value>> {
        let mut found = Vec::new();
        for task_id in header.task_ids() {
            match self.results.get(task_id).await {
                Ok(Some(meta)) if is_done(&meta) => found.push(meta),
                Ok(_) => return None,
                Err(error) => {
                    tracing::warn!(task_id, error = %chain(&error), "a part of a chord cannot be looked at");
                    return None;
                }
            }
        }
        Some(found)
    }

    // ---------------------------------------------------------------- patience

    /// Does something with the backend, for as long as it takes; `None` where that would be for
    /// ever.
    async fn patiently<T, E, F>(
        &self,
        task_id: &str,
        what: &'static str,
        hopeless: impl Fn(&E) -> bool,
        mut attempt: impl FnMut() -> F,
    ) -> Result<Option<T>, Stopped>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<T, E>>,
    {
        let mut attempts = Attempts::new(STORE_PAUSES);
        loop {
            // A client's call can be large, and is held once in each caller up to the task itself.
            let attempt = Box::pin(attempt());
            let attempted = self.stopping.run_until_cancelled(attempt).await;
            let error = match attempted.ok_or(Stopped)? {
                Ok(done) => return Ok(Some(done)),
                Err(error) => error,
            };
            if hopeless(&error) {
                tracing::error!(task_id, what, error = %chain(&error), "a chord cannot go on");
                return Ok(None);
            }
            let Setback { pause, is_news } = attempts.failed(&error);
            if is_news {
                tracing::warn!(
                    task_id,
                    what,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "what follows the task is not done; its message stays unacknowledged until it is"
                );
            }
            self.pause(pause).await?;
        }
    }

    async fn pause(&self, time: Duration) -> Result<(), Stopped> {
        tokio::select! {
            () = self.stopping.cancelled() => Err(Stopped),
            () = sleep(time) => Ok(()),
        }
    }
}

/// Whether Redis holds something else under a chord's key: no time mends that.
fn hopeless(error: &ResultError) -> bool {
    error.is_hopeless()
}

fn never(_: &ResultError) -> bool {
    false
}

fn status(meta: &Value) -> &str {
    meta["status"].as_str().unwrap_or_default()
}

fn has_failed(meta: &Value) -> bool {
    matches!(status(meta), "FAILURE" | "REVOKED")
}

fn is_done(meta: &Value) -> bool {
    has_failed(meta) || status(meta) == "SUCCESS"
}

/// The exception that a mapping is.
fn exception(result: Value) -> Exception {
    serde_json::from_value(result).unwrap_or_else(|_| Exception::none())
}

impl ChordFailure {
    /// A `ChordError` that says, after some words, what lies behind it.
    fn new(text: &str, cause: Exception) -> Box<Self> {
        Box::new(Self {
            error: chord_error(format!("{text}{}", cause.repr())),
            cause,
        })
    }
}

/// Of a chord one of whose parts failed.
fn dependency_error(task_id: &str, cause: Exception) -> Box<ChordFailure> {
    ChordFailure::new(&format!("Dependency {task_id} raised "), cause)
}

/// Of a chord with groups in its header whose results cannot be had, or are failures.
fn join_error(cause: Exception) -> Box<ChordFailure> {
    ChordFailure::new("Join error: ", cause)
}

/// Of a chord whose body cannot be sent.
/// The time until a message is due.
fn due_in(message: &celery_protocol::RawMessage) -> Duration {
    message
        .headers
        .get("eta")
        .and_then(Value::as_str)
        .and_then(|eta| DateTime::parse_from_rfc3339(eta).ok())
        .and_then(|eta| (eta.to_utc() - Utc::now()).to_std().ok())
        .unwrap_or_default()
}

fn callback_error(error: &CanvasError) -> Box<ChordFailure> {
    ChordFailure::new("Callback error: ", error.exception())
}

fn value_of(part: Part) -> Joined {
    match part.state.as_str() {
        "FAILURE" | "REVOKED" => Err(dependency_error(&part.task_id, exception(part.result))),
        _ => Ok(part.result),
    }
}

/// The values of stored results, in the form of the header; `found` is in its order.
fn gather(header: &ResultNode, found: &[Value]) -> Joined {
    let mut found = found.iter();
    header.gather(&mut |task_id| {
        let meta = found.next().unwrap_or(&Value::Null);
        match has_failed(meta) {
            true => Err(dependency_error(task_id, exception(meta["result"].clone()))),
            false => Ok(meta["result"].clone()),
        }
    })
}

/// The result of a message, in the form of `as_tuple()`.
fn as_result(outgoing: &Outgoing) -> Value {
    serde_json::json!([[outgoing.message.headers["id"], null], null])
}
