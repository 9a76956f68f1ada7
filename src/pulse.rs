//! Pulses: how a loop that must never stand still shows that it does not.
//!
//! Whoever runs such a loop takes a [`Pulse`] and ticks it once a round, idle rounds too. Whoever
//! asks [`Pulses::stopped`] learns which of them have not ticked for longer than they may: a loop
//! that hangs in a call, one that has panicked, or a runtime whose threads are all stuck. That a
//! server is away stops no loop of this program, so it stops no pulse.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How often a loop that waits for something else should tick.
pub const EVERY: Duration = Duration::from_secs(5);

/// The shortest time after which a loop that ticks [`EVERY`] so often is taken for stopped: several
/// ticks, for a host that is short of processors.
pub const AT_LEAST: Duration = Duration::from_secs(30);

/// All pulses of a process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Pulses(Arc<Mutex<Vec<Arc<Kept>>>>);

#[derive(Debug)]
struct Kept {
    name: String,
    limit: Duration,
    began: Instant,
    /// Milliseconds from `began` to the last tick.
    ticked: AtomicU64,
    at_rest: AtomicBool,
}

/// One loop's pulse. Clones are the same pulse; the default one is nobody's.
///
/// Dropping it is no end: a loop that panicked has dropped its pulse, too. One that ends as it
/// should says so by [`Pulse::rest`].
#[derive(Debug, Clone, Default)]
pub struct Pulse(Option<Arc<Kept>>);

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

impl Pulses {
    /// A new pulse, which has just ticked; it has stopped when it does not tick for `limit`.
    #[must_use]
    pub fn start(&self, name: impl Into<String>, limit: Duration) -> Pulse {
        let kept = Arc::new(Kept {
            name: name.into(),
            limit,
            began: Instant::now(),
            ticked: AtomicU64::new(0),
            at_rest: AtomicBool::new(false),
        });
        let mut all = self.lock();
        all.retain(|kept| !kept.at_rest.load(Ordering::Relaxed));
        all.push(kept.clone());
        Pulse(Some(kept))
    }

    /// How every pulse is that has not come to rest.
    #[must_use]
    pub fn readings(&self) -> Vec<Reading> {
        let beating = |kept: &&Arc<Kept>| !kept.at_rest.load(Ordering::Relaxed);
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
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Pulse {
    /// The loop goes on.
    pub fn tick(&self) {
        if let Some(kept) = &self.0 {
            let now = u64::try_from(kept.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            kept.ticked.store(now, Ordering::Relaxed);
        }
    }

    /// The loop has ended as it should.
    pub fn rest(&self) {
        if let Some(kept) = &self.0 {
            kept.at_rest.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn what_does_not_tick_has_stopped_and_says_since_when() {
        let pulses = Pulses::default();
        let (idle, busy) = (pulses.start("idle", LIMIT), pulses.start("busy", LIMIT));
        tokio::time::advance(LIMIT).await;
        assert_eq!(pulses.stopped(), []);
        busy.tick();
        // As a panic would.
        drop(idle);
        tokio::time::advance(Duration::from_secs(1)).await;
        let stopped = pulses.stopped();
        let stopped: Vec<_> = stopped.iter().map(|s| (&*s.name, s.since)).collect();
        assert_eq!(stopped, [("idle", LIMIT + Duration::from_secs(1))]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_to_rest_is_forgotten() {
        let pulses = Pulses::default();
        pulses.start("ended", LIMIT).rest();
        tokio::time::advance(LIMIT * 2).await;
        assert_eq!(pulses.readings(), []);
        let next = pulses.start("next", LIMIT);
        assert_eq!(pulses.lock().len(), 1);
        next.tick();
        // Nobody's pulse does nothing.
        Pulse::default().tick();
    }
}
