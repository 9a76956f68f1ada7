//! Publishing the messages of one batch, and the decision whether a queue or the broker fails.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::sleep;

use crate::faults::fault_point;
use crate::transfer::id::TransferId;

/// Number of failures after which a queue receives no more messages in this pass, and after which a batch without any
/// success stops waiting for the rest of its answers.
const MAX_FAILURES_IN_A_ROW: usize = 3;

/// Time limit of a batch for the broker's confirmations: its rows are locked during this time, and on SQLite the whole
/// database.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends the message that starts a transfer.
#[async_trait]
pub trait Submit: Send + Sync {
    /// Prepares for sending, so that no preparation is needed while rows are locked.
    async fn prepare(&self, within: Duration) -> Result<(), SubmitError>;

    /// Sends the message to `queue` and waits for the broker's confirmation. Returns Celery's id of the task.
    async fn submit(
        &self,
        data_transfer_id: TransferId,
        queue: &str,
    ) -> Result<String, SubmitError>;
}

/// A message could not be sent.
#[derive(Debug, thiserror::Error)]
#[error("the message could not be sent")]
pub struct SubmitError {
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
    is_refusal: bool,
}

impl SubmitError {
    /// Creates the error for a message that the broker refuses, for example because the queue is full or missing. Other
    /// queues are not affected.
    pub fn refused(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            source: source.into(),
            is_refusal: true,
        }
    }

    /// Creates the error for a message without an answer of the broker.
    pub fn unanswered(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            source: source.into(),
            is_refusal: false,
        }
    }

    /// Returns true if the broker has answered.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        self.is_refusal
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for SubmitError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::unanswered(lost)
    }
}

/// Outcome of publishing a batch. Messages in neither map were not confirmed in time.
#[derive(Debug, Default)]
pub(super) struct Published {
    /// Celery's ids of the tasks, by transfer.
    pub(super) confirmed: HashMap<TransferId, String>,
    pub(super) failed: HashMap<TransferId, SubmitError>,
}

impl Published {
    fn add(&mut self, (id, sent): (TransferId, Result<String, SubmitError>)) {
        match sent {
            Ok(task_id) => drop(self.confirmed.insert(id, task_id)),
            Err(error) => drop(self.failed.insert(id, error)),
        }
    }

    /// Returns true if the remaining confirmations need not be awaited: the broker does not answer.
    fn should_stop_waiting(&self) -> bool {
        let unanswered = self.failed.values().filter(|error| !error.is_refusal());
        self.confirmed.is_empty() && unanswered.count() >= MAX_FAILURES_IN_A_ROW
    }

    /// Removes and returns the reason why a message was not sent.
    pub(super) fn take_failure(&mut self, id: TransferId) -> SubmitError {
        self.failed.remove(&id).unwrap_or_else(|| {
            SubmitError::unanswered("the broker has not confirmed it; the next pass tries again")
        })
    }
}

/// Sends messages concurrently.
pub(super) async fn publish(
    submit: &dyn Submit,
    ids: Vec<TransferId>,
    queues: &HashMap<TransferId, Arc<str>>,
) -> Published {
    let mut sending: FuturesUnordered<_> = ids
        .into_iter()
        .map(|id| async move {
            let queue = queues.get(&id).map_or("", |queue| queue);
            let sent = fault_point!(ManagerPublished, submit.submit(id, queue).await);
            (id, sent)
        })
        .collect();
    let mut published = Published::default();
    let mut time_is_up = pin!(sleep(CONFIRM_TIMEOUT));
    loop {
        tokio::select! {
            biased;
            next = sending.next() => match next {
                Some(answer) => published.add(answer),
                None => break,
            },
            () = &mut time_is_up => break,
        }
        if published.should_stop_waiting() {
            // Confirmations that have arrived already count.
            while let Some(Some(answer)) = sending.next().now_or_never() {
                published.add(answer);
            }
            if published.should_stop_waiting() {
                break;
            }
        }
    }
    published
}

/// The queues that take no messages in this pass. Failures of one queue do not affect the others: it may be full
/// (`x-overflow=reject-publish`), or lack a majority of its replicas.
#[derive(Debug, Default)]
pub(super) struct QueueFailures {
    /// Failures since the last success.
    failures: HashMap<Arc<str>, usize>,
}

impl QueueFailures {
    pub(super) fn succeeded(&mut self, queue: &str) {
        self.failures.remove(queue);
    }

    pub(super) fn failed(&mut self, queue: &Arc<str>) {
        *self.failures.entry(queue.clone()).or_default() += 1;
    }

    /// Returns true if a queue gets no more messages in this pass.
    pub(super) fn refuses(&self, queue: &str) -> bool {
        self.failures
            .get(queue)
            .is_some_and(|failures| *failures >= MAX_FAILURES_IN_A_ROW)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// A broker that answers by queue.
    struct Broker;

    #[async_trait]
    impl Submit for Broker {
        async fn prepare(&self, _within: Duration) -> Result<(), SubmitError> {
            Ok(())
        }

        async fn submit(&self, id: TransferId, queue: &str) -> Result<String, SubmitError> {
            match queue {
                "full" => Err(SubmitError::refused("full")),
                "away" => Err(SubmitError::unanswered("connection lost")),
                "silent" => std::future::pending().await,
                _ => {
                    // Delay of a round trip.
                    sleep(Duration::from_millis(20)).await;
                    Ok(format!("task-{id}"))
                }
            }
        }
    }

    async fn sent(queues: &[&str]) -> (Vec<i64>, Vec<i64>) {
        let queues = (1..)
            .map(TransferId::new)
            .zip(queues)
            .map(|(id, queue)| (id, Arc::from(*queue)));
        let queues: HashMap<TransferId, Arc<str>> = queues.collect();
        let ids = queues.keys().copied().collect();
        let published = publish(&Broker, ids, &queues).await;
        let number = TransferId::get;
        let mut confirmed: Vec<_> = published.confirmed.into_keys().map(number).collect();
        let mut failed: Vec<_> = published.failed.into_keys().map(number).collect();
        confirmed.sort_unstable();
        failed.sort_unstable();
        (confirmed, failed)
    }

    #[tokio::test]
    async fn refusals_of_one_queue_do_not_end_the_batch() {
        let queues = ["full", "full", "full", "full", "good", "good"];
        assert_eq!(sent(&queues).await, (vec![5, 6], vec![1, 2, 3, 4]));
    }

    #[tokio::test]
    async fn a_timeout_keeps_the_confirmed_messages() {
        let queues = ["silent", "good", "silent", "good"];
        assert_eq!(sent(&queues).await, (vec![2, 4], vec![]));
    }

    #[tokio::test]
    async fn an_absent_broker_is_noticed_at_once() {
        let began = tokio::time::Instant::now();
        let (confirmed, failed) = sent(&["away", "away", "away", "silent"]).await;
        assert_eq!((confirmed, failed.len()), (vec![], 3));
        assert!(began.elapsed() < CONFIRM_TIMEOUT);
    }

    #[test]
    fn a_queue_is_given_up_after_failures_in_a_row() {
        let mut failures = QueueFailures::default();
        let queue: Arc<str> = "a".into();
        for _ in 0..MAX_FAILURES_IN_A_ROW - 1 {
            failures.failed(&queue);
        }
        assert!(!failures.refuses("a"));
        failures.succeeded("a");
        failures.failed(&queue);
        assert!(!failures.refuses("a"));
        for _ in 0..MAX_FAILURES_IN_A_ROW {
            failures.failed(&queue);
        }
        assert!(failures.refuses("a") && !failures.refuses("b"));
    }
}
