//! The conclusion of a task, after its execution or in its place: its follow-up tasks, its result, its callbacks and its
//! event, and then the disposition with which its message is settled.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::cancellation::CancelReason;
use super::processing::TaskProcessing;
use super::span;
use crate::broker::{Disposition, Publication, Route, delayed};
use crate::clock;
use crate::task::{Discarded, Failure, Outcome, Reject, Retry, TaskError, When};
use crate::workflow::{Stopped, WorkflowError};
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::result::{Cause, State};
use celery_protocol::retry::Changes;

/// The end of one task. Its steps fail if the worker stops before the broker and the result backend have confirmed
/// them; the message is then requeued.
pub(super) struct Conclusion<'a> {
    task: &'a TaskProcessing<'a>,
    /// Time that the run took; zero without a run.
    elapsed: Duration,
    /// Results of the tasks that the run sent, for the `children` of its own result.
    sent: Vec<Value>,
    /// True if the task did not run, because its arguments do not fit.
    is_refused: bool,
}

impl<'a> Conclusion<'a> {
    /// Creates the conclusion of a task that has run.
    pub(super) fn of_run(
        task: &'a TaskProcessing<'a>,
        elapsed: Duration,
        sent: Vec<Value>,
    ) -> Self {
        Self {
            task,
            elapsed,
            sent,
            is_refused: false,
        }
    }

    /// Creates the conclusion of a task that does not run.
    pub(super) fn without_run(task: &'a TaskProcessing<'a>) -> Self {
        Self::of_run(task, Duration::ZERO, Vec::new())
    }

    /// Concludes a run; returns the disposition of its message.
    pub(super) async fn conclude(mut self, outcome: Outcome) -> Disposition {
        let concluded = match outcome {
            Ok(value) => self.succeed(value).await,
            // Boxed: keeps the common task's future small.
            Err(Failure::Task(error)) => Box::pin(self.conclude_failure(error)).await,
            Err(Failure::WrongArguments(exception)) => {
                self.is_refused = true;
                Box::pin(self.raise(exception)).await
            }
        };
        concluded.unwrap_or(Disposition::Requeue)
    }

    /// Concludes a run that returned no value.
    async fn conclude_failure(&self, failure: TaskError) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        match failure {
            TaskError::Raised(exception) => self.raise(exception).await,
            TaskError::Retry(retry) => self.retry(*retry).await,
            TaskError::Reject(Reject { reason, requeue }) => self.reject(reason, requeue).await,
            TaskError::Ignore => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s = self.elapsed.as_secs_f64(),
                    "task ignored"
                );
                Ok(Disposition::Ack)
            }
            TaskError::Stopped => match self.task.stop.reason() {
                Some(reason) => self.conclude_cancelled(reason).await,
                None => self.conclude_interrupted().await,
            },
        }
    }

    /// Concludes a task that was cancelled by itself.
    async fn conclude_cancelled(&self, reason: CancelReason) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        match reason {
            CancelReason::Terminated => {
                tracing::warn!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s = self.elapsed.as_secs_f64(),
                    "task was terminated"
                );
                self.record(State::Revoked(Cause::Terminated)).await?;
                Ok(Disposition::Ack)
            }
            CancelReason::SoftTimeLimit => {
                let exception = Exception::soft_time_limit_exceeded();
                self.raise(exception).await
            }
            CancelReason::TimeLimit(seconds) => {
                let exception = Exception::time_limit_exceeded(seconds);
                let disposition = self.fail(exception).await?;
                Ok(match self.task.options.acks_on_timeout {
                    true => disposition,
                    false => Disposition::Requeue,
                })
            }
        }
    }

    /// Concludes a task that a cold shutdown has stopped, or that stopped without being asked to.
    async fn conclude_interrupted(&self) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        if self.task.options.acks_late {
            tracing::warn!(
                task = message.task,
                task_id = message.id,
                runtime_s = self.elapsed.as_secs_f64(),
                "task was interrupted; its message returns to the queue"
            );
            return Ok(Disposition::Requeue);
        }
        // As a Python worker does; the task does not run again.
        let exception = Exception::new(
            "celery.exceptions",
            "WorkerShutdown",
            "the worker was shut down while the task ran, after it had acknowledged the message",
        );
        self.fail(exception).await
    }

    /// Concludes a run that raised an exception.
    async fn raise(&self, exception: Exception) -> Result<Disposition, Stopped> {
        let retries = self.task.request.message.retries;
        match self.task.registered.autoretry.retry(retries, &exception) {
            Some(retry) => self.retry(retry).await,
            None => self.fail(exception).await,
        }
    }

    async fn succeed(&self, value: Value) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        let children = match self.task.runtime.workflow.succeeded(message, &value).await {
            Ok(children) => children,
            Err(WorkflowError::Stopped) => return Err(Stopped),
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
        self.record_with(State::Success(value), children).await?;
        Ok(Disposition::Ack)
    }

    async fn fail(&self, exception: Exception) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        if self.is_refused {
            let reason = Discarded::WrongArguments(exception.headline());
            let discarded = self.task.discard(reason, &self.task.stop.now).await;
            // A message that is acknowledged does not return, and its task needs a state.
            if discarded.is_err() && self.task.options.acks_late {
                return Err(Stopped);
            }
        }
        tracing::error!(
            task = message.task,
            task_id = message.id,
            runtime_s = self.elapsed.as_secs_f64(),
            exception = exception.headline(),
            "task failed"
        );
        let state = self.failure(exception);
        self.record(state).await?;
        Ok(match self.task.options.acks_on_failure {
            true => Disposition::Ack,
            false => Disposition::Reject,
        })
    }

    /// Settles the message of a task that rejects it.
    async fn reject(&self, reason: Value, requeue: bool) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
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
            self.record(state).await?;
        }
        if self.task.options.acks_late {
            let id = &message.id;
            self.task
                .runtime
                .emit(&self.task.request, &Event::TaskRejected { id, requeue });
        }
        Ok(match requeue {
            true => Disposition::Requeue,
            false => Disposition::Reject,
        })
    }

    /// Publishes a task's message for its next run, or fails the task if it has no retries left.
    async fn retry(&self, retry: Retry) -> Result<Disposition, Stopped> {
        let message = &self.task.request.message;
        if message.retries >= retry.max_retries.unwrap_or(self.task.options.max_retries) {
            let exception = retry
                .exception
                .unwrap_or_else(|| Exception::max_retries_exceeded(message));
            return self.fail(exception).await;
        }
        let when = retry
            .when
            .unwrap_or(When::In(self.task.options.retry_delay));
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
        self.record_with(state, vec![next]).await?;
        let changes = retry
            .changes
            .completed(message, &self.task.registered.parameters);
        let publication = self.retry_publication(eta, &changes);
        match self
            .task
            .runtime
            .workflow
            .publish(&publication, &message.id)
            .await
        {
            Ok(()) => Ok(Disposition::Ack),
            Err(WorkflowError::Stopped) => Err(Stopped),
            // The message cannot be delivered: its queue or exchange does not exist.
            Err(error) => self.fail(error.exception()).await,
        }
    }

    /// A task's message for its next run, by the route of the first message or to the queue that the task chose.
    fn retry_publication(&self, eta: DateTime<Utc>, changes: &Changes) -> Publication {
        let now = clock::now();
        let request = &*self.task.request;
        let mut message = request.message.retry(&request.raw, Some(eta), now, changes);
        let propagation = &*self.task.runtime.config.propagation;
        span::keep_trace(request, &mut message.headers, propagation);
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
                } = self.task.runtime.config.task_queues.route(queue, delay);
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
            self.task.runtime.config.product.name,
            self.task.runtime.hostname,
            self.task.registered.function
        )
    }

    /// Records a state without children.
    pub(super) async fn record(&self, state: State) -> Result<(), Stopped> {
        self.record_with(state, Vec::new()).await
    }

    /// Stores a state if this is configured, executes its consequences, and sends its event.
    async fn record_with(&self, state: State, children: Vec<Value>) -> Result<(), Stopped> {
        let TaskProcessing {
            runtime,
            request,
            options,
            ..
        } = self.task;
        let message = &request.message;
        span::note_state(&state);
        let children = match self.sent.is_empty() {
            true => children,
            false => [self.sent.clone(), children].concat(),
        };
        let meta = runtime.meta(request, state, children);
        if options.stores(&meta.state) {
            runtime.store(message, &meta).await?;
        }
        if meta.state.is_final() {
            runtime.workflow.ended(message, &meta.state).await?;
        }
        if let Some(event) = Event::of(&message.id, &meta.state, self.elapsed.as_secs_f64()) {
            self.emit(event);
        }
        Ok(())
    }

    /// Sends the event of an end. That of a failure has a traceback, also where none is stored.
    fn emit(&self, event: Event<'_>) {
        let TaskProcessing {
            runtime, request, ..
        } = self.task;
        match event {
            Event::TaskFailed {
                id,
                exception,
                traceback: None,
            } => {
                let traceback = exception.traceback(&self.traceback_place());
                let traceback = Some(traceback.as_str());
                let event = Event::TaskFailed {
                    id,
                    exception,
                    traceback,
                };
                runtime.emit(request, &event);
            }
            event => runtime.emit(request, &event),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rstest::rstest;

    use super::*;
    use crate::results::ResultBackend as _;
    use crate::results::memory::MemoryResults;
    use crate::worker::DefaultOptions;
    use crate::worker::identity::Identity;
    use crate::worker::request::Request;
    use crate::worker::test_support::{ProbeSettlement, runtime};
    use celery_protocol::RawMessage;
    use celery_protocol::message::TaskMessage;

    use Disposition::{Ack, Reject as Rejected, Requeue};

    fn failed(error: impl Into<TaskError>) -> Outcome {
        Err(Failure::Task(error.into()))
    }

    fn raised() -> Outcome {
        failed(Exception::value_error("wrong"))
    }

    fn refused() -> Outcome {
        Err(Failure::WrongArguments(Exception::type_error("missing")))
    }

    fn retried(max_retries: u32) -> Outcome {
        failed(Retry::default().max_retries(max_retries))
    }

    fn rejected(requeue: bool) -> Outcome {
        let reason = json!("no");
        failed(Reject { reason, requeue })
    }

    const STOPPED: Outcome = Err(Failure::Task(TaskError::Stopped));

    /// Concludes a run of a worker that is `stopping` or not. Returns the disposition and the stored state.
    async fn concluded(
        outcome: Outcome,
        options: DefaultOptions,
        cancelled: Option<CancelReason>,
        stopping: bool,
    ) -> (Disposition, Option<String>) {
        let results = MemoryResults::new();
        let runtime = runtime(Arc::new(results.clone()), options);
        let message = TaskMessage {
            id: "a".into(),
            task: "t".into(),
            ..TaskMessage::default()
        };
        let mut delivery = ProbeSettlement::default().delivery(RawMessage::default());
        let identity = Identity::of(&delivery.message);
        let request = Request::new(&mut delivery, identity, message);
        let Some(registered) = runtime.registry.get("t") else {
            return (Requeue, Some("no task".into()));
        };
        let task = TaskProcessing::new(&runtime, request, registered);
        if let Some(reason) = cancelled {
            task.stop.stop(reason);
        }
        if stopping {
            runtime.stopping.cancel();
            runtime.settling_over.cancel();
        }
        let conclusion = Conclusion::of_run(&task, Duration::ZERO, Vec::new());
        let disposition = conclusion.conclude(outcome).await;
        let stored = results.get("a").await.ok().flatten();
        let status = stored.and_then(|meta| Some(meta["status"].as_str()?.to_owned()));
        (disposition, status)
    }

    #[rstest]
    #[case::value(Ok(json!(5)), |_: &mut _| {}, Ack, Some("SUCCESS"))]
    #[case::value_unstored(Ok(json!(5)), |o: &mut DefaultOptions| o.ignore_result = true, Ack, None)]
    #[case::raised(raised(), |_: &mut _| {}, Ack, Some("FAILURE"))]
    #[case::raised_no_ack(raised(), |o: &mut DefaultOptions| o.acks_on_failure = false, Rejected, Some("FAILURE"))]
    #[case::raised_unstored(raised(), |o: &mut DefaultOptions| o.ignore_result = true, Ack, None)]
    #[case::refused(refused(), |_: &mut _| {}, Ack, Some("FAILURE"))]
    #[case::retried(retried(3), |_: &mut _| {}, Ack, Some("RETRY"))]
    #[case::retried_too_often(retried(0), |_: &mut _| {}, Ack, Some("FAILURE"))]
    #[case::retried_too_often_no_ack(retried(0), |o: &mut DefaultOptions| o.acks_on_failure = false, Rejected, Some("FAILURE"))]
    #[case::rejected(rejected(false), |_: &mut _| {}, Rejected, Some("FAILURE"))]
    #[case::rejected_to_its_queue(rejected(true), |_: &mut _| {}, Requeue, None)]
    #[case::ignored(failed(TaskError::Ignore), |_: &mut _| {}, Ack, None)]
    #[case::interrupted_early_ack(STOPPED, |_: &mut _| {}, Ack, Some("FAILURE"))]
    #[case::interrupted_late_ack(STOPPED, |o: &mut DefaultOptions| o.acks_late = true, Requeue, None)]
    #[tokio::test]
    async fn outcome_and_options_decide(
        #[case] outcome: Outcome,
        #[case] change: fn(&mut DefaultOptions),
        #[case] disposition: Disposition,
        #[case] state: Option<&str>,
    ) {
        let mut options = DefaultOptions::default();
        change(&mut options);
        let found = concluded(outcome, options, None, false).await;
        assert_eq!((found.0, found.1.as_deref()), (disposition, state));
    }

    #[rstest]
    #[case::terminated(CancelReason::Terminated, true, Ack, "REVOKED")]
    #[case::terminated_no_ack(CancelReason::Terminated, false, Ack, "REVOKED")]
    #[case::soft_limit(CancelReason::SoftTimeLimit, true, Ack, "FAILURE")]
    #[case::soft_limit_no_ack(CancelReason::SoftTimeLimit, false, Ack, "FAILURE")]
    #[case::limit(CancelReason::TimeLimit(1.0), true, Ack, "FAILURE")]
    #[case::limit_no_ack(CancelReason::TimeLimit(1.0), false, Requeue, "FAILURE")]
    #[tokio::test]
    async fn reason_of_a_cancellation_decides(
        #[case] reason: CancelReason,
        #[case] acks_on_timeout: bool,
        #[case] disposition: Disposition,
        #[case] state: &str,
    ) {
        // The message of a cancelled task returns to its queue neither with late acknowledgement.
        for acks_late in [false, true] {
            let options = DefaultOptions {
                acks_late,
                acks_on_timeout,
                ..DefaultOptions::default()
            };
            let found = concluded(STOPPED, options, Some(reason), false).await;
            assert_eq!((found.0, found.1.as_deref()), (disposition, Some(state)));
        }
    }

    /// A worker that stops before the state is stored requeues the message, whatever the options say.
    #[rstest]
    #[case::value(Ok(json!(5)), None)]
    #[case::raised(raised(), None)]
    #[case::refused(refused(), None)]
    #[case::retried(retried(3), None)]
    #[case::retried_too_often(retried(0), None)]
    #[case::rejected(rejected(false), None)]
    #[case::terminated(STOPPED, Some(CancelReason::Terminated))]
    #[case::soft_limit(STOPPED, Some(CancelReason::SoftTimeLimit))]
    #[tokio::test]
    async fn unstored_state_requeues(
        #[case] outcome: Outcome,
        #[case] cancelled: Option<CancelReason>,
    ) {
        let options = DefaultOptions {
            acks_on_failure: false,
            ..DefaultOptions::default()
        };
        let found = concluded(outcome, options, cancelled, true).await;
        assert_eq!(found, (Requeue, None));
    }
}
