//! The manager: finds the transfers that wait, gives each a message, and takes up again what
//! dead workers left.
//!
//! A row becomes SCHEDULED in the same transaction in which its message is confirmed by the
//! broker. So no row is ever SCHEDULED without a message; the other way round (a message whose
//! row is still PENDING, after a crash between confirm and commit) does no harm, since a worker
//! takes PENDING rows, too, and the second message finds the work done.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::faults::fault_point;
use crate::settings::{QueueLocation, Settings};
use crate::telemetry::chain;
use crate::transfer::database::DatabaseError;
use crate::transfer::lease::Owner;
use crate::transfer::repository::{PendingTransfer, Repository, ScheduleError, Scheduled};
use crate::transfer::routing::queue_name;

/// Rows that are read at once.
const BATCH: u64 = 500;

/// So many publications that fail one after the other mean that the broker is away.
const GIVE_UP_AFTER: usize = 3;

/// Sends the message that starts a transfer.
#[async_trait]
pub trait Submit: Send + Sync {
    /// Sends it to `queue`; done when the broker has taken responsibility for it.
    async fn submit(&self, data_transfer_id: i64, queue: &str) -> Result<(), SubmitError>;
}

/// A message could not be sent.
#[derive(Debug, thiserror::Error)]
#[error("the message could not be sent")]
pub struct SubmitError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Schedules transfers.
pub struct Manager {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    submit: Arc<dyn Submit>,
}

/// What one pass did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Pass {
    /// Transfers that got a message.
    pub scheduled: Vec<Assignment>,
    /// Transfers that somebody else scheduled meanwhile.
    pub taken: usize,
    /// Transfers that stay PENDING, and why.
    pub refused: Vec<Refusal>,
    /// Transfers that a dead worker left, PENDING again.
    pub recovered: Vec<i64>,
    /// How many PENDING transfers wait to be tried again later.
    pub waiting: u64,
}

/// A transfer and the queue that its message went to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assignment {
    /// The transfer.
    pub data_transfer_id: i64,
    /// The queue.
    pub queue: String,
}

/// A transfer that could not be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The transfer.
    pub data_transfer_id: i64,
    /// Why.
    pub reason: String,
}

/// A pass that could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The database.
    #[error("the transfers that wait could not be read")]
    Database(#[from] DatabaseError),
    /// The broker. Rows without a message stay PENDING.
    #[error("messages could not be sent; their transfers stay pending")]
    Broker(#[source] SubmitError),
}

impl ManagerError {
    /// Name of the Python exception that a Celery caller sees.
    #[must_use]
    pub fn exc_type(&self) -> &'static str {
        match self {
            Self::Database(_) => "DatabaseError",
            Self::Broker(_) => "ScheduleError",
        }
    }
}

impl Manager {
    /// A manager that sends through `submit`.
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
        }
    }

    /// Runs passes for ever, with a pause between them, until `stop`. A pass that fails is logged;
    /// the next one tries again.
    pub async fn transfer_manager_service(&self, stop: &CancellationToken) {
        let pause = self.settings.manager.sleep_time;
        tracing::info!(sleep_s = pause.as_secs_f64(), "manager ready");
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                pass = self.transfer_transfer_packages(false) => {
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
        tracing::info!("manager stopped");
    }

    /// One pass: recovers, then schedules every PENDING transfer that is due. With `verbose` every row has a
    /// line in the log.
    ///
    /// # Errors
    /// [`ManagerError`]. A row that is bad in itself is no error of the pass but a [`Refusal`].
    pub async fn transfer_transfer_packages(&self, verbose: bool) -> Result<Pass, ManagerError> {
        let mut pass = Pass {
            recovered: self.recover().await?,
            waiting: self.repository.waiting().await?,
            ..Pass::default()
        };
        let mut after = None;
        let mut failures = Vec::new();
        'pass: loop {
            let rows = self.repository.pending(after, BATCH).await?;
            let Some(last) = rows.last() else { break };
            after = Some(last.id);
            for row in &rows {
                match self.schedule(row, &mut pass, verbose).await {
                    Ok(()) => failures.clear(),
                    Err(error) => failures.push(error),
                }
                if failures.len() == GIVE_UP_AFTER {
                    break 'pass;
                }
            }
        }
        tracing::info!(
            scheduled = pass.scheduled.len(),
            refused = pass.refused.len(),
            taken = pass.taken,
            recovered = pass.recovered.len(),
            waiting = pass.waiting,
            "pass finished"
        );
        // A failure that no success followed is the broker's, not a row's.
        match failures.pop() {
            Some(error) => Err(ManagerError::Broker(error)),
            None => Ok(pass),
        }
    }

    /// Puts transfers of dead workers back.
    ///
    /// # Errors
    /// What the database says.
    pub async fn recover(&self) -> Result<Vec<i64>, DatabaseError> {
        recover(&self.repository, &self.owner).await
    }

    async fn schedule(
        &self,
        row: &PendingTransfer,
        pass: &mut Pass,
        verbose: bool,
    ) -> Result<(), SubmitError> {
        let data_transfer_id = row.id;
        let mut refuse = |reason: String| {
            tracing::error!(
                data_transfer_id,
                reason,
                "transfer cannot be scheduled; it stays pending"
            );
            pass.refused.push(Refusal {
                data_transfer_id,
                reason,
            });
        };
        let Some(queue) = self.queue(row) else {
            refuse("its location or the location's site is missing; correct the row".into());
            return Ok(());
        };
        let publish = || async {
            fault_point!(
                ManagerPublished,
                self.submit.submit(data_transfer_id, &queue).await
            )
        };
        let scheduled = fault_point!(
            ManagerCommitted,
            self.repository.schedule(data_transfer_id, publish).await
        );
        match scheduled {
            Ok(Scheduled::Scheduled) => {
                if verbose {
                    tracing::info!(data_transfer_id, queue, "transfer scheduled");
                } else {
                    tracing::debug!(data_transfer_id, queue, "transfer scheduled");
                }
                pass.scheduled.push(Assignment {
                    data_transfer_id,
                    queue,
                });
                Ok(())
            }
            Ok(Scheduled::NotPending) => {
                pass.taken += 1;
                Ok(())
            }
            Err(ScheduleError::Publish(error)) => {
                refuse(chain(&error).to_string());
                Err(error)
            }
            Err(ScheduleError::Database(error)) => {
                refuse(chain(&error).to_string());
                Ok(())
            }
        }
    }

    fn queue(&self, row: &PendingTransfer) -> Option<String> {
        let end = match self.settings.transfer.queue_location {
            QueueLocation::Origin => row.origin.as_ref(),
            QueueLocation::Destination => row.destination.as_ref(),
        }?;
        Some(queue_name(
            &self.settings.transfer.queue_prefix,
            &end.site,
            &end.location,
        ))
    }
}

/// Sweeps dead leases, as every manager and every worker does.
///
/// # Errors
/// What the database says.
pub async fn recover(repository: &Repository, observer: &Owner) -> Result<Vec<i64>, DatabaseError> {
    let sweep = repository.sweep(observer).await?;
    for (id, error) in &sweep.failed {
        tracing::warn!(data_transfer_id = id, error = %chain(error), "dead lease stays for now");
    }
    let mut pending = Vec::new();
    for recovered in sweep.recovered {
        let lease = recovered.displaced.lease;
        tracing::warn!(
            data_transfer_id = lease.data_transfer_id,
            attempt = lease.attempt,
            owner = %lease.owner,
            reason = %recovered.displaced.demise,
            pending = recovered.is_pending,
            "dead lease swept"
        );
        if recovered.is_pending {
            pending.push(lease.data_transfer_id);
        }
    }
    Ok(pending)
}

/// Sweeps dead leases again and again until `stop`: at once, and then whenever one could have died.
pub async fn keep_recovering(
    repository: &Repository,
    observer: &Owner,
    every: Duration,
    stop: &CancellationToken,
) {
    loop {
        if let Err(error) = recover(repository, observer).await {
            tracing::warn!(error = %chain(&error), "dead leases could not be swept");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for SubmitError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self(lost.into())
    }
}
