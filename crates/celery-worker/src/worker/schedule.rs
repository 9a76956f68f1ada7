//! The schedule of an accepted task, between acceptance and execution: it waits for its eta, its rate limit and a slot.

use serde_json::Value;

use super::eta_hold::HoldEnd;
use super::in_flight::Phase;
use super::processing::TaskProcessing;
use super::slots::{Permit, Slot};
use crate::clock;
use celery_protocol::result::{Cause, FinalState};
use service_connection::error_chain::chain;

/// Result of the wait of a task for its turn.
pub(super) enum Turn {
    /// The task runs, in this slot.
    Run(Slot),
    /// The task must not run.
    Skip(Cause),
    /// The task has succeeded before.
    SucceededBefore(StoredSuccess),
    /// The delivery was held as long as the broker allows: the message has to be published again.
    HoldLimit,
    /// The worker shuts down.
    Shutdown,
}

/// The stored SUCCESS of an earlier run.
pub(super) struct StoredSuccess {
    /// Value that the task returned.
    pub(super) returned: Value,
    /// True if the result has children: the tasks that the worker sent after it.
    pub(super) has_children: bool,
}

impl TaskProcessing<'_> {
    /// Waits for the task's eta, its rate limit and a slot. While it waits for its eta it needs no permit to hold its
    /// message.
    pub(super) async fn wait_for_turn(&self, permit: &mut Option<Permit>) -> Turn {
        let (runtime, request) = (self.runtime, &self.request);
        let message = &request.message;
        if let Some(eta) = message.eta {
            if eta > clock::now() {
                *permit = None;
            }
            // Boxed: most tasks have no eta.
            match Box::pin(runtime.hold_until_eta(request, eta)).await {
                HoldEnd::EtaReached => runtime.in_flight.set_exempt(request, false),
                HoldEnd::LimitReached => return Turn::HoldLimit,
                HoldEnd::Shutdown => return Turn::Shutdown,
            }
        }
        let until_shutdown = &runtime.shutdown.warm;
        let slot = async {
            runtime.in_flight.enter(request, Phase::Reserved);
            runtime.rate_limits.pass(&message.task).await;
            if let (None, Some(permits)) = (&permit, &runtime.permits) {
                *permit = permits.acquire().await;
            }
            runtime.slots.acquire().await
        };
        let Some(slot) = until_shutdown.run_until_cancelled(slot).await.flatten() else {
            return Turn::Shutdown;
        };
        // Checked again, since the task may have waited for a long time.
        if let Some(cause) = runtime.skip_reason(message) {
            return Turn::Skip(cause);
        }
        match until_shutdown
            .run_until_cancelled(self.earlier_success())
            .await
        {
            Some(None) => Turn::Run(slot),
            Some(Some(returned)) => Turn::SucceededBefore(returned),
            None => Turn::Shutdown,
        }
    }

    /// The stored result of a redelivered task that has succeeded before (`worker_deduplicate_successful_tasks`).
    async fn earlier_success(&self) -> Option<StoredSuccess> {
        let request = &self.request;
        let deduplicates = self.runtime.config.deduplicate && self.options.acks_late;
        if !(deduplicates && request.redelivered) {
            return None;
        }
        match self.runtime.results.get(&request.message.id).await {
            Ok(stored) => {
                let mut stored =
                    stored.filter(|stored| FinalState::of(stored) == Some(FinalState::Success))?;
                let children = stored["children"].as_array();
                Some(StoredSuccess {
                    has_children: children.is_some_and(|children| !children.is_empty()),
                    returned: stored["result"].take(),
                })
            }
            Err(error) => {
                tracing::warn!(
                    task_id = request.message.id,
                    error = %chain(&error),
                    "unknown whether the task has succeeded before; it runs"
                );
                None
            }
        }
    }
}
