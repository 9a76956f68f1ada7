//! The message for the next run of a task that is retried.
//!
//! It is a complete protocol 2 message with the id of the previous run. It contains everything that the producer put
//! into the first message: the body, byte for byte, the application headers with their types, and the stamps.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::arguments::{Parameter, ParameterKind};
use super::content::JSON;
use super::message::{Protocol, TaskMessage};
use super::{Headers, Properties, RawMessage, isoformat, repr};

/// Headers that RabbitMQ adds to dead letters. If a message contained them, RabbitMQ would treat it as one that
/// circulates endlessly.
const DEAD_LETTER_HEADERS: [&str; 7] = [
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
];

/// Differences between the next run and the previous one, as in `Task.retry`. The default has none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Changes {
    /// Another queue; without one, the message takes the route of the task's message.
    pub queue: Option<String>,
    /// Other positional arguments.
    pub args: Option<Vec<Value>>,
    /// Other keyword arguments.
    pub kwargs: Option<Map<String, Value>>,
    /// Another expiry time.
    pub expires: Option<DateTime<Utc>>,
    /// Another priority.
    pub priority: Option<u8>,
    /// Another hard time limit, in seconds.
    pub time_limit: Option<f64>,
    /// Another soft time limit, in seconds.
    pub soft_time_limit: Option<f64>,
    /// True if no result is wanted.
    pub ignore_result: Option<bool>,
    /// Another name to show.
    pub shadow: Option<String>,
    /// Further headers, or other values for headers of the producer.
    pub headers: Map<String, Value>,
}

impl Changes {
    /// Completes new arguments for a function with these `parameters`: an argument that is new by position replaces the
    /// one of `message` that has the parameter's name, and an argument that is new by name replaces the one at the
    /// parameter's position. Without this, the next run would have two values for one parameter.
    #[must_use]
    pub fn completed(mut self, message: &TaskMessage, parameters: &[Parameter]) -> Self {
        let (args, kwargs) = message.sent_arguments();
        let positional = || {
            let ordinary = |parameter: &&Parameter| parameter.kind == ParameterKind::Ordinary;
            parameters.iter().filter(ordinary).map(|one| one.name)
        };
        match (&self.args, &mut self.kwargs) {
            (Some(new), None) => {
                if let Value::Object(kwargs) = kwargs
                    && positional()
                        .take(new.len())
                        .any(|name| kwargs.contains_key(name))
                {
                    let mut kept = kwargs.clone();
                    kept.retain(|known, _| !positional().take(new.len()).any(|name| name == known));
                    self.kwargs = Some(kept);
                }
            }
            (None, Some(new)) => {
                if let Value::Array(args) = args {
                    let mut kept = args.clone();
                    for (place, name) in kept.iter_mut().zip(positional()) {
                        if let Some(value) = new.remove(name) {
                            *place = value;
                        }
                    }
                    if kept != *args {
                        self.args = Some(kept);
                    }
                }
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
        self
    }
}

impl TaskMessage {
    /// The arguments as the sender wrote them.
    fn sent_arguments(&self) -> (&Value, &Value) {
        match &self.typed {
            Some((args, kwargs)) => (args, kwargs),
            None => (&self.args, &self.kwargs),
        }
    }

    /// Creates the message of the task's next run: the same as `raw`, which `self` was decoded from, due at `eta` (at
    /// once without one) and with the `changes`. Headers that the broker added are removed.
    #[must_use]
    pub fn retry(
        &self,
        raw: &RawMessage,
        eta: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
        changes: &Changes,
    ) -> RawMessage {
        let expires = changes.expires.or(self.expires);
        let properties = Properties {
            correlation_id: Some(self.id.clone()),
            priority: changes.priority.or(self.priority),
            // The remaining time until the expiry, as in a new message; never negative.
            expiration: expires
                .map(|expires| (expires - now).num_milliseconds().max(0).to_string()),
            persistent: true,
            // As in Python, whose retry is a new message.
            app_id: None,
            message_id: None,
            message_type: None,
            ..raw.properties.clone()
        };
        let mut message = RawMessage {
            headers: self.next_headers(raw, eta, changes),
            properties,
            body: raw.body.clone(),
        };
        if self.protocol == Protocol::One || changes.args.is_some() || changes.kwargs.is_some() {
            self.write_body(&mut message, changes);
        }
        message
    }

    fn next_headers(
        &self,
        raw: &RawMessage,
        eta: Option<DateTime<Utc>>,
        changes: &Changes,
    ) -> Headers {
        let kept = |name: &str| self.headers.get(name).cloned().unwrap_or_default();
        // In the producer's notation, if it is unchanged.
        let expires = match (changes.expires, kept("expires")) {
            (None, text @ (Value::String(_) | Value::Null)) => text,
            (changed, _) => json!(changed.or(self.expires).map(isoformat)),
        };
        let limits = [
            (changes.time_limit, self.time_limit.0, 0),
            (changes.soft_time_limit, self.time_limit.1, 1),
        ]
        .map(|(changed, known, place)| match (changed, known) {
            (Some(changed), _) => json!(changed),
            // With a fraction only if the old value has one.
            (None, Some(_)) => kept("timelimit").get(place).cloned().unwrap_or_default(),
            (None, None) => Value::Null,
        });
        let repr_of = |changed: Option<String>, known: &Option<String>, current: &Value| {
            changed
                .or_else(|| known.clone().filter(|text| !text.is_empty()))
                .unwrap_or_else(|| {
                    repr::shorten(&match current {
                        Value::Array(args) => repr::tuple(args),
                        other => repr::value(other),
                    })
                })
        };
        let args = changes.args.as_deref().map(repr::tuple);
        let kwargs = changes.kwargs.as_ref().map(repr::dict);

        let mut headers = raw.headers.clone();
        headers.retain(|name, _| !DEAD_LETTER_HEADERS.contains(&name.as_str()));
        let own = [
            ("lang", json!("py")),
            ("task", json!(self.task)),
            ("id", json!(self.id)),
            (
                "shadow",
                json!(changes.shadow.as_ref().or(self.shadow.as_ref())),
            ),
            ("eta", json!(eta.map(isoformat))),
            ("expires", expires),
            ("group", kept("group")),
            ("group_index", kept("group_index")),
            ("retries", json!(self.retries.saturating_add(1))),
            ("timelimit", json!(limits)),
            ("root_id", json!(self.root_id.as_ref().unwrap_or(&self.id))),
            // The task's own id if it has no parent: Python uses the run that retries.
            (
                "parent_id",
                json!(self.parent_id.as_ref().unwrap_or(&self.id)),
            ),
            ("argsrepr", json!(repr_of(args, &self.argsrepr, &self.args))),
            (
                "kwargsrepr",
                json!(repr_of(kwargs, &self.kwargsrepr, &self.kwargs)),
            ),
            ("origin", kept("origin")),
            (
                "ignore_result",
                changes
                    .ignore_result
                    .map_or_else(|| kept("ignore_result"), Value::from),
            ),
            (
                "replaced_task_nesting",
                self.headers
                    .get("replaced_task_nesting")
                    .cloned()
                    .unwrap_or_else(|| json!(0)),
            ),
            ("stamped_headers", kept("stamped_headers")),
            (
                "stamps",
                self.headers
                    .get("stamps")
                    .cloned()
                    .unwrap_or_else(|| json!({})),
            ),
        ];
        headers.extend(own.map(|(name, value)| (name.to_owned(), value)));
        headers.extend(changes.headers.clone());
        headers
    }

    /// Writes the body again: JSON, not compressed.
    fn write_body(&self, message: &mut RawMessage, changes: &Changes) {
        let (args, kwargs) = self.sent_arguments();
        let args = changes
            .args
            .as_ref()
            .map_or_else(|| args.clone(), |args| json!(args));
        let kwargs = changes
            .kwargs
            .as_ref()
            .map_or_else(|| kwargs.clone(), |kwargs| json!(kwargs));
        message.body = json!([args, kwargs, self.embed.to_json()])
            .to_string()
            .into_bytes();
        message.properties.content_type = Some(JSON.into());
        message.properties.content_encoding = Some("utf-8".into());
        message.headers.remove("compression");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::content::Accept;
    use crate::message::decode;

    const ETA: &str = "2026-11-24T11:40:42.411750+00:00";

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn raw(headers: Value, body: &str) -> RawMessage {
        RawMessage {
            headers: serde_json::from_value(headers).unwrap(),
            properties: Properties {
                content_type: Some(JSON.into()),
                content_encoding: Some("utf-8".into()),
                ..Properties::default()
            },
            body: body.into(),
        }
    }

    fn retried(raw: &RawMessage, changes: &Changes) -> RawMessage {
        let message = decode(raw, &Accept::json(10_000)).unwrap();
        message.retry(
            raw,
            Some(time(ETA)),
            time("2026-11-24T10:40:42.412478+00:00"),
            changes,
        )
    }

    fn body(message: &RawMessage) -> Value {
        serde_json::from_slice(&message.body).unwrap()
    }

    /// Captured from a Celery 5.7 worker: the message that it publishes for `self.retry(countdown=3600)`, and the
    /// message that it had received. Its argsrepr is a new one, of the tuple that it made of the list, and it writes
    /// the task's own ignore_result if the producer had not set it.
    #[test]
    fn retry_message_equals_that_of_python() {
        let id = "795a3f9f-d6ed-48a5-ad4c-31b4f47e9e6f";
        let text = r#"[[1, "a"], {"k": 2.5, "when": {"__type__": "datetime", "__value__": "2026-11-24T04:13:55+00:00"}}, {"callbacks": [{"task": "tasks.other", "args": [1], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false}], "errbacks": null, "chain": null, "chord": null}]"#;
        let argsrepr = "[1, 'a']";
        let kwargsrepr = "{'k': 2.5, 'when': datetime.datetime(2026, 11, 24, 4, 13, 55, tzinfo=datetime.timezone.utc)}";
        let mut first = raw(
            json!({
                "lang": "py", "task": "tasks.flaky", "id": id, "shadow": "Shown", "eta": null,
                "expires": "2026-11-24T12:40:42.383478+00:00", "group": null, "group_index": null,
                "retries": 0, "timelimit": [90, null], "root_id": id, "parent_id": null,
                "argsrepr": argsrepr, "kwargsrepr": kwargsrepr, "origin": "gen29474@vm",
                "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": ["batch"],
                "stamps": {"batch": "b7"}, "x-mine": [1, null],
            }),
            text,
        );
        first.properties.reply_to = Some("d86e46a9".into());
        first.properties.correlation_id = Some(id.into());
        first.properties.priority = Some(3);
        first.properties.expiration = Some("7200000".into());
        let next = retried(&first, &Changes::default());
        assert_eq!(
            json!(*next.headers),
            json!({
                "lang": "py", "task": "tasks.flaky", "id": id, "shadow": "Shown", "eta": ETA,
                "expires": "2026-11-24T12:40:42.383478+00:00", "group": null, "group_index": null,
                "retries": 1, "timelimit": [90, null], "root_id": id, "parent_id": id,
                "argsrepr": argsrepr, "kwargsrepr": kwargsrepr, "origin": "gen29474@vm",
                "ignore_result": false, "replaced_task_nesting": 0, "stamped_headers": ["batch"],
                "stamps": {"batch": "b7"}, "x-mine": [1, null],
            })
        );
        assert_eq!(
            next.properties,
            Properties {
                expiration: Some("7199971".into()),
                persistent: true,
                ..first.properties
            }
        );
        assert_eq!(next.body, text.as_bytes());
    }

    /// Captured in the same way. Python omits the `taskset`.
    #[test]
    fn protocol_1_becomes_2() {
        let callback = json!({"task": "x", "args": [], "kwargs": {}, "options": {}, "subtask_type": null, "immutable": false});
        let first = json!({
            "task": "tasks.flaky", "id": "v1-id", "args": [1], "kwargs": {"a": null}, "retries": 1, "eta": null,
            "expires": null, "utc": true, "callbacks": [callback], "errbacks": null, "timelimit": [null, null],
            "taskset": "g1", "chord": null,
        });
        let mut first = raw(json!({"x-mine": "y"}), &first.to_string());
        first.properties.correlation_id = Some("v1-id".into());
        let next = retried(&first, &Changes::default());
        assert_eq!(
            json!(*next.headers),
            json!({
                "x-mine": "y",
                "lang": "py", "task": "tasks.flaky", "id": "v1-id", "shadow": null, "eta": ETA, "expires": null,
                "group": "g1", "group_index": null, "retries": 2, "timelimit": [null, null], "root_id": "v1-id",
                "parent_id": "v1-id", "argsrepr": "(1,)", "kwargsrepr": "{'a': None}", "origin": null,
                "ignore_result": null, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {},
            })
        );
        assert_eq!(
            body(&next),
            json!([[1], {"a": null}, {"callbacks": [callback], "errbacks": null, "chain": null, "chord": null}])
        );
        // The result is a valid message again.
        let again = decode(&next, &Accept::json(10_000)).unwrap();
        assert_eq!((again.protocol, again.retries), (Protocol::Two, 2));
    }

    #[test]
    fn headers_keep_their_types_and_the_brokers_are_left_out() {
        let stamp = json!({"__type__": "datetime", "__value__": "2026-11-24T04:13:55"});
        let headers = json!({"task": "t", "id": "a", "stamp": stamp, "x-death": [{"count": 1}], "x-first-death-queue": "q", "x-deathly": 1});
        let next = retried(&raw(headers, "[[1], {}, null]"), &Changes::default());
        assert_eq!(next.headers["stamp"], stamp);
        assert_eq!(next.headers["x-deathly"], 1);
        assert!(
            !next.headers.contains_key("x-death")
                && !next.headers.contains_key("x-first-death-queue")
        );
        assert_eq!(
            (&next.headers["argsrepr"], &next.headers["parent_id"]),
            (&json!("(1,)"), &json!("a"))
        );
        assert_eq!(next.body, b"[[1], {}, null]");
    }

    #[test]
    fn changes() {
        let envelope = json!({"__type__": "decimal", "__value__": "1.50"});
        let first = raw(
            json!({"task": "t", "id": "a", "compression": null, "timelimit": [60, 1.5]}),
            &json!([[envelope], {"k": 123_456_789_012_345_678_901_234_567_890_u128}, null])
                .to_string(),
        );
        let expires = time("2026-11-24T10:00:00Z");
        let next = retried(
            &first,
            &Changes {
                kwargs: Some(Map::from_iter([("k".to_owned(), json!(2))])),
                expires: Some(expires),
                priority: Some(9),
                time_limit: Some(5.0),
                ignore_result: Some(true),
                shadow: Some("s".into()),
                headers: Map::from_iter([("x".to_owned(), json!(1))]),
                ..Changes::default()
            },
        );
        assert_eq!(
            body(&next)[0],
            json!([envelope]),
            "the other arguments are as they were"
        );
        assert_eq!(body(&next)[1], json!({"k": 2}));
        let headers = &next.headers;
        assert_eq!(headers["kwargsrepr"], "{'k': 2}");
        assert_eq!(headers["argsrepr"], "('1.50',)");
        assert_eq!(headers["timelimit"], json!([5.0, 1.5]));
        assert_eq!(headers["expires"], "2026-11-24T10:00:00.000000+00:00");
        assert_eq!(
            (&headers["ignore_result"], &headers["shadow"], &headers["x"]),
            (&json!(true), &json!("s"), &json!(1))
        );
        assert!(!headers.contains_key("compression"));
        assert_eq!(next.properties.priority, Some(9));
        assert_eq!(
            next.properties.expiration.as_deref(),
            Some("0"),
            "it has expired"
        );

        let other_args = Changes {
            args: Some(vec![json!(7)]),
            ..Changes::default()
        };
        let next = retried(&first, &other_args);
        assert_eq!(
            std::str::from_utf8(&next.body).unwrap(),
            r#"[[7],{"k":123456789012345678901234567890},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]"#
        );
    }

    #[rstest]
    #[case::by_position(json!([1]), json!({"b": 2, "k": 3}), Some(json!([7, 8])), None, json!([[7, 8], {"k": 3}]))]
    #[case::fewer_by_position(json!([1]), json!({"b": 2}), Some(json!([7])), None, json!([[7], {"b": 2}]))]
    #[case::by_name(json!([1, 2]), json!({"k": 3}), None, Some(json!({"b": 8})), json!([[1, 8], {}]))]
    #[case::by_other_name(json!([1]), json!({"b": 2}), None, Some(json!({"b": 8, "k": 9})), json!([[1], {"b": 8, "k": 9}]))]
    #[case::both(json!([1, 2]), json!({}), Some(json!([7])), Some(json!({"b": 8})), json!([[7], {"b": 8}]))]
    fn new_arguments_replace_those_of_the_same_parameters(
        #[case] args: Value,
        #[case] kwargs: Value,
        #[case] new_args: Option<Value>,
        #[case] new_kwargs: Option<Value>,
        #[case] expected: Value,
    ) {
        let parameters = [
            Parameter::required("a"),
            Parameter::required("b"),
            Parameter::optional("k").keyword_only(),
        ];
        let first = raw(
            json!({"task": "t", "id": "a"}),
            &json!([args, kwargs, null]).to_string(),
        );
        let message = decode(&first, &Accept::json(1000)).unwrap();
        let changes = Changes {
            args: new_args.map(|args| serde_json::from_value(args).unwrap()),
            kwargs: new_kwargs.map(|kwargs| serde_json::from_value(kwargs).unwrap()),
            ..Changes::default()
        };
        let next = retried(&first, &changes.completed(&message, &parameters));
        let body = body(&next);
        assert_eq!(json!([body[0], body[1]]), expected);
    }

    #[test]
    fn without_a_pause_it_has_no_eta() {
        let first = raw(
            json!({"task": "t", "id": "a", "eta": "2026-11-24T04:00"}),
            "[[], {}, {}]",
        );
        let message = decode(&first, &Accept::json(1000)).unwrap();
        let next = message.retry(&first, None, time(ETA), &Changes::default());
        assert_eq!(next.headers["eta"], Value::Null);
    }
}
