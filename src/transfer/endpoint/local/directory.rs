//! A directory that is held open. Its entries are addressed by name and never through a symbolic link: a
//! rename or a link planted meanwhile cannot redirect an operation.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Stat, linkat, mkdirat, openat,
    renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Mode of new directories, before the umask.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o777);

/// An open directory.
#[derive(Debug)]
pub(in crate::transfer) struct Directory(OwnedFd);

impl Directory {
    /// Opens a directory that the settings or the database name. Symbolic links in `path` are
    /// followed: the path is the operator's.
    pub(in crate::transfer) fn open(path: &Path) -> io::Result<Self> {
        Self::open_at(CWD, path, OFlags::empty())
    }

    /// Opens a directory in this one; an error if it is a symbolic link.
    pub(in crate::transfer) fn open_entry(&self, name: &str) -> io::Result<Self> {
        Self::open_at(&self.0, Path::new(name), OFlags::NOFOLLOW)
    }

    fn open_at(at: impl std::os::fd::AsFd, path: &Path, flags: OFlags) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | flags;
        let opened = match openat(&at, path, OFlags::RDONLY | flags, Mode::empty()) {
            // Entries can be used by name in a directory that cannot be listed.
            Err(Errno::ACCESS) => openat(&at, path, OFlags::PATH | flags, Mode::empty()),
            opened => opened,
        };
        Ok(Self(opened?))
    }

    /// Opens a directory in this one, and makes it if it does not exist. A symbolic link is followed
    /// only if it belongs to root, to this process's user or to the owner of this directory: any
    /// other link may have been planted so that files are made elsewhere.
    pub(in crate::transfer) fn enter_or_make(&self, name: &str) -> io::Result<Self> {
        let opened = match self.open_entry(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make(name)?;
                self.open_entry(name)
            }
            opened => opened,
        };
        match (opened, self.stat(name)?) {
            (Err(_), Some(found)) if is_link(&found) => {
                let owner = found.st_uid;
                let trusted = [0, geteuid().as_raw(), rustix::fs::fstat(&self.0)?.st_uid];
                if !trusted.contains(&owner) {
                    return Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        format!(
                            "`{name}` is a symbolic link of user {owner}, which is not followed"
                        ),
                    ));
                }
                Self::open_at(&self.0, Path::new(name), OFlags::empty())
            }
            (opened, _) => opened,
        }
    }

    /// Makes a directory, unless an entry of this name exists.
    pub(in crate::transfer) fn make(&self, name: &str) -> io::Result<()> {
        match mkdirat(&self.0, name, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// State of an entry, if it exists; for a symbolic link, the state of the link itself.
    pub(in crate::transfer) fn stat(&self, name: &str) -> io::Result<Option<Stat>> {
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a file for appending, and makes it if it does not exist. Opens only a regular file with one
    /// name.
    pub(in crate::transfer) fn append_to(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
        // Opening a pipe does not wait for its other end.
        let guards = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(&self.0, name, flags | guards, Mode::from_raw_mode(0o666))?;
        if is_plain(&rustix::fs::fstat(&opened)?) {
            Ok(opened.into())
        } else {
            Err(not_plain(name))
        }
    }

    /// Opens a regular file for reading.
    pub(in crate::transfer) fn read(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(&self.0, name, flags, Mode::empty())?;
        if is_regular(&rustix::fs::fstat(&opened)?) {
            Ok(opened.into())
        } else {
            Err(not_plain(name))
        }
    }

    /// Makes an empty file that did not exist.
    pub(in crate::transfer) fn make_file(&self, name: &str) -> io::Result<()> {
        self.create(name, Mode::from_raw_mode(0o600)).map(drop)
    }

    /// Makes a file that did not exist, for writing, with the mode of bbcp's files.
    pub(in crate::transfer) fn make_copy(&self, name: &str) -> io::Result<File> {
        self.create(name, Mode::from_raw_mode(0o644))
    }

    fn create(&self, name: &str, mode: Mode) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(openat(&self.0, name, flags, mode)?.into())
    }

    /// Writes the entries to the disk (fsync).
    pub(in crate::transfer) fn sync(self) -> io::Result<()> {
        match File::from(self.0).sync_all() {
            // A directory that cannot be listed cannot be written by its handle: then everything is written.
            Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => {
                rustix::fs::sync();
                Ok(())
            }
            synced => synced,
        }
    }

    /// Returns true if the directory has no entry.
    pub(in crate::transfer) fn is_empty(&self) -> io::Result<bool> {
        for entry in Dir::read_from(&self.0)? {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes a file or a symbolic link, if it exists.
    pub(in crate::transfer) fn remove(&self, name: &str) -> io::Result<()> {
        present(unlinkat(&self.0, name, AtFlags::empty()))
    }

    /// Removes an empty directory, if it exists.
    pub(in crate::transfer) fn remove_directory(&self, name: &str) -> io::Result<()> {
        present(unlinkat(&self.0, name, AtFlags::REMOVEDIR))
    }

    /// Renames an entry to a name in `to`, and replaces an entry of that name.
    pub(in crate::transfer) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.0, from, &self.0, to)?)
    }

    /// Renames an entry to a name that must be free.
    pub(in crate::transfer) fn rename_no_replace(&self, from: &str, to: &str) -> Result<(), Errno> {
        renameat_with(&self.0, from, &self.0, to, RenameFlags::NOREPLACE)
    }

    /// Gives an entry a second name, which must be free.
    pub(in crate::transfer) fn link(&self, from: &str, to: &str) -> Result<(), Errno> {
        linkat(&self.0, from, &self.0, to, AtFlags::empty())
    }

    /// Names of all entries.
    pub(in crate::transfer) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.0)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }
}

/// Returns true for a symbolic link.
fn is_link(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Symlink
}

/// Returns true for a regular file with one name. Data written to a file with several names appear under
/// all of them.
pub(in crate::transfer) fn is_plain(found: &Stat) -> bool {
    is_regular(found) && found.st_nlink == 1
}

/// Returns true for a regular file.
pub(in crate::transfer) fn is_regular(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

/// The error for an entry that is not a plain file.
pub(in crate::transfer) fn not_plain(name: &str) -> io::Error {
    io::Error::other(format!("`{name}` is not a regular file with one name"))
}

/// Treats the removal of a missing entry as done.
fn present(removed: Result<(), Errno>) -> io::Result<()> {
    match removed {
        Err(Errno::NOENT) => Ok(()),
        removed => Ok(removed?),
    }
}
