//! Results in the memory of the process, for tests and examples.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde_json::Value;

use super::{ChordSupport, ResultBackend, ResultError};
use crate::clock;
use celery_protocol::message::TaskMessage;
use celery_protocol::result::{ResultMeta, State};

/// Named backends, so that a worker and a client can find the same one by its URL.
static NAMED: LazyLock<Mutex<HashMap<String, MemoryResults>>> = LazyLock::new(Mutex::default);

/// A [`ResultBackend`] within the process. Clones are the same backend. `celery.chord_unlock` polls chords, as with a
/// database.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// use celery_protocol::result::State;
/// use celery_worker::results::{ResultBackend, memory::MemoryResults};
///
/// let results = MemoryResults::new();
/// results.set("the-task", State::Success(5.into()));
/// assert_eq!(results.get("the-task").await?.unwrap()["result"], 5);
/// # Ok::<(), celery_worker::results::ResultError>(())
/// # }).unwrap();
/// ```
#[derive(Debug, Clone, Default)]
pub struct MemoryResults(Arc<Mutex<HashMap<String, Value>>>);

impl MemoryResults {
    /// Creates a backend without results.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The backend of a `memory://` URL: the same one for each use of the same URL.
    #[must_use]
    pub fn named(url: &str) -> Self {
        let mut named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        named.entry(url.to_owned()).or_default().clone()
    }

    /// Stores a state as a worker does, for a test without a worker.
    pub fn set(&self, task_id: &str, state: State) {
        let message = TaskMessage {
            id: task_id.to_owned(),
            ..TaskMessage::default()
        };
        self.put(&ResultMeta::new(&message, state, clock::now()));
    }

    fn put(&self, meta: &ResultMeta) {
        let mut results = self.lock();
        let stays = results.get(&meta.task_id).is_some_and(|stored| {
            let status = stored["status"].as_str().unwrap_or_default();
            meta.state.yields_to(status)
        });
        if !stays {
            results.insert(meta.task_id.clone(), meta.to_json());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ResultBackend for MemoryResults {
    async fn store(&self, meta: &ResultMeta, _: &TaskMessage) -> Result<(), ResultError> {
        self.put(meta);
        Ok(())
    }

    async fn get(&self, task_id: &str) -> Result<Option<Value>, ResultError> {
        Ok(self.lock().get(task_id).cloned())
    }

    async fn forget(&self, task_id: &str) -> Result<(), ResultError> {
        self.lock().remove(task_id);
        Ok(())
    }

    async fn probe(&self) -> Result<String, ResultError> {
        Ok("results are kept in this process".into())
    }

    fn chords(&self) -> ChordSupport {
        ChordSupport::Polled
    }
}

#[cfg(test)]
mod tests {
    use celery_protocol::result::StateName;
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn success_stays_and_progress_replaces_no_final_state() {
        let results = MemoryResults::new();
        let progress = || State::Custom {
            name: StateName::PROGRESS,
            meta: json!({}),
        };
        let state = async || {
            let stored = results.get("a").await.unwrap_or_default();
            stored.map(|meta| meta["status"].clone())
        };
        results.set("a", progress());
        results.set("a", State::Revoked(celery_protocol::result::Cause::Revoked));
        results.set("a", progress());
        assert_eq!(state().await, Some(json!("REVOKED")));
        results.set("a", State::Success(json!(1)));
        results.set("a", State::Revoked(celery_protocol::result::Cause::Revoked));
        assert_eq!(state().await, Some(json!("SUCCESS")));
        assert!(results.forget("a").await.is_ok());
        assert_eq!(state().await, None);
    }
}
