//! Running copies: by bbcp, or through the ssh connection.
//!
//! The copying programs differ in what they print and how they end. Everything else is common to them: the [log file](log),
//! the detection of copies that do not move ([`watchdog`]), progress, cancellation, and all that follows a copy.

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::failures::TransferError;
use super::plan::Plan;

pub mod bbcp;
mod log;
mod places;
mod ssh_stream;
mod watchdog;

pub(super) use log::CopyLog;
pub(super) use places::{CopyPlace, CopyPlaces};
pub(super) use watchdog::{Footprint, Limits, StopReason, Watchdog};

/// Progress of a copy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CopyProgress {
    /// Number of bytes that have arrived, as far as known: bbcp reports whole per cents only.
    pub bytes_done: u64,
    /// Size of the file in bytes.
    pub bytes_total: u64,
    /// Most recent rate in bytes per second, if known.
    pub rate_bytes_per_s: Option<f64>,
}

impl CopyProgress {
    /// Progress before the first byte.
    pub fn none(bytes_total: u64) -> Self {
        Self {
            bytes_done: 0,
            bytes_total,
            rate_bytes_per_s: None,
        }
    }
}

/// Report on a copy that its program calls good; not verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Number of bytes that were written according to the program, if reported.
    pub bytes: Option<u64>,
    /// Time from start to end, measured by the worker.
    pub elapsed: Duration,
    /// Rate from disk to disk, in bytes per second.
    pub rate_bytes_per_s: Option<f64>,
    /// Algorithm and value of bbcp's checksum in flight, computed by the target.
    pub checksum: Option<(String, String)>,
}

/// Copies a file to its temporary name, through the ssh connection if the package is small, else by bbcp. See
/// [`bbcp::copy`].
///
/// # Errors
/// As [`bbcp::copy`].
pub async fn copy(
    plan: &Plan,
    log_file: &Path,
    cancel: &CancellationToken,
    progress: &watch::Sender<CopyProgress>,
) -> Result<Report, TransferError> {
    match plan.remote_end() {
        Some((role, remote)) if plan.is_copied_by_ssh() => {
            ssh_stream::copy(plan, (role, remote), log_file, cancel, progress).await
        }
        _ => bbcp::copy(plan, log_file, cancel, progress).await,
    }
}
