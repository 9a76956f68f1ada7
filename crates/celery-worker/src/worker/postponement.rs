//! Messages that stay with the broker for now: their deliveries are held without the message, and requeued when the
//! task's eta is reached or enough memory is free.

use std::time::Duration;

use serde_json::Value;

use super::cancellation::Cancellation;
use super::identity::Identity;
use super::republication::deliveries_before;
use super::request::Request;
use super::runtime::Runtime;
use crate::broker::{Delivery, Disposition};
use celery_protocol::RawMessage;
use celery_protocol::event::Event;
use celery_protocol::message::TaskMessage;
use celery_protocol::repr;

/// Time for which memory stays reserved for a message that should be redelivered. Another worker may receive it
/// instead.
const RESERVED_FOR: Duration = Duration::from_secs(30);

/// Number of earlier deliveries after which a message is published again instead of being requeued: quorum queues drop
/// a message that was requeued too often.
const MANY_DELIVERIES: u64 = 3;

impl Runtime {
    /// Leaves a message with the broker until the task's eta. `message` is its outline.
    pub(super) async fn postpone(
        &self,
        mut delivery: Delivery,
        identity: Identity,
        message: TaskMessage,
    ) {
        let Some(eta) = message.eta else { return };
        delivery.permit = None;
        let omitted_bytes = delivery
            .damage
            .as_ref()
            .and_then(|damage| damage.body_bytes);
        // A message without its body cannot be published again. It need not be: the broker's connection omits no body in
        // a queue that counts deliveries.
        if omitted_bytes.is_none() && deliveries_before(&delivery.message) >= MANY_DELIVERIES {
            let raw = std::mem::take(&mut delivery.message);
            return self.republish(vec![delivery], raw, &message.id).await;
        }
        let body_bytes = omitted_bytes.unwrap_or(delivery.message.body.len() as u64);
        let mut request = Request::new(&mut delivery, identity, message);
        request.raw = RawMessage::default();
        let request = &request.into();
        let stop = Cancellation::new(&self.stopping);
        if !self.take_in_flight(request, delivery, &stop, Some(body_bytes)) {
            return;
        }
        self.emit(request, &Event::TaskReceived(&request.message));
        // Requeued in each case: the next delivery has the body.
        self.hold_until_eta(request, eta).await;
        for delivery in self.in_flight.release(request) {
            delivery.settle(Disposition::Requeue).await;
        }
    }

    /// Leaves a message with the broker until there is enough memory for it.
    pub(super) async fn wait_for_memory(
        &self,
        mut delivery: Delivery,
        identity: Identity,
        weight: usize,
    ) {
        let raw = std::mem::take(&mut delivery.message);
        let task_id = raw.headers.get("id").and_then(Value::as_str);
        tracing::info!(
            task_id = task_id.map(repr::shorten),
            body_bytes = raw.body.len(),
            "message is large and stays with the broker until memory is free"
        );
        drop(raw);
        let waited = async {
            let share = self.memory.wait(weight).await;
            if let Some(share) = share
                && !delivery.is_void()
            {
                self.memory.reserve(identity, share);
            }
            delivery.settle(Disposition::Requeue).await;
            tokio::time::sleep(RESERVED_FOR).await;
        };
        tokio::select! {
            () = self.shutdown.warm.cancelled() => {}
            () = waited => {}
        }
        drop(self.memory.cancel(&identity));
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;

    use futures_util::poll;
    use rstest::rstest;

    use super::*;
    use crate::broker::consumer::Damage;
    use crate::clock;
    use crate::results::memory::MemoryResults;
    use crate::worker::DefaultOptions;
    use crate::worker::test_support::{ProbeSettlement, identity, runtime};

    /// The delivery is settled when memory is free, and its redelivery finds the memory reserved. The memory is not
    /// reserved if the broker has requeued the message before: another worker may have it.
    #[rstest]
    #[case::held(false)]
    #[case::lost(true)]
    #[tokio::test]
    async fn free_memory_is_reserved_for_the_redelivery(#[case] is_lost: bool) {
        let runtime = runtime(Arc::new(MemoryResults::new()), DefaultOptions::default());
        let (mine, other) = (identity("mine"), identity("other"));
        let full = runtime.memory.take(&other, usize::MAX);
        assert!(full.is_some());
        let probe = ProbeSettlement::default();
        let delivery = probe.delivery(RawMessage::default());
        let mut waiting = pin!(runtime.wait_for_memory(delivery, mine, usize::MAX));
        assert!(poll!(&mut waiting).is_pending());
        assert_eq!(probe.disposition(), None);
        if is_lost {
            probe.lose();
        }
        drop(full);
        assert!(poll!(&mut waiting).is_pending(), "the reservation lasts");
        assert_eq!(probe.disposition(), Some(Disposition::Requeue));
        assert_eq!(runtime.memory.take(&other, 1).is_some(), is_lost);
        assert!(runtime.memory.take(&mine, usize::MAX).is_some());
    }

    /// The body of such a message is not at hand. Its header may come from another broker than that of its queue.
    #[tokio::test]
    async fn message_without_its_body_is_not_published_again() {
        let runtime = runtime(Arc::new(MemoryResults::new()), DefaultOptions::default());
        let probe = ProbeSettlement::default();
        let raw = RawMessage {
            headers: [("x-delivery-count".to_owned(), Value::from(MANY_DELIVERIES))]
                .into_iter()
                .collect(),
            ..RawMessage::default()
        };
        let mut delivery = probe.delivery(raw);
        delivery.damage = Some(Box::new(Damage {
            awaits_eta: true,
            body_bytes: Some(1 << 20),
            ..Damage::default()
        }));
        let outline = TaskMessage {
            id: "a".into(),
            task: "t".into(),
            eta: Some(clock::now() + chrono::Duration::minutes(1)),
            ..TaskMessage::default()
        };
        let mut postponed = pin!(runtime.postpone(delivery, identity(""), outline));
        assert!(poll!(&mut postponed).is_pending());
        assert_eq!(probe.disposition(), None, "held");
    }

    /// A shutdown ends both waits: for the memory, and for the redelivery.
    #[rstest]
    #[case::for_memory(true)]
    #[case::for_the_redelivery(false)]
    #[tokio::test]
    async fn shutdown_ends_the_wait(#[case] is_full: bool) {
        let runtime = runtime(Arc::new(MemoryResults::new()), DefaultOptions::default());
        let (mine, other) = (identity("mine"), identity("other"));
        let full = is_full.then(|| runtime.memory.take(&other, usize::MAX));
        let probe = ProbeSettlement::default();
        let delivery = probe.delivery(RawMessage::default());
        let mut waiting = pin!(runtime.wait_for_memory(delivery, mine, usize::MAX));
        assert!(poll!(&mut waiting).is_pending());
        runtime.shutdown.warm();
        assert!(poll!(&mut waiting).is_ready());
        assert_eq!(probe.disposition(), Some(Disposition::Requeue));
        drop(full);
        assert!(runtime.memory.take(&other, usize::MAX).is_some(), "freed");
    }
}
