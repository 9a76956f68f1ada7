//! The way of one delivery through the worker, from its receipt to its settlement. Each step has a module of its own, in
//! the order of the calls: [`admission`](super::admission) decodes the message; [`refusal`](super::refusal) or
//! [`postponement`](super::postponement) end the way of some messages. [`acceptance`](super::acceptance) and
//! [`schedule`](super::schedule) follow. Then [`execution`](super::execution) runs the task, or [`skip`](super::skip) ends
//! a task that does not run; both pass the outcome to [`conclusion`](super::conclusion).
//!
//! The order of steps is Celery's: receipt, after the requests that were published before; wait for the eta, the rate limit
//! and a slot; check for revocation; early acknowledgement; STARTED; the run; the follow-up tasks; the result; the chord;
//! the event; late acknowledgement. The broker has confirmed the follow-up tasks of a success before its result is stored,
//! and with late acknowledgement the result is stored before the message is acknowledged. If a worker dies in between, the
//! message is redelivered, and no
//! stored success lacks its follow-up tasks. With early acknowledgement, Celery's default, a task is lost with its worker.

use std::sync::Arc;

use super::admission::Admission;
use super::processing::TaskProcessing;
use super::request::Request;
use super::runtime::Runtime;
use super::schedule::Turn;
use super::slots::Permit;
use crate::broker::{Delivery, Disposition};
use crate::clock;
use celery_protocol::event::Event;

impl Runtime {
    /// Processes one delivery, from receipt to settlement.
    pub(super) async fn receive(self: Arc<Self>, delivery: Delivery) {
        // The futures of the rare ways are boxed: they would enlarge the future of each delivery.
        match self.admit(delivery).await {
            Admission::Decoded {
                mut delivery,
                identity,
                message,
                registered,
                share: _share,
            } => {
                let request = Request::new(&mut delivery, identity, *message);
                let task = TaskProcessing::new(&self, request, registered);
                let permit = delivery.permit.take();
                if self.take_in_flight(&task.request, delivery, &task.stop, None) {
                    self.process(&task, permit).await;
                }
            }
            Admission::Skipped {
                mut delivery,
                identity,
                head,
                registered,
                cause,
            } => {
                let request = Request::new(&mut delivery, identity, *head);
                let task = TaskProcessing::new(&self, request, registered);
                let disposition = Box::pin(task.skip(cause)).await;
                delivery.settle(disposition).await;
            }
            Admission::Refused(delivery, refusal) => {
                Box::pin(self.refuse(delivery, *refusal)).await;
            }
            Admission::NotRegistered(delivery, message) => {
                Box::pin(self.not_registered(delivery, *message)).await;
            }
            Admission::AwaitsEta {
                delivery,
                identity,
                outline,
            } => Box::pin(self.postpone(delivery, identity, *outline)).await,
            Admission::AwaitsMemory {
                delivery,
                identity,
                weight,
            } => Box::pin(self.wait_for_memory(delivery, identity, weight)).await,
            Admission::NeedsBody(delivery) => {
                delivery.settle(Disposition::Requeue).await;
            }
            Admission::Lost => {}
        }
    }

    /// Processes an accepted task to the settlement of its deliveries. `permit` allows the worker to hold its message, and
    /// lasts as long as the task.
    async fn process(&self, task: &TaskProcessing<'_>, mut permit: Option<Permit>) {
        let request = &task.request;
        fault_point!(TaskAccepted);
        // Here the task is in the lists of `celery inspect` already. One that waits for its eta is checked after that.
        if request.message.eta.is_none_or(|eta| eta <= clock::now()) {
            self.request_order.follow().await;
        }
        let turn = match self.skip_reason(&request.message) {
            Some(cause) => Turn::Skip(cause),
            None => {
                // Not sent for a delivery that joined a task: monitors would show a running task as a waiting one.
                self.emit(request, &Event::TaskReceived(&request.message));
                task.wait_for_turn(&mut permit).await
            }
        };
        let disposition = match turn {
            Turn::Run(slot) => task.execute(slot).await,
            Turn::Skip(cause) => Box::pin(task.skip(cause)).await,
            Turn::SucceededBefore(before) => Box::pin(task.skip_succeeded(before)).await,
            Turn::HoldLimit => return Box::pin(self.republish_held(request)).await,
            Turn::Shutdown => Disposition::Requeue,
        };
        self.settle(request, disposition).await;
        drop(permit);
        fault_point!(Acknowledged);
    }

    /// Settles the deliveries of an ended task. If this fails, the broker delivers its message again, and the new
    /// delivery joins the ended task.
    async fn settle(&self, request: &Arc<Request>, disposition: Disposition) {
        let ended = self.in_flight.end(request, disposition);
        let mut is_settled = !ended.unsettled;
        for delivery in ended.deliveries {
            is_settled &= delivery.settle(disposition).await;
        }
        if is_settled {
            self.in_flight.forget(&request.identity);
        }
    }
}
