//! The prefetch window of one queue: the number of deliveries that the worker holds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The unsettled deliveries of one queue.
#[derive(Debug)]
pub(super) struct Window {
    counts: Mutex<Counts>,
    /// Notified when there is more room; shared by the windows of a subscription.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Counts {
    held: usize,
    /// Number of held deliveries that do not count.
    exempt: usize,
}

impl Window {
    pub(super) fn new(changed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self {
            counts: Mutex::default(),
            changed,
        })
    }

    /// Number of deliveries that may be added if the limit is `prefetch`; a limit of 0 means no limit.
    pub(super) fn room(&self, prefetch: u16) -> usize {
        let counts = self.lock();
        match prefetch {
            0 => usize::MAX,
            prefetch => usize::from(prefetch).saturating_sub(counts.held - counts.exempt),
        }
    }

    /// Takes the place of one delivery.
    pub(super) fn take(self: &Arc<Self>) -> WindowSlot {
        self.lock().held += 1;
        WindowSlot {
            window: self.clone(),
            is_exempt: Mutex::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // No code panics while it holds the lock, and the numbers would still be consistent.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one delivery; dropping it frees it.
#[derive(Debug)]
pub(super) struct WindowSlot {
    window: Arc<Window>,
    is_exempt: Mutex<bool>,
}

impl WindowSlot {
    pub(super) fn set_exempt(&self, exempt: bool) {
        let mut before = self
            .is_exempt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *before == exempt {
            return;
        }
        *before = exempt;
        let mut counts = self.window.lock();
        match exempt {
            true => counts.exempt += 1,
            false => counts.exempt -= 1,
        }
        drop(counts);
        self.window.changed.notify_one();
    }
}

impl Drop for WindowSlot {
    fn drop(&mut self) {
        let is_exempt = *self
            .is_exempt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut counts = self.window.lock();
        counts.held -= 1;
        counts.exempt -= usize::from(is_exempt);
        drop(counts);
        self.window.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exempt_deliveries_leave_room() {
        let window = Window::new(Arc::default());
        assert_eq!((window.room(2), window.room(0)), (2, usize::MAX));
        let (first, second) = (window.take(), window.take());
        assert_eq!(window.room(2), 0);
        first.set_exempt(true);
        assert_eq!(window.room(2), 1);
        let third = window.take();
        first.set_exempt(false);
        assert_eq!((window.room(2), window.room(4)), (0, 1));
        drop((first, second, third));
        assert_eq!(window.room(2), 2);
    }
}
