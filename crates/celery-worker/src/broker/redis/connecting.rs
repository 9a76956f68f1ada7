//! Opening connections to the server in use, and errors in the terms of the trait.

use std::sync::{Arc, Once};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    Cmd, ErrorKind, FromRedisValue as _, PushInfo, PushKind, RedisError, RedisResult, Role,
    ServerErrorKind, Value, cmd,
};
use secrecy::ExposeSecret as _;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::options::RedisBrokerOptions;
use super::sentinel_watch;
use crate::broker::BrokerError;
use crate::broker::failover::{BrokerList, Choice, ConnectFailures};
use crate::redis::{
    AddressOptions, RedisUrl, RedisUrlError, connection_config, first_failure, is_lost,
};

/// Maximum number of unread messages that a server sent without a request. Later ones are dropped, as the server
/// itself does for a slow reader.
const PUSHES: usize = 4096;

impl From<RedisUrlError> for BrokerError {
    fn from(error: RedisUrlError) -> Self {
        Self::Url(error.to_string())
    }
}

/// Opens connections to the servers of a URL. All connections of a process are to the same one, because a message is
/// settled where it was taken.
pub(super) struct RedisConnector {
    pub(super) servers: BrokerList<RedisUrl>,
    name: String,
    pub(super) connection_timeout: Duration,
    response_timeout: Duration,
    is_watching: Once,
}

impl RedisConnector {
    pub(super) fn new(options: &RedisBrokerOptions) -> Result<Self, BrokerError> {
        let transport = &options.transport;
        let address = AddressOptions {
            tls: options.tls.clone(),
            master_name: transport.master_name.clone(),
            sentinel: (&transport.sentinel_kwargs).into(),
        };
        let servers = RedisUrl::parse_list(options.url.expose_secret(), &address)?;
        let servers: Vec<RedisUrl> = servers.into_iter().map(RedisUrl::with_resp3).collect();
        for server in &servers {
            // Certificates that cannot be used are reported at the start.
            server.open()?;
            if server.is_unverified() {
                tracing::warn!(
                    broker = server.place(),
                    "the broker's certificate is not verified; set ssl_cert_reqs=required and ssl_ca_certs"
                );
            }
        }
        let name = match transport.client_name.as_str() {
            "" => options.name.replace(|c: char| !c.is_ascii_graphic(), "-"),
            name => name.to_owned(),
        };
        let connection_timeout = match transport.socket_connect_timeout {
            0 => options.connection_timeout,
            seconds => Duration::from_secs(seconds),
        };
        Ok(Self {
            servers: BrokerList::new(servers, options.failover),
            name,
            connection_timeout,
            response_timeout: transport.response_timeout(),
            is_watching: Once::new(),
        })
    }

    /// Number of the database; kombu takes it from the first URL.
    pub(super) fn db(&self) -> i64 {
        self.servers.all().first().map_or(0, RedisUrl::db)
    }

    /// Location of the server in use, without login.
    pub(super) fn place(&self) -> String {
        let current = self.servers.current();
        current.map_or_else(String::new, RedisUrl::place)
    }

    /// URLs of all servers without their logins, the one in use first.
    pub(super) fn uris(&self) -> Vec<String> {
        self.servers
            .starting_with_current()
            .map(RedisUrl::uri)
            .collect()
    }

    /// Time limit of one attempt to connect to all servers.
    pub(super) fn connecting_timeout(&self) -> Duration {
        self.connection_timeout * self.servers.count()
    }

    pub(super) fn response_timeout(&self) -> Duration {
        self.response_timeout
    }

    /// Opens a connection to the server in use, or to the next one of the list that accepts it. The channel gets what
    /// the server sends without a request.
    ///
    /// # Errors
    /// The error of the server. With several servers, an error after which another attempt can succeed takes
    /// precedence.
    pub(super) async fn connect(self: &Arc<Self>) -> Result<Link, BrokerError> {
        self.is_watching.call_once(|| sentinel_watch::start(self));
        let mut failures = ConnectFailures::default();
        for (choice, server) in self.servers.in_turn() {
            match self.connect_to(server).await {
                Ok((connection, pushes)) => {
                    self.servers.select(choice, &server.place());
                    return Ok(Link {
                        connection,
                        pushes,
                        choice,
                    });
                }
                Err(error) => failures.add(&server.place(), error),
            }
        }
        let failure = failures.into_error();
        Err(failure.unwrap_or_else(|| self.lost("there is no broker")))
    }

    async fn connect_to(
        &self,
        server: &RedisUrl,
    ) -> Result<(MultiplexedConnection, mpsc::Receiver<PushInfo>), BrokerError> {
        let (sender, pushes) = mpsc::channel(PUSHES);
        let push = move |info: PushInfo| {
            // A full channel drops the message.
            let _ = sender.try_send(info);
            Ok::<(), RedisError>(())
        };
        let config =
            connection_config(self.connection_timeout, self.response_timeout).set_push_sender(push);
        let mut opened = server.open()?;
        let connecting = async {
            let connection = opened.connect(&config).await?;
            let role = self.introduce(&connection).await?;
            Ok::<_, RedisError>((connection, role))
        };
        let unreachable =
            |source: Arc<dyn std::error::Error + Send + Sync>| BrokerError::Unreachable {
                broker: server.place(),
                source,
            };
        match timeout(self.connection_timeout, connecting).await {
            Ok(Ok((_, Some(Role::Replica { .. })))) => Err(unreachable(Arc::from(Box::from(
                "it is a read-only replica; the URL must name the master, or sentinels",
            )))),
            Ok(Ok((connection, _))) => Ok((connection, pushes)),
            Ok(Err(error))
                if error.kind() == ErrorKind::AuthenticationFailed || is_login_missing(&error) =>
            {
                Err(BrokerError::Refused {
                    broker: server.place(),
                    what: "the login; check user and password in the broker's URL".into(),
                    source: Arc::new(error),
                })
            }
            Ok(Err(error)) => Err(unreachable(Arc::new(error))),
            Err(_) => Err(unreachable(Arc::from(Box::from(
                "no answer in time (option `connection_timeout`)",
            )))),
        }
    }

    /// Names a new connection, and checks that the server can work. Returns its role, unless an access list forbids the
    /// question.
    async fn introduce(&self, connection: &MultiplexedConnection) -> RedisResult<Option<Role>> {
        let ask = |command: Cmd| {
            let mut connection = connection.clone();
            async move { command.query_async::<Value>(&mut connection).await }
        };
        let set_name = cmd("CLIENT").arg("SETNAME").arg(&self.name).to_owned();
        let (named, pong, role) = tokio::join!(ask(set_name), ask(cmd("PING")), ask(cmd("ROLE")));
        // While it loads its data, the server refuses this command.
        pong?;
        match named {
            Err(error) if !is_lost(&error) => tracing::debug!(%error, "connection has no name"),
            other => drop(other?),
        }
        Ok(role.ok().and_then(|role| Role::from_redis_value(role).ok()))
    }

    /// Waits until another server than the one of a connection has to be used.
    pub(super) async fn left(&self, choice: Choice) {
        self.servers.left(choice).await;
    }

    /// An error that ends a connection.
    pub(super) fn lost(&self, why: &str) -> BrokerError {
        BrokerError::Unreachable {
            broker: self.place(),
            source: Arc::from(Box::from(why)),
        }
    }

    /// An error of a command.
    pub(super) fn error(&self, error: RedisError, what: &str) -> BrokerError {
        let (broker, error) = (self.place(), first_failure(error));
        if is_lost(&error) {
            return BrokerError::Unreachable {
                broker,
                source: Arc::new(error),
            };
        }
        if error.code() == Some("OOM") {
            return BrokerError::Blocked {
                broker,
                reason: "it has no memory left (maxmemory)".into(),
            };
        }
        BrokerError::Refused {
            broker,
            what: what.to_owned(),
            source: Arc::new(error),
        }
    }
}

/// Returns true if the server refuses the login, or asks for one that the connection does not have.
pub(super) fn is_login_missing(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOAUTH" | "WRONGPASS"))
        || error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm)
}

/// Returns true if no repetition helps: a key has another type than kombu's.
pub(super) fn is_hopeless(error: &BrokerError) -> bool {
    let BrokerError::Refused { source, .. } = error else {
        return false;
    };
    let error = source.downcast_ref::<RedisError>();
    error.is_some_and(|error| error.code() == Some("WRONGTYPE"))
}

/// A connection, and what its server sends without a request.
pub(super) struct Link {
    pub(super) connection: MultiplexedConnection,
    pub(super) pushes: mpsc::Receiver<PushInfo>,
    /// Choice of its server.
    pub(super) choice: Choice,
}

impl Link {
    /// Returns the next message without a request; `None` once the connection has ended.
    pub(super) async fn next(&mut self) -> Option<PushInfo> {
        let info = self.pushes.recv().await?;
        (info.kind != PushKind::Disconnection).then_some(info)
    }

    /// Removes the messages that have arrived. Returns false if the connection has ended.
    pub(super) fn drain(&mut self) -> bool {
        loop {
            match self.pushes.try_recv() {
                Ok(info) if info.kind == PushKind::Disconnection => return false,
                Ok(_) => {}
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
    }
}

/// The connection for commands: shared, opened at its first use, and replaced after a failure. A command is sent once.
pub(super) struct Commands {
    pub(super) connector: Arc<RedisConnector>,
    state: Mutex<CommandState>,
}

#[derive(Default)]
struct CommandState {
    open: Option<Link>,
    /// Number of connections so far.
    generation: u64,
}

impl Commands {
    pub(super) fn new(connector: Arc<RedisConnector>) -> Self {
        Self {
            connector,
            state: Mutex::default(),
        }
    }

    /// Runs commands; `what` names them in errors.
    ///
    /// # Errors
    /// [`BrokerError::Unreachable`], after which the next call opens a new connection, [`BrokerError::Blocked`] and
    /// [`BrokerError::Refused`].
    pub(super) async fn run<T>(
        &self,
        what: &str,
        work: impl AsyncFnOnce(&mut MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, BrokerError> {
        let (mut connection, generation) = self.connection().await?;
        match work(&mut connection).await {
            Ok(done) => Ok(done),
            Err(error) => {
                let error = first_failure(error);
                if is_lost(&error) || is_login_missing(&error) {
                    let mut state = self.state.lock().await;
                    if state.generation == generation {
                        state.open = None;
                    }
                }
                Err(self.connector.error(error, what))
            }
        }
    }

    async fn connection(&self) -> Result<(MultiplexedConnection, u64), BrokerError> {
        let mut state = self.state.lock().await;
        if let Some(link) = &state.open
            && link.choice == self.connector.servers.choice()
        {
            return Ok((link.connection.clone(), state.generation));
        }
        let link = self.connector.connect().await?;
        let connection = link.connection.clone();
        state.open = Some(link);
        state.generation += 1;
        Ok((connection, state.generation))
    }

    /// Number of connections so far.
    pub(super) async fn generation(&self) -> u64 {
        self.state.lock().await.generation
    }

    /// Closes the connection.
    pub(super) async fn close(&self) {
        self.state.lock().await.open = None;
    }
}
