//! Copies of small packages through the ssh connection, without bbcp.
//!
//! Over a long link bbcp needs seconds until the first byte: it starts its other end, and each of its streams connects. A
//! session of the connection that is open already needs one round trip. The program ssh runs `cat` at the other end, and
//! this module reads or writes the file of this host, so it knows each byte that moved.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::bbcp;
use super::{CopyLog, CopyProgress, Footprint, Limits, Report, StopReason, Watchdog};
use crate::faults::fault_point;
use crate::process::{Group, command};
use crate::transfer::endpoint::{
    AbsolutePath, CopySession, Directory, Remote, StreamCommand, StreamEnd, refused, unreadable,
};
use crate::transfer::failures::{Role, TransferError};
use crate::transfer::plan::Plan;

/// Maximum number of bytes per read.
const CHUNK_BYTES: usize = 64 << 10;

/// Maximum number of bytes kept of standard error.
const MAX_STDERR_BYTES: usize = 16 << 10;

/// Maximum interval between two checks of the watchdog.
const TICK_INTERVAL: Duration = Duration::from_secs(2);

/// Time limit for the end of ssh after SIGKILL.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// Copies a file to its temporary name. The arguments and the guarantees are those of [`bbcp::copy`](super::bbcp::copy).
pub(super) async fn copy(
    plan: &Plan,
    (role, remote): (Role, &Remote),
    log_file: &Path,
    cancel: &CancellationToken,
    progress: &watch::Sender<CopyProgress>,
) -> Result<Report, TransferError> {
    let session = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(TransferError::STOPPED),
        session = remote.data_session(role) => session?,
    };
    let stream = Stream {
        plan,
        role,
        remote,
        session,
    };
    let command = stream.command()?;
    let (log, writer) = CopyLog::open(log_file).await?;
    log.append(&command.to_string()).await;
    let started = Instant::now();
    let (ended, bytes) = stream.run(command, cancel, progress).await?;
    let elapsed = started.elapsed();
    if let End::Itself(end, _) = &ended {
        log.write(&end.stderr).await;
    }
    drop(log);
    let seconds = elapsed.as_secs_f64();
    writer
        .close(&format!("{ended}, after {seconds:.1} s"))
        .await;
    stream.conclude(ended, bytes)?;
    Ok(Report {
        bytes: Some(bytes),
        elapsed,
        rate_bytes_per_s: rate(bytes, elapsed),
        checksum: None,
    })
}

/// A copy through a session.
struct Stream<'a> {
    plan: &'a Plan,
    /// Role of the remote end.
    role: Role,
    remote: &'a Remote,
    session: CopySession,
}

/// End of ssh.
enum End {
    /// The second value is the failure at this host, or of the content.
    Itself(StreamEnd, Result<(), TransferError>),
    Watchdog(StopReason),
    Cancellation,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Itself(end, _) => match end.code {
                Some(code) => write!(f, "ended with exit code {code}"),
                None => f.write_str("ended by a signal"),
            },
            Self::Watchdog(reason) => reason.fmt(f),
            Self::Cancellation => f.write_str("stopped on request"),
        }
    }
}

impl Stream<'_> {
    fn command(&self) -> Result<StreamCommand, TransferError> {
        let Self {
            plan,
            remote,
            session,
            ..
        } = self;
        match self.role {
            Role::Origin => remote.read_command(session, plan.source.path()),
            Role::Destination => {
                remote.write_command(session, &plan.target.temporary_path(), plan.size)
            }
        }
    }

    /// Runs ssh to its end, and returns the number of bytes that moved. No process remains on this host.
    async fn run(
        &self,
        ssh: StreamCommand,
        cancel: &CancellationToken,
        progress: &watch::Sender<CopyProgress>,
    ) -> Result<(End, u64), TransferError> {
        let spawn = |source| TransferError::Spawn {
            program: ssh.program.display().to_string(),
            source,
        };
        let mut program = command(&ssh.program);
        program.args(&ssh.arguments);
        if self.role == Role::Destination {
            // It ends with this process, and the other end removes the file.
            program.stdin(Stdio::piped());
        }
        let mut child = program.spawn().map_err(spawn)?;
        let group = Group::of(&child).map_err(spawn)?;
        fault_point!(CopySpawned, Ok::<(), TransferError>(()))?;
        let bytes = watch::Sender::new(0);
        let ended = {
            let mut running = pin!(self.move_bytes(&mut child, &ssh.beginning, &bytes));
            let mut seen = bytes.subscribe();
            let started = Instant::now();
            let mut watchdog = Watchdog::new(self.plan.size, Limits::of(self.plan), started);
            let mut ticks = interval(TICK_INTERVAL.min(self.plan.stall_timeout / 4));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            loop {
                tokio::select! {
                    (end, moved) = &mut running => break End::Itself(end, moved),
                    () = cancel.cancelled() => break End::Cancellation,
                    Ok(()) = seen.changed() => {
                        let (size, now) = (*seen.borrow_and_update(), Instant::now());
                        let allocated = size;
                        watchdog.footprint(Footprint { size, allocated }, now);
                        progress.send_replace(CopyProgress {
                            bytes_done: watchdog.bytes_done(),
                            bytes_total: self.plan.size,
                            rate_bytes_per_s: rate(size, now.duration_since(started)),
                        });
                    }
                    _ = ticks.tick() => {
                        if let Some(reason) = watchdog.stop_reason(Instant::now()) {
                            break End::Watchdog(reason);
                        }
                    }
                }
            }
        };
        let kill_after = self.plan.bbcp.kill_after;
        let reaped = timeout(kill_after + REAP_TIMEOUT, child.wait());
        let _ = tokio::join!(group.end(kill_after), reaped);
        let moved = *bytes.borrow();
        Ok((ended, moved))
    }

    /// Moves the content between ssh and the file of this host, and waits for the end of ssh.
    async fn move_bytes(
        &self,
        child: &mut Child,
        beginning: &[u8],
        bytes: &watch::Sender<u64>,
    ) -> (StreamEnd, Result<(), TransferError>) {
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let mut has_begun = false;
        let output = async {
            let Some(mut stdout) = stdout else {
                return Ok(());
            };
            let Some(first) = after(&mut stdout, beginning).await else {
                return Ok(());
            };
            has_begun = true;
            match self.role {
                Role::Origin => self.receive(first, stdout, bytes).await,
                Role::Destination => {
                    kept(Some(stdout)).await;
                    Ok(())
                }
            }
        };
        let input = async {
            match stdin {
                Some(stdin) => self.send(stdin, bytes).await,
                None => Ok(()),
            }
        };
        let (sent, received, stderr) = tokio::join!(input, output, kept(stderr));
        let status = child.wait().await;
        let end = StreamEnd {
            has_begun,
            code: status.ok().and_then(|status| status.code()),
            stderr,
        };
        (end, sent.and(received))
    }

    /// Sends the file of this host.
    async fn send(
        &self,
        mut stdin: ChildStdin,
        bytes: &watch::Sender<u64>,
    ) -> Result<(), TransferError> {
        let path = self.plan.source.path();
        let failed = |error| unreadable(Role::Origin, path, error);
        let file = File::open(path.as_path()).await.map_err(failed)?;
        // A byte more shows that the file has grown.
        let mut file = file.take(self.plan.size.saturating_add(1));
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut pace = Pace::new(self.plan);
        loop {
            let n = file.read(&mut chunk).await.map_err(failed)?;
            if n == 0 {
                let is_whole = *bytes.borrow() == self.plan.size;
                return is_whole.then_some(()).ok_or_else(|| self.origin_changed());
            }
            pace.wait(n).await;
            // The exit code of ssh explains the failure.
            if stdin.write_all(&chunk[..n]).await.is_err() {
                return Ok(());
            }
            bytes.send_modify(|bytes| *bytes += n as u64);
        }
    }

    /// Writes the file of this host. Its content is `rest`, and then that of `stdout`.
    async fn receive(
        &self,
        mut rest: Vec<u8>,
        mut stdout: ChildStdout,
        bytes: &watch::Sender<u64>,
    ) -> Result<(), TransferError> {
        let path = self.plan.target.temporary_path();
        let failed = |error| refused("write", &path, error);
        let mut file = create(&path).await.map_err(failed)?;
        let mut pace = Pace::new(self.plan);
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            file.write_all(&rest).await.map_err(failed)?;
            pace.wait(rest.len()).await;
            bytes.send_modify(|bytes| *bytes += rest.len() as u64);
            if *bytes.borrow() > self.plan.size {
                return Err(self.origin_changed());
            }
            // A read error counts as the end; the exit code of ssh explains it.
            let n = stdout.read(&mut chunk).await.unwrap_or(0);
            if n == 0 {
                return file.flush().await.map_err(failed);
            }
            rest.clear();
            rest.extend_from_slice(&chunk[..n]);
        }
    }

    fn conclude(&self, ended: End, bytes: u64) -> Result<(), TransferError> {
        let plan = self.plan;
        let (end, moved) = match ended {
            End::Itself(end, moved) => (end, moved),
            End::Watchdog(reason) => return Err(reason.error(bytes, plan.size, plan.slowness)),
            End::Cancellation => return Err(TransferError::STOPPED),
        };
        moved?;
        if end.has_begun && end.code == Some(0) {
            let is_whole = bytes == plan.size;
            return is_whole.then_some(()).ok_or_else(|| self.origin_changed());
        }
        let path = match self.role {
            Role::Origin => plan.source.path().clone(),
            Role::Destination => plan.target.temporary_path(),
        };
        Err((self.remote).stream_error(self.role, &path, &self.session, &end))
    }

    fn origin_changed(&self) -> TransferError {
        TransferError::OriginChanged {
            path: self.plan.source.path().to_string(),
            line: format!("it has not {} bytes any more", self.plan.size),
        }
    }
}

/// Creates the copy at this host.
async fn create(path: &AbsolutePath) -> io::Result<File> {
    let path = path.clone();
    let creating = move || {
        let name = path.file_name().unwrap_or_default();
        Directory::open(path.parent().as_path())?.make_copy(name)
    };
    let created = spawn_blocking(creating).await.map_err(io::Error::other)?;
    created.map(File::from_std)
}

/// Reads until `beginning`, and returns the bytes after it that were read. Returns `None` if it does not come. Login shells
/// may print any text before.
async fn after(pipe: &mut (impl AsyncRead + Unpin), beginning: &[u8]) -> Option<Vec<u8>> {
    let mut read = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        read.extend_from_slice(&chunk[..n]);
        let mut windows = read.windows(beginning.len());
        if let Some(at) = windows.position(|window| window == beginning) {
            return Some(read.split_off(at + beginning.len()));
        }
        let part = beginning.len().saturating_sub(1).min(read.len());
        read.drain(..read.len() - part);
    }
    None
}

/// Reads a pipe to its end, and returns its last bytes.
async fn kept(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..n]);
        if kept.len() > 2 * MAX_STDERR_BYTES {
            kept.drain(..kept.len() - MAX_STDERR_BYTES);
        }
    }
    kept
}

/// Pauses that keep a copy below the maximum rate of the link.
struct Pace {
    bytes_per_s: Option<u64>,
    next: Instant,
}

impl Pace {
    fn new(plan: &Plan) -> Self {
        Self {
            bytes_per_s: bbcp::size(&plan.bbcp.max_rate).filter(|rate| *rate > 0),
            next: Instant::now(),
        }
    }

    /// Waits until `bytes` further bytes may be sent.
    async fn wait(&mut self, bytes: usize) {
        let Some(rate) = self.bytes_per_s else { return };
        sleep_until(self.next).await;
        let time = Duration::from_micros(bytes as u64 * 1_000_000 / rate);
        self.next = self.next.max(Instant::now()) + time;
    }
}

/// Bytes per second, if the time is long enough for one.
fn rate(bytes: u64, elapsed: Duration) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no precision")]
    let rate = bytes as f64 / elapsed.as_secs_f64();
    rate.is_finite().then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn content_begins_after_the_mark() {
        let all = b"Welcome!\n\nm begin\n\nm begin\ncontent";
        let content = after(&mut &all[..], b"\nm begin\n").await;
        assert_eq!(content.as_deref(), Some(&b"\nm begin\ncontent"[..]));
        assert_eq!(after(&mut &b"Welcome!"[..], b"\nm begin\n").await, None);
        // In two parts.
        let mut parts = b"noise\nm be".chain(&b"gin\ncontent"[..]);
        let content = after(&mut parts, b"\nm begin\n").await;
        assert_eq!(content.as_deref(), Some(&b"content"[..]));
    }
}
