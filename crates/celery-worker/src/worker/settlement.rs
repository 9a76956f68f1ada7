//! The end of a run: its state, what follows it, and the disposition of its message.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tracing::Span;

use super::accepted::Received;
use super::canvas::{CanvasError, Stopped};
use super::policy::Policy;
use super::stop::{Reason as StopReason, Stop};
use super::{STORE_PAUSES, Worker, span};
use crate::broker::{Publication, Route, Verdict, delayed};
use crate::task::{Entry, Outcome, Reject, Retry, TaskError, When};
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Cause, Extended, ResultMeta, State};
use celery_protocol::retry::Changes;
use service_connection::backoff::{Attempts, Setback, in_seconds};
use service_connection::error_chain::chain;

/// The message goes back to its queue: the worker has to end before it could do its part.
pub(super) struct Requeue;

impl Worker {
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

    /// What the end of a run means for its message.
    pub(super) async fn settle(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        outcome: Outcome,
        stop: &Stop,
        runtime: Duration,
    ) -> Verdict {
        match outcome {
            Ok(value) => self.succeed(received, policy, value, runtime).await,
            // What is rare has its room elsewhere.
            Err(failure) => {
                Box::pin(self.settle_failure(received, policy, failure, stop, runtime)).await
            }
        }
    }

    /// What the end of a run that did not return means for its message.
    async fn settle_failure(
        &self,
        received: &Arc<Received>,
        policy: &Policy,
        failure: TaskError,
        stop: &Stop,
        runtime: Duration,
    ) -> Verdict {
        let message = &received.message;
        match failure {
            TaskError::Raised(exception) => self.fail(received, policy, exception, runtime).await,
            TaskError::Retry(retry) => self.retry(received, policy, *retry, runtime).await,
            TaskError::Reject(Reject { reason, requeue }) => {
                self.reject(received, policy, reason, requeue, runtime)
                    .await
            }
            TaskError::Ignore => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s = runtime.as_secs_f64(),
                    "task ignored"
                );
                Verdict::Ack
            }
            TaskError::Requeue => match stop.reason() {
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
        let propagation = &*self.config.propagation;
        if !span::adopt(&Span::none(), received, propagation) {
            propagation.inject(&Span::current(), &mut message.headers);
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

    pub(super) fn count_event(&self, task: &str, queue: &str, event: &Event<'_>) {
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
            .map_or(message.task.as_str(), |entry| &*entry.function);
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
    pub(super) fn meta(
        &self,
        received: &Received,
        state: State,
        children: Vec<Value>,
    ) -> ResultMeta {
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
    pub(super) async fn store(
        &self,
        message: &TaskMessage,
        meta: &ResultMeta,
    ) -> Result<(), Requeue> {
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
}
