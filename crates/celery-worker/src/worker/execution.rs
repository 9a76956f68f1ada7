//! The execution of a task that has a slot: its limits, its progress, its outcome, which is then concluded.

use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::CLEANUP_WITHIN;
use super::cancellation::{CancelReason, Cancellation};
use super::conclusion::Conclusion;
use super::effective_options::EffectiveOptions;
use super::in_flight::Phase;
use super::processing::TaskProcessing;
use super::slots::Slot;
use super::span;
use crate::broker::Disposition;
use crate::clock;
use crate::task::{
    Outcome, Signals, StateUpdate, StateUpdates, TaskContext, TaskError, TaskRun, panicked,
};
use celery_protocol::event::Event;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::result::{State, StateName};

/// Interval at which the progress of a task is stored.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

impl TaskProcessing<'_> {
    /// Runs a task that has a slot, and concludes it. Returns the disposition of its message.
    pub(super) async fn execute(&self, slot: Slot) -> Disposition {
        let (runtime, request) = (self.runtime, &self.request);
        runtime
            .in_flight
            .enter(request, Phase::Active(clock::now()));
        runtime.count(&request.message.task);
        if !self.options.acks_late {
            for delivery in runtime.in_flight.acknowledge(request) {
                if !delivery.settle(Disposition::Ack).await {
                    runtime.in_flight.note_unsettled(request);
                }
            }
        }
        runtime.emit(request, &Event::TaskStarted(&request.message.id));
        let (broker, propagation) = (&*runtime.broker, &*runtime.config.propagation);
        let span = span::begin(request, &runtime.hostname, broker, propagation);
        let mut executing = pin!(async {
            let started = Instant::now();
            let (outcome, sent) = self.run().await;
            drop(slot);
            runtime.in_flight.note_run(request);
            let conclusion = Conclusion::of_run(self, started.elapsed(), sent);
            let disposition = conclusion.conclude(outcome).await;
            span::note_disposition(disposition);
            disposition
        });
        // By reference: this future is large, and must not exist twice.
        executing.as_mut().instrument(span).await
    }

    /// Runs the task within its limits. Returns its outcome and the results of the tasks that it sent.
    async fn run(&self) -> (Outcome, Vec<Value>) {
        let Self {
            runtime,
            request,
            registered,
            options,
            stop,
            ..
        } = self;
        if options.track_started {
            let state = State::Started {
                pid: std::process::id(),
                hostname: runtime.hostname.to_string(),
            };
            runtime.store_state(request, state, Vec::new()).await;
        }
        let context = TaskContext::new(TaskRun {
            hostname: runtime.hostname.clone(),
            request: request.clone(),
            limits: (options.time_limit, options.soft_time_limit),
            signals: Signals {
                cancelled: stop.now.clone(),
                terminated: stop.for_good.clone(),
                soft_time_limit: stop.soft_time_limit.clone(),
                last: stop.last.clone(),
                shutting_down: runtime.shutdown.warm.clone(),
            },
            state_updates: StateUpdates::default(),
            will_requeue: self.will_requeue(),
            registry: runtime.registry.clone(),
            worker_client: runtime.client.clone(),
            client: OnceLock::new(),
        });
        let run = (registered.run)(context.clone());
        // A separate task, for a panic outside of the task's own body, e.g. in its `on_failure`.
        let run = run.instrument(span::of_task(&request.message));
        let mut running = AbortOnDropHandle::new(tokio::spawn(run.in_current_span()));
        let limited = enforce(options, stop, &runtime.stopping);
        let ended = tokio::select! {
            biased;
            ended = &mut running => Some(ended),
            // Stores states while the task runs, and stops before its result is stored.
            never = self.pass_on_states(&context) => match never {},
            () = limited => None,
        };
        context.run.state_updates.close();
        let Some(ended) = ended else {
            running.abort();
            tracing::error!(
                task = request.message.task,
                task_id = request.message.id,
                "task did not stop in time; it was dropped"
            );
            return (Err(TaskError::Stopped.into()), context.sent());
        };
        let outcome = ended.unwrap_or_else(|error| {
            let exception = match error.try_into_panic() {
                Ok(panic) => panicked(&*panic),
                Err(error) => Exception::new(BUILTINS, "RuntimeError", error.to_string()),
            };
            Err(TaskError::Raised(exception).into())
        });
        (outcome, context.sent())
    }

    fn will_requeue(&self) -> Box<dyn Fn() -> bool + Send + Sync> {
        let (in_flight, request) = (self.runtime.in_flight.clone(), self.request.clone());
        Box::new(move || in_flight.is_held(&request))
    }

    /// Stores the states that a task reports, and sends them as events.
    async fn pass_on_states(&self, context: &TaskContext) -> std::convert::Infallible {
        let updates = &context.run.state_updates;
        loop {
            let StateUpdate { state, passed_on } = updates.next().await;
            if let State::Custom { name, meta } = &state
                && *name == StateName::PROGRESS
            {
                let progress = Arc::new(meta.clone());
                self.runtime
                    .in_flight
                    .note_progress(&self.request, progress);
            }
            if let Some(event) = Event::of(&self.request.message.id, &state, 0.0) {
                self.runtime.emit(&self.request, &event);
            }
            if self.options.stores(&state) {
                let sent = context.sent();
                self.runtime.store_state(&self.request, state, sent).await;
            }
            if let Some(waiting) = passed_on {
                // The task may have been dropped in the meantime.
                let _ = waiting.send(());
            }
            updates.pause(PROGRESS_EVERY).await;
        }
    }
}

/// Cancels a task that exceeds its limits. Returns only if the task does not stop then, or at a cold shutdown.
async fn enforce(options: &EffectiveOptions, stop: &Cancellation, shutdown: &CancellationToken) {
    let after = |seconds: Option<f64>| async move {
        match seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()) {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let hard = async {
        after(options.time_limit).await;
        stop.stop(CancelReason::TimeLimit(
            options.time_limit.unwrap_or_default(),
        ));
    };
    let soft = async {
        after(options.soft_time_limit).await;
        stop.stop(CancelReason::SoftTimeLimit);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = hard => {}
        () = soft => {}
        () = shutdown.cancelled() => {}
    }
    tokio::time::sleep(CLEANUP_WITHIN).await;
}
