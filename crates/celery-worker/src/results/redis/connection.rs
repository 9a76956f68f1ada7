//! The connection to Redis: one, shared by all, made when it is needed and anew when it broke.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ErrorKind, RedisError, RedisResult, ServerErrorKind};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::super::ResultError;
use super::super::breaker::CircuitBreaker;
use super::address::{Opened, RedisUrl};

/// Time for one answer, and for one attempt to connect.
const WITHIN: Duration = Duration::from_secs(5);

/// A connection that mends itself. Each command is tried once: a result that could not be stored is
/// repeated by the worker.
pub(in super::super) struct RedisConnection {
    place: String,
    breaker: CircuitBreaker,
    state: Mutex<ConnectionState>,
}

struct ConnectionState {
    opened: Opened,
    held: Option<MultiplexedConnection>,
    /// How often a connection was made: who finds one broken says which one it was.
    generation: u64,
}

impl RedisConnection {
    pub(super) fn new(address: &RedisUrl) -> Result<Self, ResultError> {
        Ok(Self {
            place: address.place(),
            breaker: CircuitBreaker::new(address.place()),
            state: Mutex::new(ConnectionState {
                opened: address.open()?,
                held: None,
                generation: 0,
            }),
        })
    }

    /// Where Redis is, without password.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Does something with the connection.
    ///
    /// # Errors
    /// [`ResultError::Unreachable`], or [`ResultError::Refused`] where there is an answer.
    pub(in super::super) async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&mut MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, ResultError> {
        self.breaker
            .pass(async {
                let (mut connection, generation) = self.connection().await?;
                match work(&mut connection).await {
                    Ok(done) => Ok(done),
                    Err(error) if is_lost(&error) => {
                        self.drop_connection(generation).await;
                        Err(ResultError::unreachable(&self.place, error))
                    }
                    Err(error) => Err(ResultError::refused(&self.place, error)),
                }
            })
            .await
    }

    /// The connection there is, or a new one. Those who come in the meantime wait for it.
    async fn connection(&self) -> Result<(MultiplexedConnection, u64), ResultError> {
        let mut state = self.state.lock().await;
        if let Some(held) = &state.held {
            return Ok((held.clone(), state.generation));
        }
        let made = timeout(WITHIN, state.opened.connect())
            .await
            .map_err(|_| ResultError::unreachable(&self.place, "no answer in time"))?
            // Whatever it is, wrong password included: an operator mends it, and it may be soon.
            .map_err(|error| ResultError::unreachable(&self.place, error))?;
        state.held = Some(made.clone());
        state.generation += 1;
        Ok((made, state.generation))
    }

    async fn drop_connection(&self, generation: u64) {
        let mut state = self.state.lock().await;
        if state.generation == generation {
            state.held = None;
        }
    }
}

impl Opened {
    async fn connect(&mut self) -> RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(WITHIN))
            .set_response_timeout(Some(WITHIN));
        match self {
            Self::Server(client) => {
                client
                    .get_multiplexed_async_connection_with_config(&config)
                    .await
            }
            Self::Sentinels(client) => client.get_async_connection_with_config(&config).await,
        }
    }
}

/// Whether the connection is of no more use, or leads to a server that cannot do its work now: one
/// that still loads, or that a fail-over made a replica. A new connection may lead to another one.
fn is_lost(error: &RedisError) -> bool {
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
