//! Renewal of the messages that this process holds, and return of those that a dead worker held.

use std::sync::Arc;

use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use tokio::time::{MissedTickBehavior, interval};

use super::connecting::{Commands, is_hopeless};
use super::held::Held;
use super::names::Names;
use super::options::RedisTransportOptions;
use super::scripts::{self, Element};
use super::{RECONNECT, bindings};
use crate::broker::BrokerError;
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;

/// Maximum number of entries that one script renews.
const RENEWED_TOGETHER: usize = 1000;

/// Maximum number of entries that one request returns.
const SWEPT_TOGETHER: usize = 100;

/// Keeps the record of held messages.
pub(super) struct Maintenance {
    pub(super) commands: Arc<Commands>,
    pub(super) names: Arc<Names>,
    pub(super) held: Arc<Held>,
    pub(super) options: RedisTransportOptions,
}

impl Maintenance {
    /// Runs for ever.
    pub(super) async fn run(self) {
        let mut renewals = interval(self.options.renew_every());
        let mut sweeps = interval(self.options.sweep_every());
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = renewals.tick() => self.renew().await,
                _ = sweeps.tick() => self.sweep().await,
            }
        }
    }

    /// Renews all held messages, and finds those that another worker has taken over. Repeated until it succeeds, since
    /// a message that is not renewed in time is delivered again.
    async fn renew(&self) {
        let attempt = async || {
            for fields in self.held.fields().chunks(RENEWED_TOGETHER) {
                let gone = self
                    .commands
                    .run("to renew messages", async |connection| {
                        scripts::renew(connection, &self.names, fields).await
                    })
                    .await?;
                gone.iter().for_each(|field| self.held.lose(field));
            }
            Ok(())
        };
        let should_retry = |error: &BrokerError| !is_hopeless(error);
        let log = |error: &BrokerError, pause_s| {
            tracing::warn!(
                error = %chain(error),
                retry_in_s = pause_s,
                "held messages are not renewed; other workers get them after the visibility timeout"
            );
        };
        if let Err(error) = RetryLoop::new(RECONNECT)
            .run(attempt, should_retry, log)
            .await
        {
            log(&error, self.options.renew_every().as_secs_f64());
        }
    }

    /// Returns expired messages to their queues. A failure loses nothing: the next search, by any worker, finds them.
    pub(super) async fn sweep(&self) {
        let swept = self
            .commands
            .run("to return messages of dead workers", async |connection| {
                self.sweep_with(connection).await
            })
            .await;
        match swept {
            Ok(0) => {}
            Ok(messages) => tracing::warn!(
                messages,
                "messages of workers that have died were returned to their queues"
            ),
            Err(error) => tracing::debug!(error = %chain(&error), "no search for expired messages"),
        }
    }

    /// Returns the number of messages that were returned.
    async fn sweep_with(&self, connection: &mut MultiplexedConnection) -> RedisResult<usize> {
        let most = match self.options.unacked_restore_limit {
            0 => usize::MAX,
            limit => limit,
        };
        let (mut restored, mut seen) = (0, 0);
        while seen < most {
            let limit = SWEPT_TOGETHER.min(most - seen);
            let seconds = self.options.visibility_timeout;
            let expired = scripts::expired(connection, &self.names, seconds, limit).await?;
            let mut moved = 0;
            for entry in &expired {
                // One of our own that could not be renewed in time is still ours.
                if !self.held.contains(&entry.0) {
                    moved += 1;
                    restored += usize::from(self.restore(connection, entry).await?);
                }
            }
            seen += expired.len();
            if expired.len() < limit || moved == 0 {
                break;
            }
        }
        Ok(restored)
    }

    /// Returns one expired message to the queues that it came from, or parks it if there are none.
    async fn restore(
        &self,
        connection: &mut MultiplexedConnection,
        entry: &(String, String),
    ) -> RedisResult<bool> {
        let names = &*self.names;
        let outline = scripts::outline(connection, names, &entry.0).await?;
        let parked = || vec![names.parked_entries()];
        let (lists, element) = match outline.and_then(|outline| outline.returned().ok()) {
            Some((held, element)) => {
                let queues = match held.exchange.is_empty() {
                    true => vec![held.routing_key],
                    false => {
                        bindings::route(connection, names, &held.exchange, &held.routing_key)
                            .await?
                    }
                };
                let lists: Vec<_> = queues
                    .iter()
                    .map(|q| names.list(q, held.priority))
                    .collect();
                match lists.is_empty() {
                    true => (parked(), Element::entry()),
                    false => (lists, element),
                }
            }
            None => (parked(), Element::entry()),
        };
        let is_restored = scripts::restore(connection, names, entry, &lists, &element).await?;
        if is_restored && lists == parked() {
            tracing::error!(
                list = names.parked_entries(),
                "an expired entry was parked: it is not a message, or no queue takes it"
            );
        }
        Ok(is_restored)
    }
}
