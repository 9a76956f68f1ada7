//! Memory budget for messages.
//!
//! The prefetch limit counts messages regardless of their size, and does not count messages that wait for their eta.
//! Therefore the memory of decoded messages is limited as well. Most messages are light and not affected. A heavy
//! message is decoded only if the budget has room for it. Otherwise it stays with the broker: its delivery is held without the
//! message, and requeued when the budget has room or the eta is reached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::identity::Identity;

/// Maximum weight of a light message. Only the prefetch limit bounds the number of light messages.
pub(crate) const LIGHT: usize = 256 << 10;

/// Maximum memory of heavy messages, in bytes. A message above this size is processed alone.
const HEAVY: usize = 192 << 20;

/// Maximum memory of light messages that wait for their eta, in bytes.
const WAITING: usize = 64 << 20;

/// Bytes per permit.
const UNIT: usize = 1 << 10;

/// A message's share of the budget, which is returned on drop.
pub(crate) type MemoryShare = OwnedSemaphorePermit;

/// Budget for the memory of messages.
pub(crate) struct MemoryBudget {
    heavy: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Shares for messages that were requeued and will be delivered again.
    reserved: Mutex<HashMap<Identity, MemoryShare>>,
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self {
            heavy: Arc::new(Semaphore::new(HEAVY / UNIT)),
            waiting: Arc::new(Semaphore::new(WAITING / UNIT)),
            reserved: Mutex::default(),
        }
    }
}

impl MemoryBudget {
    /// Takes a share for a heavy message, if one is available now or was reserved for it.
    pub(crate) fn take(&self, identity: &Identity, weight: usize) -> Option<MemoryShare> {
        self.cancel(identity).or_else(|| {
            self.heavy
                .clone()
                .try_acquire_many_owned(units(weight))
                .ok()
        })
    }

    /// Waits for a share for a heavy message.
    pub(crate) async fn wait(&self, weight: usize) -> Option<MemoryShare> {
        // Only a closed semaphore returns an error, and this one is never closed.
        self.heavy
            .clone()
            .acquire_many_owned(units(weight))
            .await
            .ok()
    }

    /// Reserves a share for a message that will be redelivered.
    pub(crate) fn reserve(&self, identity: Identity, share: MemoryShare) {
        self.lock().insert(identity, share);
    }

    /// Removes and returns the share that was reserved for a message.
    pub(crate) fn cancel(&self, identity: &Identity) -> Option<MemoryShare> {
        self.lock().remove(identity)
    }

    /// Takes a share for a light message that waits for its eta, if one is available.
    pub(crate) fn keep(&self, weight: usize) -> Option<MemoryShare> {
        match weight <= LIGHT {
            true => self
                .waiting
                .clone()
                .try_acquire_many_owned(units(weight))
                .ok(),
            false => None,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Identity, MemoryShare>> {
        // No code panics while it holds the lock, and the map would still be consistent.
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn units(weight: usize) -> u32 {
    u32::try_from(weight.min(HEAVY).div_ceil(UNIT)).unwrap_or(u32::MAX)
}
