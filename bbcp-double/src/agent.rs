//! The process that the user started: parses the command line, starts sink and source, prints the total and chooses the
//! exit code. It never reads standard input and does not handle signals.

use crate::checksum::Output;
use crate::early::{EarlyContext, Ending, has_started};
use crate::effects::{EarlyEnd, Effect};
use crate::failure::{Failure, MISUSE, errno_text};
use crate::knobs::{self, Knobs};
use crate::network::{self, Children, Side};
use crate::options::{self, Options, Refusal, Request};
use crate::plan::{self, Injections};
use crate::progress::rate;
use crate::record::Record;
use crate::spec::Spec;
use crate::wire;
use crate::wire::{Job, Peer, Report};
use crate::{HOLDER, console, watch};
use nix::libc::SIGKILL;
use nix::sys::stat::{Mode, umask};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// Code for several failures that the original does not distinguish.
const BROKEN: u8 = 255;
/// Code if a reader died, not a writer.
const READER_DIED: u8 = 128;

/// Runs the agent. Returns its exit code.
pub(crate) fn run(arguments: &[String]) -> u8 {
    let called = arguments.first().map_or("bbcp", String::as_str);
    let program = knobs::program_as_called(called).unwrap_or_else(|| PathBuf::from(called));
    let knobs = match Knobs::read(&program) {
        Ok(knobs) => knobs,
        Err(problem) => return misuse(&problem),
    };
    let order = options::parse(arguments.get(1..).unwrap_or_default()).and_then(|request| {
        Ok(match request {
            Request::Help => Order::Say(options::usage()),
            Request::Version => Order::Say(knobs.version.clone()),
            Request::Copy(options, operands) => {
                Order::Copy(Box::new(Operation::plan(*options, &operands)?))
            }
        })
    });
    let injections = match &order {
        Ok(Order::Copy(_)) => match plan::draw(&knobs) {
            Ok(injections) => Some(injections),
            Err(problem) => return misuse(&problem),
        },
        _ => None,
    };
    let entry = injections
        .as_ref()
        .and_then(|injections| injections.entry.as_deref());
    let record = match &knobs.log {
        Some(log) => match Record::begin(log.clone(), arguments, entry) {
            Ok(record) => Some(record),
            Err(error) => return misuse(&format!("cannot write {}: {error}", log.display())),
        },
        None => None,
    };
    let code = match (order, injections) {
        (Ok(Order::Copy(operation)), Some(injections)) => Agent {
            knobs,
            program,
            operation: *operation,
            injections,
        }
        .copy(),
        (Ok(Order::Say(text)), _) => {
            console::standard_output(&text);
            0
        }
        (Ok(Order::Copy(_)), None) => misuse("no injections were drawn"),
        (Err(refusal), _) => refuse(&refusal),
    };
    match record.map(|record| record.end(code)) {
        Some(Err(error)) => misuse(&format!("cannot complete the record: {error}")),
        _ => code,
    }
}

fn misuse(problem: &str) -> u8 {
    console::line(&format!("DOUBLE: {problem}"));
    MISUSE
}

fn refuse(refusal: &Refusal) -> u8 {
    if refusal.failure.code == MISUSE {
        refusal
            .failure
            .lines
            .iter()
            .for_each(|line| console::line(line));
    } else {
        console::failure(&refusal.failure);
    }
    if refusal.usage {
        console::standard_output(&options::usage());
    }
    refusal.failure.code
}

/// Action requested by a command line.
enum Order {
    Say(String),
    Copy(Box<Operation>),
}

/// A copy with its parsed command line.
struct Operation {
    options: Options,
    sources: Vec<Spec>,
    target: Spec,
    /// More than one source
    into_directory: bool,
    /// Opened before anything starts, as in the original
    checksum_file: Option<File>,
}

impl Operation {
    fn plan(options: Options, operands: &[String]) -> Result<Self, Refusal> {
        let mut names = Vec::new();
        if let Some(list) = &options.list {
            let text = std::fs::read_to_string(list)
                .map_err(|error| Failure::system(&error, "opening", list).with_code(2))?;
            names.extend(
                text.lines()
                    .take_while(|line| !line.is_empty())
                    .map(str::to_owned),
            );
        }
        names.extend(operands.iter().cloned());
        let mut specs = Vec::new();
        for name in &names {
            specs.push(Spec::parse(name).map_err(|failure| Refusal {
                usage: failure.code == 1,
                failure,
            })?);
        }
        let target = specs.pop();
        let missing = |what: &str| Refusal {
            failure: Failure::new(1, format!("Copy {what} not specified.")),
            usage: true,
        };
        let target = target.ok_or_else(|| missing("source"))?;
        let first = specs.first().ok_or_else(|| missing("target"))?;
        if specs.iter().any(|source| source.host != first.host) {
            return Err(Failure {
                code: MISUSE,
                lines: vec!["DOUBLE: sources on several hosts are not supported".into()],
            }
            .into());
        }
        let checksum_file = match options.checksum.output() {
            Some(Output::File(path)) => Some(
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(path)
                    .map_err(|error| {
                        Failure::system(&error, "opening checksum file", path).with_code(2)
                    })?,
            ),
            _ => None,
        };
        Ok(Self {
            into_directory: specs.len() > 1,
            options,
            sources: specs,
            target,
            checksum_file,
        })
    }

    /// Target file as shown in messages.
    fn target_file(&self) -> String {
        let shown = &self.target.path;
        match self.sources.first() {
            Some(source) if Path::new(&self.target.place).is_dir() => {
                format!("{}/{}", shown.trim_end_matches('/'), source.file_name())
            }
            _ => shown.clone(),
        }
    }
}

/// Result of a sink.
#[derive(Default)]
struct Copied {
    files: u64,
    bytes: u64,
}

struct Agent {
    knobs: Knobs,
    program: PathBuf,
    operation: Operation,
    injections: Injections,
}

impl Agent {
    fn copy(mut self) -> u8 {
        let started = Instant::now();
        self.prepare_injections();
        let knobs = &self.knobs;
        let mut all_known = self.operation.target.locate(knobs);
        for source in &mut self.operation.sources {
            all_known &= source.locate(knobs);
        }
        let code = match self.early_end(all_known) {
            Some(code) => code,
            None => self.transfer(started).unwrap_or_else(|error| {
                console::message(&format!(
                    "{} executing {}",
                    errno_text(&error),
                    self.program.display()
                ));
                console::message(&terminated(&self.operation.target));
                BROKEN
            }),
        };
        self.finish_injections();
        code
    }

    fn has_effect(&self, effect: &Effect) -> bool {
        self.injections.effects.contains(effect)
    }

    /// Applies the injections that act before the copy.
    fn prepare_injections(&self) {
        for effect in &self.injections.effects {
            match effect {
                Effect::IgnoreTerm => watch::block_sigterm(),
                Effect::CarriageReturn => console::end_lines_with_carriage_return(),
                Effect::Noise(lines) => {
                    for number in 0..*lines {
                        console::line(&format!("noise {number}: not a line of bbcp's"));
                    }
                }
                Effect::LongLine(bytes) => console::raw(&vec![b'x'; *bytes]),
                Effect::Binary => {
                    console::raw(b"\xff\xfe\x00binary\x80 \xc3\x28 bbcp: \xf0\x9f");
                    console::raw(b"bbcp: Creating /d/\xe9t\xe9");
                }
                Effect::StandardOutputJunk => console::standard_output("junk on standard output"),
                _ => {}
            }
        }
        if self.has_effect(&Effect::HangAtStart) {
            hang();
        }
    }

    /// Exit code of copies that end without children.
    fn early_end(&self, all_hosts_known: bool) -> Option<u8> {
        let target_file = self.operation.target_file();
        let options = &self.operation.options;
        let context = EarlyContext {
            options,
            source: self.operation.sources.first()?,
            target: &self.operation.target,
            target_file: &target_file,
            accept: self.knobs.accept,
        };
        let injected = self
            .injections
            .effects
            .iter()
            .find_map(|effect| match effect {
                Effect::Early(early) => Some(early),
                _ => None,
            });
        let ending = if let Some(early) = injected {
            if has_started(early) {
                self.print_redirect();
            }
            context.ending(early)
        } else if !all_hosts_known {
            context.ending(&EarlyEnd::Unresolved)
        } else if options.make_directory
            && options
                .append
                .as_ref()
                .is_some_and(|append| append.directory.is_some())
        {
            // The original puts the checkpoint directory after -A, where it is ignored.
            // Its source side then has no port to connect to.
            console::message("Connection refused unable to connect to port [::]:0");
            context.connection_timeout()
        } else {
            return None;
        };
        Some(end(&ending))
    }

    /// With `-v` and without `-n`, the original always reports that the host has another name.
    fn print_redirect(&self) {
        if self.operation.options.verbose && !self.operation.options.no_dns {
            let host = self.operation.target.host_name();
            let address = match self.operation.target.host {
                Some(_) => "[::ffff:127.0.0.1]",
                None => "127.0.0.1",
            };
            console::message(&format!(
                "Host {address} redirect connection to {host} 127.0.0.1"
            ));
        }
    }

    fn warn_of_version(&self) {
        let own = &self.knobs.version;
        let age = match &self.knobs.peer_version {
            Some(peer) if peer > own => "a newer",
            Some(peer) if peer < own => "an older",
            _ if self.has_effect(&Effect::VersionWarning) => "a newer",
            _ => return,
        };
        let host = match self.operation.sources.first() {
            Some(source) if source.host.is_some() => source.host_name(),
            _ => self.operation.target.host_name(),
        };
        console::message(&format!("Warning: {host} is running {age} version of bbcp"));
    }

    fn job(&self) -> Job {
        let Operation {
            options,
            sources,
            target,
            into_directory,
            ..
        } = &self.operation;
        let slow = self
            .injections
            .effects
            .iter()
            .find_map(|effect| match effect {
                Effect::Slow(rate) => Some(*rate),
                _ => None,
            });
        let source_is_remote = sources.iter().any(|source| source.host.is_some());
        Job {
            options: options.clone(),
            sources: sources.clone(),
            target: target.clone(),
            into_directory: *into_directory,
            sink_is_remote: target.host.is_some() || (self.knobs.remote && !source_is_remote),
            source_is_remote,
            mode: options.mode.unwrap_or_else(|| 0o644 & !current_umask()),
            agent: wire::Agent::Parent(nix::unistd::getpid().as_raw()),
            meeting: None,
            accept: self.knobs.accept.as_secs_f64(),
            poll: self.knobs.poll.as_secs_f64(),
            progress: options.progress.map(|seconds| {
                self.knobs
                    .tick
                    .map_or((seconds - 1) as f64, |tick| tick.as_secs_f64())
            }),
            rate: slow.or(options.rate).or(self.knobs.rate),
            fake_size: self.knobs.fake_size,
            number: self.injections.number,
            effects: self.injections.effects.clone(),
        }
    }

    /// Starts both children and waits for their end.
    ///
    /// # Errors
    /// They cannot be started.
    fn transfer(&mut self, started: Instant) -> io::Result<u8> {
        let job = self.job();
        let (code, copied) = if self.knobs.network && (job.sink_is_remote || job.source_is_remote) {
            self.transfer_between_hosts(&job)?
        } else {
            self.transfer_here(&job)?
        };
        let Copied { files, bytes } = copied;
        if code == 0 && self.operation.options.verbose && files > 0 && bytes > 0 {
            let shown = (bytes * self.knobs.fake_size) as f64;
            let plural = if files == 1 { "" } else { "s" };
            console::line(&format!(
                "{files} file{plural} copied at effectively {}",
                rate(shown / started.elapsed().as_secs_f64())
            ));
        }
        Ok(code)
    }

    fn transfer_here(&mut self, job: &Job) -> io::Result<(u8, Copied)> {
        let (sink_end, source_end) = UnixStream::pair()?;
        let mut to_sink = Peer::new(source_end.try_clone()?.into());
        let mut to_source = Peer::new(sink_end.try_clone()?.into());
        let mut sink = self.child("SNK", sink_end, Stdio::piped())?;
        let mut source = self.child("SRC", source_end, Stdio::null())?;
        self.warn_of_version();
        self.print_redirect();
        // The wait for the children also detects a child that is already dead.
        let _ = to_sink.send(job);
        let _ = to_source.send(job);
        drop((to_sink, to_source));

        let copied = match sink.stdout.take() {
            Some(reports) => self.follow(BufReader::new(reports)),
            None => Copied::default(),
        };
        let ended = sink.wait()?;
        let of_sink = code_of(&sink, ended, job.sink_is_remote, BROKEN);
        let ended = source.wait()?;
        let of_source = code_of(&source, ended, job.source_is_remote, READER_DIED);
        Ok((if of_sink == 0 { of_source } else { of_sink }, copied))
    }

    /// The same with a child on another host.
    fn transfer_between_hosts(&mut self, job: &Job) -> io::Result<(u8, Copied)> {
        let Children {
            mut listener,
            connector,
            reports,
            inputs,
        } = network::start(&self.program, job)?;
        let Some(mut connector) = connector else {
            network::end(&mut listener);
            let ended = listener.wait()?;
            let spec = Side::listener(&job.options).spec(job);
            if let Some(remote) = spec.filter(|spec| spec.host.is_some()) {
                console::message(&terminated(remote));
            }
            return Ok((code_of(&listener, ended, false, BROKEN), Copied::default()));
        };
        self.warn_of_version();
        self.print_redirect();
        let (sink, source, copied) = if job.options.reverse {
            let copied = match connector.stdout.take() {
                Some(output) => self.follow(BufReader::new(output)),
                None => Copied::default(),
            };
            (&mut connector, &mut listener, copied)
        } else {
            (&mut listener, &mut connector, self.follow(reports))
        };
        // A local child is a process of this host, and so is the ssh of a remote one.
        let ended = sink.wait()?;
        let of_sink = code_of(sink, ended, false, BROKEN);
        if of_sink != 0 {
            network::end(source);
            source.wait()?;
            return Ok((of_sink, copied));
        }
        let ended = source.wait()?;
        drop(inputs);
        Ok((code_of(source, ended, false, READER_DIED), copied))
    }

    /// Handles the sink's reports until it ends.
    fn follow(&mut self, reports: impl BufRead) -> Copied {
        let mut copied = Copied::default();
        for line in reports.lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(Report::Checksum(sum, path)) => self.print_checksum(&sum, &path),
                Ok(Report::End(files, bytes)) => copied = Copied { files, bytes },
                Ok(Report::Die(signal)) => watch::end_by_signal(signal),
                Ok(Report::Listening(..)) | Err(_) => {}
            }
        }
        copied
    }

    fn child(&self, role: &str, end: UnixStream, output: Stdio) -> io::Result<Child> {
        Command::new(&self.program)
            .arg(role)
            .stdin(OwnedFd::from(end))
            .stdout(output)
            .spawn()
    }

    fn print_checksum(&mut self, sum: &str, path: &str) {
        // The original cuts the path at its first blank.
        let cut = path.split(' ').next().unwrap_or(path);
        let line = format!(
            "Checksum: {} {sum} {}:{cut}",
            self.operation.options.checksum.algorithm().name(),
            self.operation.target.host_name()
        );
        match &mut self.operation.checksum_file {
            Some(file) => {
                let _ = writeln!(file, "{line}");
            }
            None => console::line(&line),
        }
    }

    /// Applies the injections that act after the copy.
    fn finish_injections(&self) {
        for effect in &self.injections.effects {
            match effect {
                Effect::HeldStandardError(seconds) => {
                    let holder = Command::new(&self.program)
                        .args([HOLDER, &seconds.to_string()])
                        .stdin(Stdio::null())
                        .stdout(Stdio::null())
                        .spawn();
                    if let Err(error) = holder {
                        misuse(&format!("cannot start the holder: {error}"));
                    }
                }
                Effect::HangAtEnd => hang(),
                _ => {}
            }
        }
        std::thread::sleep(self.knobs.end_sleep);
    }
}

/// Message about a remote side that has ended by itself.
fn terminated(side: &Spec) -> String {
    format!("bbcp unexpectedly terminated on {}", side.host_name())
}

fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// Prints an ending with its delays.
fn end(ending: &Ending) -> u8 {
    std::thread::sleep(ending.before);
    ending.foreign.iter().for_each(|line| console::line(line));
    std::thread::sleep(ending.after);
    ending.lines.iter().for_each(|line| console::raw(line));
    ending.code
}

/// Exit code of a child. A child ended by a signal is named, unless its host has no process left to report it.
fn code_of(child: &Child, status: ExitStatus, remote: bool, when_killed: u8) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(BROKEN),
        (None, Some(signal)) => {
            if !(remote && signal == SIGKILL) {
                console::message(&format!(
                    "Copy process {} was killed via signal {signal}",
                    child.id()
                ));
            }
            when_killed
        }
        (None, None) => BROKEN,
    }
}

/// The file mode mask. It can only be read by setting it; no other thread runs yet.
fn current_umask() -> u32 {
    let mask = umask(Mode::from_bits_truncate(0o022));
    umask(mask);
    mask.bits()
}
