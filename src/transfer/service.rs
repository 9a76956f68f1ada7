//! The transfer service: runs attempts for its callers.
//!
//! The service does not decide what a failure means for the row: [`Failed`] passes the lease on to the caller, which
//! knows the retry policy. Waiting for a lease is in [`super::acquire`], and removing files is in `attempt/removal.rs`.

use std::sync::Arc;

use super::attempt::AttemptRun;
use super::copying::CopyPlaces;
use super::lease::Owner;
use super::plan::{Hosts, LocalHost};
use super::repository::Repository;
use super::request::{Failed, Request, Success};
use super::trace::{KeyValue, set_attributes, step};
use crate::metrics::TransferMetrics;
use crate::settings::Settings;

/// Runs attempts. Clones share all fields.
#[derive(Debug, Clone)]
pub struct TransferService {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    hosts: Hosts,
    copy_places: CopyPlaces,
    metrics: Option<TransferMetrics>,
}

impl TransferService {
    /// Creates a service that acquires leases as `owner`.
    #[must_use]
    pub fn new(repository: Repository, settings: Arc<Settings>, owner: Owner) -> Self {
        let hosts = Hosts::new(LocalHost::of_settings(&owner.host, &settings.transfer));
        let copy_places = CopyPlaces::new(settings.transfer.max_copies_per_link);
        Self {
            copy_places,
            repository,
            settings,
            owner,
            hosts,
            metrics: None,
        }
    }

    /// Sets the metrics that count attempts and copied bytes.
    #[must_use]
    pub fn with_metrics(self, metrics: TransferMetrics) -> Self {
        Self {
            metrics: Some(metrics),
            ..self
        }
    }

    /// Metrics of transfers, if they are collected.
    #[must_use]
    pub fn metrics(&self) -> Option<&TransferMetrics> {
        self.metrics.as_ref()
    }

    /// Repository of transfers.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Process that holds the leases.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// This host, and the connections to others.
    pub(super) fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// Places for the copies of each link.
    pub(super) fn copy_places(&self) -> &CopyPlaces {
        &self.copy_places
    }

    /// Settings of the program.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Runs one attempt: acquires the lease, and runs the steps while it is renewed.
    ///
    /// # Errors
    /// [`Failed`]; its lease, if any, is no longer renewed, and the caller has to end the attempt with it.
    pub async fn run(&self, request: &Request) -> Result<Success, Failed> {
        let ended = self.acquire_and_run(request).await;
        ended.map_err(|failed| Failed {
            error: request.with_reason(failed.error),
            ..failed
        })
    }

    async fn acquire_and_run(&self, request: &Request) -> Result<Success, Failed> {
        let acquired = match step("transfer/acquire", self.acquire(request)).await? {
            Some(acquired) => acquired,
            None => return Ok(Success::AlreadyCompleted),
        };
        set_attributes(|| {
            let attempt = i64::from(acquired.lease.attempt().get());
            vec![KeyValue::new("ccat.transfer.attempt", attempt)]
        });
        AttemptRun::new(self, request, &acquired).run().await
    }
}
