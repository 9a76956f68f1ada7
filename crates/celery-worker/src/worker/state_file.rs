//! The file in which revoked ids survive a restart of the worker (`--statedb`).

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

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
}

impl StateFile {
    /// Adds the ids of the file to those of the worker. A file that cannot be read is reported, and replaced.
    fn load(path: &Path, revoked: &Revoked) -> Self {
        match read(path) {
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
            Err(error) => tracing::error!(
                path = %path.display(),
                %error,
                "the state file cannot be read, so ids that were revoked before the start are unknown"
            ),
        }
        Self {
            path: path.to_owned(),
            written: revoked.additions(),
        }
    }

    /// Writes the file if ids were added.
    async fn save(&mut self, revoked: &Revoked) {
        let additions = revoked.additions();
        if additions == self.written {
            return;
        }
        let now = unix_seconds(clock::now());
        let entries = revoked.with_ages().into_iter();
        let state = State {
            revoked: entries
                .map(|(id, age)| (id, now - age.as_secs_f64()))
                .collect(),
        };
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || write(&path, &state)).await;
        match written.map_err(io::Error::other).flatten() {
            Ok(()) => self.written = additions,
            Err(error) => tracing::error!(
                path = %self.path.display(),
                %error,
                "the state file cannot be written, so a restart would forget revoked ids"
            ),
        }
    }
}

/// Saves revoked ids while the worker runs.
pub(super) struct StateKeeper {
    stop: CancellationToken,
    saving: JoinHandle<()>,
}

impl StateKeeper {
    /// Reads the file, and begins to save.
    pub(super) fn start(path: &Path, runtime: Arc<Runtime>) -> Self {
        let mut file = StateFile::load(path, &runtime.revoked);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let saving = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(CHECKED_EVERY);
            while stopped.run_until_cancelled(ticks.tick()).await.is_some() {
                file.save(&runtime.revoked).await;
            }
            file.save(&runtime.revoked).await;
        });
        Self { stop, saving }
    }

    /// Saves for the last time.
    pub(super) async fn close(self) {
        self.stop.cancel();
        // The task has nothing to return; after a panic, the file is that of the last save.
        let _ = self.saving.await;
    }
}

fn read(path: &Path) -> io::Result<State> {
    match std::fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::default()),
        Err(error) => Err(error),
    }
}

/// Replaces the file in one step.
fn write(path: &Path, state: &State) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    file.sync_all()?;
    std::fs::rename(new, path)
}
