//! `redis://`: results under `celery-task-meta-<id>`, announced on a channel of that name.

use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use redis::{AsyncCommands as _, Script};
use serde_json::Value;
use uuid::Uuid;

use self::chords::{ChordOptions, RedisChords};
pub(super) use self::connection::RedisConnection;
use super::options::{Expires, RedisOptions, RedisTls};
use super::{ChordSupport, ResultBackend, ResultError, ResultOptions};
use crate::offload::{is_large, offload};
use crate::redis::{AddressOptions, Opened, RedisUrl, RedisUrlError};
use celery_protocol::compression::Method;
use celery_protocol::content::Serializer;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{self, ResultMeta, State};

mod chords;
mod connection;

/// Stores a result and announces it, in one step, unless the stored result may have to be kept: then the script returns
/// the stored result instead. The caller decides whether it may be replaced. If so, the caller passes it as the third
/// argument of a second call, which succeeds if the stored result has not changed in between.
///
/// The script recognizes states that may always be replaced by the beginning of the mapping, in JSON and msgpack, so that a task that was
/// STARTED before needs no second round trip. Python and this crate write the status first.
static STORE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r#"
local value, expires, known = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local head = redis.call('GETRANGE', KEYS[1], 0, 31)
if head ~= '' then
  local status = string.match(head, '^{"status": ?"(%u+)"') or string.match(head, '^[\128-\143]\166status.(%u+)')
  if status ~= 'STARTED' and status ~= 'RETRY' and status ~= 'PROGRESS' then
    local stored = redis.call('GET', KEYS[1])
    if stored ~= known then return stored end
  end
end
if expires > 0 then
  redis.call('SET', KEYS[1], value, 'EX', expires)
else
  redis.call('SET', KEYS[1], value)
end
redis.call('PUBLISH', KEYS[1], value)
return false
"#,
    )
});

/// Lifetime in seconds of a probe's key that the probe could not delete.
const PROBE_SECONDS: u64 = 60;

/// Checks a URL for use as a result backend.
pub(super) fn check(url: &str, options: &ResultOptions) -> Result<(), ResultError> {
    // The certificate files may be created later, and the options for sentinels are checked elsewhere.
    let bare = RedisOptions {
        master_name: "master".into(),
        tls: RedisTls::default(),
        ..options.redis.clone()
    };
    parse(url, &bare).map(drop)
}

fn parse(url: &str, options: &RedisOptions) -> Result<RedisUrl, ResultError> {
    let address = AddressOptions {
        tls: options.tls.clone(),
        master_name: options.master_name.clone(),
        ..AddressOptions::default()
    };
    Ok(RedisUrl::parse(url, &address)?)
}

impl From<RedisUrlError> for ResultError {
    fn from(error: RedisUrlError) -> Self {
        Self::Url(error.to_string())
    }
}

/// Creates a client for a single server.
pub(super) fn client(url: &str) -> Result<redis::Client, ResultError> {
    match parse(url, &RedisOptions::default())?.open()? {
        Opened::Server(client) => Ok(client),
        Opened::Sentinels(_) => Err(ResultError::Url("sentinels are not supported here".into())),
    }
}

/// Stores results in Redis.
pub struct Redis {
    connection: Arc<RedisConnection>,
    prefix: String,
    expires: Expires,
    serializer: Serializer,
    compression: Option<Method>,
    chord_ordered: bool,
}

impl Redis {
    /// Creates the backend for `url` and `options`, without a connection.
    ///
    /// # Errors
    /// [`ResultError::Url`].
    pub fn new(url: &str, options: &ResultOptions) -> Result<Self, ResultError> {
        Ok(Self {
            connection: Arc::new(RedisConnection::new(&parse(url, &options.redis)?)?),
            prefix: key_prefix(&options.redis.key_prefix),
            expires: options.expires,
            serializer: options.serializer,
            compression: options.compression,
            chord_ordered: options.redis.chord_ordered,
        })
    }

    /// The key of a task's result, which is also the name of its channel.
    fn key(&self, task_id: &str) -> String {
        format!("{}celery-task-meta-{task_id}", self.prefix)
    }
}

/// `global_keyprefix`, followed by a separator as in Celery.
fn key_prefix(prefix: &str) -> String {
    match prefix.chars().last() {
        None | Some(':' | '_' | '-' | '.') => prefix.to_owned(),
        Some(_) => format!("{prefix}_"),
    }
}

#[async_trait]
impl ResultBackend for Redis {
    fn chords(&self) -> ChordSupport {
        let options = ChordOptions {
            ordered: self.chord_ordered,
            expires_seconds: self.expires.chords.unwrap_or(self.expires.results),
            result_expires_seconds: self.expires.results,
            serializer: self.serializer,
            compression: self.compression,
        };
        let chords = RedisChords::new(self.connection.clone(), &self.prefix, options);
        ChordSupport::Counted(Arc::new(chords))
    }

    async fn store(&self, meta: &ResultMeta, _message: &TaskMessage) -> Result<(), ResultError> {
        let key = self.key(&meta.task_id);
        let encoding = || result::encode(&meta.to_json(), self.serializer, self.compression);
        let value = offload(is_large(meta.values()), encoding);
        let expires = match meta.state {
            State::Failure { .. } => self.expires.failures.unwrap_or(self.expires.results),
            _ => self.expires.results,
        };
        let mut known = Vec::new();
        loop {
            let stored: Option<Vec<u8>> = self
                .connection
                .with(async |connection| {
                    STORE
                        .key(&key)
                        .arg(&value)
                        .arg(expires)
                        .arg(&known)
                        .invoke_async(connection)
                        .await
                })
                .await?;
            let Some(stored) = stored else {
                return Ok(());
            };
            // A value that cannot be read is not a SUCCESS.
            if let Ok(there) = result::read(&stored, self.serializer)
                && meta
                    .state
                    .yields_to(there["status"].as_str().unwrap_or_default())
            {
                return Ok(());
            }
            known = stored;
        }
    }

    async fn probe(&self) -> Result<String, ResultError> {
        let key = format!("{}celery-worker-probe-{}", self.prefix, Uuid::new_v4());
        let read: Option<String> = self
            .connection
            .with(async |connection| {
                let _: () = connection.set_ex(&key, "1", PROBE_SECONDS).await?;
                let read = connection.get(&key).await?;
                let _: () = connection.del(&key).await?;
                Ok(read)
            })
            .await?;
        let place = self.connection.place();
        match read {
            Some(_) => Ok(format!("{place}: a key was written, read and deleted")),
            None => Err(ResultError::refused(
                place,
                "a key was written, but could not be read",
            )),
        }
    }

    async fn forget(&self, task_id: &str) -> Result<(), ResultError> {
        let key = self.key(task_id);
        self.connection
            .with(async |connection| connection.del(&key).await)
            .await
    }

    async fn get(&self, task_id: &str) -> Result<Option<Value>, ResultError> {
        let key = self.key(task_id);
        let stored: Option<Vec<u8>> = self
            .connection
            .with(async |connection| connection.get(&key).await)
            .await?;
        stored
            .map(|stored| result::read(&stored, self.serializer))
            .transpose()
            .map_err(|source| ResultError::Unreadable {
                task_id: task_id.to_owned(),
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", "")]
    #[case("site", "site_")]
    #[case("site_", "site_")]
    #[case("site:", "site:")]
    #[case("site-", "site-")]
    #[case("site.", "site.")]
    fn key_prefix_is_separated(#[case] setting: &str, #[case] prefix: &str) {
        assert_eq!(key_prefix(setting), prefix);
    }
}
