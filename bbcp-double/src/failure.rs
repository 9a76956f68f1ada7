//! Failure of a process of the double: an exit code, and the lines with the reason.

use nix::errno::Errno;
use std::io;

/// Exit code for wrong use of the double by a test.
pub(crate) const MISUSE: u8 = 99;

/// Exit code of a side without a data connection.
const UNCONNECTED: u8 = 2;

/// Failed end of a process. The lines do not contain `bbcp: ` yet; it is added when they are printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code, as the shell sees it.
    pub(crate) code: u8,
    /// Messages for standard error, in order.
    pub(crate) lines: Vec<String>,
}

impl Failure {
    /// Creates a failure with one line.
    pub(crate) fn new(code: u8, line: impl Into<String>) -> Self {
        Self {
            code,
            lines: vec![line.into()],
        }
    }

    /// Creates a failure without a line, for example when the other side has printed the reason.
    pub(crate) fn silent(code: u8) -> Self {
        Self {
            code,
            lines: Vec::new(),
        }
    }

    /// Creates a failure from a system error, in bbcp's wording: `No space left on device writing /d/x`. The code is
    /// the errno.
    pub(crate) fn system(error: &io::Error, doing: &str, path: &str) -> Self {
        let errno = error.raw_os_error().unwrap_or(5);
        Self::new(
            u8::try_from(errno).unwrap_or(255),
            format!("{} {doing} {path}", errno_text(error)),
        )
    }

    /// Creates the failure of a side that nothing has connected to.
    pub(crate) fn accept_timeout(port: u16, streams: u64) -> Self {
        Self::unconnected(format!("Accept timed out on port {port}"), streams)
    }

    /// Creates the failure of a side without a data connection, with its reason.
    pub(crate) fn unconnected(reason: String, streams: u64) -> Self {
        let consequence = format!("Unable to allocate more than 0 of {streams} data streams.");
        Self {
            code: UNCONNECTED,
            lines: vec![reason, consequence],
        }
    }

    /// Returns the same failure with another code.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Returns the same failure with the code 256 − code: bbcp returns many of its errnos as negative numbers.
    pub(crate) fn negative(mut self) -> Self {
        self.code = 0_u8.wrapping_sub(self.code);
        self
    }
}

/// Text of an error as from `strerror`, without Rust's `(os error N)`.
pub(crate) fn errno_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => Errno::from_raw(errno).desc().to_owned(),
        None => error.to_string(),
    }
}
