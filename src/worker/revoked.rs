//! Ids and stamps of tasks that must not run.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::wire::message::TaskMessage;

/// So many are remembered, and for so long; Celery's defaults.
const MOST: usize = 50_000;
const FOR: Duration = Duration::from_secs(10_800);

/// What is revoked on this node.
#[derive(Default)]
pub(super) struct Revoked {
    ids: Mutex<Ids>,
    /// By the name of the header, as many values as ids.
    stamps: Mutex<VecDeque<(String, Value)>>,
}

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

    /// Remembers stamps: for each header a value, or a list of them.
    pub(super) fn add_stamps(&self, headers: &Map<String, Value>) {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, values) in headers {
            stamps.extend(each(values).map(|value| (name.clone(), value.clone())));
        }
        let excess = stamps.len().saturating_sub(MOST);
        stamps.drain(..excess);
    }

    /// Whether a task is revoked.
    pub(super) fn revokes(&self, message: &TaskMessage) -> bool {
        let by_id = self.with(|known| known.ids.contains(&message.id));
        by_id || {
            let stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
            !stamps.is_empty()
                && stamps
                    .iter()
                    .any(|(name, value)| bears(message, name, value))
        }
    }

    /// All of them, the oldest first.
    pub(super) fn list(&self) -> Vec<String> {
        self.with(|known| known.order.iter().map(|(_, id)| id.clone()).collect())
    }

    fn with<T>(&self, use_them: impl FnOnce(&mut Ids) -> T) -> T {
        // No code panics while it holds the lock, and the sets would still be whole.
        let mut known = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let used = use_them(&mut known);
        known.forget();
        used
    }
}

/// Whether a message bears one of these stamps.
pub(super) fn is_stamped(message: &TaskMessage, headers: &Map<String, Value>) -> bool {
    headers
        .iter()
        .any(|(name, values)| each(values).any(|value| bears(message, name, value)))
}

fn bears(message: &TaskMessage, name: &str, value: &Value) -> bool {
    message
        .headers
        .get("stamps")
        .and_then(|stamps| stamps.get(name))
        .is_some_and(|stamped| each(stamped).any(|stamp| stamp == value))
}

/// A list's elements, or the one value.
fn each(values: &Value) -> impl Iterator<Item = &Value> {
    match values {
        Value::Array(values) => values.iter(),
        one => std::slice::from_ref(one).iter(),
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
    use serde_json::json;

    #[test]
    fn the_oldest_are_forgotten() {
        let revoked = Revoked::default();
        revoked.add((0..=MOST).map(|n| n.to_string()));
        revoked.add(["1".to_owned()]);
        let revokes = |id: &str| {
            revoked.revokes(&TaskMessage {
                id: id.into(),
                ..TaskMessage::default()
            })
        };
        assert!(!revokes("0"));
        assert!(revokes("1"));
        assert_eq!(revoked.list().len(), MOST);
    }

    #[test]
    fn stamps_revoke() {
        let revoked = Revoked::default();
        let stamped = |stamp: Value| TaskMessage {
            headers: [("stamps".to_owned(), json!({ "batch": stamp }))]
                .into_iter()
                .collect(),
            ..TaskMessage::default()
        };
        revoked.add_stamps(&Map::from_iter([("batch".to_owned(), json!(["a", "b"]))]));
        assert!(revoked.revokes(&stamped(json!(["x", "b"]))));
        assert!(revoked.revokes(&stamped(json!("a"))));
        assert!(!revoked.revokes(&stamped(json!(["x"]))));
        assert!(!revoked.revokes(&TaskMessage::default()));
    }
}
