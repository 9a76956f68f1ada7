#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

use chrono::{DateTime, SecondsFormat, Utc};

pub mod arguments;
pub mod canvas;
pub mod compression;
pub mod content;
pub mod envelope;
pub mod event;
pub mod exception;
pub mod glob;
mod headers;
mod json;
pub mod message;
mod msgpack;
pub mod pidbox;
pub mod repr;
pub mod result;
pub mod retry;
mod time;
pub mod virtual_message;
pub mod weight;
mod yaml;

pub use headers::Headers;

/// A message as any transport carries it: headers, properties and an encoded body.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawMessage {
    /// Application headers. AMQP values that JSON cannot represent are in kombu's envelopes, see [`envelope`], so that
    /// a header is sent again as it was received.
    pub headers: Headers,
    /// The properties that Celery uses.
    pub properties: Properties,
    /// The encoded body as it was received.
    pub body: Vec<u8>,
}

/// The message properties that Celery reads or writes, and those that a producer can set for a task to read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    /// MIME type of the serializer.
    pub content_type: Option<String>,
    /// Character set of the body; `binary` for binary serializers.
    pub content_encoding: Option<String>,
    /// The task's id, by which an `rpc://` client identifies its result.
    pub correlation_id: Option<String>,
    /// Queue that an `rpc://` client reads its results from.
    pub reply_to: Option<String>,
    /// Message priority, 0 to 255.
    pub priority: Option<u8>,
    /// Time to live in milliseconds, as text.
    pub expiration: Option<String>,
    /// True if the broker writes the message to disk (`delivery_mode` 2).
    pub persistent: bool,
    /// Program that sent the message, if it says so.
    pub app_id: Option<String>,
    /// Id of the message, if it has one.
    pub message_id: Option<String>,
    /// Type of the message, if it has one.
    pub message_type: Option<String>,
}

/// Python's `datetime.isoformat()` of an aware UTC time: microseconds and `+00:00`.
pub fn isoformat(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, false)
}
