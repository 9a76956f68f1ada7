//! The thread that carries the packets.

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::Serialize;

use super::device::Device;
use super::direction::{Counters, Direction};
use super::parameters::{Parameters, Setting};

/// Packets that are read from a device before those that have arrived are written.
const BATCH: usize = 64;
/// Size of the largest IP packet.
const LARGEST_PACKET: usize = 65_536;

/// State of one direction.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    parameters: Parameters,
    #[serde(flatten)]
    counters: Counters,
    /// Packets that arrived while the receiving host was off
    lost_by_absence: u64,
}

type Command = Box<dyn FnOnce(&mut Link) + Send>;

/// Handle of the thread. The thread ends with it.
#[derive(Debug)]
pub(crate) struct Forwarder {
    commands: Sender<Command>,
    wake: PipeWriter,
}

impl Forwarder {
    /// Starts the thread, with two directions and no device. `seed` determines the random draws.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(seed: u64) -> io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let (woken, wake) = io::pipe()?;
        let link = Link::new(seed);
        thread::Builder::new()
            .name("link".into())
            .spawn(move || link.run(&received, woken))?;
        Ok(Self { commands, wake })
    }

    /// Gives the device of host `index` (0 or 1) to the thread; none: the host is off. The former device is closed
    /// when this function returns.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn attach(&mut self, index: usize, device: Option<Device>) -> io::Result<()> {
        self.call(move |link| link.devices[index] = device)
    }

    /// Changes properties of one direction, or of both. A direction has the index of its sending host.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn apply(&mut self, index: Option<usize>, settings: Vec<Setting>) -> io::Result<()> {
        self.call(move |link| {
            for (number, direction) in link.directions.iter_mut().enumerate() {
                if index.is_none_or(|index| index == number) {
                    settings.iter().for_each(|setting| direction.apply(setting));
                }
            }
        })
    }

    /// State of both directions.
    ///
    /// # Errors
    /// The thread has ended.
    pub(crate) fn report(&mut self) -> io::Result<[Report; 2]> {
        self.call(|link| [link.report(0), link.report(1)])
    }

    /// Runs a function in the thread, and waits for its result.
    fn call<T: Send + 'static>(
        &mut self,
        function: impl FnOnce(&mut Link) -> T + Send + 'static,
    ) -> io::Result<T> {
        let ended = || io::Error::other("the thread of the link has ended");
        let (answer, answered) = mpsc::channel();
        let command: Command = Box::new(move |link| {
            let _ = answer.send(function(link));
        });
        self.commands.send(command).map_err(|_| ended())?;
        self.wake.write_all(&[0])?;
        answered.recv().map_err(|_| ended())
    }
}

/// State of the thread.
struct Link {
    began: Instant,
    devices: [Option<Device>; 2],
    /// By their sending host
    directions: [Direction; 2],
    lost_by_absence: [u64; 2],
    buffer: Vec<u8>,
}

/// Descriptors that can be read.
struct Ready {
    command: bool,
    devices: [bool; 2],
}

impl Link {
    fn new(seed: u64) -> Self {
        let direction = |seed| Direction::new(Parameters::default(), seed);
        Self {
            began: Instant::now(),
            devices: [None, None],
            directions: [direction(seed), direction(seed.wrapping_add(1))],
            lost_by_absence: [0; 2],
            buffer: vec![0; LARGEST_PACKET],
        }
    }

    fn report(&self, index: usize) -> Report {
        Report {
            parameters: self.directions[index].parameters().clone(),
            counters: self.directions[index].counters(),
            lost_by_absence: self.lost_by_absence[index],
        }
    }

    /// Runs until the handle is gone.
    fn run(mut self, commands: &Receiver<Command>, mut woken: PipeReader) {
        loop {
            let ready = match self.wait(&woken) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            if ready.command {
                // One byte for each command; none when the handle is gone.
                let command = match woken.read(&mut [0]) {
                    Ok(1) => commands.recv(),
                    _ => return,
                };
                if let Ok(command) = command {
                    command(&mut self);
                }
            }
            for index in 0..2 {
                if ready.devices[index] {
                    self.read(index);
                }
                self.write_arrived(index);
            }
        }
    }

    /// Waits for a packet, an arrival, or a command.
    fn wait(&self, woken: &PipeReader) -> Result<Ready, Errno> {
        let next = self.directions.iter().filter_map(Direction::next_arrival);
        let timeout = next.min().map(|at| at.saturating_sub(self.began.elapsed()));
        // For an absent device the first descriptor stands in, without events.
        let watch = |index: usize| match &self.devices[index] {
            Some(device) => PollFd::new(device.as_fd(), PollFlags::POLLIN),
            None => PollFd::new(woken.as_fd(), PollFlags::empty()),
        };
        let command = PollFd::new(woken.as_fd(), PollFlags::POLLIN);
        let mut descriptors = [command, watch(0), watch(1)];
        ppoll(&mut descriptors, timeout.map(TimeSpec::from_duration), None)?;
        // An error of a descriptor is found by reading it.
        let [command, first, second] = descriptors.map(|fd| fd.any() != Some(false));
        Ok(Ready {
            command,
            devices: [first, second],
        })
    }

    /// Reads packets of host `index` and sends them.
    fn read(&mut self, index: usize) {
        for _ in 0..BATCH {
            let Some(device) = &self.devices[index] else {
                return;
            };
            match device.receive(&mut self.buffer) {
                Ok(bytes) => {
                    let now = self.began.elapsed();
                    // A lost packet is counted there.
                    let _ = self.directions[index].send(now, &self.buffer[..bytes]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The namespace of the device is gone.
                Err(_) => self.devices[index] = None,
            }
        }
    }

    /// Writes the packets of host `index` that have arrived at the other host.
    fn write_arrived(&mut self, index: usize) {
        let now = self.began.elapsed();
        let receiver = &self.devices[1 - index];
        let lost = &mut self.lost_by_absence[index];
        self.directions[index].arrive(now, |packet| {
            let is_received = receiver
                .as_ref()
                .is_some_and(|device| device.send(packet).is_ok());
            if !is_received {
                *lost += 1;
            }
        });
    }
}
