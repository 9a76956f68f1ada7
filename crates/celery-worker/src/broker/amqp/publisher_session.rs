//! The connection for publishing, with its state: blocked by the broker or not.
//!
//! A broker that is short of memory or disk space blocks connections that publish (`connection.blocked`): it reads
//! nothing from them until the alarm is over. Bytes that were written until then are published afterwards, even if the
//! caller has stopped waiting. Therefore nothing is written to a blocked connection: publications wait before it, where
//! they can be withdrawn, and none is queued twice.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection, Event};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::confirm_publisher::ConfirmPublisher;
use super::connector::Connector;
use crate::broker::BrokerError;

/// Interval of the checks of a blocked connection, which may end without an event.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Reason why the broker blocks the publishing connection, if it does; shared by all publishers.
#[derive(Debug, Clone)]
pub(super) struct Blocked(watch::Sender<Option<Arc<str>>>);

impl Default for Blocked {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Blocked {
    /// The broker's reason; none if publishing is possible or if no connection exists.
    pub(super) fn reason(&self) -> Option<Arc<str>> {
        self.0.borrow().clone()
    }

    /// A receiver of later changes.
    pub(super) fn changes(&self) -> Changes {
        Changes(self.0.subscribe())
    }
}

/// Receiver of changes.
pub(super) struct Changes(watch::Receiver<Option<Arc<str>>>);

impl Changes {
    /// Waits until the next check is due.
    pub(super) async fn next(mut self) {
        // The connection is checked in any case.
        let _ = timeout(CHECK_INTERVAL, self.0.changed()).await;
    }
}

/// An open connection for publishing.
pub(super) struct PublisherSession {
    pub(super) connection: Connection,
    /// Channel for the default exchange and for declared exchanges.
    pub(super) publisher: Option<ConfirmPublisher>,
    /// Channel for other exchanges.
    pub(super) foreign: Option<ConfirmPublisher>,
    /// Queues and exchanges that were declared over this connection.
    pub(super) declared: HashSet<(&'static str, String)>,
    _watch: AbortOnDropHandle<()>,
}

impl PublisherSession {
    pub(super) async fn open(
        connector: &Connector,
        blocked: &Blocked,
    ) -> Result<Self, BrokerError> {
        let connection = connector.connect("publisher").await?;
        let events = connection.events_listener();
        let status = connection.status().clone();
        let is_connected = move || status.connected();
        let watching = watch_blocking(
            events,
            is_connected,
            Watched {
                broker: connector.masked(),
                blocked: blocked.clone(),
                since: None,
            },
        );
        Ok(Self {
            connection,
            publisher: None,
            foreign: None,
            declared: HashSet::new(),
            _watch: AbortOnDropHandle::new(tokio::spawn(watching)),
        })
    }

    /// Returns true while the broker reads nothing from the connection.
    pub(super) fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }
}

/// Observed state of a connection. A closed connection is no longer blocked.
struct Watched {
    broker: String,
    blocked: Blocked,
    since: Option<Instant>,
}

impl Watched {
    fn block(&mut self, reason: String) {
        if self.since.is_none() {
            self.since = Some(Instant::now());
            tracing::warn!(
                broker = self.broker,
                reason,
                "connection blocked by the broker; nothing is published until the broker has resources again"
            );
        }
        self.blocked.0.send_replace(Some(reason.into()));
    }

    fn unblock(&mut self) {
        if let Some(since) = self.since.take() {
            tracing::info!(
                broker = self.broker,
                blocked_s = since.elapsed().as_secs_f64(),
                "connection no longer blocked by the broker"
            );
        }
        self.blocked.0.send_replace(None);
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.blocked.0.send_replace(None);
    }
}

async fn watch_blocking(
    events: impl futures_util::Stream<Item = Event>,
    is_connected: impl Fn() -> bool,
    mut watched: Watched,
) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Event::ConnectionBlocked(reason) => watched.block(reason),
            Event::ConnectionUnblocked => watched.unblock(),
            _ if !is_connected() => return,
            _ => {}
        }
    }
}

/// A channel in confirm mode.
pub(super) async fn confirming(
    connector: &Connector,
    connection: &Connection,
) -> Result<Channel, BrokerError> {
    let error = |e| connector.error(e, "a channel for publishing");
    let channel = connection.create_channel().await.map_err(error)?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .map_err(error)?;
    Ok(channel)
}
