//! Liveness of loops that must never stop.
//!
//! Such a loop has a [`Liveness`] and calls its `tick` once per iteration, also in idle iterations.
//! [`LivenessRegistry::stopped`] lists the loops without a tick within their limit: a loop that hangs in a call, one
//! that has panicked, or a runtime whose threads are all blocked. A server that cannot be reached does not stop a loop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Tick interval of a loop whose iteration may have to wait for longer.
pub const EVERY: Duration = Duration::from_secs(1);

/// All watched loops of a process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct LivenessRegistry {
    all: Arc<Mutex<Vec<Arc<LoopState>>>>,
    grace: Duration,
}

#[derive(Debug)]
struct LoopState {
    name: String,
    limit: Duration,
    began: Instant,
    /// Milliseconds from `began` to the last tick.
    ticked: AtomicU64,
    retired: AtomicBool,
}

/// Handle by which one loop shows that it is alive. Clones are the same handle; the default one does nothing.
///
/// Dropping it does not end the watch, since a loop that panicked has dropped it, too. A loop that ends regularly calls
/// [`Liveness::retire`].
#[derive(Debug, Clone, Default)]
pub struct Liveness(Option<Arc<LoopState>>);

/// Age of a loop's last tick.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reading {
    /// Name of the loop.
    pub name: String,
    /// Time since the last tick of the loop.
    pub since: Duration,
    /// Maximum time between two ticks.
    pub limit: Duration,
}

impl Reading {
    /// Returns true if the loop has stopped.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.since > self.limit
    }
}

impl LivenessRegistry {
    /// Creates a registry whose loops may be late by `grace`, for a host with too few processors.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self {
            all: Arc::default(),
            grace,
        }
    }

    /// Registers a loop; its last tick is now. It counts as stopped once `longest` and the grace have passed without a
    /// tick.
    #[must_use]
    pub fn start(&self, name: impl Into<String>, longest: Duration) -> Liveness {
        let state = Arc::new(LoopState {
            name: name.into(),
            limit: longest.saturating_add(self.grace),
            began: Instant::now(),
            ticked: AtomicU64::new(0),
            retired: AtomicBool::new(false),
        });
        let mut all = self.lock();
        all.retain(|state| !state.retired.load(Ordering::Relaxed));
        all.push(state.clone());
        Liveness(Some(state))
    }

    /// Readings of all loops that have not retired.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let beating = |state: &&Arc<LoopState>| !state.retired.load(Ordering::Relaxed);
        self.lock()
            .iter()
            .filter(beating)
            .map(|state| state.reading())
            .collect()
    }

    /// Readings of the loops that have stopped.
    #[must_use]
    pub fn stopped(&self) -> Vec<Reading> {
        let mut readings = self.readings();
        readings.retain(Reading::has_stopped);
        readings
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<LoopState>>> {
        // No code panics while it holds the lock, and the list would still be consistent.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LoopState {
    fn reading(&self) -> Reading {
        let ticked = Duration::from_millis(self.ticked.load(Ordering::Relaxed));
        Reading {
            name: self.name.clone(),
            since: self.began.elapsed().saturating_sub(ticked),
            limit: self.limit,
        }
    }
}

impl Liveness {
    /// Records that the loop is running.
    pub fn tick(&self) {
        if let Some(state) = &self.0 {
            let now = u64::try_from(state.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            state.ticked.store(now, Ordering::Relaxed);
        }
    }

    /// Ends the watch: the loop has ended regularly.
    pub fn retire(&self) {
        if let Some(state) = &self.0 {
            state.retired.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGES: Duration = Duration::from_secs(3600);
    const NOTHING: Duration = Duration::ZERO;

    fn pass_some_time() {
        std::thread::sleep(Duration::from_millis(5));
    }

    #[test]
    fn a_loop_without_ticks_has_stopped() {
        let registry = LivenessRegistry::default();
        let (idle, busy) = (
            registry.start("idle", NOTHING),
            registry.start("busy", AGES),
        );
        pass_some_time();
        busy.tick();
        // A panic drops the handle in the same way.
        drop(idle);
        let stopped = registry.stopped();
        let names: Vec<_> = stopped.iter().map(|stopped| &*stopped.name).collect();
        assert_eq!(names, ["idle"]);
        assert!(stopped.iter().all(|s| s.since >= Duration::from_millis(5)));
    }

    #[test]
    fn a_tick_resets_the_time() {
        let registry = LivenessRegistry::default();
        let liveness = registry.start("ticks", AGES);
        let age = || registry.readings().first().map(|reading| reading.since);
        pass_some_time();
        let before = age();
        liveness.tick();
        assert!(age() < before, "{:?} {before:?}", age());
    }

    #[test]
    fn a_retired_loop_is_forgotten() {
        let registry = LivenessRegistry::default();
        registry.start("ended", NOTHING).retire();
        pass_some_time();
        assert_eq!(registry.readings(), []);
        let next = registry.start("next", AGES);
        assert_eq!(registry.lock().len(), 1);
        next.tick();
        // A handle without a registry does nothing.
        Liveness::default().tick();
    }
}
