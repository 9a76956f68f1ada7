//! Result backends: where a task's state and result go.

use std::sync::Arc;

use async_trait::async_trait;

use crate::broker::{BrokerError, Transport};
use crate::wire::message::TaskMessage;
use crate::wire::result::ResultMeta;

pub mod chord;
mod reader;
mod redis;
mod rpc;

pub use self::reader::{ReadError, ResultReader};
pub use self::redis::Redis;
pub use self::rpc::Rpc;

/// Stores results.
#[async_trait]
pub trait ResultBackend: Send + Sync {
    /// Stores one state of a task; `message` says who wants it. Repeating it does no harm.
    async fn store(&self, meta: &ResultMeta, message: &TaskMessage) -> Result<(), ResultError>;
    /// How chords are done.
    fn chords(&self) -> ChordSupport {
        ChordSupport::None
    }

    /// Deletes results that are too old, where the backend does not do so by itself.
    ///
    /// # Errors
    /// [`ResultError`].
    async fn cleanup(&self) -> Result<(), ResultError> {
        Ok(())
    }

    /// SHIM
    async fn get(&self, _id: &str) -> Result<Option<serde_json::Value>, ResultError> {
        Ok(None)
    }
}

/// How chords are done with a backend.
#[derive(Clone)]
pub enum ChordSupport {
    /// Not at all.
    None,
    /// Their parts are counted as they return.
    Counted(chord::Chords),
    /// Somebody looks at the results of the parts every so often: `celery.chord_unlock`.
    Polled,
}

/// Why a result could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// The URL names no backend that there is.
    #[error("result backend `{0}` is not supported; use `rpc://` or `redis://host:port/db`")]
    Unsupported(String),
    /// Redis did not take it.
    #[error("result backend redis")]
    Redis(#[from] ::redis::RedisError),
    /// The broker did not take it.
    #[error("result backend rpc")]
    Rpc(#[from] BrokerError),
}

/// No results at all.
#[derive(Debug, Clone, Copy)]
pub struct Disabled;

#[async_trait]
impl ResultBackend for Disabled {
    async fn store(&self, _meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        Ok(())
    }
}

/// The backend that `url` names; opens no connection yet.
///
/// # Errors
/// [`ResultError::Unsupported`], or what is wrong with a Redis URL.
pub fn open(
    url: &str,
    expires_seconds: u64,
    transport: Arc<dyn Transport>,
) -> Result<Arc<dyn ResultBackend>, ResultError> {
    match scheme(url) {
        "" => Ok(Arc::new(Disabled)),
        "rpc" => Ok(Arc::new(Rpc::new(transport))),
        "redis" | "rediss" => Ok(Arc::new(Redis::new(url, expires_seconds)?)),
        other => Err(ResultError::Unsupported(other.to_owned())),
    }
}

/// A URL's scheme; Celery also takes the bare word `rpc`.
fn scheme(url: &str) -> &str {
    url.split_once("://").map_or(url, |(scheme, _)| scheme)
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for ResultError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        let cause = std::io::Error::other(lost);
        Self::Redis(cause.into())
    }
}
