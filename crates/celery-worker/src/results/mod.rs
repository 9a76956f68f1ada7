//! Result backends: where a task's state and result go.
//!
//! All of them keep these rules, whoever else writes at the same time: nothing replaces a SUCCESS,
//! and news about the progress of a task replaces no final state.

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

/// An id that no task has, to ask for.
const NOBODYS_TASK: &str = "00000000-0000-0000-0000-000000000000";

/// Stores results. Every method tries once and may be repeated, and may be dropped while it waits.
/// While a backend is away, calls take longer: they wait their turn.
#[async_trait]
pub trait ResultBackend: Send + Sync {
    /// Stores one state of a task, unless one is stored that has to stay; `message` says who wants
    /// it. Repeating it does no harm.
    async fn store(&self, meta: &ResultMeta, message: &TaskMessage) -> Result<(), ResultError>;

    /// What is stored: the mapping of [`celery_protocol::result`]. `None` if nothing is, or if this
    /// backend keeps nothing that could be read again.
    async fn get(&self, _task_id: &str) -> Result<Option<Value>, ResultError> {
        Ok(None)
    }

    /// Whether the backend answers, without writing anything. One that keeps nothing always does.
    ///
    /// # Errors
    /// Why not.
    async fn answers(&self) -> Result<(), ResultError> {
        self.get(NOBODYS_TASK).await.map(drop)
    }

    /// Deletes the result of a task, where it is kept. One that is not there is no error.
    ///
    /// # Errors
    /// The backend's.
    async fn forget(&self, _task_id: &str) -> Result<(), ResultError> {
        Ok(())
    }

    /// The way in which clients get results from this backend.
    fn access(&self) -> ResultAccess {
        ResultAccess::Stored
    }

    /// Deletes what is older than `result_expires`, where it does not vanish by itself; how many
    /// results that were.
    async fn cleanup(&self) -> Result<u64, ResultError> {
        Ok(0)
    }

    /// Tries whether results can be stored, with a key of our own that is gone afterwards, or by
    /// looking at the tables. In words, what was found.
    async fn probe(&self) -> Result<String, ResultError>;

    /// How chords are done.
    fn chords(&self) -> ChordSupport {
        ChordSupport::None
    }
}

/// The way in which clients get results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultAccess {
    /// They are kept, and can be read by everybody.
    Stored,
    /// They are messages to the queue in `reply_to`, which is the client's.
    Replies,
    /// They are not kept.
    Discarded,
}

/// How chords are done with a backend.
#[derive(Clone)]
pub enum ChordSupport {
    /// Not at all.
    None,
    /// Their parts are counted as they return.
    Counted(Arc<dyn chord::ChordCounter>),
    /// Somebody looks at the results of the parts every so often: `celery.chord_unlock`.
    Polled,
}

type Cause = Box<dyn Error + Send + Sync>;

/// Why a result could not be stored or read.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// The URL names no backend that there is.
    #[error(
        "result backend `{0}` is not supported; there are rpc://, redis://, rediss://, \
         redis+socket://, sentinel://, db+postgresql:// and db+sqlite:///"
    )]
    Unsupported(String),
    /// The backend was not compiled in.
    #[error("this result backend needs the feature `{0}` of the crate celery-worker")]
    Feature(&'static str),
    /// There is something wrong with the URL, which is not shown: it may hold a password.
    #[error("the URL cannot be used: {0}")]
    Url(String),
    /// There is no answer.
    #[error("the result backend {place} cannot be reached")]
    Unreachable {
        /// Where it should be, without password.
        place: String,
        /// Why.
        source: Cause,
    },
    /// The answer is no.
    #[error("the result backend {place} refuses")]
    Refused {
        /// Which one, without password.
        place: String,
        /// Why.
        source: Cause,
    },
    /// Somebody stored something that is no result.
    #[error("what is stored for the task {task_id} cannot be read")]
    Unreadable {
        /// The task.
        task_id: String,
        /// Why.
        source: NotReadable,
    },
    /// The broker did not take it.
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

    /// Returns true for an error that lasts: Redis holds something else under the key, or the database has no
    /// room for these values.
    #[must_use]
    pub fn is_hopeless(&self) -> bool {
        let Self::Refused { source, .. } = self else {
            return false;
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

/// No results at all.
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

/// The backend that the options name; opens no connection yet. To be called in a tokio runtime.
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
        Kind::Rpc => Arc::new(Rpc::new(broker, options.persistent)),
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

/// A client for a Redis server that is no result backend.
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

    /// By the URL's scheme; Celery also takes the bare word `rpc`.
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
            // What is no scheme may be anything, a password too.
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
