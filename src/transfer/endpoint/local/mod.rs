//! An end on this host.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, eaccess};
use rustix::fs::{Mode, OFlags};
use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::gettid;
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, interval, timeout};
use uuid::Uuid;

use self::directory::{Directory, is_regular, not_plain};
use super::{
    AbsolutePath, DigestResult, Facts, FileKind, FileTime, Links, ReadOptions, RootProblem, storage,
};
use crate::transfer::digest::{self, FileDigest, FileHasher};
use crate::transfer::failures::{Role, THIS_HOST, TransferError};

pub(in crate::transfer) mod directory;
pub(super) mod partial;

/// Maximum lead of a reader over the copy that it follows, in bytes: large enough that neither waits for the other,
/// small enough that the page cache still has the bytes that either has read.
const MAX_LEAD_BYTES: u64 = 256 << 20;

/// Time limit of every operation but the digest.
const OPERATION_LIMIT: Duration = Duration::from_secs(60);

/// Number of stall checks per stall time-out.
const POLLS: u32 = 4;

/// Runs `work` in a thread for blocking calls, for at most [`OPERATION_LIMIT`].
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
            host: THIS_HOST.into(),
            limit: OPERATION_LIMIT,
        }),
    }
}

pub(super) async fn stat(
    role: Role,
    path: &AbsolutePath,
    links: Links,
) -> Result<Option<Facts>, TransferError> {
    let path = path.clone();
    blocking("stat", move || {
        let found = match links {
            Links::Follow => fs::metadata(path.as_path()),
            Links::Refuse => fs::symlink_metadata(path.as_path()),
        };
        match found {
            Ok(metadata) => Ok(Some(facts(path.as_path(), &metadata))),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(storage_error(role, "stat", &path, e)),
        }
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
        modified: modified(metadata),
        changed: FileTime::new(metadata.ctime(), metadata.ctime_nsec()),
        identity: Some((metadata.dev(), metadata.ino())),
        names: Some(metadata.nlink()),
        boot: boot(),
    }
}

/// Time of the last change of a file's content.
fn modified(metadata: &fs::Metadata) -> Option<FileTime> {
    FileTime::new(metadata.mtime(), metadata.mtime_nsec())
}

/// Boot id of the running kernel, unique to this host.
fn boot() -> Option<Uuid> {
    static BOOT: OnceLock<Option<Uuid>> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        text.trim().parse().ok()
    })
}

fn is_absent(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Converts an error of the system: missing permission and full storage have errors of their own, all others become
/// [`TransferError::Storage`].
fn storage_error(
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

/// Same as [`storage_error`], for the destination.
pub(in crate::transfer) fn refused(
    operation: &'static str,
    path: &AbsolutePath,
    e: impl Into<io::Error>,
) -> TransferError {
    storage_error(Role::Destination, operation, path, e.into())
}

pub(super) async fn root_problem(
    root: &AbsolutePath,
) -> Result<Option<RootProblem>, TransferError> {
    let root = root.clone();
    let unusable = |problem: &str| RootProblem::Unusable(problem.to_owned());
    blocking("stat", move || {
        let problem = match Directory::open(root.as_path()) {
            Err(e) if is_absent(&e) => Some(unusable("does not exist")),
            Err(e) => Some(unusable(&format!("cannot be opened ({e})"))),
            Ok(_) if eaccess(root.as_path(), AccessFlags::X_OK).is_err() => {
                Some(unusable("cannot be entered"))
            }
            // An error here means that the directory cannot be listed; it is then not known to be empty.
            Ok(directory) if directory.is_empty().unwrap_or(false) => Some(RootProblem::Empty),
            Ok(_) => None,
        };
        Ok(problem)
    })
    .await
}

/// Writes a file and the entries of directories to the disk (fsync).
pub(super) async fn make_durable(
    path: &AbsolutePath,
    directories: Vec<AbsolutePath>,
) -> Result<(), TransferError> {
    let path = path.clone();
    blocking("fsync", move || {
        File::open(path.as_path())
            .and_then(|file| file.sync_all())
            .map_err(|e| refused("fsync", &path, e))?;
        sync_directories(&directories)
    })
    .await
}

fn sync_directories(directories: &[AbsolutePath]) -> Result<(), TransferError> {
    for directory in directories {
        Directory::open(directory.as_path())
            .and_then(Directory::sync)
            .map_err(|e| refused("fsync", directory, e))?;
    }
    Ok(())
}

pub(super) async fn ensure_directory(
    root: &AbsolutePath,
    directory: &AbsolutePath,
) -> Result<u64, TransferError> {
    let (root, directory) = (root.clone(), directory.clone());
    blocking("mkdir", move || {
        if !root.as_path().is_dir() {
            return Err(TransferError::DestinationRootMissing {
                path: root.to_string(),
            });
        }
        create_below(&root, &directory).map_err(|e| refused("mkdir", &directory, e))?;
        eaccess(directory.as_path(), AccessFlags::W_OK | AccessFlags::X_OK)
            .map_err(|e| refused("access", &directory, e))?;
        available(&directory)
    })
    .await
}

/// Makes the directories between `root` and `directory`, and `directory` itself.
fn create_below(root: &AbsolutePath, directory: &AbsolutePath) -> io::Result<()> {
    let below = directory.as_path().strip_prefix(root.as_path());
    let mut at = Directory::open(root.as_path())?;
    for name in below.map_err(io::Error::other)? {
        // Paths consist of text, so no character is lost.
        at = at.enter_or_make(&name.to_string_lossy())?;
    }
    Ok(())
}

pub(super) async fn free_space(directory: &AbsolutePath) -> Result<u64, TransferError> {
    let directory = directory.clone();
    blocking("statvfs", move || available(&directory)).await
}

/// Bytes available to this user in a directory.
fn available(directory: &AbsolutePath) -> Result<u64, TransferError> {
    let found = statvfs(directory.as_path()).map_err(|e| refused("statvfs", directory, e))?;
    Ok(found.blocks_available() * found.fragment_size())
}

/// State shared by the reading thread and the task that waits for its digest.
#[derive(Default)]
struct Shared {
    /// Number of bytes read.
    bytes: AtomicU64,
    /// Sign-of-life counter: grows while the thread reads or waits for the copy.
    signs: AtomicU64,
    /// True if the digest is no longer needed.
    stop: AtomicBool,
}

impl Shared {
    /// Records progress. Returns false if the thread has to stop.
    fn sign(&self, bytes: u64) -> bool {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.signs.fetch_add(1, Ordering::Relaxed);
        !self.stop.load(Ordering::Relaxed)
    }

    /// Reads a file to its end; runs in its own thread. If the copy that it follows holds it back, the thread sleeps
    /// until the copy wakes it, and records progress at each poll.
    fn read(
        &self,
        role: Role,
        path: &Path,
        links: Links,
        options: ReadOptions<'_>,
    ) -> io::Result<FileDigest> {
        let behind = options.behind;
        let block_bytes = digest::block_bytes(options.size);
        let hasher = match options.blocks {
            Some(blocks) => FileHasher::after(&blocks.known, options.algorithm, block_bytes),
            None => FileHasher::new(
                options.algorithm,
                options.with_blocks.then_some(block_bytes),
            ),
        };
        // A copy at memory speed needs all processors, so a reader beside a copy uses only what the copy leaves. The
        // rest of the file is read after the copy, at the same time as the other end.
        if behind.is_some() {
            lower_priority();
        }
        let growth = behind
            .filter(|_| options.is_growing)
            .map(|copied| Growth::new(self, copied));
        let mut file = match &growth {
            Some(growth) => growth.open(path, links)?,
            None => open(path, links)?,
        };
        // Read data that was just written from the disk, not from the page cache.
        if role == Role::Destination && growth.is_none() {
            let _advice_only = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        file.seek(SeekFrom::Start(hasher.start()))?;
        let missing = options.size.saturating_sub(hasher.start());
        // The digest of bytes that a later error of the disk loses must not be recorded.
        let written = match role {
            Role::Destination => options.blocks.map(|_| file.try_clone()).transpose()?,
            Role::Origin => None,
        };
        let reader = GrowingFile {
            file,
            growth,
            missing,
        };
        let go_on = |bytes| {
            let is_too_far = |copied: &watch::Receiver<u64>| {
                copied.has_changed().is_ok()
                    && bytes > copied.borrow().saturating_add(MAX_LEAD_BYTES)
            };
            let mut is_wanted = self.sign(bytes);
            while is_wanted && behind.is_some_and(is_too_far) {
                thread::park_timeout(poll_interval(options.stall_timeout));
                is_wanted = self.sign(bytes);
            }
            is_wanted
        };
        hasher.read(reader, go_on, |block| {
            if let Some(file) = &written {
                file.sync_data()?;
            }
            if let Some(blocks) = options.blocks {
                blocks.read.send(block);
            }
            Ok(())
        })
    }
}

/// Maximum time between two looks at a file that grows.
const GROWTH_POLL: Duration = Duration::from_millis(200);

/// Waits of a reading thread for a file that a copy extends.
struct Growth<'a> {
    shared: &'a Shared,
    copied: &'a watch::Receiver<u64>,
}

impl<'a> Growth<'a> {
    fn new(shared: &'a Shared, copied: &'a watch::Receiver<u64>) -> Self {
        Self { shared, copied }
    }

    /// Returns true if the copy still runs.
    fn goes_on(&self) -> bool {
        self.copied.has_changed().is_ok()
    }

    /// Waits until there may be more. Fails if the digest is no longer needed.
    fn wait(&self) -> io::Result<()> {
        thread::park_timeout(GROWTH_POLL);
        match self.shared.sign(self.shared.bytes.load(Ordering::Relaxed)) {
            true => Ok(()),
            false => Err(io::Error::other("the digest is no longer needed")),
        }
    }

    /// Opens the file as soon as the copy has made it. bbcp withholds the permission to read a copy until it is complete.
    fn open(&self, path: &Path, links: Links) -> io::Result<File> {
        loop {
            let goes_on = self.goes_on();
            let denied = match open(path, links) {
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => allow_reading(path),
                opened => opened,
            };
            match denied {
                Err(e) if goes_on && is_absent(&e) => {}
                opened => return opened,
            }
            self.wait()?;
        }
    }
}

/// Permits this user to read a copy of ours, and opens it.
fn allow_reading(path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copy = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = copy.metadata()?;
    if !metadata.is_file() {
        return Err(not_plain(&path.to_string_lossy()));
    }
    // The path of the handle, so that it is the same file even if another one now has its name.
    let handle = format!("/proc/self/fd/{}", copy.as_raw_fd());
    let mut permissions = metadata.permissions();
    permissions.set_mode(permissions.mode() | 0o400);
    fs::set_permissions(&handle, permissions)?;
    File::open(handle)
}

/// A file that may still grow: reading waits at its present end.
struct GrowingFile<'a> {
    file: File,
    growth: Option<Growth<'a>>,
    /// Bytes until the expected end.
    missing: u64,
}

impl Read for GrowingFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let may_grow = self.missing > 0 && self.growth.as_ref().is_some_and(Growth::goes_on);
            let n = self.file.read(buffer)?;
            self.missing = self.missing.saturating_sub(n as u64);
            match &self.growth {
                Some(growth) if n == 0 && may_grow => growth.wait()?,
                _ => return Ok(n),
            }
        }
    }
}

/// The reading thread. Dropping this, with the future that waits for the digest, stops the thread.
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

/// Opens a file for reading.
fn open(path: &Path, links: Links) -> io::Result<File> {
    match links {
        Links::Follow => File::open(path),
        Links::Refuse => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty())?;
            if is_regular(&rustix::fs::fstat(&file)?) {
                Ok(file.into())
            } else {
                Err(not_plain(&path.to_string_lossy()))
            }
        }
    }
}

pub(super) async fn digest(
    role: Role,
    path: &AbsolutePath,
    links: Links,
    options: ReadOptions<'_>,
) -> DigestResult {
    let shared = Arc::<Shared>::default();
    let mut copied = options.behind.cloned();
    let (thread, mut digest) = run_in_thread({
        let (shared, path, behind) = (shared.clone(), path.clone(), copied.clone());
        let blocks = options.blocks.cloned();
        let options = ReadOptions {
            behind: None,
            blocks: None,
            ..options
        };
        move || {
            let options = ReadOptions {
                behind: behind.as_ref(),
                blocks: blocks.as_ref(),
                ..options
            };
            shared.read(role, path.as_path(), links, options)
        }
    })
    .map_err(|e| storage("read", role, path, e))?;
    let reader = Reader { shared, thread };
    let mut polls = interval(poll_interval(options.stall_timeout));
    let mut last = (0, Instant::now());
    loop {
        tokio::select! {
            // The channel closes when the thread ends for any reason.
            result = &mut digest => return match result {
                Ok(result) => result.map_err(|e| unreadable(role, path, e)),
                Err(_) => {
                    let broken = io::Error::other("the reader thread failed");
                    Err(storage("read", role, path, broken))
                }
            },
            going_on = wait_for_more(&mut copied) => {
                if !going_on {
                    copied = None;
                }
                reader.thread.unpark();
            }
            _ = polls.tick() => {}
        }
        let signs = reader.shared.signs.load(Ordering::Relaxed);
        if signs != last.0 {
            last = (signs, Instant::now());
        } else if last.1.elapsed() >= options.stall_timeout {
            return Err(TransferError::StalledStorage {
                idle: options.stall_timeout,
                bytes_done: reader.shared.bytes.load(Ordering::Relaxed),
                bytes_total: options.size,
                role,
            });
        }
    }
}

/// Interval between two stall checks.
fn poll_interval(stall_timeout: Duration) -> Duration {
    (stall_timeout / POLLS).max(Duration::from_millis(1))
}

/// Waits until more is copied. Returns false when the copy has ended. Without a copy it never returns.
async fn wait_for_more(copied: &mut Option<watch::Receiver<u64>>) -> bool {
    match copied {
        Some(copied) => copied.changed().await.is_ok(),
        None => std::future::pending().await,
    }
}

/// Runs `work` in a new thread, so that it may change attributes of its thread.
fn run_in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<(Thread, oneshot::Receiver<T>)> {
    let (answer, answered) = oneshot::channel();
    let handle = thread::Builder::new()
        .name("digest".into())
        .spawn(move || {
            // The receiver may be dropped already.
            let _ = answer.send(work());
        })?;
    Ok((handle.thread().clone(), answered))
}

/// Nice value of a reader beside a copy. A thread of nice 10 gets about a tenth of the processor time of a thread of
/// nice 0.
const READER_NICE: i32 = 10;

/// Lowers the CPU priority of the calling thread. On Linux each thread has its own priority (setpriority(2)). If the
/// system refuses the change, the priority stays.
fn lower_priority() {
    let own = Some(gettid());
    if getpriority_process(own).is_ok_and(|nice| nice < READER_NICE) {
        let _advice_only = setpriority_process(own, READER_NICE);
    }
}

/// Converts the failure of reading a file.
pub(in crate::transfer) fn unreadable(
    role: Role,
    path: &AbsolutePath,
    e: io::Error,
) -> TransferError {
    if role == Role::Origin && is_absent(&e) {
        return TransferError::OriginMissing {
            path: path.to_string(),
        };
    }
    storage_error(role, "read", path, e)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn reader_priority_applies_to_its_thread_only() {
        let nice = || getpriority_process(Some(gettid())).unwrap();
        let before = nice();
        let of_thread = thread::spawn(move || {
            lower_priority();
            nice()
        });
        assert_eq!(of_thread.join().unwrap(), before.max(READER_NICE));
        assert_eq!(nice(), before);
    }
}
