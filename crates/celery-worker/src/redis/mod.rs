//! Connections to Redis, for results and for the broker: URLs, TLS, and errors that end a connection.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, RedisError, RedisResult, ServerErrorKind};
use secrecy::SecretString;

mod address;

pub(crate) use address::{AddressOptions, Opened, RedisUrl, RedisUrlError};

/// Login at sentinels (`sentinel_kwargs`); empty texts for none.
#[derive(Debug, Clone, Default)]
pub(crate) struct SentinelLogin {
    /// User.
    pub username: String,
    /// Password.
    pub password: SecretString,
}

impl Opened {
    /// Connects to the server, or to the one that the sentinels report.
    pub(crate) async fn connect(
        &mut self,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        match self {
            Self::Server(client) => {
                client
                    .get_multiplexed_async_connection_with_config(config)
                    .await
            }
            Self::Sentinels(client) => client.get_async_connection_with_config(config).await,
        }
    }
}

/// The configuration of a connection with these time limits of one attempt to connect and of one response.
pub(crate) fn connection_config(connect: Duration, response: Duration) -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(connect))
        .set_response_timeout(Some(response))
}

/// The error of the first command that failed, for the error of a pipeline or a transaction, which has another code.
pub(crate) fn first_failure(error: RedisError) -> RedisError {
    let failures = error.clone().into_server_errors();
    match failures.as_deref().and_then(<[_]>::first) {
        Some((_, failure)) => failure.clone().into(),
        None => error,
    }
}

/// Returns true if the connection is unusable, or if its server cannot work at present: it is still loading, or became
/// a replica at a fail-over. A new connection may reach another server.
pub(crate) fn is_lost(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || matches!(
            error.kind(),
            ErrorKind::Io
                | ErrorKind::Server(
                    ServerErrorKind::BusyLoading
                        | ServerErrorKind::ReadOnly
                        | ServerErrorKind::MasterDown
                        | ServerErrorKind::TryAgain
                )
        )
}
