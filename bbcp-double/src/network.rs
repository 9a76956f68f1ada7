//! Copies to and from real hosts (knob `NETWORK`).
//!
//! As in the original, the agent starts the remote child by the command of `-S` or `-T`, one child listens for the other
//! one, and the data go directly between the two. Unlike the original, there is one data connection whatever `-s` says.
//!
//! ```text
//! agent ──standard input──► listener       the job
//! agent ◄──standard output─ listener       its address
//! agent ──standard input──► connector      the job, with the address
//!                           connector ──TCP──► listener
//! ```

use crate::console;
use crate::failure::{Failure, errno_text};
use crate::options::Options;
use crate::spec::Spec;
use crate::wire::{Agent, Job, Meeting, Peer, Report};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Ports of a listener without `-Z`; if all are in use, any other.
const USUAL_PORTS: std::ops::RangeInclusive<u16> = 5031..=5039;
/// Time for the other side to report its own reason after one side has failed
const REASON_TIME: Duration = Duration::from_secs(1);
/// Pause between two looks at a child or a listener
const PAUSE: Duration = Duration::from_millis(10);

/// Side of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Sink,
    Source,
}

impl Side {
    fn argument(self) -> &'static str {
        match self {
            Self::Sink => "SNK",
            Self::Source => "SRC",
        }
    }

    /// The side that listens, and is started first.
    pub(crate) fn listener(options: &Options) -> Self {
        if options.reverse {
            Self::Source
        } else {
            Self::Sink
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Sink => Self::Source,
            Self::Source => Self::Sink,
        }
    }

    pub(crate) fn spec(self, job: &Job) -> Option<&Spec> {
        match self {
            Self::Sink => Some(&job.target),
            Self::Source => job.sources.first(),
        }
    }

    fn start_command(self, options: &Options) -> Option<&str> {
        match self {
            Self::Sink => options.target_command.as_deref(),
            Self::Source => options.source_command.as_deref(),
        }
    }
}

/// The two children of a copy.
pub(crate) struct Children {
    /// The one that listens, which is started first
    pub(crate) listener: Child,
    /// None if the listener ended before it listened
    pub(crate) connector: Option<Child>,
    /// Reports of the listener
    pub(crate) reports: BufReader<ChildStdout>,
    /// Standard inputs of both. Their end shows a remote child that the agent has ended, so they stay open until both
    /// children have.
    pub(crate) inputs: Vec<ChildStdin>,
}

/// Starts both sides. `program` is the local bbcp.
///
/// # Errors
/// A program cannot be started.
pub(crate) fn start(program: &Path, job: &Job) -> io::Result<Children> {
    let first = Side::listener(&job.options);
    let second = first.other();
    let mut inputs = Vec::new();
    let mut listener = start_side(program, first, job, Meeting::Listen, &mut inputs)?;
    let output = listener.stdout.take();
    let mut reports = BufReader::new(output.ok_or_else(|| io::Error::other("no output"))?);
    let connector = match await_address(&mut reports) {
        Some((host, port)) => {
            let meeting = Meeting::Connect { host, port };
            Some(start_side(program, second, job, meeting, &mut inputs)?)
        }
        None => None,
    };
    Ok(Children {
        listener,
        connector,
        reports,
        inputs,
    })
}

fn await_address(reports: &mut BufReader<ChildStdout>) -> Option<(String, u16)> {
    let mut line = String::new();
    reports.read_line(&mut line).ok()?;
    match serde_json::from_str(&line) {
        Ok(Report::Listening(host, port)) => Some((host, port)),
        _ => None,
    }
}

/// Starts a side, and sends it the job.
fn start_side(
    program: &Path,
    side: Side,
    job: &Job,
    meeting: Meeting,
    inputs: &mut Vec<ChildStdin>,
) -> io::Result<Child> {
    let remote = side.spec(job).filter(|spec| spec.host.is_some());
    let mut command = match remote {
        Some(spec) => remote_command(spec, side.start_command(&job.options)),
        None => Command::new(program),
    };
    let mut child = command
        .arg(side.argument())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let own_job = Job {
        meeting: Some(meeting),
        agent: match remote {
            Some(_) => Agent::Connected,
            None => job.agent,
        },
        ..job.clone()
    };
    if let Some(input) = child.stdin.take() {
        // If ssh has ended already, the wait for it finds the reason.
        let _ = Peer::new(input.as_fd().try_clone_to_owned()?).send(&own_job);
        inputs.push(input);
    }
    Ok(child)
}

/// Start command of a remote side, with bbcp's names replaced.
fn remote_command(spec: &Spec, given: Option<&str>) -> Command {
    let user = spec.user.clone().or_else(|| std::env::var("USER").ok());
    let words = given
        .unwrap_or("ssh -x -a -l %U %H bbcp")
        .split_whitespace();
    let mut words = words.filter_map(|word| match word {
        "%H" => spec.host.clone(),
        "%U" => user.clone(),
        "%I" | "%4" => None,
        _ => Some(word.to_owned()),
    });
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

/// Ends a side whose other side has failed, after it had time to report its own reason.
pub(crate) fn end(child: &mut Child) {
    let deadline = Instant::now() + REASON_TIME;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Connects this child with the other one. `control` is the connection to the agent.
///
/// # Errors
/// The other side does not come, or cannot be reached.
pub(crate) fn meet(job: &Job, control: Peer) -> Result<Peer, Failure> {
    let stream = match &job.meeting {
        None => return Ok(control),
        Some(Meeting::Listen) => accept(job)?,
        Some(Meeting::Connect { host, port }) => connect(host, *port, job.options.streams)?,
    };
    let connected = stream.set_nodelay(true);
    connected.map_err(|error| Failure::system(&error, "setting up", "the connection"))?;
    Ok(Peer::new(stream.into()))
}

fn connect(host: &str, port: u16, streams: u64) -> Result<TcpStream, Failure> {
    let addresses = (host, port).to_socket_addrs();
    let resolved = addresses.map(|mut found| found.find(SocketAddr::is_ipv4));
    let line = match resolved {
        Ok(Some(address)) => match TcpStream::connect(address) {
            Ok(stream) => return Ok(stream),
            Err(error) => format!(
                "{} unable to connect to port [::ffff:{}]:{port}",
                errno_text(&error),
                address.ip()
            ),
        },
        _ => format!("Unable to connect to  {host} ;  Name or service not known"),
    };
    Err(Failure::unconnected(line, streams))
}

fn accept(job: &Job) -> Result<TcpStream, Failure> {
    let options = &job.options;
    let failed = |error: io::Error| Failure::system(&error, "binding", "socket").with_code(255);
    let listener = bind(options.ports).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    listener.set_nonblocking(true).map_err(failed)?;
    let report = Report::Listening(announced_host(options.no_dns), port);
    if let Ok(line) = serde_json::to_string(&report) {
        console::standard_output(&line);
    }
    let deadline = Instant::now() + Duration::from_secs_f64(job.accept);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(failed)?;
                return Ok(stream);
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            Err(_) => return Err(Failure::accept_timeout(port, options.streams)),
        }
    }
}

fn bind(ports: Option<(u16, u16)>) -> io::Result<TcpListener> {
    let (range, others) = match ports {
        Some((first, last)) => (first..=last, None),
        None => (USUAL_PORTS, Some(0)),
    };
    let addresses: Vec<_> = range
        .chain(others)
        .map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
        .collect();
    TcpListener::bind(addresses.as_slice())
}

/// Name of this host, or the address of this name.
fn announced_host(as_address: bool) -> String {
    let name = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default();
    if !as_address {
        return name;
    }
    let resolved = (name.as_str(), 0).to_socket_addrs().ok();
    let mut addresses = resolved.into_iter().flatten().map(|address| address.ip());
    // A name without an address leads nowhere, as in the original.
    addresses
        .find(IpAddr::is_ipv4)
        .map_or(name, |address| address.to_string())
}
