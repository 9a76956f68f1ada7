//! One attempt at one transfer, from the lease to the last commit.
//!
//! acquire → plan → prepare → copy → verify → publish → commit. Every step may be repeated, and a
//! process that dies between any two of them leaves either nothing under the final name or the
//! verified file, which the next attempt recognizes.
//!
//! While an attempt runs, a keeper renews its lease, independently of what the attempt waits for.
//! If the lease is lost the attempt is stopped; if the database cannot be reached, or refuses, it goes
//! on, since only the database can tell whose the transfer is, and it is asked again before anything
//! is published.
//!
//! What a failure means for the row is not decided here: [`Failed`] hands the lease on to who
//! knows the policy.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::attempt::{ReadAlong, reading};
use super::bbcp;
use super::database::DatabaseError;
use super::digest::Digest;
use super::endpoint::{Facts, Reading, TemporaryName};
use super::error::{Interruption, Role, TransferError};
use super::lease::{Lease, LeaseError, LeaseInfo, Owner, Progress};
use super::link::{LinkName, PausedLink};
use super::patience;
use super::plan::{self, Attempt, LocalHost, Plan, StorageKind, plan};
use super::repository::{
    Acquired, Acquisition, ClaimError, Finished, Location, Renewal, Repository, TransferRecord,
};

pub use super::lease::{Phase, Snapshot};

use crate::faults::fault_point;
use crate::metrics::TransferMetrics;
use crate::settings::{LinkSettings, Settings};
use crate::telemetry::{chain, panic_text};
use crate::traces::{self, Explain, KeyValue, step};

/// How long tidying up after a failed attempt may take.
const TIDY_WITHIN: Duration = Duration::from_secs(15);

/// How long a storage may take for something small before it counts as hanging: longer than ssh may
/// take to find out that a host cannot be reached.
const PROBE_WITHIN: Duration = Duration::from_secs(30);

/// How long a phase has to last until it is worth a write of its own. Small packages are done before.
const PHASE_SETTLES: Duration = Duration::from_millis(250);

/// What a copy has gained before whoever reads beside it is woken, who is far ahead.
const COPIED_STEP_BYTES: u64 = 4 << 20;

/// What a caller wants done.
#[derive(Debug, Clone)]
pub struct Request {
    /// The transfer.
    pub id: i64,
    /// Celery's id of the task, or any word that tells the caller.
    pub task_id: String,
    /// Cancelled when the attempt has to stop.
    pub cancelled: CancellationToken,
    /// Cancelled when no attempt may begin any more: an attempt that waits for its lease is interrupted.
    pub no_new_attempt: CancellationToken,
    /// The message came before, so a lease that is found may be that of a worker that died with
    /// it: worth waiting to see whether it is renewed.
    pub redelivered: bool,
    /// Somebody wants it now, even if its link has as many copies as it may.
    pub by_hand: bool,
    /// Gets what the attempt is doing.
    pub snapshots: watch::Sender<Snapshot>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub enum Done {
    /// The transfer had been completed before.
    AlreadyCompleted,
    /// The file had been at its destination before, with the same content.
    AlreadyThere(Summary),
    /// The file was copied.
    Copied(Summary),
}

/// Facts of a completed transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Number of the attempt.
    pub attempt: i32,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Time from lease to commit.
    pub elapsed: Duration,
    /// What both ends agree on.
    pub digest: String,
}

/// An attempt that did not end well.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: TransferError,
    /// The lease it still holds; the row has to be settled with it.
    pub lease: Option<Lease>,
    /// The lost lease.
    pub lost: Option<Lease>,
    /// How far the copy came.
    pub progress: Progress,
    /// bbcp's output, if it came to that.
    pub log_path: Option<PathBuf>,
    /// What has arrived and is kept for the next attempt. If there will be none, it has to be
    /// [discarded](TransferService::discard).
    pub partial: Option<Box<Plan>>,
    /// The lease is or was held for the same task by another worker that has its message: that worker
    /// stores the result.
    pub held_for_same_task: bool,
}

impl Failed {
    fn before_the_lease(error: TransferError) -> Self {
        let progress = Progress::default();
        Self {
            error,
            lease: None,
            lost: None,
            progress,
            log_path: None,
            partial: None,
            held_for_same_task: false,
        }
    }
}

/// Runs attempts. Clones share everything.
#[derive(Debug, Clone)]
pub struct TransferService {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    local: LocalHost,
    metrics: Option<TransferMetrics>,
}

impl TransferService {
    /// A service that works as `owner`.
    #[must_use]
    pub fn new(repository: Repository, settings: Arc<Settings>, owner: Owner) -> Self {
        let further = settings.transfer.local_hosts.iter().map(String::as_str);
        let local = LocalHost::new(&owner.host, further);
        Self {
            repository,
            settings,
            owner,
            local,
            metrics: None,
        }
    }

    /// Counts what is copied there.
    #[must_use]
    pub fn with_metrics(self, metrics: TransferMetrics) -> Self {
        Self {
            metrics: Some(metrics),
            ..self
        }
    }

    /// Where it is counted what becomes of transfers, if anywhere.
    #[must_use]
    pub fn metrics(&self) -> Option<&TransferMetrics> {
        self.metrics.as_ref()
    }

    /// The transfers.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Who holds the leases.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Names of this host.
    pub(super) fn local(&self) -> &LocalHost {
        &self.local
    }

    /// All settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Does one attempt.
    ///
    /// # Errors
    /// [`Failed`]; its lease, if any, is not renewed any more and has to be settled.
    pub async fn run(&self, request: &Request) -> Result<Done, Failed> {
        let acquired = match step("transfer/acquire", self.acquire(request)).await? {
            Some(acquired) => acquired,
            None => return Ok(Done::AlreadyCompleted),
        };
        let lease = acquired.lease.clone();
        traces::note(|| {
            vec![KeyValue::new(
                "ccat.transfer.attempt",
                i64::from(lease.attempt()),
            )]
        });
        let running = Running {
            service: self,
            request,
            lease: &lease,
            stop: request.cancelled.child_token(),
            lost: CancellationToken::new(),
            paused: Arc::default(),
            phases: watch::Sender::new(Phase::Preparing),
            started: Instant::now(),
        };
        let keeper = running.keep();
        let mut left = Left::default();
        // A panic is a failed attempt like any other: its row must be settled, or it would come
        // back for ever.
        let attempt = AssertUnwindSafe(running.attempt(&acquired, &mut left));
        let outcome = attempt.catch_unwind().await.unwrap_or_else(|panic| {
            Err(TransferError::Internal {
                what: panic_text(&*panic).to_owned(),
            })
        });
        drop(keeper);
        let error = match outcome {
            Ok(done) => return Ok(done),
            Err(_) if running.lost.is_cancelled() => TransferError::LeaseLost { id: request.id },
            // bbcp reports only that it was stopped.
            Err(TransferError::Interrupted { .. }) if let Some(paused) = running.paused.get() => {
                paused.clone().into()
            }
            Err(TransferError::Interrupted { .. }) if request.cancelled.is_cancelled() => {
                TransferError::Interrupted {
                    cause: Interruption::Shutdown,
                }
            }
            Err(error) => error,
        };
        let (lease, lost) = match error {
            TransferError::LeaseLost { .. } => (None, Some(lease)),
            _ => (Some(lease), None),
        };
        Err(Failed {
            lease,
            lost,
            error,
            progress: request.snapshots.borrow().progress,
            log_path: left.log_path,
            partial: left.partial,
            held_for_same_task: false,
        })
    }

    /// Takes the lease; none if the transfer is completed already.
    async fn acquire(&self, request: &Request) -> Result<Option<Acquired>, Failed> {
        let id = request.id;
        let ttl = self.settings.transfer.lease_ttl;
        let mut waiting = Waiting::new(ttl);
        let ends = [&request.cancelled, &request.no_new_attempt];
        // At a terminal, a refusal is the answer.
        let worth_waiting = |error: &DatabaseError| !request.by_hand || error.is_unreachable();
        let (repository, owner, task_id) = (&self.repository, &self.owner, &request.task_id);
        let ask = || async move {
            match request.by_hand {
                true => repository.acquire_by_hand(id, owner, task_id, ttl).await,
                false => repository.acquire(id, owner, task_id, ttl).await,
            }
        };
        loop {
            let acquisition = patience::wait(&ends, worth_waiting, ask)
                .await
                .map_err(Failed::before_the_lease)?;
            let error = match acquisition {
                Acquisition::Acquired(acquired) => return Ok(Some(acquired)),
                Acquisition::Completed => return Ok(None),
                Acquisition::Held(held) => {
                    let same_task = held.task_id == request.task_id;
                    // The same message would have joined that run. This message is another one with the same id, and
                    // its caller waits for the outcome, too.
                    let runs_here = same_task && held.owner == self.owner;
                    let may_be_dead = same_task || request.redelivered;
                    if runs_here || may_be_dead && waiting.worth_it(&held) {
                        tokio::select! {
                            () = patience::first_of(&ends) => {
                                let cause = Interruption::Shutdown;
                                let error = TransferError::Interrupted { cause };
                                return Err(Failed::before_the_lease(error));
                            }
                            () = sleep(waiting.pause()) => continue,
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

    /// Removes what an attempt has left under its temporary name.
    pub async fn discard(&self, plan: &Plan) {
        let removed = timeout(TIDY_WITHIN, plan.target.remove_temporary()).await;
        let Attempt {
            transfer_id,
            number,
            ..
        } = plan.attempt;
        let error = match removed {
            Ok(Ok(())) => {
                fault_point!(Tidied);
                let attempt = i32::try_from(number).unwrap_or(i32::MAX);
                return self.forget_temporary(transfer_id, attempt).await;
            }
            Ok(Err(error)) => error.chain(),
            Err(_) => "not in time".into(),
        };
        tracing::warn!(
            data_transfer_id = transfer_id,
            path = %plan.target.temporary_path(),
            error,
            "the temporary file stays; a later attempt at this transfer would remove it"
        );
    }

    /// Strikes a temporary file that is gone from the record of its attempt.
    pub(super) async fn forget_temporary(&self, id: i64, attempt: i32) {
        if let Err(error) = self.repository.forget_temporary(id, attempt).await {
            tracing::debug!(
                data_transfer_id = id,
                attempt,
                error = %chain(&error),
                "a removed temporary stays on record"
            );
        }
    }
}

/// A number as traces have it.
fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl Explain for Failed {
    fn kind(&self) -> String {
        self.error.kind()
    }

    fn message(&self) -> String {
        self.error.message()
    }
}

/// What an attempt leaves that is not in its error.
#[derive(Default)]
struct Left {
    log_path: Option<PathBuf>,
    partial: Option<Box<Plan>>,
}

/// One attempt under way.
pub(super) struct Running<'a> {
    service: &'a TransferService,
    request: &'a Request,
    lease: &'a Lease,
    /// Cancelled by the caller or by the keeper.
    stop: CancellationToken,
    /// Cancelled by the keeper when the lease is lost.
    lost: CancellationToken,
    /// Set by the keeper when the link is paused and is to be free now.
    paused: Arc<OnceLock<PausedLink>>,
    /// The phase alone, for the keeper, whom progress does not concern.
    phases: watch::Sender<Phase>,
    started: Instant,
}

impl Running<'_> {
    /// Starts to renew the lease.
    fn keep(&self) -> AbortOnDropHandle<()> {
        let keeper = Keeper {
            repository: self.service.repository.clone(),
            lease: self.lease.clone(),
            every: self.service.settings.transfer.lease_renew_interval,
            snapshots: self.request.snapshots.subscribe(),
            phases: self.phases.subscribe(),
            stop: self.stop.clone(),
            lost: self.lost.clone(),
            paused: self.paused.clone(),
        };
        AbortOnDropHandle::new(tokio::spawn(keeper.keep()))
    }

    async fn attempt(&self, acquired: &Acquired, left: &mut Left) -> Result<Done, TransferError> {
        if let Some(displaced) = &acquired.displaced {
            tracing::warn!(
                data_transfer_id = self.request.id,
                attempt = self.lease.attempt(),
                previous_owner = %displaced.lease.owner,
                reason = %displaced.demise,
                "transfer taken over from a dead attempt"
            );
        }
        let mut plan = step("transfer/plan", self.plan()).await?;
        traces::note(|| {
            let plan::Link {
                origin,
                destination,
            } = &plan.link;
            vec![
                KeyValue::new("ccat.transfer.origin", origin.clone()),
                KeyValue::new("ccat.transfer.destination", destination.clone()),
            ]
        });
        step("transfer/claim", self.claim(&plan)).await?;
        let facts = fault_point!(
            Prepared,
            step("transfer/prepare", self.stoppable(self.prepare(&mut plan))).await
        )?;
        let mut earlier = self.stoppable(self.earlier(&plan, acquired)).await?;
        self.sweep(&plan, acquired, earlier.map(|(name, _)| name))
            .await;
        fault_point!(LeftoversSwept);

        if let Some(there) = self.stoppable(plan.target.inspect()).await? {
            let recognizing = self.stoppable(self.recognize(&plan, facts, there));
            let digest = step("transfer/verify", recognizing).await?;
            if earlier.take().is_some() {
                self.sweep(&plan, acquired, None).await;
            }
            let committing = self.commit(&plan, &digest, None);
            let summary = step("transfer/commit", committing).await?;
            return Ok(Done::AlreadyThere(summary));
        }
        let there = earlier.map_or(0, |(_, bytes)| bytes);
        self.stoppable(self.check_room(&plan, there)).await?;

        let path = self.log_path();
        let name = plan.target.temporary().to_string();
        let (service, lease) = (self.service, self.lease);
        service
            .settle(lease, &self.stop, || {
                service.repository.record_files(lease, &name, &path)
            })
            .await?;
        left.log_path = Some(path.clone());

        let copied = self.copy_and_publish(&plan, facts, earlier, path).await;
        if let Err(error) = &copied {
            let worth_keeping = plan.resumes() && error.leaves_a_sound_partial();
            if worth_keeping && !self.lost.is_cancelled() {
                left.partial = Some(Box::new(plan));
            } else {
                service.discard(&plan).await;
            }
        }
        copied.map(Done::Copied)
    }

    /// The partial copy of an earlier attempt that this one can complete, and its size.
    async fn earlier(
        &self,
        plan: &Plan,
        acquired: &Acquired,
    ) -> Result<Option<(TemporaryName, u64)>, TransferError> {
        if !plan.resumes() {
            return Ok(None);
        }
        let latest = acquired.leftovers.last();
        let Some(name) = latest.and_then(|left| TemporaryName::parse(&left.temporary_name)) else {
            return Ok(None);
        };
        let bytes = plan.target.leftover_size(name).await?;
        Ok((bytes > 0).then_some((name, bytes)))
    }

    /// Reads the rows and makes the plan.
    async fn plan(&self) -> Result<Plan, TransferError> {
        let id = self.request.id;
        let record = self
            .service
            .patiently(&self.stop, || async {
                fault_point!(PlanRead, self.service.repository.transfer(id).await)
            })
            .await?
            .ok_or(TransferError::UnknownTransfer { id })?;
        let TransferRecord {
            package,
            origin,
            destination,
            route,
            ..
        } = record;
        let missing = |what: &str| TransferError::Database {
            source: format!("data transfer {id} has no {what}; the row refers to one that is gone")
                .into(),
        };
        let package = package.ok_or_else(|| missing("package"))?;
        let origin = location(origin.ok_or_else(|| missing("origin location"))?)?;
        let destination = location(destination.ok_or_else(|| missing("destination location"))?)?;
        let link = self
            .service
            .settings
            .link(&origin.site, &destination.site)
            .map_err(|problem| TransferError::LinkSettings {
                origin: origin.site.clone(),
                destination: destination.site.clone(),
                problem,
            })?;
        let link = self
            .laid_over(link, &origin.site, &destination.site)
            .await?;
        let attempt = Attempt {
            transfer_id: id,
            number: u32::try_from(self.lease.attempt()).unwrap_or_default(),
            lease_token: self.lease.token,
        };
        let package = plan::Package {
            relative_path: package.relative_path,
            file_name: package.file_name,
            size: package
                .size_bytes
                .and_then(|n| u64::try_from(n).ok())
                .unwrap_or(0),
            checksum: package.checksum,
        };
        let method = route.map(|route| route.method.unwrap_or_default());
        let plan = plan(
            attempt,
            &origin,
            &destination,
            &package,
            method.as_deref(),
            &link,
            &self.service.local,
        )?;
        if let (Some(checksum), None) = (&package.checksum, &plan.recorded) {
            tracing::warn!(
                data_transfer_id = id,
                checksum,
                "the recorded checksum has no form that is known here; the ends are compared with each other only"
            );
        }
        Ok(plan)
    }

    /// The link's settings with what its row says laid over them.
    async fn laid_over(
        &self,
        settings: LinkSettings,
        origin: &str,
        destination: &str,
    ) -> Result<LinkSettings, TransferError> {
        let name = LinkName {
            origin: origin.to_owned(),
            destination: destination.to_owned(),
        };
        let reading = || self.service.repository.link(&name);
        let link = self.service.patiently(&self.stop, reading).await?;
        link.overrides
            .over(settings)
            .map_err(|problem| TransferError::LinkSettings {
                origin: name.origin,
                destination: name.destination,
                problem,
            })
    }

    /// Claims the destination, so that no other transfer copies to it meanwhile.
    async fn claim(&self, plan: &Plan) -> Result<(), TransferError> {
        let (service, lease) = (self.service, self.lease);
        let destination = plan.destination_key(&service.owner.host);
        let claimed = service
            .patiently(&self.stop, || async {
                match service
                    .repository
                    .claim_destination(lease, &destination, plan.bbcp.streams)
                    .await
                {
                    Err(ClaimError::Lease(LeaseError::Database(error))) => Err(error),
                    answer => Ok(answer),
                }
            })
            .await?;
        claimed.map_err(|error| match error {
            ClaimError::Taken(holder) => TransferError::DestinationBusy {
                path: plan.target.path().to_string(),
                by: holder.map_or_else(
                    || "another worker".into(),
                    |held| format!("{} of {}", held.data_transfer_id, held.owner),
                ),
            },
            ClaimError::Lease(_) => TransferError::LeaseLost {
                id: self.request.id,
            },
        })
    }

    /// Looks at the origin and makes the directory at the destination.
    async fn prepare(&self, plan: &mut Plan) -> Result<Facts, TransferError> {
        let facts = plan.source.inspect().await?;
        // A package whose size was never recorded is as large as it is.
        if plan.size != 0 && plan.size != facts.size {
            return Err(TransferError::OriginSize {
                path: plan.source.path().to_string(),
                recorded: plan.size,
                found: facts.size,
            });
        }
        plan.size = facts.size;
        self.show(
            Phase::Preparing,
            Progress {
                bytes_total: Some(facts.size),
                ..Default::default()
            },
        );
        plan.target.ensure_directory().await?;
        Ok(facts)
    }

    /// Removes what earlier attempts at this transfer left, except for `spared`. Ours is the lease,
    /// so theirs is nothing; but leftovers that cannot be removed now are no reason not to copy.
    async fn sweep(&self, plan: &Plan, acquired: &Acquired, spared: Option<TemporaryName>) {
        let tidying = async {
            for name in plan.target.temporaries().await? {
                if name != plan.target.temporary() && Some(name) != spared {
                    plan.target.remove_leftover(name).await?;
                    tracing::info!(
                        data_transfer_id = self.request.id,
                        temporary = %name,
                        "temporary file of an earlier attempt removed"
                    );
                }
            }
            Ok::<_, TransferError>(())
        };
        let failure = match timeout(TIDY_WITHIN, tidying).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.chain()),
            Err(_) => Some("not in time".into()),
        };
        if let Some(error) = failure {
            return tracing::warn!(
                data_transfer_id = self.request.id,
                error,
                "leftovers of earlier attempts stay for now"
            );
        }
        let spared = spared.map(|name| name.to_string());
        for leftover in &acquired.leftovers {
            if Some(&leftover.temporary_name) != spared.as_ref() {
                let id = self.request.id;
                self.service.forget_temporary(id, leftover.attempt).await;
            }
        }
    }

    /// Whether the package fits, of which so many bytes are there.
    async fn check_room(&self, plan: &Plan, there: u64) -> Result<(), TransferError> {
        let needed = plan
            .size
            .saturating_sub(there)
            .saturating_add(self.service.settings.transfer.free_space_margin);
        let available = plan.target.free_space().await?;
        if available >= needed {
            return Ok(());
        }
        Err(TransferError::StorageLow {
            path: plan.target.path().parent().to_string(),
            available,
            needed,
        })
    }

    async fn copy_and_publish(
        &self,
        plan: &Plan,
        source: Facts,
        earlier: Option<(TemporaryName, u64)>,
        log_path: PathBuf,
    ) -> Result<Summary, TransferError> {
        let mut there = 0;
        if plan.resumes() {
            let earlier = earlier.map(|(name, _)| name);
            there = self.stoppable(self.begin_partial(plan, earlier)).await?;
        }
        let digest = match self.copy_and_verify(plan, source, &log_path).await {
            // What was there was not worth completing. bbcp would complete anything.
            Err(error) if there > 0 && error.condemns_the_partial() => {
                tracing::warn!(
                    data_transfer_id = self.request.id,
                    attempt = self.lease.attempt(),
                    error = error.chain(),
                    bytes = there,
                    "the partial copy of an earlier attempt is thrown away; copying from the start"
                );
                self.stoppable(plan.target.remove_temporary()).await?;
                self.stoppable(self.begin_partial(plan, None)).await?;
                self.copy_and_verify(plan, source, &log_path).await?
            }
            verified => verified?,
        };
        step("transfer/publish", self.publish(plan, source)).await?;
        let committing = self.commit(plan, &digest, Some(log_path));
        let summary = step("transfer/commit", committing).await?;
        if let Some(metrics) = &self.service.metrics {
            metrics.copied(&plan.link.origin, &plan.link.destination, summary.bytes);
        }
        Ok(summary)
    }

    /// Makes the partial copy of `earlier` ours, if there is one; returns its bytes.
    async fn begin_partial(
        &self,
        plan: &Plan,
        earlier: Option<TemporaryName>,
    ) -> Result<u64, TransferError> {
        let there = fault_point!(PartialBegun, plan.target.begin_partial(earlier).await)?;
        let Some(earlier) = earlier else {
            return Ok(there);
        };
        tracing::info!(
            data_transfer_id = self.request.id,
            attempt = self.lease.attempt(),
            bytes = there,
            earlier_attempt = earlier.attempt(),
            "completing the partial copy of an earlier attempt"
        );
        let attempt = i32::try_from(earlier.attempt()).unwrap_or(i32::MAX);
        let id = self.request.id;
        self.service.forget_temporary(id, attempt).await;
        Ok(there)
    }

    /// Copies to the temporary name and proves that what arrived is what was sent.
    async fn copy_and_verify(
        &self,
        plan: &Plan,
        source: Facts,
        log_path: &std::path::Path,
    ) -> Result<Digest, TransferError> {
        let copied = watch::Sender::new(0);
        let origin = plan
            .recorded
            .is_none()
            .then(|| self.read_along(plan, &copied));
        fault_point!(
            CopyEnded,
            step("transfer/copy", self.copy(plan, log_path, &copied)).await
        )?;
        // The reader need not hold back any more.
        drop(copied);
        let verifying = self.stoppable(self.verify(plan, source, origin));
        let digest = step("transfer/verify", verifying).await?;
        fault_point!(Verified, Ok::<(), TransferError>(()))?;
        Ok(digest)
    }

    /// Computes the origin's digest while the copy runs: what bbcp has just read is still in
    /// memory, and need not be read from the disk again.
    fn read_along(&self, plan: &Plan, copied: &watch::Sender<u64>) -> ReadAlong {
        let (source, copied) = (plan.source.clone(), copied.subscribe());
        let how = reading(plan);
        AbortOnDropHandle::new(tokio::spawn(async move {
            let how = Reading {
                behind: Some(&copied),
                ..how
            };
            source.digest(how).await
        }))
    }

    /// Runs bbcp. `copied` is told how many bytes are done, by steps of [`COPIED_STEP_BYTES`].
    async fn copy(
        &self,
        plan: &Plan,
        log_path: &std::path::Path,
        copied: &watch::Sender<u64>,
    ) -> Result<(), TransferError> {
        self.show(Phase::Copying, self.progress());
        tracing::info!(
            data_transfer_id = self.request.id,
            attempt = self.lease.attempt(),
            bytes = plan.size,
            source = %plan.source.path(),
            destination = %plan.target.path(),
            log_path = %log_path.display(),
            "copy started"
        );
        let metrics = self.service.metrics.as_ref();
        let counted =
            metrics.map(|metrics| metrics.copying(&plan.link.origin, &plan.link.destination));
        let seen = watch::Sender::new(bbcp::Progress::none(plan.size));
        let copying = bbcp::copy(plan, log_path, &self.stop, &seen);
        let mut changes = seen.subscribe();
        tokio::pin!(copying);
        let report = loop {
            tokio::select! {
                report = &mut copying => break report,
                Ok(()) = changes.changed() => {
                    let progress = progress(&changes.borrow());
                    copied.send_if_modified(|told| {
                        let is_more = progress.bytes_done >= told.saturating_add(COPIED_STEP_BYTES);
                        if is_more {
                            *told = progress.bytes_done;
                        }
                        is_more
                    });
                    if let Some(counted) = &counted {
                        counted.rate(progress.rate_bytes_per_s);
                    }
                    self.show(Phase::Copying, progress);
                    fault_point!(FirstProgress, Ok::<(), TransferError>(()))?;
                }
            }
        };
        let report = match report {
            Ok(report) => report,
            Err(error) => return Err(self.locate(plan, error).await),
        };
        tracing::info!(
            data_transfer_id = self.request.id,
            attempt = self.lease.attempt(),
            bytes = plan.size,
            elapsed_s = report.elapsed.as_secs_f64(),
            rate_bytes_per_s = report.rate_bytes_per_s,
            "copy finished; verifying"
        );
        let rate = report
            .rate_bytes_per_s
            .map_or(self.progress().rate_bytes_per_s, whole);
        traces::note(|| {
            vec![
                KeyValue::new("ccat.transfer.bytes", count(plan.size)),
                KeyValue::new("ccat.transfer.rate_bytes_per_s", count(rate)),
            ]
        });
        self.show(
            Phase::Verifying,
            Progress {
                bytes_done: plan.size,
                bytes_total: Some(plan.size),
                rate_bytes_per_s: rate,
            },
        );
        Ok(())
    }

    /// Tells a link that stands still from a storage that does: asks both ends for something small.
    async fn locate(&self, plan: &Plan, error: TransferError) -> TransferError {
        let error = plan.source.located(error).await;
        let TransferError::Stalled {
            idle,
            bytes_done,
            bytes_total,
            storage: None,
        } = error
        else {
            return error;
        };
        // An end that answers, if only by saying no, or that cannot be reached, has no storage that
        // hangs.
        let (origin, destination) = tokio::join!(
            timeout(PROBE_WITHIN, plan.source.inspect()),
            timeout(PROBE_WITHIN, plan.target.free_space()),
        );
        let storage = match (origin, destination) {
            (_, Err(_)) => Some(Role::Destination),
            (Err(_), _) => Some(Role::Origin),
            (Ok(_), Ok(_)) => None,
        };
        TransferError::Stalled {
            idle,
            bytes_done,
            bytes_total,
            storage,
        }
    }

    /// Gives the copy its final name, if the transfer is still ours by the database.
    async fn publish(&self, plan: &Plan, source: Facts) -> Result<(), TransferError> {
        self.show(Phase::Publishing, self.progress());
        let (service, lease) = (self.service, self.lease);
        let seen = *self.request.snapshots.borrow();
        service
            .settle(lease, &self.stop, || async {
                // A copy that is complete is in nobody's way any more.
                fault_point!(LeaseConfirmed, service.repository.renew(lease, seen).await).map(drop)
            })
            .await?;
        match fault_point!(Renamed, plan.target.publish().await) {
            // Perhaps by us: the answer to a rename can get lost on its way.
            Err(error @ TransferError::DestinationExists { .. }) => {
                let there = plan.target.inspect().await?.ok_or(error)?;
                self.recognize(plan, source, there).await?;
                self.service.discard(plan).await;
                Ok(())
            }
            published => published,
        }
    }

    /// Writes COMPLETED. From here on only a cold shutdown ends the wait for the database: the
    /// file is at its place, and the next attempt would find it there.
    async fn commit(
        &self,
        plan: &Plan,
        digest: &Digest,
        log_path: Option<PathBuf>,
    ) -> Result<Summary, TransferError> {
        let (service, lease) = (self.service, self.lease);
        let finished = Finished {
            bytes: plan.size,
            rate_bytes_per_s: self.progress().rate_bytes_per_s,
            digest: Some(digest.to_string()),
            log_path,
        };
        service
            .settle(lease, &self.request.cancelled, || {
                service.repository.complete(lease, &finished)
            })
            .await?;
        let summary = Summary {
            attempt: lease.attempt(),
            bytes: plan.size,
            elapsed: self.started.elapsed(),
            digest: digest.to_string(),
        };
        tracing::info!(
            data_transfer_id = self.request.id,
            attempt = summary.attempt,
            bytes = summary.bytes,
            elapsed_s = summary.elapsed.as_secs_f64(),
            digest = summary.digest,
            "transfer completed"
        );
        Ok(summary)
    }

    /// Does something that is dropped when the attempt has to stop.
    pub(super) async fn stoppable<T>(
        &self,
        doing: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                Err(TransferError::Interrupted { cause: Interruption::Cancelled })
            }
            done = doing => done,
        }
    }

    /// `transfer.log_dir`/ID/ID-ATTEMPT-TAG.log
    fn log_path(&self) -> PathBuf {
        let directory = &self.service.settings.transfer.log_dir;
        // Absolute, since the database's readers work elsewhere.
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.clone());
        directory
            .join(self.request.id.to_string())
            .join(format!("{}.log", self.lease.tag()))
    }

    pub(super) fn progress(&self) -> Progress {
        self.request.snapshots.borrow().progress
    }

    pub(super) fn show(&self, phase: Phase, progress: Progress) {
        self.request
            .snapshots
            .send_replace(Snapshot { phase, progress });
        self.phases
            .send_if_modified(|told| std::mem::replace(told, phase) != phase);
    }
}

/// Renews a lease.
struct Keeper {
    repository: Repository,
    lease: Lease,
    every: Duration,
    snapshots: watch::Receiver<Snapshot>,
    phases: watch::Receiver<Phase>,
    stop: CancellationToken,
    lost: CancellationToken,
    paused: Arc<OnceLock<PausedLink>>,
}

impl Keeper {
    /// Until the lease is lost, or the handle is dropped.
    async fn keep(mut self) {
        // As the lease was written when it was taken.
        let mut told = Phase::Preparing;
        loop {
            self.due(told).await;
            let lease = &self.lease;
            let seen = *self.snapshots.borrow();
            let progress = seen.progress;
            // Also if it fails: the next renewal tells it.
            told = seen.phase;
            match self.repository.renew(lease, seen).await {
                Ok(renewal) => {
                    tracing::debug!(
                        data_transfer_id = lease.data_transfer_id(),
                        attempt = lease.attempt(),
                        bytes = progress.bytes_done,
                        bytes_total = progress.bytes_total,
                        rate_bytes_per_s = progress.rate_bytes_per_s,
                        "progress"
                    );
                    if let Renewal::Stop(paused) = renewal {
                        self.make_way(paused);
                    }
                }
                Err(LeaseError::Lost) => {
                    tracing::warn!(
                        data_transfer_id = lease.data_transfer_id(),
                        attempt = lease.attempt(),
                        "lease lost: another worker or an operator took the transfer; stopping"
                    );
                    self.lost.cancel();
                    return self.stop.cancel();
                }
                Err(LeaseError::Database(error)) => tracing::warn!(
                    data_transfer_id = lease.data_transfer_id(),
                    error = %chain(&error),
                    "the lease could not be renewed; the copy goes on"
                ),
            }
        }
    }

    /// Waits until the lease is to be renewed: in time, or because the attempt has been in another
    /// phase than `told` for a while, so that people are not shown one that is long over.
    async fn due(&mut self, told: Phase) {
        let another_phase = async {
            // The attempt itself renews its lease before it publishes.
            let is_news = |phase: &Phase| ![told, Phase::Publishing].contains(phase);
            let news = self.phases.wait_for(is_news).await.map(drop);
            sleep(PHASE_SETTLES).await;
            news
        };
        tokio::select! {
            () = sleep(self.every) => {}
            Ok(()) = another_phase => {}
        }
    }

    /// Stops the copy. The lease is renewed all the same: it takes a while, and the row is ours to
    /// give back.
    fn make_way(&self, paused: PausedLink) {
        if self.paused.get().is_some() {
            return;
        }
        tracing::warn!(
            data_transfer_id = self.lease.data_transfer_id(),
            attempt = self.lease.attempt(),
            link = %paused.name,
            paused_by = paused.pause.by,
            reason = paused.pause.reason,
            "the link is paused; stopping the copy"
        );
        // Nobody else sets it.
        let _ = self.paused.set(paused);
        self.stop.cancel();
    }
}

/// Waiting for a lease's holder to show that it lives.
struct Waiting {
    ttl: Duration,
    until: Instant,
    first_seen: Option<chrono::DateTime<chrono::Utc>>,
}

impl Waiting {
    fn new(ttl: Duration) -> Self {
        // A little longer than the lease can live without its holder.
        Self {
            ttl,
            until: Instant::now() + ttl + ttl / 4,
            first_seen: None,
        }
    }

    /// Whether the holder may still be dead: it has not renewed since we first looked.
    fn worth_it(&mut self, held: &LeaseInfo) -> bool {
        let first = *self.first_seen.get_or_insert(held.renewed_at);
        first == held.renewed_at && Instant::now() < self.until
    }

    fn pause(&self) -> Duration {
        (self.ttl / 20).clamp(Duration::from_millis(50), Duration::from_secs(5))
    }
}

/// A location's row, as the plan wants it.
pub(super) fn location(row: Location) -> Result<plan::Location, TransferError> {
    let storage = match row.storage_type.known() {
        Some(entity::StorageType::S3) => StorageKind::S3,
        Some(entity::StorageType::Tape) => StorageKind::Tape,
        Some(entity::StorageType::Disk) | None => StorageKind::Disk,
    };
    let incomplete = |what: &str| TransferError::Database {
        source: format!("data location `{}` has no {what}", row.name).into(),
    };
    let site = row
        .site
        .as_ref()
        .ok_or_else(|| incomplete("site"))?
        .short_name
        .clone();
    let (host, root) = match (&row.disk, storage) {
        (Some(disk), _) => (disk.host.clone(), disk.path.clone()),
        (None, StorageKind::Disk) => {
            return Err(incomplete(
                "row in disk_data_location, so no host and no path",
            ));
        }
        (None, _) => (None, String::new()),
    };
    Ok(plan::Location {
        site,
        name: row.name,
        storage,
        host,
        root,
    })
}

fn progress(seen: &bbcp::Progress) -> Progress {
    Progress {
        bytes_done: seen.bytes_done,
        bytes_total: Some(seen.bytes_total),
        rate_bytes_per_s: seen.rate_bytes_per_s.map_or(0, whole),
    }
}

fn whole(rate: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "casts saturate"
    )]
    {
        rate as u64
    }
}
