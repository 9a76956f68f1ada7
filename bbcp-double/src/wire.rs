//! Messages between the three processes.
//!
//! Sink and source share a socket pair, which is the standard input of both; the agent writes the [`Job`] into it as
//! the first message and then closes its ends. So each side detects the end of the other at once. The sink's standard
//! output is a pipe to the agent, for [`Report`]s, one JSON object a line. [`crate::network`] describes the same between
//! two hosts.

use crate::effects::Effect;
use crate::options::Options;
use crate::spec::Spec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

/// Largest piece of data in one frame.
pub(crate) const MAX_PIECE_BYTES: usize = 1 << 20;

const DATA: u8 = b'D';
const MESSAGE: u8 = b'M';

/// Data for sink and source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The command line
    pub(crate) options: Options,
    /// All sources, on one host
    pub(crate) sources: Vec<Spec>,
    /// The target
    pub(crate) target: Spec,
    /// The target must be a directory
    pub(crate) into_directory: bool,
    /// The sink is on another host
    pub(crate) sink_is_remote: bool,
    /// The source is on another host
    pub(crate) source_is_remote: bool,
    /// Mode of a finished target
    pub(crate) mode: u32,
    /// The agent
    pub(crate) agent: Agent,
    /// Way to the other side, if one of them is on a real host
    pub(crate) meeting: Option<Meeting>,
    /// Seconds until `Accept timed out`
    pub(crate) accept: f64,
    /// Seconds between two checks of the agent
    pub(crate) poll: f64,
    /// Seconds between progress lines, if requested
    pub(crate) progress: Option<f64>,
    /// Rate limit in bytes per second
    pub(crate) rate: Option<u64>,
    /// Factor on printed sizes
    pub(crate) fake_size: u64,
    /// Number of this copy
    pub(crate) number: u64,
    /// Injections for this copy
    pub(crate) effects: Vec<Effect>,
}

impl Job {
    /// Name of the source's host at the sink: part of a checkpoint's name.
    pub(crate) fn peer_of_sink(&self) -> &str {
        self.sources
            .first()
            .and_then(|source| source.host.as_deref())
            .unwrap_or("[::ffff:127.0.0.1]")
    }

    /// True if the plan has this injection for the copy.
    pub(crate) fn has_effect(&self, wanted: &Effect) -> bool {
        self.effects.contains(wanted)
    }
}

/// The agent, as a child sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Agent {
    /// The parent of the child, by its process id
    Parent(i32),
    /// The agent holds the other end of the child's standard input
    Connected,
}

/// Way to the other side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Meeting {
    /// Report an address to the agent, and wait there
    Listen,
    /// Connect to this address
    Connect { host: String, port: u16 },
}

/// A source file as described to the sink.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// Name in a target directory
    pub(crate) name: String,
    /// Path as messages show it
    pub(crate) path: String,
    /// Device in the upper half, inode in the lower
    pub(crate) identity: u64,
    /// Permission bits
    pub(crate) mode: u32,
    /// Size in bytes
    pub(crate) size: u64,
    /// Time of the last access, in seconds since 1970
    pub(crate) accessed: i64,
    /// Time of the last modification, in seconds since 1970
    pub(crate) modified: i64,
    /// Group id
    pub(crate) group: u32,
}

/// Message from source to sink, besides data.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum FromSource {
    /// All files, in the order of the command line
    Offers(Vec<Offer>),
    /// No copy at all: the source has printed the reason, and ends with 2
    Nothing,
    /// The whole file has been sent; contains its sum if requested
    Sent(Option<String>),
    /// The source has printed the reason for its failure, and ends with this code
    Failed(u8),
    /// Sign of life
    Alive,
}

/// Message from sink to source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromSink {
    /// Send the file of this number, starting at this offset
    Get(usize, u64),
    /// No more files
    Done,
}

/// Message from sink to agent, or from the child that listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Report {
    /// Waiting for the other side at this host and port
    Listening(String, u16),
    /// Print this checksum for this target
    Checksum(String, String),
    /// Numbers of copied files and bytes
    End(u64, u64),
    /// Die by this signal
    Die(i32),
}

/// One received frame.
pub(crate) enum Frame<T> {
    /// Data, now in the buffer
    Data,
    /// A message
    Message(T),
}

/// A connection to another process: one end of the socket pair, or a connection between hosts.
pub(crate) struct Peer(File);

impl Peer {
    /// The end that is this process's standard input.
    ///
    /// # Errors
    /// Standard input is closed.
    pub(crate) fn on_standard_input() -> io::Result<Self> {
        let descriptor = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Self::new(descriptor))
    }

    /// Wraps an open connection.
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor.into())
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The peer is gone.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        self.frame(MESSAGE, &serde_json::to_vec(message)?)
    }

    /// Sends data.
    ///
    /// # Errors
    /// The peer is gone.
    pub(crate) fn send_data(&mut self, data: &[u8]) -> io::Result<()> {
        self.frame(DATA, data)
    }

    fn frame(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut header = [kind, 0, 0, 0, 0];
        header[1..].copy_from_slice(&length.to_le_bytes());
        self.0.write_all(&header)?;
        self.0.write_all(content)
    }

    /// Waits for a frame. The buffer is overwritten.
    ///
    /// # Errors
    /// The peer is gone, or sends an unexpected message.
    pub(crate) fn receive<T: DeserializeOwned>(
        &mut self,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Frame<T>> {
        let mut header = [0; 5];
        self.0.read_exact(&mut header)?;
        let [kind, length @ ..] = header;
        buffer.resize(u32::from_le_bytes(length) as usize, 0);
        self.0.read_exact(buffer)?;
        match kind {
            DATA => Ok(Frame::Data),
            _ => Ok(Frame::Message(serde_json::from_slice(buffer)?)),
        }
    }

    /// Waits for a message at a point where no data can arrive.
    ///
    /// # Errors
    /// See [`Self::receive`].
    pub(crate) fn message<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        match self.receive(&mut Vec::new())? {
            Frame::Message(message) => Ok(message),
            Frame::Data => Err(io::Error::other("data out of turn")),
        }
    }
}
