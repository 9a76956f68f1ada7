//! Circuit breaker: limits the attempts to use a backend that cannot be reached.
//!
//! Every finished task repeats the storing of its result, and a thousand of them may wait. While the backend is known
//! to be unreachable, only one of them at a time tries it, with a pause before each attempt; the others wait in order.
//! The first success lets all of them continue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

use super::ResultError;
use service_connection::backoff::Backoff;

/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Lets all operations pass while the backend can be reached, and otherwise one at a time.
pub(super) struct CircuitBreaker {
    /// Location of the backend, for messages.
    place: String,
    is_away: AtomicBool,
    /// Lock of the operation that makes the next attempt.
    turn: Mutex<AttemptState>,
}

/// State of the attempts while the backend cannot be reached. No `RetryLoop`: each attempt is the operation of another
/// caller.
struct AttemptState {
    backoff: Backoff,
    not_before: Instant,
}

impl AttemptState {
    fn first() -> Self {
        Self {
            backoff: Backoff::new(PAUSES.0, PAUSES.1),
            not_before: Instant::now(),
        }
    }
}

impl CircuitBreaker {
    pub(super) fn new(place: String) -> Self {
        Self {
            place,
            is_away: AtomicBool::new(false),
            turn: Mutex::new(AttemptState::first()),
        }
    }

    /// Runs `work` once, when it is its turn. Cancel-safe.
    pub(super) async fn pass<T>(
        &self,
        work: impl Future<Output = Result<T, ResultError>>,
    ) -> Result<T, ResultError> {
        if self.is_away.load(Ordering::Relaxed) {
            let mut turn = self.turn.lock().await;
            // An operation that waited before this one may have reached the backend.
            if self.is_away.load(Ordering::Relaxed) {
                sleep_until(turn.not_before).await;
                let done = work.await;
                if is_unreachable(&done) {
                    turn.not_before = Instant::now() + turn.backoff.next_pause();
                } else {
                    *turn = AttemptState::first();
                    self.is_away.store(false, Ordering::Relaxed);
                    tracing::info!(backend = self.place, "result backend reachable again");
                }
                return done;
            }
        }
        let done = work.await;
        if is_unreachable(&done) {
            self.is_away.store(true, Ordering::Relaxed);
        }
        done
    }
}

fn is_unreachable<T>(done: &Result<T, ResultError>) -> bool {
    matches!(done, Err(ResultError::Unreachable { .. }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// A backend that counts concurrent operations.
    #[derive(Default)]
    struct Backend {
        is_up: AtomicBool,
        tries: AtomicUsize,
        at_once: AtomicUsize,
        most_at_once: AtomicUsize,
    }

    impl Backend {
        async fn work(&self) -> Result<(), ResultError> {
            self.tries.fetch_add(1, Ordering::Relaxed);
            let now = self.at_once.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_at_once.fetch_max(now, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.at_once.fetch_sub(1, Ordering::Relaxed);
            match self.is_up.load(Ordering::Relaxed) {
                true => Ok(()),
                false => Err(ResultError::unreachable("test", "away")),
            }
        }
    }

    #[tokio::test]
    async fn one_caller_probes_while_the_others_wait() {
        let breaker = Arc::new(CircuitBreaker::new("test".into()));
        let backend = Arc::new(Backend::default());
        breaker.pass(backend.work()).await.unwrap_err();
        backend.most_at_once.store(0, Ordering::Relaxed);

        let started = Instant::now();
        let waiting: Vec<_> = (0..1000)
            .map(|_| {
                let (breaker, backend) = (breaker.clone(), backend.clone());
                tokio::spawn(async move {
                    while breaker.pass(backend.work()).await.is_err() {}
                    started.elapsed()
                })
            })
            .collect();
        // Pauses of 0.1, 0.2, 0.4 s and so on, with jitter.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(backend.most_at_once.load(Ordering::Relaxed), 1);
        let tries = backend.tries.load(Ordering::Relaxed);
        assert!((2..10).contains(&tries), "{tries} tries in 1 s");

        backend.is_up.store(true, Ordering::Relaxed);
        for waited in waiting {
            let waited = waited.await.unwrap();
            assert!(waited <= Duration::from_secs(4), "{waited:?}");
        }
    }

    #[tokio::test]
    async fn cancelled_probe_does_not_block_the_others() {
        let breaker = CircuitBreaker::new("test".into());
        let backend = Backend::default();
        breaker.pass(backend.work()).await.unwrap_err();
        breaker.pass(backend.work()).await.unwrap_err();
        let given_up =
            tokio::time::timeout(Duration::from_millis(10), breaker.pass(backend.work())).await;
        assert!(given_up.is_err());
        backend.is_up.store(true, Ordering::Relaxed);
        breaker.pass(backend.work()).await.unwrap();
    }
}
