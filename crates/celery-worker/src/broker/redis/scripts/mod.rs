//! The scripts that move messages between lists and the record of held messages. Each is atomic: a message is in
//! exactly one place before and after it.
//!
//! The record has two keys, as in kombu: a hash of entries `[message, exchange, routing_key]`, and a sorted set of the
//! times of delivery. kombu uses the message's own delivery tag as the field of an entry, so that a second delivery of
//! the message replaces the entry of the first. A claim here has a field of its own: a late settlement cannot hit the
//! entry of another delivery.

use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisResult, Script};

use super::names::Names;

/// Maximum number of messages of one claim, and of their bytes after which it ends.
pub(super) const MAX_CLAIM: usize = 64;
pub(super) const CLAIM_BYTES: usize = 1 << 20;

/// Seconds during which a publication can be repeated without a second copy of the message.
const MARKER_SECONDS: u64 = 120;

/// Takes messages from lists and records them. An element that no worker could read goes to the list of parked ones of
/// its queue, since an entry of the record that is not a message ends Python's workers.
static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("claim.lua")));

/// Removes entries. Returns 1 for each that was there.
static REMOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("remove.lua")));

/// Moves an entry that is still there to a list.
static MOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("move.lua")));

/// Sets the time of entries to now. Returns the fields of those that are gone.
static RENEW: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("renew.lua")));

/// Returns the fields and times of expired entries, the newest first.
static EXPIRED: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("expired.lua")));

/// Moves an expired entry to lists, unless it was renewed, settled or moved by another worker.
static RESTORE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("restore.lua")));

/// Publishes a message unless the marker of this publication exists. The marker is written first: a server without
/// memory refuses it, and nothing is published.
static PUBLISH: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("publish.lua")));

/// A queue that messages are claimed from.
#[derive(Debug, Clone)]
pub(super) struct ClaimFrom {
    pub(super) queue: String,
    /// Maximum number of messages.
    pub(super) room: usize,
    /// True if messages are recorded until they are settled.
    pub(super) is_recorded: bool,
}

/// Claimed messages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Claimed {
    /// Number of elements that were parked.
    pub(super) parked: usize,
    /// Position of the queue, and the text, of each message. The first one has the first field, and so on.
    pub(super) messages: Vec<(usize, Vec<u8>)>,
}

/// Destination of an entry that is moved to a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The end at which messages arrive: the message becomes the last one to be delivered.
    Last,
    /// The end at which messages leave: the message becomes the next one to be delivered.
    Next,
}

impl End {
    fn push(self) -> &'static str {
        match self {
            Self::Last => "LPUSH",
            Self::Next => "RPUSH",
        }
    }
}

/// Claims messages for `fields`, from each queue in turn or from the first one as long as it has any.
pub(super) async fn claim(
    connection: &mut MultiplexedConnection,
    names: &Names,
    from: &[ClaimFrom],
    in_turns: bool,
    fields: &[String],
) -> RedisResult<Claimed> {
    let mut script = CLAIM.prepare_invoke();
    for class in 0..names.classes() {
        for ClaimFrom { queue, .. } in from {
            script.key(names.lists(queue).nth(class).unwrap_or_default());
        }
    }
    for ClaimFrom { queue, .. } in from {
        script.key(names.parked(queue));
    }
    script.key(&names.unacked_index).key(&names.unacked);
    script.arg(names.classes()).arg(u8::from(in_turns));
    script.arg(fields.len()).arg(CLAIM_BYTES);
    for one in from {
        script.arg(serde_json::Value::from(one.queue.as_str()).to_string());
        script.arg(one.room).arg(u8::from(one.is_recorded));
    }
    for field in fields {
        script.arg(field);
    }
    let (parked, taken): (usize, Vec<redis::Value>) = script.invoke_async(connection).await?;
    let mut messages = Vec::with_capacity(taken.len() / 2);
    let mut taken = taken.into_iter();
    while let (Some(queue), Some(text)) = (taken.next(), taken.next()) {
        messages.push((
            FromRedisValue::from_redis_value(queue)?,
            FromRedisValue::from_redis_value(text)?,
        ));
    }
    Ok(Claimed { parked, messages })
}

/// Removes entries. Returns 1 for each that was there, else 0.
pub(super) async fn remove(
    connection: &mut MultiplexedConnection,
    names: &Names,
    fields: &[String],
) -> RedisResult<Vec<u8>> {
    run_on_entries(&REMOVE, connection, names, fields).await
}

/// Runs a script that takes any number of entries.
async fn run_on_entries<T: FromRedisValue>(
    script: &Script,
    connection: &mut MultiplexedConnection,
    names: &Names,
    fields: &[String],
) -> RedisResult<T> {
    let mut script = script.prepare_invoke();
    script.key(&names.unacked).key(&names.unacked_index);
    for field in fields {
        script.arg(field);
    }
    script.invoke_async(connection).await
}

/// Moves an entry to a list. Returns false if it is no longer there.
pub(super) async fn move_to(
    connection: &mut MultiplexedConnection,
    names: &Names,
    field: &str,
    (list, end): (&str, End),
    text: &[u8],
) -> RedisResult<bool> {
    let mut script = MOVE.prepare_invoke();
    script
        .key(&names.unacked)
        .key(&names.unacked_index)
        .key(list);
    script.arg(field).arg(end.push()).arg(text);
    script.invoke_async(connection).await
}

/// Renews entries. Returns the fields of those that are gone.
pub(super) async fn renew(
    connection: &mut MultiplexedConnection,
    names: &Names,
    fields: &[String],
) -> RedisResult<Vec<String>> {
    run_on_entries(&RENEW, connection, names, fields).await
}

/// Returns up to `limit` entries that were not renewed for `seconds`, with the time of each as Redis prints it.
pub(super) async fn expired(
    connection: &mut MultiplexedConnection,
    names: &Names,
    seconds: u64,
    limit: usize,
) -> RedisResult<Vec<(String, String)>> {
    let mut script = EXPIRED.prepare_invoke();
    script.key(&names.unacked_index).arg(seconds).arg(limit);
    script.invoke_async(connection).await
}

/// Moves an expired entry to lists. Returns false if its time has changed, or if it has no message.
pub(super) async fn restore(
    connection: &mut MultiplexedConnection,
    names: &Names,
    (field, score): &(String, String),
    lists: &[String],
    text: &[u8],
) -> RedisResult<bool> {
    let mut script = RESTORE.prepare_invoke();
    script.key(&names.unacked).key(&names.unacked_index);
    for list in lists {
        script.key(list);
    }
    script.arg(field).arg(score).arg(text);
    script.invoke_async(connection).await
}

/// A message on its way to lists or to a channel.
#[derive(Debug, Clone)]
pub(super) struct PublishRequest {
    /// Identifies the publication when it is repeated.
    pub(super) id: String,
    pub(super) text: String,
    pub(super) lists: Vec<String>,
    /// Milliseconds after which the lists expire; 0 for never.
    pub(super) expires_ms: u64,
    pub(super) channel: Option<String>,
}

/// Publishes a message, once.
pub(super) async fn publish(
    connection: &mut MultiplexedConnection,
    names: &Names,
    outgoing: &PublishRequest,
) -> RedisResult<()> {
    let mut script = PUBLISH.prepare_invoke();
    script.key(names.published(&outgoing.id));
    for list in &outgoing.lists {
        script.key(list);
    }
    script.arg(&outgoing.text).arg(MARKER_SECONDS);
    script.arg(outgoing.expires_ms);
    script.arg(outgoing.channel.as_deref().unwrap_or_default());
    script.invoke_async(connection).await
}
