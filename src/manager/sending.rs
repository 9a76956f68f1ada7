//! Sending of the messages of a pass: the selected transfers are scheduled in batches, each in one transaction, until the
//! broker does not answer.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::publish::{Published, QueueFailures, SubmitError, publish};
use super::{Assignment, Manager, Pass, RefusedTransfer};
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::repository::Candidate;
use service_connection::error_chain::chain;

/// Time limit for connecting to the broker, which is done before a pass locks rows.
const BROKER_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of rows in one transaction. It depends on the duration of the previous batch.
const BATCH: BatchSize = BatchSize {
    least: 10,
    first: 50,
    most: 200,
    quick: Duration::from_millis(250),
    slow: Duration::from_millis(500),
};

/// Answers of the broker since the start of the pass.
#[derive(Debug, Default)]
pub(super) struct PassProgress {
    queues: QueueFailures,
    /// Set if no message of the previous batch was confirmed, and at least one had no answer.
    silence: Option<SubmitError>,
    /// Set if the broker does not answer; no further message is sent then.
    pub(super) broken: Option<SubmitError>,
}

impl PassProgress {
    /// Records the result of a batch. If no message was confirmed, the queues may be the cause; after a second such
    /// batch, the broker counts as unreachable.
    fn record_batch(&mut self, has_success: bool, unanswered: Option<SubmitError>) {
        let before = self.silence.take();
        match unanswered {
            Some(error) if !has_success && before.is_some() => self.broken = Some(error),
            Some(error) if !has_success => self.silence = Some(error),
            _ => {}
        }
    }
}

impl Manager {
    /// Schedules the selected transfers in batches. Ends early if the broker does not answer.
    pub(super) async fn send(
        &self,
        selected: Vec<Candidate>,
        pass: &mut Pass,
        sending: &mut PassProgress,
        verbose: bool,
    ) -> Result<(), DatabaseError> {
        let mut selected = VecDeque::from(selected);
        if !selected.is_empty() {
            sending.broken = self.submit.prepare(BROKER_TIMEOUT).await.err();
        }
        let mut size = BATCH.first;
        while sending.broken.is_none() && !selected.is_empty() {
            let batch: Vec<_> = selected.drain(..size.min(selected.len())).collect();
            let began = Instant::now();
            self.schedule(batch, pass, sending, verbose).await?;
            size = BATCH.next(size, began.elapsed());
            selected = pass.without_refused_queues(selected, &sending.queues);
        }
        // The last batch may have been the only one.
        if pass.scheduled.is_empty() && sending.broken.is_none() {
            sending.broken = sending.silence.take();
        }
        Ok(())
    }

    /// Schedules a batch. If the database refuses it, splits it until only the refused row is left out.
    async fn schedule(
        &self,
        batch: Vec<Candidate>,
        pass: &mut Pass,
        sending: &mut PassProgress,
        verbose: bool,
    ) -> Result<(), DatabaseError> {
        let mut parts = vec![batch];
        while let Some(mut batch) = parts.pop() {
            self.liveness.tick();
            match self.schedule_at_once(&batch, pass, sending, verbose).await {
                Ok(()) if sending.broken.is_some() => return Ok(()),
                Ok(()) => {}
                Err(error) if error.is_unreachable() => return Err(error),
                Err(error) => match &batch[..] {
                    [transfer] => pass.refuse(transfer.id, chain(&error).to_string()),
                    // One refused row must not prevent the others from being scheduled.
                    _ => {
                        parts.push(batch.split_off(batch.len() / 2));
                        parts.push(batch);
                    }
                },
            }
        }
        Ok(())
    }

    async fn schedule_at_once(
        &self,
        candidates: &[Candidate],
        pass: &mut Pass,
        sending: &mut PassProgress,
        verbose: bool,
    ) -> Result<(), DatabaseError> {
        let queues: HashMap<_, _> = candidates
            .iter()
            .map(|transfer| (transfer.id, transfer.queue.clone()))
            .collect();
        let failures = Mutex::new(Published::default());
        let publishing = |ids: Vec<TransferId>| async {
            let mut published = publish(&*self.submit, ids, &queues).await;
            let confirmed = std::mem::take(&mut published.confirmed);
            *failures.lock().unwrap_or_else(PoisonError::into_inner) = published;
            confirmed
        };
        let done = fault_point!(
            ManagerCommitted,
            self.repository.schedule(candidates, publishing).await
        )?;
        let mut failures = failures
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        pass.taken += done.taken.len();
        pass.held_back += done.held_back.len() as u64;
        let queue_of = |id: &TransferId| queues.get(id).cloned().unwrap_or_default();
        for data_transfer_id in &done.scheduled {
            let queue = &*queue_of(data_transfer_id);
            if verbose {
                tracing::info!(
                    data_transfer_id = data_transfer_id.get(),
                    queue,
                    "transfer scheduled"
                );
            } else {
                tracing::debug!(
                    data_transfer_id = data_transfer_id.get(),
                    queue,
                    "transfer scheduled"
                );
            }
            sending.queues.succeeded(queue);
            pass.scheduled.push(Assignment {
                data_transfer_id: *data_transfer_id,
                queue: queue.to_owned(),
            });
        }
        let mut unanswered = None;
        for id in &done.unpublished {
            let error = failures.take_failure(*id);
            pass.refuse(*id, chain(&error).to_string());
            sending.queues.failed(&queue_of(id));
            if !error.is_refusal() {
                unanswered = Some(error);
            }
        }
        sending.record_batch(!done.scheduled.is_empty(), unanswered);
        Ok(())
    }
}

impl Pass {
    /// Removes transfers whose queue accepts no messages.
    fn without_refused_queues(
        &mut self,
        selected: VecDeque<Candidate>,
        queues: &QueueFailures,
    ) -> VecDeque<Candidate> {
        let mut left_out: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        let (refused, left): (Vec<_>, Vec<_>) = selected
            .into_iter()
            .partition(|transfer| queues.refuses(&transfer.queue));
        for transfer in refused {
            *left_out.entry(transfer.queue).or_default() += 1;
            self.refused.push(RefusedTransfer {
                data_transfer_id: transfer.id,
                reason: "its queue accepts no messages; the next pass tries again".into(),
            });
        }
        for (queue, transfers) in left_out {
            tracing::error!(
                queue = &*queue,
                transfers,
                "queue accepts no messages; its other transfers stay PENDING"
            );
        }
        left.into()
    }
}

/// Maximum number of rows that are locked at the same time.
struct BatchSize {
    least: usize,
    first: usize,
    most: usize,
    quick: Duration,
    slow: Duration,
}

impl BatchSize {
    /// Returns the size of the next batch after one of `size` rows that took `took`.
    fn next(&self, size: usize, took: Duration) -> usize {
        if took < self.quick {
            (size * 2).min(self.most)
        } else if took > self.slow {
            (size / 2).max(self.least)
        } else {
            size
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn batch_size_follows_its_duration() {
        let sizes = |took: u64, first| {
            let mut sizes = vec![first];
            for _ in 0..6 {
                let last = sizes.last().copied().unwrap();
                sizes.push(BATCH.next(last, Duration::from_millis(took)));
            }
            sizes
        };
        assert_eq!(sizes(20, 50), [50, 100, 200, 200, 200, 200, 200]);
        assert_eq!(sizes(300, 50), [50; 7]);
        assert_eq!(sizes(900, 200), [200, 100, 50, 25, 12, 10, 10]);
    }
}
