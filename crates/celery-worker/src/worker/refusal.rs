//! Refusal of a message that is not a valid task of this worker: it is settled without a run, and its failure is stored if
//! the message contains an id.

use super::effective_options::EffectiveOptions;
use super::runtime::Runtime;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use crate::workflow::Stopped;
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::message::{self, Reason, Refused, TaskMessage};
use celery_protocol::result::{ResultMeta, State};

impl Runtime {
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
            Err(Stopped) => delivery.settle(Disposition::Requeue).await,
        }
    }

    /// Settles a message that is not a valid task.
    pub(super) async fn refuse(&self, delivery: Delivery, refused: Refused) {
        let Refused {
            reason,
            task,
            id,
            reply_to,
        } = refused;
        let known = task
            .as_deref()
            .is_none_or(|task| self.registry.get(task).is_some());
        let message = id.map(|id| TaskMessage {
            correlation_id: delivery
                .message
                .properties
                .correlation_id
                .clone()
                .unwrap_or(id.clone()),
            id,
            task: task.clone().unwrap_or_default(),
            reply_to: reply_to.filter(|queue| !queue.is_empty()),
            ..TaskMessage::default()
        });
        match message {
            Some(message) if !known => self.not_registered(delivery, message).await,
            message => {
                tracing::error!(
                    task,
                    task_id = message.as_ref().map(|m| &m.id),
                    routing_key = delivery.routing_key,
                    body_bytes = delivery.message.body.len(),
                    reason = %reason,
                    disposition = ?reason.disposition(),
                    "rejected: not a Celery task message"
                );
                let disposition = match reason.disposition() {
                    message::Disposition::Ack if known => Disposition::Ack,
                    // The task belongs to another worker, so its message is rejected in any case.
                    message::Disposition::Ack | message::Disposition::Reject => Disposition::Reject,
                };
                match (&reason, message) {
                    (Reason::Malformed(text), Some(message)) => {
                        let exception = Exception::invalid_task(*text);
                        self.refuse_with(delivery, message, exception, disposition)
                            .await;
                    }
                    _ => delivery.settle(disposition).await,
                }
            }
        }
    }
}
