//! The running bbcp: starts, watches and logs the process, and always ends it.
//!
//! bbcp has no time-out for data that does not move, so the watchdog here is the only one. Separate tasks read the
//! outputs into bounded queues; a log disk or a grandchild that hangs can delay these tasks, but never the watchdog.

use std::fs;
use std::future::pending;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::super::{CopyLog, CopyProgress, Footprint, Limits, Report, StopReason, Watchdog};
use super::announcement;
use super::command::{CONFIG_VARIABLE, Invocation};
use super::outcome::{CopyPaths, Exit, FailureClassifier};
use super::output::{Event, parse};
use crate::faults::fault_point;
use crate::process::{Group, guarded_command};
use crate::settings::Slowness;
use crate::transfer::endpoint::{AbsolutePath, CopySession};
use crate::transfer::failures::TransferError;
use crate::transfer::lines::Lines;
use crate::transfer::plan::{Attempt, Plan};

/// Time limit for reading the outputs after bbcp has ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Time limit for the end of the agent (the local bbcp) after SIGKILL.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum interval between two checks of the watchdog, as long as the interval of progress reports. Each check wakes a
/// thread; at two checks per second, 32 copies caused half of the worker's processor time.
const TICK_INTERVAL: Duration = Duration::from_secs(2);

/// Capacity of the queue between the readers and the watchdog, in lines.
const QUEUE_LINES: usize = 256;

/// Time between bbcp's report that it has no data connection and its end by the worker. Where a firewall discards the
/// packets, bbcp reports it after 30 s, and ends after two minutes.
const UNCONNECTED_GRACE: Duration = Duration::from_secs(3);

/// Exit code of bbcp without a data connection.
const UNCONNECTED: Exit = Exit::Code(2);

/// Unit of a file's allocated blocks, independent of the file system's own unit.
const BLOCK_BYTES: u64 = 512;

/// Maximum number of bytes per read from a pipe.
const CHUNK_BYTES: usize = 8 << 10;

/// Copies a file to its temporary name.
///
/// `log_file` receives bbcp's whole output. `progress` always has the latest state; its receiver may be slow. When the
/// function returns, no process of the copy exists on this host; when its future is dropped, they are killed at once.
/// An error does not remove the file at the temporary name: bbcp may or may not have removed it.
///
/// # Errors
/// The classified failure; [`TransferError::Stalled`], [`TransferError::TooSlow`], [`TransferError::Deadline`] or
/// [`TransferError::Interrupted`] after the copy was stopped.
pub async fn copy(
    plan: &Plan,
    log_file: &Path,
    cancel: &CancellationToken,
    progress: &watch::Sender<CopyProgress>,
) -> Result<Report, TransferError> {
    if cancel.is_cancelled() {
        return Err(TransferError::STOPPED);
    }
    // Reserved until the copy has ended.
    let session = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(TransferError::STOPPED),
        session = plan.copy_session() => session?,
    };
    let invocation = Invocation::new(plan, session.as_ref())?;
    let (log, writer) = CopyLog::open(log_file).await?;
    log.append(&invocation.to_string()).await;
    let running = RunningCopy::start(plan, &invocation, log)?;
    fault_point!(CopySpawned, Ok::<(), TransferError>(()))?;
    let finished = running.run(cancel, progress).await;
    writer.close(&finished.summary()).await;
    match finished.conclude() {
        Ok(report) => Ok(report),
        Err(error) => Err(explained(error, plan, session.as_ref()).await),
    }
}

/// Adds to an error of bbcp what the connection of its ssh, or the hosts, know about the cause.
async fn explained(
    error: TransferError,
    plan: &Plan,
    session: Option<&CopySession>,
) -> TransferError {
    // bbcp reports only what follows from the end of its ssh.
    let lost = match (&error, session, plan.remote_end()) {
        (
            TransferError::RemoteDied { .. } | TransferError::DataPort { .. },
            Some(session),
            Some((role, remote)),
        ) => remote.lost_connection(role, session),
        _ => None,
    };
    match lost {
        Some(lost) => lost,
        None => announcement::explain(error, plan).await,
    }
}

/// A running bbcp. Its fields are dropped in this order: the group is killed before the runtime reaps the agent, so
/// that the id of the group is not reused in between.
struct RunningCopy<'a> {
    plan: &'a Plan,
    group: Group,
    agent: Child,
    /// Standard input of the agent. It closes when this process dies, and that ends the copy; see [`guarded_command`].
    _lifeline: Option<ChildStdin>,
    readers: [AbortOnDropHandle<()>; 2],
    lines: mpsc::Receiver<Vec<u8>>,
    started: Instant,
    watchdog: Watchdog,
    output: OutputSummary,
}

/// Reason why the watch over a running bbcp ended.
enum EndedBy {
    Itself(io::Result<ExitStatus>),
    Watchdog(StopReason),
    Cancellation,
    /// It has no data connection and did not end.
    Unconnected,
}

impl<'a> RunningCopy<'a> {
    fn start(plan: &'a Plan, invocation: &Invocation, log: CopyLog) -> Result<Self, TransferError> {
        let spawn = |source| TransferError::Spawn {
            program: invocation.program.display().to_string(),
            source,
        };
        let (name, value) = CONFIG_VARIABLE;
        let mut agent = guarded_command(&invocation.program)
            .args(&invocation.arguments)
            .env(name, value)
            .spawn()
            .map_err(spawn)?;
        let group = Group::of(&agent).map_err(spawn)?;
        // Taken out, since `wait` closes the standard input of the agent.
        let lifeline = agent.stdin.take();

        let (sender, lines) = mpsc::channel(QUEUE_LINES);
        let of = plan.attempt;
        let stdout = read(agent.stdout.take(), log.clone(), sender.clone(), of);
        let stderr = read(agent.stderr.take(), log, sender, of);
        let started = Instant::now();
        let limits = Limits::of(plan);
        Ok(Self {
            plan,
            group,
            agent,
            _lifeline: lifeline,
            readers: [
                AbortOnDropHandle::new(tokio::spawn(stdout)),
                AbortOnDropHandle::new(tokio::spawn(stderr)),
            ],
            lines,
            started,
            watchdog: Watchdog::new(plan.size, limits, started),
            output: OutputSummary::new(CopyPaths::of(plan)),
        })
    }

    async fn run(
        mut self,
        cancel: &CancellationToken,
        progress: &watch::Sender<CopyProgress>,
    ) -> EndedCopy {
        let ended = self.watch(cancel, progress).await;
        self.finish(ended).await
    }

    async fn watch(
        &mut self,
        cancel: &CancellationToken,
        progress: &watch::Sender<CopyProgress>,
    ) -> EndedBy {
        let mut ticks = ticks(self.plan.stall_timeout);
        let watched = self.plan.target.growing_path();
        // Only one at a time: if the storage hangs, this check waits, and the watchdog continues.
        let mut inspection = None;
        loop {
            tokio::select! {
                status = self.agent.wait() => return EndedBy::Itself(status),
                () = cancel.cancelled() => return EndedBy::Cancellation,
                Some(line) = self.lines.recv() => {
                    if self.handle_line(&line) {
                        progress.send_replace(self.progress());
                    }
                }
                footprint = finished(&mut inspection) => {
                    inspection = None;
                    if footprint.is_some_and(|footprint| self.observe_size(footprint)) {
                        progress.send_replace(self.progress());
                    }
                }
                _ = ticks.tick() => {
                    if self.output.is_unconnected() {
                        return EndedBy::Unconnected;
                    }
                    if let Some(stop_reason) = self.watchdog.stop_reason(Instant::now()) {
                        return EndedBy::Watchdog(stop_reason);
                    }
                    if inspection.is_none() {
                        inspection = watched.clone().map(inspect);
                    }
                }
            }
        }
    }

    /// Ends the processes that still run, and reads the rest of their output.
    async fn finish(mut self, ended: EndedBy) -> EndedCopy {
        let kill_after = self.plan.bbcp.kill_after;
        let gone = match ended {
            // The agent's children may be about to print the cause. While they hold the pipes (only then the wait is
            // long), the id of the group is still theirs.
            EndedBy::Itself(_) => {
                drain(&mut self.lines, &mut self.output).await;
                self.group.end(kill_after).await
            }
            EndedBy::Watchdog(_) | EndedBy::Cancellation | EndedBy::Unconnected => {
                // Reap the agent at the same time, with a limit: it may hang in a system call.
                let reaped = timeout(kill_after + REAP_TIMEOUT, self.agent.wait());
                let (gone, _) = tokio::join!(self.group.end(kill_after), reaped);
                drain(&mut self.lines, &mut self.output).await;
                gone
            }
        };
        // Output of a process that has not closed its pipe by now is not read.
        drop(self.readers);
        if !gone {
            tracing::warn!(
                data_transfer_id = self.plan.attempt.transfer_id.get(),
                attempt = self.plan.attempt.number.get(),
                "process of bbcp survived SIGKILL: it hangs in a system call"
            );
        }
        EndedCopy {
            ended,
            elapsed: self.started.elapsed(),
            bytes_done: self.watchdog.bytes_done(),
            bytes_total: self.plan.size,
            slowness: self.plan.slowness,
            output: self.output,
        }
    }

    /// Processes a line of output. Returns true if the progress has changed.
    fn handle_line(&mut self, line: &[u8]) -> bool {
        match self.output.read_line(line) {
            Some(ProgressLine::Progress(percent, rate)) => {
                self.watchdog.progress(percent, rate, Instant::now());
                true
            }
            Some(ProgressLine::Appending(offset)) => {
                self.watchdog.resumed_at(offset);
                true
            }
            None => false,
        }
    }

    /// Processes an observation of the growing file. Returns true if the progress has changed.
    fn observe_size(&mut self, footprint: Footprint) -> bool {
        let before = self.watchdog.bytes_done();
        self.watchdog.footprint(footprint, Instant::now());
        self.watchdog.bytes_done() != before
    }

    fn progress(&self) -> CopyProgress {
        CopyProgress {
            bytes_done: self.watchdog.bytes_done(),
            bytes_total: self.plan.size,
            rate_bytes_per_s: self.watchdog.rate(),
        }
    }
}

/// Creates a timer whose ticks coincide with those of all other copies with this time-out, so that one wake-up serves
/// all of them.
fn ticks(stall_timeout: Duration) -> Interval {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    // The checks must be frequent enough for a short time-out.
    let pause = (stall_timeout / 4).clamp(Duration::from_millis(10), TICK_INTERVAL);
    let now = Instant::now();
    let since = now.duration_since(*FIRST.get_or_init(|| now));
    let over = since.as_nanos() % pause.as_nanos();
    let next = pause.saturating_sub(Duration::from_nanos(u64::try_from(over).unwrap_or(0)));
    let mut ticks = interval_at(now + next, pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

/// Reads the rest of the output until the pipes close, for at most [`DRAIN_TIMEOUT`]: a grandchild may hold them open
/// without limit.
async fn drain(lines: &mut mpsc::Receiver<Vec<u8>>, output: &mut OutputSummary) {
    let end = Instant::now() + DRAIN_TIMEOUT;
    while let Ok(Some(line)) = timeout_at(end, lines.recv()).await {
        output.read_line(&line);
    }
}

/// Reads a pipe to its end, for the log file and for the watchdog.
async fn read(
    pipe: Option<impl AsyncRead + Unpin>,
    log: CopyLog,
    heard: mpsc::Sender<Vec<u8>>,
    of: Attempt,
) {
    let Some(mut pipe) = pipe else { return };
    let mut log = Some(log);
    let mut lines = Lines::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    // A read error counts as the end of the pipe.
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        if let Some(open) = &log
            && !open.write(&chunk[..n]).await
        {
            tracing::warn!(
                data_transfer_id = of.transfer_id.get(),
                attempt = of.number.get(),
                "log file of an attempt is too slow; further output is dropped"
            );
            log = None;
        }
        let mut complete = Vec::new();
        lines.push(&chunk[..n], |line| complete.push(line.to_vec()));
        for line in complete {
            if heard.send(line).await.is_err() {
                return;
            }
        }
    }
    let mut last = None;
    lines.finish(|line| last = Some(line.to_vec()));
    if let Some(line) = last {
        // An error means that the receiver was dropped.
        let _closed = heard.send(line).await;
    }
}

/// Starts to inspect the growing file, which does not exist at first.
fn inspect(path: AbsolutePath) -> JoinHandle<Option<Footprint>> {
    spawn_blocking(move || {
        let found = fs::symlink_metadata(path.as_path()).ok()?;
        Some(Footprint {
            size: found.len(),
            allocated: found.blocks() * BLOCK_BYTES,
        })
    })
}

/// Waits for the result of the inspection. Without one, it never returns.
async fn finished(inspection: &mut Option<JoinHandle<Option<Footprint>>>) -> Option<Footprint> {
    match inspection {
        Some(inspection) => inspection.await.ok().flatten(),
        None => pending().await,
    }
}

/// A line about the progress of the copy.
enum ProgressLine {
    /// Per cent, and rate in bytes per second.
    Progress(Option<u32>, Option<f64>),
    /// Bytes of the partial copy that existed before.
    Appending(u64),
}

/// Summary of bbcp's output so far. Its size is bounded.
struct OutputSummary {
    classifier: FailureClassifier,
    created: Option<(u64, Option<f64>)>,
    checksum: Option<(String, String)>,
    /// Time of the report that there is no data connection.
    unconnected_since: Option<Instant>,
}

impl OutputSummary {
    fn new(paths: CopyPaths) -> Self {
        Self {
            classifier: FailureClassifier::new(paths),
            created: None,
            checksum: None,
            unconnected_since: None,
        }
    }

    /// Processes a line. Returns its content if the watchdog needs it.
    fn read_line(&mut self, line: &[u8]) -> Option<ProgressLine> {
        match parse(line) {
            Event::Progress { percent, rate, .. } => {
                return Some(ProgressLine::Progress(percent, rate));
            }
            Event::Appending { offset } => return Some(ProgressLine::Appending(offset)),
            Event::Created { bytes, rate } => self.created = Some((bytes, rate)),
            Event::Checksum { algorithm, hex } => self.checksum = Some((algorithm, hex)),
            Event::Creating | Event::Total { .. } => {}
            Event::Other(line) => {
                self.classifier.observe(&line);
                if self.unconnected_since.is_none() && self.classifier.has_no_connection() {
                    self.unconnected_since = Some(Instant::now());
                }
            }
        }
        None
    }

    /// Returns true if there has been no data connection for too long.
    fn is_unconnected(&self) -> bool {
        let since = self.unconnected_since;
        since.is_some_and(|since| since.elapsed() >= UNCONNECTED_GRACE)
    }
}

/// A copy without any remaining process.
struct EndedCopy {
    ended: EndedBy,
    elapsed: Duration,
    bytes_done: u64,
    bytes_total: u64,
    slowness: Slowness,
    output: OutputSummary,
}

impl EndedCopy {
    /// Text of the last line of the log file.
    fn summary(&self) -> String {
        let how = match &self.ended {
            EndedBy::Itself(Ok(status)) => format!("ended with {}", Exit::from(*status)),
            EndedBy::Itself(Err(e)) => format!("lost: {e}"),
            EndedBy::Watchdog(stop_reason) => stop_reason.to_string(),
            EndedBy::Cancellation => "stopped on request".into(),
            EndedBy::Unconnected => "stopped: no data connection was made".into(),
        };
        format!("{how}, after {:.1} s", self.elapsed.as_secs_f64())
    }

    fn conclude(self) -> Result<Report, TransferError> {
        let exit = match self.ended {
            EndedBy::Itself(status) => {
                Exit::from(status.map_err(|source| TransferError::Spawn {
                    program: "bbcp".into(),
                    source,
                })?)
            }
            EndedBy::Unconnected => UNCONNECTED,
            EndedBy::Watchdog(stop_reason) => {
                return Err(stop_reason.error(self.bytes_done, self.bytes_total, self.slowness));
            }
            EndedBy::Cancellation => {
                return Err(TransferError::STOPPED);
            }
        };
        self.output.classifier.conclude(exit)?;
        Ok(Report {
            bytes: self.output.created.map(|(bytes, _)| bytes),
            elapsed: self.elapsed,
            rate_bytes_per_s: self.output.created.and_then(|(_, rate)| rate),
            checksum: self.output.checksum,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn watchdogs_of_all_copies_tick_together() {
        let pause = Duration::from_millis(50);
        let mut one = ticks(pause * 4);
        tokio::time::sleep(Duration::from_millis(13)).await;
        let mut other = ticks(pause * 4);
        let apart = other.tick().await - one.tick().await;
        assert_eq!(apart.as_nanos() % pause.as_nanos(), 0, "{apart:?}");
    }
}
