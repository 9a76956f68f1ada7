//! Supervision of one connection of a subscription: opened again whenever it ends.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep};

use super::RECONNECT;
use super::connecting::{Link, RedisConnector};
use crate::broker::consumer::{Feed, Served};
use crate::broker::{BrokerError, Queue, Reconnect};
use crate::liveness::Liveness;
use service_connection::backoff::{RetryState, Setback, in_seconds};
use service_connection::error_chain::{chain, panic_text};

/// The part of a subscription that one connection serves.
pub(super) trait RedisSession: Send + Sync {
    /// Returns true if the connection serves this queue.
    fn serves(&self, queue: &Queue) -> bool;

    /// Serves until the subscription is cancelled (`Ok`) or the connection ends.
    fn serve(&mut self, link: Link) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Called once the subscription has ended.
    fn finish(&mut self) -> impl Future<Output = ()> + Send;
}

/// Opens the connections of a session, one after another.
pub(super) struct Supervisor {
    pub(super) connector: Arc<RedisConnector>,
    pub(super) reconnect: Reconnect,
    pub(super) purpose: &'static str,
    pub(super) feed: Arc<Feed>,
    pub(super) liveness: Liveness,
}

impl Supervisor {
    /// Runs until the subscription is cancelled, or reconnecting has ended.
    pub(super) async fn run(self, mut session: impl RedisSession) {
        let feed = self.feed.clone();
        if feed
            .cancelled
            .run_until_cancelled(self.first_queue(&session))
            .await
            .is_none()
        {
            return self.liveness.retire();
        }
        // No `RetryLoop`: an attempt is the whole lifetime of a connection, and counts as a success if it is long.
        let mut attempts = RetryState::new(RECONNECT);
        let (mut failed, mut was_connected) = (0, false);
        loop {
            self.liveness.tick();
            panic_point!(Subscription);
            let connecting = feed.cancelled.run_until_cancelled(self.connector.connect());
            let error = match connecting.await {
                None => break,
                Some(Ok(link)) => {
                    (failed, was_connected) = (0, true);
                    let began = Instant::now();
                    let left = self.connector.left(link.choice);
                    let serving = AssertUnwindSafe(session.serve(link)).catch_unwind();
                    let served = tokio::select! {
                        served = serving => served,
                        () = left => Ok(Err(self.connector.lost("another server is in use now"))),
                    };
                    let served = served.unwrap_or_else(|panic| {
                        tracing::error!(
                            purpose = self.purpose,
                            panic = panic_text(&*panic),
                            "consumer panicked, which is a bug; reconnecting"
                        );
                        Err(self.connector.lost("the consumer panicked"))
                    });
                    self.report_gone(&session);
                    match served {
                        Ok(()) => break,
                        Err(error) => {
                            attempts.succeeded_for(began.elapsed());
                            error
                        }
                    }
                }
                Some(Err(error)) => {
                    failed += 1;
                    error
                }
            };
            if let Some(option) = self.reconnect.forbids(was_connected, failed) {
                feed.reports.fail(BrokerError::GivenUp {
                    attempts: failed,
                    option,
                    source: Arc::new(error),
                });
                feed.cancelled.cancel();
                break;
            }
            let Setback { pause, should_log } = attempts.failed(&error);
            if should_log {
                tracing::warn!(
                    broker = self.connector.place(),
                    purpose = self.purpose,
                    error = %chain(&error),
                    retry_in_s = in_seconds(pause),
                    "no connection to the broker; retrying, running tasks continue"
                );
            }
            if feed
                .cancelled
                .run_until_cancelled(sleep(pause))
                .await
                .is_none()
            {
                break;
            }
        }
        session.finish().await;
        self.liveness.retire();
    }

    /// Waits until the subscription has a queue for this session: no connection is opened for none.
    async fn first_queue(&self, session: &impl RedisSession) {
        let mut desired = self.feed.reports.desired();
        let mut ticks = tokio::time::interval(crate::liveness::EVERY);
        loop {
            if desired
                .borrow_and_update()
                .queues
                .iter()
                .any(|q| session.serves(q))
            {
                return;
            }
            self.liveness.tick();
            panic_point!(Subscription);
            tokio::select! {
                _ = ticks.tick() => {}
                // An error means that no queue can follow.
                changed = desired.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    fn report_gone(&self, session: &impl RedisSession) {
        let queues = self.feed.reports.desired().borrow().queues.clone();
        self.feed.reports.update(|served| {
            *served = Served {
                queues: std::mem::take(&mut served.queues),
                ..Served::default()
            };
            for queue in queues.iter().filter(|queue| session.serves(queue)) {
                served.queues.remove(&queue.name);
            }
        });
    }
}
