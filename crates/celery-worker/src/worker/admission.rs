//! Admission of a delivery, the first step of its intake: its message is decoded if there is enough memory. Otherwise
//! the message stays with the broker until there is enough memory, or until its eta.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::cancellation::Cancellation;
use super::execution::Execution;
use super::identity::Identity;
use super::in_flight::{Phase, Request};
use super::memory::{self, MemoryShare};
use super::republication::deliveries_before;
use super::runtime::Runtime;
use crate::aside::apart;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use crate::task::Entry;
use celery_protocol::RawMessage;
use celery_protocol::content::Accept;
use celery_protocol::event::Event;
use celery_protocol::message::{self, Reason, Refused, TaskMessage};
use celery_protocol::result::Cause;
use celery_protocol::{repr, weight};

/// Time for which memory stays reserved for a message that should be redelivered. Another worker may receive it
/// instead.
const RESERVED_FOR: Duration = Duration::from_secs(30);

/// Number of earlier deliveries after which a message is published again instead of being requeued: quorum queues drop
/// a message that was requeued too often.
const MANY_DELIVERIES: u64 = 3;

/// A message that was decoded, and stays in memory until it is settled.
pub(super) struct Admitted {
    pub(super) delivery: Delivery,
    pub(super) read: Box<Result<TaskMessage, Refused>>,
    /// The message's share of the memory budget, which it keeps until it is settled.
    pub(super) share: Option<MemoryShare>,
}

impl Runtime {
    /// Decodes a message if there is enough memory; otherwise waits and requeues it. `None` if the message needs no
    /// further processing.
    pub(super) async fn admit(self: &Arc<Self>, delivery: Delivery) -> Option<Admitted> {
        let accept = &self.config.accept;
        if delivery
            .damage
            .as_ref()
            .is_some_and(|damage| damage.is_early)
        {
            return Box::pin(self.admit_early(delivery)).await;
        }
        // The weight of a large body takes some time: it is computed on another thread.
        if delivery.message.body.len() > memory::LIGHT {
            return Box::pin(self.admit_heavy(delivery)).await;
        }
        let weight = weight::of(&delivery.message, accept);
        if weight > memory::LIGHT {
            return Box::pin(self.admit_heavy(delivery)).await;
        }
        let message = read(&delivery, accept);
        self.admit_read(delivery, message, weight, None).await
    }

    /// Handles an *early* message: its body was omitted because the task's eta has not been reached.
    async fn admit_early(self: &Arc<Self>, delivery: Delivery) -> Option<Admitted> {
        let head = match message::head(&delivery.message) {
            Ok(head) => head,
            Err(refused) => {
                return Some(Admitted {
                    delivery,
                    read: Box::new(Err(refused)),
                    share: None,
                });
            }
        };
        let unwanted = match self.registry.get(&head.task) {
            Some(entry) => self.unwanted(&head).map(|cause| (entry, cause)),
            None => {
                self.not_registered(delivery, head).await;
                return None;
            }
        };
        match unwanted {
            Some((entry, cause)) => self.settle_unwanted(delivery, head, entry, cause).await,
            None if self.has_to_wait(&head) => self.postpone(delivery, &head).await,
            // The eta has been reached since the body was omitted. The next delivery has the body.
            None => delivery.settle(Disposition::Requeue).await,
        }
        None
    }

    /// Ends a revoked or expired task without reading its body.
    async fn settle_unwanted(
        &self,
        mut delivery: Delivery,
        head: TaskMessage,
        entry: &Entry,
        cause: Cause,
    ) {
        let request = Request::new(&mut delivery, head);
        let execution = Execution::new(self, request, entry);
        let disposition = execution.end_without_run(cause).await;
        delivery.settle(disposition).await;
    }

    /// Handles a *heavy* message: its weight is above [`memory::LIGHT`].
    async fn admit_heavy(self: &Arc<Self>, delivery: Delivery) -> Option<Admitted> {
        if let Ok(head) = message::head(&delivery.message)
            && self.has_to_wait(&head)
        {
            self.postpone(delivery, &head).await;
            return None;
        }
        let work = self.apart(delivery, |delivery, accept| {
            let message = &delivery.message;
            (Identity::of(message), weight::of(message, accept))
        });
        let (delivery, (identity, weight)) = work.await?;
        let Some(share) = self.memory.take(&identity, weight) else {
            self.wait_for_memory(delivery, identity, weight).await;
            return None;
        };
        match self.apart(delivery, read).await {
            Some((delivery, message)) => {
                self.admit_read(delivery, message, weight, Some(share))
                    .await
            }
            None => None,
        }
    }

    /// Runs `work` on a large message on another thread, so that other messages are not delayed. `None` if the work
    /// panicked: the delivery is then requeued.
    async fn apart<T: Send + 'static>(
        self: &Arc<Self>,
        delivery: Delivery,
        work: impl FnOnce(&Delivery, &Accept) -> T + Send + 'static,
    ) -> Option<(Delivery, T)> {
        let runtime = self.clone();
        let working = tokio::task::spawn_blocking(move || {
            let done = apart(|| work(&delivery, &runtime.config.accept));
            (delivery, done)
        });
        working
            .await
            .inspect_err(
                |error| tracing::error!(%error, "a message could not be read; it is returned to its queue"),
            )
            .ok()
    }

    /// Admits a decoded message, unless its task has to wait for its eta and the memory for waiting messages is full.
    async fn admit_read(
        self: &Arc<Self>,
        delivery: Delivery,
        read: Result<TaskMessage, Refused>,
        weight: usize,
        mut share: Option<MemoryShare>,
    ) -> Option<Admitted> {
        if let Ok(message) = &read
            && self.has_to_wait(message)
        {
            share = self.memory.keep(weight);
            if share.is_none() {
                let outline = message.outline();
                drop(read);
                Box::pin(self.postpone(delivery, &outline)).await;
                return None;
            }
        }
        Some(Admitted {
            delivery,
            read: Box::new(read),
            share,
        })
    }

    /// Returns true if the task has to wait for its eta. A task that is expired, revoked or not registered is handled
    /// at once.
    fn has_to_wait(&self, message: &TaskMessage) -> bool {
        let is_expired = message
            .expires
            .is_some_and(|expires| expires <= clock::now());
        message.eta.is_some_and(|eta| eta > clock::now())
            && !is_expired
            && self.registry.get(&message.task).is_some()
            && !self.revoked.revokes(message)
    }

    /// Leaves a message with the broker until its eta: the delivery is held without the message, and requeued at that
    /// time.
    async fn postpone(self: &Arc<Self>, mut delivery: Delivery, message: &TaskMessage) {
        let Some(eta) = message.eta else { return };
        // This is never true for a message whose body was omitted.
        if deliveries_before(&delivery.message) >= MANY_DELIVERIES {
            let raw = std::mem::take(&mut delivery.message);
            return self.republish(vec![delivery], raw, &message.id).await;
        }
        let omitted_bytes = delivery
            .damage
            .as_ref()
            .and_then(|damage| damage.body_bytes);
        let body_bytes = omitted_bytes.unwrap_or(delivery.message.body.len() as u64);
        let mut request = Request::new(&mut delivery, message.outline());
        request.raw = RawMessage::default();
        let request = &Arc::new(request);
        let stop = Cancellation::new(&self.stopping);
        if !self.accept(request, delivery, &stop, Some(body_bytes)) {
            return;
        }
        self.emit(request, &Event::TaskReceived(&request.message));
        self.in_flight.enter(request, Phase::Scheduled(eta));
        self.in_flight.park(request, true);
        let left = (eta - clock::now()).to_std().unwrap_or_default();
        tokio::select! {
            () = self.shutdown.warm.cancelled() => {}
            () = tokio::time::sleep(left.min(self.config.eta_hold)) => {}
        }
        for delivery in self.in_flight.release(request) {
            delivery.settle(Disposition::Requeue).await;
        }
    }

    /// Leaves a message with the broker until there is enough memory for it.
    async fn wait_for_memory(&self, mut delivery: Delivery, identity: Identity, weight: usize) {
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

/// Decodes a delivery's task message.
///
/// # Errors
/// [`Refused`] for a message that is not a task, or whose body or properties were omitted.
fn read(delivery: &Delivery, accept: &Accept) -> Result<TaskMessage, Refused> {
    match reason_of_omission(delivery, accept) {
        Some(reason) => Err(message::refused(&delivery.message, reason)),
        None => message::decode(&delivery.message, accept),
    }
}

/// Returns the reason if the message cannot be decoded because its body or its properties were omitted.
fn reason_of_omission(delivery: &Delivery, accept: &Accept) -> Option<Reason> {
    let damage = delivery.damage.as_deref()?;
    if let Some(why) = damage.unreadable {
        return Some(Reason::Properties(why));
    }
    damage
        .body_bytes
        .filter(|_| !damage.is_early)
        .map(|bytes| Reason::TooLarge {
            size: usize::try_from(bytes).unwrap_or(usize::MAX),
            limit: accept.max_body_bytes,
        })
}
