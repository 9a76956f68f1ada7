//! End of the log file of an attempt.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::model::LogTail;
use crate::transfer::repository::AttemptRecord;

/// Maximum number of bytes that are read.
const MAX_BYTES: u64 = 64 << 10;

/// Maximum number of lines.
const MAX_LINES: usize = 200;

/// Maximum length of a line in characters.
const MAX_LINE: usize = 1_000;

/// Time limit of reading a log: the directory may be on a file server that does not answer.
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Returns the end of the log of the last attempt that has one; `None` if the file is not below the directory of this
/// host. Its name contains a unique word, so a file of this name is the right one.
pub(super) async fn tail(directory: &Path, attempts: &[AttemptRecord]) -> Option<LogTail> {
    let (attempt, path) = attempts.iter().rev().find_map(|attempt| {
        let path = attempt.log_path.as_ref()?;
        Some((attempt.attempt, path.clone()))
    })?;
    let file = PathBuf::from(&path);
    let directory = directory.to_owned();
    let reading = tokio::task::spawn_blocking(move || read(&directory, &file));
    let (lines, is_complete) = tokio::time::timeout(READ_TIMEOUT, reading)
        .await
        .ok()?
        .ok()??;
    Some(LogTail {
        attempt,
        path,
        lines,
        is_complete,
    })
}

/// Reads the end of a file; `None` if it cannot be read, or if it is not in the directory. The path is from the database,
/// and must not lead to any other file.
fn read(directory: &Path, path: &Path) -> Option<(Vec<String>, bool)> {
    let directory = directory.canonicalize().ok()?;
    let path = path.canonicalize().ok()?;
    if !path.starts_with(&directory) || !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut file = std::fs::File::open(&path).ok()?;
    let length = file.metadata().ok()?.len();
    let begin = length.saturating_sub(MAX_BYTES);
    file.seek(SeekFrom::Start(begin)).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<&str> = text.lines().collect();
    if begin > 0 {
        // The first line is incomplete.
        lines.drain(..1.min(lines.len()));
    }
    let skipped = lines.len().saturating_sub(MAX_LINES);
    let shown = lines.iter().skip(skipped).map(|line| {
        let line: String = line.chars().take(MAX_LINE).collect();
        crate::display::clean(&line).into_owned()
    });
    Some((shown.collect(), begin == 0 && skipped == 0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_directory_are_read() {
        let outside = tempfile::tempdir().unwrap();
        let directory = outside.path().join("logs");
        std::fs::create_dir(&directory).unwrap();
        let log = directory.join("1.log");
        std::fs::write(&log, "one\ntwo \u{1b}[31m\n").unwrap();
        let (lines, is_complete) = read(&directory, &log).unwrap();
        assert_eq!((lines.len(), &*lines[0], is_complete), (2, "one", true));
        assert!(!lines[1].contains('\u{1b}'));
        let secret = outside.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, directory.join("link")).unwrap();
        for path in ["../secret", "link", "missing", ""] {
            assert_eq!(read(&directory, &directory.join(path)), None, "{path}");
        }
    }

    #[test]
    fn long_logs_are_cut_at_the_beginning() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("1.log");
        let text: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
        std::fs::write(&log, text).unwrap();
        let (lines, is_complete) = read(directory.path(), &log).unwrap();
        assert_eq!((lines.len(), is_complete), (MAX_LINES, false));
        assert_eq!(lines.last().unwrap(), "line 19999");
    }
}
