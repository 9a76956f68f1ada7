//! The prefetch window: the number of deliveries of one queue that the worker holds.
//!
//! RabbitMQ fixes a consumer's limit when the consumer is created, and counts all deliveries of the consumer that are
//! not settled. To receive others while some are exempt, a new consumer replaces the old one; the deliveries of the old
//! one stay valid. The new limit is chosen so that the held deliveries, without the exempt ones, and those that may
//! still arrive never exceed the prefetch limit: otherwise a worker with many exempt deliveries would load the whole
//! queue into its memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The unsettled deliveries of one channel.
#[derive(Debug, Default)]
pub(super) struct PrefetchWindow {
    state: Mutex<WindowState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct WindowState {
    /// Number of deliveries that may be held; 0 for no limit.
    target: u32,
    /// Number of the current consumer; earlier consumers receive no deliveries.
    consumer: u32,
    /// Limit of the current consumer. 0 means no limit if `target` is 0, too; otherwise it means that no consumer
    /// exists.
    limit: u32,
    /// Number of unsettled deliveries of the current consumer.
    got: u32,
    /// Number of unsettled deliveries of all consumers.
    held: u32,
    /// Number of exempt deliveries, which do not count.
    exempt: u32,
    /// True if the consumer's limit differs from the one that is needed.
    stale: bool,
}

impl WindowState {
    /// Number of deliveries that count against the limit.
    fn counted(&self) -> u32 {
        self.held.saturating_sub(self.exempt)
    }

    /// Number of deliveries that the consumer may still receive.
    fn coming(&self) -> u32 {
        self.limit.saturating_sub(self.got)
    }
}

impl PrefetchWindow {
    /// Creates a window for `target` deliveries.
    pub(super) fn new(target: u16) -> Arc<Self> {
        let window = Self::default();
        window.lock().target = target.into();
        Arc::new(window)
    }

    /// The limit for a new consumer, if one is needed; 0 for no limit.
    pub(super) fn due(&self) -> Option<u16> {
        let state = self.lock();
        if state.target == 0 {
            return state.stale.then_some(0);
        }
        let room = state.target.saturating_sub(state.counted());
        let due = room > 0 && (state.stale || room > state.coming());
        due.then(|| u16::try_from(room).unwrap_or(u16::MAX))
    }

    /// Returns true if the consumer may continue. False if it must end before a new one is created, because it could
    /// receive more deliveries than allowed.
    pub(super) fn may_go_on(&self) -> bool {
        let state = self.lock();
        !(state.stale && state.target > 0 && state.counted() >= state.target)
    }

    /// Records that a new consumer has replaced the old one. Returns its number.
    pub(super) fn renewed(&self, limit: u16) -> u32 {
        let mut state = self.lock();
        state.consumer += 1;
        state.limit = limit.into();
        state.got = 0;
        state.stale = false;
        state.consumer
    }

    /// Records that the consumer has ended without a replacement.
    pub(super) fn ended(&self) {
        let mut state = self.lock();
        state.consumer += 1;
        state.limit = 0;
        state.got = 0;
        state.stale = false;
    }

    /// Sets the number of deliveries that may be held.
    pub(super) fn set_target(&self, target: u16) {
        let mut state = self.lock();
        if state.target != u32::from(target) {
            state.target = target.into();
            state.stale = true;
        }
    }

    /// Number of unsettled deliveries that are not exempt.
    pub(super) fn counted(&self) -> usize {
        self.lock().counted() as usize
    }

    /// Records that a consumer received a delivery.
    pub(super) fn take(self: &Arc<Self>, consumer: u32) -> PrefetchSlot {
        let mut state = self.lock();
        state.held += 1;
        if state.consumer == consumer {
            state.got += 1;
        }
        PrefetchSlot {
            window: self.clone(),
            consumer,
            exempt: Mutex::new(false),
        }
    }

    /// Returns true if all deliveries are settled.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().held == 0
    }

    /// Waits for a change. An earlier change is not missed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, WindowState> {
        // No code panics while it holds the lock, and the numbers would still be consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slot of one delivery in the window; dropping it frees it.
#[derive(Debug)]
pub(super) struct PrefetchSlot {
    window: Arc<PrefetchWindow>,
    consumer: u32,
    exempt: Mutex<bool>,
}

impl PrefetchSlot {
    pub(super) fn set_exempt(&self, exempt: bool) {
        let mut before = self.exempt.lock().unwrap_or_else(PoisonError::into_inner);
        if *before == exempt {
            return;
        }
        *before = exempt;
        let mut state = self.window.lock();
        match exempt {
            true => state.exempt += 1,
            false => {
                state.exempt -= 1;
                // It counts again, so that one delivery less may arrive.
                state.stale |= state.target > 0 && state.counted() + state.coming() > state.target;
            }
        }
        drop(state);
        self.window.changed.notify_one();
    }
}

impl Drop for PrefetchSlot {
    fn drop(&mut self) {
        let exempt = *self.exempt.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.window.lock();
        state.held -= 1;
        state.exempt -= u32::from(exempt);
        if state.consumer == self.consumer {
            state.got -= 1;
        }
        // When a exempt delivery of the current consumer is settled, the broker may send another one, which the limit
        // does not allow.
        state.stale |=
            exempt && state.target > 0 && state.counted() + state.coming() > state.target;
        drop(state);
        self.window.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A queue with an unlimited number of messages, and a broker that delivers them by the protocol's rules.
    struct Broker {
        window: Arc<PrefetchWindow>,
        held: Vec<(PrefetchSlot, u32)>,
        consumer: u32,
        limit: u16,
    }

    impl Broker {
        fn new(target: u16) -> Self {
            let window = PrefetchWindow::new(target);
            let limit = window.due().unwrap_or(0);
            let consumer = window.renewed(limit);
            Self {
                window,
                held: Vec::new(),
                consumer,
                limit,
            }
        }

        fn deliver(&mut self) {
            let got =
                |held: &[(PrefetchSlot, u32)], of| held.iter().filter(|(_, by)| *by == of).count();
            while got(&self.held, self.consumer) < self.limit.into() {
                let held = self.window.take(self.consumer);
                self.held.push((held, self.consumer));
            }
        }

        fn renew(&mut self) {
            if !self.window.may_go_on() {
                self.window.ended();
                (self.consumer, self.limit) = (u32::MAX, 0);
            }
            if let Some(limit) = self.window.due() {
                self.consumer = self.window.renewed(limit);
                self.limit = limit;
            }
        }

        fn counted(&self) -> usize {
            let exempt =
                |held: &PrefetchSlot| *held.exempt.lock().unwrap_or_else(PoisonError::into_inner);
            self.held.iter().filter(|(held, _)| !exempt(held)).count()
        }
    }

    proptest! {
        /// After any sequence of exempting, counting and settling, the wanted number of deliveries is held, and never
        /// more.
        #[test]
        fn window_limits_the_held_deliveries(
            target in 1_u16..8,
            steps in prop::collection::vec((0_u8..3, any::<prop::sample::Index>()), 0..60),
        ) {
            let mut broker = Broker::new(target);
            broker.deliver();
            for (step, which) in steps {
                let which = which.index(broker.held.len());
                match step {
                    0 => drop(broker.held.swap_remove(which)),
                    1 => broker.held[which].0.set_exempt(true),
                    _ => broker.held[which].0.set_exempt(false),
                }
                broker.renew();
                let before = broker.counted();
                broker.deliver();
                prop_assert_eq!(broker.counted(), before.max(usize::from(target)));
            }
        }
    }

    #[test]
    fn smaller_window_waits_for_free_slots() {
        let mut broker = Broker::new(4);
        broker.deliver();
        broker.window.set_target(2);
        broker.renew();
        broker.deliver();
        assert_eq!(broker.held.len(), 4);
        for expected in [3, 2, 2, 2] {
            broker.held.pop();
            broker.renew();
            broker.deliver();
            assert_eq!(broker.held.len(), expected);
        }
        broker.window.set_target(6);
        broker.renew();
        broker.deliver();
        assert_eq!(broker.held.len(), 6);
    }

    #[test]
    fn deliveries_count_again() {
        let mut broker = Broker::new(2);
        broker.deliver();
        broker.held[0].0.set_exempt(true);
        broker.renew();
        broker.deliver();
        assert_eq!((broker.held.len(), broker.counted()), (3, 2));
        broker.held[0].0.set_exempt(false);
        for expected in [3, 2, 2] {
            broker.renew();
            broker.deliver();
            assert_eq!(broker.counted(), expected);
            broker.held.pop();
        }
    }

    #[test]
    fn zero_means_unlimited() {
        let window = PrefetchWindow::new(0);
        assert_eq!(window.renewed(0), 1);
        window.take(1).set_exempt(true);
        assert_eq!(window.due(), None);
        window.set_target(3);
        assert_eq!(window.due(), Some(3));
    }
}
