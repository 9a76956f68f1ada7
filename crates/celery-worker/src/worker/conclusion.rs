//! The conclusion of a task, after its execution: its follow-up tasks, its result, its callbacks and its event, and then
//! the disposition with which its message is settled.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tracing::Span;

use super::cancellation::CancelReason;
use super::execution::Execution;
use super::span;
use crate::broker::{Disposition, Publication, Route, delayed};
use crate::clock;
use crate::task::{Outcome, Reject, Retry, TaskError, When};
use crate::workflow::{Stopped, WorkflowError};
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::result::{Cause, State};
use celery_protocol::retry::Changes;

impl Execution<'_> {
    /// Records the outcome of a run; returns the disposition of its message.
    pub(super) async fn conclude(&self, outcome: Outcome) -> Disposition {
        match outcome {
            Ok(value) => self.succeed(value).await,
            // Boxed: keeps the common task's future small.
            Err(failure) => Box::pin(self.conclude_failure(failure)).await,
        }
    }

    /// Records a run without a result; returns the disposition of its message.
    async fn conclude_failure(&self, failure: TaskError) -> Disposition {
        let message = &self.request.message;
        match failure {
            TaskError::Raised(exception) => self.fail(exception).await,
            TaskError::Retry(retry) => self.retry(*retry).await,
            TaskError::Reject(Reject { reason, requeue }) => self.reject(reason, requeue).await,
            TaskError::Ignore => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s = self.elapsed.as_secs_f64(),
                    "task ignored"
                );
                Disposition::Ack
            }
            TaskError::Requeue => match self.stop.reason() {
                Some(CancelReason::Terminated) => {
                    tracing::warn!(
                        task = message.task,
                        task_id = message.id,
                        runtime_s = self.elapsed.as_secs_f64(),
                        "task was terminated"
                    );
                    let state = State::Revoked(Cause::Terminated);
                    self.record(state).await
                }
                Some(CancelReason::SoftTimeLimit) => {
                    let exception = Exception::soft_time_limit_exceeded();
                    self.fail(exception).await
                }
                Some(CancelReason::TimeLimit(seconds)) => {
                    let exception = Exception::time_limit_exceeded(seconds);
                    let disposition = self.fail(exception).await;
                    match self.options.acks_on_timeout {
                        true => disposition,
                        false => Disposition::Requeue,
                    }
                }
                None if self.options.acks_late => {
                    tracing::warn!(
                        task = message.task,
                        task_id = message.id,
                        runtime_s = self.elapsed.as_secs_f64(),
                        "task was interrupted; its message returns to the queue"
                    );
                    Disposition::Requeue
                }
                None => {
                    // As a Python worker does; the task does not run again.
                    let exception = Exception::new(
                        "celery.exceptions",
                        "WorkerShutdown",
                        "the worker was shut down while the task ran, after it had acknowledged the message",
                    );
                    self.fail(exception).await
                }
            },
        }
    }

    async fn succeed(&self, value: Value) -> Disposition {
        let message = &self.request.message;
        let children = match self.runtime.workflow.succeeded(message, &value).await {
            Ok(children) => children,
            Err(WorkflowError::Stopped) => return Disposition::Requeue,
            Err(error) => {
                tracing::error!(
                    task = message.task,
                    task_id = message.id,
                    %error,
                    "follow-up messages of the task cannot be sent, so the task fails"
                );
                return Box::pin(self.fail(error.exception())).await;
            }
        };
        tracing::info!(
            task = message.task,
            task_id = message.id,
            runtime_s = self.elapsed.as_secs_f64(),
            "task succeeded"
        );
        self.record_with(State::Success(value), children).await
    }

    async fn fail(&self, exception: Exception) -> Disposition {
        let message = &self.request.message;
        tracing::error!(
            task = message.task,
            task_id = message.id,
            runtime_s = self.elapsed.as_secs_f64(),
            exception = exception.headline(),
            "task failed"
        );
        let state = self.failure(exception);
        let disposition = self.record(state).await;
        match disposition {
            Disposition::Ack if !self.options.acks_on_failure => Disposition::Reject,
            disposition => disposition,
        }
    }

    /// Settles the message of a task that rejects it.
    async fn reject(&self, reason: Value, requeue: bool) -> Disposition {
        let message = &self.request.message;
        tracing::warn!(
            task = message.task,
            task_id = message.id,
            %reason,
            requeue,
            "task rejected its message"
        );
        // A message that is requeued has no result yet.
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
            if let Disposition::Requeue = self.record(state).await {
                return Disposition::Requeue;
            }
        }
        if self.options.acks_late {
            let id = &message.id;
            self.runtime
                .emit(&self.request, &Event::TaskRejected { id, requeue });
        }
        match requeue {
            true => Disposition::Requeue,
            false => Disposition::Reject,
        }
    }

    /// Publishes a task's message for its next run, or fails the task if it has no retries left.
    async fn retry(&self, retry: Retry) -> Disposition {
        let message = &self.request.message;
        if message.retries >= retry.max_retries.unwrap_or(self.options.max_retries) {
            let exception = retry
                .exception
                .unwrap_or_else(|| Exception::max_retries_exceeded(message));
            return self.fail(exception).await;
        }
        let when = retry.when.unwrap_or(When::In(self.options.retry_delay));
        let eta = match when {
            When::In(delay) => clock::now() + delay,
            When::At(eta) => eta,
        };
        let exception = Exception::retry(&when.to_string(), retry.exception.as_ref());
        tracing::info!(
            task = message.task,
            task_id = message.id,
            runtime_s = self.elapsed.as_secs_f64(),
            exception = exception.headline(),
            "task is retried"
        );
        let state = State::Retry {
            traceback: Some(exception.traceback(&self.traceback_place())),
            exception: retry.exception.unwrap_or_else(Exception::none),
        };
        // The next run counts as a child of this one.
        let next = json!([[message.id, null], null]);
        span::note_retry(&exception);
        // Stored before the next run is published, unlike in Python: that run may be quick, and this state must not
        // replace its result.
        let concluded = self.record_with(state, vec![next]).await;
        if concluded == Disposition::Requeue {
            return concluded;
        }
        let publication = self.retry_publication(eta, &retry.changes);
        match self
            .runtime
            .workflow
            .publish(&publication, &message.id)
            .await
        {
            Ok(()) => Disposition::Ack,
            Err(WorkflowError::Stopped) => Disposition::Requeue,
            // The message cannot be delivered: its queue or exchange does not exist.
            Err(error) => self.fail(error.exception()).await,
        }
    }

    /// A task's message for its next run, by the route of the first message or to the queue that the task chose.
    fn retry_publication(&self, eta: DateTime<Utc>, changes: &Changes) -> Publication {
        let now = clock::now();
        let request = &*self.request;
        let mut message = request.message.retry(&request.raw, Some(eta), now, changes);
        // All runs of a task are children of its producer's span; if the producer is not in a trace, they are children
        // of the first run.
        let propagation = &*self.runtime.config.propagation;
        if !span::adopt(&Span::none(), request, propagation) {
            propagation.inject(&Span::current(), &mut message.headers);
        }
        let exchange = request.exchange.as_str();
        let queue = match (&changes.queue, exchange) {
            (Some(queue), _) => Some(queue),
            // The message came directly to the queue, or through the exchange for delayed delivery.
            (None, "" | delayed::DELIVERY) => Some(&request.queue),
            (None, _) => None,
        };
        let (exchange, routing_key, declare) = match queue {
            Some(queue) => {
                let delay = (eta - now).to_std().unwrap_or_default();
                let Route {
                    exchange,
                    routing_key,
                    declare,
                } = self.runtime.config.task_queues.route(queue, delay);
                (exchange, routing_key, Some(declare))
            }
            None => {
                let key = delayed::strip(&request.routing_key);
                (exchange.to_owned(), key.to_owned(), None)
            }
        };
        Publication {
            exchange,
            routing_key,
            message,
            declare,
            mandatory: true,
            queue_lifetime: None,
        }
    }

    fn failure(&self, exception: Exception) -> State {
        let has_traceback = exception.exc_type != "TimeLimitExceeded";
        State::Failure {
            traceback: has_traceback.then(|| exception.traceback(&self.traceback_place())),
            exception,
        }
    }

    /// Text in place of the frames of a traceback.
    fn traceback_place(&self) -> String {
        format!(
            "{} on {}, in {}",
            self.runtime.config.product.name, self.runtime.hostname, self.entry.function
        )
    }

    /// Records a state without children.
    pub(super) async fn record(&self, state: State) -> Disposition {
        self.record_with(state, Vec::new()).await
    }

    /// Stores a state if this is configured, executes its consequences, and sends its event.
    async fn record_with(&self, state: State, children: Vec<Value>) -> Disposition {
        let message = &self.request.message;
        span::note_state(&state);
        let children = match self.sent.is_empty() {
            true => children,
            false => [self.sent.clone(), children].concat(),
        };
        let meta = self.runtime.meta(&self.request, state, children);
        if self.options.stores(&meta.state)
            && let Err(Stopped) = self.runtime.store(message, &meta).await
        {
            return Disposition::Requeue;
        }
        if let Err(Stopped) = self.follow(&meta.state).await {
            return Disposition::Requeue;
        }
        if let Some(event) = Event::of(&message.id, &meta.state, self.elapsed.as_secs_f64()) {
            self.runtime.emit(&self.request, &event);
        }
        Disposition::Ack
    }

    /// Executes the consequences of a stored state.
    async fn follow(&self, state: &State) -> Result<(), Stopped> {
        let message = &self.request.message;
        let workflow = &self.runtime.workflow;
        if state.is_final() {
            workflow.returned(message, state).await?;
        }
        if let State::Failure {
            exception,
            traceback,
        } = state
        {
            let failed = workflow.failed(message, exception, traceback.as_deref());
            Box::pin(failed).await?;
        }
        Ok(())
    }
}
