//! The schedule of an accepted task, between acceptance and execution: it waits for its eta, its rate limit and a slot.

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::execution::Execution;
use super::in_flight::Phase;
use super::slots::Slot;
use crate::broker::Disposition;
use crate::clock;
use crate::workflow::Stopped;
use celery_protocol::result::State;
use service_connection::error_chain::chain;

/// Result of the wait for an eta.
enum EtaWait {
    /// The eta is reached.
    Reached,
    /// The delivery was held as long as the broker allows.
    HoldEnded,
}

impl Execution<'_> {
    /// Waits for the task's eta, its rate limit and a slot. An error is the disposition of a message whose task does
    /// not start.
    pub(super) async fn wait_for_turn(&self) -> Result<Slot, Disposition> {
        let runtime = self.runtime;
        let message = &self.request.message;
        let until_shutdown = &runtime.shutdown.warm;
        if let Some(eta) = message.eta {
            let waiting = until_shutdown.run_until_cancelled(Box::pin(self.wait_until(eta)));
            match waiting.await {
                Some(EtaWait::Reached) => {}
                Some(EtaWait::HoldEnded) => return Err(Box::pin(self.publish_again()).await),
                None => return Err(Disposition::Requeue),
            }
        }
        let slot = async {
            runtime.in_flight.enter(&self.request, Phase::Reserved);
            runtime.rate_limits.pass(&message.task).await;
            runtime.slots.acquire().await
        };
        let slot = until_shutdown.run_until_cancelled(slot).await.flatten();
        let slot = slot.ok_or(Disposition::Requeue)?;
        // Checked again, since the task may have waited for a long time.
        if let Some(cause) = runtime.unwanted(message) {
            drop(slot);
            return Err(Box::pin(self.end_without_run(cause)).await);
        }
        let done_before = self.done_before();
        let Some(done_before) = runtime.shutdown.warm.run_until_cancelled(done_before).await else {
            return Err(Disposition::Requeue);
        };
        let Some(returned) = done_before else {
            return Ok(slot);
        };
        tracing::info!(
            task_id = message.id,
            "redelivered task had succeeded before; it does not run"
        );
        // The follow-up tasks were sent before this result was stored, but the task may not have been counted for its
        // chord.
        let state = State::Success(returned);
        match runtime.workflow.returned(message, &state).await {
            Ok(()) => Err(Disposition::Ack),
            Err(Stopped) => Err(Disposition::Requeue),
        }
    }

    /// The stored result of a redelivered task that has succeeded before (`worker_deduplicate_successful_tasks`).
    async fn done_before(&self) -> Option<Value> {
        let request = &self.request;
        let deduplicates = self.runtime.config.deduplicate && self.options.acks_late;
        if !(deduplicates && request.redelivered) {
            return None;
        }
        match self.runtime.results.get(&request.message.id).await {
            Ok(stored) => {
                let mut stored = stored.filter(|stored| stored["status"] == "SUCCESS")?;
                Some(stored["result"].take())
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

    /// Waits for a task's eta, as long as the broker lets a delivery be held.
    async fn wait_until(&self, eta: DateTime<Utc>) -> EtaWait {
        let (runtime, request) = (self.runtime, &self.request);
        let Ok(left) = (eta - clock::now()).to_std() else {
            return EtaWait::Reached;
        };
        // A waiting message must not count against the prefetch limit.
        runtime.in_flight.enter(request, Phase::Scheduled(eta));
        runtime.in_flight.park(request, true);
        tokio::time::sleep(left.min(runtime.config.eta_hold)).await;
        if left > runtime.config.eta_hold {
            return EtaWait::HoldEnded;
        }
        runtime.in_flight.park(request, false);
        EtaWait::Reached
    }

    /// Publishes the unchanged message again, and settles its deliveries. Returns the disposition of those that join it
    /// meanwhile.
    ///
    /// The broker requeues a message that is held for too long (`consumer_timeout`, 30 minutes by default) and closes
    /// the channel. Therefore a message with a longer wait is published again at an interval.
    async fn publish_again(&self) -> Disposition {
        let (runtime, request) = (self.runtime, &self.request);
        // Removed first: the new message may arrive before its publication is confirmed, and must not join the old one.
        let held = runtime.in_flight.release(request);
        runtime
            .republish(held, request.raw.clone(), &request.message.id)
            .await;
        Disposition::Requeue
    }
}
