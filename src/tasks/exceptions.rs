//! Python exceptions for the failures of the domain; no other module knows their classes.

use crate::advice;
use crate::manager::ManagerError;
use crate::transfer::failures::{FailureKind, TransferError};
use celery_protocol::exception::Exception;

/// Module of the exceptions that the Python workers for these tasks raise.
pub const EXCEPTIONS: &str = "ccat_data_transfer.exceptions";

/// Class of the exception that a Celery caller gets for a failure.
pub(super) fn class_of(kind: FailureKind) -> &'static str {
    use FailureKind::*;
    match kind {
        OriginMissing | OriginNotAFile | Internal | UnknownTransfer | AlreadyFailed => {
            "DataTransferError"
        }
        OriginRootMissing
        | OriginUnreadable
        | DestinationRootMissing
        | DestinationDirectory
        | DestinationDenied
        | StorageLow
        | StorageFull
        | RenameUnsupported
        | StalledStorage
        | Storage
        | LogFile => "StorageError",
        OriginSize | OriginChanged | OriginCorrupt | DamagedInFlight | TargetSize | CopyChanged => {
            "DataCorruptionError"
        }
        ChecksumMismatch => "ChecksumVerificationError",
        DestinationExists | TemporaryExists => "DestinationFileExistsError",
        DestinationBusy | NotDue | LinkPaused | LinkFull | Held | Untracked | LeaseLost => {
            "ScheduleError"
        }
        SshDenied | HostKey | ProgramMissing | RemoteProgramMissing | BadOption
        | UnsupportedLocation | NoRoute | OtherMethod | BadHost | BadUser | BadPath
        | BothRemote | SamePlace | LinkSettings => "ConfigurationError",
        Network | DataPort | PortBusy | Stalled | TooSlow | Deadline | OperationTimeout => {
            "NetworkError"
        }
        RemoteDied | TimeLimit | ResumeRefused | Spawn | BbcpFailed => "BBCPError",
        Segfault => "SegmentationFaultError",
        Interrupted => "ServiceExit",
        Database => "DatabaseError",
    }
}

/// Returns the exception for a failed transfer.
pub(super) fn of_transfer(error: &TransferError) -> Exception {
    exception(class_of(error.kind()), advice::explanation(error))
}

/// Returns the exception for a pass of the manager that failed.
pub(super) fn of_manager(error: &ManagerError, text: String) -> Exception {
    let class = match error {
        ManagerError::Database(_) => "DatabaseError",
        ManagerError::Broker(_) => "ScheduleError",
    };
    exception(class, text)
}

/// Creates an exception of [`EXCEPTIONS`].
pub(super) fn exception(class: &str, message: impl Into<String>) -> Exception {
    Exception::new(EXCEPTIONS, class, message)
}
