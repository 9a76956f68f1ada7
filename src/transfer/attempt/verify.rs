//! Verification of a copy against its origin.

use super::AttemptRun;
use super::prepare::Prepared;
use crate::faults::fault_point;
use crate::transfer::database_retry::write_with_lease;
use crate::transfer::digest::Digest;
use crate::transfer::endpoint::{Facts, RunningDigest};
use crate::transfer::failures::TransferError;
use crate::transfer::lease::Phase;
use crate::transfer::plan::Plan;

/// Result of a comparison.
enum DigestMatch {
    Same,
    Differs { origin: Digest },
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

impl AttemptRun<'_> {
    /// bbcp's exit code is not a proof: bbcp can end with 0 and a wrong file. Size and digest at both ends
    /// are a proof, if the origin has not changed meanwhile.
    pub(super) async fn verify(
        &self,
        prepared: &Prepared,
        origin: Option<RunningDigest>,
    ) -> Result<Digest, TransferError> {
        let plan = &prepared.plan;
        let path = || plan.target.path().to_string();
        let found = plan
            .target
            .inspect_temporary()
            .await?
            .map_or(0, |facts| facts.size);
        if found != plan.size {
            return Err(TransferError::TargetSize {
                path: path(),
                expected: plan.size,
                found,
            });
        }
        let options = plan.read_options();
        let origin = async {
            let Some(origin) = origin else {
                return Ok(None);
            };
            let digest = origin.await.map_err(|e| TransferError::Internal {
                what: e.to_string(),
            })??;
            fault_point!(OriginDigested, Ok::<(), TransferError>(()))?;
            Ok(Some(digest))
        };
        let destination = async {
            fault_point!(
                DestinationDigested,
                plan.target.digest_temporary(options).await
            )
        };
        let (origin, destination) = tokio::try_join!(origin, destination)?;
        let after = plan.source.inspect().await?;
        unchanged(plan, &prepared.source, &after)?;
        match self.compare(plan, origin, &destination).await? {
            DigestMatch::Same => Ok(destination),
            DigestMatch::Differs { origin } => Err(TransferError::ChecksumMismatch {
                path: path(),
                algorithm: origin.algorithm_name(),
                expected: origin.hex().into(),
                found: destination.hex().into(),
            }),
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
        let (origin, destination) = match &plan.recorded {
            Some(_) => (None, plan.target.digest(options).await?),
            None => {
                let both =
                    tokio::try_join!(plan.source.digest(options), plan.target.digest(options))?;
                (Some(both.0), both.1)
            }
        };
        match self.compare(plan, origin, &destination).await? {
            DigestMatch::Same => {
                unchanged(plan, &source, &plan.source.inspect().await?)?;
                // The program that wrote the file may not have called fsync.
                plan.target.make_durable().await?;
                Ok(destination)
            }
            DigestMatch::Differs { .. } => Err(other()),
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
        origin: Option<Digest>,
        destination: &Digest,
    ) -> Result<DigestMatch, TransferError> {
        if plan.recorded.as_ref() == Some(destination) {
            return Ok(DigestMatch::Same);
        }
        let origin = match origin {
            Some(origin) => origin,
            None => plan.source.digest(plan.read_options()).await?,
        };
        match &plan.recorded {
            Some(recorded) if origin != *recorded => Err(TransferError::OriginCorrupt {
                path: plan.source.path().to_string(),
                algorithm: origin.algorithm_name(),
                recorded: recorded.hex().into(),
                found: origin.hex().into(),
            }),
            _ if origin == *destination => Ok(DigestMatch::Same),
            _ => Ok(DigestMatch::Differs { origin }),
        }
    }
}
