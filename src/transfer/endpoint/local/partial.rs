//! Adoption, publication and removal of partial copies on this host.
//!
//! All operations use our temporary names in the destination's directory, which is held open. An entry with
//! such a name that is not a plain file of ours (a symbolic link, a second name of another file) is
//! removed by its name, and never read, renamed to a package or written to.

use std::collections::HashSet;
use std::io;

use rustix::io::Errno;

use super::super::{AbsolutePath, Facts, Partial, TemporaryName};
use super::directory::{Directory, is_plain, is_regular, not_plain};
use super::{blocking, is_absent, modified, refused, sync_directories};
use crate::transfer::failures::TransferError;
use crate::transfer::id::TransferId;

/// Renames a copy to its final name unless that exists, or the copy has changed since it was `verified`.
pub(in crate::transfer::endpoint) async fn publish(
    own: Partial,
    verified: Facts,
    to: &AbsolutePath,
    directories: Vec<AbsolutePath>,
) -> Result<(), TransferError> {
    let to = to.clone();
    blocking("rename", move || {
        let parent = to.parent();
        let directory = open(&parent)?;
        let from = own.name.to_string();
        let name = to.file_name().unwrap_or_default();
        let exists = || TransferError::DestinationExists {
            path: to.to_string(),
        };
        let looked_at = |name: &str| {
            directory
                .stat(name)
                .map_err(|e| refused("stat", &own.copy, e))
        };
        match looked_at(&from)? {
            Some(found) if !is_regular(&found) => {
                return Err(refused("rename", &own.copy, not_plain(&from)));
            }
            None if looked_at(name)?.is_some() => return Err(exists()),
            None => {}
            Some(_) => {
                let copy = directory
                    .read(&from)
                    .map_err(|e| refused("open", &own.copy, e))?;
                let metadata = copy.metadata().map_err(|e| refused("stat", &own.copy, e))?;
                let found = (metadata.len(), modified(&metadata));
                if found != (verified.size, verified.modified) {
                    return Err(TransferError::CopyChanged {
                        path: to.to_string(),
                    });
                }
                copy.sync_all()
                    .map_err(|e| refused("fsync", &own.copy, e))?;
            }
        }
        match directory.rename_no_replace(&from, name) {
            Ok(()) => {}
            Err(Errno::EXIST) => unlink_second_name(&directory, &from, &to)?,
            // NFS and others do not support this flag.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                link_and_unlink(&directory, &from, &to)?;
            }
            Err(e) => return Err(refused("rename", &to, e)),
        }
        // Without them the copy could not be completed after an error, so they are removed last.
        remove_checkpoints(&directory, &own.name).map_err(|e| refused("unlink", &parent, e))?;
        // From now on a power failure does not undo the rename.
        sync_directories(&directories)
    })
    .await
}

fn open(directory: &AbsolutePath) -> Result<Directory, TransferError> {
    Directory::open(directory.as_path()).map_err(|e| refused("open", directory, e))
}

/// Fallback by a hard link: as safe, but for a moment the file has both names.
fn link_and_unlink(
    directory: &Directory,
    from: &str,
    to: &AbsolutePath,
) -> Result<(), TransferError> {
    match directory.link(from, to.file_name().unwrap_or_default()) {
        Ok(()) => directory.remove(from).map_err(|e| refused("unlink", to, e)),
        Err(Errno::EXIST) => unlink_second_name(directory, from, to),
        // link(2) reports a file system without hard links as EPERM.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
            Err(TransferError::RenameUnsupported {
                path: to.to_string(),
            })
        }
        Err(e) => Err(refused("link", to, e)),
    }
}

/// Completes a rename after an interrupted [`link_and_unlink`], or one that NFS did but reported as failed:
/// both names are the same file, and only the old name is still to be removed.
fn unlink_second_name(
    directory: &Directory,
    from: &str,
    to: &AbsolutePath,
) -> Result<(), TransferError> {
    let identity = |name: &str| {
        let found = directory.stat(name).map_err(|e| refused("stat", to, e))?;
        Ok::<_, TransferError>(found.map(|found| (found.st_dev, found.st_ino)))
    };
    let old = identity(from)?;
    if old.is_none() || old != identity(to.file_name().unwrap_or_default())? {
        return Err(TransferError::DestinationExists {
            path: to.to_string(),
        });
    }
    directory.remove(from).map_err(|e| refused("unlink", to, e))
}

/// Makes an empty file under an attempt's temporary name.
pub(in crate::transfer::endpoint) async fn make_marker(own: Partial) -> Result<(), TransferError> {
    blocking("create", move || {
        open(&own.copy.parent())?
            .make_file(&own.name.to_string())
            .map_err(|e| refused("create", &own.copy, e))
    })
    .await
}

/// Removes a copy with its checkpoints, if it exists.
pub(in crate::transfer::endpoint) async fn remove(partial: Partial) -> Result<(), TransferError> {
    blocking("unlink", move || {
        let removing = || -> io::Result<()> {
            let directory = match Directory::open(partial.copy.parent().as_path()) {
                Err(e) if is_absent(&e) => return Ok(()),
                directory => directory?,
            };
            directory.remove(&partial.name.to_string())?;
            remove_checkpoints(&directory, &partial.name)
        };
        removing().map_err(|e| refused("unlink", &partial.copy, e))
    })
    .await
}

/// Removes the directory of checkpoints, if it exists; removes only checkpoints in it.
fn remove_checkpoints(directory: &Directory, of: &TemporaryName) -> io::Result<()> {
    let name = of.checkpoints();
    let checkpoints = match directory.open_entry(&name) {
        Ok(checkpoints) => checkpoints,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A link or a file: only its name is ours.
        Err(e) if is_not_a_directory(&e) => return directory.remove(&name),
        Err(e) => return Err(e),
    };
    for entry in checkpoints.names()? {
        if let Some(entry) = entry.to_str().filter(|name| name.starts_with("bbcp.")) {
            checkpoints.remove(entry)?;
        }
    }
    directory.remove_directory(&name)
}

/// Returns true if opening a directory failed because the entry is not a directory.
fn is_not_a_directory(e: &io::Error) -> bool {
    [Errno::LOOP, Errno::NOTDIR]
        .iter()
        .any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}

/// Makes the directory of an attempt's checkpoints, and adopts an earlier attempt's copy.
/// Returns the number of bytes of that copy. A repetition has the same result.
pub(in crate::transfer::endpoint) async fn begin(
    earlier: Option<Partial>,
    own: Partial,
) -> Result<u64, TransferError> {
    blocking("adopt", move || {
        adopt(earlier.as_ref(), &own).map_err(|e| refused("adopt", &own.copy, e))
    })
    .await
}

/// Renames the copy last: after an interruption there is no copy with its checkpoint, so none is used.
fn adopt(earlier: Option<&Partial>, own: &Partial) -> io::Result<u64> {
    let directory = Directory::open(own.copy.parent().as_path())?;
    let now = own.name.to_string();
    if directory.stat(&now)?.is_some_and(|found| !is_plain(&found)) {
        directory.remove(&now)?;
    }
    let adopted = match earlier {
        Some(earlier) => adopt_checkpoints(&directory, earlier, own)?.then_some(earlier),
        None => None,
    };
    let checkpoints = own.name.checkpoints();
    if directory
        .open_entry(&checkpoints)
        .is_err_and(|e| is_not_a_directory(&e))
    {
        directory.remove(&checkpoints)?;
    }
    directory.make(&checkpoints)?;
    // The entry is a directory.
    directory.open_entry(&checkpoints)?;
    if let Some(earlier) = adopted {
        directory.rename(&earlier.name.to_string(), &now)?;
    }
    let found = directory.stat(&now)?;
    Ok(found.map_or(0, |found| u64::try_from(found.st_size).unwrap_or(0)))
}

/// Renames an earlier attempt's checkpoints for this attempt. Returns false, and removes the earlier
/// attempt's files, if there is no plain copy or no directory of checkpoints to complete.
fn adopt_checkpoints(directory: &Directory, earlier: &Partial, own: &Partial) -> io::Result<bool> {
    let before = earlier.name.to_string();
    let checkpoints = directory.open_entry(&earlier.name.checkpoints());
    let is_copy = directory
        .stat(&before)?
        .is_some_and(|found| is_plain(&found));
    let (Ok(checkpoints), true) = (checkpoints, is_copy) else {
        directory.remove(&before)?;
        remove_checkpoints(directory, &earlier.name)?;
        return Ok(false);
    };
    remove_checkpoints(directory, &own.name)?;
    directory.rename(&earlier.name.checkpoints(), &own.name.checkpoints())?;
    for entry in checkpoints.names()? {
        let stem = entry.to_str().and_then(|name| name.strip_suffix(&before));
        if let (Some(entry), Some(stem)) = (entry.to_str(), stem) {
            checkpoints.rename(entry, &format!("{stem}{}", own.name))?;
        }
    }
    Ok(true)
}

/// Names of a transfer's copies and checkpoints in a directory; none if there is no directory.
pub(in crate::transfer::endpoint) async fn list(
    directory: &AbsolutePath,
    transfer_id: TransferId,
) -> Result<Vec<TemporaryName>, TransferError> {
    let directory = directory.clone();
    blocking("list", move || {
        let names = match Directory::open(directory.as_path()).and_then(|open| open.names()) {
            Ok(names) => names,
            Err(e) if is_absent(&e) => return Ok(Vec::new()),
            Err(e) => return Err(refused("list", &directory, e)),
        };
        Ok(names
            .iter()
            .filter_map(|name| TemporaryName::of_entry(name.to_str()?))
            .filter(|name| name.transfer_id() == transfer_id)
            .collect::<HashSet<_>>()
            .into_iter()
            .collect())
    })
    .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;

    use super::*;

    /// Publication by a hard link, for a kernel that cannot rename without overwriting.
    #[test]
    fn hard_link_never_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(folder.path()).unwrap();
        let path = |name: &str| folder.path().join(name);
        let to = AbsolutePath::new(path("to").to_str().unwrap()).unwrap();
        fs::write(path("from"), "new").unwrap();
        link_and_unlink(&directory, "from", &to).unwrap();
        assert!(!path("from").exists());

        fs::write(path("from"), "newer").unwrap();
        let error = link_and_unlink(&directory, "from", &to).unwrap_err();
        assert_eq!(error.code(), "destination_exists");
        assert_eq!(fs::read(to.as_path()).unwrap(), b"new");
        assert_eq!(fs::read(path("from")).unwrap(), b"newer");
    }
}
