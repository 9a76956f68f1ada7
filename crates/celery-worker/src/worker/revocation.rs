//! Ids and stamps of tasks that must not run.
//!
//! Both come from the network: their number is limited, as in Celery, and so is their size in bytes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use celery_protocol::message::TaskMessage;

/// Maximum number of remembered entries, and the time that they are kept; Celery's defaults.
const MOST: usize = 50_000;
const FOR: Duration = Duration::from_secs(10_800);

/// Maximum number of bytes of remembered ids, and of stamps: enough for the maximum number of UUIDs.
const MOST_BYTES: usize = 2 << 20;

/// Revoked tasks of this node.
#[derive(Default)]
pub(crate) struct Revoked {
    ids: Mutex<Recent<Arc<str>>>,
    stamps: Mutex<Recent<Arc<Stamp>>>,
}

/// Name and value of a stamped header; the value as JSON.
#[derive(PartialEq, Eq, Hash)]
struct Stamp {
    name: String,
    value: String,
}

/// Most recent entries, without duplicates.
struct Recent<T> {
    known: HashSet<T>,
    /// Entries with their size in bytes, the oldest first.
    order: VecDeque<(Instant, T, usize)>,
    bytes: usize,
    /// Number of entries that were ever added.
    additions: u64,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self {
            known: HashSet::new(),
            order: VecDeque::new(),
            bytes: 0,
            additions: 0,
        }
    }
}

impl<T: Clone + Eq + Hash> Recent<T> {
    fn add(&mut self, item: T, bytes: usize, since: Instant) {
        if bytes <= MOST_BYTES && self.known.insert(item.clone()) {
            self.order.push_back((since, item, bytes));
            self.additions += 1;
            self.bytes += bytes;
            self.forget();
        }
    }

    fn forget(&mut self) {
        while self.order.front().is_some_and(|(since, ..)| {
            self.order.len() > MOST || self.bytes > MOST_BYTES || since.elapsed() > FOR
        }) {
            if let Some((_, item, bytes)) = self.order.pop_front() {
                self.known.remove(&item);
                self.bytes -= bytes;
            }
        }
    }
}

impl Revoked {
    /// Adds ids.
    pub(crate) fn add(&self, ids: impl IntoIterator<Item = String>) {
        with(&self.ids, |known| {
            for id in ids {
                let bytes = id.len();
                known.add(id.into(), bytes, Instant::now());
            }
        });
    }

    /// Adds ids that were revoked some time ago, the oldest first.
    pub(crate) fn restore(&self, ids: impl IntoIterator<Item = (String, Duration)>) {
        let now = Instant::now();
        with(&self.ids, |known| {
            for (id, age) in ids {
                let bytes = id.len();
                if let Some(since) = now.checked_sub(age) {
                    known.add(id.into(), bytes, since);
                }
            }
        });
    }

    /// All ids with the time since their revocation, the oldest first.
    pub(crate) fn with_ages(&self) -> Vec<(String, Duration)> {
        with(&self.ids, |known| {
            let ids = known.order.iter();
            ids.map(|(since, id, _)| (id.to_string(), since.elapsed()))
                .collect()
        })
    }

    /// Number of ids that were ever added.
    pub(crate) fn additions(&self) -> u64 {
        with(&self.ids, |known| known.additions)
    }

    /// Adds stamps: for each header one value or a list of values.
    pub(crate) fn add_stamps(&self, headers: &Map<String, Value>) {
        with(&self.stamps, |known| {
            for (name, values) in headers {
                for value in each(values) {
                    let stamp = Stamp::new(name, value);
                    let bytes = stamp.name.len() + stamp.value.len();
                    known.add(Arc::new(stamp), bytes, Instant::now());
                }
            }
        });
    }

    /// Returns true if a task is revoked.
    pub(crate) fn revokes(&self, message: &TaskMessage) -> bool {
        let by_id = with(&self.ids, |known| known.known.contains(message.id.as_str()));
        by_id
            || with(&self.stamps, |known| {
                // Most workers never receive stamps, and most messages have none.
                !known.known.is_empty()
                    && stamps_of(message).any(|stamp| known.known.contains(&stamp))
            })
    }

    /// All ids, the oldest first.
    pub(crate) fn list(&self) -> Vec<String> {
        with(&self.ids, |known| {
            let ids = known.order.iter().map(|(_, id, _)| id.to_string());
            ids.collect()
        })
    }
}

fn with<K: Clone + Eq + Hash, T>(
    known: &Mutex<Recent<K>>,
    use_them: impl FnOnce(&mut Recent<K>) -> T,
) -> T {
    // No code panics while it holds the lock, and the sets would still be consistent.
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    known.forget();
    use_them(&mut known)
}

/// Stamps of one request.
pub(crate) struct Stamps<'a>(HashMap<&'a str, HashSet<String>>);

impl<'a> Stamps<'a> {
    /// Parses the stamps: for each header one value or a list of values.
    pub(crate) fn of(headers: &'a Map<String, Value>) -> Self {
        let values = |values| each(values).map(Value::to_string).collect();
        let all = headers.iter();
        Self(
            all.map(|(name, all)| (name.as_str(), values(all)))
                .collect(),
        )
    }

    /// Returns true if a message has one of the revoked stamps.
    pub(crate) fn are_on(&self, message: &TaskMessage) -> bool {
        stamps_of(message).any(|stamp| {
            let values = self.0.get(stamp.name.as_str());
            values.is_some_and(|values| values.contains(&stamp.value))
        })
    }
}

impl Stamp {
    fn new(name: &str, value: &Value) -> Self {
        Self {
            name: name.to_owned(),
            value: value.to_string(),
        }
    }
}

/// Stamps of a message.
fn stamps_of(message: &TaskMessage) -> impl Iterator<Item = Stamp> {
    let stamps = message.headers.get("stamps").and_then(Value::as_object);
    stamps
        .into_iter()
        .flatten()
        .flat_map(|(name, values)| each(values).map(|value| Stamp::new(name, value)))
}

/// The elements of a list, or the single value.
fn each(values: &Value) -> impl Iterator<Item = &Value> {
    match values {
        Value::Array(values) => values.iter(),
        one => std::slice::from_ref(one).iter(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn revokes(revoked: &Revoked, id: &str) -> bool {
        revoked.revokes(&TaskMessage {
            id: id.into(),
            ..TaskMessage::default()
        })
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let revoked = Revoked::default();
        revoked.add((0..=MOST).map(|n| n.to_string()));
        revoked.add(["1".to_owned()]);
        assert!(!revokes(&revoked, "0"));
        assert!(revokes(&revoked, "1"));
        assert_eq!(revoked.list().len(), MOST);
    }

    #[test]
    fn long_ids_are_bounded_by_bytes() {
        let revoked = Revoked::default();
        let id = |n: usize| format!("{n:01000}");
        revoked.add((0..MOST).map(id));
        let kept: Vec<String> = revoked.list();
        assert_eq!(kept.len(), MOST_BYTES / 1000);
        assert!(revokes(&revoked, &id(MOST - 1)) && !revokes(&revoked, &id(0)));
        // A stamp that would use the whole limit is ignored.
        revoked.add(["a".repeat(MOST_BYTES + 1)]);
        assert_eq!(revoked.list(), kept);
        // The limit allows the number of UUIDs that Celery remembers.
        const { assert!(MOST * 36 < MOST_BYTES) };
    }

    #[test]
    fn stamps_are_bounded_by_bytes() {
        let revoked = Revoked::default();
        let stamps: Vec<String> = (0..10_000).map(|n| format!("{n:01000}")).collect();
        revoked.add_stamps(&Map::from_iter([("batch".to_owned(), json!(stamps))]));
        let bytes = with(&revoked.stamps, |known| known.bytes);
        assert!((1..=MOST_BYTES).contains(&bytes), "{bytes}");
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
        let headers = Map::from_iter([("batch".to_owned(), json!(["a", "b"]))]);
        revoked.add_stamps(&headers);
        let stamps = Stamps::of(&headers);
        for (message, is) in [
            (stamped(json!(["x", "b"])), true),
            (stamped(json!("a")), true),
            (stamped(json!(["x"])), false),
            (TaskMessage::default(), false),
        ] {
            assert_eq!(revoked.revokes(&message), is);
            assert_eq!(stamps.are_on(&message), is);
        }
    }
}
