//! Refusal of a message that is not a valid task of this worker: it is settled without a run, and its failure is stored if
//! the message contains an id.

use super::effective_options::EffectiveOptions;
use super::runtime::Runtime;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use crate::workflow::Stopped;
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::message::{Reason, TaskMessage};
use celery_protocol::result::{ResultMeta, State};

/// A message that is not a valid task, for a registered task or for none.
pub(super) struct Refusal {
    pub(super) reason: Reason,
    /// Name of the task, if the message contains one.
    pub(super) task: Option<String>,
    /// The task, as far as it is known; `None` if the message contains no id.
    pub(super) known: Option<TaskMessage>,
    pub(super) disposition: Disposition,
}

impl Runtime {
    /// Settles a message that is not a valid task.
    pub(super) async fn refuse(&self, delivery: Delivery, refusal: Refusal) {
        let Refusal {
            reason,
            task,
            known,
            disposition,
        } = refusal;
        tracing::error!(
            task,
            task_id = known.as_ref().map(|message| &message.id),
            routing_key = delivery.routing_key,
            body_bytes = delivery.message.body.len(),
            reason = %reason,
            ?disposition,
            "rejected: not a Celery task message"
        );
        match (&reason, known) {
            (Reason::Malformed(text), Some(message)) => {
                let exception = Exception::invalid_task(*text);
                self.refuse_with(delivery, message, exception, disposition)
                    .await;
            }
            _ => {
                delivery.settle(disposition).await;
            }
        }
    }

    /// Rejects a message for a task that is not registered.
    pub(super) async fn not_registered(&self, delivery: Delivery, message: TaskMessage) {
        tracing::error!(
            task = message.task,
            task_id = message.id,
            known = ?self.registry.names(),
            "message for a task that is not registered; it is rejected"
        );
        let exception = Exception::not_registered(&message.task);
        self.refuse_with(delivery, message, exception, Disposition::Reject)
            .await;
    }

    /// Stores the reason as the task's failure, and settles the message.
    async fn refuse_with(
        &self,
        delivery: Delivery,
        message: TaskMessage,
        exception: Exception,
        disposition: Disposition,
    ) {
        let options = EffectiveOptions::of_stranger(&message, &self.config.tasks);
        let state = State::Failure {
            exception,
            traceback: None,
        };
        let meta = ResultMeta::new(&message, state, clock::now());
        let stored = match options.stores(&meta.state) {
            true => self.store(&message, &meta).await,
            false => Ok(()),
        };
        match stored {
            Ok(()) => {
                if let Some(event) = Event::of(&message.id, &meta.state, 0.0) {
                    self.count_event(&message.task, &delivery.queue, &event);
                    self.events.send(&event);
                }
                delivery.settle(disposition).await;
            }
            Err(Stopped) => {
                delivery.settle(Disposition::Requeue).await;
            }
        }
    }
}
