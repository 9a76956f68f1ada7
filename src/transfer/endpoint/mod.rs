//! The two ends of a copy, here or reached by ssh.
//!
//! [`Source`] can only be looked at: this project never deletes or overwrites anything at an
//! origin, and there is no operation here that could. [`Target`] can publish its own copy without
//! overwriting, and remove files with our temporary names, nothing else.
//!
//! Every operation has a time limit and stops what it started when its future is dropped (a local
//! system call that hangs cannot be stopped; its thread is left behind).

use std::time::Duration;

use tokio::sync::watch;

use super::digest::Digest;
use super::error::{Role, TransferError};
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
pub use facts::{Facts, FileKind, Moment};
pub(super) use facts::{Links, RootProblem};
pub(super) use local::directory::Directory;
pub use source::Source;
pub(super) use ssh::options as ssh_options;
use target::Partial;
pub use target::Target;
pub use temporary::TemporaryName;

/// Time limit of every operation but the digest.
const OPERATION_LIMIT: Duration = Duration::from_secs(60);

/// Slowest storage that a digest of a whole file waits for.
const SLOWEST_DIGEST_BYTES_PER_S: u64 = 10_000_000;

/// A host that is reached by ssh.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Which one.
    pub host: Host,
    /// How.
    pub ssh: Box<Ssh>,
}

/// Where one end of a copy is.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// On this host.
    Local,
    /// On another one.
    Remote(Remote),
}

impl Endpoint {
    /// The other host, if it is one.
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
        how: Reading<'_>,
    ) -> DigestResult {
        match self {
            Self::Local => local::digest(role, path, links, how).await,
            Self::Remote(remote) => remote.digest(role, path, links, how).await,
        }
    }
}

type DigestResult = Result<Digest, TransferError>;

/// How a file is read for its digest.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Algorithm.
    pub algorithm: DigestAlgorithm,
    /// Expected size in bytes; decides how long a remote end may take.
    pub size: u64,
    /// A reader that gets no byte for so long has failed. A remote end tells nothing before its
    /// end, so there it is added to the time that [`Self::size`] allows.
    pub stall_timeout: Duration,
    /// Bytes that somebody else has read, at a local end only: the reader stays near them, as long
    /// as somebody tells.
    pub behind: Option<&'a watch::Receiver<u64>>,
}

impl Reading<'_> {
    /// Longest time that a remote end may take.
    fn limit(&self) -> Duration {
        self.stall_timeout + Duration::from_secs(self.size / SLOWEST_DIGEST_BYTES_PER_S)
    }
}

/// The error for something that a file system did not do.
fn storage(
    operation: &'static str,
    role: Role,
    path: &AbsolutePath,
    source: impl Into<super::error::Cause>,
) -> TransferError {
    TransferError::Storage {
        operation,
        role,
        path: path.to_string(),
        source: source.into(),
    }
}
