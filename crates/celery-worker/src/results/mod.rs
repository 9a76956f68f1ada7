//! Result backends: storage for the states and results of tasks.
//!
//! All backends follow these rules, even with concurrent writers: nothing replaces a SUCCESS, and a custom state such
//! as PROGRESS replaces no final state.

use std::error::Error;
use std::sync::Arc;

use async_trait::async_trait;
use secrecy::ExposeSecret as _;
use serde_json::Value;

use crate::broker::{Broker, BrokerError};
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{NotReadable, ResultMeta};

#[cfg(any(feature = "redis", feature = "database"))]
mod breaker;
pub mod chord;
#[cfg(feature = "database")]
mod database;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod options;
mod reader;
#[cfg(feature = "redis")]
mod redis;
mod rpc;

#[cfg(feature = "database")]
pub use self::database::Database;
pub use self::options::{
    DatabaseOptions, Expires, RedisOptions, RedisTls, ResultOptions, TableName,
};
pub use self::reader::{ReadError, ResultReader};
#[cfg(feature = "redis")]
pub use self::redis::Redis;
pub use self::rpc::Rpc;
pub use celery_protocol::content::Serializer;

/// An id that belongs to no task, for test queries.
const NOBODYS_TASK: &str = "00000000-0000-0000-0000-000000000000";

/// Stores results. Every method makes one attempt, may be repeated, and is cancel-safe. While a backend cannot be
/// reached, calls take longer, because they try it one at a time.
#[async_trait]
pub trait ResultBackend: Send + Sync {
    /// Stores a state of a task, unless the stored state must be kept. `message` names the receiver of the result. The
    /// call may be repeated.
    async fn store(&self, meta: &ResultMeta, message: &TaskMessage) -> Result<(), ResultError>;

    /// Returns the stored mapping of [`celery_protocol::result`]. `None` if nothing is stored, or if this backend does
    /// not keep results.
    async fn get(&self, _task_id: &str) -> Result<Option<Value>, ResultError> {
        Ok(None)
    }

    /// Checks that the backend answers, without writing anything. A backend that does not keep results always answers.
    ///
    /// # Errors
    /// The reason why the backend does not answer.
    async fn answers(&self) -> Result<(), ResultError> {
        self.get(NOBODYS_TASK).await.map(drop)
    }

    /// Deletes the stored result of a task. A missing result is not an error.
    ///
    /// # Errors
    /// The backend reported an error.
    async fn forget(&self, _task_id: &str) -> Result<(), ResultError> {
        Ok(())
    }

    /// Method by which clients get results from this backend.
    fn access(&self) -> ResultAccess {
        ResultAccess::Stored
    }

    /// Deletes results older than `result_expires` in a backend that does not expire them itself. Returns the number of
    /// deleted results.
    async fn cleanup(&self) -> Result<u64, ResultError> {
        Ok(0)
    }

    /// Checks that results can be stored: writes and deletes a key of its own, or reads the structure of the tables.
    /// Returns a description of the findings.
    async fn probe(&self) -> Result<String, ResultError>;

    /// Support for chords.
    fn chords(&self) -> ChordSupport {
        ChordSupport::None
    }
}

/// Method by which clients get results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResultAccess {
    /// Results are stored, and every client can read them.
    Stored,
    /// Results are messages to the queue in `reply_to`, which belongs to the client.
    Replies,
    /// Results are discarded.
    Discarded,
}

/// Support of a backend for chords.
#[derive(Clone)]
#[non_exhaustive]
pub enum ChordSupport {
    /// Chords are not supported.
    None,
    /// The parts are counted when they end.
    Counted(Arc<dyn chord::ChordCounter>),
    /// A task polls the results of the parts: `celery.chord_unlock`.
    Polled,
}

type Cause = Box<dyn Error + Send + Sync>;

/// Reason why a result could not be stored or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultError {
    /// The URL names no known backend.
    #[error(
        "result backend `{0}` is not supported; known are rpc://, redis://, rediss://, \
         redis+socket://, sentinel://, db+postgresql:// and db+sqlite:///"
    )]
    Unsupported(String),
    /// The backend was not compiled in.
    #[error("this result backend needs the feature `{0}` of the crate celery-worker")]
    Feature(&'static str),
    /// The URL is wrong. It is not shown, because it may contain a password.
    #[error("the URL cannot be used: {0}")]
    Url(String),
    /// The backend does not answer.
    #[error("the result backend {place} cannot be reached")]
    Unreachable {
        /// Location of the backend, without password.
        place: String,
        /// Cause of the failure.
        source: Cause,
    },
    /// The backend rejected the request.
    #[error("the result backend {place} refused the request")]
    Refused {
        /// Location of the backend, without password.
        place: String,
        /// Reason for the rejection.
        source: Cause,
    },
    /// The stored value is not a valid result.
    #[error("the stored result of task {task_id} cannot be read")]
    Unreadable {
        /// Id of the task.
        task_id: String,
        /// Reason why the value is not readable.
        source: NotReadable,
    },
    /// The broker did not accept the message with the result.
    #[error("result backend rpc")]
    Rpc(#[from] BrokerError),
}

impl ResultError {
    #[cfg(any(feature = "redis", feature = "database", feature = "fault-injection"))]
    fn unreachable(place: &str, source: impl Into<Cause>) -> Self {
        Self::Unreachable {
            place: place.to_owned(),
            source: source.into(),
        }
    }

    /// Returns true for a permanent error: the stored value is not a valid result, the Redis key contains a value of
    /// another type, or the database cannot hold these values.
    #[must_use]
    pub fn is_hopeless(&self) -> bool {
        let source = match self {
            Self::Unreadable { .. } => return true,
            Self::Refused { source, .. } => source,
            _ => return false,
        };
        #[cfg(feature = "redis")]
        if let Some(error) = source.downcast_ref::<::redis::RedisError>() {
            return error.code() == Some("WRONGTYPE");
        }
        #[cfg(feature = "database")]
        if let Some(error) = source.downcast_ref::<sea_orm::DbErr>() {
            use service_connection::sql::{ErrorClass, classify};
            return classify(error) == ErrorClass::Value;
        }
        let _ = source;
        false
    }

    #[cfg(any(feature = "redis", feature = "database"))]
    fn refused(place: &str, source: impl Into<Cause>) -> Self {
        Self::Refused {
            place: place.to_owned(),
            source: source.into(),
        }
    }
}

/// Backend without results.
#[derive(Debug, Clone, Copy)]
pub struct Disabled;

#[async_trait]
impl ResultBackend for Disabled {
    async fn store(&self, _meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        Ok(())
    }

    async fn probe(&self) -> Result<String, ResultError> {
        Ok("results are not stored".into())
    }

    fn access(&self) -> ResultAccess {
        ResultAccess::Discarded
    }
}

/// Creates the backend that the options name, without a connection. Must be called in a tokio runtime.
///
/// # Errors
/// [`ResultError::Unsupported`], [`ResultError::Url`].
pub fn open(
    options: &ResultOptions,
    broker: Arc<dyn Broker>,
) -> Result<Arc<dyn ResultBackend>, ResultError> {
    let url = options.url.expose_secret();
    Ok(match Kind::of(url)? {
        Kind::Disabled => Arc::new(Disabled),
        Kind::Rpc => Arc::new(
            Rpc::new(broker)
                .serializer(options.serializer)
                .persistent(options.persistent)
                .expires(options.expires),
        ),
        #[cfg(feature = "redis")]
        Kind::Redis => Arc::new(Redis::new(url, options)?),
        #[cfg(feature = "database")]
        Kind::Database => Arc::new(Database::new(url, options)?),
        #[cfg(any(test, feature = "testing"))]
        Kind::Memory => Arc::new(memory::MemoryResults::named(url)),
    })
}

/// Checks that the options name a known backend with a usable URL.
///
/// # Errors
/// An explanation that does not contain the URL.
pub fn check_url(options: &ResultOptions) -> Result<(), String> {
    let url = options.url.expose_secret();
    let checked = Kind::of(url).and_then(|kind| match kind {
        Kind::Disabled | Kind::Rpc => Ok(()),
        #[cfg(feature = "redis")]
        Kind::Redis => redis::check(url, options),
        #[cfg(feature = "database")]
        Kind::Database => database::check(url),
        #[cfg(any(test, feature = "testing"))]
        Kind::Memory => Ok(()),
    });
    checked.map_err(|error| match error {
        ResultError::Url(why) => why,
        error => error.to_string(),
    })
}

/// Creates a client for a Redis server that is not a result backend.
///
/// # Errors
/// [`ResultError::Url`].
#[cfg(feature = "redis")]
pub fn redis_client(url: &str) -> Result<::redis::Client, ResultError> {
    redis::client(url)
}

/// Kinds of backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Disabled,
    Rpc,
    #[cfg(feature = "redis")]
    Redis,
    #[cfg(feature = "database")]
    Database,
    #[cfg(any(test, feature = "testing"))]
    Memory,
}

impl Kind {
    #[cfg(feature = "redis")]
    fn redis() -> Result<Self, ResultError> {
        Ok(Self::Redis)
    }

    #[cfg(not(feature = "redis"))]
    fn redis() -> Result<Self, ResultError> {
        Err(ResultError::Feature("redis"))
    }

    #[cfg(feature = "database")]
    fn database() -> Result<Self, ResultError> {
        Ok(Self::Database)
    }

    #[cfg(not(feature = "database"))]
    fn database() -> Result<Self, ResultError> {
        Err(ResultError::Feature("database"))
    }

    /// The kind for the URL's scheme; Celery also accepts the bare word `rpc`.
    fn of(url: &str) -> Result<Self, ResultError> {
        let scheme = url.split_once("://").map_or(url, |(scheme, _)| scheme);
        match scheme {
            "" | "disabled" => Ok(Self::Disabled),
            "rpc" => Ok(Self::Rpc),
            "redis" | "rediss" | "sentinel" | "socket" => Self::redis(),
            _ if scheme.starts_with("redis+") => Self::redis(),
            _ if scheme.starts_with("db+") || scheme.starts_with("database+") => Self::database(),
            #[cfg(any(test, feature = "testing"))]
            "memory" => Ok(Self::Memory),
            // Text without a scheme may be anything, also a password.
            _ if url.contains("://") => Err(ResultError::Unsupported(scheme.to_owned())),
            _ => Err(ResultError::Url("it has no scheme".into())),
        }
    }
}

#[cfg(feature = "fault-injection")]
impl From<crate::fault_injection::AnswerLost> for ResultError {
    fn from(lost: crate::fault_injection::AnswerLost) -> Self {
        Self::unreachable("nowhere", lost)
    }
}
