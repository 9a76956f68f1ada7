//! HUP: the service starts itself anew, with the settings as they are then.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use super::{CliError, Context};
use crate::settings;
use service_connection::error_chain::chain;

/// How a service has ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// For good, with this status.
    Exit(ExitCode),
    /// To begin anew.
    Restart,
}

impl End {
    /// The exit status; or, in place of this process, the program as it is now on the disk, under the
    /// same id, with the same arguments and environment. To be called when everything is closed.
    ///
    /// # Errors
    /// That the program cannot be started.
    pub(super) fn conclude(self) -> Result<ExitCode, CliError> {
        match self {
            Self::Exit(code) => Ok(code),
            Self::Restart => {
                let mut words = std::env::args_os();
                let program = words.next().unwrap_or_else(|| "ccat-transfer".into());
                tracing::info!("starting anew");
                traces::close();
                let error = Command::new(&program).args(words).exec();
                Err(CliError::Failed(format!(
                    "cannot start {} anew: {error}",
                    program.display()
                )))
            }
        }
    }
}

/// Whether the settings, as they are now, would let the service start. If not, it is better to go
/// on with the old ones; the log says what is wrong.
pub(super) fn is_possible(context: &Context) -> bool {
    match settings::load(context.config.as_deref(), std::env::vars()) {
        Ok(_) => true,
        Err(error) => {
            tracing::error!(
                error = %chain(&error),
                "not starting anew, since the settings cannot be used; going on with the old ones"
            );
            false
        }
    }
}
