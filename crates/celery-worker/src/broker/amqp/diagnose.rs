//! Connection diagnostics, one stage at a time, for `doctor`.
//!
//! The module does not modify objects of other programs. It makes its tests with an exclusive queue of its own, which
//! is removed with the connection. Other queues are only looked up, and an existing queue is declared as the worker would declare
//! it, which changes nothing: the broker either accepts the declaration or reports the difference.

use futures_util::StreamExt;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::uri::AMQPScheme;
use lapin::{BasicProperties, Connection, Event};
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::connector::{
    Connector, declare, difference_of, goodbye, is_not_found, is_precondition_failed,
};
use super::{AmqpOptions, convert, short};
use crate::broker::topology::TopologyStep;
use crate::broker::{BrokerError, Queue};
use service_connection::error_chain::chain;

/// First bytes that a client sends: AMQP 0-9-1 §4.2.2.
const HEADER: &[u8; 8] = b"AMQP\x00\x00\x09\x01";

/// The method Connection.Start: class 10, method 10.
const START: [u8; 4] = [0, 10, 0, 10];

/// Maximum size of a greeting that is read.
const MAX_GREETING_BYTES: usize = 64 << 10;

/// Stage of connecting at which an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectStage {
    /// The URL or a file for TLS cannot be used.
    Settings,
    /// The host name cannot be resolved.
    Name,
    /// No server accepts connections at the port.
    Tcp,
    /// The TLS handshake failed.
    Tls,
    /// The server does not speak AMQP, or does not answer in time.
    Protocol,
    /// The broker rejected the user and password, or the certificate.
    Login,
    /// The virtual host does not exist, or the user has no access to it.
    VirtualHost,
}

/// Reason why no connection could be opened.
#[derive(Debug)]
pub struct ConnectFailure {
    /// The stage that failed.
    pub stage: ConnectStage,
    /// The reason, in one line and without a password.
    pub reason: String,
}

/// Product and version of a broker; unknown with TLS, where only the library reads them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greeting {
    /// E.g. `RabbitMQ`.
    pub product: String,
    /// E.g. `3.13.7`.
    pub version: String,
}

/// Permissions of a user for queues with names of its own; an error contains the broker's refusal.
#[derive(Debug)]
pub struct Permissions {
    /// Permission to declare a queue.
    pub configure: Result<(), String>,
    /// Permission to publish through the default exchange.
    pub write: Result<(), String>,
    /// Permission to read from the queue; none if no queue could be declared for the test.
    pub read: Option<Result<(), String>>,
}

/// Result of comparing an existing queue with a declaration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// The queue does not exist.
    Missing,
    /// The queue matches the declaration.
    Same {
        /// Number of waiting messages.
        messages: u32,
        /// Number of consumers.
        consumers: u32,
    },
    /// The queue differs; the text is the broker's description of the difference.
    Differs(String),
}

/// A connection for diagnostics.
pub struct Probe {
    masked: String,
    /// Names of the user and the virtual host.
    login: (String, String),
    connector: Connector,
    connection: Connection,
    greeting: Option<Greeting>,
}

impl Probe {
    /// Returns the options for each broker of a list, with its URL without the password.
    ///
    /// # Errors
    /// A URL or a file for TLS cannot be used.
    pub fn brokers(options: &AmqpOptions) -> Result<Vec<(String, AmqpOptions)>, ConnectFailure> {
        let stop = |error: BrokerError| ConnectFailure {
            stage: ConnectStage::Settings,
            reason: chain(&error).to_string(),
        };
        let connector = Connector::new(options).map_err(stop)?;
        let urls = options.url.expose_secret().split(';');
        let brokers = connector
            .brokers
            .all()
            .iter()
            .zip(urls)
            .map(|(address, url)| {
                let alone = AmqpOptions {
                    url: url.into(),
                    ..options.clone()
                };
                (address.masked.clone(), alone)
            });
        Ok(brokers.collect())
    }

    /// Connects to a single broker, with a separate error for each stage.
    ///
    /// # Errors
    /// The stage that failed.
    pub async fn connect(options: &AmqpOptions) -> Result<Self, ConnectFailure> {
        let stop = |stage, reason: String| ConnectFailure { stage, reason };
        let connector = Connector::new(options)
            .map_err(|e| stop(ConnectStage::Settings, chain(&e).to_string()))?;
        let Some(address) = connector.brokers.current() else {
            return Err(stop(ConnectStage::Settings, "no URL".into()));
        };
        let authority = &address.uri.authority;
        let at = (authority.host.as_str(), authority.port);
        let late = || {
            format!(
                "no answer within {}",
                humantime::format_duration(connector.connection_timeout)
            )
        };
        let within = connector.connection_timeout;
        let addresses: Vec<_> = match timeout(within, lookup_host(at)).await {
            Ok(Ok(addresses)) => addresses.collect(),
            Ok(Err(error)) => return Err(stop(ConnectStage::Name, error.to_string())),
            Err(_) => return Err(stop(ConnectStage::Name, late())),
        };
        let stream = match timeout(within, TcpStream::connect(addresses.as_slice())).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(stop(ConnectStage::Tcp, error.to_string())),
            Err(_) => return Err(stop(ConnectStage::Tcp, late())),
        };
        let is_tls = address.uri.scheme == AMQPScheme::AMQPS;
        let greeting = match is_tls {
            true => None,
            false => match timeout(within, greet(stream)).await {
                Ok(Ok(greeting)) => greeting,
                Ok(Err(error)) => return Err(stop(ConnectStage::Protocol, error.to_string())),
                Err(_) => return Err(stop(ConnectStage::Protocol, late())),
            },
        };
        let (masked, login) = (
            address.masked.clone(),
            (
                authority.userinfo.username.clone(),
                address.uri.vhost.clone(),
            ),
        );
        match connector.connect("doctor").await {
            Ok(connection) => Ok(Self {
                masked,
                login,
                connector,
                connection,
                greeting,
            }),
            Err(error) => {
                let reason = std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), |source| chain(source).to_string());
                let stage = match error {
                    BrokerError::Refused { .. } if reason.contains("vhost") => {
                        ConnectStage::VirtualHost
                    }
                    BrokerError::Refused { .. } => ConnectStage::Login,
                    _ if is_tls => ConnectStage::Tls,
                    _ => ConnectStage::Protocol,
                };
                Err(stop(stage, reason))
            }
        }
    }

    /// The broker's URL without its password.
    #[must_use]
    pub fn masked_url(&self) -> &str {
        &self.masked
    }

    /// Names of the user and the virtual host.
    #[must_use]
    pub fn login(&self) -> (&str, &str) {
        let (user, vhost) = &self.login;
        (user, vhost)
    }

    /// The broker's greeting, if it is known.
    #[must_use]
    pub fn greeting(&self) -> Option<&Greeting> {
        self.greeting.as_ref()
    }

    /// Tests a worker's operations with a queue of its own. No other program may use `name`.
    ///
    /// # Errors
    /// No channel could be opened, or the broker does not accept messages for now.
    pub async fn permissions(&self, name: &str) -> Result<Permissions, BrokerError> {
        let failure_text = |error: lapin::Error| chain(&error).to_string();
        let queue = short(name)?;
        let ours = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..Default::default()
        };
        let declaring = self.channel().await?;
        let configure = declaring
            .queue_declare(queue.clone(), ours, FieldTable::default())
            .await
            .map(drop)
            .map_err(failure_text);
        let write = self.write(name).await?;
        let read = match configure {
            Err(_) => None,
            Ok(()) => {
                let options = BasicGetOptions { no_ack: true };
                let got = declaring.basic_get(queue, options).await;
                Some(got.map(drop).map_err(failure_text))
            }
        };
        Ok(Permissions {
            configure,
            write,
            read,
        })
    }

    /// Publishes to the test queue, which no other program reads. Uses another connection: a broker that is short of
    /// memory or disk space stops answering on a connection that publishes.
    async fn write(&self, name: &str) -> Result<Result<(), String>, BrokerError> {
        let connection = self.connector.connect("doctor").await?;
        let mut events = connection.events_listener();
        let publishing = async {
            let channel = connection.create_channel().await?;
            channel
                .confirm_select(ConfirmSelectOptions::default())
                .await?;
            let options = BasicPublishOptions::default();
            let nothing = BasicProperties::default();
            let confirming = channel.basic_publish("".into(), name.into(), options, b"", nothing);
            confirming.await?.await?;
            // The broker accepts the first message and blocks the connection only afterwards.
            channel.close(200, "tried".into()).await
        };
        let blocked = async {
            while let Some(event) = events.next().await {
                if let Event::ConnectionBlocked(reason) = event {
                    return reason;
                }
            }
            std::future::pending().await
        };
        let published = tokio::select! {
            published = publishing => published,
            reason = blocked => {
                return Err(BrokerError::Blocked {
                    broker: self.masked.clone(),
                    reason: reason.into(),
                });
            }
        };
        goodbye(&connection).await;
        Ok(published.map_err(|error| chain(&error).to_string()))
    }

    /// Compares a declaration with the existing queue. Never creates a missing one.
    ///
    /// # Errors
    /// The broker refused the request, or the connection ended.
    pub async fn compare(&self, queue: &Queue) -> Result<Comparison, BrokerError> {
        let refused = |error| {
            self.connector
                .error(error, &format!("to look at `{}`", queue.name))
        };
        let name = short(&queue.name)?;
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let channel = self.channel().await?;
        let arguments = convert::table(&queue.arguments);
        let found = match channel.queue_declare(name, passive, arguments).await {
            Ok(found) => found,
            Err(error) if is_not_found(&error) => return Ok(Comparison::Missing),
            Err(error) => return Err(refused(error)),
        };
        let bare = TopologyStep::Queue(Queue {
            binding: None,
            ..queue.clone()
        });
        match declare(&channel, &bare, false).await {
            Ok(()) => Ok(Comparison::Same {
                messages: found.message_count(),
                consumers: found.consumer_count(),
            }),
            Err(error) if is_precondition_failed(&error) => {
                Ok(Comparison::Differs(difference_of(&error).to_string()))
            }
            Err(error) => Err(refused(error)),
        }
    }

    /// Returns true if a queue exists.
    ///
    /// # Errors
    /// The broker refused the request, or the connection ended.
    pub async fn exists(&self, name: &str) -> Result<bool, BrokerError> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let channel = self.channel().await?;
        let found = channel
            .queue_declare(short(name)?, passive, FieldTable::default())
            .await;
        match found {
            Ok(_) => Ok(true),
            Err(error) if is_not_found(&error) => Ok(false),
            Err(error) => Err(self.connector.error(error, &format!("to look at `{name}`"))),
        }
    }

    /// Closes the connection, which removes the test queue.
    pub async fn close(self) {
        goodbye(&self.connection).await;
    }

    async fn channel(&self) -> Result<lapin::Channel, BrokerError> {
        self.connection
            .create_channel()
            .await
            .map_err(|e| self.connector.error(e, "a channel"))
    }
}

/// Performs the handshake up to the broker's greeting, which lapin reads but does not expose.
async fn greet(mut stream: TcpStream) -> std::io::Result<Option<Greeting>> {
    stream.write_all(HEADER).await?;
    let mut head = [0; 7];
    stream.read_exact(&mut head).await?;
    let [kind, _, _, size @ ..] = head;
    let size = u32::from_be_bytes(size) as usize;
    // A broker that requires another protocol version sends its own header and closes the connection.
    if kind != 1 || size > MAX_GREETING_BYTES {
        return Err(std::io::Error::other("the answer is not AMQP 0-9-1"));
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload).await?;
    Ok(greeting(&payload))
}

/// Parses Connection.Start; none if it has another form than RabbitMQ's.
fn greeting(payload: &[u8]) -> Option<Greeting> {
    // The method is followed by two bytes for the version and a table.
    let properties = payload.strip_prefix(&START)?.get(2..)?;
    let (properties, _) = sized(properties)?;
    let mut rest = properties;
    let mut greeting = Greeting::default();
    while let Some((&name_bytes, after)) = rest.split_first() {
        let (name, after) = after.split_at_checked(usize::from(name_bytes))?;
        let (kind, after) = after.split_first()?;
        // RabbitMQ sends only texts and tables, and both begin with their size.
        if !matches!(kind, b'S' | b'F') {
            return None;
        }
        let (value, after) = sized(after)?;
        let text = || String::from_utf8_lossy(value).into_owned();
        match name {
            b"product" => greeting.product = text(),
            b"version" => greeting.version = text(),
            _ => {}
        }
        rest = after;
    }
    Some(greeting)
}

/// Splits off a value that follows its size in four bytes.
fn sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (size, rest) = bytes.split_at_checked(4)?;
    let size = u32::from_be_bytes(size.try_into().ok()?);
    rest.split_at_checked(usize::try_from(size).ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start(properties: &[u8]) -> Vec<u8> {
        let mut payload = [&START[..], &[0, 9]].concat();
        let size = u32::try_from(properties.len()).unwrap_or(u32::MAX);
        payload.extend(size.to_be_bytes());
        payload.extend(properties);
        payload
    }

    #[test]
    fn version_of_the_broker_is_read() {
        let properties = b"\x0ccapabilitiesF\0\0\0\x03\x01xt\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x063.10.8";
        let expected = Greeting {
            product: "RabbitMQ".into(),
            version: "3.10.8".into(),
        };
        assert_eq!(greeting(&start(properties)), Some(expected));
        assert_eq!(greeting(&start(b"\x01xI\0\0\0\x01")), None);
        assert_eq!(greeting(b"HTTP/1.1 400"), None);
    }

    proptest! {
        #[test]
        fn any_greeting_is_read_without_panic(properties: Vec<u8>) {
            greeting(&properties);
            greeting(&start(&properties));
        }
    }
}
