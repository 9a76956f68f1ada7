//! Native delayed delivery, in Celery's layout for RabbitMQ: the bits of a delay in seconds are the first words of the
//! routing key, and for each bit a queue holds messages for the corresponding time. This module has no side effects;
//! the broker declares the result of [`topology`].
//!
//! Layout and names are those of kombu 5.7, whose producers use them.

use super::queue_settings::ExchangeKind;
use super::queue_settings::QueueType;
use super::topology::{Exchange, Queue, TopologyStep};

/// Number of bits of a delay, which limits it to 2^28 - 1 seconds, about eight and a half years.
pub const BITS: u32 = 28;

/// Exchange that receives messages after their delay.
pub const DELIVERY: &str = "celery_delayed_delivery";

/// Maximum delay, in seconds.
pub const LONGEST: u32 = (1 << BITS) - 1;

/// Name of the exchange and of the queue for one bit.
fn level(bit: u32) -> String {
    format!("celery_delayed_{bit}")
}

/// The exchange that accepts delayed messages.
#[must_use]
pub fn entrance() -> String {
    level(BITS - 1)
}

/// The routing key for a delay in seconds, followed by `key`; the words of an earlier delay in `key` are replaced. A
/// delay beyond [`LONGEST`] is reduced to it.
#[must_use]
pub fn routing_key(delay: u32, key: &str) -> String {
    let delay = delay.min(LONGEST);
    let bits = (0..BITS).rev().map(|bit| match delay >> bit & 1 {
        0 => "0.",
        _ => "1.",
    });
    bits.chain([strip(key)]).collect()
}

/// Removes the words of a delay from a routing key.
#[must_use]
pub fn strip(key: &str) -> &str {
    let length = 2 * BITS as usize;
    let is_delay = |prefix: &&str| {
        prefix
            .as_bytes()
            .chunks(2)
            .all(|word| matches!(word, b"0." | b"1."))
    };
    match key.get(..length).filter(is_delay) {
        Some(_) => &key[length..],
        None => key,
    }
}

/// The binding pattern for a key after the words of a delay.
#[must_use]
pub fn behind(key: &str) -> String {
    match key.starts_with('#') {
        true => key.into(),
        false => format!("#.{key}"),
    }
}

/// All exchanges, queues and bindings for delayed messages, in the order of their declaration.
#[must_use]
pub fn topology(kind: QueueType) -> Vec<TopologyStep> {
    let mut steps = Vec::new();
    for bit in (0..BITS).rev() {
        let next = match bit {
            0 => DELIVERY.to_owned(),
            _ => level(bit - 1),
        };
        let mut arguments = vec![
            ("x-queue-type".to_owned(), kind.as_str().into()),
            ("x-overflow".to_owned(), "reject-publish".into()),
            ("x-message-ttl".to_owned(), ((1_u64 << bit) * 1000).into()),
            ("x-dead-letter-exchange".to_owned(), next.into()),
        ];
        if kind == QueueType::Quorum {
            arguments.push(("x-dead-letter-strategy".to_owned(), "at-least-once".into()));
        }
        steps.push(TopologyStep::Queue(Queue {
            name: level(bit),
            durable: true,
            exclusive: false,
            auto_delete: false,
            arguments: arguments.into_iter().collect(),
            binding: Some(super::Binding {
                exchange: Exchange::durable(level(bit), ExchangeKind::Topic),
                key: pattern(bit, '1'),
            }),
        }));
    }
    steps.push(TopologyStep::Exchange(Exchange::durable(
        DELIVERY,
        ExchangeKind::Topic,
    )));
    for bit in (0..BITS).rev() {
        steps.push(TopologyStep::BindExchange {
            source: level(bit),
            destination: match bit {
                0 => DELIVERY.into(),
                _ => level(bit - 1),
            },
            key: pattern(bit, '0'),
        });
    }
    steps
}

/// Binding pattern for keys whose bit `bit` is `value`.
fn pattern(bit: u32, value: char) -> String {
    let words = (BITS - 1 - bit) as usize;
    format!("{}{value}.#", "*.".repeat(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_keys_begin_with_the_delay() {
        for (delay, bits) in [
            (1, "0000000000000000000000000001"),
            (10, "0000000000000000000000001010"),
            (LONGEST, "1111111111111111111111111111"),
            (u32::MAX, "1111111111111111111111111111"),
        ] {
            let words: Vec<String> = bits.chars().map(String::from).collect();
            assert_eq!(
                routing_key(delay, "a.b"),
                format!("{}.a.b", words.join("."))
            );
        }
    }

    #[test]
    fn an_earlier_delay_is_replaced() {
        let once = routing_key(5, "q");
        assert_eq!(strip(&once), "q");
        assert_eq!(routing_key(9, &once), routing_key(9, "q"));
        for key in [
            "",
            "q",
            "0.1.q",
            "é".repeat(40).as_str(),
            "0.".repeat(27).as_str(),
        ] {
            assert_eq!(strip(key), key);
        }
        assert_eq!(strip(&"0.".repeat(28)), "");
    }
}
