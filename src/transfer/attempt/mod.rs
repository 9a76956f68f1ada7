//! One attempt that holds its lease: [`prepare`], [`copy`], [`verify`], [`publish`], in this order, while the lease is
//! renewed.
//!
//! Every step may be repeated, and a process that dies between any two of them leaves either nothing
//! under the final name or the verified file, which the next attempt recognizes.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::blocks::KnownEnds;
use self::copy::CopyDigests;
use self::prepare::{DestinationState, Prepared};
use self::verify::VerifiedCopy;
use super::endpoint::Facts;
use super::failures::{PartialCopy, TransferError};
use super::lease::{Lease, Phase, Progress, Snapshot};
use super::lease_renewer::LeaseRenewer;
use super::link::PausedLink;
use super::plan::Plan;
use super::repository::Acquired;
use super::request::{Failed, LeaseAtEnd, Request, Success, Summary};
use super::service::TransferService;
use crate::faults::fault_point;
use crate::transfer::trace::step;
use service_connection::error_chain::panic_text;

mod blocks;
mod copy;
mod prepare;
mod publish;
mod removal;
mod verify;

pub use removal::Cleared;

/// Files of a failed attempt that are kept after it.
#[derive(Default)]
struct AttemptFiles {
    /// Log file with bbcp's output.
    log_path: Option<PathBuf>,
    /// Plan with the partial copy that the next attempt can complete.
    partial: Option<Box<Plan>>,
}

/// A running attempt.
pub(super) struct AttemptRun<'a> {
    service: &'a TransferService,
    request: &'a Request,
    /// Findings of the acquisition.
    acquired: &'a Acquired,
    lease: &'a Lease,
    /// Cancelled by the caller or by the lease renewer.
    stop: CancellationToken,
    /// Cancelled by the lease renewer when the lease is lost.
    lost: CancellationToken,
    /// Set by the lease renewer when the link is paused and its running copies have to stop.
    paused: Arc<OnceLock<PausedLink>>,
    /// The phase alone, for the lease renewer, which does not need the progress.
    phases: watch::Sender<Phase>,
    /// Number of bytes on which both ends agree.
    verified: Arc<AtomicU64>,
    /// True if an old record of blocks could not be deleted, so that new ones must not be mixed with it.
    has_old_blocks: AtomicBool,
    started: Instant,
}

impl<'a> AttemptRun<'a> {
    pub(super) fn new(
        service: &'a TransferService,
        request: &'a Request,
        acquired: &'a Acquired,
    ) -> Self {
        Self {
            service,
            request,
            acquired,
            lease: &acquired.lease,
            stop: request.cancelled.child_token(),
            lost: CancellationToken::new(),
            paused: Arc::default(),
            phases: watch::Sender::new(Phase::Preparing),
            verified: Arc::default(),
            has_old_blocks: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    /// Runs the attempt to its end, and renews its lease meanwhile.
    pub(super) async fn run(&self) -> Result<Success, Failed> {
        let renewal = self.renew_lease();
        let mut files = AttemptFiles::default();
        // A panic is handled like any other failure: if the row were not written, the transfer would be attempted again
        // and again.
        let running = AssertUnwindSafe(self.run_steps(&mut files));
        let outcome = running.catch_unwind().await.unwrap_or_else(|panic| {
            Err(TransferError::Internal {
                what: panic_text(&*panic).to_owned(),
            })
        });
        drop(renewal);
        outcome.map_err(|error| self.failed(error, files))
    }

    /// Renews the lease until the returned handle is dropped.
    fn renew_lease(&self) -> AbortOnDropHandle<()> {
        let renewer = LeaseRenewer {
            repository: self.service.repository().clone(),
            lease: self.lease.clone(),
            interval: self.service.settings().transfer.lease_renew_interval,
            snapshots: self.request.snapshots.subscribe(),
            phases: self.phases.subscribe(),
            stop: self.stop.clone(),
            lost: self.lost.clone(),
            paused: self.paused.clone(),
        };
        AbortOnDropHandle::new(tokio::spawn(renewer.run()))
    }

    async fn run_steps(&self, files: &mut AttemptFiles) -> Result<Success, TransferError> {
        let prepared = self.prepare().await?;
        let log_path = match &prepared.destination {
            DestinationState::Exists(existing) => {
                return self.finish_existing(&prepared, *existing).await;
            }
            DestinationState::Free { log_path } => log_path.clone(),
        };
        files.log_path = Some(log_path.clone());
        let copied = self.copy_and_publish(&prepared, &log_path).await;
        if let Err(error) = &copied {
            let plan = prepared.plan;
            let worth_keeping = plan.keeps_partial() && error.partial() == PartialCopy::Keep;
            if worth_keeping && !self.lost.is_cancelled() {
                files.partial = Some(Box::new(plan));
            } else {
                self.service.discard(&plan).await;
            }
        }
        copied.map(Success::Copied)
    }

    /// Completes a transfer whose file is at its destination already.
    async fn finish_existing(
        &self,
        prepared: &Prepared,
        existing: Facts,
    ) -> Result<Success, TransferError> {
        let plan = &prepared.plan;
        let recognizing =
            self.run_unless_stopped(self.compare_existing(plan, prepared.source, existing));
        let digest = step("transfer/verify", recognizing).await?;
        if prepared.earlier.is_some() {
            // The partial copy was kept for a copy that is now unnecessary.
            self.remove_earlier_files(plan, None).await;
        }
        let committing = self.commit(plan, &digest, None, None);
        let summary = step("transfer/commit", committing).await?;
        Ok(Success::AlreadyThere(summary))
    }

    async fn copy_and_publish(
        &self,
        prepared: &Prepared,
        log_path: &Path,
    ) -> Result<Summary, TransferError> {
        let plan = &prepared.plan;
        let (resumed, known) = self.begin_partial(prepared).await?;
        let mut verified = match self.copy_and_verify(prepared, known, log_path).await {
            // The earlier partial copy may be the cause. bbcp completes any file, even one that is not a part of the
            // package.
            Err(error) if resumed > 0 && error.partial() == PartialCopy::Restart => {
                self.restart_partial(plan, resumed, &error).await?;
                self.copy_and_verify(prepared, KnownEnds::default(), log_path)
                    .await?
            }
            verified => verified?,
        };
        match step("transfer/publish", self.publish(prepared, &verified)).await {
            Err(TransferError::CopyChanged { .. }) => {
                tracing::warn!(
                    data_transfer_id = self.request.id.get(),
                    attempt = self.lease.attempt().get(),
                    "the copy changed after its verification; verifying it once more"
                );
                let verifying = self.verify(prepared, CopyDigests::none());
                verified = self.run_unless_stopped(verifying).await?;
                step("transfer/publish", self.publish(prepared, &verified)).await?;
            }
            published => published?,
        }
        let VerifiedCopy { digest, method, .. } = verified;
        let committing = self.commit(plan, &digest, Some(method), Some(log_path.to_owned()));
        let summary = step("transfer/commit", committing).await?;
        if plan.may_record_blocks() {
            self.service.forget_blocks(self.request.id).await;
        }
        if let Some(metrics) = self.service.metrics() {
            metrics.copied(&plan.link.origin, &plan.link.destination, summary.bytes);
        }
        Ok(summary)
    }

    /// Copies to the temporary name and verifies the result against the origin.
    async fn copy_and_verify(
        &self,
        prepared: &Prepared,
        known: KnownEnds,
        log_path: &Path,
    ) -> Result<VerifiedCopy, TransferError> {
        let recorder = self.record_blocks(prepared, known);
        let copying = async {
            let digests = self.copy(&prepared.plan, &recorder, log_path).await?;
            let verifying = self.run_unless_stopped(self.verify(prepared, digests));
            let verified = step("transfer/verify", verifying).await?;
            fault_point!(Verified, Ok::<(), TransferError>(()))?;
            Ok(verified)
        };
        let copied = copying.await;
        // Also after a success: no block is recorded behind the commit, which deletes the record.
        recorder.finish().await;
        copied
    }

    /// The result of an attempt that ended with `error`.
    fn failed(&self, error: TransferError, files: AttemptFiles) -> Failed {
        let error = self.cause(error);
        let lease = self.lease.clone();
        Failed {
            lease: match error {
                TransferError::LeaseLost { .. } => LeaseAtEnd::Lost(lease),
                _ => LeaseAtEnd::Held(lease),
            },
            error,
            progress: self.progress(),
            log_path: files.log_path,
            partial: files.partial,
        }
    }

    /// Returns the reason why an attempt ended with `error`. A stopped step reports only that it was stopped; the
    /// attempt knows if the lease renewer stopped it, and why.
    fn cause(&self, error: TransferError) -> TransferError {
        if self.lost.is_cancelled() {
            return TransferError::LeaseLost {
                id: self.request.id,
            };
        }
        match error {
            TransferError::Interrupted { .. } if let Some(paused) = self.paused.get() => {
                paused.clone().into()
            }
            error => error,
        }
    }

    /// Runs a step that is dropped when the attempt has to stop.
    async fn run_unless_stopped<T>(
        &self,
        doing: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                Err(TransferError::STOPPED)
            }
            done = doing => done,
        }
    }

    fn progress(&self) -> Progress {
        self.request.snapshots.borrow().progress
    }

    /// Publishes the state of the attempt to its caller and to the lease renewer.
    fn show(&self, phase: Phase, progress: Progress) {
        let progress = Progress {
            bytes_verified: self.verified.load(Ordering::Relaxed),
            ..progress
        };
        self.request
            .snapshots
            .send_replace(Snapshot { phase, progress });
        self.phases
            .send_if_modified(|shown| std::mem::replace(shown, phase) != phase);
    }
}
