//! Probes: questions to servers on behalf of monitors.
//!
//! A probe runs at most once at a time, its result is cached for some seconds, and no monitor waits longer than
//! [`PROBE_TIMEOUT`], however many monitors ask and however slow the server is.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

/// Longest wait for a result.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// A result is cached for at least this multiple of its latency, so that a server spends no more than a twentieth of
/// its time on probes.
const SHARE: u32 = 20;

/// Longest time that a failure is cached, so that a recovery is seen soon.
const MAX_FAILURE_AGE: Duration = Duration::from_secs(2);

type Answer = Result<(), String>;
type Asking = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A question to a server, with a cached result.
pub struct Probe {
    name: &'static str,
    valid_for: Duration,
    within: Duration,
    ask: Box<dyn Fn() -> Asking + Send + Sync>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

struct State {
    answer: Answer,
    /// Time until which `answer` is valid.
    holds: Option<Instant>,
    asked: Option<(Instant, AbortOnDropHandle<Answer>)>,
}

impl Probe {
    /// Creates a probe that calls `ask`, whose result is cached for `valid_for`. The error of `ask` is the reason of
    /// the failure.
    pub fn new<F>(
        name: &'static str,
        valid_for: Duration,
        ask: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Answer> + Send + 'static,
    {
        Self {
            name,
            valid_for,
            within: PROBE_TIMEOUT,
            ask: Box::new(move || Box::pin(ask())),
            state: Mutex::new(State {
                answer: Ok(()),
                holds: None,
                asked: None,
            }),
        }
    }

    /// Name of the server.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the result, new or cached. A run that takes longer than [`PROBE_TIMEOUT`] continues, and the next call
    /// waits for it.
    ///
    /// # Errors
    /// The reason of the failure, or a text that there was no answer in time.
    pub async fn answer(&self) -> Answer {
        timeout(self.within, self.fetch())
            .await
            .unwrap_or_else(|_| {
                let within = humantime::format_duration(self.within);
                Err(format!("no answer within {within}"))
            })
    }

    /// Cancel-safe: a run in progress is kept.
    async fn fetch(&self) -> Answer {
        let mut state = self.state.lock().await;
        if state.asked.is_none() && state.holds.is_some_and(|until| Instant::now() < until) {
            return state.answer.clone();
        }
        let (since, asked) = state.asked.get_or_insert_with(|| {
            let asking = tokio::spawn((self.ask)());
            (Instant::now(), AbortOnDropHandle::new(asking))
        });
        let answer = asked
            .await
            .unwrap_or_else(|_| Err("the question itself has failed".into()));
        let now = Instant::now();
        let took = now.duration_since(*since);
        state.asked = None;
        let holds = match answer {
            Ok(()) => self.valid_for.max(took * SHARE),
            Err(_) => self.valid_for.min(MAX_FAILURE_AGE),
        };
        state.holds = Some(now + holds);
        state.answer = answer.clone();
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const AGES: Duration = Duration::from_secs(3600);

    /// A probe that succeeds, or fails with the number of calls, and the counter of the calls.
    fn counting(takes: Duration, valid_for: Duration, well: bool) -> (Probe, Arc<AtomicU32>) {
        let count = Arc::new(AtomicU32::new(0));
        let asked = count.clone();
        let probe = Probe::new("test", valid_for, move || {
            let n = asked.fetch_add(1, Ordering::Relaxed) + 1;
            async move {
                tokio::time::sleep(takes).await;
                if well { Ok(()) } else { Err(n.to_string()) }
            }
        });
        let within = AGES;
        (Probe { within, ..probe }, count)
    }

    #[tokio::test]
    async fn successful_answer_is_shared_while_it_is_valid() {
        let (probe, count) = counting(Duration::from_millis(1), AGES, true);
        let (one, two) = tokio::join!(probe.answer(), probe.answer());
        assert_eq!((one, two), (Ok(()), Ok(())));
        assert_eq!(probe.answer().await, Ok(()));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn failed_answer_is_valid_for_a_short_time() {
        let (probe, _) = counting(Duration::ZERO, AGES, false);
        assert_eq!(probe.answer().await, Err("1".into()));
        assert_eq!(probe.answer().await, Err("1".into()));
        tokio::time::sleep(MAX_FAILURE_AGE).await;
        assert_eq!(probe.answer().await, Err("2".into()));
    }

    #[tokio::test]
    async fn callers_wait_a_limited_time_for_one_shared_query() {
        let takes = Duration::from_millis(300);
        let (mut probe, count) = counting(takes, Duration::ZERO, true);
        probe.within = Duration::from_millis(50);
        for _ in 0..2 {
            assert_eq!(probe.answer().await, Err("no answer within 50ms".into()));
        }
        // The first run continues, and the next call returns its result.
        tokio::time::sleep(takes).await;
        assert_eq!(probe.answer().await, Ok(()));
        // A slow result is cached for longer: 20 times 300 ms.
        assert_eq!(probe.answer().await, Ok(()));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
