//! Errors of the program.

use std::io;

use nix::errno::Errno;

/// Exit code where a long link is impossible, so that tests are skipped rather than failed.
pub(crate) const UNAVAILABLE: u8 = 77;

/// Failure of a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// This machine or user cannot have a long link
    #[error("no long link is possible here: {0}")]
    Unavailable(String),
    /// The link has refused a request
    #[error("{0}")]
    Refused(String),
    /// The system has refused an operation
    #[error("cannot {task}")]
    System {
        task: String,
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Exit code of the program.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Unavailable(_) => UNAVAILABLE,
            Self::Refused(_) => 2,
            Self::System { .. } => 1,
        }
    }
}

/// Adds the task to an error of the system.
pub(crate) fn during<E: Into<io::Error>>(task: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |error| Error::System {
        task: task.into(),
        source: error.into(),
    }
}

/// Distinguishes a missing permission, which a test environment may lack, from other errors.
pub(crate) fn permission(task: &str) -> impl FnOnce(Errno) -> Error {
    move |errno| match errno {
        Errno::EPERM | Errno::EACCES | Errno::ENOSYS | Errno::ENOSPC => {
            Error::Unavailable(format!("may not {task} ({})", errno.desc()))
        }
        other => during(task)(other),
    }
}
