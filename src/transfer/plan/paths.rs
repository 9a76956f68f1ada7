//! Paths of a package at both ends.

use super::Package;
use crate::transfer::endpoint::{AbsolutePath, TemporaryName};
use crate::transfer::failures::{Role, TransferError};

/// Maximum length of a path.
#[derive(Clone, Copy)]
pub(super) struct PathLimit {
    bytes: usize,
    /// Text about a longer path.
    problem: &'static str,
}

/// bbcp's sink crashes on directory paths above 1023 bytes.
pub(super) const TARGET_LIMIT: PathLimit = PathLimit {
    bytes: 999,
    problem: "it is longer than bbcp allows (999 bytes at the destination)",
};

/// bbcp's source truncates its records above about 2400 bytes.
pub(super) const SOURCE_LIMIT: PathLimit = PathLimit {
    bytes: 1999,
    problem: "it is longer than bbcp allows (1999 bytes at the origin)",
};

pub(super) fn file_path(
    role: Role,
    root: &str,
    package: &Package,
    maximum: PathLimit,
) -> Result<AbsolutePath, TransferError> {
    let bad = |path: &str, problem| TransferError::BadPath {
        role,
        path: path.into(),
        problem,
    };
    let name = package.file_name.as_str();
    if name.is_empty() || name == "." || name.contains('/') {
        return Err(bad(name, "a file name is one component"));
    }
    if TemporaryName::of_entry(name).is_some() {
        return Err(bad(
            name,
            "it has the form of this worker's temporary names",
        ));
    }
    let relative = package.relative_path.as_str();
    if relative.starts_with('/') {
        return Err(bad(relative, "it must be relative to the location"));
    }
    let beneath = checked_path(role, root)?
        .join(relative)
        .map_err(|problem| bad(relative, problem))?;
    let names_the_file = relative.trim_end_matches('/').rsplit('/').next() == Some(name);
    let path = if names_the_file {
        beneath
    } else {
        beneath.join(name).map_err(|problem| bad(name, problem))?
    };
    limit(role, &path, maximum)?;
    Ok(path)
}

pub(in crate::transfer) fn checked_path(
    role: Role,
    path: &str,
) -> Result<AbsolutePath, TransferError> {
    AbsolutePath::new(path).map_err(|problem| TransferError::BadPath {
        role,
        path: path.into(),
        problem,
    })
}

/// Returns true if bbcp can keep its checkpoints in the directory. bbcp passes the directory to its other end in a line
/// that is split at blanks. It appends a file name with a host and our temporary name, and the result must not become
/// too long.
pub(super) fn can_hold_checkpoints(directory: &AbsolutePath) -> bool {
    const MAX_BYTES: usize = 640;
    let text = directory.as_str();
    text.len() <= MAX_BYTES && !text.contains(char::is_whitespace)
}

/// Refuses a path that is longer than `maximum`.
pub(super) fn limit(
    role: Role,
    path: &AbsolutePath,
    maximum: PathLimit,
) -> Result<(), TransferError> {
    if path.as_str().len() > maximum.bytes {
        return Err(TransferError::BadPath {
            role,
            path: path.to_string(),
            problem: maximum.problem,
        });
    }
    Ok(())
}
