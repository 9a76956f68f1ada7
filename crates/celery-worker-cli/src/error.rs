//! Errors of the process, and its exit codes.

use celery_worker::broker::BrokerError;
use celery_worker::worker::WorkerError;
use service_connection::error_chain::chain;

use crate::http::BindError;
use crate::metrics;
use crate::settings::{self, SettingsError};

/// Exit codes of the process.
pub mod exit_code {
    /// An operation failed.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// The settings are invalid.
    pub const SETTINGS: u8 = 4;
    /// A server cannot be reached.
    pub const UNREACHABLE: u8 = 5;
    /// The operation is not allowed in the current state of the system.
    pub const REFUSED: u8 = 6;
}

/// Failure of the process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The settings are invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The broker reported a failure, or cannot be reached.
    #[error(transparent)]
    Broker(BrokerError),
    /// A setting of the broker has to change.
    #[error("{key}")]
    BrokerSetting {
        /// Key of the setting.
        key: &'static str,
        /// Error of the broker that names the option of the library.
        source: BrokerError,
    },
    /// The HTTP server cannot listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A metric cannot be registered.
    #[error("metrics")]
    Metrics(#[from] metrics::Error),
    /// The tasks of the worker cannot be created.
    #[error("cannot create the tasks")]
    Tasks(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// A setting cannot be used.
    #[error("{0}")]
    Configuration(String),
    /// A server cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The operation is not allowed in the current state of the system.
    #[error("{0}")]
    Refused(String),
    /// An operation failed.
    #[error("{0}")]
    Failed(String),
}

impl ProcessError {
    /// The exit code, one of [`exit_code`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Bind(_) | Self::Metrics(_) | Self::Tasks(_) => {
                exit_code::FAILED
            }
            Self::Usage(_) => exit_code::USAGE,
            Self::Settings(_) | Self::Configuration(_) | Self::Broker(BrokerError::Url(_)) => {
                exit_code::SETTINGS
            }
            Self::Broker(_) | Self::BrokerSetting { .. } | Self::Unreachable(_) => {
                exit_code::UNREACHABLE
            }
            Self::Refused(_) => exit_code::REFUSED,
        }
    }
}

impl From<BrokerError> for ProcessError {
    fn from(error: BrokerError) -> Self {
        let option = match &error {
            BrokerError::Tls { option, .. } | BrokerError::GivenUp { option, .. } => option,
            _ => return Self::Broker(error),
        };
        match settings::key_of_broker_option(option) {
            Some(key) => Self::BrokerSetting { key, source: error },
            None => Self::Broker(error),
        }
    }
}

impl From<WorkerError> for ProcessError {
    fn from(error: WorkerError) -> Self {
        match error {
            WorkerError::Broker(error) => error.into(),
            WorkerError::StateFile { path, source } => Self::Configuration(format!(
                "--statedb: {} cannot be used: {source}; name a file in a directory that the worker can write",
                path.display()
            )),
            error => Self::Failed(chain(&error).to_string()),
        }
    }
}

/// An error of a start that may be repeated.
pub trait StartError: std::error::Error + From<ProcessError> {
    /// Returns true if a server could not be reached, so that the operation may succeed later.
    fn is_unreachable(&self) -> bool;
}

impl StartError for ProcessError {
    fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Broker(
                BrokerError::Unreachable { .. }
                    | BrokerError::Timeout { .. }
                    | BrokerError::Blocked { .. }
            ) | Self::Unreachable(_)
        )
    }
}
