//! Work on large values, separate from the threads that all messages share.
//!
//! A few hundred kilobytes of JSON take from a tenth of a second to some seconds to plan, to copy or to write, without
//! interruption. Two such messages at a time, on two threads, would delay every other message, the heartbeats and the
//! remote control. Small values are processed in place.

use serde_json::Value;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;
use tokio::task::block_in_place;

use celery_protocol::weight;

/// Maximum memory of small values, in bytes. Planning signatures can take time and memory that grow with the third
/// power of this size.
const SMALL: usize = 16 << 10;

/// Returns true if work on some values may take long.
pub(super) fn is_large<'v>(values: impl IntoIterator<Item = &'v Value>) -> bool {
    weight::exceeds(values, SMALL)
}

/// Runs synchronous work; if its values are large, other tasks can run in the meantime.
pub(super) fn offload<T>(is_large: bool, work: impl FnOnce() -> T) -> T {
    match is_large {
        true => free_thread(work),
        false => work(),
    }
}

/// Moves the other tasks of this thread to another thread before the work.
fn free_thread<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(work),
        // No other thread exists.
        _ => work(),
    }
}

/// Lock for work that needs much memory: only one at a time.
#[derive(Debug)]
pub(super) struct LargeWorkLock(Semaphore);

impl Default for LargeWorkLock {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

impl LargeWorkLock {
    /// Runs synchronous work like [`offload`], but only one with large values at a time.
    pub(super) async fn work<T: Send>(&self, is_large: bool, work: impl FnOnce() -> T + Send) -> T {
        if !is_large {
            return work();
        }
        // The semaphore is never closed, so a permit becomes available.
        let _place = self.0.acquire().await;
        free_thread(|| on_separate_thread(work))
    }
}

/// Runs work on a separate thread that ends afterwards.
///
/// The C library's allocator has a heap for each thread, and keeps freed memory in it: each thread that has ever
/// processed large values would keep their memory. The heap of a thread that has ended is used for the next one.
pub(super) fn on_separate_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let mut slot = Some(work);
    let done = std::thread::scope(|scope| {
        let work = || slot.take().map(|work| work());
        let thread = std::thread::Builder::new().name("large values".into());
        let running = thread.spawn_scoped(scope, work).ok()?;
        running
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match (done, slot) {
        (Some(done), _) => done,
        // No thread could be started.
        (None, Some(work)) => work(),
        // A panic of the work has been resumed above.
        (None, None) => unreachable!("work that is neither done nor in its slot"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// More calls than threads; each call ends only when another task has run.
    #[test]
    fn other_work_continues_meanwhile() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let large = json!(vec![0; SMALL]);
        runtime.block_on(async {
            let mut ends = Vec::new();
            let mut working = Vec::new();
            for _ in 0..4 {
                let (end, ended) = mpsc::channel();
                let large = large.clone();
                ends.push(end);
                working.push(tokio::spawn(async move {
                    offload(is_large([&large]), move || ended.recv_timeout(LIMIT)).unwrap();
                }));
            }
            tokio::spawn(async move { ends.iter().for_each(|end| end.send(()).unwrap()) });
            for one in working {
                one.await.unwrap();
            }
        });
        runtime.shutdown_background();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_at_a_time() {
        let (large_work, busy) = (
            Arc::new(LargeWorkLock::default()),
            Arc::new(AtomicUsize::new(0)),
        );
        let large = json!(vec![0; SMALL]);
        let working = (0..8).map(|_| {
            let (large_work, busy, large) = (large_work.clone(), busy.clone(), large.clone());
            tokio::spawn(async move {
                let work = || {
                    let others = busy.fetch_add(1, Ordering::SeqCst);
                    std::thread::yield_now();
                    busy.fetch_sub(1, Ordering::SeqCst);
                    others
                };
                large_work.work(is_large([&large]), work).await
            })
        });
        for one in working.collect::<Vec<_>>() {
            assert_eq!(one.await.unwrap(), 0);
        }
    }

    /// This also applies with a single thread.
    #[tokio::test]
    async fn small_work_runs_in_place() {
        assert_eq!(
            LargeWorkLock::default()
                .work(is_large([&json!(1)]), || 2)
                .await,
            2
        );
        assert_eq!(offload(is_large([&json!(vec![0; SMALL])]), || 3), 3);
    }
}
