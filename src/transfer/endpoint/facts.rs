//! Facts that a file system reports.

use std::net::IpAddr;

use uuid::Uuid;

use super::AbsolutePath;
use crate::transfer::failures::TransferError;

/// Problem of a location's directory that prevents transfers from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::transfer) enum RootProblem {
    /// The directory is empty: it may be a mount point with nothing mounted.
    Empty,
    /// The directory is missing or cannot be used.
    Unusable(String),
}

impl RootProblem {
    /// Converts the problem into the error for an origin.
    pub(in crate::transfer) fn of(self, root: &AbsolutePath) -> TransferError {
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
pub(in crate::transfer) enum Links {
    /// Follow the link to its file.
    Follow,
    /// Treat the link as "not a file". Used for our temporary names, since only others make links with such names.
    Refuse,
}

/// A time stamp of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileTime {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds; 0 if the file system or the remote host's `stat` does not provide them.
    pub nanoseconds: u32,
}

impl FileTime {
    pub(super) fn new(seconds: i64, nanoseconds: i64) -> Option<Self> {
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
    /// Type of the file.
    pub kind: FileKind,
    /// True if the worker's user may read the file.
    pub readable: bool,
    /// Time of the last change of the content (mtime); unknown if the remote host has no `stat` program.
    pub modified: Option<FileTime>,
    /// Time of the last change of content or metadata (ctime); unknown for the same reason.
    pub changed: Option<FileTime>,
    /// Device and inode; unknown for the same reason.
    pub identity: Option<(u64, u64)>,
    /// Number of hard links.
    pub names: Option<u64>,
    /// Boot id of the host's kernel; unknown if the host does not provide one.
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

    /// Returns true if both are certainly the same file. On the same running kernel, device and inode decide. Each host
    /// numbers the devices that it mounts from others by itself, so between hosts the inode and all times decide.
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

/// Type of the entry at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// Anything else.
    Other,
}

/// Addresses that a remote host knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::transfer) struct HostAddresses {
    /// Its own host name.
    pub(in crate::transfer) own_name: Option<String>,
    /// Address of that name there.
    pub(in crate::transfer) own_address: Option<IpAddr>,
    /// Address of the name that it was asked for.
    pub(in crate::transfer) asked: Option<IpAddr>,
    /// Address of this host in the connection of ssh.
    pub(in crate::transfer) ssh_client: Option<IpAddr>,
    /// Address of the remote host in that connection.
    pub(in crate::transfer) ssh_server: Option<IpAddr>,
}
