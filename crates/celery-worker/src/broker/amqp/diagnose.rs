//! Connection diagnostics, one stage at a time, for `doctor`.
//!
//! Nothing that belongs to somebody else is touched. What is tried is tried with an exclusive queue
//! of our own, which goes with the connection; queues of others are looked at, and a queue that is
//! there is declared as the worker would do it, which changes nothing: the broker either agrees or
//! says what differs.

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

/// What a client sends first: AMQP 0-9-1 §4.2.2.
const HEADER: &[u8; 8] = b"AMQP\x00\x00\x09\x01";

/// The method Connection.Start: class 10, method 10.
const START: [u8; 4] = [0, 10, 0, 10];

/// Longest greeting that is looked at.
const MAX_GREETING_BYTES: usize = 64 << 10;

/// Where the way to a broker ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurdle {
    /// The URL, or a file for TLS.
    Settings,
    /// The host's name is not known.
    Name,
    /// Nobody answers at the port.
    Tcp,
    /// TLS cannot be agreed upon.
    Tls,
    /// Whoever answers does not speak AMQP, or not in time.
    Protocol,
    /// User and password, or the certificate, are refused.
    Login,
    /// The virtual host is not there, or closed to this user.
    VirtualHost,
}

/// Why there is no connection.
#[derive(Debug)]
pub struct Obstacle {
    /// Which step failed.
    pub hurdle: Hurdle,
    /// Why, in one line and without a password.
    pub reason: String,
}

/// What a broker says about itself; unknown with TLS, where only the library hears it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Greeting {
    /// E.g. `RabbitMQ`.
    pub product: String,
    /// E.g. `3.13.7`.
    pub version: String,
}

/// What a user may do with names of its own; each with the broker's refusal.
#[derive(Debug)]
pub struct Permissions {
    /// Declaring a queue.
    pub configure: Result<(), String>,
    /// Publishing through the default exchange.
    pub write: Result<(), String>,
    /// Reading from the queue; none where there is no queue to try it with.
    pub read: Option<Result<(), String>>,
}

/// A queue that is, beside the one that would be declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// There is none.
    Missing,
    /// It is what would be declared.
    Same {
        /// Messages that wait.
        messages: u32,
        /// Whoever listens.
        consumers: u32,
    },
    /// It was declared otherwise; how, in the broker's words.
    Differs(String),
}

/// A connection to look through.
pub struct Probe {
    masked: String,
    /// User and virtual host.
    login: (String, String),
    connector: Connector,
    connection: Connection,
    greeting: Option<Greeting>,
}

impl Probe {
    /// Options for each broker of a list, with its URL as it may be shown.
    ///
    /// # Errors
    /// A URL or a file for TLS that cannot be used.
    pub fn brokers(options: &AmqpOptions) -> Result<Vec<(String, AmqpOptions)>, Obstacle> {
        let stop = |error: BrokerError| Obstacle {
            hurdle: Hurdle::Settings,
            reason: chain(&error).to_string(),
        };
        let connector = Connector::new(options).map_err(stop)?;
        let urls = options.url.expose_secret().split(';');
        let brokers = connector
            .addresses
            .in_turn()
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

    /// Connects to a single broker, with an own error for each step.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn connect(options: &AmqpOptions) -> Result<Self, Obstacle> {
        let stop = |hurdle, reason: String| Obstacle { hurdle, reason };
        let connector =
            Connector::new(options).map_err(|e| stop(Hurdle::Settings, chain(&e).to_string()))?;
        let Some(address) = connector.addresses.current() else {
            return Err(stop(Hurdle::Settings, "no URL".into()));
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
            Ok(Err(error)) => return Err(stop(Hurdle::Name, error.to_string())),
            Err(_) => return Err(stop(Hurdle::Name, late())),
        };
        let stream = match timeout(within, TcpStream::connect(addresses.as_slice())).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(stop(Hurdle::Tcp, error.to_string())),
            Err(_) => return Err(stop(Hurdle::Tcp, late())),
        };
        let is_tls = address.uri.scheme == AMQPScheme::AMQPS;
        let greeting = match is_tls {
            true => None,
            false => match timeout(within, greet(stream)).await {
                Ok(Ok(greeting)) => greeting,
                Ok(Err(error)) => return Err(stop(Hurdle::Protocol, error.to_string())),
                Err(_) => return Err(stop(Hurdle::Protocol, late())),
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
                let hurdle = match error {
                    BrokerError::Refused { .. } if reason.contains("vhost") => Hurdle::VirtualHost,
                    BrokerError::Refused { .. } => Hurdle::Login,
                    _ if is_tls => Hurdle::Tls,
                    _ => Hurdle::Protocol,
                };
                Err(stop(hurdle, reason))
            }
        }
    }

    /// The broker's URL without its password.
    #[must_use]
    pub fn masked_url(&self) -> &str {
        &self.masked
    }

    /// The user, and the virtual host.
    #[must_use]
    pub fn login(&self) -> (&str, &str) {
        let (user, vhost) = &self.login;
        (user, vhost)
    }

    /// What the broker said about itself.
    #[must_use]
    pub fn greeting(&self) -> Option<&Greeting> {
        self.greeting.as_ref()
    }

    /// Tries what a worker does with queues of its own. No other program may use `name`.
    ///
    /// # Errors
    /// No channel could be opened, or the broker takes no messages for now.
    pub async fn permissions(&self, name: &str) -> Result<Permissions, BrokerError> {
        let told = |error: lapin::Error| chain(&error).to_string();
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
            .map_err(told);
        let write = self.write(name).await?;
        let read = match configure {
            Err(_) => None,
            Ok(()) => {
                let options = BasicGetOptions { no_ack: true };
                let got = declaring.basic_get(queue, options).await;
                Some(got.map(drop).map_err(told))
            }
        };
        Ok(Permissions {
            configure,
            write,
            read,
        })
    }

    /// Publishes to our own queue, which no other program reads. Uses another connection: a broker that is short
    /// of memory or disk space gives no more answers on a connection that publishes.
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
            // The broker takes the first message and blocks the connection only then.
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

    /// Compares a queue with the one that is there. Never makes one that is missing.
    ///
    /// # Errors
    /// The broker's refusal, or that it is gone.
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
        let looking = self.channel().await?;
        let arguments = convert::table(&queue.arguments);
        let found = match looking.queue_declare(name, passive, arguments).await {
            Ok(found) => found,
            Err(error) if is_not_found(&error) => return Ok(Comparison::Missing),
            Err(error) => return Err(refused(error)),
        };
        let bare = TopologyStep::Queue(Queue {
            binding: None,
            ..queue.clone()
        });
        match declare(&looking, &bare, false).await {
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

    /// Whether a queue is there.
    ///
    /// # Errors
    /// The broker's refusal, or that it is gone.
    pub async fn exists(&self, name: &str) -> Result<bool, BrokerError> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let looking = self.channel().await?;
        let found = looking
            .queue_declare(short(name)?, passive, FieldTable::default())
            .await;
        match found {
            Ok(_) => Ok(true),
            Err(error) if is_not_found(&error) => Ok(false),
            Err(error) => Err(self.connector.error(error, &format!("to look at `{name}`"))),
        }
    }

    /// Ends the connection, and with it what was declared.
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

/// Says hello by hand and reads what the broker says about itself; lapin hears it but does not tell.
async fn greet(mut stream: TcpStream) -> std::io::Result<Option<Greeting>> {
    stream.write_all(HEADER).await?;
    let mut head = [0; 7];
    stream.read_exact(&mut head).await?;
    let [kind, _, _, size @ ..] = head;
    let size = u32::from_be_bytes(size) as usize;
    // A broker that wants another version sends its own header back and hangs up.
    if kind != 1 || size > MAX_GREETING_BYTES {
        return Err(std::io::Error::other("the answer is not AMQP 0-9-1"));
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload).await?;
    Ok(greeting(&payload))
}

/// Reads Connection.Start; none if it has another form than RabbitMQ's.
fn greeting(payload: &[u8]) -> Option<Greeting> {
    // The method, two bytes for the version, then a table.
    let properties = payload.strip_prefix(&START)?.get(2..)?;
    let (properties, _) = sized(properties)?;
    let mut rest = properties;
    let mut greeting = Greeting::default();
    while let Some((&name_bytes, after)) = rest.split_first() {
        let (name, after) = after.split_at_checked(usize::from(name_bytes))?;
        let (kind, after) = after.split_first()?;
        // Texts and tables are all there is, and both begin with their size.
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

/// Takes what is preceded by its size in four bytes.
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
    fn a_broker_tells_its_version() {
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
        fn no_greeting_makes_it_panic(properties: Vec<u8>) {
            greeting(&properties);
            greeting(&start(&properties));
        }
    }
}
