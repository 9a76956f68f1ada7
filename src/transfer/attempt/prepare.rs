//! Preparation of a copy: the plan, the claim of the destination, the inspection of both ends, the removal of files that
//! earlier attempts left, and the record of the files of this one.

use std::path::PathBuf;

use super::AttemptRun;
use crate::faults::fault_point;
use crate::settings::LinkSettings;
use crate::transfer::database_retry::{retry_until_reachable, write_with_lease};
use crate::transfer::endpoint::{Facts, TemporaryName};
use crate::transfer::failures::TransferError;
use crate::transfer::lease::{LeaseError, Phase, Progress};
use crate::transfer::link::LinkName;
use crate::transfer::plan::{Attempt, Plan, PlanInput, file_settings, plan};
use crate::transfer::repository::ClaimError;
use crate::transfer::trace::{KeyValue, set_attributes, step};

/// A partial copy of an earlier attempt that this one can complete.
#[derive(Clone, Copy)]
pub(super) struct EarlierPartial {
    pub(super) name: TemporaryName,
    pub(super) facts: Facts,
}

/// Data for the steps after the preparation.
pub(super) struct Prepared {
    pub(super) plan: Plan,
    /// Facts about the origin before the copy.
    pub(super) source: Facts,
    pub(super) earlier: Option<EarlierPartial>,
    pub(super) destination: DestinationState,
}

/// Findings at both ends.
struct Ends {
    source: Facts,
    /// Entry at the final path.
    existing: Option<Facts>,
    earlier: Option<EarlierPartial>,
    /// Bytes available to us at the destination.
    available: u64,
}

/// State of the final path before the copy.
pub(super) enum DestinationState {
    /// A file exists already.
    Exists(Facts),
    /// No file exists. There is room for the copy, and the names of its files are on record.
    Free {
        /// bbcp's log file.
        log_path: PathBuf,
    },
}

impl AttemptRun<'_> {
    /// Makes the plan, claims the destination and inspects both ends.
    pub(super) async fn prepare(&self) -> Result<Prepared, TransferError> {
        if let Some(displaced) = &self.acquired.displaced {
            tracing::warn!(
                data_transfer_id = self.request.id.get(),
                attempt = self.lease.attempt().get(),
                previous_owner = %displaced.lease.owner,
                reason = %displaced.expiry_reason,
                "transfer taken over from a dead attempt"
            );
        }
        let mut plan = step("transfer/plan", self.plan()).await?;
        set_attributes(|| {
            let LinkName {
                origin,
                destination,
            } = &plan.link;
            vec![
                KeyValue::new("ccat.transfer.origin", origin.clone()),
                KeyValue::new("ccat.transfer.destination", destination.clone()),
            ]
        });
        step("transfer/claim", self.claim(&plan)).await?;
        let Ends {
            source,
            existing,
            earlier,
            available,
        } = fault_point!(
            Prepared,
            step(
                "transfer/prepare",
                self.run_unless_stopped(self.prepare_ends(&mut plan))
            )
            .await
        )?;
        fault_point!(LeftoversSwept);
        let destination = match existing {
            Some(existing) => DestinationState::Exists(existing),
            None => {
                self.check_free_space(&plan, earlier, available)?;
                let log_path = self.record_files(&plan).await?;
                DestinationState::Free { log_path }
            }
        };
        Ok(Prepared {
            plan,
            source,
            earlier,
            destination,
        })
    }

    /// Reads the rows and makes the plan.
    async fn plan(&self) -> Result<Plan, TransferError> {
        let id = self.request.id;
        let (service, repository) = (self.service, self.service.repository());
        let record = retry_until_reachable(&self.stop, || async {
            fault_point!(PlanRead, repository.transfer(id).await)
        })
        .await?
        .ok_or(TransferError::UnknownTransfer { id })?;
        let input = PlanInput::from_rows(record)?;
        let link = self.link_settings(&input).await?;
        let attempt = Attempt {
            transfer_id: id,
            number: self.lease.attempt(),
            lease_token: self.lease.token(),
        };
        let plan = plan(attempt, &input, &link, service.hosts())?;
        if let (Some(checksum), None) = (&input.package.checksum, &plan.recorded) {
            tracing::warn!(
                data_transfer_id = id.get(),
                checksum,
                "recorded checksum has an unknown form; only the two ends are compared"
            );
        }
        Ok(plan)
    }

    /// Settings of the link: those of the settings file, overridden by those of the link's row.
    async fn link_settings(&self, input: &PlanInput) -> Result<LinkSettings, TransferError> {
        let settings = file_settings(self.service.settings(), input)?;
        let name = input.link();
        let reading = || self.service.repository().link(&name);
        let link = retry_until_reachable(&self.stop, reading).await?;
        link.overrides
            .apply_to(settings)
            .map_err(|problem| TransferError::LinkSettings {
                origin: name.origin,
                destination: name.destination,
                problem,
            })
    }

    /// Claims the destination, so that no other transfer copies to it at the same time.
    async fn claim(&self, plan: &Plan) -> Result<(), TransferError> {
        let (service, lease) = (self.service, self.lease);
        let destination = plan.destination_key(&service.owner().host);
        let claimed = retry_until_reachable(&self.stop, || async {
            match service
                .repository()
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

    /// Inspects the origin, and sets the size of the plan to that of the file. Then makes the directory at the
    /// destination, inspects it, and removes the files that earlier attempts left there: all at the same time, since
    /// each question to a distant host takes a round trip.
    async fn prepare_ends(&self, plan: &mut Plan) -> Result<Ends, TransferError> {
        let source = inspect_origin(plan).await?;
        plan.size = source.size;
        self.show(
            Phase::Preparing,
            Progress {
                bytes_total: Some(source.size),
                ..Default::default()
            },
        );
        let leftovers = async {
            let earlier = self.find_earlier_partial(plan).await?;
            let spared = earlier.map(|partial| partial.name);
            self.remove_earlier_files(plan, spared).await;
            Ok::<_, TransferError>(earlier)
        };
        let (available, existing, earlier) = tokio::join!(
            plan.target.ensure_directory(),
            plan.target.inspect(),
            leftovers,
        );
        Ok(Ends {
            source,
            available: available?,
            existing: existing?,
            earlier: earlier?,
        })
    }

    /// Finds the partial copy of an earlier attempt that this one can complete.
    async fn find_earlier_partial(
        &self,
        plan: &Plan,
    ) -> Result<Option<EarlierPartial>, TransferError> {
        if !plan.keeps_partial() {
            return Ok(None);
        }
        let latest = self.acquired.leftovers.last();
        let Some(name) = latest.and_then(|left| TemporaryName::parse(&left.temporary_name)) else {
            return Ok(None);
        };
        let facts = plan.target.inspect_leftover(name).await?;
        let facts = facts.filter(|facts| facts.size > 0);
        Ok(facts.map(|facts| EarlierPartial { name, facts }))
    }

    /// Records the names of a copy's files before they are made. Returns the path of bbcp's log file.
    async fn record_files(&self, plan: &Plan) -> Result<PathBuf, TransferError> {
        let path = self.log_path();
        let name = plan.target.temporary().to_string();
        let (service, lease) = (self.service, self.lease);
        write_with_lease(lease, &self.stop, || {
            service.repository().record_files(lease, &name, &path)
        })
        .await?;
        Ok(path)
    }

    /// Refuses a package that does not fit in the `available` bytes. The destination already has the bytes of `earlier`.
    fn check_free_space(
        &self,
        plan: &Plan,
        earlier: Option<EarlierPartial>,
        available: u64,
    ) -> Result<(), TransferError> {
        let present = earlier.map_or(0, |partial| partial.facts.size);
        let needed = plan
            .size
            .saturating_sub(present)
            .saturating_add(self.service.settings().transfer.free_space_margin);
        if available >= needed {
            return Ok(());
        }
        Err(TransferError::StorageLow {
            path: plan.target.path().parent().to_string(),
            available,
            needed,
        })
    }

    /// `transfer.log_dir`/ID/ID-ATTEMPT-TAG.log
    fn log_path(&self) -> PathBuf {
        let directory = &self.service.settings().transfer.log_dir;
        // Absolute, since readers of the database have other working directories.
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.clone());
        directory
            .join(self.request.id.to_string())
            .join(format!("{}.log", self.lease.tag()))
    }
}

/// Returns the facts of the origin; refuses a file that does not have the recorded size. For a package without a
/// recorded size, each size is right.
async fn inspect_origin(plan: &Plan) -> Result<Facts, TransferError> {
    let facts = plan.source.inspect().await?;
    if plan.size != 0 && plan.size != facts.size {
        return Err(TransferError::OriginSize {
            path: plan.source.path().to_string(),
            recorded: plan.size,
            found: facts.size,
        });
    }
    Ok(facts)
}
