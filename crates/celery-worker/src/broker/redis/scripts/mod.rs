//! The scripts that move messages between lists and the record of held messages. Each is atomic: a message is in
//! exactly one place before and after it.
//!
//! The record has two keys, as in kombu: a hash of entries `[message, exchange, routing_key]`, and a sorted set of the
//! times of delivery. kombu uses the message's own delivery tag as the field of an entry, so that a second delivery of
//! the message replaces the entry of the first. A claim here has a field of its own: a late settlement cannot hit the
//! entry of another delivery.
//!
//! A body is not sent without need: not if it is above the limits of the subscription, and not to return a message.

use std::sync::LazyLock;

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, FromRedisValue, RedisResult, Script};
use uuid::Uuid;

use super::names::Names;
use super::shared::MessageLimits;
use celery_protocol::virtual_message::{self, HeldMessage, Malformed};

/// Maximum number of messages of one claim, and of their bytes after which it ends.
pub(super) const MAX_CLAIM: usize = 64;
const CLAIM_BYTES: usize = 1 << 20;

/// Seconds during which a publication can be repeated without a second copy of the message.
const MARKER_SECONDS: u64 = 120;

/// Takes messages from lists and records them. An element that no worker could read goes to the list of parked ones of
/// its queue, since an entry of the record that is not a message ends Python's workers.
static CLAIM: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("body.lua"), include_str!("claim.lua"))));

/// Returns entries, without bodies above the limits.
static FIND: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("body.lua"), include_str!("find.lua"))));

/// Returns an entry with another text in place of a large body, and the position of the body.
static OUTLINE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(concat!(
        include_str!("body.lua"),
        include_str!("outline.lua")
    ))
});

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
    /// The first message has the first field, and so on.
    pub(super) messages: Vec<ClaimedMessage>,
}

/// A claimed message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ClaimedMessage {
    /// Position of the queue.
    pub(super) queue: usize,
    /// Text of the message.
    pub(super) text: Vec<u8>,
    /// Size in bytes of the body, if it is not in the text.
    pub(super) omitted: Option<usize>,
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
    limits: MessageLimits,
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
    script.arg(limits.max_body).arg(limits.max_waiting_body);
    for one in from {
        script.arg(entry_end(&one.queue));
        script.arg(one.room).arg(u8::from(one.is_recorded));
    }
    for field in fields {
        script.arg(field);
    }
    let (parked, taken): (usize, Vec<redis::Value>) = script.invoke_async(connection).await?;
    let mut messages = Vec::with_capacity(taken.len() / 3);
    let mut taken = taken.into_iter();
    while let (Some(queue), Some(text), Some(omitted)) = (taken.next(), taken.next(), taken.next())
    {
        messages.push(ClaimedMessage {
            queue: FromRedisValue::from_redis_value(queue)?,
            text: FromRedisValue::from_redis_value(text)?,
            omitted: omitted_size(omitted)?,
        });
    }
    Ok(Claimed { parked, messages })
}

/// The size of an omitted body; none for 0.
fn omitted_size(value: redis::Value) -> RedisResult<Option<usize>> {
    let size: usize = FromRedisValue::from_redis_value(value)?;
    Ok((size > 0).then_some(size))
}

/// The end of an entry of a queue's message, behind the text of the message.
fn entry_end(queue: &str) -> String {
    format!(r#", "", {}]"#, serde_json::Value::from(queue))
}

/// Returns the whole text of a claimed message. None if the entry is gone.
pub(super) async fn text(
    connection: &mut MultiplexedConnection,
    names: &Names,
    field: &str,
    queue: &str,
) -> RedisResult<Option<Vec<u8>>> {
    let entry: Option<Vec<u8>> = connection.hget(&names.unacked, field).await?;
    let text = |mut entry: Vec<u8>| {
        entry.truncate(entry.len().checked_sub(entry_end(queue).len())?);
        (!entry.is_empty()).then(|| entry.split_off(1))
    };
    Ok(entry.and_then(text))
}

/// An entry that was found.
#[derive(Debug)]
pub(super) struct FoundEntry {
    pub(super) entry: Vec<u8>,
    /// Size in bytes of the body, if it is not in the entry.
    pub(super) omitted: Option<usize>,
}

/// Returns the entry of each field; an empty one if there is none.
pub(super) async fn find(
    connection: &mut MultiplexedConnection,
    names: &Names,
    limits: MessageLimits,
    fields: &[String],
) -> RedisResult<Vec<FoundEntry>> {
    let mut script = FIND.prepare_invoke();
    script.key(&names.unacked);
    script.arg(limits.max_body).arg(limits.max_waiting_body);
    script.arg(fields);
    let found: Vec<redis::Value> = script.invoke_async(connection).await?;
    let mut found = found.into_iter();
    let mut entries = Vec::with_capacity(fields.len());
    while let (Some(entry), Some(omitted)) = (found.next(), found.next()) {
        entries.push(FoundEntry {
            entry: FromRedisValue::from_redis_value(entry)?,
            omitted: omitted_size(omitted)?,
        });
    }
    Ok(entries)
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

/// An entry as a worker needs it to return its message: a large body is left out.
#[derive(Debug)]
pub(super) struct EntryOutline {
    entry: Vec<u8>,
    /// Stands in the place of the body.
    mark: String,
    /// Positions of the body's first and last byte in the entry.
    body: (i64, i64),
}

impl EntryOutline {
    /// The message, and the element that returns it to a list.
    ///
    /// # Errors
    /// The entry has no message.
    pub(super) fn returned(&self) -> Result<(HeldMessage, Element), Malformed> {
        let message = virtual_message::held(&self.entry)?;
        let (before, after) = message
            .text
            .split_once(&self.mark)
            .unwrap_or((&message.text, ""));
        let element = Element {
            before: before.to_owned(),
            kept: self.body,
            after: after.to_owned(),
        };
        Ok((message, element))
    }
}

/// An element of a list that is made from an entry: some bytes of the entry between two texts.
#[derive(Debug)]
pub(super) struct Element {
    before: String,
    /// Positions of the first and the last byte, from 1; negative ones count from the end of the entry.
    kept: (i64, i64),
    after: String,
}

impl Element {
    /// The whole entry.
    pub(super) fn entry() -> Self {
        Self {
            before: String::new(),
            kept: (1, -1),
            after: String::new(),
        }
    }

    /// The element that was claimed from a queue, without any change.
    pub(super) fn claimed(queue: &str) -> Self {
        let end = i64::try_from(entry_end(queue).len()).unwrap_or(i64::MAX);
        Self {
            kept: (2, -1 - end),
            ..Self::entry()
        }
    }
}

/// Returns the outline of an entry. None if it is no longer there.
pub(super) async fn outline(
    connection: &mut MultiplexedConnection,
    names: &Names,
    field: &str,
) -> RedisResult<Option<EntryOutline>> {
    let mark = Uuid::new_v4().to_string();
    let mut script = OUTLINE.prepare_invoke();
    script.key(&names.unacked).arg(field).arg(&mark);
    let found: Option<(Vec<u8>, i64, i64)> = script.invoke_async(connection).await?;
    Ok(found.map(|(entry, first, last)| EntryOutline {
        entry,
        mark,
        body: (first, last),
    }))
}

/// Moves an entry to a list, as an element. Returns false if it is no longer there.
pub(super) async fn move_to(
    connection: &mut MultiplexedConnection,
    names: &Names,
    field: &str,
    (list, end): (&str, End),
    element: &Element,
) -> RedisResult<bool> {
    let mut script = MOVE.prepare_invoke();
    script
        .key(&names.unacked)
        .key(&names.unacked_index)
        .key(list);
    script.arg(field).arg(end.push());
    script.arg(&element.before);
    script.arg(element.kept.0).arg(element.kept.1);
    script.arg(&element.after);
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
    element: &Element,
) -> RedisResult<bool> {
    let mut script = RESTORE.prepare_invoke();
    script.key(&names.unacked).key(&names.unacked_index);
    for list in lists {
        script.key(list);
    }
    script.arg(field).arg(score);
    script.arg(&element.before);
    script.arg(element.kept.0).arg(element.kept.1);
    script.arg(&element.after);
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
