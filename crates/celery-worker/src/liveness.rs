//! LivenessRegistry: how a loop that must never stand still shows that it does not.
//!
//! Whoever runs such a loop takes a [`Liveness`] and ticks it once a round, idle rounds too. Whoever
//! asks [`LivenessRegistry::stopped`] learns which of them have not ticked for longer than they may: a loop
//! that hangs in a call, one that has panicked, or a runtime whose threads are all stuck. That a
//! server is away stops no loop of this program, so it stops no pulse.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a loop ticks that may have to wait for longer.
pub const EVERY: Duration = Duration::from_secs(1);

/// All pulses of a process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct LivenessRegistry {
    all: Arc<Mutex<Vec<Arc<Kept>>>>,
    grace: Duration,
}

#[derive(Debug)]
struct Kept {
    name: String,
    limit: Duration,
    began: Instant,
    /// Milliseconds from `began` to the last tick.
    ticked: AtomicU64,
    retired: AtomicBool,
}

/// One loop's pulse. Clones are the same pulse; the default one is nobody's.
///
/// Dropping it is no end: a loop that panicked has dropped its pulse, too. One that ends as it
/// should says so by [`Liveness::retire`].
#[derive(Debug, Clone, Default)]
pub struct Liveness(Option<Arc<Kept>>);

/// How a pulse is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The loop's name.
    pub name: String,
    /// Time since its last tick.
    pub since: Duration,
    /// How long that may be.
    pub limit: Duration,
}

impl Reading {
    /// Whether the loop stands still.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.since > self.limit
    }
}

impl LivenessRegistry {
    /// LivenessRegistry that may be late by `grace`, for a host that is short of processors.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self {
            all: Arc::default(),
            grace,
        }
    }

    /// A new pulse, which has just ticked. Between two ticks may lie `longest`, and the grace; then
    /// it has stopped.
    #[must_use]
    pub fn start(&self, name: impl Into<String>, longest: Duration) -> Liveness {
        let kept = Arc::new(Kept {
            name: name.into(),
            limit: longest.saturating_add(self.grace),
            began: Instant::now(),
            ticked: AtomicU64::new(0),
            retired: AtomicBool::new(false),
        });
        let mut all = self.lock();
        all.retain(|kept| !kept.retired.load(Ordering::Relaxed));
        all.push(kept.clone());
        Liveness(Some(kept))
    }

    /// How every pulse is that has not come to rest.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let beating = |kept: &&Arc<Kept>| !kept.retired.load(Ordering::Relaxed);
        self.lock()
            .iter()
            .filter(beating)
            .map(|kept| kept.reading())
            .collect()
    }

    /// The pulses that have stopped.
    #[must_use]
    pub fn stopped(&self) -> Vec<Reading> {
        let mut readings = self.readings();
        readings.retain(Reading::has_stopped);
        readings
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Kept>>> {
        // No code panics while it holds the lock, and the list would still be whole.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
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
    /// The loop goes on.
    pub fn tick(&self) {
        if let Some(kept) = &self.0 {
            let now = u64::try_from(kept.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            kept.ticked.store(now, Ordering::Relaxed);
        }
    }

    /// The loop has ended as it should.
    pub fn retire(&self) {
        if let Some(kept) = &self.0 {
            kept.retired.store(true, Ordering::Relaxed);
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
    fn what_does_not_tick_has_stopped_and_says_since_when() {
        let pulses = LivenessRegistry::default();
        let (idle, busy) = (pulses.start("idle", NOTHING), pulses.start("busy", AGES));
        pass_some_time();
        busy.tick();
        // As a panic would.
        drop(idle);
        let stopped = pulses.stopped();
        let names: Vec<_> = stopped.iter().map(|stopped| &*stopped.name).collect();
        assert_eq!(names, ["idle"]);
        assert!(stopped.iter().all(|s| s.since >= Duration::from_millis(5)));
    }

    #[test]
    fn a_tick_begins_the_time_anew() {
        let pulses = LivenessRegistry::default();
        let pulse = pulses.start("ticks", AGES);
        let age = || pulses.readings().first().map(|reading| reading.since);
        pass_some_time();
        let before = age();
        pulse.tick();
        assert!(age() < before, "{:?} {before:?}", age());
    }

    #[test]
    fn what_has_come_to_rest_is_forgotten() {
        let pulses = LivenessRegistry::default();
        pulses.start("ended", NOTHING).retire();
        pass_some_time();
        assert_eq!(pulses.readings(), []);
        let next = pulses.start("next", AGES);
        assert_eq!(pulses.lock().len(), 1);
        next.tick();
        // Nobody's pulse does nothing.
        Liveness::default().tick();
    }
}
