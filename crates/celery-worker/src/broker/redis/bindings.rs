//! Bindings of queues to exchanges. Redis knows no exchanges: a set of bindings belongs to each name.

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, RedisResult, cmd, pipe};
use regex::RegexBuilder;
use serde_json::Value;

use super::names::Names;
use crate::broker::{Binding, ExchangeKind, Queue};

/// Maximum size of a compiled pattern in bytes: every program that uses the database can write one.
const MAX_PATTERN: usize = 1 << 16;

/// Minimum lifetime in milliseconds of the bindings of queues that expire, as in kombu.
const MIN_LIFETIME_MS: u64 = 3_600_000;

/// The regular expression that kombu writes for the key of a topic binding.
fn topic_pattern(key: &str) -> String {
    let words = key.split('.').map(|word| match word {
        "*" => r"[^\.]+".to_owned(),
        "#" => ".*?".to_owned(),
        word => escaped(word),
    });
    format!("^{}$", words.collect::<Vec<_>>().join(r"\."))
}

/// A word as Python's `re.escape` returns it, except for the wildcards.
fn escaped(word: &str) -> String {
    let mut escaped = String::with_capacity(word.len());
    for c in word.chars() {
        if "\t\n\u{b}\u{c}\r &()+-?[\\]^{|}$~".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// The member for a binding.
pub(super) fn member(names: &Names, queue: &str, binding: &Binding) -> String {
    let pattern = match binding.exchange.kind {
        ExchangeKind::Topic => topic_pattern(&binding.key),
        _ => String::new(),
    };
    names.binding(&binding.key, &pattern, queue)
}

/// Writes the binding of a queue, as kombu does.
pub(super) async fn bind(
    connection: &mut MultiplexedConnection,
    names: &Names,
    queue: &Queue,
) -> RedisResult<()> {
    let Some(binding) = &queue.binding else {
        return Ok(());
    };
    let exchange = &binding.exchange.name;
    let member = member(names, &queue.name, binding);
    let expires_ms = queue.arguments.get("x-expires").and_then(Value::as_u64);
    let mut pipe = pipe();
    pipe.atomic();
    pipe.sadd(names.bindings(exchange), &member).ignore();
    match expires_ms {
        None => {
            pipe.sadd(names.permanent_bindings(exchange), &member)
                .ignore();
        }
        Some(expires_ms) => {
            let (seconds, _): (u64, u64) = cmd("TIME").query_async(connection).await?;
            let lifetime = expires_ms.saturating_mul(2).max(MIN_LIFETIME_MS);
            let deadline = seconds.saturating_mul(1000).saturating_add(lifetime);
            pipe.cmd("ZADD")
                .arg(names.binding_deadlines())
                .arg("GT")
                .arg(deadline)
                .arg(exchange)
                .ignore();
        }
    }
    pipe.query_async(connection).await
}

/// Removes the binding of a queue that belongs to this process, with its messages.
pub(super) async fn remove(
    connection: &mut MultiplexedConnection,
    names: &Names,
    queue: &Queue,
) -> RedisResult<()> {
    let mut pipe = pipe();
    pipe.atomic();
    if let Some(binding) = &queue.binding {
        let (exchange, member) = (&binding.exchange.name, member(names, &queue.name, binding));
        pipe.srem(names.bindings(exchange), &member).ignore();
        pipe.srem(names.permanent_bindings(exchange), &member)
            .ignore();
    }
    pipe.del(names.lists(&queue.name).collect::<Vec<_>>())
        .ignore();
    pipe.query_async(connection).await
}

/// The queues that an exchange routes a message to.
pub(super) async fn route(
    connection: &mut MultiplexedConnection,
    names: &Names,
    exchange: &str,
    routing_key: &str,
) -> RedisResult<Vec<String>> {
    let members: Vec<Vec<u8>> = connection.smembers(names.bindings(exchange)).await?;
    let members = members
        .iter()
        .filter_map(|member| str::from_utf8(member).ok());
    let mut queues: Vec<String> = members
        .filter_map(|member| names.parse_binding(member))
        .filter(|(key, pattern, _)| takes(key, pattern, routing_key))
        .map(|(_, _, queue)| queue.to_owned())
        .collect();
    queues.sort_unstable();
    queues.dedup();
    Ok(queues)
}

/// Returns true if a binding takes a routing key. Only topic bindings have a pattern.
fn takes(key: &str, pattern: &str, routing_key: &str) -> bool {
    if pattern.is_empty() {
        return key == routing_key;
    }
    let pattern = RegexBuilder::new(&format!("^(?:{pattern})"))
        .size_limit(MAX_PATTERN)
        .build();
    pattern.is_ok_and(|pattern| pattern.is_match(routing_key))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    // The patterns are those that kombu 5.7 writes.
    #[rstest]
    #[case("a.*.c", r"^a\.[^\.]+\.c$")]
    #[case("a.#", r"^a\..*?$")]
    #[case("#", "^.*?$")]
    #[case("a-b.c", r"^a\-b\.c$")]
    fn patterns_of_topics(#[case] key: &str, #[case] expected: &str) {
        assert_eq!(topic_pattern(key), expected);
    }

    #[rstest]
    #[case("k", "", "k", true)]
    #[case("k", "", "l", false)]
    #[case("a.*", r"^a\.[^\.]+$", "a.b", true)]
    #[case("a.*", r"^a\.[^\.]+$", "a.b.c", false)]
    #[case("a.#", r"^a\..*?$", "a.b.c", true)]
    // kombu differs from AMQP here.
    #[case("a.#", r"^a\..*?$", "a", false)]
    #[case("x", "(", "x", false)]
    fn bindings_take_keys(
        #[case] key: &str,
        #[case] pattern: &str,
        #[case] routing_key: &str,
        #[case] expected: bool,
    ) {
        assert_eq!(takes(key, pattern, routing_key), expected);
    }
}
