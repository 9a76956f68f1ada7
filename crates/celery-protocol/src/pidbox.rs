//! Remote control: requests that are broadcast to all workers, and their replies.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::glob::Glob;
use super::message::JSON;
use super::{Properties, RawMessage};

/// Maximum size of a compiled pattern, in bytes: patterns come from the network.
const MAX_PATTERN: usize = 1 << 16;

/// Maximum length of a pattern, in bytes. Names of nodes are shorter.
const MAX_PATTERN_TEXT: usize = 1 << 12;

/// Approximate maximum number of values in a request: each takes many times its bytes in memory. A list of all ids that
/// Celery remembers has 50,000.
const MAX_VALUES: usize = 200_000;

/// The exchange for broadcasting requests.
pub const EXCHANGE: &str = "celery.pidbox";

/// A request to workers.
#[derive(Debug, Clone, Deserialize)]
pub struct ControlRequest {
    /// Method that the sender requests, e.g. `ping`.
    pub method: String,
    /// Arguments of the method.
    #[serde(default)]
    pub arguments: Option<Map<String, Value>>,
    /// Nodes that the request is for; all nodes if it is missing.
    #[serde(default)]
    pub destination: Option<Vec<String>>,
    /// Pattern of the names of the nodes that the request is for.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Syntax of the pattern: `glob` or `pcre`.
    #[serde(default)]
    pub matcher: Option<String>,
    /// Text by which the sender identifies the replies.
    #[serde(default)]
    pub ticket: Option<String>,
    /// Address for replies; the sender expects none if it is missing.
    #[serde(default)]
    pub reply_to: Option<ReplyTo>,
}

/// Address of a reply.
#[derive(Debug, Clone, Deserialize)]
pub struct ReplyTo {
    /// Name of the exchange.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
}

impl ControlRequest {
    /// Parses a request; none if the message is not a request.
    #[must_use]
    pub fn decode(message: &RawMessage) -> Option<Self> {
        decode(&message.body)
    }

    /// Returns true if the request is for this node.
    #[must_use]
    pub fn addresses(&self, hostname: &str) -> bool {
        // As in Python, an empty list or an empty pattern is a missing one.
        let nodes = self
            .destination
            .as_deref()
            .filter(|nodes| !nodes.is_empty());
        let pattern = self.pattern.as_deref().filter(|text| !text.is_empty());
        match (nodes, pattern, self.matcher.as_deref()) {
            (Some(nodes), _, _) => nodes.iter().any(|node| node == hostname),
            (None, Some(pattern), Some("glob" | "pcre")) if pattern.len() > MAX_PATTERN_TEXT => {
                false
            }
            (None, Some(pattern), Some("glob")) => Glob::new(pattern).matches(hostname),
            (None, Some(pattern), Some("pcre")) => matches(&format!("^(?:{pattern})"), hostname),
            _ => true,
        }
    }

    /// Returns an argument by its name.
    #[must_use]
    pub fn argument(&self, name: &str) -> &Value {
        self.arguments
            .as_ref()
            .and_then(|arguments| arguments.get(name))
            .unwrap_or(&Value::Null)
    }
}

/// Parses a small JSON body; none if it is not JSON or has too many values.
#[must_use]
pub fn decode<T: serde::de::DeserializeOwned>(body: &[u8]) -> Option<T> {
    // Every value except the first follows one of these characters, or is the only one in a list or a mapping.
    let values = body.iter().filter(|byte| b",[{".contains(byte)).count();
    (values < MAX_VALUES)
        .then(|| serde_json::from_slice(body).ok())
        .flatten()
}

/// A request to all nodes.
#[must_use]
pub fn request(
    method: &str,
    arguments: &Value,
    ticket: &str,
    reply_to: &ReplyTo,
    clock: u64,
) -> RawMessage {
    let reply_to = json!({"exchange": reply_to.exchange, "routing_key": reply_to.routing_key});
    message(method, arguments, &json!(ticket), &reply_to, clock)
}

/// A request to all nodes that does not ask for replies.
#[must_use]
pub fn broadcast(method: &str, arguments: &Value, clock: u64) -> RawMessage {
    message(method, arguments, &Value::Null, &Value::Null, clock)
}

fn message(
    method: &str,
    arguments: &Value,
    ticket: &Value,
    reply_to: &Value,
    clock: u64,
) -> RawMessage {
    let headers = [
        ("clock".to_owned(), json!(clock)),
        ("expires".to_owned(), json!(0)),
    ];
    let body = json!({
        "method": method,
        "arguments": arguments,
        "destination": null,
        "pattern": null,
        "matcher": null,
        "ticket": ticket,
        "reply_to": reply_to,
    });
    RawMessage {
        headers: headers.into_iter().collect(),
        properties: Properties {
            content_type: Some(JSON.into()),
            content_encoding: Some("utf-8".into()),
            ..Properties::default()
        },
        body: body.to_string().into_bytes(),
    }
}

/// A reply to a request with a ticket: `{node: reply}`.
#[must_use]
pub fn reply(hostname: &str, ticket: Option<&str>, clock: u64, reply: &Value) -> RawMessage {
    let headers = [
        ("ticket".to_owned(), json!(ticket)),
        ("clock".to_owned(), json!(clock)),
    ];
    RawMessage {
        headers: headers.into_iter().collect(),
        properties: Properties {
            content_type: Some(JSON.into()),
            content_encoding: Some("utf-8".into()),
            ..Properties::default()
        },
        body: json!({ hostname: reply }).to_string().into_bytes(),
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    let built: Result<Regex, _> = RegexBuilder::new(pattern).size_limit(MAX_PATTERN).build();
    built.is_ok_and(|regex| regex.is_match(text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn request(fields: Value) -> Option<ControlRequest> {
        ControlRequest::decode(&RawMessage {
            body: fields.to_string().into_bytes(),
            ..RawMessage::default()
        })
    }

    #[rstest]
    #[case(json!({"destination": null}), true)]
    #[case(json!({"destination": ["celery@a"]}), true)]
    #[case(json!({"destination": ["celery@b"]}), false)]
    #[case(json!({"destination": []}), true)]
    #[case(json!({"pattern": "celery@*", "matcher": "glob"}), true)]
    #[case(json!({"pattern": "c?lery@[ab]", "matcher": "glob"}), true)]
    #[case(json!({"pattern": "celery@[!b]", "matcher": "glob"}), true)]
    #[case(json!({"pattern": "celery", "matcher": "glob"}), false)]
    #[case(json!({"pattern": "cel.*@a$", "matcher": "pcre"}), true)]
    #[case(json!({"pattern": "(", "matcher": "pcre"}), false)]
    fn destination_and_pattern_select_workers(#[case] mut fields: Value, #[case] is: bool) {
        fields["method"] = json!("ping");
        assert_eq!(request(fields).map(|r| r.addresses("celery@a")), Some(is));
    }

    #[test]
    fn request_that_needs_much_memory_is_refused() {
        let of = |values: usize| json!({"method": "revoke", "arguments": {"task_id": vec!["a"; values]}});
        assert!(request(of(50_000)).is_some());
        assert!(request(of(MAX_VALUES)).is_none());
        let long = "a*".repeat(MAX_PATTERN_TEXT);
        let addressed = request(json!({"method": "ping", "pattern": long, "matcher": "glob"}));
        assert_eq!(addressed.map(|r| r.addresses("celery@a")), Some(false));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ControlRequest::decode(&RawMessage { body, ..RawMessage::default() });
        }

        #[test]
        fn any_pattern_is_matched_without_panic(pattern in ".{0,30}", matcher in "glob|pcre|x") {
            let fields = json!({"method": "ping", "pattern": pattern, "matcher": matcher});
            let addressed = request(fields).map(|request| request.addresses("celery@a"));
            prop_assert!(addressed.is_some());
        }
    }
}
