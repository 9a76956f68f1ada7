//! The way of one delivery through the worker, from its receipt to its settlement. Each step has a module of its own:
//! [`admission`](super::admission) decodes the message, or [`refusal`](super::refusal) settles it;
//! [`acceptance`](super::acceptance), [`schedule`](super::schedule), [`execution`](super::execution) and
//! [`conclusion`](super::conclusion) follow, or [`discard`](super::discard) ends a task that must not run.
//!
//! The order of steps is Celery's: receipt; wait for the eta, the rate limit and a slot; check for revocation; early
//! acknowledgement; STARTED; the run; the follow-up tasks; the result; the chord; the event; late acknowledgement. The
//! broker has confirmed the follow-up tasks of a success before its result is stored, and with late acknowledgement the
//! result is stored before the message is acknowledged. If a worker dies in between, the message is redelivered, and no
//! stored success lacks its follow-up tasks. With early acknowledgement, Celery's default, a task is lost with its worker.

use std::sync::Arc;

use super::admission::Admitted;
use super::execution::Execution;
use super::in_flight::Request;
use super::runtime::Runtime;
use crate::broker::Delivery;
use celery_protocol::event::Event;

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
}
