//! Ids of tasks that must not run.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many are remembered, and for so long; Celery's defaults.
const MOST: usize = 50_000;
const FOR: Duration = Duration::from_secs(10_800);

/// The revoked ids of this node.
#[derive(Default)]
pub(super) struct Revoked(Mutex<Ids>);

#[derive(Default)]
struct Ids {
    ids: HashSet<String>,
    order: VecDeque<(Instant, String)>,
}

impl Revoked {
    /// Remembers ids.
    pub(super) fn add(&self, ids: impl IntoIterator<Item = String>) {
        self.with(|known| {
            for id in ids {
                if known.ids.insert(id.clone()) {
                    known.order.push_back((Instant::now(), id));
                }
            }
        });
    }

    /// Whether an id is revoked.
    pub(super) fn contains(&self, id: &str) -> bool {
        self.with(|known| known.ids.contains(id))
    }

    /// All of them, the oldest first.
    pub(super) fn list(&self) -> Vec<String> {
        self.with(|known| known.order.iter().map(|(_, id)| id.clone()).collect())
    }

    fn with<T>(&self, use_them: impl FnOnce(&mut Ids) -> T) -> T {
        // No code panics while it holds the lock, and the sets would still be whole.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let used = use_them(&mut known);
        known.forget();
        used
    }
}

impl Ids {
    fn forget(&mut self) {
        while self
            .order
            .front()
            .is_some_and(|(since, _)| self.order.len() > MOST || since.elapsed() > FOR)
        {
            if let Some((_, id)) = self.order.pop_front() {
                self.ids.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten() {
        let revoked = Revoked::default();
        revoked.add((0..=MOST).map(|n| n.to_string()));
        revoked.add(["1".to_owned()]);
        assert!(!revoked.contains("0"));
        assert!(revoked.contains("1"));
        assert_eq!(revoked.list().len(), MOST);
    }
}
