//! The log file, which logrotate or an operator may rotate.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

/// A log file that is appended to. Before each line the path is looked up, which takes a few microseconds: if the file
/// was renamed or removed, the line goes to a new file at this path. If the file was truncated instead, as by
/// logrotate's `copytruncate`, writing continues at its beginning.
pub(super) struct LogFile {
    path: PathBuf,
    open: Mutex<Open>,
}

struct Open {
    file: File,
    /// Device and inode.
    identity: (u64, u64),
}

impl LogFile {
    /// Opens a file, or creates it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // An absolute path stays valid after a change of the working directory.
        let path = std::path::absolute(path)?;
        Ok(Self {
            open: Mutex::new(Open::at(&path)?),
            path,
        })
    }
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            identity: (metadata.dev(), metadata.ino()),
            file,
        })
    }

    /// Returns true if the path now refers to another file or to none.
    fn is_renamed(&self, path: &Path) -> bool {
        match std::fs::metadata(path) {
            Ok(there) => (there.dev(), there.ino()) != self.identity,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// The locked file while a line is written.
pub(super) struct Line<'a>(MutexGuard<'a, Open>);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.file.flush()
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // If the new file cannot be opened, the next line tries again; until then lines go to the old file.
        if open.is_renamed(&self.path)
            && let Ok(new) = Open::at(&self.path)
        {
            *open = new;
        }
        Line(open)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn log(file: &LogFile, line: &str) -> io::Result<()> {
        file.make_writer().write_all(line.as_bytes())
    }

    #[test]
    fn renamed_file_is_recreated_at_the_next_line() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (path, old) = (folder.path().join("w.log"), folder.path().join("w.log.1"));
        let file = LogFile::open(&path)?;
        log(&file, "1\n")?;
        fs::rename(&path, &old)?;
        log(&file, "2\n")?;
        log(&file, "3\n")?;
        assert_eq!(fs::read_to_string(&old)?, "1\n");
        assert_eq!(fs::read_to_string(&path)?, "2\n3\n");
        // Replaced by a new file of the same name, as by logrotate's `create`.
        fs::rename(&path, &old)?;
        fs::write(&path, "")?;
        log(&file, "4\n")?;
        assert_eq!(fs::read_to_string(&path)?, "4\n");
        Ok(())
    }

    #[test]
    fn truncated_file_is_written_from_its_beginning() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.log");
        let file = LogFile::open(&path)?;
        log(&file, "1\n")?;
        File::options().write(true).open(&path)?.set_len(0)?;
        log(&file, "2\n")?;
        assert_eq!(fs::read_to_string(&path)?, "2\n");
        Ok(())
    }

    #[test]
    fn a_missing_directory_loses_no_line() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (logs, old) = (folder.path().join("logs"), folder.path().join("old"));
        fs::create_dir(&logs)?;
        let file = LogFile::open(&logs.join("w.log"))?;
        fs::rename(&logs, &old)?;
        log(&file, "1\n")?;
        fs::create_dir(&logs)?;
        log(&file, "2\n")?;
        assert_eq!(fs::read_to_string(old.join("w.log"))?, "1\n");
        assert_eq!(fs::read_to_string(logs.join("w.log"))?, "2\n");
        Ok(())
    }
}
