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

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::sending::PassProgress;
use self::survey::SurveyResult;
use crate::faults::hang_point;
use crate::metrics::{ManagerMetrics, PassCounts};
use crate::settings::Settings;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::repository::{Repository, ScanCursor};
use celery_worker::liveness::Liveness;
use service_connection::error_chain::chain;

mod publish;
mod reconcile;
mod recovery;
mod sending;
mod survey;

pub use publish::{Submit, SubmitError};
pub use reconcile::{FindError, FindMessages, HeldMessages, is_overdue, search_delay};
pub use recovery::{max_sweep_duration, recover, sweep_loop};

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
        let pass = self.run_pass(false).await;
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
    pub async fn run_pass(&self, verbose: bool) -> Result<Pass, ManagerError> {
        let mut pass = Pass {
            recovered: self.recover().await?,
            ..Pass::default()
        };
        let mut sending = PassProgress::default();
        let SurveyResult {
            selected,
            scheduled,
        } = self.survey(&mut pass).await?;
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
        selected.retain(|candidate| lost.contains(&candidate.id));
        self.send(selected, pass, sending, verbose).await
    }

    /// Makes the transfers of dead workers PENDING.
    ///
    /// # Errors
    /// The database reported an error.
    pub async fn recover(&self) -> Result<Vec<TransferId>, DatabaseError> {
        recover(&self.repository, &self.owner, &self.liveness).await
    }
}

impl Pass {
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
