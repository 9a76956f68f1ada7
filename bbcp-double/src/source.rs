//! The child `SRC`: reads the source at the configured rate and sends it to the sink.
//!
//! While it waits it sends a sign of life every few hundredths of a second. By an error of this it detects that the
//! sink is gone, wherever the sink runs.

use crate::console;
use crate::effects::Effect;
use crate::failure::Failure;
use crate::network;
use crate::pace::{Pace, SLICE};
use crate::sink::differing;
use crate::spec::{LOCAL_HOST, Spec};
use crate::target::identity_of;
use crate::watch;
use crate::wire::{FromSink, FromSource, Job, MAX_PIECE_BYTES, Offer, Peer};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Code of a source whose sink is gone.
const SINK_IS_GONE: u8 = 128;
/// EILSEQ
const WRONG_CHECKSUM: u8 = 84;

/// Runs the source. Returns its exit code.
pub(crate) fn run() -> u8 {
    let Ok(mut control) = Peer::on_standard_input() else {
        return SINK_IS_GONE;
    };
    let Ok(job) = control.message::<Job>() else {
        return SINK_IS_GONE;
    };
    watch::watch_input(&job);
    if job.source_is_remote {
        // Fails only for the leader of a group, which a fresh child is not.
        let _ = nix::unistd::setsid();
    }
    if job.has_effect(&Effect::IgnoreTerm) {
        watch::block_sigterm();
    }
    if job.has_effect(&Effect::CarriageReturn) {
        console::end_lines_with_carriage_return();
    }
    watch::watch_agent(&job, || {});
    match network::meet(&job, control) {
        Ok(mut peer) => serve(&job, &mut peer).unwrap_or(SINK_IS_GONE),
        Err(failure) => {
            console::failure(&failure);
            failure.code
        }
    }
}

/// Answers the sink until it needs nothing more.
///
/// # Errors
/// The sink is gone.
fn serve(job: &Job, peer: &mut Peer) -> io::Result<u8> {
    let Some(offers) = inspect_sources(job) else {
        peer.send(&FromSource::Nothing)?;
        return Ok(2);
    };
    if job.options.very_verbose {
        console::line(&format!(
            "Source {LOCAL_HOST} using initial send window of 3939840"
        ));
    }
    peer.send(&FromSource::Offers(offers.clone()))?;
    let mut code = 0;
    while let FromSink::Get(index, offset) = peer.message()? {
        let (Some(offer), Some(source)) = (offers.get(index), job.sources.get(index)) else {
            return Ok(2);
        };
        let sending = Sending {
            job,
            peer,
            offer,
            source,
            deadline: job
                .options
                .time_limit
                .map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        };
        match sending.run(offset) {
            Ok(checked) => code = code.max(checked),
            Err(Stopped::PeerGone(error)) => return Err(error),
            Err(Stopped::Failed(failure)) => {
                console::failure(&failure);
                peer.send(&FromSource::Failed(failure.code))?;
                return Ok(failure.code);
            }
        }
        if job.options.very_verbose {
            console::line(&watch::cpu_line("Source"));
        }
    }
    if job.options.very_verbose {
        console::line(&format!(
            "Source {LOCAL_HOST} using a final send window of 3939840"
        ));
    }
    Ok(code)
}

/// Inspects all sources; returns `None` after the reasons have been printed.
fn inspect_sources(job: &Job) -> Option<Vec<Offer>> {
    let mut offers = Vec::new();
    for source in &job.sources {
        match fs::metadata(&source.place) {
            Ok(metadata) if metadata.is_dir() => {
                console::message(&format!("{} is a directory.", source.path));
                return None;
            }
            Ok(metadata) => offers.push(Offer {
                name: source.file_name().to_owned(),
                path: source.path.clone(),
                identity: identity_of(&metadata),
                mode: metadata.mode() & 0o7777,
                size: metadata.len(),
                accessed: metadata.atime(),
                modified: metadata.mtime(),
                group: metadata.gid(),
            }),
            Err(error) => {
                console::failure(&Failure::system(&error, "processing", &source.path));
            }
        }
    }
    (offers.len() == job.sources.len()).then_some(offers)
}

/// Reason for not sending the whole file.
enum Stopped {
    Failed(Failure),
    PeerGone(io::Error),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// A file that is being sent.
struct Sending<'a> {
    job: &'a Job,
    peer: &'a mut Peer,
    offer: &'a Offer,
    source: &'a Spec,
    /// `-t`
    deadline: Option<Instant>,
}

impl Sending<'_> {
    /// Returns the code for a source that was sent, but whose checksum may be wrong: the sink keeps it.
    fn run(mut self, offset: u64) -> Result<u8, Stopped> {
        let opening =
            |error: io::Error| Failure::system(&error, "opening", &self.source.path).with_code(2);
        let mut file = File::open(&self.source.place).map_err(opening)?;
        file.seek(SeekFrom::Start(offset)).map_err(opening)?;

        let checksum = &self.job.options.checksum;
        let mut running = checksum
            .computed_at_source()
            .then(|| checksum.algorithm().start());
        let mut stall = self.stall(offset);
        let mut pace = Pace::new(self.job.rate);
        let mut buffer = vec![0; pace.read_size(MAX_PIECE_BYTES)];
        let mut sent = offset;
        loop {
            if let Some((at, seconds)) = stall
                && at <= sent
            {
                self.wait(seconds)?;
                stall = None;
            }
            let until_stall = stall
                .and_then(|(at, _)| usize::try_from(at - sent).ok())
                .unwrap_or(usize::MAX);
            let portion = buffer.len().min(until_stall);
            let read = match file.read(&mut buffer[..portion]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Failure::system(&error, "reading", &self.source.path).into());
                }
            };
            if let Some(running) = &mut running {
                running.update(&buffer[..read]);
            }
            self.peer
                .send_data(&buffer[..read])
                .map_err(Stopped::PeerGone)?;
            sent += read as u64;
            if sent > self.offer.size {
                break;
            }
            let pause = pace.pause_after(read);
            self.wait(Some(pause))?;
        }
        if sent != self.offer.size {
            return Err(
                Failure::new(128, format!("Error -143808 writing {}", self.source.path)).into(),
            );
        }
        let sum = running.map(crate::checksum::Running::finish);
        let code = self.check(sum.as_deref());
        self.peer
            .send(&FromSource::Sent(sum))
            .map_err(Stopped::PeerGone)?;
        Ok(code)
    }

    /// Offset at which the data stop, and the duration of the stop.
    fn stall(&self, offset: u64) -> Option<(u64, Option<Duration>)> {
        self.job.effects.iter().find_map(|effect| match effect {
            Effect::Stall(at, seconds) => Some((
                at.within(self.offer.size).max(offset),
                seconds.map(Duration::from_secs_f64),
            )),
            Effect::ProgressOnly => Some((offset, None)),
            _ => None,
        })
    }

    /// Waits for the duration, or forever; stops at the time limit or when the sink is gone.
    fn wait(&mut self, duration: Option<Duration>) -> Result<(), Stopped> {
        let end = duration.map(|duration| Instant::now() + duration);
        loop {
            let now = Instant::now();
            if self.deadline.is_some_and(|deadline| deadline <= now) {
                return Err(Failure::new(128, "Time limit exceeded").into());
            }
            let left = end.map_or(SLICE, |end| end.saturating_duration_since(now));
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(SLICE));
            if left >= SLICE {
                self.peer
                    .send(&FromSource::Alive)
                    .map_err(Stopped::PeerGone)?;
            }
        }
    }

    /// Compares the sum with the given value.
    fn check(&self, sum: Option<&str>) -> u8 {
        let (Some(sum), Some(expected)) = (sum, self.job.options.checksum.expected()) else {
            return 0;
        };
        let sum = differing(
            sum.to_owned(),
            expected,
            self.job.has_effect(&Effect::BadSum),
        );
        if sum == expected {
            return 0;
        }
        console::message(&format!(
            "{} source checksum {expected} does not match {sum}",
            self.source.path
        ));
        WRONG_CHECKSUM
    }
}
