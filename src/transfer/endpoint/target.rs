//! Destination of a copy. Only files with our temporary names can be removed here, and nothing is overwritten.

use super::{AbsolutePath, Endpoint, Facts, FileKind, Links, ReadOptions, TemporaryName, local};
use crate::transfer::digest::FileDigest;
use crate::transfer::failures::{Role, TransferError};

/// Files of one attempt at the destination before it is published.
#[derive(Debug, Clone)]
pub(super) struct Partial {
    pub(super) name: TemporaryName,
    pub(super) copy: AbsolutePath,
}

impl Partial {
    /// Names of the copy and of the directory of checkpoints.
    pub(super) fn names(&self) -> (String, String) {
        (self.name.to_string(), self.name.checkpoints())
    }
}

/// Destination of a copy: its final name, and the temporary name in the same directory.
#[derive(Debug, Clone)]
pub struct Target {
    endpoint: Endpoint,
    root: AbsolutePath,
    path: AbsolutePath,
    temporary: TemporaryName,
}

impl Target {
    pub(in crate::transfer) fn new(
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

    /// The end of the copy where the file is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The final path.
    pub fn path(&self) -> &AbsolutePath {
        &self.path
    }

    /// Name of the copy until it is published.
    pub fn temporary(&self) -> TemporaryName {
        self.temporary
    }

    /// Path of the copy until it is published.
    pub fn temporary_path(&self) -> AbsolutePath {
        self.copy_path(self.temporary)
    }

    /// The directory in which bbcp keeps the checkpoint of this copy.
    pub fn checkpoint_path(&self) -> AbsolutePath {
        self.path.checkpoints(&self.temporary)
    }

    /// The copy and the checkpoint directory of a temporary.
    fn partial(&self, name: TemporaryName) -> Partial {
        Partial {
            name,
            copy: self.copy_path(name),
        }
    }

    fn copy_path(&self, name: TemporaryName) -> AbsolutePath {
        self.path.temporary(&name)
    }

    /// Makes the directory of the final path, below the location's own directory. Returns the number of bytes available
    /// to us there.
    ///
    /// The location's directory must exist. If it is a mount point with nothing mounted, making it would fill the wrong
    /// disk.
    ///
    /// # Errors
    /// [`TransferError::DestinationRootMissing`], [`TransferError::DestinationDenied`], or the end could not be
    /// reached.
    pub async fn ensure_directory(&self) -> Result<u64, TransferError> {
        let directory = self.path.parent();
        match &self.endpoint {
            Endpoint::Local => local::ensure_directory(&self.root, &directory).await,
            Endpoint::Remote(remote) => remote.ensure_directory(&self.root, &directory).await,
        }
    }

    /// Bytes available to us in the directory of the final path, which must exist.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn free_space(&self) -> Result<u64, TransferError> {
        let directory = self.path.parent();
        match &self.endpoint {
            Endpoint::Local => local::free_space(&directory).await,
            Endpoint::Remote(remote) => remote.free_space(&directory).await,
        }
    }

    /// Facts about the entry at the final path, if it exists.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn inspect(&self) -> Result<Option<Facts>, TransferError> {
        self.endpoint
            .stat(Role::Destination, &self.path, Links::Follow)
            .await
    }

    /// Facts about the entry at the temporary path, if it exists.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn inspect_temporary(&self) -> Result<Option<Facts>, TransferError> {
        let path = self.temporary_path();
        self.endpoint
            .stat(Role::Destination, &path, Links::Refuse)
            .await
    }

    /// Size in bytes of a temporary of any attempt; 0 if it does not exist.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn leftover_size(&self, name: TemporaryName) -> Result<u64, TransferError> {
        let facts = self.inspect_leftover(name).await?;
        Ok(facts.map_or(0, |facts| facts.size))
    }

    /// Facts about a temporary of any attempt, if it exists and is a plain file of ours.
    ///
    /// # Errors
    /// The end could not be reached.
    pub(in crate::transfer) async fn inspect_leftover(
        &self,
        name: TemporaryName,
    ) -> Result<Option<Facts>, TransferError> {
        let path = self.copy_path(name);
        let facts = self
            .endpoint
            .stat(Role::Destination, &path, Links::Refuse)
            .await?;
        Ok(facts.filter(|facts| facts.kind == FileKind::File && facts.names == Some(1)))
    }

    /// Makes this attempt's checkpoint directory, and renames the partial copy of `earlier`, another attempt at the
    /// same transfer, to this attempt's name. A process of the earlier attempt knows only the old name and cannot
    /// damage the copy any more. Returns the number of bytes of that copy.
    ///
    /// # Errors
    /// The end could not be reached. The rename may have been done in part; the remaining files are leftovers.
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

    /// Digest of the file at the final path.
    ///
    /// # Errors
    /// As [`Source::digest`](super::Source::digest).
    pub async fn digest(&self, options: ReadOptions<'_>) -> Result<FileDigest, TransferError> {
        let (role, path) = (Role::Destination, &self.path);
        self.endpoint
            .digest(role, path, Links::Follow, options)
            .await
    }

    /// Digest of the file at the temporary path.
    ///
    /// # Errors
    /// As [`Source::digest`](super::Source::digest).
    pub async fn digest_temporary(
        &self,
        options: ReadOptions<'_>,
    ) -> Result<FileDigest, TransferError> {
        let path = self.temporary_path();
        self.endpoint
            .digest(Role::Destination, &path, Links::Refuse, options)
            .await
    }

    /// Renames the temporary to the final name unless that exists. The content is written to the disk before the
    /// rename, and the directories after it, so that a power failure undoes nothing. The checkpoints are removed after
    /// the rename.
    ///
    /// A publication that was interrupted half-way (both names are the same file) is completed.
    ///
    /// If size and time of last change of the temporary are not those of `verified`, it is not renamed.
    ///
    /// # Errors
    /// [`TransferError::DestinationExists`], [`TransferError::RenameUnsupported`], [`TransferError::CopyChanged`], or the
    /// end could not be reached. In the last case the rename may have been done, and a repetition then reports that the destination exists: compare
    /// the digests.
    pub async fn publish(&self, verified: &Facts) -> Result<(), TransferError> {
        let own = self.partial(self.temporary);
        let directories = self.directories();
        match &self.endpoint {
            Endpoint::Local => {
                local::partial::publish(own, *verified, &self.path, directories).await
            }
            Endpoint::Remote(remote) => {
                remote
                    .rename_no_overwrite(&own, verified, &self.path, &directories)
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

    /// Directory of the final path and all directories above it, up to the location's. Each of them may have been made
    /// for this copy.
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
    /// The end could not be reached, or it refused to make the file.
    pub(in crate::transfer) async fn make_marker(&self) -> Result<(), TransferError> {
        let own = self.partial(self.temporary);
        match &self.endpoint {
            Endpoint::Local => local::partial::make_marker(own).await,
            Endpoint::Remote(remote) => remote.make_marker(&own).await,
        }
    }

    /// Removes this attempt's temporary with its checkpoints, if it exists.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn remove_temporary(&self) -> Result<(), TransferError> {
        self.remove_leftover(self.temporary).await
    }

    /// Removes a temporary of any attempt with its checkpoints, if it exists.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn remove_leftover(&self, name: TemporaryName) -> Result<(), TransferError> {
        let partial = self.partial(name);
        match &self.endpoint {
            Endpoint::Local => local::partial::remove(partial).await,
            Endpoint::Remote(remote) => remote.remove(&partial).await,
        }
    }

    /// Lists the temporaries of this transfer's attempts in the directory of the final path, including this attempt's
    /// own. The list is empty if the directory does not exist.
    ///
    /// # Errors
    /// The end could not be reached.
    pub async fn temporaries(&self) -> Result<Vec<TemporaryName>, TransferError> {
        let directory = self.path.parent();
        let id = self.temporary.transfer_id();
        match &self.endpoint {
            Endpoint::Local => local::partial::list(&directory, id).await,
            Endpoint::Remote(remote) => remote.temporaries(&directory, id).await,
        }
    }

    /// Path of the growing copy in this host's file system; `None` if the destination is remote.
    pub(in crate::transfer) fn growing_path(&self) -> Option<AbsolutePath> {
        match self.endpoint {
            Endpoint::Local => Some(self.temporary_path()),
            Endpoint::Remote(_) => None,
        }
    }
}
