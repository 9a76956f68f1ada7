//! Slots for running tasks: their number is the concurrency, which can change while tasks run.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum concurrency: far above a useful value for any host, to limit requests of the remote control.
const MOST: usize = 10_000;

/// Interval of the checks that all slots are free.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// A slot for one running task, free again on drop.
pub(crate) type Slot = OwnedSemaphorePermit;

/// A permit to hold a message, see [`Runtime::permits`](super::runtime::Runtime::permits).
pub(crate) type Permit = OwnedSemaphorePermit;

/// The slots of a worker.
pub(crate) struct Slots {
    permits: Arc<Semaphore>,
    size: AtomicUsize,
}

impl Slots {
    /// Creates `size` free slots.
    pub(crate) fn new(size: usize) -> Self {
        let size = size.clamp(1, MOST);
        Self {
            permits: Arc::new(Semaphore::new(size)),
            size: AtomicUsize::new(size),
        }
    }

    /// The permits: one for each free slot.
    pub(crate) fn permits(&self) -> Arc<Semaphore> {
        self.permits.clone()
    }

    /// Number of slots, free or in use.
    pub(crate) fn size(&self) -> usize {
        self.size.load(Ordering::SeqCst)
    }

    /// Waits for a slot.
    pub(crate) async fn acquire(&self) -> Option<Slot> {
        // Only a closed semaphore returns an error, and this one is never closed.
        self.permits.clone().acquire_owned().await.ok()
    }

    /// Waits until all slots are free. Checks at an interval, since the number can change in the meantime.
    pub(crate) async fn empty(&self) {
        while self.permits.available_permits() < self.size() {
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    /// Adds slots; returns the new number.
    pub(crate) fn grow(&self, n: usize) -> usize {
        self.resize(|size| size.saturating_add(n).min(MOST))
    }

    /// Removes slots: free ones at once, the others when their tasks end. At least one remains. Returns the new number.
    pub(crate) fn shrink(&self, n: usize) -> usize {
        self.resize(|size| size.saturating_sub(n).max(1))
    }

    /// Sets the number of slots.
    pub(crate) fn resize_to(&self, size: usize) {
        self.resize(|_| size.clamp(1, MOST));
    }

    fn resize(&self, to: impl Fn(usize) -> usize) -> usize {
        let before = self
            .size
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |size| Some(to(size)))
            .unwrap_or_else(|size| size);
        let after = to(before);
        if after > before {
            self.permits.add_permits(after - before);
        }
        if let Ok(fewer @ 1..) = u32::try_from(before.saturating_sub(after)) {
            let permits = self.permits.clone();
            tokio::spawn(async move {
                for _ in 0..fewer {
                    if let Ok(permit) = permits.clone().acquire_owned().await {
                        permit.forget();
                    }
                }
            });
        }
        after
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_slot_is_removed_when_its_task_ends() {
        let slots = Slots::new(2);
        let (first, second) = (slots.acquire().await, slots.acquire().await);
        assert_eq!(slots.shrink(1), 1);
        // The removal waits in the queue now, before the next task.
        tokio::task::yield_now().await;
        drop(first);
        let mut next = std::pin::pin!(slots.acquire());
        assert!(futures_util::poll!(&mut next).is_pending());
        tokio::task::yield_now().await;
        assert!(futures_util::poll!(&mut next).is_pending());
        drop(second);
        assert!(next.await.is_some());
        slots.empty().await;
        assert_eq!(slots.shrink(5), 1, "one stays");
        assert_eq!(slots.grow(3), 4);
    }
}
