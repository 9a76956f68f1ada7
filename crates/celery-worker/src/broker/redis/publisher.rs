//! Publishing: to the list of a queue, to the queues that an exchange binds, or to the channel of a fanout exchange.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use redis::cmd;
use tokio::time::{Instant, timeout};

use super::connecting::Commands;
use super::names::Names;
use super::options::RedisBrokerOptions;
use super::scripts::PublishRequest;
use super::{RECONNECT, bindings, scripts};
use crate::broker::{BrokerError, Declaration, Exchange, ExchangeKind, Publication, Queue};
use celery_protocol::pidbox;
use celery_protocol::virtual_message::{self, BodyEncoding};
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;
use uuid::Uuid;

/// Publishes messages.
pub(super) struct Publisher {
    commands: Arc<Commands>,
    names: Arc<Names>,
    encoding: BodyEncoding,
    no_declare: bool,
    replicas: u32,
    response_timeout: Duration,
    /// Exchanges whose type is known, as in kombu: an unknown one is direct.
    kinds: Mutex<HashMap<String, ExchangeKind>>,
    /// Queues whose bindings were written over the connection with this number.
    declared: Mutex<(u64, HashSet<String>)>,
    blocked: Mutex<Option<Arc<str>>>,
}

/// Destination of a message.
enum Target {
    Lists(Vec<String>),
    Channel(String),
    Nowhere,
}

impl Publisher {
    pub(super) fn new(
        options: &RedisBrokerOptions,
        commands: Arc<Commands>,
        names: Arc<Names>,
    ) -> Self {
        // Celery's exchanges for broadcasts; the one of events is a topic exchange in AMQP only.
        let fanouts = [pidbox::EXCHANGE.to_owned(), Exchange::events().name];
        Self {
            commands,
            names,
            encoding: options.transport.body_encoding.into(),
            no_declare: options.no_declare,
            replicas: options.transport.wait_for_replicas,
            response_timeout: options.transport.response_timeout(),
            kinds: Mutex::new(fanouts.map(|name| (name, ExchangeKind::Fanout)).into()),
            declared: Mutex::default(),
            blocked: Mutex::default(),
        }
    }

    /// Returns true if messages to the queue are published to a channel.
    pub(super) fn is_broadcast(&self, queue: &Queue) -> bool {
        let Some(binding) = &queue.binding else {
            return false;
        };
        self.learn(&binding.exchange);
        self.is_fanout(&binding.exchange.name)
    }

    fn is_fanout(&self, exchange: &str) -> bool {
        self.kinds.lock().get(exchange) == Some(&ExchangeKind::Fanout)
    }

    fn learn(&self, exchange: &Exchange) {
        let mut kinds = self.kinds.lock();
        if !kinds.contains_key(&exchange.name) {
            kinds.insert(exchange.name.clone(), exchange.kind);
        }
    }

    /// Reason why the server refuses messages, as far as the last publication has shown it.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.blocked.lock().clone()
    }

    /// Publishes within a time limit.
    pub(super) async fn publish(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        match timeout(within, self.publish_until_confirmed(publication, within)).await {
            Ok(done) => done,
            Err(_) => Err(match self.blocked() {
                Some(reason) => BrokerError::Blocked {
                    broker: self.commands.connector.place(),
                    reason,
                },
                None => BrokerError::Timeout {
                    broker: self.commands.connector.place(),
                    waited: within,
                },
            }),
        }
    }

    /// Publishes; attempts to connect end after `within`.
    pub(super) async fn publish_until_confirmed(
        &self,
        publication: &Publication,
        within: Duration,
    ) -> Result<(), BrokerError> {
        // The same text and id for each attempt: a message whose confirmation was lost is not published twice.
        let text = virtual_message::encode(
            &publication.message,
            (&publication.exchange, &publication.routing_key),
            self.encoding,
        );
        let id = Uuid::new_v4().to_string();
        let deadline = (Instant::now() + within).into_std();
        let attempt = async || {
            let published = self.publish_once(publication, &id, &text).await;
            self.note(&published);
            published
        };
        let should_retry = |error: &BrokerError| match error {
            BrokerError::Unreachable { .. } => std::time::Instant::now() < deadline,
            // The server has no memory for now. The call waits, as for any broker that blocks publishers.
            BrokerError::Blocked { .. } => true,
            _ => false,
        };
        RetryLoop::new(RECONNECT)
            .run(attempt, should_retry, |error, _| {
                tracing::debug!(error = %chain(error), "message not published; retrying");
            })
            .await
    }

    async fn publish_once(
        &self,
        publication: &Publication,
        id: &str,
        text: &str,
    ) -> Result<(), BrokerError> {
        if let Some(declaration) = &publication.declare {
            self.declare(declaration).await?;
        }
        let target = self.target(publication).await?;
        let (lists, channel) = match target {
            Target::Lists(lists) => (lists, None),
            Target::Channel(channel) => (Vec::new(), Some(channel)),
            Target::Nowhere if publication.mandatory => {
                return Err(BrokerError::Unroutable {
                    exchange: publication.exchange.clone(),
                    routing_key: publication.routing_key.clone(),
                });
            }
            Target::Nowhere => return Ok(()),
        };
        let outgoing = PublishRequest {
            id: id.to_owned(),
            text: text.to_owned(),
            lists,
            expires_ms: publication.queue_lifetime.map_or(0, in_millis),
            channel,
        };
        let what = || format!("a message for `{}`", publication.routing_key);
        let published = self
            .commands
            .run(&what(), async |connection| {
                scripts::publish(connection, &self.names, &outgoing).await?;
                match (self.replicas, outgoing.lists.is_empty()) {
                    (0, _) | (_, true) => Ok(None),
                    (replicas, _) => {
                        let millis = self.response_timeout.as_millis() / 2;
                        let reached: u32 = cmd("WAIT")
                            .arg(replicas)
                            .arg(u64::try_from(millis).unwrap_or(u64::MAX))
                            .query_async(connection)
                            .await?;
                        Ok(Some(reached))
                    }
                }
            })
            .await;
        match published? {
            // The next attempt finds the marker and waits again.
            Some(reached) if reached < self.replicas => Err(self
                .commands
                .connector
                .lost("too few replicas have the message")),
            _ => Ok(()),
        }
    }

    /// Remembers that the server has no memory, or has memory again.
    fn note(&self, published: &Result<(), BrokerError>) {
        let mut blocked = self.blocked.lock();
        match published {
            Err(BrokerError::Blocked { broker, reason }) if blocked.is_none() => {
                tracing::warn!(
                    broker,
                    reason = &**reason,
                    "nothing is published until the broker has memory again"
                );
                *blocked = Some(reason.clone());
            }
            Ok(()) if blocked.is_some() => {
                *blocked = None;
                tracing::info!("the broker accepts messages again");
            }
            _ => {}
        }
    }

    async fn target(&self, publication: &Publication) -> Result<Target, BrokerError> {
        let Publication {
            exchange,
            routing_key,
            message,
            ..
        } = publication;
        let priority = message.properties.priority.unwrap_or(0);
        // Native delayed delivery does not exist here: the worker waits for the eta.
        if let Some(Declaration::Delayed(queue, _)) = &publication.declare {
            return Ok(Target::Lists(vec![self.names.list(&queue.name, priority)]));
        }
        if exchange.is_empty() {
            return Ok(Target::Lists(vec![self.names.list(routing_key, priority)]));
        }
        if self.is_fanout(exchange) {
            return Ok(Target::Channel(self.names.channel(exchange, routing_key)));
        }
        let queues = self
            .commands
            .run("to read bindings", async |connection| {
                bindings::route(connection, &self.names, exchange, routing_key).await
            })
            .await?;
        let lists: Vec<String> = queues
            .iter()
            .map(|queue| self.names.list(queue, priority))
            .collect();
        Ok(match lists.is_empty() {
            true => Target::Nowhere,
            false => Target::Lists(lists),
        })
    }

    /// Writes the binding of a queue, once for each connection: Redis may have lost it in between.
    async fn declare(&self, declaration: &Declaration) -> Result<(), BrokerError> {
        let queue = match declaration {
            Declaration::Exchange(exchange) => {
                self.learn(exchange);
                return Ok(());
            }
            Declaration::Queue(queue) | Declaration::Delayed(queue, _) => queue,
        };
        let is_bound = !self.is_broadcast(queue) && queue.binding.is_some();
        if !is_bound || (self.no_declare && !queue.is_transient()) {
            return Ok(());
        }
        let generation = self.commands.generation().await;
        {
            let mut declared = self.declared.lock();
            if declared.0 != generation {
                *declared = (generation, HashSet::new());
            }
            if declared.1.contains(&queue.name) {
                return Ok(());
            }
        }
        self.bind(queue).await?;
        self.declared.lock().1.insert(queue.name.clone());
        Ok(())
    }

    /// Writes the binding of a queue.
    pub(super) async fn bind(&self, queue: &Queue) -> Result<(), BrokerError> {
        if self.no_declare && !queue.is_transient() {
            return Ok(());
        }
        self.commands
            .run("a binding", async |connection| {
                bindings::bind(connection, &self.names, queue).await
            })
            .await
    }

    /// Removes a queue that belongs to this process.
    pub(super) async fn remove(&self, queue: &Queue) -> Result<(), BrokerError> {
        self.commands
            .run("to remove a queue", async |connection| {
                bindings::remove(connection, &self.names, queue).await
            })
            .await
    }
}

fn in_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
