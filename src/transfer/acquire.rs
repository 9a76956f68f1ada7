//! Acquisition of the lease: the first step of an attempt.
//!
//! If another worker holds the lease, the attempt waits only while that worker may be dead.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep};

use super::database::DatabaseError;
use super::database_retry::{self, any_cancelled};
use super::failures::{Interruption, TransferError};
use super::lease::LeaseInfo;
use super::repository::{Acquired, Acquisition};
use super::service::{Failed, Request, TransferService};

impl TransferService {
    /// Acquires the lease; returns `None` if the transfer is already completed.
    pub(super) async fn acquire(&self, request: &Request) -> Result<Option<Acquired>, Failed> {
        let id = request.id;
        let ttl = self.settings().transfer.lease_ttl;
        let mut competing_lease = CompetingLeaseWatch::new(ttl);
        let ends = [&request.cancelled, &request.no_new_attempt];
        // A caller at a terminal gets an error that needs an administrator at once, instead of waiting.
        let is_retryable = |error: &DatabaseError| !request.by_hand || error.is_unreachable();
        let (repository, owner, task_id) = (self.repository(), self.owner(), &request.task_id);
        let ask = || async move {
            match request.by_hand {
                true => repository.acquire_by_hand(id, owner, task_id, ttl).await,
                false => repository.acquire(id, owner, task_id, ttl).await,
            }
        };
        loop {
            let acquisition = database_retry::retry(&ends, is_retryable, ask)
                .await
                .map_err(Failed::before_the_lease)?;
            let error = match acquisition {
                Acquisition::Acquired(acquired) => return Ok(Some(acquired)),
                Acquisition::Completed => return Ok(None),
                Acquisition::Held(held) => {
                    let same_task = held.task_id == request.task_id;
                    // A redelivery of the same message would have joined that run. This message is another one with the
                    // same id, and its caller also waits for the outcome.
                    let runs_here = same_task && held.owner == *owner;
                    let may_be_dead = same_task || request.redelivered;
                    if runs_here || may_be_dead && competing_lease.may_be_dead(&held) {
                        tokio::select! {
                            () = any_cancelled(&ends) => {
                                let cause = Interruption::Shutdown;
                                let error = TransferError::Interrupted { cause };
                                return Err(Failed::before_the_lease(error));
                            }
                            () = sleep(competing_lease.interval()) => continue,
                        }
                    }
                    let owner = held.owner.to_string();
                    let failed = Failed::before_the_lease(TransferError::Held { id, owner });
                    return Err(Failed {
                        held_for_same_task: same_task,
                        ..failed
                    });
                }
                Acquisition::Missing => TransferError::UnknownTransfer { id },
                Acquisition::Failed { .. } => TransferError::AlreadyFailed { id },
                Acquisition::NotDue { not_before } => TransferError::NotDue { id, not_before },
                Acquisition::LinkClosed(closed) => closed.into(),
                Acquisition::Untracked => TransferError::Untracked { id },
                Acquisition::UnknownStatus(status) => TransferError::Database {
                    source: format!("data transfer {id} has the unknown status `{status}`").into(),
                },
            };
            return Err(Failed::before_the_lease(error));
        }
    }
}

/// Observation of another worker's lease, until it is renewed or has had enough time to expire.
struct CompetingLeaseWatch {
    ttl: Duration,
    until: Instant,
    first_renewal: Option<DateTime<Utc>>,
}

impl CompetingLeaseWatch {
    fn new(ttl: Duration) -> Self {
        // A little longer than a lease lasts without renewal.
        Self {
            ttl,
            until: Instant::now() + ttl + ttl / 4,
            first_renewal: None,
        }
    }

    /// Returns true if the holder has not renewed its lease since the first observation.
    fn may_be_dead(&mut self, held: &LeaseInfo) -> bool {
        let first = *self.first_renewal.get_or_insert(held.renewed_at);
        first == held.renewed_at && Instant::now() < self.until
    }

    /// Time between two observations.
    fn interval(&self) -> Duration {
        (self.ttl / 20).clamp(Duration::from_millis(50), Duration::from_secs(5))
    }
}
