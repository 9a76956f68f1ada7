//! Ended tasks whose deliveries could not be settled.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::broker::Disposition;
use crate::worker::identity::Identity;

/// Maximum number of remembered tasks: as many as can end while a broker is away.
const MOST: usize = 10_000;

/// Time for which a task is remembered. It includes the outage of the broker.
const FOR: Duration = Duration::from_secs(24 * 3600);

/// Dispositions of ended tasks. The broker may deliver their messages again, which must not run again.
#[derive(Default)]
pub(super) struct Ended(HashMap<Identity, (Disposition, Instant)>);

impl Ended {
    /// Adds a task that ends now. A full collection forgets those that are too old, and adds no other.
    pub(super) fn add(&mut self, identity: Identity, disposition: Disposition) {
        if self.0.len() >= MOST {
            self.0.retain(|_, (_, since)| since.elapsed() < FOR);
        }
        // A message that was requeued is to run again.
        if self.0.len() < MOST && disposition != Disposition::Requeue {
            self.0.insert(identity, (disposition, Instant::now()));
        }
    }

    /// Returns the disposition of a task.
    pub(super) fn get(&self, identity: &Identity) -> Option<Disposition> {
        let (disposition, since) = self.0.get(identity)?;
        (since.elapsed() < FOR).then_some(*disposition)
    }

    /// Removes a task whose deliveries are settled.
    pub(super) fn remove(&mut self, identity: &Identity) {
        self.0.remove(identity);
    }
}
