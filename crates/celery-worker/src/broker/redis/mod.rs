//! Redis in kombu's layout: beside Python's programs on the same database.
//!
//! A queue is a list for each class of priorities, an exchange is a set of bindings, and a fanout exchange is a channel.
//! Messages that a worker holds are in a record, from which any program returns them once they are older than its
//! visibility timeout. Three rules keep messages safe:
//!
//! * a message is taken and recorded by one script;
//! * held messages are renewed until they are settled, however long a task runs or waits;
//! * a disposition applies to one delivery, and survives a lost connection.
//!
//! Every subscription has its own connection for waiting, and one for channels if it needs it. Publishing, settling and
//! renewing use a third one. Each is opened again by itself.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Once};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use parking_lot::Mutex;
use redis::AsyncCommands as _;
use redis::pipe;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::consumer::{Feed, Served};
use super::{Broker, BrokerError, Consumer, Publication, QueueDepth, Subscription};
use crate::liveness::{Liveness, LivenessRegistry};
use crate::redis::{AddressOptions, RedisUrl};
use channel_consumer::ChannelConsumer;
use connecting::{Commands, RedisConnector};
use held::{Held, Order, Settler};
use list_consumer::ListConsumer;
use maintenance::Maintenance;
use names::Names;
use publisher::Publisher;
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::{chain, panic_text};
use shared::{MessageLimits, SharedState};
use supervisor::{RedisSession, Supervisor};

mod bindings;
mod channel_consumer;
mod connecting;
mod held;
mod list_consumer;
mod maintenance;
mod names;
mod options;
mod parked;
mod probe;
mod publisher;
mod scripts;
mod sentinel_watch;
mod shared;
mod supervisor;
#[cfg(test)]
mod tests;
mod window;

pub use options::{
    BodyEncodingName, FanoutPrefix, QueueOrder, RedisBrokerOptions, RedisTransportOptions,
    SentinelKwargs,
};
pub use parked::ParkedElement;
pub use probe::{QueueState, RedisProbe, ServerState};

/// Schemes of the URLs.
pub const SCHEMES: [&str; 4] = ["redis", "rediss", "redis+socket", "sentinel"];

/// Returns true if the first of the URLs is one of Redis.
#[must_use]
pub fn has_scheme(urls: &str) -> bool {
    let scheme = urls.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| {
        SCHEMES
            .iter()
            .any(|known| known.eq_ignore_ascii_case(scheme))
    })
}

/// Checks URLs, as far as this is possible without their certificates and servers.
///
/// # Errors
/// Reason why the broker cannot use them.
pub fn check_urls(urls: &str, transport: &RedisTransportOptions) -> Result<(), BrokerError> {
    let address = AddressOptions {
        master_name: transport.master_name.clone(),
        ..AddressOptions::default()
    };
    RedisUrl::parse_list(urls, &address)?;
    Ok(())
}

/// Pause before the first new attempt to connect, and the longest one: a new master is found within a few seconds.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// A [`Broker`] in one database of Redis.
pub struct RedisBroker {
    shared: Arc<SharedState>,
    options: RedisBrokerOptions,
    /// Orders for the settler, until it is started.
    orders: Mutex<Option<mpsc::UnboundedReceiver<Order>>>,
    started: Once,
    sessions: TaskTracker,
    closing: CancellationToken,
    liveness: LivenessRegistry,
}

impl RedisBroker {
    /// Creates a broker handle, which connects at its first use.
    ///
    /// # Errors
    /// [`BrokerError::Url`].
    pub fn new(options: &RedisBrokerOptions) -> Result<Self, BrokerError> {
        if let Some((key, rule)) = options.transport.problem() {
            return Err(BrokerError::Url(format!("option `{key}` {rule}")));
        }
        let connector = Arc::new(RedisConnector::new(options)?);
        let commands = Arc::new(Commands::new(connector.clone()));
        let names = Arc::new(Names::new(&options.transport, connector.db()));
        let (held, orders) = Held::new();
        let publisher = Publisher::new(options, commands.clone(), names.clone());
        Ok(Self {
            shared: Arc::new(SharedState {
                connector,
                commands,
                names,
                publisher,
                held,
                order: options.transport.queue_order_strategy,
            }),
            options: options.clone(),
            orders: Mutex::new(Some(orders)),
            started: Once::new(),
            sessions: TaskTracker::new(),
            closing: CancellationToken::new(),
            liveness: LivenessRegistry::default(),
        })
    }

    /// Registers the loops of every later subscription there.
    #[must_use]
    pub fn with_liveness(self, liveness: LivenessRegistry) -> Self {
        Self { liveness, ..self }
    }

    /// Starts the tasks that settle and renew, with the first subscription that records messages.
    fn start(&self) {
        self.started.call_once(|| {
            let Some(orders) = self.orders.lock().take() else {
                return;
            };
            let SharedState {
                commands,
                names,
                held,
                ..
            } = &*self.shared;
            let settler = Settler {
                commands: commands.clone(),
                names: names.clone(),
                held: held.clone(),
            };
            tokio::spawn(settler.run(orders));
            let maintenance = Maintenance {
                commands: commands.clone(),
                names: names.clone(),
                held: held.clone(),
                options: self.options.transport.clone(),
            };
            let closing = self.closing.clone();
            self.sessions.spawn(async move {
                // Ends with the broker.
                let _ = closing.run_until_cancelled(maintenance.run()).await;
            });
        });
    }

    /// Maximum time between two ticks of a loop: it may wait for a connection, for its next attempt, or for replies.
    fn liveness_limit(&self) -> Duration {
        let connector = &self.shared.connector;
        connector.connecting_timeout() + RECONNECT.1 + connector.response_timeout() * 4
    }

    /// Runs one part of a subscription under supervision.
    fn supervise(
        &self,
        purpose: &'static str,
        feed: Arc<Feed>,
        session: impl RedisSession + 'static,
        liveness: Liveness,
    ) {
        let supervisor = Supervisor {
            connector: self.shared.connector.clone(),
            reconnect: self.options.reconnect,
            purpose,
            feed: feed.clone(),
            liveness,
        };
        self.sessions.spawn(async move {
            let running = AssertUnwindSafe(supervisor.run(session));
            if let Err(panic) = running.catch_unwind().await {
                // The loop does not tick from now on.
                report_panic(&feed, purpose, panic_text(&*panic));
            }
        });
    }
}

/// Reports that a subscription has ended, with the reason.
fn report_panic(feed: &Feed, purpose: &'static str, panic: &str) {
    tracing::error!(
        purpose,
        panic,
        "subscription panicked, which is a bug; it receives no more messages"
    );
    feed.reports.fail(BrokerError::Panicked {
        purpose,
        panic: panic.to_owned(),
    });
    feed.reports.update(|served| *served = Served::default());
    feed.cancelled.cancel();
}

#[async_trait]
impl Broker for RedisBroker {
    fn transport(&self) -> &'static str {
        "redis"
    }

    fn masked_url(&self) -> String {
        self.masked_urls().into_iter().next().unwrap_or_default()
    }

    fn masked_urls(&self) -> Vec<String> {
        self.shared.connector.uris()
    }

    async fn publish(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        self.shared.publisher.publish(publication, within).await
    }

    async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        let publisher = &self.shared.publisher;
        publisher.publish_until_confirmed(publication, within).await
    }

    fn blocked(&self) -> Option<Arc<str>> {
        self.shared.publisher.blocked()
    }

    async fn prepare(&self, within: Duration) -> Result<(), BrokerError> {
        let deadline = std::time::Instant::now() + within;
        let should_retry = |error: &BrokerError| matches!(error, BrokerError::Unreachable { .. });
        RetryLoop::new(RECONNECT)
            .until(deadline)
            .run(
                async || self.survey(&[]).await.map(drop),
                should_retry,
                |error, _| {
                    tracing::debug!(error = %chain(error), "connecting failed; retrying");
                },
            )
            .await
    }

    fn consume(&self, subscription: Subscription) -> Consumer {
        self.start();
        let (feed, consumer) = Feed::new(&subscription, self.closing.child_token());
        let feed = Arc::new(feed);
        let purpose = subscription.purpose;
        let limits = MessageLimits::from(&subscription);
        let watched = |part: &str| {
            let name = format!("connection for {purpose} ({part})");
            self.liveness.start(name, self.liveness_limit())
        };
        let liveness = watched("lists");
        let lists = ListConsumer::new(
            self.shared.clone(),
            feed.clone(),
            liveness.clone(),
            &subscription,
        );
        self.supervise(purpose, feed.clone(), lists, liveness);
        let liveness = watched("channels");
        let channels = ChannelConsumer {
            shared: self.shared.clone(),
            feed: feed.clone(),
            liveness: liveness.clone(),
            limits,
            check_every: Duration::from_secs(self.options.transport.health_check_interval),
        };
        self.supervise(purpose, feed, channels, liveness);
        consumer
    }

    async fn survey(&self, queues: &[String]) -> Result<Vec<QueueDepth>, BrokerError> {
        let SharedState {
            commands, names, ..
        } = &*self.shared;
        let classes = names.classes();
        let lengths: Vec<u64> = commands
            .run("to look at queues", async |connection| {
                if queues.is_empty() {
                    let _: () = connection.ping().await?;
                    return Ok(Vec::new());
                }
                let mut pipe = pipe();
                for list in queues.iter().flat_map(|queue| names.lists(queue)) {
                    pipe.llen(list);
                }
                pipe.query_async(connection).await
            })
            .await?;
        let depths = queues.iter().zip(lengths.chunks(classes));
        let depth = |(queue, lengths): (&String, &[u64])| QueueDepth {
            queue: queue.clone(),
            messages: u32::try_from(lengths.iter().sum::<u64>()).unwrap_or(u32::MAX),
            consumers: None,
        };
        Ok(depths.map(depth).collect())
    }

    async fn close(&self) {
        self.closing.cancel();
        self.sessions.close();
        self.sessions.wait().await;
        if self.started.is_completed() {
            self.shared.held.close().await;
        }
        self.shared.commands.close().await;
    }
}
