//! The target file: permission to write it, start offset, and treatment after the copy.
//!
//! While it grows it has its final name and mode 0200. A checkpoint (`-a`) is a file in the checkpoint directory that
//! describes the source of a partial target; the content of the partial target is never checked.

use crate::console;
use crate::failure::Failure;
use crate::options::{Flush, Preserve};
use crate::wire::{Job, Offer};
use nix::sys::statvfs::statvfs;
use nix::unistd::{User, geteuid};
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Mode of a file that is being written.
const WRITING_MODE: u32 = 0o200;

/// Decision about one source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Copy from this offset on.
    Copy(u64),
    /// Do not change the target.
    Skip,
}

/// One target file.
pub(crate) struct Target<'a> {
    job: &'a Job,
    /// Path as shown in messages
    pub(crate) shown: String,
    /// Path on this machine
    pub(crate) place: PathBuf,
    checkpoint: Option<PathBuf>,
}

/// Checks the target's directory, once for all files.
///
/// # Errors
/// Code 2, with the texts of the real program.
pub(crate) fn check_directory(job: &Job) -> Result<(), Failure> {
    let shown = &job.target.path;
    let place = Path::new(&job.target.place);
    if statvfs(&first_component(place)).is_err() {
        return Err(Failure::new(
            2,
            format!("Target directory {shown} is not in a known file system"),
        ));
    }
    if job.into_directory && job.options.make_directory && !place.exists() {
        // A failure is detected below as a missing directory.
        let _ = fs::create_dir(place);
        let _ = fs::set_permissions(place, Permissions::from_mode(job.options.directory_mode));
    }
    if !place.is_dir() && fs::metadata(parent(place)).is_err() {
        return Err(Failure::new(
            2,
            format!("Target directory {shown} not found"),
        ));
    }
    Ok(())
}

/// Checks that the target of several sources is a directory.
///
/// # Errors
/// Codes 2 and 20.
pub(crate) fn check_is_directory(job: &Job) -> Result<(), Failure> {
    let shown = &job.target.path;
    let place = Path::new(&job.target.place);
    if !job.into_directory || place.is_dir() {
        Ok(())
    } else if place.exists() {
        Err(Failure::new(
            20,
            format!("Target {shown} is not a directory."),
        ))
    } else {
        Err(Failure::new(
            2,
            format!("Target directory {shown} not found."),
        ))
    }
}

/// Checks the space on the file system of the *first component* of the target's path, as the original does.
///
/// # Errors
/// Code 28.
pub(crate) fn check_space(job: &Job, bytes: u64, files: u64) -> Result<(), Failure> {
    if job.options.skip_space_check {
        return Ok(());
    }
    let Ok(space) = statvfs(&first_component(Path::new(&job.target.place))) else {
        return Ok(());
    };
    let free = space.block_size().saturating_mul(space.blocks_available());
    let counts_files = space.files() > 0;
    if free > bytes && (!counts_files || space.files_available() > files) {
        return Ok(());
    }
    let from = job.sources.first().map_or("", |source| source.host_name());
    Err(Failure::new(
        28,
        format!("Insufficient space to copy all the files from {from}"),
    ))
}

impl<'a> Target<'a> {
    /// Creates the target of a source file.
    pub(crate) fn of(job: &'a Job, offer: &Offer) -> Result<Self, Failure> {
        let base = Path::new(&job.target.place);
        let (shown, place) = if base.is_dir() {
            (
                format!("{}/{}", job.target.path.trim_end_matches('/'), offer.name),
                base.join(&offer.name),
            )
        } else {
            (job.target.path.clone(), base.to_owned())
        };
        let checkpoint = match &job.options.append {
            Some(append) => Some(
                checkpoint_directory(append.directory.as_deref())?.join(format!(
                    "bbcp.{}.{:x}.{}",
                    job.peer_of_sink(),
                    identity(parent(&place)).unwrap_or_default(),
                    place.file_name().unwrap_or_default().to_string_lossy()
                )),
            ),
            None => None,
        };
        Ok(Self {
            job,
            shown,
            place,
            checkpoint,
        })
    }

    /// Decides about an existing target.
    ///
    /// # Errors
    /// Code 22: it exists, or cannot be appended to. Code 1: it is not a regular file.
    pub(crate) fn decide(&self, offer: &Offer) -> Result<Decision, Failure> {
        let options = &self.job.options;
        let Ok(there) = fs::metadata(&self.place) else {
            return Ok(Decision::Copy(0));
        };
        if !there.is_file() {
            let from = self
                .job
                .sources
                .first()
                .map_or("", |source| source.host_name());
            return Err(Failure {
                code: 1,
                lines: vec![
                    "Invalid file offset - -1".to_owned(),
                    format!("get from {from} failed to create {}", self.shown),
                ],
            });
        }
        if let Some(checkpoint) = &self.checkpoint {
            return self.decide_append(offer, there.len(), checkpoint);
        }
        if options.force {
            Ok(Decision::Copy(0))
        } else if options.omit {
            if options.verbose {
                console::message(&format!("Skipping {} already exists.", self.shown));
            }
            Ok(Decision::Skip)
        } else {
            Err(Failure::new(
                22,
                format!("File {} already exists.", self.shown),
            ))
        }
    }

    fn decide_append(
        &self,
        offer: &Offer,
        size: u64,
        checkpoint: &Path,
    ) -> Result<Decision, Failure> {
        let force = self.job.options.force;
        let shown = &self.shown;
        if checkpoint.exists() {
            let kept = fs::read_to_string(checkpoint).unwrap_or_default();
            if same_source(&kept, offer) {
                if size == offer.size {
                    console::message(&format!(
                        "File {shown} copy appears to have completed; finalizing copy now."
                    ));
                    self.succeed(offer);
                    return Ok(Decision::Skip);
                }
                if self.job.options.verbose {
                    console::message(&format!("Will try to complete copying {shown}"));
                }
                return Ok(Decision::Copy(if force { 0 } else { size }));
            }
            let changed = Failure {
                code: 22,
                lines: vec![
                    format!(
                        "Source file ' {} ' on {} appears to have changed after the previous copy ended.",
                        offer.name,
                        self.job.peer_of_sink()
                    ),
                    format!(
                        "Cannot append to  {}",
                        self.place.file_name().unwrap_or_default().to_string_lossy()
                    ),
                ],
            };
            if !force {
                return Err(changed);
            }
            console::failure(&changed);
        } else if size == offer.size {
            console::message(&format!(
                "File {shown} appears to have already been copied; copy skipped."
            ));
            self.succeed(offer);
            return Ok(Decision::Skip);
        }
        let changed = format!("File {shown} changed since the copy completed;");
        if force {
            console::message(&format!("{changed} copy restarting."));
            Ok(Decision::Copy(0))
        } else {
            Err(Failure::new(22, format!("{changed} append not possible.")))
        }
    }

    /// Opens the target for writing at the offset. `-f` unlinks first: after a later failure the old file is lost, and
    /// a target that is its own source is deleted.
    ///
    /// # Errors
    /// The checkpoint cannot be written (256 − errno), or the target cannot be opened (errno).
    pub(crate) fn open(&self, offer: &Offer, offset: u64) -> Result<File, Failure> {
        let options = &self.job.options;
        let mut how = OpenOptions::new();
        how.write(true).mode(WRITING_MODE);
        if options.force {
            if !options.truncate {
                let _ = fs::remove_file(&self.place);
            }
            how.create(true).truncate(true);
        } else if let Some(checkpoint) = &self.checkpoint {
            write_checkpoint(checkpoint, offer)?;
            how.create(offset == 0);
        } else {
            how.create_new(true);
        }
        let opening = |error: io::Error| Failure::system(&error, "opening", &self.shown);
        let mut file = how.open(&self.place).map_err(opening)?;
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(opening)?;
        }
        Ok(file)
    }

    /// Checks that the file exists and has the right size. Flushes the file if `-y` asks for it, and closes it.
    ///
    /// # Errors
    /// Codes 2 and 29, or the errno of the flush.
    pub(crate) fn close(&self, file: File, offer: &Offer) -> Result<(), Failure> {
        let flushing = |error: io::Error| Failure::system(&error, "closing", &self.shown);
        if self.job.options.flush != Flush::Nothing {
            file.sync_all().map_err(flushing)?;
        }
        if self.job.options.flush == Flush::FileAndDirectory {
            File::open(parent(&self.place))
                .and_then(|directory| directory.sync_all())
                .map_err(flushing)?;
        }
        drop(file);
        let there = fs::metadata(&self.place)
            .map_err(|error| Failure::system(&error, "finding", &self.shown))?;
        let what = match there.len().cmp(&offer.size) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Less => "Not all",
            std::cmp::Ordering::Greater => "Too much",
        };
        Err(Failure::new(
            29,
            format!("{what} data was transfered for {}", self.shown),
        ))
    }

    /// Sets the mode of a finished target and, if requested, the source's attributes; removes the checkpoint. A failure
    /// to set them is only a warning.
    pub(crate) fn succeed(&self, offer: &Offer) {
        let preserve = self.job.options.preserve;
        let warn = |act: &str, error: &io::Error| {
            console::failure(&Failure::system(error, act, &self.shown));
        };
        if preserve != Preserve::Nothing
            && let Err(error) = set_times(&self.place, offer)
        {
            warn("setting time on", &error);
        }
        let mode = if preserve == Preserve::Everything {
            offer.mode
        } else {
            self.job.mode
        };
        if let Err(error) = fs::set_permissions(&self.place, Permissions::from_mode(mode)) {
            warn("setting mode on", &error);
        }
        if preserve == Preserve::Everything {
            let _ = chown(&self.place, None, Some(offer.group));
        }
        self.forget_checkpoint();
    }

    /// Removes the file of a failed copy, unless it has to be kept.
    pub(crate) fn fail(&self) {
        if !self.job.options.keeps_failed_target() {
            let _ = fs::remove_file(&self.place);
            self.forget_checkpoint();
        }
    }

    fn forget_checkpoint(&self) {
        if let Some(checkpoint) = &self.checkpoint {
            let _ = fs::remove_file(checkpoint);
        }
    }
}

/// Identity of a file as bbcp uses it: the device in the upper half, the inode in the lower.
fn identity(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| identity_of(&metadata))
}

/// Identity from a file's metadata, see [`identity`].
pub(crate) fn identity_of(metadata: &fs::Metadata) -> u64 {
    (metadata.dev() << 32) | metadata.ino()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// `/d` of `/d/a/b`, `d` of `d/a`.
fn first_component(path: &Path) -> PathBuf {
    let parts = if path.is_absolute() { 2 } else { 1 };
    path.components().take(parts).collect()
}

fn checkpoint_directory(given: Option<&str>) -> Result<PathBuf, Failure> {
    if let Some(directory) = given {
        return Ok(directory.into());
    }
    // The home directory of the account, as in the original: $HOME is ignored.
    let home = User::from_uid(geteuid())
        .ok()
        .flatten()
        .map_or_else(|| PathBuf::from("/"), |user| user.dir);
    let directory = home.join(".bbcp");
    match fs::create_dir(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Failure::system(
            &error,
            "creating restart directory",
            &directory.to_string_lossy(),
        )
        .with_code(100)),
        _ => Ok(directory),
    }
}

/// Writes one line: sequence, type, identity, mode, size, access time, modification time, group, name.
fn write_checkpoint(checkpoint: &Path, offer: &Offer) -> Result<(), Failure> {
    let Offer {
        identity,
        mode,
        size,
        accessed,
        modified,
        group,
        name,
        ..
    } = offer;
    let line = format!("0 f {identity} {mode:o} {size} {accessed:x} {modified:x} {group} {name}\n");
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(checkpoint)
        .and_then(|mut file| io::Write::write_all(&mut file, line.as_bytes()))
        .map_err(|error| {
            Failure::system(&error, "opening", &checkpoint.to_string_lossy()).negative()
        })
}

/// Returns true if a checkpoint belongs to this source: identity, size, modification time and name are equal.
fn same_source(checkpoint: &str, offer: &Offer) -> bool {
    let fields: Vec<&str> = checkpoint.trim_end_matches('\n').splitn(9, ' ').collect();
    let [_, _, identity, _, size, _, modified, _, name] = fields.as_slice() else {
        return false;
    };
    *identity == offer.identity.to_string()
        && *size == offer.size.to_string()
        && *modified == format!("{:x}", offer.modified)
        && *name == offer.name
}

fn set_times(path: &Path, offer: &Offer) -> io::Result<()> {
    let time = |seconds: i64| -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
    };
    let times = FileTimes::new()
        .set_accessed(time(offer.accessed))
        .set_modified(time(offer.modified));
    OpenOptions::new().write(true).open(path)?.set_times(times)
}
