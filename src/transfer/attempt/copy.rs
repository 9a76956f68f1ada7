//! The copy to the temporary name. If no digest is on record, the origin is read at the same time.

use std::path::Path;
use std::time::Duration;

use entity::FileEnd;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::AttemptRun;
use super::blocks::{BlockRecorder, KnownEnds};
use super::prepare::{EarlierPartial, Prepared};
use crate::faults::fault_point;
use crate::transfer::copying::{self, CopyPlace, CopyProgress};
use crate::transfer::endpoint::{ReadOptions, RunningDigest};
use crate::transfer::failures::{Role, TransferError};
use crate::transfer::lease::{Phase, Progress};
use crate::transfer::plan::Plan;
use crate::transfer::trace::{KeyValue, set_attributes, step};

/// Maximum time for a small request, after which the storage counts as hanging. No request waits longer than the copy
/// did.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of copied bytes between two wake-ups of the concurrent origin reader. The reader may fall behind by as much.
const COPIED_STEP_BYTES: u64 = 4 << 20;

impl AttemptRun<'_> {
    /// Adopts the partial copy of an earlier attempt, if there is one. Returns its size in bytes, and the blocks that
    /// need not be read again.
    pub(super) async fn begin_partial(
        &self,
        prepared: &Prepared,
    ) -> Result<(u64, KnownEnds), TransferError> {
        if !prepared.plan.keeps_partial() {
            return Ok((0, KnownEnds::default()));
        }
        self.run_unless_stopped(async {
            let bytes = self.adopt_partial(&prepared.plan, prepared.earlier).await?;
            let known = match prepared.earlier {
                Some(earlier) if bytes > 0 => {
                    self.known_blocks(prepared, &earlier.facts, bytes).await
                }
                _ => {
                    self.forget_blocks(&prepared.plan).await;
                    KnownEnds::default()
                }
            };
            Ok((bytes, known))
        })
        .await
    }

    async fn adopt_partial(
        &self,
        plan: &Plan,
        earlier: Option<EarlierPartial>,
    ) -> Result<u64, TransferError> {
        let earlier = earlier.map(|partial| partial.name);
        let bytes = fault_point!(PartialBegun, plan.target.begin_partial(earlier).await)?;
        let Some(earlier) = earlier.filter(|_| bytes > 0) else {
            return Ok(bytes);
        };
        tracing::info!(
            data_transfer_id = self.request.id.get(),
            attempt = self.lease.attempt().get(),
            bytes,
            earlier_attempt = earlier.attempt().get(),
            "resuming the partial copy of an earlier attempt"
        );
        let id = self.request.id;
        self.service.forget_temporary(id, earlier.attempt()).await;
        Ok(bytes)
    }

    /// Discards a partial copy that could not be completed because of `error`, and starts a new one.
    pub(super) async fn restart_partial(
        &self,
        plan: &Plan,
        bytes: u64,
        error: &TransferError,
    ) -> Result<(), TransferError> {
        tracing::warn!(
            data_transfer_id = self.request.id.get(),
            attempt = self.lease.attempt().get(),
            error = error.chain(),
            bytes,
            "partial copy of an earlier attempt discarded; copying from the start"
        );
        self.run_unless_stopped(async {
            plan.target.remove_temporary().await?;
            self.forget_blocks(plan).await;
            Ok(())
        })
        .await?;
        self.run_unless_stopped(self.adopt_partial(plan, None))
            .await
            .map(drop)
    }

    /// Copies to the temporary name. Returns the digests whose computation began with the copy.
    pub(super) async fn copy(
        &self,
        plan: &Plan,
        blocks: &BlockRecorder,
        log_path: &Path,
    ) -> Result<CopyDigests, TransferError> {
        let (places, needs_time) = (self.service.copy_places(), !plan.is_copied_by_ssh());
        let taking = async { Ok(places.take(&plan.link, needs_time).await) };
        let mut place = Some(self.run_unless_stopped(taking).await?);
        let copied = watch::Sender::new(0);
        let digests = CopyDigests::start(plan, &copied, blocks);
        fault_point!(
            CopyEnded,
            step(
                "transfer/copy",
                self.run_copy(plan, log_path, &copied, &mut place)
            )
            .await
        )?;
        // `copied` ends here: the reader need not wait for the copy any more.
        Ok(digests)
    }

    /// Runs the copying program. `copied` receives the number of copied bytes in steps of [`COPIED_STEP_BYTES`], and `place`
    /// becomes `None` as soon as the next copy may start.
    async fn run_copy(
        &self,
        plan: &Plan,
        log_path: &Path,
        copied: &watch::Sender<u64>,
        place: &mut Option<CopyPlace>,
    ) -> Result<(), TransferError> {
        self.show(Phase::Copying, self.progress());
        tracing::info!(
            data_transfer_id = self.request.id.get(),
            attempt = self.lease.attempt().get(),
            bytes = plan.size,
            source = %plan.source.path(),
            destination = %plan.target.path(),
            log_path = %log_path.display(),
            "copy started"
        );
        let metrics = self.service.metrics();
        let counted =
            metrics.map(|metrics| metrics.copying(&plan.link.origin, &plan.link.destination));
        let latest = watch::Sender::new(CopyProgress::none(plan.size));
        let copying = copying::copy(plan, log_path, &self.stop, &latest);
        let mut changes = latest.subscribe();
        tokio::pin!(copying);
        let mut free_at = None;
        let report = loop {
            tokio::select! {
                report = &mut copying => break report,
                () = sleep_until(free_at.unwrap_or_else(Instant::now)), if free_at.is_some() => {
                    (*place, free_at) = (None, None);
                }
                Ok(()) = changes.changed() => {
                    let latest = *changes.borrow_and_update();
                    free_at = place.as_ref().and_then(|place| place.free_at(&latest, Instant::now()));
                    let progress = progress(&latest);
                    copied.send_if_modified(|sent| {
                        let is_step = progress.bytes_done >= sent.saturating_add(COPIED_STEP_BYTES);
                        if is_step {
                            *sent = progress.bytes_done;
                        }
                        is_step
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
            Err(error) => {
                let error = plan.source.or_root_problem(error).await;
                return Err(locate_stall(plan, error).await);
            }
        };
        tracing::info!(
            data_transfer_id = self.request.id.get(),
            attempt = self.lease.attempt().get(),
            bytes = plan.size,
            elapsed_s = report.elapsed.as_secs_f64(),
            rate_bytes_per_s = report.rate_bytes_per_s,
            "copy finished; verifying"
        );
        let rate = report
            .rate_bytes_per_s
            .map_or(self.progress().rate_bytes_per_s, round_rate);
        set_attributes(|| {
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
                ..Default::default()
            },
        );
        Ok(())
    }
}

/// Digests of both ends that are computed while the copy runs. Dropping them stops the computation.
pub(super) struct CopyDigests {
    /// Digest of the origin, if it is needed. Bytes that bbcp has just read are still in the page cache.
    pub(super) origin: Option<RunningDigest>,
    /// Digest of the destination, if it is read while it grows.
    pub(super) destination: Option<RunningDigest>,
}

impl CopyDigests {
    /// No digest is computed while the copy runs.
    pub(super) fn none() -> Self {
        Self {
            origin: None,
            destination: None,
        }
    }

    fn start(plan: &Plan, copied: &watch::Sender<u64>, recorder: &BlockRecorder) -> Self {
        let start = |end| {
            let (plan, copied) = (plan.clone(), copied.subscribe());
            let blocks = plan.compares_blocks().then(|| recorder.blocks(end));
            AbortOnDropHandle::new(tokio::spawn(async move {
                let options = ReadOptions {
                    behind: Some(&copied),
                    is_growing: end == FileEnd::Destination,
                    blocks: blocks.as_ref(),
                    ..plan.read_options()
                };
                match end {
                    FileEnd::Origin => plan.source.digest(options).await,
                    FileEnd::Destination => plan.target.digest_temporary(options).await,
                }
            }))
        };
        Self {
            origin: plan.needs_origin_digest().then(|| start(FileEnd::Origin)),
            destination: plan
                .reads_growing_copy()
                .then(|| start(FileEnd::Destination)),
        }
    }
}

/// Determines the cause of a stalled copy, the link or a storage, by a small request to both ends. Returns every other
/// error unchanged.
async fn locate_stall(plan: &Plan, error: TransferError) -> TransferError {
    let TransferError::Stalled {
        idle,
        bytes_done,
        bytes_total,
    } = error
    else {
        return error;
    };
    // The storage of an end does not hang if that end answers, even with a refusal, or cannot be reached.
    let limit = plan.stall_timeout.min(PROBE_TIMEOUT);
    let (reachable, origin, destination) = tokio::join!(
        timeout(limit, plan.reach_ends()),
        timeout(limit, plan.source.inspect()),
        timeout(limit, plan.target.free_space()),
    );
    let role = match (reachable, origin, destination) {
        // The link is interrupted.
        (Err(_), _, _) => return error,
        (Ok(()), _, Err(_)) => Role::Destination,
        (Ok(()), Err(_), _) => Role::Origin,
        (Ok(()), Ok(_), Ok(_)) => return error,
    };
    TransferError::StalledStorage {
        idle,
        bytes_done,
        bytes_total,
        role,
    }
}

/// Converts a number to the type that traces use.
fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn progress(latest: &CopyProgress) -> Progress {
    Progress {
        bytes_done: latest.bytes_done,
        bytes_total: Some(latest.bytes_total),
        rate_bytes_per_s: latest.rate_bytes_per_s.map_or(0, round_rate),
        ..Default::default()
    }
}

fn round_rate(rate: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "casts saturate"
    )]
    {
        rate as u64
    }
}
