//! `rpc://`: results as messages to the caller's reply queue.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{Expires, ResultAccess, ResultBackend, ResultError};
use crate::broker::{Broker, MAX_NAME_BYTES, Publication};
use crate::offload::{is_large, offload};
use celery_protocol::content::Serializer;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::ResultMeta;
use celery_protocol::{Properties, RawMessage};

/// Time limit of one attempt to send.
const WITHIN: Duration = Duration::from_secs(10);

/// Sends results through the broker. The reply queue belongs to the caller: it is not declared here, and if it does not
/// exist, the broker drops the result, as for a Python worker.
pub struct Rpc {
    broker: Arc<dyn Broker>,
    serializer: Serializer,
    persistent: bool,
    /// Lifetime of an unread queue of results; `None` for ever.
    lifetime: Option<Duration>,
}

impl Rpc {
    /// Creates a backend that uses the worker's broker.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>) -> Self {
        Self {
            broker,
            serializer: Serializer::default(),
            persistent: false,
            lifetime: lifetime(Expires::default()),
        }
    }

    /// Sets the serializer of results.
    #[must_use]
    pub fn serializer(self, serializer: Serializer) -> Self {
        Self { serializer, ..self }
    }

    /// If true, results survive a restart of the broker, if their queue does.
    #[must_use]
    pub fn persistent(self, persistent: bool) -> Self {
        Self { persistent, ..self }
    }

    /// Sets the time after which unread results may be deleted, if the broker does not delete them with their caller.
    #[must_use]
    pub fn expires(self, expires: Expires) -> Self {
        Self {
            lifetime: lifetime(expires),
            ..self
        }
    }
}

fn lifetime(expires: Expires) -> Option<Duration> {
    (expires.results > 0).then(|| Duration::from_secs(expires.results))
}

#[async_trait]
impl ResultBackend for Rpc {
    fn access(&self) -> ResultAccess {
        ResultAccess::Replies
    }

    async fn store(&self, meta: &ResultMeta, message: &TaskMessage) -> Result<(), ResultError> {
        let Some(reply_to) = message.reply_to.as_ref().filter(|queue| !queue.is_empty()) else {
            return Ok(());
        };
        // Only a message that was made by hand has such values; no broker would accept the result.
        if reply_to.len() > MAX_NAME_BYTES || message.correlation_id.len() > MAX_NAME_BYTES {
            tracing::warn!(
                task_id = meta.task_id,
                "the task's reply_to or correlation_id is longer than 255 bytes; its result is dropped"
            );
            return Ok(());
        }
        let encoding = || self.serializer.write(&meta.to_json());
        let body = offload(is_large(meta.values()), encoding);
        let publication = Publication {
            exchange: String::new(),
            routing_key: reply_to.clone(),
            message: RawMessage {
                properties: Properties {
                    content_type: Some(self.serializer.content_type().into()),
                    content_encoding: Some(self.serializer.content_encoding().into()),
                    correlation_id: Some(message.correlation_id.clone()),
                    priority: Some(0),
                    persistent: self.persistent,
                    ..Properties::default()
                },
                body,
                ..RawMessage::default()
            },
            declare: None,
            mandatory: false,
            queue_lifetime: self.lifetime,
        };
        Ok(self
            .broker
            .publish_until_confirmed(&publication, WITHIN)
            .await?)
    }

    async fn probe(&self) -> Result<String, ResultError> {
        Ok("results are sent to the callers through the broker".into())
    }
}
