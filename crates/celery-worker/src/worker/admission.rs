//! Admission of a delivery, the first step of its intake: decides if its message is decoded, and decodes it. Without
//! enough memory the message stays with the broker.

use std::sync::Arc;

use super::identity::Identity;
use super::memory::{self, MemoryShare};
use super::refusal::Refusal;
use super::runtime::Runtime;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use crate::offload::on_separate_thread;
use crate::task::RegisteredTask;
use celery_protocol::content::Accept;
use celery_protocol::message::{self, Reason, Refused, TaskMessage};
use celery_protocol::result::Cause;
use celery_protocol::weight;

/// Result of an admission: the next step of the delivery. Messages are boxed, so that the future of each delivery is
/// small.
pub(super) enum Admission<'a> {
    /// The message was decoded.
    Decoded {
        delivery: Delivery,
        identity: Identity,
        message: Box<TaskMessage>,
        registered: &'a RegisteredTask,
        /// The message's share of the memory budget, which it keeps until it is settled.
        share: Option<MemoryShare>,
    },
    /// The task must not run. Only the head of its message was read.
    Skipped {
        delivery: Delivery,
        identity: Identity,
        head: Box<TaskMessage>,
        registered: &'a RegisteredTask,
        cause: Cause,
    },
    /// The message is not a valid task.
    Refused(Delivery, Box<Refusal>),
    /// The message is for a task that is not registered.
    NotRegistered(Delivery, Box<TaskMessage>),
    /// The message stays with the broker until its eta. Only its outline is kept.
    AwaitsEta {
        delivery: Delivery,
        identity: Identity,
        outline: Box<TaskMessage>,
    },
    /// The message stays with the broker until there is enough memory.
    AwaitsMemory {
        delivery: Delivery,
        identity: Identity,
        weight: usize,
    },
    /// The body was omitted, and is needed now. The next delivery has it.
    NeedsBody(Delivery),
    /// The decoding panicked: the delivery was dropped, and thereby requeued.
    Lost,
}

impl Runtime {
    /// Decodes a message if there is enough memory, and if its task does not have to wait for too long.
    pub(super) async fn admit(self: &Arc<Self>, delivery: Delivery) -> Admission<'_> {
        let accept = &self.config.accept;
        if delivery
            .damage
            .as_ref()
            .is_some_and(|damage| damage.awaits_eta)
        {
            return self.admit_early(delivery);
        }
        // The weight and the identity of a large body take some time: they are computed on another thread.
        if delivery.message.body.len() > memory::LIGHT {
            return Box::pin(self.admit_heavy(delivery)).await;
        }
        let weight = weight::of(&delivery.message, accept);
        if weight > memory::LIGHT {
            return Box::pin(self.admit_heavy(delivery)).await;
        }
        let identity = Identity::of(&delivery.message);
        let message = read(&delivery, accept);
        self.admit_read(delivery, identity, message, weight, None)
    }

    /// Handles an *early* message: its body was omitted because the task's eta had not been reached.
    fn admit_early(&self, delivery: Delivery) -> Admission<'_> {
        let head = match message::head(&delivery.message) {
            Ok(head) => Box::new(head),
            Err(refused) => return self.not_admitted(delivery, refused),
        };
        let Some(registered) = self.registry.get(&head.task) else {
            return Admission::NotRegistered(delivery, head);
        };
        let identity = Identity::of(&delivery.message);
        match self.skip_reason(&head) {
            Some(cause) => Admission::Skipped {
                delivery,
                identity,
                head,
                registered,
                cause,
            },
            None if self.has_to_wait(&head) => Admission::AwaitsEta {
                delivery,
                identity,
                outline: head.outline().into(),
            },
            // The eta has been reached since the body was omitted.
            None => Admission::NeedsBody(delivery),
        }
    }

    /// Handles a *heavy* message: its weight is above [`memory::LIGHT`].
    async fn admit_heavy(self: &Arc<Self>, delivery: Delivery) -> Admission<'_> {
        if let Ok(head) = message::head(&delivery.message)
            && self.has_to_wait(&head)
        {
            let outline = head.outline().into();
            let identifying =
                self.process_separately(delivery, |delivery, _| Identity::of(&delivery.message));
            return match identifying.await {
                Some((delivery, identity)) => Admission::AwaitsEta {
                    delivery,
                    identity,
                    outline,
                },
                None => Admission::Lost,
            };
        }
        let weighing = self.process_separately(delivery, |delivery, accept| {
            let message = &delivery.message;
            (Identity::of(message), weight::of(message, accept))
        });
        let Some((delivery, (identity, weight))) = weighing.await else {
            return Admission::Lost;
        };
        let Some(share) = self.memory.take(&identity, weight) else {
            return Admission::AwaitsMemory {
                delivery,
                identity,
                weight,
            };
        };
        match self.process_separately(delivery, read).await {
            Some((delivery, message)) => {
                self.admit_read(delivery, identity, message, weight, Some(share))
            }
            None => Admission::Lost,
        }
    }

    /// Runs `work` on a large message on another thread, so that other messages are not delayed. `None` if the work
    /// panicked: the delivery is then requeued.
    async fn process_separately<T: Send + 'static>(
        self: &Arc<Self>,
        delivery: Delivery,
        work: impl FnOnce(&Delivery, &Accept) -> T + Send + 'static,
    ) -> Option<(Delivery, T)> {
        let runtime = self.clone();
        let working = tokio::task::spawn_blocking(move || {
            let done = on_separate_thread(|| work(&delivery, &runtime.config.accept));
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
    fn admit_read(
        &self,
        delivery: Delivery,
        identity: Identity,
        read: Result<TaskMessage, Refused>,
        weight: usize,
        mut share: Option<MemoryShare>,
    ) -> Admission<'_> {
        let message = match read {
            Ok(message) => Box::new(message),
            Err(refused) => return self.not_admitted(delivery, refused),
        };
        let Some(registered) = self.registry.get(&message.task) else {
            return Admission::NotRegistered(delivery, message);
        };
        if self.has_to_wait(&message) {
            share = self.memory.keep(weight);
            if share.is_none() {
                return Admission::AwaitsEta {
                    delivery,
                    identity,
                    outline: message.outline().into(),
                };
            }
        }
        Admission::Decoded {
            delivery,
            identity,
            message,
            registered,
            share,
        }
    }

    /// Returns the next step of a message that is not a valid task. One with the name of a task that is not registered
    /// belongs to another worker, whatever else is wrong with it.
    fn not_admitted(&self, delivery: Delivery, refused: Refused) -> Admission<'_> {
        let Refused {
            reason,
            task,
            id,
            reply_to,
        } = refused;
        let is_registered = |task: &String| self.registry.get(task).is_some();
        let is_ours = task.as_ref().is_none_or(is_registered);
        let correlation_id = &delivery.message.properties.correlation_id;
        let known = id.map(|id| TaskMessage {
            correlation_id: correlation_id.clone().unwrap_or(id.clone()),
            id,
            task: task.clone().unwrap_or_default(),
            reply_to: reply_to.filter(|queue| !queue.is_empty()),
            ..TaskMessage::default()
        });
        match known {
            Some(message) if !is_ours => Admission::NotRegistered(delivery, message.into()),
            known => {
                let disposition = match reason.disposition() {
                    message::Disposition::Ack if is_ours => Disposition::Ack,
                    message::Disposition::Ack | message::Disposition::Reject => Disposition::Reject,
                };
                let refusal = Refusal {
                    reason,
                    task,
                    known,
                    disposition,
                };
                Admission::Refused(delivery, refusal.into())
            }
        }
    }

    /// Returns true if the task has to wait for its eta. A task that does not run or is not registered is handled at
    /// once.
    fn has_to_wait(&self, message: &TaskMessage) -> bool {
        message.eta.is_some_and(|eta| eta > clock::now())
            && self.registry.get(&message.task).is_some()
            && self.skip_reason(message).is_none()
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
        .filter(|_| !damage.awaits_eta)
        .map(|bytes| Reason::TooLarge {
            size: usize::try_from(bytes).unwrap_or(usize::MAX),
            limit: accept.max_body_bytes,
        })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::broker::consumer::Damage;
    use crate::results::memory::MemoryResults;
    use crate::worker::DefaultOptions;
    use crate::worker::test_support::{ProbeSettlement, runtime};
    use celery_protocol::{RawMessage, isoformat};

    /// The variant of an admission, for comparison.
    #[derive(Debug, PartialEq)]
    enum Found {
        Decoded { with_share: bool },
        Skipped(Cause),
        Refused,
        NotRegistered,
        AwaitsEta,
        AwaitsMemory,
        NeedsBody,
        Lost,
    }

    impl From<Admission<'_>> for Found {
        fn from(admission: Admission<'_>) -> Self {
            match admission {
                Admission::Decoded { share, .. } => Self::Decoded {
                    with_share: share.is_some(),
                },
                Admission::Skipped { cause, .. } => Self::Skipped(cause),
                Admission::Refused(..) => Self::Refused,
                Admission::NotRegistered(..) => Self::NotRegistered,
                Admission::AwaitsEta { .. } => Self::AwaitsEta,
                Admission::AwaitsMemory { .. } => Self::AwaitsMemory,
                Admission::NeedsBody(_) => Self::NeedsBody,
                Admission::Lost => Self::Lost,
            }
        }
    }

    fn new_runtime() -> Arc<Runtime> {
        Arc::new(runtime(
            Arc::new(MemoryResults::new()),
            DefaultOptions::default(),
        ))
    }

    /// Creates a delivery of a message for `task`, with an eta and an expiry in seconds from now.
    fn delivery(task: &str, eta: Option<i64>, expires: Option<i64>, body: String) -> Delivery {
        let time = |seconds| isoformat(clock::now() + chrono::Duration::seconds(seconds));
        let headers = json!({
            "task": task, "id": "a", "lang": "py", "eta": eta.map(time), "expires": expires.map(time),
        });
        let mut message = RawMessage {
            headers: serde_json::from_value(headers).unwrap_or_default(),
            body: body.into_bytes(),
            ..RawMessage::default()
        };
        message.properties.content_type = Some("application/json".into());
        message.properties.content_encoding = Some("utf-8".into());
        ProbeSettlement::default().delivery(message)
    }

    fn body(bytes: usize) -> String {
        json!([["x".repeat(bytes)], {}, {}]).to_string()
    }

    const DECODED: Found = Found::Decoded { with_share: false };
    const KEPT: Found = Found::Decoded { with_share: true };

    #[rstest]
    #[case::at_once("t", None, None, DECODED)]
    #[case::eta_is_past("t", Some(-60), None, DECODED)]
    #[case::eta_is_ahead("t", Some(60), None, KEPT)]
    #[case::expired_does_not_wait("t", Some(60), Some(-1), DECODED)]
    #[case::unknown_task("u", None, None, Found::NotRegistered)]
    #[case::unknown_task_does_not_wait("u", Some(60), None, Found::NotRegistered)]
    #[tokio::test]
    async fn light_message(
        #[case] task: &str,
        #[case] eta: Option<i64>,
        #[case] expires: Option<i64>,
        #[case] expected: Found,
    ) {
        let delivery = delivery(task, eta, expires, body(1));
        assert_eq!(Found::from(new_runtime().admit(delivery).await), expected);
    }

    #[rstest]
    #[case::eta_is_ahead("t", 60, None, Found::AwaitsEta)]
    #[case::eta_is_reached("t", -1, None, Found::NeedsBody)]
    #[case::expired("t", 60, Some(-1), Found::Skipped(Cause::Expired))]
    #[case::unknown_task("u", 60, None, Found::NotRegistered)]
    #[tokio::test]
    async fn message_whose_body_was_omitted_until_its_eta(
        #[case] task: &str,
        #[case] eta: i64,
        #[case] expires: Option<i64>,
        #[case] expected: Found,
    ) {
        let mut delivery = delivery(task, Some(eta), expires, String::new());
        delivery.damage = Some(Box::new(Damage {
            awaits_eta: true,
            body_bytes: Some(1 << 20),
            ..Damage::default()
        }));
        assert_eq!(Found::from(new_runtime().admit(delivery).await), expected);
    }

    /// A heavy message is decoded if the budget has room for it, and never kept while it waits for its eta.
    #[rstest]
    #[case::there_is_room(None, false, KEPT)]
    #[case::no_room(None, true, Found::AwaitsMemory)]
    #[case::eta_is_ahead(Some(60), false, Found::AwaitsEta)]
    #[tokio::test]
    async fn heavy_message(
        #[case] eta: Option<i64>,
        #[case] is_full: bool,
        #[case] expected: Found,
    ) {
        let runtime = new_runtime();
        let other = Identity::of(&RawMessage::default());
        let full = is_full.then(|| runtime.memory.take(&other, usize::MAX));
        let delivery = delivery("t", eta, None, body(memory::LIGHT));
        assert_eq!(Found::from(runtime.admit(delivery).await), expected);
        drop(full);
    }

    #[tokio::test]
    async fn light_message_stays_with_the_broker_if_waiting_ones_fill_the_memory() {
        let runtime = new_runtime();
        let mut kept = Vec::new();
        while let Some(share) = runtime.memory.keep(memory::LIGHT) {
            kept.push(share);
        }
        let with_eta = |eta| delivery("t", eta, None, body(1));
        let waiting = runtime.admit(with_eta(Some(60))).await;
        assert_eq!(Found::from(waiting), Found::AwaitsEta);
        assert_eq!(Found::from(runtime.admit(with_eta(None)).await), DECODED);
    }

    /// Its message is rejected like any other of such a task; the worker that has the task reports what is wrong with it.
    #[tokio::test]
    async fn unreadable_message_of_an_unknown_task_is_not_registered() {
        let delivery = delivery("u", None, None, "{".into());
        let found = Found::from(new_runtime().admit(delivery).await);
        assert_eq!(found, Found::NotRegistered);
    }

    #[rstest]
    #[case::body_is_no_json("{".into(), Damage::default())]
    #[case::body_was_too_large(String::new(), Damage { body_bytes: Some(1 << 30), ..Damage::default() })]
    #[case::properties_were_unreadable(String::new(), Damage { unreadable: Some("no table"), ..Damage::default() })]
    #[tokio::test]
    async fn unreadable_message_is_refused(#[case] body: String, #[case] damage: Damage) {
        let mut delivery = delivery("t", None, None, body);
        delivery.damage = Some(Box::new(damage));
        let found = Found::from(new_runtime().admit(delivery).await);
        assert_eq!(found, Found::Refused);
    }
}
