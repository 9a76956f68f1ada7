//! Acquisition of the lease: the first step of an attempt.
//!
//! If another worker holds the lease, the attempt waits only while that worker may be dead.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep};

use super::database::DatabaseError;
use super::database_retry::{self, any_cancelled};
use super::failures::TransferError;
use super::lease::{LeaseInfo, Owner};
use super::repository::{Acquired, Acquisition};
use super::request::{Failed, LeaseAtEnd, Request};
use super::service::TransferService;

impl TransferService {
    /// Acquires the lease; returns `None` if the transfer is already completed.
    pub(super) async fn acquire(&self, request: &Request) -> Result<Option<Acquired>, Failed> {
        let id = request.id;
        let ttl = self.settings().transfer.lease_ttl;
        let mut competing_lease =
            CompetingLeaseWatch::new(ttl, request.redelivered, Instant::now());
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
                    let holder = Holder::of(&held, owner, task_id);
                    if competing_lease.is_to_be_waited_for(holder, held.renewed_at, Instant::now())
                    {
                        tokio::select! {
                            () = any_cancelled(&ends) => {
                                return Err(Failed::before_the_lease(TransferError::STOPPED));
                            }
                            () = sleep(competing_lease.interval()) => continue,
                        }
                    }
                    let owner = held.owner.to_string();
                    return Err(Failed {
                        lease: holder.lease_at_end(),
                        ..Failed::before_the_lease(TransferError::Held { id, owner })
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

/// The holder of a competing lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// This process, for the same task. A redelivery of the same message would have joined that run: this message is
    /// another one with the same id, and its caller also waits for the outcome.
    ThisProcess,
    /// Another worker, for the same task.
    SameTask,
    /// Any process, for another task.
    OtherTask,
}

impl Holder {
    fn of(held: &LeaseInfo, owner: &Owner, task_id: &str) -> Self {
        match held.task_id == task_id {
            true if held.owner == *owner => Self::ThisProcess,
            true => Self::SameTask,
            false => Self::OtherTask,
        }
    }

    /// The lease of an attempt that does not wait for this holder.
    fn lease_at_end(self) -> LeaseAtEnd {
        match self {
            Self::ThisProcess | Self::SameTask => LeaseAtEnd::HeldForSameTask,
            Self::OtherTask => LeaseAtEnd::NotAcquired,
        }
    }
}

/// Observation of another worker's lease, until it is renewed or has had enough time to expire.
struct CompetingLeaseWatch {
    ttl: Duration,
    /// True if the message of this attempt was delivered before.
    redelivered: bool,
    until: Instant,
    first_renewal: Option<DateTime<Utc>>,
}

impl CompetingLeaseWatch {
    fn new(ttl: Duration, redelivered: bool, now: Instant) -> Self {
        Self {
            ttl,
            redelivered,
            // A little longer than a lease lasts without renewal.
            until: now + ttl + ttl / 4,
            first_renewal: None,
        }
    }

    /// Returns true if the attempt waits for the end of a lease that was renewed at `renewed_at`. A worker that died
    /// while it had the message of this attempt holds a lease for the same task, or the message is delivered again.
    fn is_to_be_waited_for(
        &mut self,
        holder: Holder,
        renewed_at: DateTime<Utc>,
        now: Instant,
    ) -> bool {
        match holder {
            Holder::ThisProcess => true,
            Holder::OtherTask if !self.redelivered => false,
            Holder::SameTask | Holder::OtherTask => self.may_be_dead(renewed_at, now),
        }
    }

    /// Returns true if the holder has not renewed its lease since the first observation.
    fn may_be_dead(&mut self, renewed_at: DateTime<Utc>, now: Instant) -> bool {
        let first = *self.first_renewal.get_or_insert(renewed_at);
        first == renewed_at && now < self.until
    }

    /// Time between two observations.
    fn interval(&self) -> Duration {
        (self.ttl / 20).clamp(Duration::from_millis(50), Duration::from_secs(5))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::Holder::{OtherTask, SameTask, ThisProcess};
    use super::*;
    use crate::transfer::id::{AttemptNumber, TransferId};

    const TTL: Duration = Duration::from_secs(40);

    /// The second observation, after `waited` seconds, of a lease that was renewed in between or not.
    #[rstest]
    #[case::own_run(ThisProcess, false, true, 60, true)]
    #[case::same_task_silent(SameTask, false, false, 49, true)]
    #[case::same_task_silent_for_too_long(SameTask, false, false, 50, false)]
    #[case::same_task_renewed(SameTask, false, true, 1, false)]
    #[case::other_task(OtherTask, false, false, 1, false)]
    #[case::redelivered_silent(OtherTask, true, false, 49, true)]
    #[case::redelivered_silent_for_too_long(OtherTask, true, false, 50, false)]
    #[case::redelivered_renewed(OtherTask, true, true, 1, false)]
    fn only_a_holder_that_may_be_dead_is_waited_for(
        #[case] holder: Holder,
        #[case] redelivered: bool,
        #[case] renewed: bool,
        #[case] waited: u64,
        #[case] waits: bool,
    ) {
        let (now, renewed_at) = (Instant::now(), crate::clock::now());
        let mut watch = CompetingLeaseWatch::new(TTL, redelivered, now);
        let first = watch.is_to_be_waited_for(holder, renewed_at, now);
        assert_eq!(first, holder != OtherTask || redelivered);
        let renewed_at = renewed_at + Duration::from_secs(u64::from(renewed));
        let later = now + Duration::from_secs(waited);
        assert_eq!(watch.is_to_be_waited_for(holder, renewed_at, later), waits);
    }

    #[rstest]
    #[case::same_process("a", "here", ThisProcess, true)]
    #[case::same_task("a", "there", SameTask, true)]
    #[case::other_task("b", "here", OtherTask, false)]
    #[case::other_task_elsewhere("b", "there", OtherTask, false)]
    fn holder_is_told_by_task_and_process(
        #[case] task_id: &str,
        #[case] node: &str,
        #[case] expected: Holder,
        #[case] stores_the_result: bool,
    ) {
        let now = crate::clock::now();
        let held = LeaseInfo {
            data_transfer_id: TransferId::new(1),
            attempt: AttemptNumber::ZERO,
            task_id: task_id.into(),
            owner: Owner::current(node),
            acquired_at: now,
            renewed_at: now,
            expires_at: now,
            bytes_done: 0,
            bytes_total: None,
            rate_bytes_per_s: 0,
            phase: None,
            streams: None,
        };
        let holder = Holder::of(&held, &Owner::current("here"), "a");
        assert_eq!(holder, expected);
        let is_left = matches!(holder.lease_at_end(), LeaseAtEnd::HeldForSameTask);
        assert_eq!(is_left, stores_the_result);
    }
}
