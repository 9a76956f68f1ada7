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
use uuid::Uuid;

use super::digest::Digest;
use super::error::{Role, TransferError};
use crate::settings::{DigestAlgorithm, Ssh};

mod address;
mod local;
mod remote;
mod ssh;
mod temporary;

pub use address::{AbsolutePath, Host, is_login};
pub(super) use local::directory::Directory;
pub(super) use ssh::options as ssh_options;
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

/// Problem of a location's directory that prevents transfers from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RootProblem {
    /// The directory is empty: it may be a mount point with nothing mounted.
    Empty,
    /// The directory is missing or cannot be used.
    Unusable(String),
}

impl RootProblem {
    /// Converts the problem into the error for an origin.
    pub(super) fn of(self, root: &AbsolutePath) -> TransferError {
        let empty = self == Self::Empty;
        TransferError::OriginRootMissing {
            path: root.to_string(),
            problem: match self {
                Self::Empty => "is empty, perhaps because nothing is mounted".into(),
                Self::Unusable(problem) => problem,
            },
            empty,
        }
    }
}

/// Treatment of a symbolic link at the path of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    /// Follow the link to its file.
    Follow,
    /// Do not follow the link: it is not a file. For our own names, since only others make such links.
    Refuse,
}

/// A time stamp of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds; 0 if the file system or the remote host's `stat` does not provide them.
    pub nanoseconds: u32,
}

impl Moment {
    fn new(seconds: i64, nanoseconds: i64) -> Option<Self> {
        let nanoseconds = u32::try_from(nanoseconds).ok()?;
        Some(Self {
            seconds,
            nanoseconds,
        })
    }
}

/// Facts that a file system reports about a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: FileKind,
    /// Whether we may read it.
    pub readable: bool,
    /// Last change of the content; unknown where the remote host has no `stat` program.
    pub modified: Option<Moment>,
    /// Last change of anything, including names and permissions; may be unknown for the same reason.
    pub changed: Option<Moment>,
    /// Device and inode; unknown likewise.
    pub identity: Option<(u64, u64)>,
    /// Number of hard links.
    pub names: Option<u64>,
    /// Id of the host's start; unknown if the host does not provide one.
    pub boot: Option<Uuid>,
}

impl Facts {
    /// First difference between two observations of an origin, if any.
    ///
    /// The time of the last change of anything (ctime) does not count: a backup that makes or removes
    /// hard links, a chmod or a rename changes it, and the content is the same.
    pub fn difference(&self, later: &Self) -> Option<&'static str> {
        if self.size != later.size {
            Some("its size")
        } else if self.identity != later.identity {
            Some("its device or inode")
        } else if self.modified != later.modified {
            Some("its time of last change")
        } else {
            None
        }
    }

    /// Returns true if both are certainly one file. On one running kernel device and inode decide. Each host
    /// numbers the devices that it mounts from others by itself, so between hosts inode and all times decide.
    pub fn is_same_file(&self, other: &Self) -> bool {
        let (Some(one), Some(two)) = (self.identity, other.identity) else {
            return false;
        };
        let same_kernel = self.boot.is_some() && self.boot == other.boot;
        let same_state = one.1 == two.1
            && self.size == other.size
            && self.modified.is_some()
            && self.modified == other.modified
            && self.changed.is_some()
            && self.changed == other.changed;
        same_state || (same_kernel && one == two)
    }
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// Anything else.
    Other,
}

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

/// The file to copy: can be looked at and read.
#[derive(Debug, Clone)]
pub struct Source {
    endpoint: Endpoint,
    root: AbsolutePath,
    path: AbsolutePath,
}

impl Source {
    pub(super) fn new(endpoint: Endpoint, root: AbsolutePath, path: AbsolutePath) -> Self {
        Self {
            endpoint,
            root,
            path,
        }
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Its path.
    pub fn path(&self) -> &AbsolutePath {
        &self.path
    }

    /// What the file system says about it.
    ///
    /// # Errors
    /// [`TransferError::OriginRootMissing`], [`TransferError::OriginMissing`],
    /// [`TransferError::OriginNotAFile`], [`TransferError::OriginUnreadable`], or the error of an end that
    /// could not be reached.
    pub async fn inspect(&self) -> Result<Facts, TransferError> {
        match self.look().await {
            Ok(facts) => Ok(facts),
            Err(error) => Err(self.located(error).await),
        }
    }

    async fn look(&self) -> Result<Facts, TransferError> {
        let path = || self.path.to_string();
        let found = self
            .endpoint
            .stat(Role::Origin, &self.path, Links::Follow)
            .await?;
        match found {
            None => Err(TransferError::OriginMissing { path: path() }),
            Some(facts) if facts.kind != FileKind::File => {
                Err(TransferError::OriginNotAFile { path: path() })
            }
            Some(facts) if !facts.readable => Err(TransferError::OriginUnreadable {
                path: path(),
                line: "permission denied".into(),
            }),
            Some(facts) => Ok(facts),
        }
    }

    /// Digest of its content. Dropping the future stops the reading, at both kinds of ends.
    ///
    /// # Errors
    /// That it cannot be read, stalled, or lacks the program for the digest.
    pub async fn digest(&self, how: Reading<'_>) -> Result<Digest, TransferError> {
        let digesting = self
            .endpoint
            .digest(Role::Origin, &self.path, Links::Follow, how);
        match digesting.await {
            Ok(digest) => Ok(digest),
            Err(error) => Err(self.located(error).await),
        }
    }

    /// Returns an error of reading the package, or [`TransferError::OriginRootMissing`] if not only the
    /// package is missing but its whole location, for example because a disk is not mounted.
    pub(super) async fn located(&self, error: TransferError) -> TransferError {
        let may_be_the_root = matches!(
            error,
            TransferError::OriginMissing { .. }
                | TransferError::OriginUnreadable { .. }
                | TransferError::Storage { .. }
        );
        if !may_be_the_root {
            return error;
        }
        match self.endpoint.root_problem(&self.root).await {
            Ok(Some(problem)) => problem.of(&self.root),
            Ok(None) | Err(_) => error,
        }
    }

    /// Returns true if an entry that was made in a destination's directory appears beside the package:
    /// then both directories are one.
    pub(super) async fn sees(&self, name: &TemporaryName) -> Result<bool, TransferError> {
        let path = self.path.sibling(name);
        let found = self.endpoint.stat(Role::Origin, &path, Links::Refuse);
        Ok(found.await?.is_some())
    }
}

/// What one attempt has at the destination before it is published.
#[derive(Debug, Clone)]
struct Partial {
    name: TemporaryName,
    copy: AbsolutePath,
}

impl Partial {
    /// Names of the copy and of the directory of checkpoints.
    fn names(&self) -> (String, String) {
        (self.name.to_string(), self.name.checkpoints())
    }
}

/// Where a copy goes: its final name, and the temporary name in the same directory.
#[derive(Debug, Clone)]
pub struct Target {
    endpoint: Endpoint,
    root: AbsolutePath,
    path: AbsolutePath,
    temporary: TemporaryName,
}

impl Target {
    pub(super) fn new(
        endpoint: Endpoint,
        root: AbsolutePath,
        path: AbsolutePath,
        temporary: TemporaryName,
    ) -> Self {
        Self {
            endpoint,
            root,
            path,
            temporary,
        }
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The final path.
    pub fn path(&self) -> &AbsolutePath {
        &self.path
    }

    /// The name that the copy has until it is published.
    pub fn temporary(&self) -> TemporaryName {
        self.temporary
    }

    /// The path that the copy has until it is published.
    pub fn temporary_path(&self) -> AbsolutePath {
        self.beside(self.temporary)
    }

    /// The directory in which bbcp keeps the checkpoint of this copy.
    pub fn checkpoint_path(&self) -> AbsolutePath {
        self.path.checkpoints(&self.temporary)
    }

    /// Both files of a temporary.
    fn partial(&self, name: TemporaryName) -> Partial {
        Partial {
            name,
            copy: self.beside(name),
        }
    }

    fn beside(&self, name: TemporaryName) -> AbsolutePath {
        self.path.sibling(&name)
    }

    /// Makes the directory of the final path, below the location's own directory.
    ///
    /// The latter must be there: making it would fill the wrong disk when it is a mount point with
    /// nothing mounted.
    ///
    /// # Errors
    /// [`TransferError::DestinationRootMissing`], [`TransferError::DestinationDenied`], or that the
    /// end could not be asked.
    pub async fn ensure_directory(&self) -> Result<(), TransferError> {
        let directory = self.path.parent();
        match &self.endpoint {
            Endpoint::Local => local::ensure_directory(&self.root, &directory).await,
            Endpoint::Remote(remote) => remote.ensure_directory(&self.root, &directory).await,
        }
    }

    /// Bytes that we may still write in the directory of the final path, which must exist.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn free_space(&self) -> Result<u64, TransferError> {
        let directory = self.path.parent();
        match &self.endpoint {
            Endpoint::Local => local::free_space(&directory).await,
            Endpoint::Remote(remote) => remote.free_space(&directory).await,
        }
    }

    /// What is at the final path, if anything.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn inspect(&self) -> Result<Option<Facts>, TransferError> {
        self.endpoint
            .stat(Role::Destination, &self.path, Links::Follow)
            .await
    }

    /// What is at the temporary path, if anything.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn inspect_temporary(&self) -> Result<Option<Facts>, TransferError> {
        let path = self.temporary_path();
        self.endpoint
            .stat(Role::Destination, &path, Links::Refuse)
            .await
    }

    /// Bytes of a temporary of any attempt; 0 where there is none.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn leftover_size(&self, name: TemporaryName) -> Result<u64, TransferError> {
        let path = self.beside(name);
        let facts = self
            .endpoint
            .stat(Role::Destination, &path, Links::Refuse)
            .await?;
        Ok(facts
            .filter(|facts| facts.kind == FileKind::File && facts.names == Some(1))
            .map_or(0, |facts| facts.size))
    }

    /// Makes this attempt's checkpoint directory, and makes the partial copy of `earlier`, an
    /// attempt at the same transfer, its own by renaming: whoever may still know it by its old name
    /// can do it no harm. Returns the bytes that are there.
    ///
    /// # Errors
    /// That the end could not be asked. It may have been done in part; what is there then is a
    /// leftover.
    pub async fn begin_partial(
        &self,
        earlier: Option<TemporaryName>,
    ) -> Result<u64, TransferError> {
        let earlier = earlier
            .filter(|name| name.transfer_id() == self.temporary.transfer_id())
            .map(|name| self.partial(name));
        let own = self.partial(self.temporary);
        match &self.endpoint {
            Endpoint::Local => local::partial::begin(earlier, own).await,
            Endpoint::Remote(remote) => remote.begin_partial(earlier.as_ref(), &own).await,
        }
    }

    /// Digest of what is at the final path; as [`Source::digest`].
    ///
    /// # Errors
    /// As [`Source::digest`].
    pub async fn digest(&self, how: Reading<'_>) -> Result<Digest, TransferError> {
        let (role, path) = (Role::Destination, &self.path);
        self.endpoint.digest(role, path, Links::Follow, how).await
    }

    /// Digest of what is at the temporary path; as [`Source::digest`].
    ///
    /// # Errors
    /// As [`Source::digest`].
    pub async fn digest_temporary(&self, how: Reading<'_>) -> Result<Digest, TransferError> {
        let path = self.temporary_path();
        self.endpoint
            .digest(Role::Destination, &path, Links::Refuse, how)
            .await
    }

    /// Renames the temporary to the final name unless that exists. The content is written to the disk before,
    /// and the directories afterwards, so that a power failure undoes nothing. The checkpoints are removed
    /// before.
    ///
    /// One that was interrupted half-way, when both names are the same file, is completed.
    ///
    /// # Errors
    /// [`TransferError::DestinationExists`], [`TransferError::RenameUnsupported`], or that the end
    /// could not be asked. In the last case it may have been done, and a repetition then finds that
    /// the destination exists: compare the digests.
    pub async fn publish(&self) -> Result<(), TransferError> {
        let own = self.partial(self.temporary);
        match &self.endpoint {
            Endpoint::Local => local::partial::publish(own, &self.path, self.directories()).await,
            Endpoint::Remote(remote) => {
                let directories = self.directories();
                remote
                    .rename_no_overwrite(&own, &self.path, &directories)
                    .await
            }
        }
    }

    /// Writes the file at the final path to the disk: its content, and its name in each directory up to
    /// the location's.
    ///
    /// # Errors
    /// The file could not be written to the disk, or the end could not be reached.
    pub async fn make_durable(&self) -> Result<(), TransferError> {
        let directories = self.directories();
        match &self.endpoint {
            Endpoint::Local => local::make_durable(&self.path, directories).await,
            Endpoint::Remote(remote) => remote.make_durable(&self.path, &directories).await,
        }
    }

    /// The directory of the final path and those above it, up to the location's. Each of them may have
    /// been made for this copy.
    fn directories(&self) -> Vec<AbsolutePath> {
        let mut directories = vec![self.path.parent()];
        while let Some(last) = directories.last().filter(|last| **last != self.root) {
            let parent = last.parent();
            if parent == *last {
                break;
            }
            directories.push(parent);
        }
        directories
    }

    /// Makes an empty file under the temporary name, which must not exist.
    ///
    /// # Errors
    /// The end could not be reached, or it refused.
    pub(super) async fn make_marker(&self) -> Result<(), TransferError> {
        let own = self.partial(self.temporary);
        match &self.endpoint {
            Endpoint::Local => local::partial::make_marker(own).await,
            Endpoint::Remote(remote) => remote.make_marker(&own).await,
        }
    }

    /// Removes this attempt's temporary with its checkpoints, if it is there.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn remove_temporary(&self) -> Result<(), TransferError> {
        self.remove_leftover(self.temporary).await
    }

    /// Removes a temporary of any attempt with its checkpoints, if it is there.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn remove_leftover(&self, name: TemporaryName) -> Result<(), TransferError> {
        let partial = self.partial(name);
        match &self.endpoint {
            Endpoint::Local => local::partial::remove(partial).await,
            Endpoint::Remote(remote) => remote.remove(&partial).await,
        }
    }

    /// The temporaries of this transfer's attempts in the directory of the final path, this
    /// attempt's own among them. None when there is no such directory.
    ///
    /// # Errors
    /// That the end could not be asked.
    pub async fn temporaries(&self) -> Result<Vec<TemporaryName>, TransferError> {
        let directory = self.path.parent();
        let id = self.temporary.transfer_id();
        match &self.endpoint {
            Endpoint::Local => local::partial::list(&directory, id).await,
            Endpoint::Remote(remote) => remote.temporaries(&directory, id).await,
        }
    }

    /// Where this host's file system shows the growing copy; none when it is remote.
    pub(super) fn watched(&self) -> Option<AbsolutePath> {
        match self.endpoint {
            Endpoint::Local => Some(self.temporary_path()),
            Endpoint::Remote(_) => None,
        }
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
