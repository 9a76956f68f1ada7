//! Answers for single requests, for the viewers who ask the same within a second.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;

/// Time for which an answer is kept.
const KEPT: Duration = Duration::from_secs(1);

/// Maximum number of kept answers.
const MAX_ENTRIES: usize = 256;

/// A cache in which the same question is asked once at a time.
pub(super) struct Cache<K, V> {
    kept: Duration,
    entries: Mutex<HashMap<K, Entry<V>>>,
}

struct Entry<V> {
    ends: Instant,
    answer: Arc<OnceCell<V>>,
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self {
            kept: KEPT,
            entries: Mutex::default(),
        }
    }
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    /// Returns the answer to a question, and asks it if no answer is kept.
    pub(super) async fn get<F: Future<Output = V>>(
        &self,
        question: K,
        ask: impl FnOnce() -> F,
    ) -> V {
        let Some(answer) = self.entry(question) else {
            return ask().await;
        };
        answer.get_or_init(ask).await.clone()
    }

    /// The place of an answer; `None` if there is none left.
    fn entry(&self, question: K) -> Option<Arc<OnceCell<V>>> {
        let now = Instant::now();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| entry.ends > now);
        if let Some(entry) = entries.get(&question) {
            return Some(entry.answer.clone());
        }
        if entries.len() >= MAX_ENTRIES {
            return None;
        }
        let answer = Arc::new(OnceCell::new());
        let entry = Entry {
            ends: now + self.kept,
            answer: answer.clone(),
        };
        entries.insert(question, entry);
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Numbers of the answers to two questions at once, to another one, and to the first one again.
    async fn answers(kept: Duration) -> [u32; 4] {
        let cache = Cache {
            kept,
            ..Cache::default()
        };
        let asked = AtomicU32::new(0);
        let ask = || async {
            tokio::task::yield_now().await;
            asked.fetch_add(1, Ordering::Relaxed) + 1
        };
        let (one, two) = tokio::join!(cache.get("a", ask), cache.get("a", ask));
        [
            one,
            two,
            cache.get("b", ask).await,
            cache.get("a", ask).await,
        ]
    }

    #[tokio::test]
    async fn same_question_is_asked_once_while_its_answer_is_kept() {
        assert_eq!(answers(Duration::from_secs(3600)).await, [1, 1, 2, 1]);
        let [.., other, again] = answers(Duration::ZERO).await;
        assert!(again > other);
    }
}
