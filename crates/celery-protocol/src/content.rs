//! A message's body: its limits, its compression and its serializer.

use serde_json::Value;

use super::RawMessage;
use super::message::Reason;
use super::{compression, json, msgpack, yaml};

/// MIME type of JSON.
pub const JSON: &str = "application/json";

/// A way to write values as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serializer {
    /// `application/json`, in Python's dialect.
    Json,
    /// `application/x-msgpack`.
    Msgpack,
    /// `application/x-yaml`, in PyYAML's dialect.
    Yaml,
}

impl Serializer {
    const ALL: [Self; 3] = [Self::Json, Self::Msgpack, Self::Yaml];

    /// Its MIME type.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::Msgpack => "application/x-msgpack",
            Self::Yaml => "application/x-yaml",
        }
    }

    /// Kombu's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Msgpack => "msgpack",
            Self::Yaml => "yaml",
        }
    }

    /// The serializer of that MIME type. There is none for pickle, which runs whatever code a
    /// message brings along.
    fn of(content_type: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|serializer| serializer.content_type() == content_type)
    }
}

/// What is accepted as a message body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The serializers.
    pub serializers: Vec<Serializer>,
    /// Largest body, in bytes, compressed or not.
    pub max_body_bytes: usize,
}

impl Accept {
    /// Serializers by name or MIME type (`accept_content`), as far as there are such, and the
    /// largest body, in bytes.
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

    /// JSON only, up to so many bytes.
    #[must_use]
    pub fn json(max_body_bytes: usize) -> Self {
        Self {
            serializers: vec![Serializer::Json],
            max_body_bytes,
        }
    }
}

/// A body without its compression.
///
/// # Errors
/// [`Reason::TooLarge`], [`Reason::Inflated`], [`Reason::Compression`].
pub(super) fn inflated<'a>(
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

/// The value that an uncompressed body holds, kombu's envelopes checked and left as they are.
///
/// The content encoding is not looked at: JSON and YAML are UTF-8 in any case.
///
/// # Errors
/// [`Reason::ContentType`], [`Reason::Body`]; [`Reason::Malformed`] where Python would get a text
/// or bytes in the place of a task, and die of it.
pub(super) fn value(raw: &RawMessage, body: &[u8], accept: &Accept) -> Result<Value, Reason> {
    let content_type = raw.properties.content_type.as_deref().unwrap_or_default();
    let serializer = match content_type {
        "" | "application/data" | "application/text" => {
            return Err(Reason::Malformed("body is text or bytes, no task"));
        }
        other => Serializer::of(other)
            .filter(|serializer| accept.serializers.contains(serializer))
            .ok_or_else(|| Reason::ContentType(other.to_owned()))?,
    };
    if body.is_empty() {
        return Err(Reason::Malformed("body is empty"));
    }
    let text = || std::str::from_utf8(body).map_err(|e| Reason::Body(e.to_string()));
    match serializer {
        Serializer::Json => json::read(text()?).map_err(|e| Reason::Body(e.to_string())),
        Serializer::Msgpack => msgpack::read(body).map_err(|e| Reason::Body(e.to_string())),
        Serializer::Yaml => {
            yaml::read(text()?, accept.max_body_bytes).map_err(|e| Reason::Body(e.to_string()))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::{Properties, envelope, repr};

    /// The deepest body that is accepted needs less than half of a thread's stack, even unoptimised.
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
