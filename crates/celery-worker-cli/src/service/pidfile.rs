//! `--pidfile`: one worker at a time under one name.
//!
//! As in Celery, a pid file is valid while this process may send a signal to the process that it names; whether that is a
//! worker cannot be checked. A file with the id of this process itself is stale: in a restarted container, an earlier
//! worker had the same id.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::error::ProcessError;

/// Maximum number of bytes that are read; every process id is shorter.
const MAX_BYTES: u64 = 64;

/// The pid file, which is removed on drop.
#[derive(Debug)]
pub(super) struct PidFile(PathBuf);

impl PidFile {
    /// Writes this process's id into a new file. Replaces a file that a dead process left, or that holds no
    /// process id.
    ///
    /// # Errors
    /// [`ProcessError::Refused`] while another process has the file; [`ProcessError::Failed`] if the file cannot be
    /// read or written.
    pub(super) fn create(path: &Path) -> Result<Self, ProcessError> {
        let failed =
            |e: io::Error| ProcessError::Failed(format!("--pidfile {}: {e}", path.display()));
        // An absolute path stays valid after a change of the working directory.
        let path = std::path::absolute(path).map_err(failed)?;
        // At most two attempts: if the file exists again at once, a running process created it.
        for _ in 0..2 {
            let new = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&path);
            match new {
                Ok(mut file) => {
                    if let Err(error) = writeln!(file, "{}", std::process::id()) {
                        // An empty file would not prevent the start of a worker, but it has no use either.
                        let _ = fs::remove_file(&path);
                        return Err(failed(error));
                    }
                    return Ok(Self(path));
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    let runs = |pid| {
                        ProcessError::Refused(format!(
                            "--pidfile {} exists and its process {pid} runs; stop it, or remove the file if \
                             that is not a worker",
                            path.display()
                        ))
                    };
                    if let Some(pid) = running_process(&path).map_err(failed)? {
                        return Err(runs(pid));
                    }
                    if let Some(pid) = remove_stale(&path).map_err(failed)? {
                        return Err(runs(pid));
                    }
                    tracing::warn!(path = %path.display(), "pid file of a dead process is replaced");
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Err(ProcessError::Refused(format!(
            "--pidfile {}: another process starts at the same time",
            path.display()
        )))
    }
}

/// The process id in a file; none if the file contains something else.
fn content(path: &Path) -> io::Result<Option<i32>> {
    // In this mode, opening a pipe does not wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text)?;
    let pid = str::from_utf8(&text)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    Ok(pid.filter(|pid| *pid > 0))
}

/// The other process that has a file. As in Celery, a process of another user does not count: a restarted worker has
/// the same user, and another process may have its old id by now.
fn running_process(path: &Path) -> io::Result<Option<i32>> {
    let Some(pid) = content(path)? else {
        return Ok(None);
    };
    let is_other = pid.unsigned_abs() != std::process::id();
    let runs = is_other && kill(Pid::from_raw(pid), None).is_ok();
    Ok(runs.then_some(pid))
}

/// Removes a stale file, unless another process has replaced it in the meantime. Only one of several processes that
/// start at the same time succeeds.
fn remove_stale(path: &Path) -> io::Result<Option<i32>> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        renamed => renamed?,
    }
    let aside = Path::new(&aside);
    let pid = running_process(aside)?;
    if pid.is_some() {
        // Another process may have created the file by now; it then has the file.
        let _ = fs::hard_link(aside, path);
    }
    fs::remove_file(aside)?;
    Ok(pid)
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Another process may have replaced the file. A file that is already gone needs no removal.
        let is_ours = content(&self.0)
            .is_ok_and(|pid| pid.map(i32::unsigned_abs) == Some(std::process::id()));
        if is_ours {
            let _ = fs::remove_file(&self.0);
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[test]
    fn another_process_keeps_its_file() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        let mut other = Command::new("sleep").arg("60").spawn()?;
        fs::write(&path, format!("{}\n", other.id()))?;
        let refused = PidFile::create(&path);
        other.kill()?;
        other.wait()?;
        assert!(matches!(refused, Err(ProcessError::Refused(_))));
        let ours = PidFile::create(&path);
        assert!(ours.is_ok());
        let mode = fs::metadata(&path)?.permissions().mode();
        assert_eq!(mode & 0o133, 0);
        drop(ours);
        assert!(!path.exists());
        Ok(())
    }

    #[rstest]
    // Above the kernel's largest process id.
    #[case("4194305\n")]
    #[case("")]
    #[case("\n")]
    #[case("worker\n")]
    #[case("-1\n")]
    #[case("0\n")]
    #[case("99999999999999999999\n")]
    #[case("\u{fffd}\n")]
    fn file_without_a_process_is_replaced(#[case] content: &str) -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        fs::write(&path, content)?;
        assert!(PidFile::create(&path).is_ok());
        Ok(())
    }

    /// A restarted container: the worker has the same id as before.
    #[test]
    fn own_id_in_the_file_is_stale() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        fs::write(&path, format!("{}\n", std::process::id()))?;
        assert!(PidFile::create(&path).is_ok());
        Ok(())
    }

    #[test]
    fn file_created_by_another_process_is_kept() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        let mut other = Command::new("sleep").arg("60").spawn()?;
        fs::write(&path, format!("{}\n", other.id()))?;
        let taken = remove_stale(&path);
        other.kill()?;
        other.wait()?;
        assert_eq!(taken?.map(i32::unsigned_abs), Some(other.id()));
        assert_eq!(fs::read_to_string(&path)?, format!("{}\n", other.id()));
        assert_eq!(fs::read_dir(folder.path())?.count(), 1);
        assert_eq!(remove_stale(&path)?, None);
        assert_eq!(remove_stale(&path)?, None);
        assert_eq!(fs::read_dir(folder.path())?.count(), 0);
        Ok(())
    }

    #[test]
    fn replaced_file_is_not_removed() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        let ours = PidFile::create(&path);
        fs::write(&path, "4194305\n")?;
        drop(ours);
        assert!(path.exists());
        Ok(())
    }

    #[test]
    fn unreadable_file_is_reported() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let made = PidFile::create(folder.path());
        assert!(matches!(made, Err(ProcessError::Failed(_))));
        let missing = PidFile::create(&folder.path().join("no/w.pid"));
        assert!(matches!(missing, Err(ProcessError::Failed(_))));
        Ok(())
    }

    proptest! {
        /// Arbitrary bytes, and texts that are almost numbers.
        #[test]
        fn any_content_is_read_without_panic(
            bytes in prop_oneof![
                vec(any::<u8>(), 0..200),
                "[-+ 0-9\n\u{0}]{0,80}".prop_map(String::into_bytes),
            ]
        ) {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("w.pid");
            fs::write(&path, bytes)?;
            prop_assert!(content(&path)?.is_none_or(|pid| pid > 0));
        }
    }

    #[test]
    fn files_of_the_corpus_are_read_without_panic() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.pid");
        hostile_inputs::endures("pid", 10, |bytes| {
            let read = fs::write(&path, bytes).and_then(|()| content(&path));
            assert!(read.is_ok_and(|pid| pid.is_none_or(|pid| pid > 0)));
        });
        Ok(())
    }
}
