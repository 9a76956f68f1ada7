//! Verification of a copy against its origin.

use std::sync::atomic::Ordering;

use super::AttemptRun;
use super::copy::CopyDigests;
use super::prepare::Prepared;
use crate::faults::fault_point;
use crate::transfer::database_retry::write_with_lease;
use crate::transfer::digest::{Difference, Digest, FileDigest, block_bytes};
use crate::transfer::endpoint::{Facts, RunningDigest};
use crate::transfer::failures::TransferError;
use crate::transfer::lease::Phase;
use crate::transfer::plan::Plan;

/// Result of a comparison.
enum DigestMatch {
    /// The copy is right. The digest is that of the whole file.
    Same(Digest),
    /// The copy differs from the origin, which comes first.
    Differs(Difference),
}

/// Refuses an origin that changed between two observations.
fn unchanged(plan: &Plan, before: &Facts, after: &Facts) -> Result<(), TransferError> {
    match before.difference(after) {
        None => Ok(()),
        Some(what) => Err(TransferError::OriginChanged {
            path: plan.source.path().to_string(),
            line: format!("{what} differs from before the copy"),
        }),
    }
}

/// A copy with the content of its origin.
pub(super) struct VerifiedCopy {
    /// Digest of the whole file.
    pub(super) digest: Digest,
    /// Facts about the copy after bbcp had ended.
    pub(super) facts: Facts,
    /// Description of how both ends were read, for people.
    pub(super) method: String,
}

impl AttemptRun<'_> {
    /// bbcp's exit code is not a proof: bbcp can end with 0 and a wrong file. Size and digest at both ends
    /// are a proof, if the origin has not changed meanwhile.
    pub(super) async fn verify(
        &self,
        prepared: &Prepared,
        digests: CopyDigests,
    ) -> Result<VerifiedCopy, TransferError> {
        let plan = &prepared.plan;
        let found = plan.target.inspect_temporary().await?;
        let Some(facts) = found.filter(|found| found.size == plan.size) else {
            return Err(TransferError::TargetSize {
                path: plan.target.path().to_string(),
                expected: plan.size,
                found: found.map_or(0, |found| found.size),
            });
        };
        let origin_time = ReadTime::of(digests.origin.as_ref());
        let destination_time = ReadTime::of(digests.destination.as_ref());
        let origin = async {
            let digest = match digests.origin {
                Some(running) => finished(running).await?,
                None if plan.needs_origin_digest() => {
                    plan.source.digest(plan.read_options()).await?
                }
                None => return Ok(None),
            };
            fault_point!(OriginDigested, Ok::<(), TransferError>(()))?;
            Ok(Some(digest))
        };
        let destination = async {
            let digest = match digests.destination {
                Some(running) => finished(running).await?,
                None => plan.target.digest_temporary(plan.read_options()).await?,
            };
            fault_point!(DestinationDigested, Ok::<(), TransferError>(()))?;
            Ok(digest)
        };
        let ((origin, destination), after) = tokio::try_join!(
            async { tokio::try_join!(origin, destination) },
            plan.source.inspect(),
        )?;
        unchanged(plan, &prepared.source, &after)?;
        let mut method = method(
            origin.as_ref().map(|digest| (digest, origin_time)),
            (&destination, destination_time),
        );
        let mut compared = self.compare(plan, origin, destination).await;
        let is_refuted = matches!(
            compared,
            Ok(DigestMatch::Differs(_)) | Err(TransferError::OriginCorrupt { .. })
        );
        if destination_time == ReadTime::DuringCopy && is_refuted {
            // The copy may have been read before it had its final content; a recorded block or state may be wrong.
            tracing::warn!(
                data_transfer_id = self.request.id.get(),
                attempt = self.lease.attempt().get(),
                "digest read during the copy differs from the origin; reading both files once more"
            );
            let options = plan.read_options();
            let (origin, destination) = tokio::try_join!(
                plan.source.digest(options),
                plan.target.digest_temporary(options),
            )?;
            let time = ReadTime::AfterCopy;
            method = self::method(Some((&origin, time)), (&destination, time));
            compared = self.compare(plan, Some(origin), destination).await;
        }
        match compared? {
            DigestMatch::Same(digest) => {
                self.verified.store(plan.size, Ordering::Relaxed);
                Ok(VerifiedCopy {
                    digest,
                    facts,
                    method,
                })
            }
            DigestMatch::Differs(Difference { block, one, other }) => {
                Err(TransferError::ChecksumMismatch {
                    path: plan.target.path().to_string(),
                    algorithm: one.algorithm_name(),
                    expected: one.hex().into(),
                    found: other.hex().into(),
                    part: block.map_or_else(String::new, |index| block_text(index, plan.size)),
                })
            }
        }
    }

    /// Compares the file at the final path with the package that would be copied.
    pub(super) async fn compare_existing(
        &self,
        plan: &Plan,
        source: Facts,
        existing: Facts,
    ) -> Result<Digest, TransferError> {
        plan.refuse_same_file(&source, &existing)?;
        let other = || TransferError::DestinationExists {
            path: plan.target.path().to_string(),
        };
        if existing.size != source.size {
            return Err(other());
        }
        self.refuse_one_directory(plan).await?;
        self.show(Phase::Verifying, self.progress());
        let options = plan.read_options();
        let (origin, destination) = match plan.needs_origin_digest() {
            false => (None, plan.target.digest(options).await?),
            true => {
                let both =
                    tokio::try_join!(plan.source.digest(options), plan.target.digest(options))?;
                (Some(both.0), both.1)
            }
        };
        match self.compare(plan, origin, destination).await? {
            DigestMatch::Same(digest) => {
                // The program that wrote the file may not have called fsync.
                let (after, ()) =
                    tokio::try_join!(plan.source.inspect(), plan.target.make_durable())?;
                unchanged(plan, &source, &after)?;
                Ok(digest)
            }
            DigestMatch::Differs(_) => Err(other()),
        }
    }

    /// Refuses a file at the final path that is the package itself, reached through an export. An export can
    /// have another kind of file system and other device numbers, so device and inode prove nothing. A new
    /// name in the destination's directory appears beside the package only if both directories are one.
    async fn refuse_one_directory(&self, plan: &Plan) -> Result<(), TransferError> {
        let (source, target) = (plan.source.clone(), plan.target.clone());
        let (service, lease) = (self.service.clone(), self.lease);
        let name = target.temporary();
        // Recorded before the marker is made, so that every file of a killed worker is on record.
        let text = name.to_string();
        write_with_lease(lease, &self.stop, || {
            service.repository().record_marker(lease, &text)
        })
        .await?;
        let (id, attempt) = (lease.data_transfer_id(), lease.attempt());
        // A task of its own: it runs to its end even if the attempt is stopped, so that the marker is always removed.
        let probing = tokio::spawn(async move {
            target.make_marker().await?;
            fault_point!(MarkerMade);
            let seen = source.sees(&name).await;
            target.remove_temporary().await?;
            service.forget_temporary(id, attempt).await;
            seen
        });
        let seen = probing.await.unwrap_or_else(|error| {
            Err(TransferError::Internal {
                what: error.to_string(),
            })
        });
        match seen? {
            true => Err(plan.same_file_error()),
            false => Ok(()),
        }
    }

    /// Compares the copy with the origin. If the package has a recorded checksum, it decides: a copy that
    /// agrees with it is right, and the origin is read only to find out which end is wrong.
    async fn compare(
        &self,
        plan: &Plan,
        origin: Option<FileDigest>,
        destination: FileDigest,
    ) -> Result<DigestMatch, TransferError> {
        if let Some(found) = &destination.whole
            && plan.recorded.as_ref() == Some(found)
        {
            return Ok(DigestMatch::Same(found.clone()));
        }
        let origin = match origin {
            Some(origin) => origin,
            None => plan.source.digest(plan.read_options()).await?,
        };
        let internal = |what: &dyn std::fmt::Display| TransferError::Internal {
            what: what.to_string(),
        };
        let difference = origin
            .difference(&destination)
            .map_err(|error| internal(&error))?;
        // If both ends have the same content, both have this digest.
        let whole = match (&origin.whole, &difference) {
            (None, None) => destination.whole,
            (whole, _) => whole.clone(),
        };
        match (whole, &plan.recorded) {
            (Some(found), Some(recorded)) if found != *recorded => {
                Err(TransferError::OriginCorrupt {
                    path: plan.source.path().to_string(),
                    algorithm: found.algorithm_name(),
                    recorded: recorded.hex().into(),
                    found: found.hex().into(),
                })
            }
            (whole, _) => match difference {
                Some(difference) => Ok(DigestMatch::Differs(difference)),
                None => whole
                    .map(DigestMatch::Same)
                    .ok_or_else(|| internal(&"no end has the digest of the whole file")),
            },
        }
    }
}

/// When a file was read for its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadTime {
    DuringCopy,
    AfterCopy,
}

impl ReadTime {
    fn of(running: Option<&RunningDigest>) -> Self {
        running.map_or(Self::AfterCopy, |_| Self::DuringCopy)
    }
}

/// Describes for people how both ends were read; an origin that was not read has a recorded checksum.
fn method(origin: Option<(&FileDigest, ReadTime)>, destination: (&FileDigest, ReadTime)) -> String {
    let origin = origin.map_or_else(
        || "recorded checksum".to_owned(),
        |(d, time)| describe(d, time),
    );
    let destination = describe(destination.0, destination.1);
    format!("origin: {origin}; destination: {destination}")
}

/// Describes for people how a digest was computed.
fn describe(digest: &FileDigest, time: ReadTime) -> String {
    let program = digest.program.as_deref().unwrap_or("this program");
    let when = match time {
        ReadTime::DuringCopy => "during the copy",
        ReadTime::AfterCopy => "after the copy",
    };
    match digest.read_from {
        0 => format!("{program}, {when}"),
        from => format!("{program}, {when}, from byte {from}"),
    }
}

/// Names a block in a message.
fn block_text(index: usize, file_bytes: u64) -> String {
    let bytes = block_bytes(file_bytes);
    let start = bytes.saturating_mul(u64::try_from(index).unwrap_or(u64::MAX));
    let end = file_bytes.min(start.saturating_add(bytes));
    format!(" in bytes {start} to {}", end.saturating_sub(1))
}

/// Waits for a digest that a task computes.
async fn finished(running: RunningDigest) -> Result<FileDigest, TransferError> {
    running.await.map_err(|e| TransferError::Internal {
        what: e.to_string(),
    })?
}
