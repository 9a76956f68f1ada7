//! The wait of an accepted message: for its time, its rate and a slot.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::Value;
use tracing::Instrument as _;

use super::accepted::{Phase, Received};
use super::canvas::Stopped;
use super::policy::Policy;
use super::stop::Stop;
use super::{Worker, span};
use crate::broker::{Delivery, Publication, Verdict};
use crate::task::Entry;
use celery_protocol::RawMessage;
use celery_protocol::event::Event;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{Cause, State};
use service_connection::error_chain::chain;

/// Time limit for publishing before a publication fails.
const PUBLISH_WITHIN: Duration = Duration::from_secs(10);

/// Interval of the checks of deliveries whose message is being published again.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Header in which quorum queues count the deliveries of a message before this one.
const DELIVERIES: &str = "x-delivery-count";

impl Worker {
    /// Waits for the task's turn, runs it, and does what follows.
    pub(super) async fn process(
        &self,
        received: &Arc<Received>,
        entry: &Entry,
        policy: &Policy,
        stop: Stop,
    ) -> Verdict {
        let message = &received.message;
        let begun = async {
            if let Some(eta) = message.eta {
                Box::pin(self.wait_until(received, eta)).await?;
            }
            self.accepted.enter(received, Phase::Reserved);
            self.rates.pass(&message.task).await;
            self.pool.place().await
        };
        let place = tokio::select! {
            biased;
            () = self.shutdown.warm.cancelled() => return Verdict::Requeue,
            place = begun => place,
        };
        let Some(place) = place else {
            return Verdict::Requeue;
        };
        // Again, since the task may have waited for long.
        if let Some(cause) = self.unwanted(message) {
            drop(place);
            return Box::pin(self.not_run(received, entry, policy, cause)).await;
        }
        let done_before = self.done_before(received, policy);
        let Some(done_before) = self.shutdown.warm.run_until_cancelled(done_before).await else {
            return Verdict::Requeue;
        };
        if let Some(returned) = done_before {
            tracing::info!(
                task_id = message.id,
                "task was delivered again and had succeeded; it is not run"
            );
            // What followed it was sent before that was stored; but it may not have been counted.
            let state = State::Success(returned);
            return match self.canvas.returned(message, &state).await {
                Ok(()) => Verdict::Ack,
                Err(Stopped) => Verdict::Requeue,
            };
        }

        self.accepted.enter(received, Phase::Active(Utc::now()));
        self.count(&message.task);
        if !policy.acks_late {
            for delivery in self.accepted.acknowledge(received) {
                delivery.settle(Verdict::Ack).await;
            }
        }
        self.news(received, &Event::TaskStarted(&message.id));
        let span = span::begin(received, &self.hostname, &*self.config.propagation);
        let mut attempt = pin!(async {
            let started = Instant::now();
            let outcome = self.execute(received, entry, policy, &stop).await;
            drop(place);
            let verdict = self
                .settle(received, policy, outcome, &stop, started.elapsed())
                .await;
            span::note_verdict(verdict);
            verdict
        });
        // By reference: the future of an attempt is large, and is not to be there twice.
        attempt.as_mut().instrument(span).await
    }

    /// Why a task must not begin any more, if so.
    pub(super) fn unwanted(&self, message: &TaskMessage) -> Option<Cause> {
        let expired = message.expires.is_some_and(|expires| expires <= Utc::now());
        let cause = match expired {
            true => Cause::Expired,
            false if self.revoked.revokes(message) => Cause::Revoked,
            false => return None,
        };
        tracing::info!(task_id = message.id, ?cause, "task does not run");
        Some(cause)
    }

    /// What a task that is delivered again has returned before
    /// (`worker_deduplicate_successful_tasks`).
    async fn done_before(&self, received: &Received, policy: &Policy) -> Option<Value> {
        if !(self.config.deduplicate && received.redelivered && policy.acks_late) {
            return None;
        }
        match self.results.get(&received.message.id).await {
            Ok(stored) => {
                let mut stored = stored.filter(|stored| stored["status"] == "SUCCESS")?;
                Some(stored["result"].take())
            }
            Err(error) => {
                tracing::warn!(
                    task_id = received.message.id,
                    error = %chain(&error),
                    "cannot tell whether the task has succeeded before; it is run"
                );
                None
            }
        }
    }

    /// Waits for a task's time; `None` if the message was returned to the broker meanwhile.
    ///
    /// The broker takes back a message that is held for too long (`consumer_timeout`, 30 minutes by
    /// default) and closes the channel. So a message that has to wait longer is published again,
    /// unchanged, at an interval.
    pub(super) async fn wait_until(
        &self,
        received: &Arc<Received>,
        eta: DateTime<Utc>,
    ) -> Option<()> {
        let Ok(left) = (eta - Utc::now()).to_std() else {
            return Some(());
        };
        // A waiting message must not count against the prefetch limit.
        self.accepted.enter(received, Phase::Scheduled(eta));
        self.accepted.park(received, true);
        tokio::time::sleep(left.min(self.config.eta_hold)).await;
        if left <= self.config.eta_hold {
            self.accepted.park(received, false);
            return Some(());
        }
        // Removed first: the new message may arrive before its publication is confirmed, and
        // must not join the old one.
        let held = self.accepted.release(received);
        self.publish_anew(held, received.raw.clone(), &received.message.id)
            .await;
        None
    }

    /// Publishes a waiting message again, and settles its held deliveries.
    pub(super) async fn publish_anew(
        &self,
        held: Vec<Delivery>,
        mut message: RawMessage,
        task_id: &str,
    ) {
        // Messages that the broker has taken back are delivered again anyway.
        let Some(queue) = held
            .iter()
            .find(|delivery| !delivery.is_void())
            .map(|delivery| delivery.queue.clone())
        else {
            return;
        };
        // The new message has never been delivered.
        if message.headers.contains_key(DELIVERIES) {
            message.headers.shift_remove(DELIVERIES);
        }
        let publication = Publication {
            exchange: String::new(),
            routing_key: queue,
            message,
            declare: None,
            mandatory: true,
        };
        let publishing = self
            .transport
            .publish_until_confirmed(&publication, PUBLISH_WITHIN);
        let published = tokio::select! {
            published = publishing => published,
            // The broker delivers it again; publishing it as well would make two messages.
            () = taken_back(&held) => return,
        };
        let verdict = match published {
            Ok(()) => Verdict::Ack,
            Err(error) => {
                tracing::warn!(
                    task_id,
                    error = %chain(&error),
                    "a task that waits could not be published anew; its message goes back"
                );
                Verdict::Requeue
            }
        };
        for delivery in held {
            delivery.settle(verdict).await;
        }
    }
}

/// Number of earlier deliveries of a message, if its queue counts them.
pub(super) fn deliveries_before(message: &RawMessage) -> u64 {
    let count = message.headers.get(DELIVERIES);
    count.and_then(Value::as_u64).unwrap_or(0)
}

/// Waits until the broker has taken all deliveries back.
async fn taken_back(held: &[Delivery]) {
    while !held.iter().all(Delivery::is_void) {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
