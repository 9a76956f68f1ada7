//! The two ends of a copy, on this host or on a host reached by ssh.
//!
//! A [`Source`] can only be inspected and read: this project never deletes or overwrites anything at an origin, and no
//! operation in this module can. A [`Target`] can publish its own copy without overwriting, and remove files with our
//! temporary names, nothing else.
//!
//! Every operation has a time limit, and stops the work that it started when its future is dropped. (A local system
//! call that hangs cannot be stopped; its thread remains.)

use std::time::Duration;

use entity::FileEnd;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::digest::{FileDigest, KnownBlocks, ReadBlock};
use super::failures::{Role, TransferError};
use crate::settings::{DigestAlgorithm, Ssh};

mod address;
mod facts;
mod local;
mod remote;
mod source;
mod ssh;
mod target;
mod temporary;

pub use address::{AbsolutePath, Host, is_login};
pub use facts::{Facts, FileKind, FileTime};
pub(super) use facts::{HostAddresses, Links, RootProblem};
pub(super) use local::directory::Directory;
pub(super) use local::{refused, unreadable};
pub(super) use remote::{StreamCommand, StreamEnd};
pub use source::Source;
use ssh::HostConnection;
pub(super) use ssh::{CopySession, SshConnections};
use target::Partial;
pub use target::Target;
pub use temporary::TemporaryName;

/// A host that is reached by ssh.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The host.
    pub host: Host,
    /// Settings of ssh for this host.
    pub ssh: Box<Ssh>,
    /// Connection for requests and copies.
    connection: HostConnection,
}

/// Host of one end of a copy.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// This host.
    Local,
    /// Another host.
    Remote(Remote),
}

impl Endpoint {
    /// The remote host, if this end is remote.
    pub fn remote(&self) -> Option<&Remote> {
        match self {
            Self::Local => None,
            Self::Remote(remote) => Some(remote),
        }
    }

    pub(super) async fn stat(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
    ) -> Result<Option<Facts>, TransferError> {
        match self {
            Self::Local => local::stat(role, path, links).await,
            Self::Remote(remote) => remote.stat(role, path, links).await,
        }
    }

    /// Problem of a location's directory that prevents transfers from it, if any.
    pub(super) async fn root_problem(
        &self,
        root: &AbsolutePath,
    ) -> Result<Option<RootProblem>, TransferError> {
        match self {
            Self::Local => local::root_problem(root).await,
            Self::Remote(remote) => remote.root_problem(root).await,
        }
    }

    pub(super) async fn digest(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
        options: ReadOptions<'_>,
    ) -> DigestResult {
        match self {
            Self::Local => local::digest(role, path, links, options).await,
            Self::Remote(remote) => remote.digest(role, path, links, options).await,
        }
    }
}

type DigestResult = Result<FileDigest, TransferError>;

/// The digest of a file while it is computed by a task. Dropping it stops the computation.
pub(super) type RunningDigest = AbortOnDropHandle<DigestResult>;

/// Options of reading a file for its digest.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions<'a> {
    /// Algorithm.
    pub algorithm: DigestAlgorithm,
    /// Expected size in bytes.
    pub size: u64,
    /// True if the digests of the blocks are needed too. A remote end computes only these.
    pub with_blocks: bool,
    /// Maximum time without a byte before reading counts as failed. A remote end prints nothing before the end of a
    /// block, so there the time for a block is added.
    pub stall_timeout: Duration,
    /// Number of bytes that the running copy has read so far; used at a local end only. The reader stays near the copy,
    /// so that it reads from the page cache, until the sender is dropped.
    pub behind: Option<&'a watch::Receiver<u64>>,
    /// True if the file still grows to its expected size. A local end then waits for it until the copy that it reads
    /// [behind](Self::behind) has ended.
    pub is_growing: bool,
    /// Blocks that are not read again, and the receiver of the others.
    pub blocks: Option<&'a Blocks>,
}

/// The blocks of one file.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// The first ones, which were read before.
    pub known: KnownBlocks,
    /// Receiver of each further block as soon as it has been read.
    pub read: BlockSender,
}

/// Sends blocks that were read, with the end of the copy to which the file belongs.
#[derive(Debug, Clone)]
pub struct BlockSender {
    /// End of the copy.
    pub end: FileEnd,
    /// Channel.
    pub channel: mpsc::UnboundedSender<(FileEnd, ReadBlock)>,
}

impl BlockSender {
    fn send(&self, block: ReadBlock) {
        // Without a receiver, the block is not needed.
        let _ = self.channel.send((self.end, block));
    }
}

/// Converts the failure of a file system operation.
fn storage(
    operation: &'static str,
    role: Role,
    path: &AbsolutePath,
    source: impl Into<super::failures::BoxError>,
) -> TransferError {
    TransferError::Storage {
        operation,
        role,
        path: path.to_string(),
        source: source.into(),
    }
}
