//! Another publication of a message that waits for its eta: the broker would take back a delivery that is held for too
//! long.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::request::Request;
use super::runtime::Runtime;
use crate::broker::{Delivery, Disposition, Publication};
use celery_protocol::RawMessage;
use service_connection::error_chain::chain;

/// Time limit for connecting to the broker.
const PUBLISH_WITHIN: Duration = Duration::from_secs(10);

/// Interval of the checks of deliveries whose message is being published again.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Header with the number of earlier deliveries, which quorum queues add.
const DELIVERIES: &str = "x-delivery-count";

impl Runtime {
    /// Publishes the unchanged message of an accepted task again, and settles its deliveries.
    ///
    /// The broker requeues a message that is held for too long (`consumer_timeout`, 30 minutes by default) and closes
    /// the channel. Therefore a message with a longer wait is published again at an interval.
    pub(super) async fn republish_held(&self, request: &Arc<Request>) {
        // Removed first: the new message may arrive before its publication is confirmed, and must not join the old one.
        let held = self.in_flight.release(request);
        self.republish(held, request.raw.clone(), &request.message.id)
            .await;
    }

    /// Publishes a waiting message again, and settles its held deliveries.
    ///
    /// A warm shutdown waits for the broker's confirmation: a publication that was sent, and whose delivery is requeued,
    /// would be two messages. A cold shutdown requeues the deliveries.
    pub(super) async fn republish(
        &self,
        held: Vec<Delivery>,
        mut message: RawMessage,
        task_id: &str,
    ) {
        // Messages that the broker has requeued are delivered again in any case.
        let Some(queue) = held
            .iter()
            .find(|delivery| !delivery.is_void())
            .map(|delivery| delivery.queue.clone())
        else {
            return;
        };
        // The new message has no earlier deliveries.
        if message.headers.contains_key(DELIVERIES) {
            message.headers.shift_remove(DELIVERIES);
        }
        let publication = Publication {
            exchange: String::new(),
            routing_key: queue,
            message,
            declare: None,
            mandatory: true,
            queue_lifetime: None,
        };
        let publishing = self
            .broker
            .publish_until_confirmed(&publication, PUBLISH_WITHIN);
        let disposition = tokio::select! {
            published = publishing => match published {
                Ok(()) => Disposition::Ack,
                Err(error) => {
                    tracing::warn!(
                        task_id,
                        error = %chain(&error),
                        "delayed task could not be published again; its message returns to the queue"
                    );
                    Disposition::Requeue
                }
            },
            // The broker has requeued the message; publishing it as well would create a second one.
            () = requeued_by_broker(&held) => return,
            () = self.stopping.cancelled() => Disposition::Requeue,
        };
        for delivery in held {
            delivery.settle(disposition).await;
        }
    }
}

/// Number of earlier deliveries of a message, if its queue counts them.
pub(super) fn deliveries_before(message: &RawMessage) -> u64 {
    let count = message.headers.get(DELIVERIES);
    count.and_then(Value::as_u64).unwrap_or(0)
}

/// Waits until the broker has requeued all deliveries.
async fn requeued_by_broker(held: &[Delivery]) {
    while !held.iter().all(Delivery::is_void) {
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}
