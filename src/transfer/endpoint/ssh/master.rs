//! The ssh process that holds a connection, and the shell behind it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::options::{Sharing, options};
use super::shell::{Mark, PartialReply, SHELL, ShellLine, request};
use super::{LOGIN_LIMIT, LoginFailure, ScriptReply, SessionKind};
use crate::process::{Group, find_program, relayed_command};
use crate::settings::Ssh;
use crate::transfer::endpoint::Host;
use crate::transfer::lines::Lines;

/// Number of copies that share a connection. sshd allows ten sessions per connection by default (`MaxSessions`), and the
/// shell is one of them.
const MAX_COPIES: usize = 9;

/// Number of sessions whose place a session with data takes. All data of a connection share one TCP stream, which is slow
/// over a long link.
const SHARE_OF_DATA: u32 = 3;

/// Time limit for an answer to an empty request.
const CHECK_LIMIT: Duration = Duration::from_secs(5);

/// Maximum number of bytes kept of standard error. The last ones are kept, since ssh prints its reason at the end.
const MAX_STDERR_BYTES: usize = 64 << 10;

/// Maximum number of bytes per read from a pipe.
const CHUNK_BYTES: usize = 8 << 10;

/// Exit code of ssh if it cannot connect, or if the connection was lost.
const SSH_FAILED: i32 = 255;

/// First exit code in a shell for a program that was killed by a signal.
const KILLED: i32 = 128;

/// A running ssh process with its connection. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Master {
    /// Dropped first: the killed processes close the pipes.
    _group: Group,
    _child: Child,
    requests: mpsc::UnboundedSender<String>,
    last_number: AtomicU64,
    pending: Pending,
    ended: watch::Receiver<Option<MasterEnd>>,
    copies: Arc<Semaphore>,
    /// True if the shell does not answer.
    is_silent: AtomicBool,
    _tasks: [AbortOnDropHandle<()>; 2],
}

/// End of an ssh process.
#[derive(Debug, Clone, Default)]
pub(in crate::transfer::endpoint) struct MasterEnd {
    /// Exit code; `None` if a signal ended the process.
    pub(in crate::transfer::endpoint) code: Option<i32>,
    /// Standard error.
    pub(in crate::transfer::endpoint) stderr: String,
    /// Last line of standard output that is not part of an answer.
    pub(in crate::transfer::endpoint) noise: String,
}

impl MasterEnd {
    /// Returns true if ssh itself failed or was killed, and not the login shell.
    pub(in crate::transfer::endpoint) fn is_of_ssh(&self) -> bool {
        let is_signal = |code| (KILLED..SSH_FAILED).contains(&code);
        self.code
            .is_none_or(|code| code == SSH_FAILED || is_signal(code))
    }
}

/// Requests without an answer.
#[derive(Debug, Default, Clone)]
struct Pending(Arc<Mutex<HashMap<u64, PendingRequest>>>);

#[derive(Debug)]
struct PendingRequest {
    reply: PartialReply,
    receiver: oneshot::Sender<ScriptReply>,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, PendingRequest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, line: ShellLine) {
        let mut requests = self.lock();
        match line {
            ShellLine::Output(number, line) => {
                if let Some(request) = requests.get_mut(&number) {
                    request.reply.add(line);
                }
            }
            ShellLine::End(number, code) => {
                if let Some(request) = requests.remove(&number) {
                    // The caller may have given up.
                    let _given_up = request.receiver.send(request.reply.end(code));
                }
            }
            ShellLine::Begin | ShellLine::Noise(_) => {}
        }
    }
}

/// Removes a request when its caller gives up.
struct PendingGuard<'a>(&'a Pending, u64);

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Master {
    /// Logs in, and waits until the shell runs.
    pub(super) async fn log_in(
        host: &Host,
        ssh: &Ssh,
        socket: &Path,
    ) -> Result<Self, LoginFailure> {
        let program = find_program(&ssh.program).ok_or(LoginFailure::ProgramMissing)?;
        let (mark, end_mark) = (Mark::new(), Mark::new());
        let mut process = relayed_command(&program, end_mark.as_str(), socket)
            .args(arguments(host, ssh, socket, &mark))
            .spawn()
            .map_err(|error| LoginFailure::Spawn(Arc::new(error)))?;
        let group = Group::of(&process).map_err(|error| LoginFailure::Spawn(Arc::new(error)))?;

        let pending = Pending::default();
        let (requests, lines) = mpsc::unbounded_channel();
        let begun = watch::Sender::new(false);
        let (mut has_begun, ended) = (begun.subscribe(), watch::Sender::new(None));
        let mut has_ended = ended.subscribe();
        let reader = Reader {
            mark,
            end_mark,
            begun,
            pending: pending.clone(),
            noise: String::new(),
            code: None,
        };
        let reading = reader.read(process.stdout.take(), process.stderr.take(), ended);
        let writing = write(process.stdin.take(), lines);
        let master = Self {
            _group: group,
            _child: process,
            requests,
            last_number: AtomicU64::new(0),
            pending,
            ended: has_ended.clone(),
            copies: Arc::new(Semaphore::new(MAX_COPIES)),
            is_silent: AtomicBool::new(false),
            _tasks: [
                AbortOnDropHandle::new(tokio::spawn(reading)),
                AbortOnDropHandle::new(tokio::spawn(writing)),
            ],
        };
        let began = async {
            tokio::select! {
                Ok(_) = has_begun.wait_for(|begun| *begun) => Ok(()),
                Ok(end) = has_ended.wait_for(Option::is_some) => Err(end.clone()),
            }
        };
        match timeout(LOGIN_LIMIT, began).await {
            Ok(Ok(())) => Ok(master),
            Ok(Err(end)) => Err(end.map_or(LoginFailure::TimedOut, LoginFailure::Ended)),
            Err(_) => Err(LoginFailure::TimedOut),
        }
    }

    /// End of the process, if it has ended.
    pub(super) fn end(&self) -> Option<MasterEnd> {
        self.ended.borrow().clone()
    }

    /// Returns true if the connection can be used for further requests and copies.
    pub(super) fn is_alive(&self) -> bool {
        self.ended.borrow().is_none() && !self.is_silent.load(Ordering::Relaxed)
    }

    /// Checks whether the shell answers at all, after a request without an answer. If not, the connection is used only by
    /// the copies that use it already.
    pub(super) async fn check(&self) {
        if timeout(CHECK_LIMIT, self.ask("", &[])).await.is_err() {
            self.is_silent.store(true, Ordering::Relaxed);
        }
    }

    /// Runs a script. Returns the end of the process if that came before the answer.
    pub(super) async fn ask(
        &self,
        script: &str,
        arguments: &[&str],
    ) -> Result<ScriptReply, AskFailure> {
        let number = self.last_number.fetch_add(1, Ordering::Relaxed);
        let line = request(number, script, arguments).ok_or(AskFailure::LineBreak)?;
        let (sender, receiver) = oneshot::channel();
        self.pending.lock().insert(
            number,
            PendingRequest {
                reply: PartialReply::default(),
                receiver: sender,
            },
        );
        let _guard = PendingGuard(&self.pending, number);
        let mut ended = self.ended.clone();
        // An error means that the process has ended.
        let _ended = self.requests.send(line);
        tokio::select! {
            biased;
            Ok(reply) = receiver => Ok(reply),
            end = ended.wait_for(Option::is_some) => {
                Err(AskFailure::Lost(end.ok().and_then(|end| end.clone())))
            }
        }
    }

    /// Reserves a session of the connection for a copy, if there is room for it.
    pub(super) fn reserve(&self, kind: SessionKind) -> Option<OwnedSemaphorePermit> {
        let share = share(kind);
        self.copies.clone().try_acquire_many_owned(share).ok()
    }

    /// Returns true if there is room for a session.
    pub(super) fn has_room(&self, kind: SessionKind) -> bool {
        u32::try_from(self.room()).is_ok_and(|room| room >= share(kind))
    }

    /// Number of free sessions.
    pub(super) fn room(&self) -> usize {
        self.copies.available_permits()
    }

    /// Returns true if a copy uses the connection.
    pub(super) fn has_copies(&self) -> bool {
        self.room() < MAX_COPIES
    }
}

/// Reason why a request has no answer.
#[derive(Debug)]
pub(super) enum AskFailure {
    /// An argument contains a line break.
    LineBreak,
    /// The connection was lost.
    Lost(Option<MasterEnd>),
}

/// Number of sessions whose place a session takes.
fn share(kind: SessionKind) -> u32 {
    match kind {
        SessionKind::Commands => 1,
        SessionKind::Data => SHARE_OF_DATA,
    }
}

fn arguments(host: &Host, ssh: &Ssh, socket: &Path, mark: &Mark) -> Vec<String> {
    let mut arguments = options(ssh, Sharing::Master(socket));
    arguments.push("-T".into());
    if !ssh.user.is_empty() {
        arguments.extend(["-l".to_owned(), ssh.user.clone()]);
    }
    // ssh passes one string to the login shell of the host, so every word is quoted.
    let shell = shell_words::join(["sh", "-c", SHELL, mark.as_str()]);
    arguments.extend(["--".to_owned(), host.as_ssh().to_owned(), shell]);
    arguments
}

/// Writes requests to the shell.
async fn write(stdin: Option<ChildStdin>, mut lines: mpsc::UnboundedReceiver<String>) {
    let Some(mut stdin) = stdin else { return };
    while let Some(line) = lines.recv().await {
        // The reader sees the end of the process.
        if stdin.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Reads the output of a connection to its end.
struct Reader {
    mark: Mark,
    /// Word before the exit code of ssh.
    end_mark: Mark,
    begun: watch::Sender<bool>,
    pending: Pending,
    noise: String,
    code: Option<i32>,
}

impl Reader {
    async fn read(
        mut self,
        stdout: Option<impl AsyncRead + Unpin>,
        stderr: Option<impl AsyncRead + Unpin>,
        ended: watch::Sender<Option<MasterEnd>>,
    ) {
        let answers = async {
            let Some(mut stdout) = stdout else { return };
            let mut lines = Lines::default();
            let mut chunk = vec![0; CHUNK_BYTES];
            // A broken pipe counts as its end; the exit code explains the failure.
            while let Ok(n @ 1..) = stdout.read(&mut chunk).await {
                lines.push(&chunk[..n], |line| self.take(line));
            }
            lines.finish(|line| self.take(line));
        };
        let ((), stderr) = tokio::join!(answers, read_stderr(stderr));
        ended.send_replace(Some(MasterEnd {
            code: self.code,
            stderr,
            noise: self.noise,
        }));
        self.pending.lock().clear();
    }

    fn take(&mut self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        if let Some(code) = text.trim_end().strip_prefix(self.end_mark.as_str()) {
            self.code = code.trim().parse().ok();
            return;
        }
        match self.mark.parse(line) {
            ShellLine::Begin => {
                self.begun.send_replace(true);
            }
            ShellLine::Noise(noise) if noise.is_empty() => {}
            ShellLine::Noise(noise) => self.noise = noise,
            line => self.pending.take(line),
        }
    }
}

/// Reads standard error to its end, and returns its last bytes.
async fn read_stderr(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut pipe) = pipe else {
        return String::new();
    };
    let mut kept = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..n]);
        if kept.len() > 2 * MAX_STDERR_BYTES {
            kept.drain(..kept.len() - MAX_STDERR_BYTES);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}
