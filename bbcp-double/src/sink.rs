//! The child `SNK`: owns the target.
//!
//! It decides about all files first, then requests one after the other from the source (in reverse order, as the
//! original does), writes, checks, and reports to the agent. Most injections take effect here, because they depend on
//! the size of the target.

use crate::console;
use crate::effects::{Effect, Event, Position};
use crate::failure::Failure;
use crate::network;
use crate::progress::{Rates, Reporter, Style, rate};
use crate::spec::LOCAL_HOST;
use crate::target::{self, Decision, Target};
use crate::watch;
use crate::wire::{Frame, FromSink, FromSource, Job, Offer, Peer, Report};
use nix::libc::{SIGKILL, SIGSEGV};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Code of a sink whose source ended without a message.
const SOURCE_IS_GONE: u8 = 128;
/// 256 − EILSEQ
const WRONG_CHECKSUM: u8 = 172;

/// Path of the partial target, for the thread that may have to remove it.
type Partial = Arc<Mutex<Option<PathBuf>>>;

/// Runs the sink. Returns its exit code.
pub(crate) fn run() -> u8 {
    let Ok(mut control) = Peer::on_standard_input() else {
        return SOURCE_IS_GONE;
    };
    let Ok(job) = control.message::<Job>() else {
        return SOURCE_IS_GONE;
    };
    watch::watch_input(&job);
    let orphan = job.effects.iter().find_map(|effect| match effect {
        Effect::Orphan { seconds, unlink } => Some((*seconds, *unlink)),
        _ => None,
    });
    if job.sink_is_remote || orphan.is_some() {
        // Fails only for the leader of a group, which a fresh child is not.
        let _ = nix::unistd::setsid();
    }
    if job.has_effect(&Effect::IgnoreTerm) {
        watch::block_sigterm();
    }
    if job.has_effect(&Effect::CarriageReturn) {
        console::end_lines_with_carriage_return();
    }
    let partial = Partial::default();
    match orphan {
        Some((seconds, unlink)) => outlive_agent(&job, Arc::clone(&partial), seconds, unlink),
        None => {
            let removed = (job.sink_is_remote && !job.options.keeps_failed_target())
                .then(|| Arc::clone(&partial));
            watch::watch_agent(&job, move || {
                if let Some(partial) = removed {
                    remove(&partial);
                }
            });
        }
    }
    let mut peer = match network::meet(&job, control) {
        Ok(peer) => peer,
        Err(failure) => {
            console::failure(&failure);
            return failure.code;
        }
    };
    let outcome = Sink {
        job: &job,
        peer: &mut peer,
        partial,
    }
    .copy_all();
    match outcome {
        Ok(()) => 0,
        Err(failure) => {
            console::failure(&failure);
            failure.code
        }
    }
}

/// Continues after the agent's death, and then removes the file with the target's name.
fn outlive_agent(job: &Job, partial: Partial, seconds: f64, unlink: bool) {
    let agent = job.agent;
    std::thread::spawn(move || {
        while watch::agent_lives(agent) {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_secs_f64(seconds));
        if unlink {
            remove(&partial);
        }
        std::process::exit(i32::from(watch::AGENT_IS_GONE));
    });
}

/// Waits for the thread of [`outlive_agent`] to end this process, if the agent has died or is about to.
fn wait_for_own_end(job: &Job) {
    let deadline = Instant::now() + Duration::from_millis(500);
    while watch::agent_lives(job.agent) {
        if Instant::now() > deadline {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    loop {
        std::thread::park();
    }
}

fn remove(partial: &Partial) {
    if let Some(path) = partial
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_ref()
    {
        let _ = fs::remove_file(path);
    }
}

fn report(report: &Report) {
    if let Ok(line) = serde_json::to_string(report) {
        console::standard_output(&line);
    }
}

struct Sink<'a> {
    job: &'a Job,
    peer: &'a mut Peer,
    partial: Partial,
}

impl Sink<'_> {
    fn copy_all(self) -> Result<(), Failure> {
        let job = self.job;
        target::check_directory(job)?;
        let offers = match self.peer.message::<FromSource>() {
            Ok(FromSource::Offers(offers)) => offers,
            Ok(_) => return Err(Failure::new(2, "Broken pipe writing to stream.")),
            Err(_) => return Err(Failure::silent(SOURCE_IS_GONE)),
        };
        if job.options.very_verbose {
            console::line(&format!(
                "Target {LOCAL_HOST} using initial recv window of 131072"
            ));
        }
        let mut copies = Vec::new();
        for (index, offer) in offers.iter().enumerate() {
            let target = Target::of(job, offer)?;
            if let Decision::Copy(offset) = target.decide(offer)? {
                copies.push((index, offer, target, offset));
            }
        }
        let mut bytes: u64 = copies
            .iter()
            .map(|(_, offer, _, offset)| offer.size - offset)
            .sum();
        let files = copies.len() as u64;
        if files > 0 {
            target::check_is_directory(job)?;
            target::check_space(job, bytes, files)?;
        } else {
            bytes = 0;
        }
        for (index, offer, target, offset) in copies.into_iter().rev() {
            Copy::new(job, offer, &target, offset).run(index, self.peer, &self.partial)?;
        }
        if job.options.very_verbose && files > 0 {
            console::line(&format!(
                "Target {LOCAL_HOST} using a final recv window of 5622937"
            ));
        }
        report(&Report::End(files, bytes));
        let _ = self.peer.send(&FromSink::Done);
        Ok(())
    }
}

/// Copy of one file.
struct Copy<'a> {
    job: &'a Job,
    offer: &'a Offer,
    target: &'a Target<'a>,
    /// Offset at which this session began
    start: u64,
    /// Current size of the target
    grown: u64,
    /// Bytes of this session, for the progress thread
    done: Arc<AtomicU64>,
    /// Events by size, in order
    events: Vec<(u64, Event)>,
    /// The byte to flip
    corrupt: Option<u64>,
}

impl<'a> Copy<'a> {
    fn new(job: &'a Job, offer: &'a Offer, target: &'a Target<'a>, start: u64) -> Self {
        let mut events: Vec<(u64, Event)> = job
            .effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::At(at, event) => Some((at.within(offer.size).max(start), *event)),
                _ => None,
            })
            .collect();
        events.sort_by_key(|(at, _)| *at);
        let corrupt = job.effects.iter().find_map(|effect| match effect {
            Effect::Corrupt(at) => Some(at.within(offer.size.saturating_sub(1))),
            _ => None,
        });
        Self {
            job,
            offer,
            target,
            start,
            grown: start,
            done: Arc::default(),
            events,
            corrupt,
        }
    }

    /// Returns true if the agent is gone and the source detected it first. A local orphan keeps its partial file; the
    /// order in which the two children detect it makes no difference.
    fn is_orphaned(&self, failure: &Failure) -> bool {
        failure.code == SOURCE_IS_GONE
            && !self.job.sink_is_remote
            && !watch::agent_lives(self.job.agent)
    }

    fn run(mut self, index: usize, peer: &mut Peer, partial: &Partial) -> Result<(), Failure> {
        let options = &self.job.options;
        let shown = &self.target.shown;
        if options.announces_start() {
            console::message(&match &options.append {
                Some(_) => format!("Appending to {shown} at offset {}", self.start),
                None => format!("Creating {shown}"),
            });
        }
        let started = Instant::now();
        let file = self.target.open(self.offer, self.start)?;
        *partial.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.target.place.clone());
        let written = peer
            .send(&FromSink::Get(index, self.start))
            .map_err(|_| Failure::silent(SOURCE_IS_GONE))
            .and_then(|()| self.write(file, peer));
        if let Err(failure) = written {
            if self
                .job
                .effects
                .iter()
                .any(|effect| matches!(effect, Effect::Orphan { .. }))
            {
                wait_for_own_end(self.job);
            }
            if !self.is_orphaned(&failure) {
                self.target.fail();
            }
            return Err(failure);
        }
        *partial.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.damage_target();
        if options.verbose {
            let bytes = (self.grown - self.start) * self.job.fake_size;
            let speed = if bytes == 0 {
                0.0
            } else {
                bytes as f64 / started.elapsed().as_secs_f64()
            };
            console::line(&format!(
                "File {shown} created; {bytes} bytes at {}",
                rate(speed)
            ));
        }
        if options.very_verbose {
            let buffers = options.streams * 3;
            console::line(&format!(
                "{buffers} buffers used with 0 reorders; peaking at 0."
            ));
            console::line(&watch::cpu_line("Target"));
        }
        self.target.succeed(self.offer);
        Ok(())
    }

    /// Writes the received data until the source reports the end, and checks the file.
    fn write(&mut self, mut file: File, peer: &mut Peer) -> Result<(), Failure> {
        let checksum = &self.job.options.checksum;
        let mut running = checksum
            .computed_at_sink(self.job.options.ordered)
            .then(|| checksum.algorithm().start());
        let reporter = self.progress();
        let mut buffer = Vec::new();
        let sum_of_source = loop {
            self.trigger_due_events()?;
            match peer.receive(&mut buffer) {
                Ok(Frame::Data) => {
                    if let Some(running) = &mut running {
                        running.update(&buffer);
                    }
                    self.put(&mut file, &buffer)?;
                }
                Ok(Frame::Message(FromSource::Alive)) => {}
                Ok(Frame::Message(FromSource::Sent(sum))) => break sum,
                Ok(Frame::Message(FromSource::Failed(code))) => return Err(Failure::silent(code)),
                Ok(Frame::Message(_)) | Err(_) => return Err(Failure::silent(SOURCE_IS_GONE)),
            }
        };
        drop(reporter);
        self.target.close(file, self.offer)?;
        self.check(running.map(crate::checksum::Running::finish), sum_of_source)
    }

    /// Writes a piece of data, split at each size at which an event happens.
    fn put(&mut self, file: &mut File, piece: &[u8]) -> Result<(), Failure> {
        let mut rest = piece;
        while !rest.is_empty() {
            let until_event = self
                .events
                .first()
                .and_then(|(at, _)| usize::try_from(at - self.grown).ok())
                .filter(|distance| *distance > 0);
            let (part, later) = rest.split_at(until_event.unwrap_or(rest.len()).min(rest.len()));
            let end = self.grown + part.len() as u64;
            let result = match self.corrupt {
                Some(at) if (self.grown..end).contains(&at) => {
                    let mut damaged = part.to_vec();
                    if let Some(byte) = usize::try_from(at - self.grown)
                        .ok()
                        .and_then(|index| damaged.get_mut(index))
                    {
                        *byte ^= 0xff;
                    }
                    file.write_all(&damaged)
                }
                _ => file.write_all(part),
            };
            result.map_err(|error| self.cannot_write(&error).negative())?;
            self.grown = end;
            self.done.store(end - self.start, Ordering::Relaxed);
            self.trigger_due_events()?;
            rest = later;
        }
        Ok(())
    }

    fn cannot_write(&self, error: &io::Error) -> Failure {
        Failure::system(error, "writing", &self.target.shown)
    }

    /// Triggers all events that are due at the current size.
    fn trigger_due_events(&mut self) -> Result<(), Failure> {
        while let Some((at, event)) = self.events.first().copied()
            && at <= self.grown
        {
            self.events.remove(0);
            self.trigger(event)?;
        }
        Ok(())
    }

    fn trigger(&self, event: Event) -> Result<(), Failure> {
        let source = self.job.sources.first();
        let from = source.map_or(LOCAL_HOST, |source| source.host_name());
        match event {
            Event::DiskFull => {
                let full = self.cannot_write(&io::Error::from_raw_os_error(nix::libc::ENOSPC));
                // The original's code depends on which side ends first.
                Err(if self.job.number.is_multiple_of(2) {
                    full.negative()
                } else {
                    full.with_code(128)
                })
            }
            Event::Reset => Err(Failure {
                code: 128,
                lines: (0..self.job.options.streams)
                    .map(|_| format!("Connection reset by peer reading data from {from}"))
                    .collect(),
            }),
            Event::SinkSegv => watch::end_by_signal(SIGSEGV),
            Event::RemoteDeath(code) => {
                if code != 255 {
                    console::message(&format!(
                        "Unexpected end of control stream from {}",
                        self.job.target.host_name()
                    ));
                }
                std::process::exit(i32::from(code))
            }
            Event::AgentSegv => self.end_agent(SIGSEGV),
            Event::AgentKill => self.end_agent(SIGKILL),
            Event::TimeLimit => Err(Failure::new(128, "Time limit exceeded")),
            Event::SourceChanged => Err(Failure::new(
                128,
                format!("Error -143808 writing {}", self.offer.path),
            )),
        }
    }

    /// Asks the agent to die, and continues, as the orphans of the original do.
    fn end_agent(&self, signal: i32) -> Result<(), Failure> {
        report(&Report::Die(signal));
        Ok(())
    }

    fn progress(&self) -> Option<Reporter> {
        let suffers = |effect| self.job.has_effect(effect);
        let rates = if suffers(&Effect::NotANumber) {
            Rates::NotANumber
        } else if suffers(&Effect::Infinite) {
            Rates::Infinite
        } else {
            Rates::Measured
        };
        let stall = self.job.effects.iter().find_map(|effect| match effect {
            Effect::Stall(at, _) => Some(*at),
            _ => None,
        });
        let style = Style {
            interval: Duration::from_secs_f64(self.job.progress.unwrap_or(1.0)),
            verbose: self.job.options.verbose,
            total: self.offer.size - self.start,
            factor: self.job.fake_size,
            rates,
            silent_at: stall
                .map(|at: Position| at.within(self.offer.size).max(self.start) - self.start),
            pretended: suffers(&Effect::ProgressOnly),
        };
        let at_once = self.job.effects.iter().find_map(|effect| match effect {
            Effect::Flood(lines) => Some(*lines),
            Effect::NotANumber | Effect::Infinite => Some(1),
            _ => None,
        });
        for _ in 0..at_once.unwrap_or(0) {
            console::line(&style.line(0, 0.0, 0.0));
        }
        self.job
            .progress
            .map(|_| Reporter::start(style, Arc::clone(&self.done)))
    }

    /// Compares and reports sums.
    fn check(&self, own: Option<String>, sum_of_source: Option<String>) -> Result<(), Failure> {
        let checksum = &self.job.options.checksum;
        let bad = self.job.has_effect(&Effect::BadSum);
        let shown = &self.target.shown;
        if let Some(expected) = checksum.expected() {
            return match own.map(|own| differing(own, expected, bad)) {
                Some(own) if own != expected => Err(Failure::new(
                    WRONG_CHECKSUM,
                    format!("{shown} target checksum {expected} does not match {own}"),
                )),
                _ => Ok(()),
            };
        }
        if checksum.on_link
            && let (Some(own), Some(theirs)) = (&own, &sum_of_source)
            && (own != theirs || bad)
        {
            return Err(Failure::new(
                WRONG_CHECKSUM,
                format!("{shown} xfr checksum error at offset 0"),
            ));
        }
        if checksum.output().is_some()
            && let Some(sum) = own.or(sum_of_source)
        {
            let sum = if bad {
                differing(sum.clone(), &sum, true)
            } else {
                sum
            };
            report(&Report::Checksum(sum, shown.clone()));
        }
        Ok(())
    }

    /// Damages the target without a message, after all checks.
    fn damage_target(&self) {
        let size = self.offer.size;
        let mangled = self.job.effects.iter().find_map(|effect| match effect {
            Effect::Short(bytes) => Some(size.saturating_sub(*bytes)),
            Effect::Long(bytes) => Some(size + bytes),
            _ => None,
        });
        if let Some(size) = mangled {
            let resized = File::options()
                .write(true)
                .open(&self.target.place)
                .and_then(|file| file.set_len(size));
            if let Err(error) = resized {
                console::failure(&self.cannot_write(&error));
            }
        }
    }
}

/// Changes a sum that an injection requires to be wrong.
pub(crate) fn differing(sum: String, expected: &str, wrong: bool) -> String {
    if !wrong || sum != expected {
        return sum;
    }
    let first = if sum.starts_with('0') { "1" } else { "0" };
    first.to_owned() + &sum[1..]
}
