//! Rate limits: the number of tasks of one name that may start per unit of time on this worker.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::task::RateLimit;

/// The limits of a worker's tasks, by name.
#[derive(Default)]
pub(crate) struct RateLimits(Mutex<HashMap<String, Arc<RateLimiter>>>);

/// Starts the tasks of one name at their rate, in the order of their arrival.
struct RateLimiter {
    limit: watch::Sender<Option<RateLimit>>,
    /// Start of the last task. The lock is fair: the task that waits longest is next.
    last: tokio::sync::Mutex<Option<Instant>>,
}

impl RateLimits {
    /// Sets or removes a task's limit, also for waiting tasks.
    pub(crate) fn set(&self, task: &str, limit: Option<RateLimit>) {
        self.limiter(task).limit.send_replace(limit);
    }

    /// Returns a task's limit.
    pub(crate) fn get(&self, task: &str) -> Option<RateLimit> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(task).and_then(|limiter| *limiter.limit.borrow())
    }

    /// Waits until a task may start.
    pub(crate) async fn pass(&self, task: &str) {
        let limiter = {
            // No code panics while it holds the lock, and the map would still be consistent.
            let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match known.get(task) {
                Some(limiter) => limiter.clone(),
                None => return,
            }
        };
        let mut last = limiter.last.lock().await;
        let mut limit = limiter.limit.subscribe();
        loop {
            let Some(rate) = *limit.borrow_and_update() else {
                break;
            };
            let due = last.and_then(|last| last.checked_add(rate.interval()));
            let Some(due) = due.filter(|due| *due > Instant::now()) else {
                break;
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                _ = limit.changed() => {}
            }
        }
        *last = Some(Instant::now());
    }

    fn limiter(&self, task: &str) -> Arc<RateLimiter> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(RateLimiter {
                limit: watch::Sender::new(None),
                last: tokio::sync::Mutex::new(None),
            })
        };
        known.entry(task.to_owned()).or_insert_with(new).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rates_are_read_as_celery_reads_them() {
        let interval = |text: &str| text.parse::<RateLimit>().map(RateLimit::interval);
        assert_eq!(interval("2/s"), Ok(Duration::from_millis(500)));
        assert_eq!(interval("10/m"), Ok(Duration::from_secs(6)));
        assert_eq!(interval("1/h"), Ok(Duration::from_secs(3600)));
        assert_eq!(interval("4"), Ok(Duration::from_millis(250)));
        for bad in ["", "x", "1/d", "-1/s", "0/s", "inf", "nan/m"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn tasks_pass_one_interval_apart() {
        let limits = RateLimits::default();
        limits.set("t", "50/s".parse().ok());
        let begin = Instant::now();
        for _ in 0..5 {
            limits.pass("t").await;
            limits.pass("other").await;
        }
        assert!(begin.elapsed() >= Duration::from_millis(80));
    }

    #[tokio::test]
    async fn new_limit_applies_to_waiting_tasks() {
        let limits = RateLimits::default();
        limits.set("t", "1/h".parse().ok());
        limits.pass("t").await;
        let mut waiting = std::pin::pin!(limits.pass("t"));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        limits.set("t", None);
        waiting.await;
    }
}
