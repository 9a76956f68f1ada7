//! The body of a message: its limits, its compression and its serializer.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::RawMessage;
use super::message::Reason;
use super::{compression, json, msgpack, yaml};

/// MIME type of JSON.
pub const JSON: &str = "application/json";

/// Format for values in a message body or in a result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serializer {
    /// `application/json`, in Python's dialect.
    #[default]
    Json,
    /// `application/x-msgpack`.
    Msgpack,
    /// `application/x-yaml`, in PyYAML's dialect.
    Yaml,
}

impl Serializer {
    /// All serializers.
    pub const ALL: [Self; 3] = [Self::Json, Self::Msgpack, Self::Yaml];

    /// MIME type of the serializer.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::Msgpack => "application/x-msgpack",
            Self::Yaml => "application/x-yaml",
        }
    }

    /// Kombu's name of the serializer.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Msgpack => "msgpack",
            Self::Yaml => "yaml",
        }
    }

    /// Kombu's content encoding of the serializer.
    #[must_use]
    pub fn content_encoding(self) -> &'static str {
        match self {
            Self::Json | Self::Yaml => "utf-8",
            Self::Msgpack => "binary",
        }
    }

    /// Writes a value. Kombu's envelopes are left to JSON; the other serializers have own forms for their content, or
    /// get it as text. In msgpack, an integer of more than 64 bits becomes text.
    #[must_use]
    pub fn write(self, value: &Value) -> Vec<u8> {
        match self {
            Self::Json => value.to_string().into_bytes(),
            Self::Msgpack => msgpack::write(value),
            Self::Yaml => yaml::write(value).into_bytes(),
        }
    }

    /// Reads a value; the aliases of YAML may copy `limit` bytes.
    ///
    /// # Errors
    /// The text says what is wrong with the bytes.
    pub(super) fn read(self, bytes: &[u8], limit: usize) -> Result<Value, String> {
        let text = || std::str::from_utf8(bytes).map_err(|e| e.to_string());
        match self {
            Self::Json => json::read(text()?).map_err(|e| e.to_string()),
            Self::Msgpack => msgpack::read(bytes).map_err(|e| e.to_string()),
            Self::Yaml => yaml::read(text()?, limit).map_err(|e| e.to_string()),
        }
    }

    /// The serializer with this MIME type. Pickle is not supported, because it executes code from the message.
    pub(super) fn of(content_type: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|serializer| serializer.content_type() == content_type)
    }
}

/// Accepted message bodies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// Accepted serializers.
    pub serializers: Vec<Serializer>,
    /// Maximum size of a body in bytes, before and after decompression.
    pub max_body_bytes: usize,
}

impl Accept {
    /// Accepts the serializers with these names or MIME types (`accept_content`), except for unknown ones, and bodies
    /// of up to `max_body_bytes` bytes.
    #[must_use]
    pub fn new(names: &[String], max_body_bytes: usize) -> Self {
        let is_named = |s: &Serializer| {
            let names_it = |name: &String| name == s.name() || name == s.content_type();
            names.iter().any(names_it)
        };
        Self {
            serializers: Serializer::ALL.into_iter().filter(is_named).collect(),
            max_body_bytes,
        }
    }

    /// Accepts only JSON, of up to `max_body_bytes` bytes.
    #[must_use]
    pub fn json(max_body_bytes: usize) -> Self {
        Self {
            serializers: vec![Serializer::Json],
            max_body_bytes,
        }
    }
}

/// Returns a body without its compression.
///
/// # Errors
/// [`Reason::TooLarge`], [`Reason::Inflated`], [`Reason::Compression`].
pub(super) fn decompress_body<'a>(
    raw: &'a RawMessage,
    accept: &Accept,
) -> Result<std::borrow::Cow<'a, [u8]>, Reason> {
    let limit = accept.max_body_bytes;
    if raw.body.len() > limit {
        return Err(Reason::TooLarge {
            size: raw.body.len(),
            limit,
        });
    }
    compression::undo(&raw.body, raw.headers.get("compression"), limit)
}

/// Returns the value in an uncompressed body. Kombu's envelopes are checked and left unchanged.
///
/// The content encoding is ignored: JSON and YAML are UTF-8 in any case.
///
/// # Errors
/// [`Reason::ContentType`], [`Reason::Body`]; [`Reason::Malformed`] if Python would get a text or bytes instead of a
/// task, and fail with it.
pub(super) fn value(raw: &RawMessage, body: &[u8], accept: &Accept) -> Result<Value, Reason> {
    let content_type = raw.properties.content_type.as_deref().unwrap_or_default();
    let serializer = match content_type {
        "" | "application/data" | "application/text" => {
            return Err(Reason::Malformed("body is text or bytes, not a task"));
        }
        other => Serializer::of(other)
            .filter(|serializer| accept.serializers.contains(serializer))
            .ok_or_else(|| Reason::ContentType(other.to_owned()))?,
    };
    if body.is_empty() {
        return Err(Reason::Malformed("body is empty"));
    }
    serializer
        .read(body, accept.max_body_bytes)
        .map_err(Reason::Body)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::{Properties, envelope, repr};

    /// The deepest accepted body needs less than half of a thread's stack, even in an unoptimised build.
    #[test]
    fn the_deepest_bodies_fit_the_stack() {
        let depth = json::MAX_DEPTH;
        let text = "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth);
        let lists = [vec![0x91; depth], vec![0xc0]].concat();
        let flow = "[".repeat(depth) + &"]".repeat(depth);
        for (serializer, body) in [
            (Serializer::Json, text.into_bytes()),
            (Serializer::Msgpack, lists),
            (Serializer::Yaml, flow.into_bytes()),
        ] {
            let walk = move || {
                let content_type = Some(serializer.content_type().to_owned());
                let properties = Properties {
                    content_type,
                    ..Properties::default()
                };
                let raw = RawMessage {
                    properties,
                    ..RawMessage::default()
                };
                let accept = Accept::new(&["json", "msgpack", "yaml"].map(str::to_owned), 10_000);
                let value = value(&raw, &body, &accept).unwrap();
                let written = serializer.write(&value);
                assert_eq!(serializer.read(&written, 10_000), Ok(value.clone()));
                assert!(!envelope::is_in(&value));
                let plain = envelope::plain(value.clone());
                assert_eq!(plain, value);
                (repr::value(&plain).len(), plain.to_string().len())
            };
            let small = std::thread::Builder::new().stack_size(1 << 20);
            small.spawn(walk).unwrap().join().unwrap();
        }
    }
}
