//! Counting the parts of a chord in Redis, together with Python workers.
//!
//! The keys are those of Celery 5.7, with the prefix of saved groups. `.j` contains the parts that have ended, `.d` the
//! set of their tasks, `.s` the expected number of parts, `.t` the change of that number since, `.a` the set of tasks
//! that caused the change, and `.c` the claim of the worker that applies the body. One script counts a part, so that
//! exactly one worker finds that its part was the last. That worker then holds `.c`, the claim, for a limited time. If
//! a worker with a claim dies, its own message stays unacknowledged: the worker that receives the message again waits
//! until the claim has ended, and takes it over.

use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use redis::{AsyncCommands, Script, Value as RedisValue};
use serde_json::{Value, json};
use uuid::Uuid;

use super::connection::RedisConnection;
use crate::offload::{is_large, offload};
use crate::results::ResultError;
use crate::results::chord::{ChordCounter, Claim, Counted, Part};
use celery_protocol::canvas::ResultNode;
use celery_protocol::compression::Method;
use celery_protocol::content::Serializer;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{self, State};

/// Prefix of the keys.
const PREFIX: &str = "celery-taskset-meta-";

/// Minimum lifetime of a claim, and of the mark of a finished chord, in seconds.
const MIN_CLAIM_SECONDS: u64 = 5;
const MIN_DONE_SECONDS: u64 = 300;

/// Counts a part, once for each task and position, and claims the chord if it was the last. Returns one of: `done`,
/// `waiting`, `claimed`, `held` (complete, but claimed by another worker).
static COUNT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local parts, change, size, seen, group, claim = unpack(KEYS)
        local member, value, place, expires, group_expires, claim_expires, token = unpack(ARGV)
        if redis.call('GET', claim) == 'done' then
            return 'done'
        end
        if redis.call('SADD', seen, member) == 1 then
            if place == '' then
                redis.call('RPUSH', parts, value)
            else
                redis.call('ZADD', parts, place, value)
            end
        end
        if tonumber(expires) > 0 then
            for i = 1, 4 do
                redis.call('EXPIRE', KEYS[i], expires)
            end
            if tonumber(group_expires) > 0 then
                redis.call('EXPIRE', group, group_expires)
            end
        end
        local count
        if place == '' then
            count = redis.call('LLEN', parts)
        else
            count = redis.call('ZCARD', parts)
        end
        local wanted = redis.call('GET', size)
        if not wanted or count ~= wanted + (redis.call('GET', change) or 0) then
            return 'waiting'
        end
        if redis.call('SET', claim, token, 'NX', 'EX', claim_expires) then
            return 'claimed'
        end
        return 'held'
        ",
    )
});

/// Adds one part to a chord, once for each task.
static GROW: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local added, change = unpack(KEYS)
        local task_id, expires = unpack(ARGV)
        if redis.call('SADD', added, task_id) == 1 then
            redis.call('INCR', change)
        end
        if tonumber(expires) > 0 then
            redis.call('EXPIRE', added, expires)
            redis.call('EXPIRE', change, expires)
        end
        ",
    )
});

/// Extends a claim, or takes it again if it has expired and no other worker holds it.
static KEEP: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local claim, size = unpack(KEYS)
        local token, expires = unpack(ARGV)
        local holder = redis.call('GET', claim)
        if holder == token then
            return redis.call('EXPIRE', claim, expires)
        end
        if not holder and redis.call('EXISTS', size) == 1 then
            redis.call('SET', claim, token, 'EX', expires)
            return 1
        end
        return 0
        ",
    )
});

/// Removes the records of a chord whose body was applied, if the claim is still held.
static FINISH: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local claim = KEYS[1]
        if redis.call('GET', claim) ~= ARGV[1] then
            return 0
        end
        for i = 2, #KEYS do
            redis.call('DEL', KEYS[i])
        end
        redis.call('SET', claim, 'done', 'EX', ARGV[2])
        return 1
        ",
    )
});

/// Options for counting chords.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ChordOptions {
    /// True if the body receives the results in the header's order (`result_chord_ordered`).
    pub ordered: bool,
    /// Time limit of a chord in seconds; 0 for no limit (`result_chord_expires`, by default `result_expires`).
    pub expires_seconds: u64,
    /// Time that results are kept, in seconds; 0 for no limit (`result_expires`).
    pub result_expires_seconds: u64,
    /// Serializer of parts (`result_serializer`).
    pub serializer: Serializer,
    /// Compression of parts (`result_compression`).
    pub compression: Option<Method>,
}

/// The chords of one Redis server.
#[derive(Clone)]
pub(super) struct RedisChords {
    connection: Arc<RedisConnection>,
    prefix: String,
    options: ChordOptions,
}

impl RedisChords {
    /// Creates the counter on a connection; `keyprefix` is the prefix of all keys.
    pub(super) fn new(
        connection: Arc<RedisConnection>,
        keyprefix: &str,
        options: ChordOptions,
    ) -> Self {
        Self {
            connection,
            prefix: format!("{keyprefix}{PREFIX}"),
            options,
        }
    }

    fn key(&self, group_id: &str, suffix: &str) -> String {
        format!("{}{group_id}{suffix}", self.prefix)
    }

    fn encode(&self, value: &Value) -> Vec<u8> {
        result::encode(value, self.options.serializer, self.options.compression)
    }
}

#[async_trait]
impl ChordCounter for RedisChords {
    async fn begin(
        &self,
        group_id: &str,
        size: usize,
        results: &[ResultNode],
    ) -> Result<(), ResultError> {
        let expires = self.options.expires_seconds;
        let mut pipe = redis::pipe();
        pipe.atomic();
        let mut set = |key: String, value: Vec<u8>| {
            match expires {
                0 => pipe.set(key, value),
                seconds => pipe.set_ex(key, value, seconds),
            }
            .ignore();
        };
        if results.iter().any(|result| result.members.is_some()) {
            let results: Vec<Value> = results.iter().map(ResultNode::to_json).collect();
            let saved = json!({"result": [[group_id, null], results]});
            set(self.key(group_id, ""), self.encode(&saved));
        }
        set(self.key(group_id, ".s"), size.to_string().into_bytes());
        // A chord that is applied again starts without a claim.
        pipe.del(self.key(group_id, ".c")).ignore();
        self.connection
            .with(async |connection| pipe.query_async(connection).await)
            .await
    }

    async fn grow(&self, group_id: &str, task_id: &str) -> Result<(), ResultError> {
        let mut call = GROW.prepare_invoke();
        call.key(self.key(group_id, ".a"))
            .key(self.key(group_id, ".t"))
            .arg(task_id)
            .arg(self.options.expires_seconds);
        self.connection
            .with(async |connection| call.invoke_async(connection).await)
            .await
    }

    async fn count(
        &self,
        message: &TaskMessage,
        state: &State,
        claim_seconds: u64,
    ) -> Result<Counted, ResultError> {
        let Some(group_id) = message.group.as_deref() else {
            return Ok(Counted::NotLast);
        };
        let index = message.group_index.map(|index| index.to_string());
        let index = index.as_deref().unwrap_or("+inf");
        let place = if self.options.ordered { index } else { "" };
        let value = match state {
            State::Success(value) => Some(value),
            _ => None,
        };
        let encoding = || self.encode(&json!([1, message.id, state.name(), state.result()]));
        let value = offload(is_large(value), encoding);
        let token = Uuid::new_v4().simple().to_string();
        let keys = [".j", ".t", ".s", ".d", "", ".c"].map(|suffix| self.key(group_id, suffix));
        let expires = self.options.expires_seconds;
        let group_expires = match self.options.result_expires_seconds {
            0 => 0,
            seconds => seconds.max(expires),
        };
        let mut call = COUNT.prepare_invoke();
        call.key(&keys)
            .arg(format!("{}:{index}", message.id))
            .arg(value)
            .arg(place)
            .arg(expires)
            .arg(group_expires)
            .arg(claim_seconds.max(MIN_CLAIM_SECONDS))
            .arg(&token);
        let counting = self
            .connection
            .with(async |connection| call.invoke_async(connection).await);
        let found: String = counting.await?;
        Ok(match found.as_str() {
            "claimed" => Counted::Last(Claim {
                group_id: group_id.to_owned(),
                token,
            }),
            "held" => Counted::Held,
            _ => Counted::NotLast,
        })
    }

    async fn saved(&self, claim: &Claim) -> Result<Option<ResultNode>, ResultError> {
        let key = self.key(&claim.group_id, "");
        let getting = self
            .connection
            .with(async |connection| connection.get(key).await);
        let saved: Option<Vec<u8>> = getting.await?;
        Ok(saved
            .and_then(|stored| result::decode(&stored, self.options.serializer).ok())
            .and_then(|saved| ResultNode::parse(&saved["result"])))
    }

    async fn parts(&self, claim: &Claim) -> Result<Vec<Part>, ResultError> {
        let key = self.key(&claim.group_id, ".j");
        let ordered = self.options.ordered;
        let getting = self.connection.with(async |connection| match ordered {
            true => connection.zrange(key, 0, -1).await,
            false => connection.lrange(key, 0, -1).await,
        });
        let parts: Vec<RedisValue> = getting.await?;
        let read = |value: RedisValue| {
            let stored: Vec<u8> = redis::from_redis_value(value).ok()?;
            let (_, task_id, state, result): (Value, String, String, Value) =
                serde_json::from_value(result::decode(&stored, self.options.serializer).ok()?)
                    .ok()?;
            Some(Part {
                task_id,
                state,
                result,
            })
        };
        // A value that cannot be read was not written by a worker. It counts as a failed part, and fails the chord.
        Ok(parts
            .into_iter()
            .map(|value| {
                read(value).unwrap_or_else(|| Part {
                    task_id: "?".into(),
                    state: "FAILURE".into(),
                    result: Value::Null,
                })
            })
            .collect())
    }

    async fn keep(&self, claim: &Claim, seconds: u64) -> Result<bool, ResultError> {
        let mut call = KEEP.prepare_invoke();
        call.key(self.key(&claim.group_id, ".c"))
            .key(self.key(&claim.group_id, ".s"))
            .arg(&claim.token)
            .arg(seconds);
        self.connection
            .with(async |connection| call.invoke_async(connection).await)
            .await
    }

    async fn finish(&self, claim: &Claim, claim_seconds: u64) -> Result<bool, ResultError> {
        let keys =
            [".c", ".j", ".t", ".s", ".d", ".a"].map(|suffix| self.key(&claim.group_id, suffix));
        let mut call = FINISH.prepare_invoke();
        call.key(&keys)
            .arg(&claim.token)
            .arg(claim_seconds.saturating_mul(2).max(MIN_DONE_SECONDS));
        self.connection
            .with(async |connection| call.invoke_async(connection).await)
            .await
    }

    async fn fail(&self, claim: &Claim) -> Result<(), ResultError> {
        let key = self.key(&claim.group_id, ".s");
        self.connection
            .with(async |connection| connection.del(key).await)
            .await
    }
}
