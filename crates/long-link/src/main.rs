//! A long link between two hosts, both on this machine.
//!
//! The hosts `fyst` and `koln` are made of namespaces: each has its own network, processes, host name, mounts and files,
//! and shares only the installed programs with the machine. Packets between them pass through this program, which delays,
//! loses and reorders them as configured. `docs/development/long-link.md` explains the use.
#![allow(
    clippy::disallowed_methods,
    reason = "the program is for tests, and starts the processes of the hosts in several places"
)]

mod control;
mod error;
mod host;
mod link;
mod session;

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;
use service_connection::error_chain::chain;

use crate::error::{Error, during};
use crate::host::{Host, HostName, command_on};
use crate::link::{MTU, Setting};
use crate::session::{Event, Remover, Session};

/// Name of the variable with the private directory of the link.
const DIRECTORY: &str = "LONG_LINK_DIR";
const TUN: &str = "/dev/net/tun";

/// A long link between two hosts made of namespaces.
#[derive(Debug, Parser)]
#[command(name = "long-link")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Starts link and hosts, runs a command on a host, and ends both with it
    ///
    /// Without a host: prints one line of JSON when both run, and ends with standard input or by a signal. Exit code 77:
    /// no long link is possible here.
    Run(Run),
    /// Runs a command on a host of a running link
    On {
        #[command(flatten)]
        place: Place,
        host: HostName,
        /// A shell by default
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Changes properties of a running link: delay=120ms rate=1000Mbit queue=100ms loss=0.1% reorder=1%
    /// reorder-delay=10ms largest=1400|none blocked=5031-5039|none cut=yes|no mtu=9000
    Set {
        #[command(flatten)]
        place: Place,
        /// [HOST] NAME=VALUE…; with HOST, only for packets that it sends
        #[arg(required = true)]
        words: Vec<String>,
    },
    /// Interrupts a running link
    Cut(Place),
    /// Ends the interruption
    Mend(Place),
    /// Prints the state of link and hosts
    Show(Place),
    /// Ends all processes of a host at once, and starts it again later
    Reboot {
        #[command(flatten)]
        place: Place,
        host: HostName,
        /// Time until it starts again
        #[arg(long, default_value = "0s")]
        after: String,
    },
    #[command(hide = true)]
    CreateHost { host: HostName, directory: PathBuf },
    #[command(hide = true)]
    InitializeHost { host: HostName, directory: PathBuf },
    #[command(hide = true)]
    RemoveDirectory { directory: PathBuf },
}

#[derive(Debug, Args)]
struct Place {
    /// Private directory of the link
    #[arg(long = "in", env = DIRECTORY, value_name = "DIRECTORY")]
    directory: PathBuf,
}

#[derive(Debug, Args)]
struct Run {
    /// Private directory, new or empty; removed at the end [default: a temporary one]
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
    /// Time from one host to the other
    #[arg(long, default_value = "120ms")]
    delay: String,
    /// Rate in each direction, or `unlimited`
    #[arg(long, default_value = "1000Mbit")]
    rate: String,
    /// Longest time in the queue in front of the link
    #[arg(long, default_value = "100ms")]
    queue: String,
    /// Share of the packets that are lost, such as 0.1%
    #[arg(long, default_value = "0")]
    loss: String,
    /// Share of the packets that others overtake
    #[arg(long, default_value = "0")]
    reorder: String,
    /// Additional delay of these packets
    #[arg(long, default_value = "10ms")]
    reorder_delay: String,
    /// Size in bytes above which packets are lost
    #[arg(long, default_value = "none")]
    largest: String,
    /// Size of the largest packet that the hosts send
    #[arg(long, default_value_t = 9000, value_parser = clap::value_parser!(u32).range(MTU))]
    mtu: u32,
    /// Seed of the random draws
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Host that runs the command
    host: Option<HostName>,
    /// A shell by default
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

impl Run {
    fn settings(&self) -> Result<Vec<Setting>, Error> {
        [
            ("delay", &self.delay),
            ("rate", &self.rate),
            ("queue", &self.queue),
            ("loss", &self.loss),
            ("reorder", &self.reorder),
            ("reorder-delay", &self.reorder_delay),
            ("largest", &self.largest),
        ]
        .map(|(name, value)| format!("{name}={value}").parse())
        .into_iter()
        .collect::<Result<_, _>>()
        .map_err(|error: link::SettingError| Error::Refused(error.to_string()))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The ssh server refuses files that others may write.
    umask(Mode::from_bits_truncate(0o022));
    let done = match arguments.task {
        Task::Run(options) => run(&options),
        Task::On {
            place,
            host,
            command,
        } => on(&place.directory, host, command),
        Task::Set { place, words } => tell(&place, &format!("set {}", words.join(" "))),
        Task::Cut(place) => tell(&place, "set cut=yes"),
        Task::Mend(place) => tell(&place, "set cut=no"),
        Task::Show(place) => show(&place),
        Task::Reboot { place, host, after } => {
            tell(&place, &format!("reboot {} after={after}", host.as_str()))
        }
        Task::CreateHost { host, directory } => host::create(host, &directory),
        Task::InitializeHost { host, directory } => host::initialize(host, &directory),
        Task::RemoveDirectory { directory } => remove_directory(&directory),
    };
    done.unwrap_or_else(|error| {
        eprintln!("long-link: {}", chain(&error));
        ExitCode::from(error.exit_code())
    })
}

/// Runs link and hosts, until the command or this program ends.
fn run(options: &Run) -> Result<ExitCode, Error> {
    let settings = options.settings()?;
    check_machine()?;
    // Before any thread is started, so that only the thread in `watch_signals` receives them.
    let signals = block_signals()?;
    let directory = match &options.directory {
        Some(directory) => directory.clone(),
        None => tempfile::Builder::new()
            .prefix("long-link-")
            .tempdir()
            .map_err(during("create a directory"))?
            .keep(),
    };
    let directory = host::make_directory(&directory)?;
    let _remover = Remover::start(&directory)?;
    let session = Session::start(&directory, settings, options.mtu, options.seed)?;
    let (events, received) = mpsc::channel();
    control::listen(&directory, events.clone())?;
    watch_signals(signals, options.host.is_some(), events.clone());
    match options.host {
        Some(host) => start_command(session.host(host), &directory, &options.command, events)?,
        None => {
            println!("{}", serde_json::json!({ "directory": directory }));
            thread::spawn(move || {
                let _ = io::copy(&mut io::stdin(), &mut io::sink());
                let _ = events.send(Event::Stop);
            });
        }
    }
    session.run(&received)
}

/// Checks for what a test environment may lack.
fn check_machine() -> Result<(), Error> {
    if !geteuid().is_root() {
        return Err(Error::Unavailable("this needs root".into()));
    }
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(|error| Error::Unavailable(format!("{TUN}: {error}")))?;
    for name in ["ip", "nsenter", "ssh-keygen", "sshd"] {
        host::program(name)?;
    }
    Ok(())
}

fn block_signals() -> Result<SigSet, Error> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        signals.add(signal);
    }
    signals.thread_block().map_err(during("block signals"))?;
    Ok(signals)
}

/// Ends this program by a signal. An interrupt from the terminal is for its command, if it has one.
fn watch_signals(signals: SigSet, has_command: bool, events: Sender<Event>) {
    thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if !(has_command && signal == Signal::SIGINT) {
                let _ = events.send(Event::Stop);
            }
        }
    });
}

fn start_command(
    host: &Host,
    directory: &Path,
    command: &[OsString],
    events: Sender<Event>,
) -> Result<(), Error> {
    let first = first_process(host.first_process(), host.name())?;
    let mut child = command_on(first, or_shell(command.to_vec()))
        .env(DIRECTORY, directory)
        .spawn()
        .map_err(during("start the command"))?;
    thread::spawn(move || {
        let ended = child.wait().map_or(Event::Stop, Event::Ended);
        let _ = events.send(ended);
    });
    Ok(())
}

fn or_shell(command: Vec<OsString>) -> Vec<OsString> {
    if command.is_empty() {
        vec!["bash".into()]
    } else {
        command
    }
}

fn first_process(pid: Option<Pid>, host: HostName) -> Result<Pid, Error> {
    pid.ok_or_else(|| Error::Refused(format!("{} is off", host.as_str())))
}

/// Replaces this program by a command on a host.
fn on(directory: &Path, host: HostName, command: Vec<OsString>) -> Result<ExitCode, Error> {
    let state = control::send(directory, "show")?;
    let pid = state["hosts"][host.as_str()]["pid"].as_i64();
    let pid = pid.and_then(|pid| i32::try_from(pid).ok());
    let first = first_process(pid.map(Pid::from_raw), host)?;
    let error = command_on(first, or_shell(command))
        .env(DIRECTORY, directory)
        .exec();
    Err(during("run nsenter")(error))
}

fn tell(place: &Place, request: &str) -> Result<ExitCode, Error> {
    control::send(&place.directory, request)?;
    Ok(ExitCode::SUCCESS)
}

fn show(place: &Place) -> Result<ExitCode, Error> {
    let state: Value = control::send(&place.directory, "show")?;
    println!("{state:#}");
    Ok(ExitCode::SUCCESS)
}

/// Waits for the end of the program that has started this one, then removes its directory.
fn remove_directory(directory: &Path) -> Result<ExitCode, Error> {
    SigSet::all()
        .thread_block()
        .map_err(during("block signals"))?;
    let _ = io::stdin().read(&mut [0]);
    // The processes of the hosts end at the same time, and may still write.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match host::remove(directory) {
            Ok(()) => return Ok(ExitCode::SUCCESS),
            Err(error) if Instant::now() > deadline => {
                return Err(during(format!("remove {}", directory.display()))(error));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
