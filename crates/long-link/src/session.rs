//! A running link with its two hosts.

use std::io::ErrorKind;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use service_connection::error_chain::chain;

use crate::control::Request;
use crate::error::{Error, during};
use crate::host::{Host, HostName, write_all};
use crate::link::{Device, Forwarder, Setting};

/// Event for the main thread, which alone changes hosts and link.
#[derive(Debug)]
pub(crate) enum Event {
    /// A request, and the channel for its answer
    Request(Request, Sender<Value>),
    /// The command of this program has ended
    Ended(ExitStatus),
    /// This program has to end
    Stop,
}

/// The link with its hosts. They end with the value.
#[derive(Debug)]
pub(crate) struct Session {
    directory: PathBuf,
    hosts: [Host; 2],
    /// Times at which hosts that are off are started
    starts: [Option<Instant>; 2],
    forwarder: Forwarder,
    mtu: u32,
}

impl Session {
    /// Starts link and hosts. `directory` is private and empty.
    ///
    /// # Errors
    /// They cannot be started.
    pub(crate) fn start(
        directory: &Path,
        settings: Vec<Setting>,
        mtu: u32,
        seed: u64,
    ) -> Result<Self, Error> {
        write_all(directory)?;
        let mut forwarder = Forwarder::start(seed).map_err(during("start the link"))?;
        forwarder
            .apply(None, settings)
            .map_err(during("start the link"))?;
        let mut session = Self {
            directory: directory.to_owned(),
            hosts: HostName::ALL.map(|name| Host::new(name, directory)),
            starts: [None; 2],
            forwarder,
            mtu,
        };
        for name in HostName::ALL {
            session.start_host(name)?;
        }
        Ok(session)
    }

    pub(crate) fn host(&self, name: HostName) -> &Host {
        &self.hosts[name.index()]
    }

    fn start_host(&mut self, name: HostName) -> Result<(), Error> {
        let host = &mut self.hosts[name.index()];
        let first = host.start()?;
        let connected = Device::create(first, name.address(), self.mtu)
            .and_then(|device| self.forwarder.attach(name.index(), Some(device)));
        connected.map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => {
                Error::Unavailable(format!("may not create a network device ({error})"))
            }
            _ => during(format!("connect the host {}", name.as_str()))(error),
        })?;
        host.start_ssh_server()
    }

    fn stop_host(&mut self, name: HostName) {
        // First the device, so that the other host does not receive the end of any connection. An error means that the
        // thread of the link has ended, and closed it.
        let _ = self.forwarder.attach(name.index(), None);
        self.hosts[name.index()].stop();
    }

    /// Handles events until the program has to end. Returns its exit code.
    ///
    /// # Errors
    /// A host does not start again.
    pub(crate) fn run(mut self, events: &Receiver<Event>) -> Result<ExitCode, Error> {
        loop {
            self.start_due_hosts()?;
            let next = self.starts.iter().flatten().min();
            let pause = next.map_or(Duration::MAX, |at| {
                at.saturating_duration_since(Instant::now())
            });
            match events.recv_timeout(pause) {
                Ok(Event::Request(request, reply)) => {
                    let answer = self.answer(request);
                    let failed = |error| json!({ "error": chain(&error).to_string() });
                    let _ = reply.send(answer.unwrap_or_else(failed));
                }
                Ok(Event::Ended(status)) => return Ok(exit_code(status)),
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    return Ok(ExitCode::SUCCESS);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn start_due_hosts(&mut self) -> Result<(), Error> {
        for name in HostName::ALL {
            let start = &mut self.starts[name.index()];
            if start.take_if(|at| *at <= Instant::now()).is_some() {
                self.start_host(name)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Result<Value, Error> {
        match request {
            Request::Set {
                host,
                settings,
                mtu,
            } => {
                self.forwarder
                    .apply(host.map(HostName::index), settings)
                    .map_err(during("change the link"))?;
                if let Some(mtu) = mtu {
                    self.set_mtu(mtu)?;
                }
                Ok(json!({}))
            }
            Request::Show => self.show(),
            Request::Reboot { host, after } => {
                self.stop_host(host);
                self.starts[host.index()] = Some(Instant::now() + after);
                Ok(json!({}))
            }
        }
    }

    fn set_mtu(&mut self, mtu: u32) -> Result<(), Error> {
        for first in self.hosts.iter().filter_map(Host::first_process) {
            Device::set_mtu(first, mtu).map_err(during("change the mtu"))?;
        }
        self.mtu = mtu;
        Ok(())
    }

    fn show(&mut self) -> Result<Value, Error> {
        let reports = self.forwarder.report().map_err(during("ask the link"))?;
        let mut hosts = serde_json::Map::new();
        for (name, report) in HostName::ALL.into_iter().zip(reports) {
            let host = json!({
                "address": name.address(),
                "pid": self.host(name).first_process().map(nix::unistd::Pid::as_raw),
                "sends": report,
            });
            hosts.insert(name.as_str().to_owned(), host);
        }
        Ok(json!({"directory": self.directory, "mtu": self.mtu, "hosts": hosts}))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for name in HostName::ALL {
            self.stop_host(name);
        }
    }
}

/// Exit code of this program for that of its command, as a shell chooses it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Process that removes the private directory when this program has ended, for whatever reason.
#[derive(Debug)]
pub(crate) struct Remover(Child);

impl Remover {
    /// Starts the process.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(directory: &Path) -> Result<Self, Error> {
        std::env::current_exe()
            .and_then(|program| {
                Command::new(program)
                    .arg("remove-directory")
                    .arg(directory)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    // Signals to the group of this program are not for it.
                    .process_group(0)
                    .spawn()
            })
            .map(Self)
            .map_err(during("start a process"))
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
