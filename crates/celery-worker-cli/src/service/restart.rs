//! Restart of the program in the same process, with the settings that are valid at that time.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use crate::error::ProcessError;
use crate::program::Process;
use crate::traces;
use service_connection::error_chain::chain;

/// End of a service: its process exits or restarts.
#[derive(Debug, Clone, Copy)]
#[must_use = "a restart takes place in `conclude`"]
pub enum End {
    /// The process exits with this status.
    Exit(ExitCode),
    /// The program starts again.
    Restart,
}

impl End {
    /// Returns the exit status, or restarts: the program file, which may be a newer version by now, replaces the
    /// process and keeps its process id, arguments and environment. The caller must close everything before.
    ///
    /// # Errors
    /// The program cannot be started.
    #[allow(clippy::disallowed_methods, reason = "replaces this process")]
    pub fn conclude(self, process: &Process) -> Result<ExitCode, ProcessError> {
        match self {
            Self::Exit(code) => Ok(code),
            Self::Restart => {
                let mut words = std::env::args_os();
                let program = words.next().unwrap_or_else(|| process.program.name.into());
                tracing::info!("program restarts");
                traces::close();
                let error = Command::new(&program).args(words).exec();
                Err(ProcessError::Failed(format!(
                    "cannot restart {}: {error}",
                    program.display()
                )))
            }
        }
    }
}

/// Returns true if the service can restart, because the current settings are valid. Otherwise logs the reason; the
/// service then continues with its old settings.
pub(super) fn is_possible(process: &Process) -> bool {
    match (process.reload)() {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(
                error = %chain(&error),
                "restart refused: the new settings are not valid; continuing with the old ones"
            );
            false
        }
    }
}
