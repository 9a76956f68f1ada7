//! The places that tasks run in: as many as the concurrency, which can change while they do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Largest concurrency; far beyond what a host does well, and a bound to what a request may ask.
const MOST: usize = 10_000;

/// Interval of the checks that all places are free.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A place to run in, given back when it is dropped.
pub(super) type Place = OwnedSemaphorePermit;

/// The places.
pub(super) struct Pool {
    places: Arc<Semaphore>,
    size: AtomicUsize,
}

impl Pool {
    /// A pool of `size` places.
    pub(super) fn new(size: usize) -> Self {
        let size = size.clamp(1, MOST);
        Self {
            places: Arc::new(Semaphore::new(size)),
            size: AtomicUsize::new(size),
        }
    }

    /// Places in all, free or taken.
    pub(super) fn size(&self) -> usize {
        self.size.load(Ordering::SeqCst)
    }

    /// Waits for a place.
    pub(super) async fn place(&self) -> Option<Place> {
        // Only a closed semaphore has none, and this one is never closed.
        self.places.clone().acquire_owned().await.ok()
    }

    /// Waits until no place is taken. Checks at an interval, since the size can change meanwhile.
    pub(super) async fn empty(&self) {
        while self.places.available_permits() < self.size() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Adds places; the new size.
    pub(super) fn grow(&self, n: usize) -> usize {
        self.resize(|size| size.saturating_add(n).min(MOST))
    }

    /// Takes places away, at once those that are free and the others when their tasks end; at
    /// least one stays. The new size.
    pub(super) fn shrink(&self, n: usize) -> usize {
        self.resize(|size| size.saturating_sub(n).max(1))
    }

    fn resize(&self, to: impl Fn(usize) -> usize) -> usize {
        let before = self
            .size
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |size| Some(to(size)))
            .unwrap_or_else(|size| size);
        let after = to(before);
        if after > before {
            self.places.add_permits(after - before);
        }
        if let Ok(fewer @ 1..) = u32::try_from(before.saturating_sub(after)) {
            let places = self.places.clone();
            tokio::spawn(async move {
                for _ in 0..fewer {
                    if let Ok(place) = places.clone().acquire_owned().await {
                        place.forget();
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
    async fn a_taken_place_goes_when_its_task_ends() {
        let pool = Pool::new(2);
        let (first, second) = (pool.place().await, pool.place().await);
        assert_eq!(pool.shrink(1), 1);
        // What takes the place away is in line now, before the next task.
        tokio::task::yield_now().await;
        drop(first);
        let mut next = std::pin::pin!(pool.place());
        assert!(futures_util::poll!(&mut next).is_pending());
        tokio::task::yield_now().await;
        assert!(futures_util::poll!(&mut next).is_pending());
        drop(second);
        assert!(next.await.is_some());
        pool.empty().await;
        assert_eq!(pool.shrink(5), 1, "one stays");
        assert_eq!(pool.grow(3), 4);
    }
}
