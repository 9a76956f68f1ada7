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

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::worker::test_support::identity;

    #[rstest]
    #[case::fits(HEAVY / 2, HEAVY / 2, true)]
    #[case::does_not_fit(HEAVY / 2, HEAVY / 2 + UNIT, false)]
    #[case::part_of_a_unit_counts(HEAVY - UNIT + 1, 1, false)]
    #[case::above_the_budget_runs_alone(usize::MAX, 1, false)]
    #[case::above_the_budget_waits_for_others(1, usize::MAX, false)]
    fn heavy_messages_share_the_budget(
        #[case] first: usize,
        #[case] second: usize,
        #[case] both: bool,
    ) {
        let memory = MemoryBudget::default();
        let (a, b) = (identity("a"), identity("b"));
        let share = memory.take(&a, first);
        assert!(share.is_some());
        assert_eq!(memory.take(&b, second).is_some(), both);
        drop(share);
        assert!(memory.take(&b, second).is_some(), "freed");
    }

    #[rstest]
    #[case::one(1, true)]
    #[case::largest(LIGHT, true)]
    #[case::heavy(LIGHT + 1, false)]
    fn only_light_messages_are_kept_while_they_wait(#[case] weight: usize, #[case] kept: bool) {
        assert_eq!(MemoryBudget::default().keep(weight).is_some(), kept);
    }

    #[test]
    fn waiting_messages_have_a_budget_of_their_own() {
        let memory = MemoryBudget::default();
        let whole = memory.take(&identity("a"), usize::MAX);
        assert!(whole.is_some());
        let mut kept: Vec<_> = (0..WAITING / LIGHT).map(|_| memory.keep(LIGHT)).collect();
        assert!(kept.iter().all(Option::is_some));
        assert!(memory.keep(1).is_none());
        kept.pop();
        assert!(memory.keep(1).is_some());
    }

    #[test]
    fn reserved_share_is_for_one_message() {
        let memory = MemoryBudget::default();
        let (mine, other) = (identity("mine"), identity("other"));
        let Some(share) = memory.take(&mine, usize::MAX) else {
            unreachable!("the budget is free");
        };
        memory.reserve(mine, share);
        assert!(memory.take(&other, 1).is_none());
        assert!(memory.take(&mine, 1).is_some(), "reserved");
        assert!(memory.take(&other, 1).is_some(), "returned");
    }
}
