//! Model of workers: their steps between a delivery and its settlement. The settling of failures is the program's own
//! code; only the copy itself is left out.

use ccat_transfer::faults::{FaultPoint, Mode, with_faults};
use ccat_transfer::tasks::{DataTransferTask, Settled};
use ccat_transfer::transfer::database_retry::write_with_lease;
use ccat_transfer::transfer::failures::{Interruption, TransferError};
use ccat_transfer::transfer::lease::{Lease, LeaseError, Owner, Phase, Progress, Snapshot};
use ccat_transfer::transfer::repository::{
    Acquisition, ClaimError, CompletedCopy, Renewal, Withdrawal,
};
use ccat_transfer::transfer::request::{Failed, LeaseAtEnd, Request};
use ccat_transfer::transfer::retry::{Decision, RetryPolicy, decide};
use ccat_transfer::transfer::service::TransferService;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::World;
use super::broker::Message;
use super::picture::Step;
use crate::ops_db::{TTL, me};

/// A process that runs transfers.
pub struct Worker {
    pub number: u64,
    pub owner: Owner,
    /// The worker runs on this host, where others can detect that it is dead.
    pub is_here: bool,
    /// The worker does not move.
    pub is_frozen: bool,
    /// The worker does not answer questions.
    pub is_mute: bool,
    pub jobs: Vec<Job>,
}

/// A message that a worker has accepted.
pub struct Job {
    pub tag: u64,
    pub message: Message,
    /// `None` until the job has its lease.
    pub lease: Option<Lease>,
}

impl Worker {
    pub fn new(number: u64, is_here: bool) -> Self {
        let here = me();
        let owner = match is_here {
            true => here,
            // No other process can inspect this one.
            false => Owner {
                host: format!("far{number}"),
                pid_scope: format!("{} far", here.pid_scope),
                ..here
            },
        };
        Self {
            number,
            owner: Owner {
                node: format!("celery@w{number}"),
                ..owner
            },
            is_here,
            is_frozen: false,
            is_mute: false,
            jobs: Vec::new(),
        }
    }
}

/// Next state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Keep,
    Acknowledge,
    /// The worker stops and requeues the message.
    Requeue,
    /// The worker dies before it settles the message.
    Die,
}

/// Position of a job: index of the worker, and index in its jobs.
pub type Place = (usize, usize);

impl World {
    /// Returns the jobs of all workers that are not frozen.
    pub(super) fn jobs(&self) -> Vec<Place> {
        let awake = self
            .workers
            .iter()
            .enumerate()
            .filter(|(_, w)| !w.is_frozen);
        awake
            .flat_map(|(w, worker)| (0..worker.jobs.len()).map(move |j| (w, j)))
            .collect()
    }

    fn job(&self, (w, j): Place) -> &Job {
        &self.workers[w].jobs[j]
    }

    fn service(&self, w: usize) -> TransferService {
        let owner = self.workers[w].owner.clone();
        TransferService::new(self.db.repository.clone(), self.settings.clone(), owner)
    }

    /// Gives a message to a worker.
    pub(super) fn deliver(&mut self, message: Message, w: usize) {
        let number = self.workers[w].number;
        let tag = self.broker.state().deliver(message.clone(), number);
        let same = |job: &&mut Job| job.message.task_id == message.task_id;
        // A redelivery joins the running job.
        if let Some(job) = self.workers[w].jobs.iter_mut().find(same) {
            let before = std::mem::replace(&mut job.tag, tag);
            self.broker.state().acknowledge(before);
            return;
        }
        if message.transfer.is_none() {
            self.broker.state().acknowledge(tag);
            return;
        }
        self.workers[w].jobs.push(Job {
            tag,
            message,
            lease: None,
        });
    }

    fn end(&mut self, place: Place, next: Next, step: &mut Step) {
        if next == Next::Keep {
            return;
        }
        step.add(&format!("{next:?}"));
        if next == Next::Die {
            self.workers.swap_remove(place.0);
            return;
        }
        let job = self.workers[place.0].jobs.swap_remove(place.1);
        let mut broker = self.broker.state();
        match next {
            Next::Acknowledge => drop(broker.acknowledge(job.tag)),
            _ => broker.requeue(job.tag),
        }
    }

    /// Makes the next step of a worker for a message.
    pub(super) async fn advance(&mut self, place: Place) -> Step {
        let job = self.job(place);
        let id = job.message.transfer.unwrap();
        let node = &self.workers[place.0].owner.node;
        let mut step = Step::about(id, format!("{node}, {}", job.message.task_id));
        let next = match job.lease.clone() {
            None => self.begin(place, id, &mut step).await,
            Some(lease) => self.go_on(place, &lease, &mut step).await,
        };
        self.end(place, next, &mut step);
        step
    }

    async fn begin(&mut self, place: Place, id: i64, step: &mut Step) -> Next {
        match self.rng.u32(0..100) {
            0..8 => {
                // The message is revoked, or has expired.
                let withdrawal = match self.rng.bool() {
                    true => Withdrawal::Pending,
                    false => Withdrawal::Failed("revoked by celery control".into()),
                };
                step.add(&format!("message ends without a run, {withdrawal:?}"));
                // A worker of another kind, or one that dies, does not withdraw.
                if self.rng.u8(0..4) > 0 {
                    let task_id = self.job(place).message.task_id.clone();
                    let repository = self.db.repository.clone();
                    let withdrawing = repository.withdraw(id.into(), &task_id, &withdrawal);
                    step.add(&format!("{:?}", withdrawing.await));
                }
                Next::Acknowledge
            }
            8..12 => Next::Requeue,
            _ => {
                let faults = match self.rng.u32(0..25) {
                    0 => vec![(FaultPoint::LeaseTaken, Mode::Fail)],
                    1 => vec![(FaultPoint::LeaseTaken, Mode::Twice)],
                    _ => vec![],
                };
                self.acquire(place, faults, step).await
            }
        }
    }

    /// Tries to acquire the lease.
    async fn acquire(
        &mut self,
        place: Place,
        faults: Vec<(FaultPoint, Mode)>,
        step: &mut Step,
    ) -> Next {
        step.add(&format!("acquires {faults:?}"));
        let message = self.job(place).message.clone();
        let id = message.transfer.unwrap();
        let owner = self.workers[place.0].owner.clone();
        let repository = self.db.repository.clone();
        let acquiring = repository.acquire(id.into(), &owner, &message.task_id, TTL);
        match with_faults(faults, acquiring).await {
            Ok(Acquisition::Acquired(acquired)) => {
                step.add(&format!("has attempt {}", acquired.lease.attempt()));
                if let Some(displaced) = &acquired.displaced {
                    step.displaced += 1;
                    step.add(&displaced.expiry_reason.to_string());
                }
                self.workers[place.0].jobs[place.1].lease = Some(acquired.lease);
                Next::Keep
            }
            Ok(Acquisition::Held(held)) => {
                step.add(&format!("held by {}", held.owner.node));
                let may_be_dead = held.task_id == message.task_id || message.redelivered;
                let holder = self
                    .workers
                    .iter()
                    .find(|w| w.owner.node == held.owner.node);
                let is_renewed = holder.is_some_and(|holder| {
                    let of_it = |job: &Job| job.lease.is_some() && job.message.transfer == Some(id);
                    !holder.is_frozen && holder.jobs.iter().any(of_it)
                });
                match may_be_dead && !is_renewed {
                    true => Next::Keep,
                    false => Next::Acknowledge,
                }
            }
            Ok(other) => {
                step.add(&format!("{other:?}"));
                assert!(!matches!(other, Acquisition::Untracked), "{}", step.text);
                Next::Acknowledge
            }
            // The task fails, and no worker has the row.
            Err(error) if error.is_of_one_row() => {
                step.add(&error.to_string());
                Next::Acknowledge
            }
            Err(error) => {
                step.add(&format!("asks again: {error}"));
                Next::Keep
            }
        }
    }

    async fn go_on(&mut self, place: Place, lease: &Lease, step: &mut Step) -> Next {
        match self.rng.u32(0..100) {
            0..25 => self.renew(place, lease, step).await,
            25..45 => self.claim(place, lease, step).await,
            45..50 => {
                let path = std::path::Path::new("/var/log/ccat/attempt.log");
                let name = lease.tag();
                let recording = self.db.repository.record_files(lease, &name, path);
                match recording.await {
                    Err(LeaseError::Lost) => self.lose(step),
                    answer => {
                        step.add(&format!("records files {answer:?}"));
                        Next::Keep
                    }
                }
            }
            50..75 => self.complete(place, lease, step).await,
            75..92 => {
                let error = self.any_error();
                self.fail(place, lease, error, step).await
            }
            _ => {
                let cause = Interruption::Shutdown;
                let error = TransferError::Interrupted { cause };
                self.fail(place, lease, error, step).await
            }
        }
    }

    fn lose(&self, step: &mut Step) -> Next {
        step.add("lease lost");
        Next::Acknowledge
    }

    async fn renew(&mut self, place: Place, lease: &Lease, step: &mut Step) -> Next {
        step.add("renews");
        let seen = Snapshot {
            phase: Phase::Copying,
            progress: Progress {
                bytes_done: self.rng.u64(0..1_000_000),
                ..Progress::default()
            },
        };
        let renewing = self.db.repository.renew(lease, seen);
        match renewing.await {
            Ok(Renewal::Continue) => Next::Keep,
            Ok(Renewal::Stop(paused)) => self.fail(place, lease, paused.into(), step).await,
            Err(LeaseError::Lost) => self.lose(step),
            Err(LeaseError::Database(error)) => {
                step.add(&error.to_string());
                Next::Keep
            }
        }
    }

    async fn claim(&mut self, place: Place, lease: &Lease, step: &mut Step) -> Next {
        // Some transfers have the same file as destination.
        let destination = format!("/data/{}", lease.data_transfer_id().get() % 7);
        step.add(&format!("claims {destination}"));
        let faults = match self.rng.u32(0..15) {
            _ if self.is_well => vec![],
            0 => vec![(FaultPoint::Claimed, Mode::Fail)],
            1 => vec![(FaultPoint::Claimed, Mode::Twice)],
            _ => vec![],
        };
        let claiming = self.db.repository.claim_destination(lease, &destination, 4);
        match with_faults(faults, claiming).await {
            Ok(()) => Next::Keep,
            Err(ClaimError::Taken(_)) => {
                let error = TransferError::DestinationBusy {
                    path: destination,
                    by: "another".into(),
                };
                self.fail(place, lease, error, step).await
            }
            Err(ClaimError::Lease(LeaseError::Lost)) => self.lose(step),
            Err(ClaimError::Lease(LeaseError::Database(error))) => {
                step.add(&error.to_string());
                Next::Keep
            }
        }
    }

    /// The verified copy is committed.
    async fn complete(&mut self, place: Place, lease: &Lease, step: &mut Step) -> Next {
        let faults = self.settlement_faults(FaultPoint::Completed);
        step.add(&format!("completes attempt {} {faults:?}", lease.attempt()));
        let id = lease.data_transfer_id();
        step.completing.insert((id.get(), lease.attempt().get()));
        let stop = self.patience(&faults);
        let repository = self.db.repository.clone();
        let finished = CompletedCopy {
            bytes: 1_000_000,
            ..CompletedCopy::default()
        };
        let completing = write_with_lease(lease, &stop, || repository.complete(lease, &finished));
        match with_faults(faults, completing).await {
            Ok(()) if self.dies() => Next::Die,
            Ok(()) => Next::Acknowledge,
            Err(TransferError::LeaseLost { .. }) => self.lose(step),
            Err(error) => self.fail(place, lease, error, step).await,
        }
    }

    /// Returns true if the worker dies between a commit and the acknowledgement.
    fn dies(&mut self) -> bool {
        !self.is_well && self.rng.u8(0..20) == 0
    }

    /// Faults of the end of an attempt.
    fn settlement_faults(&mut self, end: FaultPoint) -> Vec<(FaultPoint, Mode)> {
        let mode = match self.rng.bool() {
            // A transaction in which a statement was refused is not repeated.
            _ if self.refusing => Mode::Fail,
            true => Mode::Fail,
            false => Mode::Twice,
        };
        match self.rng.u32(0..12) {
            _ if self.is_well => vec![],
            0 => vec![(end, mode)],
            1 => vec![(FaultPoint::SettlementWritten, mode)],
            _ => vec![],
        }
    }

    /// Time that a worker waits for the database: without limit, or none because the worker ends. The former takes real
    /// time, so it is rare.
    fn patience(&mut self, faults: &[(FaultPoint, Mode)]) -> CancellationToken {
        let token = CancellationToken::new();
        if !faults.is_empty() && self.rng.u8(0..8) > 0 || self.refusing {
            token.cancel();
        }
        token
    }

    fn any_error(&mut self) -> TransferError {
        let path = || "/data/file".to_owned();
        match self.rng.u32(0..9) {
            0..3 => TransferError::Network {
                host: "far".into(),
                line: "connection reset".into(),
            },
            3 => TransferError::StorageFull {
                path: path(),
                line: String::new(),
            },
            4 => TransferError::OriginChanged {
                path: path(),
                line: String::new(),
            },
            5 => TransferError::DestinationExists { path: path() },
            6 => TransferError::OriginMissing { path: path() },
            7 => TransferError::Database {
                source: "no such package".into(),
            },
            _ => TransferError::Internal {
                what: "a bug".into(),
            },
        }
    }

    /// The attempt fails; the row is settled by the task's own code.
    async fn fail(
        &mut self,
        place: Place,
        lease: &Lease,
        error: TransferError,
        step: &mut Step,
    ) -> Next {
        let id = lease.data_transfer_id();
        let count = self
            .before
            .rows
            .get(&id.get())
            .map_or(0, |row| row.retry_count);
        let policy = RetryPolicy::from(&self.settings.transfer);
        let decision = decide(&error, u32::try_from(count).unwrap(), &policy, 0.0);
        let end = match decision {
            Decision::Retry { counted: true, .. } => {
                step.counted.insert(id.get());
                FaultPoint::RetryWritten
            }
            Decision::Retry { delay, .. } if delay.is_zero() => FaultPoint::Released,
            Decision::Retry { .. } => FaultPoint::Postponed,
            _ => FaultPoint::FailureWritten,
        };
        let mut faults = self.settlement_faults(end);
        if !self.is_well && self.rng.u32(0..30) == 0 {
            faults.push((FaultPoint::FailureCounted, Mode::Fail));
        }
        step.add(&format!("fails: {} {faults:?}", error.code()));
        let interrupted = matches!(error, TransferError::Interrupted { .. });
        let request = Request {
            id,
            task_id: self.job(place).message.task_id.clone(),
            cancelled: self.patience(&faults),
            terminated: CancellationToken::new(),
            no_new_attempt: CancellationToken::new(),
            redelivered: false,
            by_hand: false,
            snapshots: watch::Sender::new(Snapshot::default()),
        };
        let failed = Failed {
            error,
            lease: LeaseAtEnd::Held(lease.clone()),
            progress: Progress::default(),
            log_path: None,
            partial: None,
        };
        let task = DataTransferTask::new(self.service(place.0));
        let settled = with_faults(faults, task.on_failure(&request, &failed)).await;
        step.add(&format!("{settled:?}"));
        match settled {
            Settled::Unwritten if self.rng.bool() => Next::Requeue,
            Settled::Unwritten => Next::Die,
            _ if self.dies() => Next::Die,
            _ if interrupted => Next::Requeue,
            _ => Next::Acknowledge,
        }
    }

    /// Stops the copies of a worker, which releases their rows.
    pub(super) async fn stop_copies(&mut self, node: &str, step: &mut Step) {
        let place_of = |world: &Self| {
            let is_it = |worker: &Worker| worker.owner.node == node;
            let w = world.workers.iter().position(is_it)?;
            Some((w, world.workers[w].jobs.first()?.lease.clone()?))
        };
        while let Some((w, lease)) = place_of(self) {
            step.about.insert(lease.data_transfer_id().get());
            let cause = Interruption::Shutdown;
            let error = TransferError::Interrupted { cause };
            let next = self.fail((w, 0), &lease, error, step).await;
            self.end((w, 0), next, step);
        }
    }

    /// Completes a message without faults.
    pub(super) async fn finish(&mut self, place: Place, may_fail: bool) -> Step {
        let job = self.job(place);
        let id = job.message.transfer.unwrap();
        let node = &self.workers[place.0].owner.node;
        let mut step = Step::about(id, format!("{node}, {}", job.message.task_id));
        let next = match job.lease.clone() {
            None => self.acquire(place, vec![], &mut step).await,
            Some(lease) if may_fail && self.rng.u8(0..5) == 0 => {
                let error = self.any_error();
                self.fail(place, &lease, error, &mut step).await
            }
            Some(lease) => match self.claim(place, &lease, &mut step).await {
                Next::Keep => self.complete(place, &lease, &mut step).await,
                next => next,
            },
        };
        self.end(place, next, &mut step);
        step
    }
}
