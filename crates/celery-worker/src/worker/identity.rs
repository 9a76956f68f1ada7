//! Identity of task messages: recognizes deliveries of the same task.

use serde_json::Value;

use celery_protocol::RawMessage;

/// Headers that do not count: those that brokers add to a message that is redelivered or dead-lettered, and those that
/// describe the sender rather than the task.
const BROKER_PREFIXES: [&str; 4] = ["x-death", "x-first-death-", "x-last-death-", "x-opt-"];
const IGNORED: [&str; 6] = [
    "x-delivery-count",
    "x-acquired-count",
    "origin",
    "traceparent",
    "tracestate",
    "baggage",
];

/// Digest of everything in a message that determines what is executed and where the outcome is sent.
///
/// It is equal for a redelivery, for the copy of a waiting message that a worker publishes, and for a message that was
/// published twice without a change. It differs as soon as the task's name, its arguments, its options (`retries`,
/// `eta`, `expires`, `timelimit`, stamps and any other header) or the caller (`reply_to`, `correlation_id`) differ: a
/// task id alone identifies nothing, since senders choose it.
///
/// The digest is cryptographic, because messages may be hostile: no sender must be able to construct a message that
/// joins another one and is then acknowledged without being executed. Queue, exchange and priority do not count: they
/// are the route of a message, not its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Identity([u8; 32]);

impl Identity {
    /// The identity of a message as it was received.
    pub(crate) fn of(message: &RawMessage) -> Self {
        let mut headers: Vec<(&String, &Value)> = message
            .headers
            .iter()
            .filter(|(name, _)| !is_ignored(name))
            .collect();
        headers.sort_unstable_by_key(|(name, _)| name.as_str());

        let mut hasher = blake3::Hasher::new();
        for (name, value) in headers {
            part(&mut hasher, name.as_bytes());
            part(&mut hasher, value.to_string().as_bytes());
        }
        let properties = &message.properties;
        for text in [
            &properties.content_type,
            &properties.content_encoding,
            &properties.correlation_id,
            &properties.reply_to,
        ] {
            // A missing property counts as an empty one.
            part(&mut hasher, text.as_deref().unwrap_or_default().as_bytes());
        }
        part(&mut hasher, &message.body);
        Self(*hasher.finalize().as_bytes())
    }
}

fn is_ignored(header: &str) -> bool {
    IGNORED.contains(&header)
        || BROKER_PREFIXES
            .iter()
            .any(|prefix| header.starts_with(prefix))
}

/// Adds a part with its length, so that two different lists of parts never have the same bytes.
fn part(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn message() -> RawMessage {
        let mut message = RawMessage {
            headers: [
                ("task".to_owned(), json!("t")),
                ("id".to_owned(), json!("a")),
                ("retries".to_owned(), json!(0)),
                ("origin".to_owned(), json!("gen1@here")),
            ]
            .into_iter()
            .collect(),
            body: b"[[1], {}, null]".to_vec(),
            ..RawMessage::default()
        };
        message.properties.reply_to = Some("caller".into());
        message.properties.correlation_id = Some("a".into());
        message
    }

    #[rstest]
    #[case::dead_lettered(|m: &mut RawMessage| drop(m.headers.insert("x-death".into(), json!([{"count": 1}]))))]
    #[case::delivered_again(|m: &mut RawMessage| drop(m.headers.insert("x-delivery-count".into(), json!(2))))]
    #[case::by_another_process(|m: &mut RawMessage| drop(m.headers.insert("origin".into(), json!("gen2@there"))))]
    #[case::in_another_trace(|m: &mut RawMessage| drop(m.headers.insert("traceparent".into(), json!("00-1-2-01"))))]
    #[case::in_another_order(|m: &mut RawMessage| {
        let task = m.headers.shift_remove("task");
        m.headers.extend(task.map(|task| ("task".to_owned(), task)));
    })]
    #[case::of_another_priority(|m: &mut RawMessage| m.properties.priority = Some(9))]
    fn same(#[case] change: fn(&mut RawMessage)) {
        let mut changed = message();
        change(&mut changed);
        assert_eq!(Identity::of(&changed), Identity::of(&message()));
    }

    #[rstest]
    #[case::task(|m: &mut RawMessage| drop(m.headers.insert("task".into(), json!("u"))))]
    #[case::retries(|m: &mut RawMessage| drop(m.headers.insert("retries".into(), json!(1))))]
    #[case::eta(|m: &mut RawMessage| drop(m.headers.insert("eta".into(), json!("2030-01-01T00:00:00Z"))))]
    #[case::stamp(|m: &mut RawMessage| drop(m.headers.insert("x-mine".into(), json!(1))))]
    #[case::arguments(|m: &mut RawMessage| m.body = b"[[2], {}, null]".to_vec())]
    #[case::caller(|m: &mut RawMessage| m.properties.reply_to = Some("other".into()))]
    #[case::correlation(|m: &mut RawMessage| m.properties.correlation_id = Some("b".into()))]
    #[case::serializer(|m: &mut RawMessage| m.properties.content_type = Some("application/x-yaml".into()))]
    fn other(#[case] change: fn(&mut RawMessage)) {
        let mut changed = message();
        change(&mut changed);
        assert_ne!(Identity::of(&changed), Identity::of(&message()));
    }

    /// Moving bytes from one part to the next changes the identity.
    #[test]
    fn parts_do_not_run_together() {
        let with = |reply_to: &str, correlation_id: &str| {
            let mut message = message();
            message.properties.reply_to = Some(reply_to.into());
            message.properties.correlation_id = Some(correlation_id.into());
            Identity::of(&message)
        };
        assert_ne!(with("ab", "c"), with("a", "bc"));
    }
}
