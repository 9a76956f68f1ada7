//! The receipt of a message: decodes, refuses or accepts it.
//!
//! The order of steps is Celery's: receipt; wait for the eta, the rate limit and a slot; check for revocation; early
//! acknowledgement; STARTED; the run; the follow-up tasks; the result; the chord; the event; late acknowledgement. The
//! broker has confirmed the follow-up tasks before the result is stored, and the result is stored before the message is
//! acknowledged. If a worker dies in between, the message is redelivered; a result whose follow-up tasks are missing
//! cannot occur.

use std::sync::Arc;

use super::admission::Admitted;
use super::cancellation::Cancellation;
use super::effective_options::EffectiveOptions;
use super::execution::Execution;
use super::in_flight::Request;
use super::runtime::Runtime;
use super::settlement::Requeue;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use celery_protocol::content::Accept;
use celery_protocol::event::Event;
use celery_protocol::exception::Exception;
use celery_protocol::message::{self, Reason, Refused, TaskMessage};
use celery_protocol::repr;
use celery_protocol::result::{ResultMeta, State};

impl Runtime {
    /// Processes one delivery, from receipt to settlement.
    pub(super) async fn receive(self: Arc<Self>, delivery: Delivery) {
        let Some(Admitted {
            mut delivery,
            read,
            share: _share,
        }) = self.admit(delivery).await
        else {
            return;
        };
        let message = match *read {
            Ok(message) => message,
            Err(refused) => return Box::pin(self.refuse(delivery, refused)).await,
        };
        let Some(entry) = self.registry.get(&message.task) else {
            return Box::pin(self.not_registered(delivery, message)).await;
        };
        let request = Request::new(&mut delivery, message);
        let mut execution = Execution::new(&self, request, entry);
        if !self.accept(&execution.request, delivery, &execution.stop, None) {
            return;
        }
        fault_point!(TaskAccepted);
        let disposition = match self.unwanted(&execution.request.message) {
            Some(cause) => Box::pin(execution.end_without_run(cause)).await,
            None => {
                // No event for a delivery that joined a task: monitors would show a running task as a waiting one.
                self.emit(
                    &execution.request,
                    &Event::TaskReceived(&execution.request.message),
                );
                match execution.wait_for_turn().await {
                    Ok(slot) => execution.attempt(slot).await,
                    Err(disposition) => disposition,
                }
            }
        };
        for delivery in self.in_flight.release(&execution.request) {
            delivery.settle(disposition).await;
        }
        fault_point!(Acknowledged);
    }

    /// Adds a request to those in flight; returns false if its delivery joined the same task. `left` is the size of a
    /// body that stays with the broker for now, in bytes.
    pub(super) fn accept(
        &self,
        request: &Arc<Request>,
        delivery: Delivery,
        stop: &Cancellation,
        left: Option<u64>,
    ) -> bool {
        log_received(request, left);
        let is_first = self.in_flight.accept(request, delivery, stop);
        if !is_first {
            tracing::info!(
                task_id = request.message.id,
                "task is running or waiting already; the new delivery joins it"
            );
        }
        is_first
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
            Err(Requeue) => delivery.settle(Disposition::Requeue).await,
        }
    }

    /// Settles a message that is not a valid task.
    async fn refuse(&self, delivery: Delivery, refused: Refused) {
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

/// Logs that a task was received.
fn log_received(request: &Request, left: Option<u64>) {
    let Request {
        message,
        redelivered,
        ..
    } = request;
    let args = message.argsrepr.as_deref().map(repr::shorten);
    let kwargs = message.kwargsrepr.as_deref().map(repr::shorten);
    match left {
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

/// Decodes a delivery's task message.
///
/// # Errors
/// [`Refused`] for a message that is not a task, or whose body or properties were omitted.
pub(super) fn read(delivery: &Delivery, accept: &Accept) -> Result<TaskMessage, Refused> {
    match left_out(delivery, accept) {
        Some(reason) => Err(message::refused(&delivery.message, reason)),
        None => message::decode(&delivery.message, accept),
    }
}

fn left_out(delivery: &Delivery, accept: &Accept) -> Option<Reason> {
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
