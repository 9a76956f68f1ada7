//! The connection to Redis: shared by all users, opened on demand, and replaced after a failure.

use std::time::Duration;

use redis::RedisResult;
use redis::aio::MultiplexedConnection;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::super::ResultError;
use super::super::breaker::CircuitBreaker;
use crate::redis::{Opened, RedisUrl, connection_config, first_failure, is_lost};

/// Time limit of one response and of one connection attempt.
const WITHIN: Duration = Duration::from_secs(5);

/// A connection that is restored after a failure. Each command is sent once; the worker itself repeats the storing of a
/// result.
pub(in super::super) struct RedisConnection {
    place: String,
    breaker: CircuitBreaker,
    state: Mutex<ConnectionState>,
}

struct ConnectionState {
    opened: Opened,
    held: Option<MultiplexedConnection>,
    /// Number of connections so far. A user that finds a broken connection reports its number.
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

    /// Location of the server, without password.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Runs commands on the connection.
    ///
    /// # Errors
    /// [`ResultError::Unreachable`], or [`ResultError::Refused`] if the server answered with an error.
    pub(in super::super) async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&mut MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, ResultError> {
        self.breaker
            .pass(async {
                let (mut connection, generation) = self.connection().await?;
                match work(&mut connection).await.map_err(first_failure) {
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

    /// Returns the current connection or opens one. Concurrent callers wait for it.
    async fn connection(&self) -> Result<(MultiplexedConnection, u64), ResultError> {
        let mut state = self.state.lock().await;
        if let Some(held) = &state.held {
            return Ok((held.clone(), state.generation));
        }
        let config = connection_config(WITHIN, WITHIN);
        let made = timeout(WITHIN, state.opened.connect(&config))
            .await
            .map_err(|_| ResultError::unreachable(&self.place, "no answer in time"))?
            // Every error counts as unreachable, also a wrong password: an operator may correct it soon.
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
