//! The running bbcp: started, watched, logged, and ended whatever happens.
//!
//! bbcp has no time-out for data that stand still, so the watchdog here is the only one. Its
//! outputs are read by tasks of their own into bounded queues; a log disk or a grandchild that
//! hangs can hold these up, but never the watchdog.

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

use super::command::{CONFIG_VARIABLE, Invocation};
use super::log::CopyLog;
use super::outcome::{CopyPaths, Exit, FailureClassifier};
use super::output::{Event, Lines, parse};
use super::watchdog::{Footprint, Limits, Trouble, Watchdog};
use crate::faults::fault_point;
use crate::process::{Group, guarded};
use crate::settings::Slowness;
use crate::transfer::endpoint::AbsolutePath;
use crate::transfer::error::{Interruption, TransferError};
use crate::transfer::plan::{Attempt, Plan};

/// How long the outputs may stay open after bbcp has ended.
const DRAIN: Duration = Duration::from_secs(1);

/// How long an agent may take to die of SIGKILL.
const REAP: Duration = Duration::from_secs(5);

/// How often the watchdog looks, at the most: as often as progress is passed on. Each look wakes a thread
/// of its own, which 32 copies at twice a second made half of what the worker used.
const TICK: Duration = Duration::from_secs(2);

/// Lines between the readers and the watchdog.
const QUEUE_LINES: usize = 256;

/// Unit of a file's allocated blocks, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;

/// All that a cancellation token can tell; whoever cancelled it knows more.
const INTERRUPTED: TransferError = TransferError::Interrupted {
    cause: Interruption::Cancelled,
};

/// What is read from a pipe at once.
const CHUNK_BYTES: usize = 8 << 10;

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CopyProgress {
    /// Bytes that have arrived, as far as is known: bbcp tells whole per cent only.
    pub bytes_done: u64,
    /// Size of the file in bytes.
    pub bytes_total: u64,
    /// Bytes per second lately, if known.
    pub rate_bytes_per_s: Option<f64>,
}

impl CopyProgress {
    /// Before the first byte.
    pub fn none(bytes_total: u64) -> Self {
        Self {
            bytes_done: 0,
            bytes_total,
            rate_bytes_per_s: None,
        }
    }
}

/// What bbcp said of a copy that it calls good; not verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Bytes that it says it wrote; none if it did not say.
    pub bytes: Option<u64>,
    /// From start to end, in our time.
    pub elapsed: Duration,
    /// Disk to disk, in bytes per second, by bbcp.
    pub rate_bytes_per_s: Option<f64>,
    /// Algorithm and value of the checksum in flight, by the target.
    pub checksum: Option<(String, String)>,
}

/// Copies a file to its temporary name.
///
/// `log_file` gets bbcp's whole output. `progress` always holds the latest state; its receiver can
/// be slow. When this returns, no process of the copy is left on this host; when its future is
/// dropped, they are killed at once. What lies under the temporary name after an error is not
/// removed: bbcp may or may not have done that.
///
/// # Errors
/// The classified failure; [`TransferError::Stalled`], [`TransferError::TooSlow`],
/// [`TransferError::Deadline`] and [`TransferError::Interrupted`] after the copy was stopped.
pub async fn copy(
    plan: &Plan,
    log_file: &Path,
    cancel: &CancellationToken,
    progress: &watch::Sender<CopyProgress>,
) -> Result<Report, TransferError> {
    if cancel.is_cancelled() {
        return Err(INTERRUPTED);
    }
    let invocation = Invocation::new(plan)?;
    let (log, writer) = CopyLog::open(log_file).await?;
    log.note(&invocation.to_string()).await;
    let running = RunningCopy::start(plan, &invocation, log)?;
    fault_point!(CopySpawned, Ok::<(), TransferError>(()))?;
    let finished = running.run(cancel, progress).await;
    writer.close(&finished.summary()).await;
    finished.conclude()
}

/// A bbcp that runs. Its fields are dropped in this order: the group is killed before the runtime
/// gets to reap the agent, so that the group's id still is ours.
struct RunningCopy<'a> {
    plan: &'a Plan,
    group: Group,
    agent: Child,
    /// What ends the copy when this process dies; see [`guarded`].
    _lifeline: Option<ChildStdin>,
    readers: [AbortOnDropHandle<()>; 2],
    lines: mpsc::Receiver<Vec<u8>>,
    started: Instant,
    watchdog: Watchdog,
    output: OutputSummary,
}

/// How the watch over a running bbcp ended.
enum EndedBy {
    Itself(io::Result<ExitStatus>),
    Watchdog(Trouble),
    Cancellation,
}

impl<'a> RunningCopy<'a> {
    fn start(plan: &'a Plan, invocation: &Invocation, log: CopyLog) -> Result<Self, TransferError> {
        let spawn = |source| TransferError::Spawn {
            program: invocation.program.display().to_string(),
            source,
        };
        let (name, value) = CONFIG_VARIABLE;
        let mut agent = guarded(&invocation.program)
            .args(&invocation.arguments)
            .env(name, value)
            .spawn()
            .map_err(spawn)?;
        let group = Group::of(&agent).map_err(spawn)?;
        // Taken, since waiting for the agent would close it.
        let lifeline = agent.stdin.take();

        let (sender, lines) = mpsc::channel(QUEUE_LINES);
        let of = plan.attempt;
        let stdout = read(agent.stdout.take(), log.clone(), sender.clone(), of);
        let stderr = read(agent.stderr.take(), log, sender, of);
        let started = Instant::now();
        let limits = Limits {
            stall_timeout: plan.stall_timeout,
            slowness: plan.slowness,
        };
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
        let watched = self.plan.target.watched();
        // One at a time: a storage that hangs keeps it, and the watchdog goes on.
        let mut look = None;
        loop {
            tokio::select! {
                status = self.agent.wait() => return EndedBy::Itself(status),
                () = cancel.cancelled() => return EndedBy::Cancellation,
                Some(line) = self.lines.recv() => {
                    if self.hear(&line) {
                        progress.send_replace(self.progress());
                    }
                }
                footprint = seen(&mut look) => {
                    look = None;
                    if footprint.is_some_and(|footprint| self.see(footprint)) {
                        progress.send_replace(self.progress());
                    }
                }
                _ = ticks.tick() => {
                    if let Some(trouble) = self.watchdog.trouble(Instant::now()) {
                        return EndedBy::Watchdog(trouble);
                    }
                    if look.is_none() {
                        look = watched.clone().map(look_at);
                    }
                }
            }
        }
    }

    /// Ends what still runs and hears what was still to be said.
    async fn finish(mut self, ended: EndedBy) -> EndedCopy {
        let kill_after = self.plan.bbcp.kill_after;
        let gone = match ended {
            // Its children may be about to say why it ended. As long as they hold the pipes, and
            // so this takes time, the group's id is theirs.
            EndedBy::Itself(_) => {
                drain(&mut self.lines, &mut self.output).await;
                self.group.end(kill_after).await
            }
            EndedBy::Watchdog(_) | EndedBy::Cancellation => {
                // Reaped meanwhile, but not for ever: it may hang in a system call.
                let reaped = timeout(kill_after + REAP, self.agent.wait());
                let (gone, _) = tokio::join!(self.group.end(kill_after), reaped);
                drain(&mut self.lines, &mut self.output).await;
                gone
            }
        };
        // What did not close its pipe by now is not heard.
        drop(self.readers);
        if !gone {
            tracing::warn!(
                data_transfer_id = self.plan.attempt.transfer_id.get(),
                attempt = self.plan.attempt.number.get(),
                "a process of bbcp survived SIGKILL, it hangs in a system call"
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

    /// A line came. Whether the progress has changed.
    fn hear(&mut self, line: &[u8]) -> bool {
        match self.output.hear(line) {
            Some(Heard::Progress(percent, rate)) => {
                self.watchdog.progress(percent, rate, Instant::now());
                true
            }
            Some(Heard::Appending(offset)) => {
                self.watchdog.resumed_at(offset);
                true
            }
            None => false,
        }
    }

    /// The growing file was looked at. Whether the progress has changed.
    fn see(&mut self, footprint: Footprint) -> bool {
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

/// Ticks that fall together with those of all other copies with this time-out, so that one wake-up serves all.
fn ticks(stall_timeout: Duration) -> Interval {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    // A short time-out must not be missed by much.
    let pause = (stall_timeout / 4).clamp(Duration::from_millis(10), TICK);
    let now = Instant::now();
    let since = now.duration_since(*FIRST.get_or_init(|| now));
    let over = since.as_nanos() % pause.as_nanos();
    let next = pause.saturating_sub(Duration::from_nanos(u64::try_from(over).unwrap_or(0)));
    let mut ticks = interval_at(now + next, pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

/// Hears what is still in the pipes, until they close or [`DRAIN`] has passed: a grandchild may
/// hold them open for ever.
async fn drain(lines: &mut mpsc::Receiver<Vec<u8>>, output: &mut OutputSummary) {
    let end = Instant::now() + DRAIN;
    while let Ok(Some(line)) = timeout_at(end, lines.recv()).await {
        output.hear(&line);
    }
}

/// Reads a pipe to its end, for the log and for the watchdog.
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
    // A pipe that breaks is at its end.
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        if let Some(open) = &log
            && !open.write(&chunk[..n]).await
        {
            tracing::warn!(
                data_transfer_id = of.transfer_id.get(),
                attempt = of.number.get(),
                "the log file of an attempt is too slow, the rest is not logged"
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
        // Nobody listens any more when this fails.
        let _closed = heard.send(line).await;
    }
}

/// Begins to look at the growing file, which is not there at first.
fn look_at(path: AbsolutePath) -> JoinHandle<Option<Footprint>> {
    spawn_blocking(move || {
        let found = fs::symlink_metadata(path.as_path()).ok()?;
        Some(Footprint {
            size: found.len(),
            allocated: found.blocks() * BLOCK_BYTES,
        })
    })
}

/// What a look saw; never without one.
async fn seen(look: &mut Option<JoinHandle<Option<Footprint>>>) -> Option<Footprint> {
    match look {
        Some(look) => look.await.ok().flatten(),
        None => pending().await,
    }
}

/// A line that is about how far the copy is.
enum Heard {
    /// Per cent, and bytes per second.
    Progress(Option<u32>, Option<f64>),
    /// Bytes that were there before.
    Appending(u64),
}

/// Summary of bbcp's output so far. Its size is bounded.
struct OutputSummary {
    classifier: FailureClassifier,
    created: Option<(u64, Option<f64>)>,
    checksum: Option<(String, String)>,
}

impl OutputSummary {
    fn new(paths: CopyPaths) -> Self {
        Self {
            classifier: FailureClassifier::new(paths),
            created: None,
            checksum: None,
        }
    }

    /// What the watchdog has to know of a line, if anything.
    fn hear(&mut self, line: &[u8]) -> Option<Heard> {
        match parse(line) {
            Event::Progress { percent, rate, .. } => return Some(Heard::Progress(percent, rate)),
            Event::Appending { offset } => return Some(Heard::Appending(offset)),
            Event::Created { bytes, rate } => self.created = Some((bytes, rate)),
            Event::Checksum { algorithm, hex } => self.checksum = Some((algorithm, hex)),
            Event::Creating | Event::Total { .. } => {}
            Event::Other(line) => self.classifier.observe(&line),
        }
        None
    }
}

/// A copy of which no process is left.
struct EndedCopy {
    ended: EndedBy,
    elapsed: Duration,
    bytes_done: u64,
    bytes_total: u64,
    slowness: Slowness,
    output: OutputSummary,
}

impl EndedCopy {
    /// For the log file.
    fn summary(&self) -> String {
        let how = match &self.ended {
            EndedBy::Itself(Ok(status)) => format!("ended with {}", Exit::from(*status)),
            EndedBy::Itself(Err(e)) => format!("lost: {e}"),
            EndedBy::Watchdog(Trouble::Stalled(idle)) => {
                format!("stopped, no byte moved for {:.1} s", idle.as_secs_f64())
            }
            EndedBy::Watchdog(Trouble::TooSlow(moved)) => {
                format!("stopped, {moved} bytes in the last window are too few")
            }
            EndedBy::Watchdog(Trouble::Late(_)) => "stopped at its deadline".into(),
            EndedBy::Cancellation => "stopped on request".into(),
        };
        format!("{how}, after {:.1} s", self.elapsed.as_secs_f64())
    }

    fn conclude(self) -> Result<Report, TransferError> {
        let status = match self.ended {
            EndedBy::Itself(status) => status.map_err(|source| TransferError::Spawn {
                program: "bbcp".into(),
                source,
            })?,
            EndedBy::Watchdog(trouble) => {
                let (bytes_done, bytes_total) = (self.bytes_done, self.bytes_total);
                return Err(match trouble {
                    Trouble::Stalled(idle) => TransferError::Stalled {
                        idle: Duration::from_secs(idle.as_secs()),
                        bytes_done,
                        bytes_total,
                    },
                    Trouble::TooSlow(moved) => TransferError::TooSlow {
                        moved,
                        window: self.slowness.window,
                        least: self.slowness.min_rate,
                        bytes_done,
                        bytes_total,
                    },
                    Trouble::Late(limit) => TransferError::Deadline {
                        limit,
                        bytes_done,
                        bytes_total,
                    },
                });
            }
            EndedBy::Cancellation => {
                return Err(INTERRUPTED);
            }
        };
        self.output.classifier.conclude(Exit::from(status))?;
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
    async fn copies_tick_together() {
        let pause = Duration::from_millis(50);
        let mut one = ticks(pause * 4);
        tokio::time::sleep(Duration::from_millis(13)).await;
        let mut other = ticks(pause * 4);
        let apart = other.tick().await - one.tick().await;
        assert_eq!(apart.as_nanos() % pause.as_nanos(), 0, "{apart:?}");
    }
}
