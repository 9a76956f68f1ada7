//! The two hosts: each has its own network, processes, host name, mounts and files.
//!
//! [`files`] writes the files of a host, [`namespace`] contains the processes that create its namespaces, and [`Host`]
//! starts and stops it from the outside.

mod files;
mod namespace;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, UNAVAILABLE, during};

pub(crate) use files::{make_directory, program, remove, write_all};
pub(crate) use namespace::{create, initialize};

/// Name of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostName {
    /// The observatory
    Fyst,
    /// The archive, with an ssh server
    Koln,
}

impl HostName {
    pub(crate) const ALL: [Self; 2] = [Self::Fyst, Self::Koln];

    /// The name by which the other host finds it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Fyst => "fyst",
            Self::Koln => "koln",
        }
    }

    /// Position in pairs.
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    pub(crate) fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self as u8 + 1)
    }

    /// The host of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::from_str(name, false).ok()
    }

    fn has_ssh_server(self) -> bool {
        self == Self::Koln
    }
}

/// A host, running or not.
#[derive(Debug)]
pub(crate) struct Host {
    name: HostName,
    directory: PathBuf,
    running: Option<Running>,
}

/// Processes of a running host.
#[derive(Debug)]
struct Running {
    /// Creates the namespaces, and ends with the first process. Its standard input ends with this program, and then the
    /// host ends too.
    creator: Child,
    /// First process of the host: all others end with it
    first: Pid,
}

impl Host {
    /// Creates a host that is off. `directory` is the private directory of the link.
    pub(crate) fn new(name: HostName, directory: &Path) -> Self {
        Self {
            name,
            directory: directory.to_owned(),
            running: None,
        }
    }

    pub(crate) fn name(&self) -> HostName {
        self.name
    }

    /// The first process of the host, if it is on.
    pub(crate) fn first_process(&self) -> Option<Pid> {
        self.running.as_ref().map(|running| running.first)
    }

    /// Creates the namespaces of the host, without network.
    ///
    /// # Errors
    /// They cannot be created; the reason is on standard error.
    pub(crate) fn start(&mut self) -> Result<Pid, Error> {
        let task = || format!("start the host {}", self.name.as_str());
        let mut creator = std::env::current_exe()
            .and_then(|program| {
                Command::new(program)
                    .args(["create-host", self.name.as_str()])
                    .arg(&self.directory)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    // An interrupt from the terminal is for the command, not for the hosts.
                    .process_group(0)
                    .spawn()
            })
            .map_err(during(task()))?;
        let mut first = None;
        let mut is_ready = false;
        if let Some(output) = creator.stdout.take() {
            let mut lines = BufReader::new(output).lines().map_while(Result::ok);
            while (first.is_none() || !is_ready)
                && let Some(line) = lines.next()
            {
                match line.strip_prefix("pid ") {
                    Some(pid) => first = pid.parse().ok().map(Pid::from_raw),
                    None => is_ready |= line == "ready",
                }
            }
        }
        match first.filter(|_| is_ready) {
            Some(first) => {
                self.running = Some(Running { creator, first });
                Ok(first)
            }
            None => {
                drop(creator.stdin.take());
                let status = creator.wait().map_err(during(task()))?;
                Err(if status.code() == Some(i32::from(UNAVAILABLE)) {
                    Error::Unavailable("namespaces cannot be created".into())
                } else {
                    Error::Refused(format!("cannot {}", task()))
                })
            }
        }
    }

    /// Starts the ssh server, on the host that has one.
    ///
    /// # Errors
    /// The server does not accept its settings.
    pub(crate) fn start_ssh_server(&self) -> Result<(), Error> {
        let Some(first) = self.first_process().filter(|_| self.name.has_ssh_server()) else {
            return Ok(());
        };
        let task = "start the ssh server";
        let program = files::program("sshd")?;
        let status = command_on(
            first,
            [program.as_os_str(), "-E".as_ref(), files::SSH_LOG.as_ref()],
        )
        .stdin(Stdio::null())
        .status()
        .map_err(during(task))?;
        if !status.success() {
            return Err(Error::Refused(format!("cannot {task}: {status}")));
        }
        Ok(())
    }

    /// Ends all processes of the host at once, as by a loss of power.
    pub(crate) fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = kill(running.first, Signal::SIGKILL);
            // Also returns the last process: the kernel reports the end of the first one when all others have ended.
            let _ = running.creator.wait();
        }
    }
}

/// Command that runs on the host with this first process, in its directory for data.
pub(crate) fn command_on<W: AsRef<OsStr>>(
    first: Pid,
    words: impl IntoIterator<Item = W>,
) -> Command {
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &first.to_string()])
        .args([
            "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd",
        ])
        .args(["--", "env", "-u", "SSH_AUTH_SOCK", "-u", "XDG_RUNTIME_DIR"])
        .args([
            &format!("HOME={}", files::HOME),
            "USER=root",
            "LOGNAME=root",
        ])
        .args(words);
    command
}
