//! Opening connections, and declaring queues and exchanges.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use regex::Regex;
use secrecy::ExposeSecret as _;
use tokio::time::timeout;

use super::address::{BrokerAddress, parse_list};
use super::screen::{Bodies, ConnectionLimits, Notes};
use super::{AmqpOptions, AmqpTls, convert, short, stream};
use crate::broker::failover::{BrokerList, ConnectFailures};
use crate::broker::topology::TopologyStep;
use crate::broker::{Binding, BrokerError, Declaration, Publication, Queue, QueueDepth, topology};
use crate::product::Product;

/// Maximum frame size that connections request, in bytes. lapin has two buffers of 32 frames for each connection, and
/// in time uses all of their memory: 1 MB with this value, 8 MB with RabbitMQ's default. It is requested at the
/// beginning, since buffers that grow after the negotiation are filled to the end (lapin 4.12).
const FRAME: u32 = 16 << 10;

/// Maximum frame size after the first message that needs it: the default of RabbitMQ and py-amqp. Bodies are split into
/// frames, but headers must fit into one, and a receiver of a frame above the negotiated size ends the connection
/// (RabbitMQ 3.10, lapin 4.12).
pub(super) const LARGE_FRAME: u32 = 128 << 10;

/// Time limit for closing a connection.
const CLOSING: Duration = Duration::from_secs(5);

/// Opens connections with the options of a broker.
pub(super) struct Connector {
    pub(super) brokers: BrokerList<BrokerAddress>,
    name: String,
    product: Product,
    pub(super) connection_timeout: Duration,
    tls: AmqpTls,
    no_declare: bool,
    /// True after a message with headers that need [`LARGE_FRAME`].
    has_large_frames: AtomicBool,
}

impl Connector {
    pub(super) fn new(options: &AmqpOptions) -> Result<Self, BrokerError> {
        let addresses = parse_list(options.url.expose_secret(), options.heartbeat)?;
        let connector = Self {
            brokers: BrokerList::new(addresses, options.failover),
            name: options.name.clone(),
            product: options.product,
            connection_timeout: options.connection_timeout,
            tls: options.tls.clone(),
            no_declare: options.no_declare,
            has_large_frames: AtomicBool::new(false),
        };
        // Files that cannot be read are reported at the start, not at the first message.
        connector.certificates()?;
        Ok(connector)
    }

    /// URL of the broker in use, without its password.
    pub(super) fn masked(&self) -> String {
        let current = self.brokers.current();
        current.map_or_else(String::new, |address| address.masked.clone())
    }

    /// Time between two heartbeats; zero for none.
    pub(super) fn heartbeat(&self) -> Duration {
        let current = self.brokers.current();
        let seconds = current.and_then(|address| address.uri.query.heartbeat);
        Duration::from_secs(u64::from(seconds.unwrap_or_default()))
    }

    /// Time limit for one attempt to connect, which includes the limits of all brokers of the list.
    pub(super) fn connecting_timeout(&self) -> Duration {
        self.connection_timeout * self.brokers.count()
    }

    /// Reads the certificates for each connection, so that they can be replaced while the worker runs.
    fn certificates(&self) -> Result<OwnedTLSConfig, BrokerError> {
        let read = |option, path: &str| match path {
            "" => Ok(None),
            path => std::fs::read_to_string(path)
                .map_err(|e| e.to_string())
                .and_then(|text| match text.contains("-----BEGIN ") {
                    true => Ok(Some(text)),
                    false => Err("it contains no PEM block".into()),
                })
                .map_err(|reason| BrokerError::Tls {
                    option,
                    path: path.into(),
                    reason,
                }),
        };
        let pem = read("tls.cert_file", &self.tls.cert_file)?;
        let key = read("tls.key_file", &self.tls.key_file)?;
        Ok(OwnedTLSConfig {
            cert_chain: read("tls.ca_file", &self.tls.ca_file)?,
            identity: pem.zip(key).map(|(pem, key)| OwnedIdentity::PKCS8 {
                pem: pem.into_bytes(),
                key: key.into_bytes(),
            }),
        })
    }

    /// Opens a connection to the broker in use, or to the next one of the list that accepts it.
    ///
    /// # Errors
    /// The error of the broker. With several brokers, an error after which another attempt can succeed takes
    /// precedence.
    pub(super) async fn connect(&self, role: &str) -> Result<Connection, BrokerError> {
        let notes = Arc::new(Notes::default());
        self.connect_to_consume(role, Bodies::ALL, &notes).await
    }

    /// Connects as above, but drops some bodies and records the changes made to deliveries.
    pub(super) async fn connect_to_consume(
        &self,
        role: &str,
        bodies: Bodies,
        notes: &Arc<Notes>,
    ) -> Result<Connection, BrokerError> {
        let mut failures = ConnectFailures::default();
        for (choice, address) in self.brokers.in_turn() {
            match self.connect_to(address, role, bodies, notes).await {
                Ok(connection) => {
                    self.brokers.select(choice, &address.masked);
                    return Ok(connection);
                }
                Err(error) => failures.add(&address.masked, error),
            }
        }
        let failure = failures.into_error();
        Err(failure.unwrap_or_else(|| self.lost("there is no broker")))
    }

    async fn connect_to(
        &self,
        address: &BrokerAddress,
        role: &str,
        bodies: Bodies,
        notes: &Arc<Notes>,
    ) -> Result<Connection, BrokerError> {
        let mut uri = address.uri.clone();
        let has_large_frames = self.has_large_frames.load(Ordering::Relaxed);
        let frame = match has_large_frames {
            true => LARGE_FRAME,
            false => FRAME,
        };
        let limits = ConnectionLimits {
            is_last: has_large_frames || uri.query.frame_max.is_some(),
            frame: *uri.query.frame_max.get_or_insert(frame),
            bodies,
        };
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("{} {role}", self.name).into())
            .with_client_property("product".into(), self.product.name.into())
            .with_client_property("version".into(), self.product.version.into());
        let error = |error, what: &str| self.error_at(&address.masked, error, what);
        let connected =
            stream::connect(uri, self.certificates()?, limits, notes.clone(), properties);
        match timeout(self.connection_timeout, connected).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(refusal)) if is_access_refused(&refusal) => Err(error(
                refusal,
                "the login; check user, password and virtual host in the broker's URL",
            )),
            Ok(Err(failure)) => Err(error(failure, "the connection")),
            Err(_) => Err(BrokerError::Unreachable {
                broker: address.masked.clone(),
                source: Arc::from(Box::from("no answer in time (option `connection_timeout`)")),
            }),
        }
    }

    /// Declares something as Celery does, or checks that it exists. If it exists with other arguments, it is used
    /// unchanged: the broker then closes the channel, which is only used for this purpose.
    pub(super) async fn declare(
        &self,
        connection: &Connection,
        declaration: &Declaration,
    ) -> Result<(), BrokerError> {
        self.make(connection, &declaration.steps()).await
    }

    /// Declares a task queue, and the bindings that route delayed messages to it.
    pub(super) async fn declare_with_delay(
        &self,
        connection: &Connection,
        queue: &Queue,
        delayed: bool,
    ) -> Result<(), BrokerError> {
        self.make(connection, &[TopologyStep::Queue(queue.clone())])
            .await?;
        if delayed && !queue.is_transient() {
            self.make(connection, &topology::behind_delay(queue))
                .await?;
        }
        Ok(())
    }

    /// Declares a topology. If something exists with other arguments, the following steps are still made, because they
    /// may succeed.
    pub(super) async fn make(
        &self,
        connection: &Connection,
        steps: &[TopologyStep],
    ) -> Result<(), BrokerError> {
        let mut channel = None;
        let single = steps
            .iter()
            .flat_map(|step| single_steps(step, self.no_declare));
        for (step, passive) in single {
            let open = match channel.take() {
                Some(open) => open,
                None => connection
                    .create_channel()
                    .await
                    .map_err(|e| self.error(e, "a channel for declaring"))?,
            };
            match declare(&open, &step, passive).await {
                Ok(()) => channel = Some(open),
                // The broker has closed the channel with its refusal.
                Err(error) if is_precondition_failed(&error) => log_difference(&step, &error),
                Err(error) if passive && is_not_found(&error) => {
                    let what =
                        "; it is missing, and the option `no_declare` does not allow declaring it";
                    return Err(self.refused(error, format!("{step}{what}")));
                }
                Err(error) => return Err(self.error(error, &format!("to declare {step}"))),
            }
        }
        if let Some(channel) = channel {
            // The channel is not used again; an error of its closing has no consequence.
            let _ = channel.close(200, "declared".into()).await;
        }
        Ok(())
    }

    /// Classifies an error. An error that a new connection can remedy is not a refusal.
    pub(super) fn error(&self, error: lapin::Error, what: &str) -> BrokerError {
        self.error_at(&self.masked(), error, what)
    }

    fn error_at(&self, broker: &str, error: lapin::Error, what: &str) -> BrokerError {
        let is_cured = is_shutdown(&error) || self.makes_frames_larger(&error);
        let broker = broker.to_owned();
        let refused = error.is_amqp_error() && !is_cured;
        let source = Arc::new(error);
        match refused {
            true => BrokerError::Refused {
                broker,
                what: what.into(),
                source,
            },
            false => BrokerError::Unreachable { broker, source },
        }
    }

    /// Returns true if a connection ended because a frame was too large for it, and the next connection allows larger
    /// ones. All pending operations of the connection end with the same error.
    fn makes_frames_larger(&self, error: &lapin::Error) -> bool {
        if !is_frame_error(error) || self.has_own_frames() {
            return false;
        }
        if !self.has_large_frames.swap(true, Ordering::Relaxed) {
            tracing::info!(
                from = FRAME,
                to = LARGE_FRAME,
                "a message has large headers; new connections use larger frames"
            );
        }
        true
    }

    /// Returns true if the URL sets the frame size.
    fn has_own_frames(&self) -> bool {
        let current = self.brokers.current();
        current.is_some_and(|address| address.uri.query.frame_max.is_some())
    }

    fn refused(&self, error: lapin::Error, what: String) -> BrokerError {
        BrokerError::Refused {
            broker: self.masked(),
            what,
            source: Arc::new(error),
        }
    }

    pub(super) fn lost(&self, why: &str) -> BrokerError {
        BrokerError::Unreachable {
            broker: self.masked(),
            source: Arc::from(Box::from(why)),
        }
    }
}

/// Steps for a declaration, in Celery's order: exchange, queue, binding. The second value of each is true if the step
/// only checks for existence.
fn single_steps(step: &TopologyStep, no_declare: bool) -> Vec<(TopologyStep, bool)> {
    let TopologyStep::Queue(queue) = step else {
        return vec![(step.clone(), no_declare)];
    };
    // A transient queue belongs to this connection, so no other process can declare it.
    let passive = no_declare && !queue.is_transient();
    let bare = Queue {
        binding: None,
        ..queue.clone()
    };
    match &queue.binding {
        Some(Binding { exchange, key }) if !passive => vec![
            (TopologyStep::Exchange(exchange.clone()), false),
            (TopologyStep::Queue(bare), false),
            (
                TopologyStep::BindQueue {
                    source: exchange.name.clone(),
                    destination: queue.name.clone(),
                    key: key.clone(),
                },
                false,
            ),
        ],
        // A consumer does not need the binding.
        _ => vec![(TopologyStep::Queue(bare), passive)],
    }
}

/// Returns the number of messages and consumers of a queue. A missing queue closes the channel.
pub(super) async fn depth(channel: &Channel, queue: &str) -> lapin::Result<QueueDepth> {
    let name = short(queue).map_err(|e| lapin::Error::from(std::io::Error::other(e)))?;
    let options = QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let found = channel
        .queue_declare(name, options, FieldTable::default())
        .await?;
    Ok(QueueDepth {
        queue: queue.to_owned(),
        messages: found.message_count(),
        consumers: Some(found.consumer_count()),
    })
}

/// Executes one step; with `passive` it only checks that the named object exists.
pub(super) async fn declare(
    channel: &Channel,
    step: &TopologyStep,
    passive: bool,
) -> lapin::Result<()> {
    let none = FieldTable::default();
    let text = |name: &str| short(name).map_err(|e| lapin::Error::from(std::io::Error::other(e)));
    match step {
        TopologyStep::Exchange(exchange) => {
            let kind = match exchange.kind {
                crate::broker::ExchangeKind::Direct => ExchangeKind::Direct,
                crate::broker::ExchangeKind::Fanout => ExchangeKind::Fanout,
                crate::broker::ExchangeKind::Topic => ExchangeKind::Topic,
                crate::broker::ExchangeKind::Headers => ExchangeKind::Headers,
            };
            let options = ExchangeDeclareOptions {
                passive,
                durable: exchange.durable,
                ..Default::default()
            };
            channel
                .exchange_declare(text(&exchange.name)?, kind, options, none)
                .await
        }
        TopologyStep::Queue(queue) => {
            let options = QueueDeclareOptions {
                passive,
                durable: queue.durable,
                exclusive: queue.exclusive,
                auto_delete: queue.auto_delete,
                ..Default::default()
            };
            let arguments = convert::table(&queue.arguments);
            let declared = channel.queue_declare(text(&queue.name)?, options, arguments);
            declared.await.map(drop)
        }
        TopologyStep::BindExchange { .. } | TopologyStep::BindQueue { .. } if passive => Ok(()),
        TopologyStep::BindExchange {
            source,
            destination,
            key,
        } => {
            let (to, from, key) = (text(destination)?, text(source)?, text(key)?);
            channel
                .exchange_bind(to, from, key, ExchangeBindOptions::default(), none)
                .await
        }
        TopologyStep::BindQueue {
            source,
            destination,
            key,
        } => {
            let (to, from, key) = (text(destination)?, text(source)?, text(key)?);
            channel
                .queue_bind(to, from, key, QueueBindOptions::default(), none)
                .await
        }
    }
}

/// RabbitMQ's error text for a declaration that differs from the existing object.
static INEQUIVALENT: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(
        r"inequivalent arg '(?P<argument>[^']+)' for .+: received (?P<wanted>.+) but current is (?P<found>.+)",
    )
    .ok()
});

/// Difference between a declaration and the existing object.
pub(super) enum Difference {
    /// One argument differs.
    Argument {
        argument: String,
        wanted: String,
        found: String,
    },
    /// Another difference, in the broker's own words.
    Other(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument {
                argument,
                wanted,
                found,
            } => write!(f, "{argument} is {found} and would be {wanted}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// Extracts the difference from a refusal.
pub(super) fn difference_of(error: &lapin::Error) -> Difference {
    let text = error.to_string();
    let parts = INEQUIVALENT
        .as_ref()
        .and_then(|regex| regex.captures(&text));
    match parts {
        Some(parts) => Difference::Argument {
            argument: parts["argument"].to_owned(),
            wanted: parts["wanted"].to_owned(),
            found: parts["found"].to_owned(),
        },
        None => Difference::Other(text),
    }
}

/// Logs the difference between a declaration and the existing object.
fn log_difference(step: &TopologyStep, error: &lapin::Error) {
    tracing::warn!(
        what = %step,
        difference = %difference_of(error),
        "exists with other arguments and is used unchanged; set these arguments in task_queues, or delete it"
    );
}

fn soft(error: &lapin::Error) -> Option<(&AMQPSoftError, &str)> {
    match error.kind() {
        ErrorKind::ProtocolError(e) => match e.kind() {
            AMQPErrorKind::Soft(soft) => Some((soft, e.get_message().as_str())),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

pub(super) fn is_precondition_failed(error: &lapin::Error) -> bool {
    matches!(soft(error), Some((AMQPSoftError::PRECONDITIONFAILED, _)))
}

pub(super) fn is_not_found(error: &lapin::Error) -> bool {
    matches!(soft(error), Some((AMQPSoftError::NOTFOUND, _)))
}

/// Returns true for a wrong user, password or virtual host. RabbitMQ closes the connection with code 403 in this case.
fn is_access_refused(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e)
        if matches!(e.kind(), AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
            | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)))
}

/// The missing exchange for which a channel was closed.
pub(super) fn missing_exchange(error: &lapin::Error) -> Option<String> {
    let (AMQPSoftError::NOTFOUND, text) = soft(error)? else {
        return None;
    };
    let (_, rest) = text.split_once("no exchange '")?;
    let (name, _) = rest.rsplit_once("' in vhost")?;
    Some(name.to_owned())
}

/// Returns true if a publication failed because its queue or its exchange does not exist.
pub(super) fn leads_nowhere(error: &BrokerError, publication: &Publication) -> bool {
    match error {
        BrokerError::Unroutable { .. } => true,
        BrokerError::Refused { source, .. } => {
            let missing = source.downcast_ref().and_then(missing_exchange);
            missing.is_some_and(|missing| missing == publication.exchange)
        }
        _ => false,
    }
}

/// Returns true if the broker closed a channel because a delivery was unacknowledged for too long. RabbitMQ 3.8.15 and
/// newer; the limit is the broker's `consumer_timeout`.
pub(super) fn is_held_too_long(error: &lapin::Error) -> bool {
    matches!(soft(error), Some((AMQPSoftError::PRECONDITIONFAILED, text))
        if text.contains("timed out"))
}

/// Returns true if the broker closed the connection because it shuts down, which is not a refusal.
fn is_shutdown(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e)
        if *e.kind() == AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED))
}

/// Returns true if the connection ended because of a frame, mostly one above the negotiated size. The broker and lapin
/// both report this error.
fn is_frame_error(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(e)
        if *e.kind() == AMQPErrorKind::Hard(AMQPHardError::FRAMEERROR))
}

pub(super) async fn goodbye(connection: &Connection) {
    if connection.status().connected() {
        // An error has no consequence: the connection is not used again.
        let _ = timeout(CLOSING, connection.close(200, "bye".into())).await;
    }
}
