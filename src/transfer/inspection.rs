//! Checks of the locations of transfers, without a transfer.
//!
//! The checks use the same operations as a worker (the same ssh, the same scripts, the same temporary names), so they
//! find the same problems. They leave nothing at a destination and never write at an origin.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use entity::StorageType;
use tokio::time::timeout;
use uuid::Uuid;

use super::copying::bbcp::command::CONFIG_VARIABLE;
use super::endpoint::{AbsolutePath, Endpoint, Links, ReadOptions, Remote, Target, TemporaryName};
use super::failures::{Role, THIS_HOST, TransferError};
use super::id::{AttemptNumber, TransferId};
use super::plan::{self, Hosts};
use super::repository::LocationRecord;
use crate::process::{Group, command, find_program};
use crate::settings::{DigestAlgorithm, Ssh};

/// Time limit for a program to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// Id in the temporary names of the checks. No transfer has this id, so the removal of leftovers never removes the file
/// of a check, and a check never removes the file of a transfer.
pub(super) const NO_TRANSFER: TransferId = TransferId::new(0);

/// Returns true for an active location of a site that is a directory on a disk.
pub(crate) fn is_disk_at(location: &LocationRecord, site: &str) -> bool {
    location.active
        && location.storage_type.means(StorageType::Disk)
        && location.site.as_ref().is_some_and(|s| s.short_name == site)
}

/// Directory of a location, as one end of a link.
#[derive(Debug, Clone)]
pub(crate) struct LocationProbe {
    role: Role,
    endpoint: Endpoint,
    root: AbsolutePath,
}

impl LocationProbe {
    /// Creates the probe of an end as a worker would access it.
    ///
    /// # Errors
    /// The row of the location is unsafe, or cannot be used.
    pub(crate) fn new(
        role: Role,
        location: &LocationRecord,
        ssh: &Ssh,
        hosts: &Hosts,
    ) -> Result<Self, TransferError> {
        let location = &plan::Location::from_row(location.clone())?;
        Ok(Self {
            role,
            endpoint: plan::endpoint(role, location, ssh, hosts)?,
            root: plan::checked_path(role, &location.root)?,
        })
    }

    /// Role of this end: origin or destination.
    #[must_use]
    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// The remote host; `None` if the location is on this host.
    #[must_use]
    pub(crate) fn remote(&self) -> Option<&Remote> {
        self.endpoint.remote()
    }

    /// Root directory of the location.
    #[must_use]
    pub(crate) fn root(&self) -> &AbsolutePath {
        &self.root
    }

    /// Checks that an origin's directory exists, is not empty and can be read.
    ///
    /// # Errors
    /// [`TransferError::OriginRootMissing`], [`TransferError::OriginUnreadable`], or the error of an end that could not
    /// be reached.
    pub(crate) async fn readable(&self) -> Result<(), TransferError> {
        let path = || self.root.to_string();
        let (problem, found) = tokio::join!(
            self.endpoint.root_problem(&self.root),
            self.endpoint.stat(self.role, &self.root, Links::Follow),
        );
        if let Some(problem) = problem? {
            return Err(problem.of(&self.root));
        }
        match found? {
            Some(facts) if facts.readable => Ok(()),
            _ => Err(TransferError::OriginUnreadable {
                path: path(),
                line: "permission denied".into(),
            }),
        }
    }

    /// Returns the free space of a destination's directory that this user may use, in bytes.
    ///
    /// # Errors
    /// The end could not be reached.
    pub(crate) async fn free_space(&self) -> Result<u64, TransferError> {
        self.probe_target()?.free_space().await
    }

    /// Creates a directory at a destination, under a temporary name of this program, and removes it.
    ///
    /// # Errors
    /// The directory is missing or not writable, or the end could not be reached.
    pub(crate) async fn writable(&self) -> Result<(), TransferError> {
        let target = self.probe_target()?;
        target.ensure_directory().await?;
        let made = target.begin_partial(None).await;
        // Also after an error: the directory may exist although the answer was lost.
        let removed = target.remove_temporary().await;
        made?;
        removed
    }

    /// Target of a copy that is never published.
    pub(super) fn probe_target(&self) -> Result<Target, TransferError> {
        let name = TemporaryName::new(NO_TRANSFER, AttemptNumber::ZERO, Uuid::new_v4());
        let path = self.root.join(&name.to_string());
        let path = path.map_err(|problem| TransferError::BadPath {
            role: self.role,
            path: self.root.to_string(),
            problem,
        })?;
        let endpoint = self.endpoint.clone();
        Ok(Target::new(endpoint, self.root.clone(), path, name))
    }
}

impl Remote {
    /// Checks that the program for a digest works on this host, with an empty file as input. Returns its name.
    ///
    /// # Errors
    /// [`TransferError::RemoteProgramMissing`], or the output of the program instead of a digest.
    pub async fn digest_of_nothing(
        &self,
        algorithm: DigestAlgorithm,
    ) -> Result<String, TransferError> {
        let nothing = AbsolutePath::new("/dev/null").map_err(|problem| TransferError::BadPath {
            role: Role::Destination,
            path: "/dev/null".into(),
            problem,
        })?;
        let options = ReadOptions {
            algorithm,
            size: 0,
            with_blocks: false,
            stall_timeout: VERSION_TIMEOUT,
            behind: None,
            is_growing: false,
            blocks: None,
        };
        let endpoint = Endpoint::Remote(self.clone());
        let digest = endpoint.digest(Role::Destination, &nothing, Links::Follow, options);
        Ok(digest.await?.program.unwrap_or_default())
    }
}

/// Returns the version that bbcp on this host prints, e.g. `17.12.00.00.0`.
///
/// # Errors
/// [`TransferError::ProgramMissing`], or the program cannot be run.
pub(crate) async fn bbcp_version(program: &Path) -> Result<String, TransferError> {
    let shown = || program.display().to_string();
    let spawn = |source| TransferError::Spawn {
        program: shown(),
        source,
    };
    let found =
        find_program(program).ok_or_else(|| TransferError::ProgramMissing { program: shown() })?;
    let (name, value) = CONFIG_VARIABLE;
    let child = command(&found)
        .arg("-#")
        .env(name, value)
        .stdin(Stdio::null())
        .spawn()
        .map_err(spawn)?;
    let _group = Group::of(&child).map_err(spawn)?;
    let Ok(ended) = timeout(VERSION_TIMEOUT, child.wait_with_output()).await else {
        return Err(TransferError::OperationTimeout {
            operation: "bbcp -#",
            host: THIS_HOST.into(),
            limit: VERSION_TIMEOUT,
        });
    };
    let output = ended.map_err(spawn)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().map(str::trim).find(|line| !line.is_empty()) {
        Some(version) if output.status.success() => Ok(version.chars().take(80).collect()),
        _ => Err(TransferError::BbcpFailed {
            exit: output.status.to_string(),
            line: String::from_utf8_lossy(&output.stderr)
                .trim()
                .chars()
                .take(200)
                .collect(),
        }),
    }
}
