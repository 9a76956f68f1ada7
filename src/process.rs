//! Start and end of other programs; no other module starts any.
//!
//! Every program runs in a process group of its own, with a clean environment and an empty standard input. bbcp
//! consists of five processes, and its children continue to copy for seconds if only the first of them dies. So signals
//! always go to the whole *group*, and dropping a [`Group`] kills its remaining processes.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, eaccess, getpgrp};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// Environment variables that a program receives besides `PATH`. The socket gives access to keys in ssh's agent.
const INHERITED_VARIABLES: [&str; 2] = ["HOME", "SSH_AUTH_SOCK"];

/// Search path for programs if this process has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Interval between two checks of a group that is about to end.
const POLL: Duration = Duration::from_millis(20);

/// Time limit for a killed group to end; only a hanging system call takes longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Creates a command that runs as described above, with both outputs piped.
#[allow(clippy::disallowed_methods, reason = "the module that starts programs")]
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    command.env("PATH", search_path());
    for name in INHERITED_VARIABLES {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // The program's messages are parsed, so they must not be translated.
    command.env("LC_ALL", "C");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        // The group does the killing; with this option the runtime also reaps the child.
        .kill_on_drop(true);
    command
}

/// Script that runs the program in its arguments, and kills the whole group as soon as standard input ends.
///
/// Only the worker holds the other end of that pipe, so it closes when the worker dies for any reason. Without the
/// script, a bbcp would continue to copy for hours after its worker has died. The script is fixed: data are arguments
/// only.
const GUARD: &str = r#"
exec 3<&0 </dev/null
unset PWD
"$@" 3<&- &
program=$!
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
guard=$!
exec 3<&-
wait "$program"
status=$?
kill -KILL "$guard"
exit "$status"
"#;

/// Same as [`command`], for a program that must not outlive this process: it runs only as long as the pipe on its
/// standard input is open. If a signal ends it, the exit code is 128 plus the number of the signal, as in a shell.
pub(crate) fn guarded_command(program: &Path) -> Command {
    let mut guard = command(Path::new("/bin/sh"));
    guard
        .args(["-c", GUARD, "ccat-transfer-guard"])
        .arg(program)
        .stdin(Stdio::piped());
    guard
}

/// Script that runs ssh with the standard input of this process, and kills the whole group as soon as that ends, like
/// [`GUARD`]. At the end of ssh it prints a mark ($1) with the exit code. $2 is ssh's control socket, in a directory of
/// its own: a killed ssh leaves it.
const RELAY: &str = r#"
unset PWD
mark=$1 socket=$2
shift 2
{ cat; rm -f "$socket"; rmdir "${socket%/*}"; kill -KILL 0; } 2>/dev/null |
  { "$@"; printf '\n%s %s\n' "$mark" "$?"; kill -KILL 0; }
"#;

/// Same as [`guarded_command`], for an ssh that reads requests from its standard input. After the output of ssh follows a
/// line with `mark` and its exit code.
pub(crate) fn relayed_command(program: &Path, mark: &str, socket: &Path) -> Command {
    let mut relay = command(Path::new("/bin/sh"));
    relay
        .args(["-c", RELAY, "ccat-transfer-relay", mark])
        .arg(socket)
        .arg(program)
        .stdin(Stdio::piped());
    relay
}

/// Absolute path of a program: the path itself, or the first executable of that name on `PATH`. `None` if it does not
/// exist.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        let absolute = std::path::absolute(program).ok()?;
        return is_executable(&absolute).then_some(absolute);
    }
    std::env::split_paths(&search_path())
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(program))
        .find(|candidate| is_executable(candidate))
}

fn search_path() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into())
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && eaccess(path, AccessFlags::X_OK).is_ok()
}

/// A process group started by this process. Dropping it kills the group, unless the group has ended already.
#[derive(Debug)]
pub(crate) struct Group {
    id: Option<Pid>,
}

impl Group {
    /// The group of a child started from [`command`].
    ///
    /// # Errors
    /// The child has no id any more, or one that must never be signalled.
    pub(crate) fn of(child: &Child) -> io::Result<Self> {
        let id = child
            .id()
            .and_then(signalled_safely)
            .ok_or_else(|| io::Error::other("the child has no process group of its own"))?;
        Ok(Self { id: Some(id) })
    }

    /// Ends every process of the group: sends SIGTERM, and after `kill_after` SIGKILL. Returns as soon as none is left.
    ///
    /// The caller must wait for the first process at the same time, or must have done so just before: the group's id is
    /// ours while any process of the group exists, but after that the system may reuse it.
    ///
    /// Returns false if a process survived SIGKILL, which is possible only in a hanging system call.
    pub(crate) async fn end(mut self, kill_after: Duration) -> bool {
        for (signal, limit) in [
            (Signal::SIGTERM, kill_after),
            (Signal::SIGKILL, KILL_TIMEOUT),
        ] {
            if !self.signal(signal) || self.ends_within(limit).await {
                self.id = None;
                return true;
            }
        }
        false
    }

    /// Sends a signal. Returns true if a process received it.
    fn signal(&self, signal: Signal) -> bool {
        self.id
            .is_some_and(|id| killpg(id, signal) != Err(Errno::ESRCH))
    }

    async fn ends_within(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            if !self.is_alive() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            sleep(POLL).await;
        }
    }

    fn is_alive(&self) -> bool {
        self.id
            .is_some_and(|id| killpg(id, None) != Err(Errno::ESRCH) && !only_zombies(id))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// Returns `None` for an id that would signal this worker or every process.
fn signalled_safely(id: u32) -> Option<Pid> {
    let id = Pid::from_raw(i32::try_from(id).ok()?);
    (id.as_raw() > 1 && id != getpgrp()).then_some(id)
}

/// Returns true if the group consists only of processes that are dead and not yet reaped.
///
/// In a container whose first process does not reap, orphans stay zombies without limit, and signal 0 does not
/// distinguish them from living processes.
fn only_zombies(group: Pid) -> bool {
    let Ok(processes) = fs::read_dir("/proc") else {
        return false;
    };
    processes
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter_map(|stat| state_and_group(&stat))
        .filter(|(_, of)| *of == group.as_raw())
        .all(|(state, _)| matches!(state, 'Z' | 'X'))
}

/// Parses state and process group from `/proc/PID/stat`. The command, in parentheses, may contain any text.
fn state_and_group(stat: &str) -> Option<(char, i32)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    Some((state, group))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn reads_stat() {
        let stat = "77 (a) b) Z 1 4711 4711 0 -1 4228100 0";
        assert_eq!(state_and_group(stat), Some(('Z', 4711)));
        assert_eq!(state_and_group("77 (a"), None);
    }

    #[test]
    fn never_signals_itself_or_everything() {
        let own = u32::try_from(getpgrp().as_raw()).unwrap_or(0);
        for id in [0, 1, own, u32::MAX] {
            assert_eq!(signalled_safely(id), None, "{id}");
        }
        assert_eq!(signalled_safely(2), Some(Pid::from_raw(2)));
    }

    #[test]
    fn finds_programs() {
        let found = find_program(Path::new("sh"));
        assert!(found.as_deref().is_some_and(Path::is_absolute), "{found:?}");
        assert_eq!(find_program(Path::new("/nowhere/bbcp")), None);
        assert_eq!(find_program(Path::new("no-such-program")), None);
        assert_eq!(find_program(Path::new("/etc/passwd")), None);
    }

    /// The other end of the pipe cannot distinguish the causes (the death of a worker, or a drop), so the test only
    /// drops it.
    #[tokio::test]
    async fn a_guarded_program_dies_with_the_pipe() -> io::Result<()> {
        let mut guard = guarded_command(Path::new("/bin/sh"))
            .args(["-c", "trap '' TERM HUP; sleep 60 & sleep 60; sleep 60"])
            .spawn()?;
        let _group = Group::of(&guard)?;
        drop(guard.stdin.take());
        let status = tokio::time::timeout(KILL_TIMEOUT, guard.wait()).await??;
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
        Ok(())
    }

    #[tokio::test]
    async fn a_guarded_program_ends_as_it_wants() -> io::Result<()> {
        for (script, code) in [("exit 7", 7), ("kill -SEGV $$", 139)] {
            let mut guard = guarded_command(Path::new("/bin/sh"))
                .args(["-c", script])
                .spawn()?;
            let _group = Group::of(&guard)?;
            let _lifeline = guard.stdin.take();
            let status = tokio::time::timeout(KILL_TIMEOUT, guard.wait()).await??;
            assert_eq!(status.code(), Some(code), "{script}");
        }
        Ok(())
    }

    #[tokio::test]
    async fn ends_a_group_that_ignores_term() -> io::Result<()> {
        let mut child = command(Path::new("/bin/sh"))
            .args(["-c", "trap '' TERM; sleep 60 & sleep 60; sleep 60"])
            .spawn()?;
        let group = Group::of(&child)?;
        let id = group.id.map_or(0, Pid::as_raw);
        sleep(Duration::from_millis(100)).await;
        let start = Instant::now();
        let (gone, status) = tokio::join!(group.end(Duration::from_millis(200)), child.wait());
        assert!(gone);
        assert!(!status?.success());
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(killpg(Pid::from_raw(id), None).is_err() || only_zombies(Pid::from_raw(id)));
        Ok(())
    }

    #[tokio::test]
    async fn a_dropped_group_is_killed() -> io::Result<()> {
        let child = command(Path::new("/bin/sh"))
            .args(["-c", "trap '' TERM; sleep 60 & sleep 60"])
            .spawn()?;
        let group = Group::of(&child)?;
        let watch = Group { id: group.id };
        drop(group);
        drop(child);
        assert!(watch.ends_within(Duration::from_secs(2)).await);
        Ok(())
    }
}
