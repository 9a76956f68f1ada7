//! Tables and columns that this program uses.

use entity::{
    data_location, data_transfer, data_transfer_log, data_transfer_package, data_transfer_route,
    disk_data_location, site, transfer_worker_action, transfer_worker_attempt,
    transfer_worker_delay, transfer_worker_digest, transfer_worker_lease, transfer_worker_link,
    transfer_worker_program, transfer_worker_schedule,
};
use sea_orm::sea_query::Iden;

use super::Difference;
use super::columns::{ColumnKind, LiveColumns};

/// Use of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ColumnUse {
    Integer,
    Text,
    /// Text or an enum type.
    Label,
    Time,
    Flag,
}

impl ColumnUse {
    fn description(self) -> &'static str {
        match self {
            Self::Integer => "an integer",
            Self::Text => "a text",
            Self::Label => "a text or an enum",
            Self::Time => "a date with time",
            Self::Flag => "a boolean",
        }
    }

    fn fits(self, kind: ColumnKind) -> bool {
        match self {
            Self::Integer => matches!(kind, ColumnKind::Number | ColumnKind::Any),
            Self::Text => matches!(kind, ColumnKind::Text | ColumnKind::Any),
            Self::Label => matches!(kind, ColumnKind::Text | ColumnKind::Enum | ColumnKind::Any),
            Self::Time => matches!(kind, ColumnKind::Time | ColumnKind::Any),
            Self::Flag => matches!(kind, ColumnKind::Flag | ColumnKind::Any),
        }
    }
}

/// Requirements for a table.
pub(super) struct TableRequirements {
    pub(super) table: String,
    columns: Vec<(String, ColumnUse)>,
    optional: Vec<(String, ColumnUse)>,
    /// Columns that the database fills itself, if this program inserts rows into the table; `None` if it does not. Any
    /// other column that needs a value and is unknown to this program is an error.
    generated: Option<Vec<String>>,
    /// True if the program works without the table.
    may_be_missing: bool,
}

impl TableRequirements {
    fn of<C: Iden>(table: impl Iden, columns: impl IntoIterator<Item = (C, ColumnUse)>) -> Self {
        Self {
            table: table.to_string(),
            columns: columns
                .into_iter()
                .map(|(column, usage)| (column.to_string(), usage))
                .collect(),
            optional: Vec::new(),
            generated: None,
            may_be_missing: false,
        }
    }

    fn optional<C: Iden>(mut self, columns: impl IntoIterator<Item = (C, ColumnUse)>) -> Self {
        self.optional.extend(
            columns
                .into_iter()
                .map(|(column, usage)| (column.to_string(), usage)),
        );
        self
    }

    fn inserted<C: Iden>(self, generated: impl IntoIterator<Item = C>) -> Self {
        let generated = generated.into_iter().map(|column| column.to_string());
        Self {
            generated: Some(generated.collect()),
            ..self
        }
    }

    pub(super) fn compare(&self, found: &LiveColumns) -> Vec<Difference> {
        let table = &self.table;
        if found.is_empty() && self.may_be_missing {
            return Vec::new();
        }
        if found.is_empty() {
            return vec![Difference::MissingTable {
                table: table.clone(),
            }];
        }
        let mut differences = Vec::new();
        let expected = self
            .columns
            .iter()
            .map(|(column, usage)| (column, *usage, true));
        let possible = self
            .optional
            .iter()
            .map(|(column, usage)| (column, *usage, false));
        for (column, usage, must_exist) in expected.chain(possible) {
            match found.get(column) {
                None if must_exist => differences.push(Difference::MissingColumn {
                    table: table.clone(),
                    column: column.clone(),
                }),
                Some(live) if !usage.fits(live.kind) => differences.push(Difference::WrongType {
                    table: table.clone(),
                    column: column.clone(),
                    found: live.type_name.clone(),
                    needed: usage.description(),
                }),
                _ => {}
            }
        }
        if let Some(generated) = &self.generated {
            differences.extend(self.unwritten_columns(found, generated));
        }
        differences
    }

    /// Returns the columns that need a value but are not written by this program.
    fn unwritten_columns(&self, found: &LiveColumns, generated: &[String]) -> Vec<Difference> {
        let written = self
            .columns
            .iter()
            .chain(&self.optional)
            .map(|(column, _)| column);
        let is_written = |name: &String| {
            !generated.contains(name) && written.clone().any(|column| column == name)
        };
        let mut names: Vec<_> = found
            .iter()
            .filter(|(name, live)| live.required && !is_written(name))
            .map(|(name, _)| name.clone())
            .collect();
        names.sort();
        let difference = |column| Difference::Unwritten {
            table: self.table.clone(),
            column,
        };
        names.into_iter().map(difference).collect()
    }
}

/// Returns the requirements, in the order in which differences are reported.
pub(super) fn required_tables() -> [TableRequirements; 15] {
    [
        site_requirements(),
        data_location_requirements(),
        disk_data_location_requirements(),
        data_transfer_route_requirements(),
        data_transfer_package_requirements(),
        data_transfer_requirements(),
        data_transfer_log_requirements(),
        lease_requirements(),
        attempt_requirements(),
        delay_requirements(),
        link_requirements(),
        schedule_requirements(),
        digest_requirements(),
        program_requirements(),
        action_requirements(),
    ]
}

fn site_requirements() -> TableRequirements {
    use site::Column::{Id, Location, Name, ShortName};
    let columns = [
        (Id, ColumnUse::Integer),
        (Name, ColumnUse::Text),
        (ShortName, ColumnUse::Text),
        (Location, ColumnUse::Text),
    ];
    TableRequirements::of(site::Entity, columns)
}

fn data_location_requirements() -> TableRequirements {
    use data_location::Column::{Id, LocationType, Name, Priority, SiteId, StorageType};
    let columns = [
        (Id, ColumnUse::Integer),
        (Name, ColumnUse::Text),
        (LocationType, ColumnUse::Label),
        (StorageType, ColumnUse::Label),
        (Priority, ColumnUse::Integer),
        (SiteId, ColumnUse::Integer),
    ];
    TableRequirements::of(data_location::Entity, columns)
        .optional([(data_location::Optional::Active, ColumnUse::Flag)])
}

fn disk_data_location_requirements() -> TableRequirements {
    use disk_data_location::Column::{DataLocationId, Host, Path};
    let columns = [
        (DataLocationId, ColumnUse::Integer),
        (Host, ColumnUse::Text),
        (Path, ColumnUse::Text),
    ];
    TableRequirements::of(disk_data_location::Entity, columns)
}

fn data_transfer_route_requirements() -> TableRequirements {
    use data_transfer_route::Column::{
        DestinationLocationId, DestinationSiteId, Id, Method, OriginLocationId, OriginSiteId,
        RouteType,
    };
    let columns = [
        (Id, ColumnUse::Integer),
        (OriginSiteId, ColumnUse::Integer),
        (DestinationSiteId, ColumnUse::Integer),
        (Method, ColumnUse::Label),
        (RouteType, ColumnUse::Label),
        (OriginLocationId, ColumnUse::Integer),
        (DestinationLocationId, ColumnUse::Integer),
    ];
    TableRequirements::of(data_transfer_route::Entity, columns)
}

fn data_transfer_package_requirements() -> TableRequirements {
    use data_transfer_package::Column::{Checksum, FileName, Id, RelativePath, Size};
    use data_transfer_package::Optional::{CreatedAt, Status};
    let columns = [
        (Id, ColumnUse::Integer),
        (FileName, ColumnUse::Text),
        (RelativePath, ColumnUse::Text),
        (Size, ColumnUse::Integer),
        (Checksum, ColumnUse::Text),
    ];
    TableRequirements::of(data_transfer_package::Entity, columns)
        .optional([(Status, ColumnUse::Label), (CreatedAt, ColumnUse::Time)])
}

fn data_transfer_requirements() -> TableRequirements {
    use data_transfer::Column::{
        DataTransferPackageId, DestinationLocationId, EndTime, FailureErrorMessage, Id,
        OriginLocationId, RetryCount, StartTime, Status,
    };
    use data_transfer::Optional::{CreatedAt, UnpackStatus};
    let columns = [
        (Id, ColumnUse::Integer),
        (DataTransferPackageId, ColumnUse::Integer),
        (OriginLocationId, ColumnUse::Integer),
        (DestinationLocationId, ColumnUse::Integer),
        (Status, ColumnUse::Label),
        (RetryCount, ColumnUse::Integer),
        (StartTime, ColumnUse::Time),
        (EndTime, ColumnUse::Time),
        (FailureErrorMessage, ColumnUse::Text),
    ];
    TableRequirements::of(data_transfer::Entity, columns).optional([
        (UnpackStatus, ColumnUse::Label),
        (CreatedAt, ColumnUse::Time),
    ])
}

fn data_transfer_log_requirements() -> TableRequirements {
    use data_transfer_log::Column::{DataTransferId, Id, LogPath, Timestamp};
    let columns = [
        (Id, ColumnUse::Integer),
        (DataTransferId, ColumnUse::Integer),
        (Timestamp, ColumnUse::Time),
        (LogPath, ColumnUse::Text),
    ];
    TableRequirements::of(data_transfer_log::Entity, columns)
        .optional([(data_transfer_log::Optional::Status, ColumnUse::Label)])
        .inserted([Id])
}

fn lease_requirements() -> TableRequirements {
    use transfer_worker_lease::Column::{
        AcquiredAt, Attempt, BytesDone, BytesTotal, DataTransferId, Destination, ExpiresAt,
        OwnerHost, OwnerNode, OwnerPid, OwnerPidScope, OwnerStarted, Phase, RateBytesPerS,
        RenewedAt, Streams, TaskId, Token,
    };
    let columns = [
        (DataTransferId, ColumnUse::Integer),
        (Token, ColumnUse::Text),
        (Attempt, ColumnUse::Integer),
        (TaskId, ColumnUse::Text),
        (OwnerNode, ColumnUse::Text),
        (OwnerHost, ColumnUse::Text),
        (OwnerPid, ColumnUse::Integer),
        (OwnerPidScope, ColumnUse::Text),
        (OwnerStarted, ColumnUse::Text),
        (AcquiredAt, ColumnUse::Time),
        (RenewedAt, ColumnUse::Time),
        (ExpiresAt, ColumnUse::Time),
        (BytesDone, ColumnUse::Integer),
        (BytesTotal, ColumnUse::Integer),
        (RateBytesPerS, ColumnUse::Integer),
        (Destination, ColumnUse::Text),
        (Phase, ColumnUse::Text),
        (Streams, ColumnUse::Integer),
    ];
    TableRequirements::of(transfer_worker_lease::Entity, columns)
        .inserted::<transfer_worker_lease::Column>([])
}

fn delay_requirements() -> TableRequirements {
    use transfer_worker_delay::Column::{DataTransferId, ErrorCode, NotBefore, RetryCount};
    let columns = [
        (DataTransferId, ColumnUse::Integer),
        (NotBefore, ColumnUse::Time),
        (RetryCount, ColumnUse::Integer),
        (ErrorCode, ColumnUse::Text),
    ];
    TableRequirements::of(transfer_worker_delay::Entity, columns)
        .inserted::<transfer_worker_delay::Column>([])
}

/// Optional table, as [`link_requirements`].
fn digest_requirements() -> TableRequirements {
    use transfer_worker_digest::Column::{
        Block, DataTransferId, Digest, FileEnd, FileVersion, State,
    };
    let columns = [
        (DataTransferId, ColumnUse::Integer),
        (FileEnd, ColumnUse::Text),
        (Block, ColumnUse::Integer),
        (FileVersion, ColumnUse::Text),
        (Digest, ColumnUse::Text),
        (State, ColumnUse::Text),
    ];
    let requirements = TableRequirements::of(transfer_worker_digest::Entity, columns)
        .inserted::<transfer_worker_digest::Column>([]);
    TableRequirements {
        may_be_missing: true,
        ..requirements
    }
}

/// Optional table: a database that an older version of this program migrated can be used without it.
fn link_requirements() -> TableRequirements {
    use transfer_worker_link::Column::{
        Capacity, Destination, Issued, MaxActive, MaxRate, Origin, PauseReason, PausedAt, PausedBy,
        Priority, StopsRunning, Streams, TcpWindow,
    };
    let columns = [
        (Origin, ColumnUse::Text),
        (Destination, ColumnUse::Text),
        (MaxActive, ColumnUse::Integer),
        (Priority, ColumnUse::Integer),
        (Capacity, ColumnUse::Text),
        (Streams, ColumnUse::Integer),
        (TcpWindow, ColumnUse::Text),
        (MaxRate, ColumnUse::Text),
        (PausedAt, ColumnUse::Time),
        (PausedBy, ColumnUse::Text),
        (PauseReason, ColumnUse::Text),
        (StopsRunning, ColumnUse::Flag),
        (Issued, ColumnUse::Integer),
    ];
    TableRequirements {
        may_be_missing: true,
        ..TableRequirements::of(transfer_worker_link::Entity, columns)
            .inserted::<transfer_worker_link::Column>([])
    }
}

/// Optional table: a database without schedule records can be used.
fn schedule_requirements() -> TableRequirements {
    use transfer_worker_schedule::Column::{DataTransferId, Queue, Resent, ScheduledAt, TaskId};
    let columns = [
        (DataTransferId, ColumnUse::Integer),
        (ScheduledAt, ColumnUse::Time),
        (Queue, ColumnUse::Text),
        (TaskId, ColumnUse::Text),
        (Resent, ColumnUse::Integer),
    ];
    TableRequirements {
        may_be_missing: true,
        ..TableRequirements::of(transfer_worker_schedule::Entity, columns)
            .inserted::<transfer_worker_schedule::Column>([])
    }
}

/// Optional table, as [`link_requirements`].
fn program_requirements() -> TableRequirements {
    use transfer_worker_program::Column::{
        EndedAt, Host, Kind, Name, Pid, SeenAt, StartedAt, Token, Version,
    };
    let columns = [
        (Name, ColumnUse::Text),
        (Token, ColumnUse::Text),
        (Kind, ColumnUse::Text),
        (Host, ColumnUse::Text),
        (Pid, ColumnUse::Integer),
        (Version, ColumnUse::Text),
        (StartedAt, ColumnUse::Time),
        (SeenAt, ColumnUse::Time),
        (EndedAt, ColumnUse::Time),
    ];
    TableRequirements {
        may_be_missing: true,
        ..TableRequirements::of(transfer_worker_program::Entity, columns)
            .inserted::<transfer_worker_program::Column>([])
    }
}

fn action_requirements() -> TableRequirements {
    use transfer_worker_action::Column::{
        ActedAt, Action, DataTransferId, Id, Operator, PreviousStatus, Reason,
    };
    let columns = [
        (Id, ColumnUse::Integer),
        (DataTransferId, ColumnUse::Integer),
        (ActedAt, ColumnUse::Time),
        (Action, ColumnUse::Text),
        (Operator, ColumnUse::Text),
        (Reason, ColumnUse::Text),
        (PreviousStatus, ColumnUse::Text),
    ];
    TableRequirements::of(transfer_worker_action::Entity, columns).inserted([Id])
}

fn attempt_requirements() -> TableRequirements {
    use transfer_worker_attempt::Column::{
        Attempt, Bytes, DataTransferId, Digest, EndedAt, ErrorCode, Id, LogPath, Message, Outcome,
        RateBytesPerS, StartedAt, TaskId, TemporaryName, Worker,
    };
    let columns = [
        (Id, ColumnUse::Integer),
        (DataTransferId, ColumnUse::Integer),
        (Attempt, ColumnUse::Integer),
        (TaskId, ColumnUse::Text),
        (Worker, ColumnUse::Text),
        (StartedAt, ColumnUse::Time),
        (EndedAt, ColumnUse::Time),
        (Outcome, ColumnUse::Text),
        (ErrorCode, ColumnUse::Text),
        (Message, ColumnUse::Text),
        (Bytes, ColumnUse::Integer),
        (RateBytesPerS, ColumnUse::Integer),
        (Digest, ColumnUse::Text),
        (LogPath, ColumnUse::Text),
        (TemporaryName, ColumnUse::Text),
    ];
    TableRequirements::of(transfer_worker_attempt::Entity, columns).inserted([Id])
}
