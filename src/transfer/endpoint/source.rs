//! The file to copy. No operation in this module can change an origin.

use super::{AbsolutePath, Endpoint, Facts, FileKind, Links, ReadOptions, TemporaryName};
use crate::transfer::digest::FileDigest;
use crate::transfer::failures::{Role, TransferError};

/// The file to copy. It can be inspected and read.
#[derive(Debug, Clone)]
pub struct Source {
    endpoint: Endpoint,
    root: AbsolutePath,
    path: AbsolutePath,
}

impl Source {
    pub(in crate::transfer) fn new(
        endpoint: Endpoint,
        root: AbsolutePath,
        path: AbsolutePath,
    ) -> Self {
        Self {
            endpoint,
            root,
            path,
        }
    }

    /// The end of the copy where the file is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Path of the file.
    pub fn path(&self) -> &AbsolutePath {
        &self.path
    }

    /// Reads the facts of the file from the file system.
    ///
    /// # Errors
    /// [`TransferError::OriginRootMissing`], [`TransferError::OriginMissing`],
    /// [`TransferError::OriginNotAFile`], [`TransferError::OriginUnreadable`], or the error of an end that could not be
    /// reached.
    pub async fn inspect(&self) -> Result<Facts, TransferError> {
        match self.inspect_once().await {
            Ok(facts) => Ok(facts),
            Err(error) => Err(self.or_root_problem(error).await),
        }
    }

    async fn inspect_once(&self) -> Result<Facts, TransferError> {
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

    /// Computes the digest of the file's content. Dropping the future stops the reading, at a remote end after the
    /// current block.
    ///
    /// # Errors
    /// The file cannot be read, the storage does not answer in time, or the remote end has no program for the digest.
    pub async fn digest(&self, options: ReadOptions<'_>) -> Result<FileDigest, TransferError> {
        let digesting = self
            .endpoint
            .digest(Role::Origin, &self.path, Links::Follow, options);
        match digesting.await {
            Ok(digest) => Ok(digest),
            Err(error) => Err(self.or_root_problem(error).await),
        }
    }

    /// Converts an error of reading the package to [`TransferError::OriginRootMissing`] if not only the package is
    /// missing but its whole location, for example because a disk is not mounted. Returns every other error unchanged.
    pub(in crate::transfer) async fn or_root_problem(&self, error: TransferError) -> TransferError {
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

    /// Returns true if an entry that was made in a destination's directory appears beside the package. In that case
    /// both are the same directory.
    pub(in crate::transfer) async fn sees(
        &self,
        name: &TemporaryName,
    ) -> Result<bool, TransferError> {
        let path = self.path.temporary(name);
        let found = self.endpoint.stat(Role::Origin, &path, Links::Refuse);
        Ok(found.await?.is_some())
    }
}
