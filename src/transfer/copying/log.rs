//! Log file of an attempt: the whole output of the copying program, after a line with the command and before a line with the exit status.
//!
//! The log may lose text, but it never delays or fails a copy: only opening the file can fail.

use std::fs::create_dir_all;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::fs::File;
use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::clock;
use crate::transfer::endpoint::Directory;
use crate::transfer::failures::TransferError;

/// Maximum size of a log file in bytes; further output is dropped as noise.
const MAX_BYTES: usize = 64 << 20;

/// Capacity of the queue between the readers and the writer, in chunks.
const QUEUE_CHUNKS: usize = 64;

/// Time limit for writing one chunk. After it, the rest of the output is not logged.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Sender of text for the log file.
#[derive(Debug, Clone)]
pub(in crate::transfer) struct CopyLog(mpsc::Sender<Vec<u8>>);

impl CopyLog {
    /// Opens the file for appending (makes it if necessary) and starts its writer.
    pub(in crate::transfer) async fn open(path: &Path) -> Result<(Self, LogWriter), TransferError> {
        let file = open(path).await.map_err(|source| TransferError::LogFile {
            path: path.into(),
            source,
        })?;
        let (sender, chunks) = mpsc::channel(QUEUE_CHUNKS);
        let task = tokio::spawn(write(file, chunks, path.to_owned()));
        let log = Self(sender);
        Ok((log.clone(), LogWriter { log, task }))
    }

    /// Sends a chunk to the writer. Returns false if the writer did not accept it in time; do not send further chunks
    /// then.
    pub(in crate::transfer) async fn write(&self, chunk: &[u8]) -> bool {
        let sent = timeout(WRITE_TIMEOUT, self.0.send(chunk.to_vec())).await;
        matches!(sent, Ok(Ok(())))
    }

    /// Writes a line of the worker itself, with a time stamp.
    pub(in crate::transfer) async fn append(&self, text: &str) -> bool {
        let now = humantime::format_rfc3339_seconds(SystemTime::from(clock::now()));
        self.write(format!("# {now} {text}\n").as_bytes()).await
    }
}

/// The task that writes the log file; must be closed.
#[derive(Debug)]
pub(in crate::transfer) struct LogWriter {
    log: CopyLog,
    task: JoinHandle<()>,
}

impl LogWriter {
    /// Writes the last line and waits a limited time until it is written.
    pub(in crate::transfer) async fn close(self, last: &str) {
        self.log.append(last).await;
        drop(self.log);
        // After the limit, the writer continues in the background.
        let _late = timeout(WRITE_TIMEOUT, self.task).await;
    }
}

/// Opens the file in the directory of its transfer. Both have our own names, and neither is opened through a symbolic
/// link, which could lead to another user's file.
async fn open(path: &Path) -> io::Result<File> {
    let path = path.to_owned();
    let opening = move || {
        let name = |path: &Path| path.file_name()?.to_str().map(str::to_owned);
        let directory = path.parent().unwrap_or(Path::new("."));
        let (Some(file), Some(of_transfer)) = (name(&path), name(directory)) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let logs = directory.parent().unwrap_or(Path::new("."));
        create_dir_all(logs)?;
        let logs = Directory::open(logs)?;
        logs.make(&of_transfer)?;
        logs.open_entry(&of_transfer)?.append_to(&file)
    };
    let opened = spawn_blocking(opening).await.map_err(io::Error::other)?;
    opened.map(File::from_std)
}

async fn write(file: File, mut chunks: mpsc::Receiver<Vec<u8>>, path: PathBuf) {
    if let Err(error) = write_all(file, &mut chunks).await {
        tracing::warn!(path = %path.display(), %error, "cannot write the log file of an attempt");
        // Receive and drop the remaining chunks, so that no sender waits.
        while chunks.recv().await.is_some() {}
    }
}

async fn write_all(file: File, chunks: &mut mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let mut room = MAX_BYTES;
    while let Some(chunk) = chunks.recv().await {
        if chunk.len() <= room {
            room -= chunk.len();
            file.write_all(&chunk).await?;
        } else if room > 0 {
            room = 0;
            file.write_all(format!("\n# more than {MAX_BYTES} bytes are not kept\n").as_bytes())
                .await?;
        }
        // A reader that follows the file sees each line as soon as it arrives.
        if chunks.is_empty() {
            file.flush().await?;
        }
    }
    file.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keeps_order_and_has_an_end() -> Result<(), Box<dyn std::error::Error>> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("a/b.log");
        let (log, writer) = CopyLog::open(&path).await?;
        assert!(log.append("start").await);
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..70 {
            assert!(log.write(&chunk).await);
        }
        drop(log);
        writer.close("end").await;
        let text = std::fs::read_to_string(&path)?;
        assert!(text.starts_with("# 20"), "{}", &text[..30]);
        assert!(text.ends_with(" bytes are not kept\n"));
        assert!(text.len() < MAX_BYTES + 200);
        Ok(())
    }

    #[tokio::test]
    async fn cannot_be_opened() {
        let error = CopyLog::open(Path::new("/proc/nowhere/a.log")).await.err();
        assert_eq!(error.map(|e| e.code()), Some("log_file"));
    }
}
