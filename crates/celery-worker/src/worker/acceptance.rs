//! Acceptance of a message, after its admission: from here on the request is in flight, and later deliveries of the same
//! task join it.

use std::sync::Arc;

use super::cancellation::Cancellation;
use super::in_flight::Addition;
use super::request::Request;
use super::runtime::Runtime;
use crate::broker::Delivery;
use celery_protocol::repr;

impl Runtime {
    /// Adds a request to those in flight; returns false if its delivery joined the same task. `postponed_bytes` is the
    /// size of a body that stays with the broker for now.
    pub(super) fn take_in_flight(
        &self,
        request: &Arc<Request>,
        delivery: Delivery,
        stop: &Cancellation,
        postponed_bytes: Option<u64>,
    ) -> bool {
        log_received(request, postponed_bytes);
        let task_id = &request.message.id;
        match self.in_flight.add(request, delivery, stop) {
            Addition::First => return true,
            Addition::Joined => tracing::info!(
                task_id,
                "task is running or waiting already; the new delivery joins it"
            ),
            Addition::Ended(delivery, disposition) => {
                tracing::info!(
                    task_id,
                    "task has ended, but its message could not be settled; the new delivery joins it"
                );
                let (in_flight, identity) = (self.in_flight.clone(), request.identity);
                tokio::spawn(async move {
                    if delivery.settle(disposition).await {
                        in_flight.forget(&identity);
                    }
                });
            }
        }
        false
    }
}

/// Logs that a task was received.
fn log_received(request: &Request, postponed_bytes: Option<u64>) {
    let Request {
        message,
        redelivered,
        ..
    } = request;
    let args = message.argsrepr.as_deref().map(repr::shorten);
    let kwargs = message.kwargsrepr.as_deref().map(repr::shorten);
    match postponed_bytes {
        None => tracing::info!(
            task = message.task,
            task_id = message.id,
            args,
            kwargs,
            redelivered,
            "task received"
        ),
        Some(body_bytes) => tracing::info!(
            task = message.task,
            task_id = message.id,
            args,
            kwargs,
            redelivered,
            body_bytes,
            "task received; its message is large and stays with the broker until its eta"
        ),
    }
}
