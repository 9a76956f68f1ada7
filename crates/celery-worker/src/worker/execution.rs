//! The run of a task: its limits, its progress, its outcome.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::Worker;
use super::accepted::Received;
use super::policy::Policy;
use super::stop::{Reason as StopReason, Stop};
use crate::task::{Entry, Outcome, Signals, TaskContext, TaskError, panicked};
use celery_protocol::event::Event;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::result::State;
use service_connection::error_chain::chain;

/// How long a state that is only news, STARTED or PROGRESS, may hold things up.
const NEWS_WITHIN: Duration = Duration::from_secs(5);

/// How often a task's progress is passed on.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// How long a task that ran too long may take to put things in order.
const LIMIT_GRACE: Duration = Duration::from_secs(30);

impl Worker {
    pub(super) async fn execute(
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
        let run = (entry.run)(TaskContext {
            hostname: self.hostname.clone(),
            message: received.message.clone(),
            redelivered: received.redelivered,
            signals: Signals {
                cancelled: stop.now.clone(),
                terminated: stop.for_good.clone(),
                shutting_down: self.shutdown.warm.clone(),
            },
            progress,
            will_requeue: self.will_requeue(received),
            state: None,
            #[cfg(feature = "celery-crate")]
            raised: None,
        });
        // On its own, for a panic outside the task's own body, e.g. in its `on_failure`.
        let mut running = AbortOnDropHandle::new(tokio::spawn(run.in_current_span()));
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
                return Err(TaskError::Requeue);
            }
        };
        ended.unwrap_or_else(|error| {
            let exception = match error.try_into_panic() {
                Ok(panic) => panicked(&*panic),
                Err(error) => Exception::new(BUILTINS, "RuntimeError", error.to_string()),
            };
            Err(TaskError::Raised(exception))
        })
    }

    fn will_requeue(&self, received: &Arc<Received>) -> Arc<dyn Fn() -> bool + Send + Sync> {
        let (accepted, received) = (self.accepted.clone(), received.clone());
        Arc::new(move || accepted.is_held(&received))
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
