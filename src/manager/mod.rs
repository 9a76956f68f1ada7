//! The manager: schedules PENDING transfers, and recovers transfers whose worker or message was lost.
//!
//! A row becomes SCHEDULED in the transaction in which the broker confirms its message, so no row becomes SCHEDULED
//! without a message. If the message is lost later, `reconcile` finds the row and sends another message. The opposite,
//! a message whose row is still PENDING, can exist after a crash between the confirmation and the commit. It does no
//! harm: a worker accepts a PENDING row as well, and a second message finds the transfer completed.
//!
//! A pass first reads all transfers that have not ended, without a lock. It counts the active transfers of each link,
//! and selects as many PENDING transfers as the limit of the link allows. Links of a higher priority come first, links
//! of the same priority take turns, and the oldest transfer of a link is the first. The selected transfers are
//! scheduled in batches. A batch is one transaction, and its messages are sent concurrently.
//!
//! Several managers may run at the same time, for all sites or for some. Row locks prevent two of them from
//! scheduling the same transfer, and the locks of the links' rows prevent them from exceeding a limit together.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::publish::{Published, QueueFailures, publish};
use self::survey::{Selected, Survey};
use crate::faults::{fault_point, hang_point};
use crate::metrics::{ManagerMetrics, PassCounts};
use crate::settings::Settings;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::repository::{Repository, ScanCursor, TransferEnd};
use celery_worker::liveness::Liveness;
use service_connection::error_chain::chain;

mod publish;
mod reconcile;
mod recovery;
mod survey;

pub use publish::{Submit, SubmitError};
pub use reconcile::{FindError, FindMessages, HeldMessages, is_overdue, search_delay};
pub use recovery::{max_sweep_duration, recover, sweep_loop};

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

/// Schedules transfers.
pub struct Manager {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    submit: Arc<dyn Submit>,
    find: Option<Arc<dyn FindMessages>>,
    /// Result of the previous scan, and the time of the last full scan.
    cursor: Mutex<Option<(ScanCursor, Instant)>>,
    liveness: Liveness,
    metrics: Option<ManagerMetrics>,
}

/// Result of one pass.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Pass {
    /// Transfers whose message was sent.
    pub scheduled: Vec<Assignment>,
    /// Number of transfers that another manager has scheduled in the meantime.
    pub taken: usize,
    /// Transfers that stay PENDING, with the reason.
    pub refused: Vec<RefusedTransfer>,
    /// Transfers whose worker has died; they are PENDING again.
    pub recovered: Vec<TransferId>,
    /// Transfers whose message was lost; they are PENDING again, and are sent again if their link allows it.
    pub resent: Vec<TransferId>,
    /// Number of transfers that are SCHEDULED for longer than `manager.reconcile_after` and that no worker has taken.
    pub overdue: usize,
    /// Number of PENDING transfers whose delay after a failure has not passed.
    pub waiting: u64,
    /// Number of PENDING transfers that wait for their link: its limit is reached, or it is paused.
    pub held_back: u64,
}

/// A scheduled transfer, and the queue of its message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assignment {
    /// The transfer.
    pub data_transfer_id: TransferId,
    /// The queue.
    pub queue: String,
}

/// A transfer that could not be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RefusedTransfer {
    /// The transfer.
    pub data_transfer_id: TransferId,
    /// The reason.
    pub reason: String,
}

/// A pass that could not continue.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The database cannot be reached, or refuses a statement.
    #[error("waiting transfers could not be read or scheduled")]
    Database(#[from] DatabaseError),
    /// The broker does not accept messages. Rows without a message stay PENDING.
    #[error("messages could not be sent; their transfers stay PENDING")]
    Broker(#[source] SubmitError),
}

impl Manager {
    /// Creates a manager that sends messages with `submit`.
    #[must_use]
    pub fn new(
        repository: Repository,
        settings: Arc<Settings>,
        owner: Owner,
        submit: Arc<dyn Submit>,
    ) -> Self {
        Self {
            repository,
            settings,
            owner,
            submit,
            find: None,
            cursor: Mutex::new(None),
            liveness: Liveness::default(),
            metrics: None,
        }
    }

    /// Adds the search for lost messages, which counts the existing messages with `find`.
    #[must_use]
    pub fn reconciling(self, find: Arc<dyn FindMessages>) -> Self {
        Self {
            find: Some(find),
            ..self
        }
    }

    /// Adds a liveness that ticks at each step of a pass, and metrics of the passes.
    #[must_use]
    pub fn with_monitoring(self, liveness: Liveness, metrics: ManagerMetrics) -> Self {
        Self {
            liveness,
            metrics: Some(metrics),
            ..self
        }
    }

    /// Maximum time between two ticks of the liveness: the pause between two passes and one step.
    #[must_use]
    pub fn max_tick_interval(settings: &Settings) -> Duration {
        settings.manager.sleep_time + max_sweep_duration(settings)
    }

    /// Makes passes with pauses between them until `stop` is cancelled. A failed pass is logged, and the next one tries
    /// again.
    pub async fn transfer_manager_service(&self, stop: &CancellationToken) {
        let pause = self.settings.manager.sleep_time;
        tracing::info!(sleep_s = pause.as_secs_f64(), "manager ready");
        loop {
            self.liveness.tick();
            tokio::select! {
                () = stop.cancelled() => break,
                pass = self.pass_with_metrics() => {
                    self.liveness.tick();
                    if let Err(error) = pass {
                        tracing::warn!(error = %chain(&error), "pass failed; the next one tries again");
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.liveness.retire();
        tracing::info!("manager stopped");
    }

    async fn pass_with_metrics(&self) -> Result<Pass, ManagerError> {
        hang_point!(ManagerLoop);
        let began = Instant::now();
        let pass = self.transfer_transfer_packages(false).await;
        if let Some(metrics) = &self.metrics {
            let did = pass.as_ref().ok().map(|pass| PassCounts {
                scheduled: pass.scheduled.len(),
                refused: pass.refused.len(),
                recovered: pass.recovered.len(),
                resent: pass.resent.len(),
                overdue: pass.overdue,
            });
            metrics.pass(began.elapsed(), did);
        }
        pass
    }

    /// Makes one pass: recovers transfers of dead workers, and schedules each PENDING transfer that is due and whose
    /// link has not reached its limit. With `verbose`, each scheduled row is logged.
    ///
    /// # Errors
    /// [`ManagerError`]. A single row that cannot be scheduled is not an error but a [`RefusedTransfer`].
    pub async fn transfer_transfer_packages(&self, verbose: bool) -> Result<Pass, ManagerError> {
        let mut pass = Pass {
            recovered: self.recover().await?,
            ..Pass::default()
        };
        let mut sending = PassProgress::default();
        let survey = self.survey(&mut pass).await?;
        let (selected, scheduled) = (survey.selected, survey.scheduled);
        self.send(selected, &mut pass, &mut sending, verbose)
            .await?;
        // Without an answer of the broker, the existing messages cannot be counted.
        if sending.broken.is_none() {
            let lost = self.reconcile(scheduled, &mut pass).await?;
            self.send_again(&lost, &mut pass, &mut sending, verbose)
                .await?;
        }
        tracing::info!(
            scheduled = pass.scheduled.len(),
            refused = pass.refused.len(),
            taken = pass.taken,
            recovered = pass.recovered.len(),
            resent = pass.resent.len(),
            overdue = pass.overdue,
            waiting = pass.waiting,
            held_back = pass.held_back,
            "pass finished"
        );
        match sending.broken {
            Some(error) => Err(ManagerError::Broker(error)),
            None => Ok(pass),
        }
    }

    /// Schedules the rows `lost`, which this pass has set to PENDING because their message was lost.
    async fn send_again(
        &self,
        lost: &HashSet<TransferId>,
        pass: &mut Pass,
        sending: &mut PassProgress,
        verbose: bool,
    ) -> Result<(), DatabaseError> {
        if lost.is_empty() {
            return Ok(());
        }
        let mut survey_pass = Pass::default();
        let mut selected = self.survey(&mut survey_pass).await?.selected;
        (pass.waiting, pass.held_back) = (survey_pass.waiting, survey_pass.held_back);
        // A row that was refused in this pass is not tried a second time.
        selected.retain(|transfer| lost.contains(&transfer.candidate.id));
        self.send(selected, pass, sending, verbose).await
    }

    /// Schedules the selected transfers in batches. Ends early if the broker does not answer.
    async fn send(
        &self,
        selected: Vec<Selected>,
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

    /// Makes the transfers of dead workers PENDING.
    ///
    /// # Errors
    /// The database reported an error.
    pub async fn recover(&self) -> Result<Vec<TransferId>, DatabaseError> {
        recover(&self.repository, &self.owner, &self.liveness).await
    }

    /// Reads the transfers to schedule in this pass, in order, and those that are SCHEDULED.
    async fn survey(&self, pass: &mut Pass) -> Result<ScanResult, DatabaseError> {
        // The links are read before the active transfers are counted, see `Allowance::issued`.
        let links = self.repository.links().await?;
        let locations = self.repository.transfer_ends().await?;
        let now = self.repository.database().now().await?;
        let sites = &self.settings.manager.sites;
        let origins: Option<Vec<_>> = (!sites.is_empty()).then(|| {
            let is_ours = |place: &TransferEnd| sites.contains(&place.site);
            let ours = locations.iter().filter(|(_, place)| is_ours(place));
            ours.map(|(id, _)| *id).collect()
        });
        if origins.as_ref().is_some_and(Vec::is_empty) {
            tracing::error!(
                ?sites,
                "nothing is scheduled; no location is at a site of manager.sites"
            );
        }
        let mut survey = Survey::new(links, &locations, now, &self.settings);
        let before = self.cursor();
        let since = before.as_ref().map(|(cursor, _)| cursor);
        let cursor = self
            .repository
            .scan(origins.as_deref(), since, |transfer| survey.count(transfer))
            .await?;
        // A partial scan keeps the time of the full scan that it is based on.
        let looked = before.map_or_else(Instant::now, |(_, looked)| looked);
        *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) =
            cursor.map(|cursor| (cursor, looked));
        let scheduled = survey.take_scheduled();
        Ok(ScanResult {
            selected: survey.selected(pass),
            scheduled,
        })
    }

    /// Result of the previous scan, if it is recent enough.
    fn cursor(&self) -> Option<(ScanCursor, Instant)> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let every = self.settings.manager.full_look_interval;
        // The cursor is removed here, so that a failed pass is followed by a full scan.
        cursor.take().filter(|(_, looked)| looked.elapsed() < every)
    }

    /// Schedules a batch. If the database refuses it, splits it until only the refused row is left out.
    async fn schedule(
        &self,
        batch: Vec<Selected>,
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
                    [transfer] => pass.refuse(transfer.candidate.id, chain(&error).to_string()),
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
        batch: &[Selected],
        pass: &mut Pass,
        sending: &mut PassProgress,
        verbose: bool,
    ) -> Result<(), DatabaseError> {
        let candidates: Vec<_> = batch
            .iter()
            .map(|transfer| transfer.candidate.clone())
            .collect();
        let queues: HashMap<_, _> = batch
            .iter()
            .map(|transfer| (transfer.candidate.id, transfer.queue.clone()))
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
            self.repository.schedule(&candidates, publishing).await
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

/// Result of one survey.
struct ScanResult {
    selected: Vec<Selected>,
    scheduled: Vec<(TransferId, Option<Arc<str>>)>,
}

/// Answers of the broker since the start of the pass.
#[derive(Debug, Default)]
struct PassProgress {
    queues: QueueFailures,
    /// Set if no message of the previous batch was confirmed, and at least one had no answer.
    silence: Option<SubmitError>,
    /// Set if the broker does not answer; no further message is sent then.
    broken: Option<SubmitError>,
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

impl Pass {
    /// Removes transfers whose queue accepts no messages.
    fn without_refused_queues(
        &mut self,
        selected: VecDeque<Selected>,
        queues: &QueueFailures,
    ) -> VecDeque<Selected> {
        let mut left_out: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        let (refused, left): (Vec<_>, Vec<_>) = selected
            .into_iter()
            .partition(|transfer| queues.refuses(&transfer.queue));
        for transfer in refused {
            *left_out.entry(transfer.queue).or_default() += 1;
            self.refused.push(RefusedTransfer {
                data_transfer_id: transfer.candidate.id,
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

    fn refuse(&mut self, data_transfer_id: TransferId, reason: String) {
        tracing::error!(
            data_transfer_id = data_transfer_id.get(),
            reason,
            "transfer cannot be scheduled; it stays PENDING"
        );
        self.refused.push(RefusedTransfer {
            data_transfer_id,
            reason,
        });
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
