//! The file in which revoked ids survive a restart of the worker (`--statedb`).

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::revocation::Revoked;
use super::runtime::Runtime;
use crate::clock;
use crate::publication::unix_seconds;

/// Interval between two checks for new ids.
const CHECKED_EVERY: Duration = Duration::from_secs(1);

/// Content of the file.
#[derive(Debug, Default, Serialize, Deserialize, PartialEq)]
struct State {
    /// Revoked ids with the times of their revocation, in seconds since 1970.
    revoked: Vec<(String, f64)>,
}

/// The state file of a worker.
struct StateFile {
    path: PathBuf,
    /// Number of additions to the ids that the file contains.
    written: u64,
    /// True if the last attempt to write has failed.
    is_failing: bool,
}

impl StateFile {
    /// Adds the ids of the file to those of the worker, and writes the file. One that has another content is reported and
    /// kept under another name.
    ///
    /// # Errors
    /// The file cannot be read or written.
    async fn open(path: &Path, revoked: &Revoked) -> io::Result<Self> {
        let at = path.to_owned();
        match blocking(move || read(&at)).await? {
            Ok(state) => {
                let now = unix_seconds(clock::now());
                let count = state.revoked.len();
                let ids = state.revoked.into_iter().map(|(id, since)| {
                    let age = Duration::try_from_secs_f64(now - since).unwrap_or_default();
                    (id, age)
                });
                revoked.restore(ids);
                tracing::info!(path = %path.display(), revoked = count, "state of the last run read");
            }
            Err(Damaged { kept, error }) => tracing::error!(
                path = %path.display(),
                kept = %kept.display(),
                %error,
                "the state file is damaged, so ids that were revoked before the start are unknown"
            ),
        }
        let mut file = Self {
            path: path.to_owned(),
            written: 0,
            is_failing: false,
        };
        file.write(revoked).await?;
        Ok(file)
    }

    /// Writes the file if ids were added. A failure is reported once, until the file can be written again.
    async fn save(&mut self, revoked: &Revoked) {
        if revoked.additions() == self.written {
            return;
        }
        match self.write(revoked).await {
            Ok(()) if self.is_failing => {
                self.is_failing = false;
                tracing::info!(path = %self.path.display(), "the state file is written again");
            }
            Err(error) if !self.is_failing => {
                self.is_failing = true;
                tracing::error!(
                    path = %self.path.display(),
                    %error,
                    "the state file cannot be written, so a restart would forget revoked ids"
                );
            }
            Ok(()) | Err(_) => {}
        }
    }

    async fn write(&mut self, revoked: &Revoked) -> io::Result<()> {
        let additions = revoked.additions();
        let now = unix_seconds(clock::now());
        let entries = revoked.with_ages().into_iter();
        let state = State {
            revoked: entries
                .map(|(id, age)| (id, now - age.as_secs_f64()))
                .collect(),
        };
        let path = self.path.clone();
        blocking(move || write(&path, &state)).await?;
        self.written = additions;
        Ok(())
    }
}

/// Saves revoked ids while the worker runs.
pub(super) struct StateKeeper {
    stop: CancellationToken,
    saving: AbortOnDropHandle<()>,
}

impl StateKeeper {
    /// Reads the file, writes it, and begins to save.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(super) async fn start(path: &Path, runtime: Arc<Runtime>) -> io::Result<Self> {
        let mut file = StateFile::open(path, &runtime.revoked).await?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let saving = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(CHECKED_EVERY);
            while stopped.run_until_cancelled(ticks.tick()).await.is_some() {
                file.save(&runtime.revoked).await;
            }
            file.save(&runtime.revoked).await;
        });
        Ok(Self {
            stop,
            saving: AbortOnDropHandle::new(saving),
        })
    }

    /// Saves for the last time.
    pub(super) async fn close(self) {
        self.stop.cancel();
        // The task has nothing to return; after a panic, the file is that of the last save.
        let _ = self.saving.await;
    }
}

/// Runs work with files on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A file with another content than a state.
struct Damaged {
    /// Its new name.
    kept: PathBuf,
    error: serde_json::Error,
}

fn read(path: &Path) -> io::Result<Result<State, Damaged>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(State::default())),
        Err(error) => return Err(error),
    };
    match serde_json::from_slice(&text) {
        Ok(state) => Ok(Ok(state)),
        Err(error) => {
            let kept = with_suffix(path, ".damaged");
            std::fs::rename(path, &kept)?;
            Ok(Err(Damaged { kept, error }))
        }
    }
}

/// Replaces the file in one step.
fn write(path: &Path, state: &State) -> io::Result<()> {
    let new = with_suffix(path, ".new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    file.sync_all()?;
    std::fs::rename(new, path)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
