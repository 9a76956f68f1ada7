//! The connections of this process.

use std::collections::HashMap;
use std::fmt;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tempfile::TempDir;

use super::connection::HostConnection;
use super::options::{Sharing, options};
use crate::settings::Ssh;
use crate::transfer::endpoint::Host;

/// Maximum length in bytes of the path of the directory for control sockets. The path of a Unix socket has at most 107
/// bytes, and ssh appends 17 to it for a moment.
const MAX_DIRECTORY_BYTES: usize = 70;

/// Directory for control sockets if that for temporary files has an unusable path.
const FALLBACK_DIRECTORY: &str = "/tmp";

/// The ssh connections of this process, at most one per host, login, port and key at a time (and further ones for many
/// concurrent copies). Clones share all connections. Dropping the last clone closes them.
#[derive(Clone, Default)]
pub(in crate::transfer) struct SshConnections(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// By the command line of ssh.
    hosts: Mutex<HashMap<Vec<String>, HostConnection>>,
    sockets: Arc<ControlSockets>,
}

impl fmt::Debug for SshConnections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshConnections").finish_non_exhaustive()
    }
}

impl SshConnections {
    /// The connection to a host. Nothing is connected before the first request.
    pub(in crate::transfer::endpoint) fn to(&self, host: &Host, ssh: &Ssh) -> HostConnection {
        let mut key = vec![
            host.as_ssh().to_owned(),
            ssh.user.clone(),
            ssh.program.display().to_string(),
        ];
        key.extend(options(ssh, Sharing::Client(Path::new(""))));
        let mut hosts = self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts
            .entry(key)
            .or_insert_with(|| HostConnection::new(host, ssh, self.0.sockets.clone()))
            .clone()
    }
}

/// The private directory of the control sockets, made when the first one is needed.
#[derive(Default)]
pub(super) struct ControlSockets {
    directory: OnceLock<TempDir>,
    last: AtomicU64,
}

impl ControlSockets {
    /// A path for a new socket.
    ///
    /// # Errors
    /// The directory could not be made.
    pub(super) fn next(&self) -> io::Result<PathBuf> {
        let directory = match self.directory.get() {
            Some(directory) => directory,
            None => {
                let made = new_directory()?;
                self.directory.get_or_init(|| made)
            }
        };
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        Ok(directory.path().join(number.to_string()))
    }
}

/// Makes a directory that only this user can enter.
fn new_directory() -> io::Result<TempDir> {
    let preferred = std::env::temp_dir();
    let is_usable = preferred.is_absolute()
        && preferred.as_os_str().len() <= MAX_DIRECTORY_BYTES
        && preferred.to_str().is_some_and(is_plain);
    let parent = if is_usable {
        preferred
    } else {
        FALLBACK_DIRECTORY.into()
    };
    tempfile::Builder::new()
        .prefix("ccat-transfer-ssh-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(&parent)
        .map_err(|error| {
            let text = format!(
                "no directory for ssh's control sockets in {}, which TMPDIR can name: {error}",
                parent.display()
            );
            io::Error::new(error.kind(), text)
        })
}

/// Returns true for a path without characters that are special to ssh (`%`) or to bbcp, which splits words at blanks.
fn is_plain(path: &str) -> bool {
    path.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_user_can_enter_the_directory() -> io::Result<()> {
        let mode = new_directory()?.path().metadata()?.permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        Ok(())
    }
}
