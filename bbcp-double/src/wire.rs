//! Messages between the three processes.
//!
//! Sink and source share a socket pair, which is each one's standard input; the agent writes the [`Job`] into
//! it as the first message and then lets go of it. The end of one side is thus seen by the other at once. The
//! sink's standard output is a pipe to the agent, for [`Report`]s, one JSON object a line.

use crate::effects::Effect;
use crate::options::Options;
use crate::spec::Spec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Largest piece of data in one frame.
pub(crate) const LARGEST_PIECE: usize = 1 << 20;

const DATA: u8 = b'D';
const MESSAGE: u8 = b'M';

/// Everything that sink and source need to know.
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
    /// Process id of the agent
    pub(crate) agent: i32,
    /// Seconds between looks at the agent
    pub(crate) poll: f64,
    /// Seconds between progress lines, if they are asked for
    pub(crate) progress: Option<f64>,
    /// Bytes per second
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

/// A source file as the sink gets to know it.
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
    /// Bytes
    pub(crate) size: u64,
    /// Seconds since 1970
    pub(crate) accessed: i64,
    /// Seconds since 1970
    pub(crate) modified: i64,
    /// Group id
    pub(crate) group: u32,
}

/// From source to sink, besides data.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum FromSource {
    /// All files, in the order of the command line
    Offers(Vec<Offer>),
    /// No copy at all: the source has said why, and ends with 2
    Nothing,
    /// All of the file is on its way; its sum, if it was asked for
    Sent(Option<String>),
    /// The source has said why it cannot go on, and ends with this code
    Failed(u8),
    /// Still here
    Alive,
}

/// From sink to source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromSink {
    /// Send the file of this number from this offset on
    Get(usize, u64),
    /// Nothing more
    Done,
}

/// From sink to agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Report {
    /// Print this sum of this target
    Checksum(String, String),
    /// Files and bytes that were copied
    End(u64, u64),
    /// The agent is to die by this signal
    Die(i32),
}

/// One received frame.
pub(crate) enum Frame<T> {
    /// Data: the buffer holds them
    Data,
    /// A message
    Message(T),
}

/// One end of the socket pair.
pub(crate) struct Peer(UnixStream);

impl Peer {
    /// The end that is this process's standard input.
    ///
    /// # Errors
    /// Standard input is closed.
    pub(crate) fn on_standard_input() -> io::Result<Self> {
        let descriptor = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Self(UnixStream::from(descriptor)))
    }

    /// An end at hand.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream)
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

    /// Waits for a message where no data can come.
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
