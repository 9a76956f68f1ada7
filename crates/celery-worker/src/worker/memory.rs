//! Memory for messages.
//!
//! The prefetch limit counts messages regardless of their size, and does not count messages that wait for
//! their time. So the memory of decoded messages is limited as well. Most messages are light and are not
//! affected. A heavy message is decoded only when there is room for it. Otherwise it stays with the broker:
//! its delivery is held without the message, and returned when there is room for it or its time has
//! come.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::identity::Identity;

/// Maximum weight of a light message. Only the prefetch limit bounds the number of light messages.
pub(crate) const LIGHT: usize = 256 << 10;

/// Maximum memory of heavy messages that are held at a time, in bytes. A heavier message is held alone.
const HEAVY: usize = 192 << 20;

/// Maximum memory of light messages that wait for their time, in bytes.
const WAITING: usize = 64 << 20;

/// Bytes per permit.
const UNIT: usize = 1 << 10;

/// A message's part of the room. Dropping it returns the part.
pub(crate) type MemoryShare = OwnedSemaphorePermit;

/// MemoryBudget for messages in memory.
pub(crate) struct MemoryBudget {
    heavy: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// MemoryBudget that is kept for messages that were returned and will be delivered again.
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
    /// MemoryBudget for a heavy message, if there is any now or was reserved for it.
    pub(crate) fn take(&self, identity: &Identity, weight: usize) -> Option<MemoryShare> {
        self.cancel(identity).or_else(|| {
            self.heavy
                .clone()
                .try_acquire_many_owned(units(weight))
                .ok()
        })
    }

    /// Waits for room for a heavy message.
    pub(crate) async fn wait(&self, weight: usize) -> Option<MemoryShare> {
        // Only a closed semaphore fails, and this one is never closed.
        self.heavy
            .clone()
            .acquire_many_owned(units(weight))
            .await
            .ok()
    }

    /// Keeps room for a message that comes again.
    pub(crate) fn reserve(&self, identity: Identity, share: MemoryShare) {
        self.lock().insert(identity, share);
    }

    /// Removes and returns the room that was reserved for a message.
    pub(crate) fn cancel(&self, identity: &Identity) -> Option<MemoryShare> {
        self.lock().remove(identity)
    }

    /// MemoryBudget for a light message that waits for its time, if there is any.
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
        // No code panics while it holds the lock, and the map would still be whole.
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn units(weight: usize) -> u32 {
    u32::try_from(weight.min(HEAVY).div_ceil(UNIT)).unwrap_or(u32::MAX)
}
