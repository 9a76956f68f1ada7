//! Measurement of a link: round-trip time, limits of the kernels, and rates of trial copies.
//!
//! A trial is a copy by bbcp with the settings of the link, under a temporary name of this program that no transfer has.
//! The copied file is sparse: it takes no space at the sender. Nothing is ever written in an origin's directory: the file
//! is in `transfer.log_dir`, or in the directory for temporary files of a remote sender.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::copying::{self, CopyProgress, Report};
use super::endpoint::{AbsolutePath, Endpoint, Remote, Source, Target, TemporaryName};
use super::failures::{Role, THIS_HOST, TransferError};
use super::id::AttemptNumber;
use super::inspection::{LocationProbe, NO_TRANSFER, is_disk_at};
use super::link::LinkName;
use super::plan::{Attempt, Hosts, Plan};
use super::repository::LocationMap;
use crate::settings::LinkSettings;

mod kernel;
mod recommendation;
mod trial_file;

pub(in crate::transfer) use kernel::NAMES as KERNEL_NAMES;
pub(crate) use kernel::{KernelLimits, needed_buffers, stream_limit};
pub(crate) use recommendation::{ASSUMED_RATE, Measured, Recommendation};
use trial_file::TrialFile;

/// Number of round trips that are measured; the shortest counts.
const ROUND_TRIPS: u32 = 5;

/// Smallest trial that measures anything, in bytes.
const LEAST_BYTES: u64 = 1 << 20;

/// Seconds between bbcp's progress lines in a trial; it prints one each second then.
const PROGRESS_INTERVAL: u32 = 2;

/// A link between this host and another one.
#[derive(Debug)]
pub(crate) struct LinkProbe {
    link: LinkName,
    settings: LinkSettings,
    origin: LocationProbe,
    destination: LocationProbe,
    free_space_margin: u64,
}

/// Reason why a link cannot be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// A site has no directory.
    #[error("the site `{0}` has no active location on a disk")]
    NoLocation(String),
    /// No packet would leave this host.
    #[error("both ends of {0} are on this host, so there is nothing to measure")]
    OneHost(LinkName),
    /// The failure that a transfer would have.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// Limits of the trials.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrialLimits {
    /// Maximum size of the file in bytes.
    pub(crate) size: u64,
    /// Maximum time with data on their way.
    pub(crate) duration: Duration,
}

/// Result of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct TrialResult {
    /// Number of streams.
    pub(crate) streams: u8,
    /// Number of bytes that arrived, as far as known.
    pub(crate) bytes: u64,
    /// Rate of the second half, after the slow start, in bytes per second.
    pub(crate) rate_bytes_per_s: f64,
}

impl LinkProbe {
    /// Creates the probe of a link with an end on this host, between the first suitable locations of both sites.
    ///
    /// # Errors
    /// The link has no such locations.
    pub(crate) fn new(
        map: &LocationMap,
        link: &LinkName,
        settings: LinkSettings,
        hosts: &Hosts,
        free_space_margin: u64,
    ) -> Result<Self, ProbeError> {
        let at = |role, site: &str| {
            let locations = map.locations.iter().filter(|l| is_disk_at(l, site));
            let probes = locations.map(|l| LocationProbe::new(role, l, &settings.ssh, hosts));
            let probes = probes.collect::<Result<Vec<_>, _>>()?;
            match probes.is_empty() {
                true => Err(ProbeError::NoLocation(site.to_owned())),
                false => Ok(probes),
            }
        };
        let origins = at(Role::Origin, &link.origin)?;
        let destinations = at(Role::Destination, &link.destination)?;
        let pairs = origins
            .iter()
            .flat_map(|origin| destinations.iter().map(move |other| (origin, other)));
        let mut refused = ProbeError::OneHost(link.clone());
        for (origin, destination) in pairs {
            match (origin.remote(), destination.remote()) {
                (None, None) => {}
                (Some(from), Some(to)) => {
                    refused = TransferError::BothRemote {
                        origin_host: from.host.to_string(),
                        destination_host: to.host.to_string(),
                    }
                    .into();
                }
                _ => {
                    return Ok(Self {
                        link: link.clone(),
                        origin: origin.clone(),
                        destination: destination.clone(),
                        free_space_margin,
                        settings,
                    });
                }
            }
        }
        Err(refused)
    }

    /// Names of the hosts of both ends.
    pub(crate) fn hosts(&self) -> [String; 2] {
        [&self.origin, &self.destination].map(|end| match end.remote() {
            Some(remote) => remote.host.to_string(),
            None => THIS_HOST.to_owned(),
        })
    }

    /// Directory in which the trials write.
    pub(crate) fn directory(&self) -> &AbsolutePath {
        self.destination.root()
    }

    /// Settings of the link.
    pub(crate) fn settings(&self) -> &LinkSettings {
        &self.settings
    }

    /// Returns the shortest of several round trips.
    ///
    /// # Errors
    /// The other host cannot be reached.
    pub(crate) async fn round_trip(&self) -> Result<Duration, TransferError> {
        let remotes = [self.origin.remote(), self.destination.remote()];
        match remotes.into_iter().flatten().next() {
            Some(remote) => round_trip(remote).await,
            None => Ok(Duration::ZERO),
        }
    }

    /// Returns the limits of the kernels of origin and destination.
    ///
    /// # Errors
    /// The other host cannot be reached.
    pub(crate) async fn kernel_limits(&self) -> Result<[KernelLimits; 2], TransferError> {
        let (origin, destination) = tokio::try_join!(
            kernel_limits(self.origin.remote()),
            kernel_limits(self.destination.remote()),
        )?;
        Ok([origin, destination])
    }

    /// Returns the size of a trial: the limit, or what fits at the destination.
    ///
    /// # Errors
    /// There is too little space, or the destination cannot be reached.
    pub(crate) async fn trial_bytes(&self, limits: TrialLimits) -> Result<u64, TransferError> {
        let available = self.destination.free_space().await?;
        let usable = available.saturating_sub(self.free_space_margin);
        if usable < LEAST_BYTES.min(limits.size) {
            return Err(TransferError::StorageLow {
                path: self.destination.root().to_string(),
                available,
                needed: self.free_space_margin.saturating_add(LEAST_BYTES),
            });
        }
        Ok(limits.size.min(usable))
    }

    /// Copies a file of `bytes` zeros with this number of streams until it has arrived or the time is over, and removes
    /// it at both ends.
    ///
    /// # Errors
    /// The failure that a transfer would have. [`TransferError::Interrupted`] if `cancel` was cancelled.
    pub(crate) async fn trial(
        &self,
        streams: u8,
        bytes: u64,
        limits: TrialLimits,
        log_dir: &Path,
        cancel: &CancellationToken,
    ) -> Result<TrialResult, TransferError> {
        let file =
            TrialFile::create(self.origin.remote(), self.origin.root(), bytes, log_dir).await?;
        let target = self.destination.probe_target()?;
        let plan = self.plan(&file, target.clone(), streams);
        let measured = run(&plan, &file.log(), limits.duration, cancel).await;
        // Also after an error, and even if that concerns the connection: one end may have removed nothing.
        let (removed, file_removed) = tokio::join!(target.remove_temporary(), file.remove());
        let result = measured?;
        removed?;
        file_removed?;
        Ok(TrialResult { streams, ..result })
    }

    fn plan(&self, file: &TrialFile, target: Target, streams: u8) -> Plan {
        let mut bbcp = self.settings.bbcp.clone();
        bbcp.streams = streams;
        bbcp.progress_interval = PROGRESS_INTERVAL;
        let endpoint = match self.origin.remote() {
            Some(remote) => Endpoint::Remote(remote.clone()),
            None => Endpoint::Local,
        };
        let attempt = Attempt {
            transfer_id: NO_TRANSFER,
            number: AttemptNumber::ZERO,
            lease_token: Uuid::nil(),
        };
        let source = Source::new(endpoint, file.path().parent(), file.path().clone());
        let settings = LinkSettings {
            bbcp,
            ..self.settings.clone()
        };
        let link = self.link.clone();
        Plan::of_trial(attempt, link, (source, target), file.bytes(), &settings)
    }
}

/// Returns the shortest of several round trips to a host, over its open connection.
pub(crate) async fn round_trip(remote: &Remote) -> Result<Duration, TransferError> {
    let mut shortest = Duration::MAX;
    // The first request may have to log in.
    remote.ping().await?;
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        remote.ping().await?;
        shortest = shortest.min(began.elapsed());
    }
    Ok(shortest)
}

/// Returns the limits of a host's kernel; without a remote host, those of this host.
pub(crate) async fn kernel_limits(remote: Option<&Remote>) -> Result<KernelLimits, TransferError> {
    match remote {
        Some(remote) => Ok(KernelLimits::parse(remote.kernel_limits().await?)),
        None => Ok(KernelLimits::of_this_host()),
    }
}

/// Runs the copy of a trial, and stops it when the time is over.
async fn run(
    plan: &Plan,
    log: &Path,
    duration: Duration,
    cancel: &CancellationToken,
) -> Result<TrialResult, TransferError> {
    let stop = cancel.child_token();
    let progress = watch::Sender::new(CopyProgress::none(plan.size));
    let mut seen = progress.subscribe();
    let copy = copying::copy(plan, log, &stop, &progress);
    tokio::pin!(copy);
    let mut rates = Rates::default();
    let mut end: Option<Instant> = None;
    let ended = loop {
        let over = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = &mut copy => break ended,
            Ok(()) = seen.changed() => {
                let CopyProgress { rate_bytes_per_s, bytes_done, .. } = *seen.borrow_and_update();
                rates.add(bytes_done, rate_bytes_per_s);
                end = end.or(Some(Instant::now() + duration));
            }
            () = over, if !stop.is_cancelled() => stop.cancel(),
        }
    };
    let report = match ended {
        Ok(report) => Some(report),
        Err(error) if error.is_interruption() && !cancel.is_cancelled() => None,
        Err(error) => return Err(error),
    };
    Ok(rates.result(plan.bbcp.streams, report.as_ref()))
}

/// Rates that bbcp has printed during a trial.
#[derive(Debug, Default)]
struct Rates {
    bytes: u64,
    rates: Vec<f64>,
}

impl Rates {
    fn add(&mut self, bytes: u64, rate: Option<f64>) {
        self.bytes = self.bytes.max(bytes);
        self.rates.extend(rate.filter(|rate| rate.is_finite()));
    }

    /// The mean rate of the second half. A copy with too few progress lines has only bbcp's own mean.
    fn result(&self, streams: u8, report: Option<&Report>) -> TrialResult {
        #[expect(clippy::cast_precision_loss, reason = "some dozens of lines")]
        let mean = |rates: &[f64]| rates.iter().sum::<f64>() / rates.len().max(1) as f64;
        let half = self.rates.get(self.rates.len() / 2..).unwrap_or_default();
        let of_bbcp = report.and_then(|report| report.rate_bytes_per_s);
        let rate = match of_bbcp {
            Some(rate) if self.rates.len() < 4 => rate,
            _ => mean(half),
        };
        TrialResult {
            streams,
            bytes: report.and_then(|report| report.bytes).unwrap_or(self.bytes),
            rate_bytes_per_s: rate,
        }
    }
}

/// Name of a trial file.
fn trial_name() -> TemporaryName {
    TemporaryName::new(NO_TRANSFER, AttemptNumber::ZERO, Uuid::new_v4())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_after_the_slow_start() {
        let mut rates = Rates::default();
        for (bytes, rate) in [(1, 10.0), (2, 50.0), (3, f64::NAN), (4, 90.0), (5, 94.0)] {
            rates.add(bytes, Some(rate));
        }
        let found = rates.result(16, None);
        assert_eq!((found.bytes, found.rate_bytes_per_s), (5, 92.0));
        let report = Report {
            bytes: Some(7),
            elapsed: Duration::ZERO,
            rate_bytes_per_s: Some(70.0),
            checksum: None,
        };
        assert_eq!(rates.result(16, Some(&report)).bytes, 7);
        assert_eq!(
            Rates::default().result(1, Some(&report)).rate_bytes_per_s,
            70.0
        );
        assert_eq!(Rates::default().result(1, None).rate_bytes_per_s, 0.0);
    }
}
