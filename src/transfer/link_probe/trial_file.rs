//! The file that a trial copies.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::task::spawn_blocking;

use super::trial_name;
use crate::transfer::endpoint::{AbsolutePath, Remote};
use crate::transfer::failures::{Role, TransferError};

/// Name of the log file of a trial, and of its directory.
const LOG: &str = "trial/trial.log";

/// A sparse file of zeros at the sender of a trial, in a directory of its own.
#[derive(Debug)]
pub(super) struct TrialFile {
    path: AbsolutePath,
    bytes: u64,
    remote: Option<Remote>,
    /// Directory on this host: for the log of bbcp, and for the file if this host is the sender.
    directory: TempDir,
}

impl TrialFile {
    /// Creates the file, outside of the origin's directory.
    pub(super) async fn create(
        remote: Option<&Remote>,
        origin: &AbsolutePath,
        bytes: u64,
        log_dir: &Path,
    ) -> Result<Self, TransferError> {
        let name = trial_name().to_string();
        let directory = local_directory(origin, remote, log_dir).await?;
        let path = match remote {
            None => {
                let path = directory.path().join(&name);
                let made = path.clone();
                blocking(move || fs::File::create_new(&made)?.set_len(bytes), &path).await?;
                path.display().to_string()
            }
            Some(remote) => remote.make_trial_file(&name, bytes).await?,
        };
        let checked = AbsolutePath::new(&path).and_then(|checked| {
            let is_outside = !checked.as_path().starts_with(origin.as_path());
            is_outside
                .then_some(checked)
                .ok_or("the directory for temporary files is in the origin's directory")
        });
        let remote = remote.cloned();
        match checked {
            Ok(path) => Ok(Self {
                path,
                bytes,
                remote,
                directory,
            }),
            Err(problem) => {
                if let Some(remote) = remote {
                    remote.remove_trial_file(&name).await?;
                }
                Err(TransferError::Storage {
                    operation: "create a trial file",
                    role: Role::Origin,
                    path,
                    source: problem.into(),
                })
            }
        }
    }

    pub(super) fn path(&self) -> &AbsolutePath {
        &self.path
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Path for the log file of bbcp.
    pub(super) fn log(&self) -> PathBuf {
        self.directory.path().join(LOG)
    }

    /// Removes the file with its directory.
    pub(super) async fn remove(self) -> Result<(), TransferError> {
        if let (Some(remote), Some(name)) = (&self.remote, self.path.file_name()) {
            remote.remove_trial_file(name).await?;
        }
        let path = self.directory.path().to_owned();
        blocking(move || self.directory.close(), &path).await
    }
}

/// Makes a directory in `transfer.log_dir`. If that is in the directory of a local origin, the directory for temporary
/// files is used instead.
async fn local_directory(
    origin: &AbsolutePath,
    remote: Option<&Remote>,
    log_dir: &Path,
) -> Result<TempDir, TransferError> {
    let origin = remote.is_none().then(|| origin.as_path().to_owned());
    let path = log_dir.to_owned();
    let make = move || {
        fs::create_dir_all(&path)?;
        let path = path.canonicalize()?;
        // Where the origin's directory is missing, nothing is in it.
        let origin = origin.and_then(|origin| origin.canonicalize().ok());
        let is_origin = origin.is_some_and(|origin| path.starts_with(origin));
        let parent = if is_origin {
            std::env::temp_dir()
        } else {
            path
        };
        tempfile::Builder::new()
            .prefix(".ccat-transfer-probe-")
            .tempdir_in(parent)
    };
    blocking(make, log_dir).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
    path: &Path,
) -> Result<T, TransferError> {
    let done = spawn_blocking(work).await.map_err(io::Error::other);
    done.flatten().map_err(|source| TransferError::LogFile {
        path: path.to_owned(),
        source,
    })
}
