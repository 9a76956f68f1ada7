//! One message, from receipt to settlement.
//!
//! The order of effects is Celery's: received; its time; its rate; a place; whether it is still
//! wanted; the acknowledgement, if it comes early; STARTED; the run; what follows the task; the
//! result; the chord; the event; the acknowledgement, if it comes late. Whatever follows the task is
//! with the broker before its result is stored, and its result is stored before the message is
//! gone: a worker that dies in between leaves a message that is delivered again, and never a result
//! that nobody acts upon.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::accepted::{Phase, Received};
use super::canvas::{CanvasError, Stopped};
use super::identity::Identity;
use super::policy::Policy;
use super::span;
use super::stop::{Reason as StopReason, Stop};
use super::task::{
    Control, Entry, Failure, Invocation, Message, Outcome, Progress, Retry, When, panicked,
};
use super::waiting::Admitted;
use super::{STORE_PAUSES, Worker};
use crate::broker::{Delivery, Publication, Route, Verdict, delayed};
use celery_protocol::event::Event;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::message::{Fate, Reason, Refused, TaskMessage};
use celery_protocol::repr;
use celery_protocol::result::{Cause, Extended, ResultMeta, State};
use celery_protocol::retry::Changes;
use service_connection::backoff::{Attempts, Setback, in_seconds};
use service_connection::error_chain::chain;

/// How long a state that is only news, STARTED or PROGRESS, may hold things up.
const NEWS_WITHIN: Duration = Duration::from_secs(5);

/// How often a task's progress is passed on.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// How long a task that ran too long may take to put things in order.
const LIMIT_GRACE: Duration = Duration::from_secs(30);

/// The message goes back to its queue: the worker has to end before it could do its part.
pub(super) struct Requeue;

impl Worker {
    /// One delivery, from receipt to settlement.
    pub(super) async fn receive(self: Arc<Self>, delivery: Delivery) {
        let Some(Admitted {
            mut delivery,
            read,
            share: _share,
        }) = self.admit(delivery).await
        else {
            return;
        };
        let message = match *read {
            Ok(message) => message,
            Err(refused) => return Box::pin(self.refuse(delivery, refused)).await,
        };
        let Some(entry) = self.registry.get(&message.task) else {
            return Box::pin(self.not_registered(delivery, message)).await;
        };
        let received = Arc::new(Received {
            identity: Identity::of(&delivery.message),
            message: Arc::new(message),
            raw: std::mem::take(&mut delivery.message),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
            queue: delivery.queue.clone(),
            redelivered: delivery.redelivered,
        });
        let message = &received.message;
        tracing::info!(
            task = message.task,
            task_id = message.id,
            args = message.argsrepr.as_deref().map(repr::shorten),
            kwargs = message.kwargsrepr.as_deref().map(repr::shorten),
            redelivered = received.redelivered,
            "task received"
        );
        let stop = Stop::new(&self.stopping);
        if !self.accepted.accept(&received, delivery, &stop) {
            return tracing::info!(
                task_id = message.id,
                "task runs here already; the new delivery joins it"
            );
        }
        fault_point!(TaskAccepted);
        let limits = self.time_limits.get(&message.task);
        let policy = Policy::new(message, &entry.attributes, limits, &self.config.tasks);
        let verdict = match self.unwanted(message) {
            Some(cause) => Box::pin(self.not_run(&received, entry, &policy, cause)).await,
            None => {
                // Not of one that joined: monitors would take a running task for a waiting one.
                self.news(&received, &Event::TaskReceived(message));
                self.process(&received, entry, &policy, stop).await
            }
        };
        for delivery in self.accepted.release(&received) {
            delivery.settle(verdict).await;
        }
        fault_point!(Acknowledged);
    }

    /// Waits for the task's turn, runs it, and does what follows.
    async fn process(
        &self,
        received: &Arc<Received>,
        entry: &Entry,
        policy: &Policy,
        stop: Stop,
    ) -> Verdict {
        let message = &received.message;
        let begun = async {
            if let Some(eta) = message.eta {
                Box::pin(self.wait_until(received, eta)).await?;
            }
            self.accepted.enter(received, Phase::Reserved);
            self.rates.pass(&message.task).await;
            self.pool.place().await
        };
        let place = tokio::select! {
            biased;
            () = self.shutdown.warm.cancelled() => return Verdict::Requeue,
            place = begun => place,
        };
        let Some(place) = place else {
            return Verdict::Requeue;
        };
        // Again, since the task may have waited for long.
        if let Some(cause) = self.unwanted(message) {
            drop(place);
            return Box::pin(self.not_run(received, entry, policy, cause)).await;
        }
        let done_before = self.done_before(received, policy);
        let Some(done_before) = self.shutdown.warm.run_until_cancelled(done_before).await else {
            return Verdict::Requeue;
        };
        if let Some(returned) = done_before {
            tracing::info!(
                task_id = message.id,
                "task was delivered again and had succeeded; it is not run"
            );
            // What followed it was sent before that was stored; but it may not have been counted.
            let state = State::Success(returned);
            return match self.canvas.returned(message, &state).await {
                Ok(()) => Verdict::Ack,
                Err(Stopped) => Verdict::Requeue,
            };
        }

        self.accepted.enter(received, Phase::Active(Utc::now()));
        self.count(&message.task);
        if !policy.acks_late {
            for delivery in self.accepted.acknowledge(received) {
                delivery.settle(Verdict::Ack).await;
            }
        }
        self.news(received, &Event::TaskStarted(&message.id));
        let span = span::begin(received, &self.hostname);
        let mut attempt = pin!(async {
            let started = Instant::now();
            let outcome = self.execute(received, entry, policy, &stop).await;
            drop(place);
            let verdict = self
                .settle(received, policy, outcome, &stop, started.elapsed())
                .await;
            span::note_verdict(verdict);
            verdict
        });
        match &span {
            Some(span) => span.around(attempt.as_mut()).await,
            None => attempt.await,
        }
    }

    /// Why a task must not begin any more, if so.
    pub(super) fn unwanted(&self, message: &TaskMessage) -> Option<Cause> {
        let expired = message.expires.is_some_and(|expires| expires <= Utc::now());
        let cause = match expired {
            true => Cause::Expired,
            false if self.revoked.revokes(message) => Cause::Revoked,
            false => return None,
        };
        tracing::info!(task_id = message.id, ?cause, "task does not run");
        Some(cause)
    }

    /// Ends a message whose task must not begin.
    pub(super) async fn not_run(
        &self,
        received: &Arc<Received>,
        entry: &Entry,
        policy: &Policy,
        cause: Cause,
    ) -> Verdict {
        match self.discard(received, entry, &cause).await {
            Ok(()) => {
                let state = State::Revoked(cause);
                self.conclude(received, policy, state, Duration::ZERO).await
            }
            Err(Requeue) => Verdict::Requeue,
        }
    }

    /// What a task that is delivered again has returned before
    /// (`worker_deduplicate_successful_tasks`).
    async fn done_before(&self, received: &Received, policy: &Policy) -> Option<Value> {
        if !(self.config.deduplicate && received.redelivered && policy.acks_late) {
            return None;
        }
        match self.results.get(&received.message.id).await {
            Ok(stored) => {
                let mut stored = stored.filter(|stored| stored["status"] == "SUCCESS")?;
                Some(stored["result"].take())
            }
            Err(error) => {
                tracing::warn!(
                    task_id = received.message.id,
                    error = %chain(&error),
                    "cannot tell whether the task has succeeded before; it is run"
                );
                None
            }
        }
    }

    async fn execute(
        &self,
        received: &Arc<Received>,
        entry: &Entry,
        policy: &Policy,
        stop: &Stop,
    ) -> Outcome {
        if policy.track_started {
            let state = State::Started {
                pid: std::process::id(),
                hostname: self.hostname.to_string(),
            };
            self.tell(received, state).await;
        }
        let (progress, reports) = watch::channel(None);
        let run = (entry.run)(Invocation {
            app: self.app.clone(),
            message: received.message.clone(),
            control: Control {
                hostname: self.hostname.clone(),
                request: received.message.clone(),
                cancelled: stop.now.clone(),
                terminated: stop.for_good.clone(),
                shutting_down: self.shutdown.warm.clone(),
                redelivered: received.redelivered,
                progress: Progress(progress),
                message: self.message_of(received),
            },
        });
        // On its own, for a panic outside the task's own body, e.g. in its `on_failure`.
        let mut running = AbortOnDropHandle::new(tokio::spawn(traces::carried(run)));
        let limited = enforce(policy, stop);
        let ended = tokio::select! {
            biased;
            ended = &mut running => ended,
            // Reports for as long as the task runs, and is gone before its result is stored.
            never = self.pass_on(received, policy, reports) => match never {},
            () = limited => {
                running.abort();
                tracing::error!(
                    task = received.message.task,
                    task_id = received.message.id,
                    "task did not stop at its time limit; it was dropped"
                );
                return Outcome::Failed(Failure::Interrupted);
            }
        };
        ended.unwrap_or_else(|error| {
            let exception = match error.try_into_panic() {
                Ok(panic) => panicked(&*panic),
                Err(error) => Exception::new(BUILTINS, "RuntimeError", error.to_string()),
            };
            Outcome::Failed(Failure::Raised(exception))
        })
    }

    fn message_of(&self, received: &Arc<Received>) -> Message {
        let (accepted, received) = (self.accepted.clone(), received.clone());
        Message(Arc::new(move || accepted.is_held(&received)))
    }

    /// Passes a task's progress on.
    async fn pass_on(
        &self,
        received: &Received,
        policy: &Policy,
        mut reports: watch::Receiver<Option<Map<String, Value>>>,
    ) -> std::convert::Infallible {
        loop {
            if reports.changed().await.is_err() {
                // The task has dropped its end: there is nothing more to come.
                std::future::pending::<()>().await;
            }
            let report = reports.borrow_and_update().clone();
            let Some(report) = report else { continue };
            let state = State::Progress(Value::Object(report));
            if let Some(event) = Event::of(&received.message.id, &state, 0.0) {
                self.news(received, &event);
            }
            if policy.stores(&state) {
                self.tell(received, state).await;
            }
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    }

    /// Stores a state that is news, not truth: when it cannot be stored the task runs all the
    /// same.
    async fn tell(&self, received: &Received, state: State) {
        let message = &received.message;
        let name = state.name();
        let meta = self.meta(received, state, Vec::new());
        let error =
            match tokio::time::timeout(NEWS_WITHIN, self.results.store(&meta, message)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => chain(&error).to_string(),
                Err(_) => "no answer in time".into(),
            };
        tracing::warn!(
            task_id = message.id,
            state = name,
            error,
            "state was not stored"
        );
    }

    /// What the end of a run means for its message.
    async fn settle(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        outcome: Outcome,
        stop: &Stop,
        runtime: Duration,
    ) -> Verdict {
        match outcome {
            Outcome::Returned(value) => self.succeed(received, policy, value, runtime).await,
            // What is rare has its room elsewhere.
            Outcome::Failed(failure) => {
                Box::pin(self.settle_failure(received, policy, failure, stop, runtime)).await
            }
        }
    }

    /// What the end of a run that did not return means for its message.
    async fn settle_failure(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        failure: Failure,
        stop: &Stop,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        match failure {
            Failure::Raised(exception) => self.fail(received, policy, exception, runtime).await,
            Failure::Retry(retry) => self.retry(received, policy, *retry, runtime).await,
            Failure::Rejected { reason, requeue } => {
                self.reject(received, policy, reason, requeue, runtime)
                    .await
            }
            Failure::Ignored => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s = runtime.as_secs_f64(),
                    "task ignored"
                );
                Verdict::Ack
            }
            Failure::Interrupted => match stop.reason() {
                Some(StopReason::Terminated) => {
                    tracing::warn!(
                        task = message.task,
                        task_id = message.id,
                        runtime_s = runtime.as_secs_f64(),
                        "task was terminated"
                    );
                    let state = State::Revoked(Cause::Terminated);
                    self.conclude(received, policy, state, runtime).await
                }
                Some(StopReason::SoftTimeLimit) => {
                    let exception = Exception::soft_time_limit_exceeded();
                    self.fail(received, policy, exception, runtime).await
                }
                Some(StopReason::TimeLimit(seconds)) => {
                    let exception = Exception::time_limit_exceeded(seconds);
                    let verdict = self.fail(received, policy, exception, runtime).await;
                    match policy.acks_on_timeout {
                        true => verdict,
                        false => Verdict::Requeue,
                    }
                }
                None if policy.acks_late => {
                    tracing::warn!(
                        task = message.task,
                        task_id = message.id,
                        runtime_s = runtime.as_secs_f64(),
                        "task was interrupted; its message goes back to the queue"
                    );
                    Verdict::Requeue
                }
                None => {
                    // As a Python worker does; nothing will run it again.
                    let exception = Exception::new(
                        "celery.exceptions",
                        "WorkerShutdown",
                        "the worker was shut down while the task ran, after it had acknowledged the message",
                    );
                    self.fail(received, policy, exception, runtime).await
                }
            },
        }
    }

    async fn succeed(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        value: Value,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        let children = match self.canvas.succeeded(message, &value).await {
            Ok(children) => children,
            Err(CanvasError::Stopped) => return Verdict::Requeue,
            Err(error) => {
                tracing::error!(
                    task = message.task,
                    task_id = message.id,
                    %error,
                    "what follows the task cannot be sent, so the task fails"
                );
                return Box::pin(self.fail(received, policy, error.exception(), runtime)).await;
            }
        };
        tracing::info!(
            task = message.task,
            task_id = message.id,
            runtime_s = runtime.as_secs_f64(),
            "task succeeded"
        );
        self.conclude_with(received, policy, State::Success(value), children, runtime)
            .await
    }

    async fn fail(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        exception: Exception,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        tracing::error!(
            task = message.task,
            task_id = message.id,
            runtime_s = runtime.as_secs_f64(),
            exception = exception.headline(),
            "task failed"
        );
        let state = self.failure(message, exception);
        let verdict = self.conclude(received, policy, state, runtime).await;
        match verdict {
            Verdict::Ack if !policy.acks_on_failure => Verdict::Reject,
            verdict => verdict,
        }
    }

    /// What a task that refuses its message wants done with it.
    async fn reject(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        reason: Value,
        requeue: bool,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        tracing::warn!(
            task = message.task,
            task_id = message.id,
            %reason,
            requeue,
            "task rejected its message"
        );
        // One that is to come again has no result yet.
        if !requeue {
            let exception = Exception {
                exc_type: "Reject".into(),
                exc_message: vec![reason, json!(requeue)],
                exc_module: "celery.exceptions".into(),
            };
            let state = State::Failure {
                exception,
                traceback: None,
            };
            if let Verdict::Requeue = self.conclude(received, policy, state, runtime).await {
                return Verdict::Requeue;
            }
        }
        if policy.acks_late {
            let id = &message.id;
            self.news(received, &Event::TaskRejected { id, requeue });
        }
        match requeue {
            true => Verdict::Requeue,
            false => Verdict::Reject,
        }
    }

    /// Publishes a task's message for its next run, or fails it if that would be one too many.
    async fn retry(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        retry: Retry,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        if message.retries >= retry.max_retries.unwrap_or(policy.max_retries) {
            let exception = retry
                .exception
                .unwrap_or_else(|| Exception::max_retries_exceeded(message));
            return self.fail(received, policy, exception, runtime).await;
        }
        let when = retry.when.unwrap_or(When::In(policy.retry_delay));
        let eta = match when {
            When::In(delay) => Utc::now() + delay,
            When::At(eta) => eta,
        };
        let exception = Exception::retry(&when.to_string(), retry.exception.as_ref());
        tracing::info!(
            task = message.task,
            task_id = message.id,
            runtime_s = runtime.as_secs_f64(),
            exception = exception.headline(),
            "task is retried"
        );
        let state = State::Retry {
            traceback: Some(exception.traceback(&self.place(message))),
            exception: retry.exception.unwrap_or_else(Exception::none),
        };
        // The next run counts as a child of this one.
        let next = json!([[message.id, null], null]);
        span::note_retry(&exception);
        // Before the next run is published, other than in Python: that one may be quick, and its
        // result must not be followed by this state.
        let concluded = self
            .conclude_with(received, policy, state, vec![next], runtime)
            .await;
        if concluded == Verdict::Requeue {
            return concluded;
        }
        let publication = self.retry_publication(received, eta, &retry.changes);
        match self.canvas.publish(&publication, &message.id).await {
            Ok(()) => Verdict::Ack,
            Err(CanvasError::Stopped) => Verdict::Requeue,
            // Nobody can take the next run: its queue or exchange is gone.
            Err(error) => {
                self.fail(received, policy, error.exception(), runtime)
                    .await
            }
        }
    }

    /// A task's message for its next run, by the way that it came or to the queue that the task
    /// chose.
    fn retry_publication(
        &self,
        received: &Received,
        eta: DateTime<Utc>,
        changes: &Changes,
    ) -> Publication {
        let now = Utc::now();
        let mut message = received
            .message
            .retry(&received.raw, Some(eta), now, changes);
        // Runs of a task are beneath its producer, one beside the other; where that is not in any trace,
        // beneath the first.
        if span::sender(received).is_none() {
            traces::write_current(&mut message.headers);
        }
        let exchange = received.exchange.as_str();
        let queue = match (&changes.queue, exchange) {
            (Some(queue), _) => Some(queue),
            // It came to the queue alone, or by the way of what is delayed.
            (None, "" | delayed::DELIVERY) => Some(&received.queue),
            (None, _) => None,
        };
        let (exchange, routing_key, declare) = match queue {
            Some(queue) => {
                let delay = (eta - now).to_std().unwrap_or_default();
                let Route {
                    exchange,
                    routing_key,
                    declare,
                } = self.config.task_queues.route(queue, delay);
                (exchange, routing_key, Some(declare))
            }
            None => {
                let key = delayed::strip(&received.routing_key);
                (exchange.to_owned(), key.to_owned(), None)
            }
        };
        Publication {
            exchange,
            routing_key,
            message,
            declare,
            mandatory: true,
        }
    }

    /// Counts what is new of a task, and tells monitors.
    pub(super) fn news(&self, received: &Received, event: &Event<'_>) {
        self.count_event(&received.message.task, &received.queue, event);
        self.events.send(event);
    }

    fn count_event(&self, task: &str, queue: &str, event: &Event<'_>) {
        let known = self.registry.get(task).map(|_| task);
        self.observer.task_event(known, queue, event);
    }

    fn failure(&self, message: &TaskMessage, exception: Exception) -> State {
        let has_traceback = exception.exc_type != "TimeLimitExceeded";
        State::Failure {
            traceback: has_traceback.then(|| exception.traceback(&self.place(message))),
            exception,
        }
    }

    /// Stands for the frames of a traceback.
    fn place(&self, message: &TaskMessage) -> String {
        let function = self
            .registry
            .get(&message.task)
            .map_or(message.task.as_str(), |entry| entry.function);
        format!("ccat-transfer on {}, in {function}", self.hostname)
    }

    pub(super) async fn conclude(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        state: State,
        runtime: Duration,
    ) -> Verdict {
        self.conclude_with(received, policy, state, Vec::new(), runtime)
            .await
    }

    /// Stores a state where that is wanted, does what follows from it, and tells monitors.
    async fn conclude_with(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        state: State,
        children: Vec<Value>,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        span::note_state(&state);
        let meta = self.meta(received, state, children);
        if policy.stores(&meta.state)
            && let Err(Requeue) = self.store(message, &meta).await
        {
            return Verdict::Requeue;
        }
        if let Err(Stopped) = self.follow(message, &meta.state).await {
            return Verdict::Requeue;
        }
        if let Some(event) = Event::of(&message.id, &meta.state, runtime.as_secs_f64()) {
            self.news(received, &event);
        }
        Verdict::Ack
    }

    /// Does what follows from a state that is stored.
    async fn follow(&self, message: &TaskMessage, state: &State) -> Result<(), Stopped> {
        if state.is_final() {
            self.canvas.returned(message, state).await?;
        }
        if let State::Failure {
            exception,
            traceback,
        } = state
        {
            let failed = self.canvas.failed(message, exception, traceback.as_deref());
            Box::pin(failed).await?;
        }
        Ok(())
    }

    /// A state as it is stored.
    fn meta(&self, received: &Received, state: State, children: Vec<Value>) -> ResultMeta {
        let mut meta = ResultMeta::new(&received.message, state, Utc::now());
        meta.children = children;
        meta.extended = self.config.result_extended.then(|| self.extended(received));
        meta
    }

    fn extended(&self, received: &Received) -> Extended {
        let message = &received.message;
        Extended {
            name: message.task.clone(),
            args: message.args.clone(),
            kwargs: message.kwargs.clone(),
            worker: self.hostname.to_string(),
            retries: message.retries,
            queue: Some(received.routing_key.clone()),
            stamps: message.stamps(),
        }
    }

    /// Stores a final state, for as long as it takes: until then the message is not acknowledged.
    /// A shutdown ends the wait, a warm one after [`super::SETTLED_WITHIN`]. The message then returns to its
    /// queue, and the next run of the task finds its work done.
    async fn store(&self, message: &TaskMessage, meta: &ResultMeta) -> Result<(), Requeue> {
        let mut attempts = Attempts::new(STORE_PAUSES);
        loop {
            let storing =
                async { fault_point!(ResultStored, self.results.store(meta, message).await) };
            let Some(stored) = self.stopping.run_until_cancelled(storing).await else {
                return Err(Requeue);
            };
            let Err(error) = stored else {
                return Ok(());
            };
            if error.is_hopeless() {
                tracing::error!(
                    task_id = message.id,
                    error = %chain(&error),
                    "result cannot be stored, now or later; it is lost"
                );
                return Ok(());
            }
            let Setback { pause, is_news } = attempts.failed(&error);
            if is_news {
                tracing::warn!(
                    task_id = message.id,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "result was not stored; the message stays unacknowledged until it is"
                );
            }
            tokio::select! {
                () = self.stopping.cancelled() => return Err(Requeue),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// A message for a task that this worker does not have.
    pub(super) async fn not_registered(&self, delivery: Delivery, message: TaskMessage) {
        tracing::error!(
            task = message.task,
            task_id = message.id,
            known = ?self.registry.names(),
            "message for a task that is not registered; it is rejected"
        );
        let exception = Exception::not_registered(&message.task);
        self.refuse_with(delivery, message, exception, Verdict::Reject)
            .await;
    }

    /// Stores why a message is refused, and refuses it.
    async fn refuse_with(
        &self,
        delivery: Delivery,
        message: TaskMessage,
        exception: Exception,
        verdict: Verdict,
    ) {
        let policy = Policy::of_stranger(&message, &self.config.tasks);
        let state = State::Failure {
            exception,
            traceback: None,
        };
        let meta = ResultMeta::new(&message, state, Utc::now());
        let stored = match policy.stores(&meta.state) {
            true => self.store(&message, &meta).await,
            false => Ok(()),
        };
        match stored {
            Ok(()) => {
                if let Some(event) = Event::of(&message.id, &meta.state, 0.0) {
                    self.count_event(&message.task, &delivery.queue, &event);
                    self.events.send(&event);
                }
                delivery.settle(verdict).await;
            }
            Err(Requeue) => delivery.settle(Verdict::Requeue).await,
        }
    }

    /// A message that is no task.
    async fn refuse(&self, delivery: Delivery, refused: Refused) {
        let Refused {
            reason,
            task,
            id,
            reply_to,
        } = refused;
        let known = task
            .as_deref()
            .is_none_or(|task| self.registry.get(task).is_some());
        let message = id.map(|id| TaskMessage {
            correlation_id: delivery
                .message
                .properties
                .correlation_id
                .clone()
                .unwrap_or(id.clone()),
            id,
            task: task.clone().unwrap_or_default(),
            reply_to: reply_to.filter(|queue| !queue.is_empty()),
            ..TaskMessage::default()
        });
        match message {
            Some(message) if !known => self.not_registered(delivery, message).await,
            message => {
                tracing::error!(
                    task,
                    task_id = message.as_ref().map(|m| &m.id),
                    routing_key = delivery.routing_key,
                    body_bytes = delivery.message.body.len(),
                    reason = %reason,
                    fate = ?reason.fate(),
                    "message is no task"
                );
                let verdict = match reason.fate() {
                    Fate::Ack if known => Verdict::Ack,
                    // For another worker's task, whatever else is wrong.
                    Fate::Ack | Fate::Reject => Verdict::Reject,
                };
                match (&reason, message) {
                    (Reason::Malformed(text), Some(message)) => {
                        let exception = Exception::invalid_task(*text);
                        self.refuse_with(delivery, message, exception, verdict)
                            .await;
                    }
                    _ => delivery.settle(verdict).await,
                }
            }
        }
    }
}

/// Stops a task that runs too long. Ends only if that does not help.
async fn enforce(policy: &Policy, stop: &Stop) {
    let after = |seconds: Option<f64>| async move {
        match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let hard = async {
        after(policy.time_limit).await;
        stop.stop(StopReason::TimeLimit(policy.time_limit.unwrap_or_default()));
    };
    let soft = async {
        after(policy.soft_time_limit).await;
        stop.stop(StopReason::SoftTimeLimit);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = hard => {}
        () = soft => {}
    }
    tokio::time::sleep(LIMIT_GRACE).await;
}
