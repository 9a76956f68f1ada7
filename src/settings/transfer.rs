//! `[transfer]`: rules for all transfers.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use celery_worker_cli::settings::SectionProblems;

/// `[transfer]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// End whose queue receives the transfer.
    pub queue_location: QueueLocation,
    /// Prefix of every queue name.
    pub queue_prefix: String,
    /// Maximum number of further attempts after the first failed one.
    pub max_retries: u32,
    /// Wait before the first further attempt; each failure doubles it.
    #[serde(with = "humantime_serde")]
    pub retry_delay_first: Duration,
    /// Wait before the first further attempt after a failure for lack of storage.
    #[serde(with = "humantime_serde")]
    pub retry_delay_storage: Duration,
    /// Longest wait.
    #[serde(with = "humantime_serde")]
    pub retry_delay_max: Duration,
    /// Share by which a wait may be shorter, 0 to 1.
    pub retry_delay_jitter: f64,
    /// Time for running tasks to end after the signal to stop; zero for no limit.
    #[serde(with = "humantime_serde")]
    pub shutdown_timeout: Duration,
    /// Time since the last renewal after which a lease has expired.
    #[serde(with = "humantime_serde")]
    pub lease_ttl: Duration,
    /// Maximum interval between two renewals.
    #[serde(with = "humantime_serde")]
    pub lease_renew_interval: Duration,
    /// Time without progress until a copy is stopped.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// Minimum rate of a copy, in bytes per second; 0 for no limit.
    pub min_rate: u64,
    /// Time over which `min_rate` is measured.
    #[serde(with = "humantime_serde")]
    pub min_rate_window: Duration,
    /// Rate from which a copy's time limit is computed, in bytes per second; 0 for no limit.
    pub deadline_rate: u64,
    /// Time added to that limit.
    #[serde(with = "humantime_serde")]
    pub deadline_grace: Duration,
    /// Partial copies are kept for the next attempt.
    pub resume: bool,
    /// Smallest package in bytes whose partial copies are kept.
    pub resume_above: u64,
    /// Algorithm of the verification.
    pub digest: DigestAlgorithm,
    /// Maximum number of concurrent copies per link; 0 for no limit.
    pub max_copies_per_link: usize,
    /// Bytes that must stay free at the destination.
    pub free_space_margin: u64,
    /// Directory of the attempts' log files.
    pub log_dir: PathBuf,
    /// Further names of this host.
    pub local_hosts: Vec<String>,
}

impl Transfer {
    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            (0.0..=1.0).contains(&self.retry_delay_jitter),
            "retry_delay_jitter",
            "must be 0 to 1",
        );
        problems.require(
            self.lease_ttl >= self.lease_renew_interval * 3,
            "lease_ttl",
            "must be three times transfer.lease_renew_interval or more, so that two lost renewals do no harm",
        );
        problems.require(
            self.lease_renew_interval >= Duration::from_millis(100),
            "lease_renew_interval",
            "must be 100ms or more",
        );
    }
}

/// End of a transfer that names its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueLocation {
    /// Location of the file.
    Origin,
    /// Location of the copy.
    Destination,
}

/// Digest by which origin and destination are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DigestAlgorithm {
    /// SHA-256, FIPS 180-4.
    Sha256,
    /// BLAKE3, 256 bits.
    Blake3,
    /// XXH3, 64 bits: fast; detects accidental changes, but not an attack.
    Xxh3,
    /// MD5, RFC 1321: detects accidental changes, but not an attack; many archives record it.
    Md5,
}
