//! `--pidfile`: one worker at a time under one name.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::CliError;

/// The file; removed when it is dropped.
#[derive(Debug)]
pub(super) struct PidFile(PathBuf);

impl PidFile {
    /// Writes this process's id into a new file. One that a dead process left is replaced.
    pub(super) fn create(path: &Path) -> Result<Self, CliError> {
        let failed = |e| CliError::Failed(format!("--pidfile {}: {e}", path.display()));
        // Twice at most: a file that comes back at once belongs to somebody who lives.
        for _ in 0..2 {
            match OpenOptions::new().write(true).create_new(true).open(path) {
                Ok(mut file) => {
                    writeln!(file, "{}", std::process::id()).map_err(failed)?;
                    return Ok(Self(path.to_owned()));
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let text = fs::read_to_string(path).map_err(failed)?;
                    if let Some(pid) = text.trim().parse().ok().filter(|pid| *pid > 0)
                        && kill(Pid::from_raw(pid), None) != Err(nix::errno::Errno::ESRCH)
                    {
                        return Err(CliError::Refused(format!(
                            "--pidfile {} exists and its process {pid} runs; stop it, or remove the file",
                            path.display()
                        )));
                    }
                    tracing::warn!(path = %path.display(), "pid file of a dead process is replaced");
                    fs::remove_file(path).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Err(CliError::Refused(format!(
            "--pidfile {}: another process starts at the same time",
            path.display()
        )))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_process_keeps_its_file_and_a_dead_one_loses_it() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        let ours = PidFile::create(&path);
        assert!(ours.is_ok());
        assert!(matches!(PidFile::create(&path), Err(CliError::Refused(_))));
        drop(ours);
        assert!(!path.exists());
        // Above the kernel's largest process id.
        fs::write(&path, "4194305\n")?;
        assert!(PidFile::create(&path).is_ok());
        Ok(())
    }
}
