//! Watch over the choice of the sentinels.
//!
//! After a planned fail-over, the old master accepts connections and writes for some more seconds (8 or more with
//! Redis 7.0), which are lost when it becomes a replica. Therefore the sentinels are asked all the time, and all
//! connections are opened again as soon as they name another server.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Client, RedisResult, cmd};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::connecting::RedisConnector;
use crate::redis::{RedisUrl, connection_config};

/// Interval of the questions.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Host and port of a master.
type Address = (String, String);

/// Starts the watch if the servers are sentinels. It ends with the connector.
pub(super) fn start(connector: &Arc<RedisConnector>) {
    let sentinels: Vec<Client> = connector
        .servers
        .current()
        .map(RedisUrl::sentinel_clients)
        .unwrap_or_default();
    let master = connector.servers.current().and_then(RedisUrl::master);
    if let Some(master) = master {
        let watch = SentinelWatch {
            sentinels,
            master: master.to_owned(),
            limit: connector.connection_timeout,
            connection: None,
        };
        tokio::spawn(watch.run(Arc::downgrade(connector)));
    }
}

struct SentinelWatch {
    /// The sentinels; the first one is asked, and moved to the end if it does not answer.
    sentinels: Vec<Client>,
    /// The name of the master.
    master: String,
    /// Time limit of one question.
    limit: Duration,
    connection: Option<MultiplexedConnection>,
}

impl SentinelWatch {
    async fn run(mut self, connector: Weak<RedisConnector>) {
        let mut ticks = interval(ASK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known: Option<Address> = None;
        while connector.strong_count() > 0 {
            ticks.tick().await;
            let address = match timeout(self.limit, self.ask()).await {
                Ok(Ok(address)) => address,
                Ok(Err(_)) | Err(_) => {
                    // Connecting reports that no sentinel answers.
                    self.connection = None;
                    self.sentinels.rotate_left(1);
                    continue;
                }
            };
            let Some(connector) = connector.upgrade() else {
                return;
            };
            if known.as_ref().is_some_and(|known| *known != address) {
                let (host, port) = &address;
                tracing::info!(
                    broker = connector.place(),
                    host,
                    port,
                    "the sentinels name another master; connecting to it"
                );
                connector.servers.renew();
            }
            known = Some(address);
        }
    }

    /// Asks a sentinel for the address of the master, in the same way as the library that connects to it: `SENTINEL
    /// GET-MASTER-ADDR-BY-NAME` names the new master before `SENTINEL MASTERS` does, and a connection that is opened in
    /// between leads to the old one.
    async fn ask(&mut self) -> RedisResult<Address> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => {
                let Some(sentinel) = self.sentinels.first() else {
                    return std::future::pending().await;
                };
                let config = connection_config(self.limit, self.limit);
                let opened = sentinel
                    .get_multiplexed_async_connection_with_config(&config)
                    .await?;
                self.connection.insert(opened)
            }
        };
        let mut question = cmd("SENTINEL");
        question.arg("MASTER").arg(&self.master);
        let mut state: HashMap<String, String> = question.query_async(connection).await?;
        let mut field = |name: &str| state.remove(name).unwrap_or_default();
        Ok((field("ip"), field("port")))
    }
}
