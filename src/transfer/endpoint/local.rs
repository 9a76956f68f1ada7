//! An end on this host.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, eaccess};
use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::gettid;
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, interval, timeout};

use super::{
    AbsolutePath, DigestResult, Facts, FileKind, OPERATION_LIMIT, Partial, Reading, TemporaryName,
    storage,
};
use crate::settings::DigestAlgorithm;
use crate::transfer::digest::{self, Digest};
use crate::transfer::error::{Role, TransferError};

/// How far a reader may be ahead of whom it stays near: far enough that neither waits for the other,
/// near enough that the system still has in memory what either has read.
const LEAD_BYTES: u64 = 256 << 20;

/// How often it is looked at within the time after which it has stalled.
const LOOKS: u32 = 4;

/// How messages call this host.
const HERE: &str = "this host";

/// Runs `work` where it may block, for [`OPERATION_LIMIT`] at the most.
async fn blocking<T, F>(operation: &'static str, work: F) -> Result<T, TransferError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, TransferError> + Send + 'static,
{
    match timeout(OPERATION_LIMIT, spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(e)) => Err(TransferError::Spawn {
            program: operation.into(),
            source: io::Error::other(e),
        }),
        Err(_) => Err(TransferError::OperationTimeout {
            operation,
            host: HERE.into(),
            limit: OPERATION_LIMIT,
        }),
    }
}

pub(super) async fn stat(role: Role, path: &AbsolutePath) -> Result<Option<Facts>, TransferError> {
    let path = path.clone();
    blocking("stat", move || match fs::metadata(path.as_path()) {
        Ok(metadata) => Ok(Some(facts(path.as_path(), &metadata))),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(denied_or(role, "stat", &path, e)),
    })
    .await
}

fn facts(path: &Path, metadata: &fs::Metadata) -> Facts {
    Facts {
        size: metadata.len(),
        kind: if metadata.is_file() {
            FileKind::File
        } else if metadata.is_dir() {
            FileKind::Directory
        } else {
            FileKind::Other
        },
        readable: eaccess(path, AccessFlags::R_OK).is_ok(),
        modified: Some(metadata.mtime()),
        identity: Some((metadata.dev(), metadata.ino())),
    }
}

fn is_absent(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Permission and space have errors of their own; the rest is [`TransferError::Storage`].
fn denied_or(
    role: Role,
    operation: &'static str,
    path: &AbsolutePath,
    e: io::Error,
) -> TransferError {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let line = format!("{operation}: {e}");
    let path_text = path.to_string();
    match (e.kind(), role) {
        (PermissionDenied, Role::Origin) => TransferError::OriginUnreadable {
            path: path_text,
            line,
        },
        (PermissionDenied | ReadOnlyFilesystem, Role::Destination) => {
            TransferError::DestinationDenied {
                path: path_text,
                line,
            }
        }
        (StorageFull | QuotaExceeded, Role::Destination) => TransferError::StorageFull {
            path: path_text,
            line,
        },
        _ => storage(operation, role, path, e),
    }
}

/// The same for an end that may be written.
fn refused(operation: &'static str, path: &AbsolutePath, e: impl Into<io::Error>) -> TransferError {
    denied_or(Role::Destination, operation, path, e.into())
}

pub(super) async fn ensure_directory(
    root: &AbsolutePath,
    directory: &AbsolutePath,
) -> Result<(), TransferError> {
    let (root, directory) = (root.clone(), directory.clone());
    blocking("mkdir", move || {
        if !root.as_path().is_dir() {
            return Err(TransferError::DestinationRootMissing {
                path: root.to_string(),
            });
        }
        fs::create_dir_all(directory.as_path()).map_err(|e| refused("mkdir", &directory, e))?;
        eaccess(directory.as_path(), AccessFlags::W_OK | AccessFlags::X_OK)
            .map_err(|e| refused("access", &directory, e))
    })
    .await
}

pub(super) async fn free_space(directory: &AbsolutePath) -> Result<u64, TransferError> {
    let directory = directory.clone();
    blocking("statvfs", move || {
        let found = statvfs(directory.as_path()).map_err(|e| refused("statvfs", &directory, e))?;
        Ok(found.blocks_available() * found.fragment_size())
    })
    .await
}

/// What a thread that reads and whoever waits for its digest know of each other.
#[derive(Default)]
struct Shared {
    /// Bytes that were read.
    bytes: AtomicU64,
    /// Goes on counting for as long as the thread is well: it reads, or it holds back.
    signs: AtomicU64,
    /// Whether nobody wants the digest any more.
    stop: AtomicBool,
}

impl Shared {
    /// The thread is well. False if it is to stop.
    fn sign(&self, bytes: u64) -> bool {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.signs.fetch_add(1, Ordering::Relaxed);
        !self.stop.load(Ordering::Relaxed)
    }

    /// Reads a file to its end, in a thread of its own. Held back by the copy that it reads beside, if there is
    /// one, the thread sleeps until it is woken; it gives a sign of life every so often.
    fn read(
        &self,
        role: Role,
        path: &Path,
        algorithm: DigestAlgorithm,
        behind: Option<&watch::Receiver<u64>>,
        sign_every: Duration,
    ) -> io::Result<Digest> {
        // What reads beside the copy takes only what the copy leaves: one that copies at the speed of memory
        // needs all processors, and what is left to read is read with the other end, afterwards.
        if behind.is_some() {
            be_modest();
        }
        let file = File::open(path)?;
        // What was just written is to be read from the disk, not from memory.
        if role == Role::Destination {
            let _advice_only = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        digest::of(algorithm, file, |bytes| {
            let is_too_far = |copied: &watch::Receiver<u64>| {
                copied.has_changed().is_ok() && bytes > copied.borrow().saturating_add(LEAD_BYTES)
            };
            let mut is_wanted = self.sign(bytes);
            while is_wanted && behind.is_some_and(is_too_far) {
                thread::park_timeout(sign_every);
                is_wanted = self.sign(bytes);
            }
            is_wanted
        })
    }
}

/// The reading thread, which stops when the future that waits for it is dropped.
struct Reader {
    shared: Arc<Shared>,
    thread: Thread,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.unpark();
    }
}

pub(super) async fn digest(role: Role, path: &AbsolutePath, how: Reading<'_>) -> DigestResult {
    let shared = Arc::<Shared>::default();
    let mut copied = how.behind.cloned();
    let look_every = how.stall_timeout / LOOKS;
    let (thread, mut digest) = in_thread({
        let (shared, path, behind) = (shared.clone(), path.clone(), copied.clone());
        move || {
            let path = path.as_path();
            shared.read(role, path, how.algorithm, behind.as_ref(), look_every)
        }
    })
    .map_err(|e| storage("read", role, path, e))?;
    let reader = Reader { shared, thread };
    let mut looks = interval(look_every.max(Duration::from_millis(1)));
    let mut last = (0, Instant::now());
    loop {
        tokio::select! {
            // The channel closes when the reader ends, however it ends.
            result = &mut digest => return match result {
                Ok(result) => result.map_err(|e| unreadable(role, path, e)),
                Err(_) => {
                    let broken = io::Error::other("the thread that reads broke");
                    Err(storage("read", role, path, broken))
                }
            },
            going_on = further(&mut copied) => {
                if !going_on {
                    copied = None;
                }
                reader.thread.unpark();
            }
            _ = looks.tick() => {}
        }
        let signs = reader.shared.signs.load(Ordering::Relaxed);
        if signs != last.0 {
            last = (signs, Instant::now());
        } else if last.1.elapsed() >= how.stall_timeout {
            return Err(TransferError::Stalled {
                idle: how.stall_timeout,
                bytes_done: reader.shared.bytes.load(Ordering::Relaxed),
                bytes_total: how.size,
                storage: Some(role),
            });
        }
    }
}

/// Waits until more is copied; false when that is over. Never ends without a copy.
async fn further(copied: &mut Option<watch::Receiver<u64>>) -> bool {
    match copied {
        Some(copied) => copied.changed().await.is_ok(),
        None => std::future::pending().await,
    }
}

/// Runs `work` in a thread of its own, which may change what only concerns the thread.
fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<(Thread, oneshot::Receiver<T>)> {
    let (answer, answered) = oneshot::channel();
    let handle = thread::Builder::new()
        .name("digest".into())
        .spawn(move || {
            // Whoever asked may be gone.
            let _ = answer.send(work());
        })?;
    Ok((handle.thread().clone(), answered))
}

/// How modest: nice 10 gets about a tenth of what an equal would.
const MODEST: i32 = 10;

/// Lets the calling thread give way to others. On Linux the priority is a thread's own (setpriority(2)).
/// Where that is refused, it goes on as an equal.
fn be_modest() {
    let own = Some(gettid());
    if getpriority_process(own).is_ok_and(|nice| nice < MODEST) {
        let _advice_only = setpriority_process(own, MODEST);
    }
}

fn unreadable(role: Role, path: &AbsolutePath, e: io::Error) -> TransferError {
    if role == Role::Origin && is_absent(&e) {
        return TransferError::OriginMissing {
            path: path.to_string(),
        };
    }
    denied_or(role, "read", path, e)
}

pub(super) async fn rename_no_overwrite(
    own: Partial,
    to: &AbsolutePath,
) -> Result<(), TransferError> {
    let to = to.clone();
    blocking("rename", move || {
        remove_checkpoints(&own.checkpoints)?;
        let from = own.copy;
        match renameat2(
            AT_FDCWD,
            from.as_path(),
            AT_FDCWD,
            to.as_path(),
            RenameFlags::RENAME_NOREPLACE,
        ) {
            Ok(()) => {}
            Err(Errno::EEXIST) => unlink_second_name(&from, &to)?,
            // NFS and others know no such flag.
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => link_and_unlink(&from, &to)?,
            Err(Errno::ENOENT) if !from.as_path().exists() && to.as_path().exists() => {
                return Err(TransferError::DestinationExists {
                    path: to.to_string(),
                });
            }
            Err(e) => return Err(refused("rename", &to, e)),
        }
        // Only now does a power failure not undo it.
        let directory = to.parent();
        File::open(directory.as_path())
            .and_then(|d| d.sync_all())
            .map_err(|e| refused("fsync", &directory, e))
    })
    .await
}

/// The next best thing: as safe, though for a moment the file has both names.
fn link_and_unlink(from: &AbsolutePath, to: &AbsolutePath) -> Result<(), TransferError> {
    match fs::hard_link(from.as_path(), to.as_path()) {
        Ok(()) => fs::remove_file(from.as_path()).map_err(|e| refused("unlink", from, e)),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => unlink_second_name(from, to),
        // EPERM is how link(2) says that a file system has no hard links.
        Err(e)
            if matches!(
                e.raw_os_error().map(Errno::from_raw),
                Some(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS)
            ) =>
        {
            Err(TransferError::RenameUnsupported {
                path: to.to_string(),
            })
        }
        Err(e) => Err(refused("link", to, e)),
    }
}

/// After an interrupted [`link_and_unlink`], or one that NFS did but reported as failed, both names
/// are the same file: the rename is done but for the old name.
fn unlink_second_name(from: &AbsolutePath, to: &AbsolutePath) -> Result<(), TransferError> {
    let identity = |path: &AbsolutePath| {
        fs::symlink_metadata(path.as_path())
            .map(|m| (m.dev(), m.ino()))
            .map_err(|e| refused("stat", path, e))
    };
    if identity(from)? != identity(to)? {
        return Err(TransferError::DestinationExists {
            path: to.to_string(),
        });
    }
    fs::remove_file(from.as_path()).map_err(|e| refused("unlink", from, e))
}

pub(super) async fn remove(partial: Partial) -> Result<(), TransferError> {
    blocking("unlink", move || {
        present(fs::remove_file(partial.copy.as_path()))
            .map_err(|e| refused("unlink", &partial.copy, e))?;
        remove_checkpoints(&partial.checkpoints)
    })
    .await
}

/// Removes a directory of checkpoints, if it is there, and nothing in it that is not one.
fn remove_checkpoints(directory: &AbsolutePath) -> Result<(), TransferError> {
    let removing = || -> io::Result<()> {
        for entry in fs::read_dir(directory.as_path())? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b"bbcp.") {
                fs::remove_file(entry.path())?;
            }
        }
        fs::remove_dir(directory.as_path())
    };
    present(removing()).map_err(|e| refused("unlink", directory, e))
}

/// What is not there need not be removed.
fn present(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if is_absent(&e) => Ok(()),
        removed => removed,
    }
}

pub(super) async fn begin_partial(
    earlier: Option<Partial>,
    own: Partial,
) -> Result<u64, TransferError> {
    blocking("adopt", move || {
        adopt(earlier.as_ref(), &own).map_err(|e| refused("adopt", &own.copy, e))
    })
    .await
}

/// The copy itself last: what an interruption leaves is no copy with its checkpoint, and not used.
fn adopt(earlier: Option<&Partial>, own: &Partial) -> io::Result<u64> {
    let earlier = earlier.filter(|earlier| earlier.copy.as_path().is_file());
    if let Some(earlier) = earlier
        && earlier.checkpoints.as_path().is_dir()
    {
        fs::rename(earlier.checkpoints.as_path(), own.checkpoints.as_path())?;
        let (before, now) = (earlier.name.to_string(), own.name.to_string());
        for entry in fs::read_dir(own.checkpoints.as_path())? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(&before)) {
                let renamed = own.checkpoints.as_path().join(format!("{stem}{now}"));
                fs::rename(entry.path(), renamed)?;
            }
        }
    }
    fs::create_dir_all(own.checkpoints.as_path())?;
    match earlier {
        None => Ok(0),
        Some(earlier) => {
            fs::rename(earlier.copy.as_path(), own.copy.as_path())?;
            Ok(fs::metadata(own.copy.as_path())?.len())
        }
    }
}

pub(super) async fn temporaries(
    directory: &AbsolutePath,
    transfer_id: i64,
) -> Result<Vec<TemporaryName>, TransferError> {
    let directory = directory.clone();
    blocking("list", move || {
        let entries = match fs::read_dir(directory.as_path()) {
            Ok(entries) => entries,
            Err(e) if is_absent(&e) => return Ok(Vec::new()),
            Err(e) => return Err(refused("list", &directory, e)),
        };
        Ok(entries
            .flatten()
            .filter_map(|entry| TemporaryName::of_entry(entry.file_name().to_str()?))
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
    use super::*;

    #[test]
    fn modesty_is_the_threads_own() {
        let nice = || getpriority_process(Some(gettid())).unwrap();
        let before = nice();
        let of_thread = thread::spawn(move || {
            be_modest();
            nice()
        });
        assert_eq!(of_thread.join().unwrap(), before.max(MODEST));
        assert_eq!(nice(), before);
    }

    /// Where the kernel cannot rename without overwriting.
    #[test]
    fn linking_is_as_safe() {
        let directory = tempfile::tempdir().unwrap();
        let path =
            |name: &str| AbsolutePath::new(directory.path().join(name).to_str().unwrap()).unwrap();
        let (from, to) = (path("from"), path("to"));
        fs::write(from.as_path(), "new").unwrap();
        link_and_unlink(&from, &to).unwrap();
        assert!(!from.as_path().exists());

        fs::write(from.as_path(), "newer").unwrap();
        let error = link_and_unlink(&from, &to).unwrap_err();
        assert_eq!(error.code(), "destination_exists");
        assert_eq!(fs::read(to.as_path()).unwrap(), b"new");
        assert_eq!(fs::read(from.as_path()).unwrap(), b"newer");
    }
}
