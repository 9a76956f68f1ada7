//! Tables and columns that this program uses.

use entity::{
    data_location, data_transfer, data_transfer_log, data_transfer_package, data_transfer_route,
    disk_data_location, site, transfer_worker_action, transfer_worker_attempt,
    transfer_worker_delay, transfer_worker_lease, transfer_worker_link, transfer_worker_schedule,
};
use sea_orm::sea_query::Iden;

use super::Difference;
use super::columns::{ColumnKind, LiveColumns};

/// Use of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Integer,
    Text,
    /// Text or an enum type.
    Label,
    Time,
    Flag,
}

impl Use {
    fn needed(self) -> &'static str {
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
pub(super) struct Needed {
    pub(super) table: String,
    columns: Vec<(String, Use)>,
    optional: Vec<(String, Use)>,
    /// Columns that the database fills itself, if this program inserts rows into the table; `None` if it does not. Any
    /// other column that needs a value and is unknown to this program is an error.
    generated: Option<Vec<String>>,
    /// True if the program works without the table.
    may_be_missing: bool,
}

impl Needed {
    fn of<C: Iden>(table: impl Iden, columns: impl IntoIterator<Item = (C, Use)>) -> Self {
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

    fn optional<C: Iden>(mut self, columns: impl IntoIterator<Item = (C, Use)>) -> Self {
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
                    needed: usage.needed(),
                }),
                _ => {}
            }
        }
        if let Some(generated) = &self.generated {
            differences.extend(self.unwritten(found, generated));
        }
        differences
    }

    /// Returns the columns that need a value but are not written by this program.
    fn unwritten(&self, found: &LiveColumns, generated: &[String]) -> Vec<Difference> {
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
pub(super) fn needed() -> [Needed; 13] {
    [
        site_needed(),
        data_location_needed(),
        disk_data_location_needed(),
        data_transfer_route_needed(),
        data_transfer_package_needed(),
        data_transfer_needed(),
        data_transfer_log_needed(),
        lease_needed(),
        attempt_needed(),
        delay_needed(),
        link_needed(),
        schedule_needed(),
        action_needed(),
    ]
}

fn site_needed() -> Needed {
    use site::Column::{Id, Location, Name, ShortName};
    let columns = [
        (Id, Use::Integer),
        (Name, Use::Text),
        (ShortName, Use::Text),
        (Location, Use::Text),
    ];
    Needed::of(site::Entity, columns)
}

fn data_location_needed() -> Needed {
    use data_location::Column::{Id, LocationType, Name, Priority, SiteId, StorageType};
    let columns = [
        (Id, Use::Integer),
        (Name, Use::Text),
        (LocationType, Use::Label),
        (StorageType, Use::Label),
        (Priority, Use::Integer),
        (SiteId, Use::Integer),
    ];
    Needed::of(data_location::Entity, columns)
        .optional([(data_location::Optional::Active, Use::Flag)])
}

fn disk_data_location_needed() -> Needed {
    use disk_data_location::Column::{DataLocationId, Host, Path};
    let columns = [
        (DataLocationId, Use::Integer),
        (Host, Use::Text),
        (Path, Use::Text),
    ];
    Needed::of(disk_data_location::Entity, columns)
}

fn data_transfer_route_needed() -> Needed {
    use data_transfer_route::Column::{
        DestinationLocationId, DestinationSiteId, Id, Method, OriginLocationId, OriginSiteId,
        RouteType,
    };
    let columns = [
        (Id, Use::Integer),
        (OriginSiteId, Use::Integer),
        (DestinationSiteId, Use::Integer),
        (Method, Use::Label),
        (RouteType, Use::Label),
        (OriginLocationId, Use::Integer),
        (DestinationLocationId, Use::Integer),
    ];
    Needed::of(data_transfer_route::Entity, columns)
}

fn data_transfer_package_needed() -> Needed {
    use data_transfer_package::Column::{Checksum, FileName, Id, RelativePath, Size};
    use data_transfer_package::Optional::{CreatedAt, Status};
    let columns = [
        (Id, Use::Integer),
        (FileName, Use::Text),
        (RelativePath, Use::Text),
        (Size, Use::Integer),
        (Checksum, Use::Text),
    ];
    Needed::of(data_transfer_package::Entity, columns)
        .optional([(Status, Use::Label), (CreatedAt, Use::Time)])
}

fn data_transfer_needed() -> Needed {
    use data_transfer::Column::{
        DataTransferPackageId, DestinationLocationId, EndTime, FailureErrorMessage, Id,
        OriginLocationId, RetryCount, StartTime, Status,
    };
    use data_transfer::Optional::{CreatedAt, UnpackStatus};
    let columns = [
        (Id, Use::Integer),
        (DataTransferPackageId, Use::Integer),
        (OriginLocationId, Use::Integer),
        (DestinationLocationId, Use::Integer),
        (Status, Use::Label),
        (RetryCount, Use::Integer),
        (StartTime, Use::Time),
        (EndTime, Use::Time),
        (FailureErrorMessage, Use::Text),
    ];
    Needed::of(data_transfer::Entity, columns)
        .optional([(UnpackStatus, Use::Label), (CreatedAt, Use::Time)])
}

fn data_transfer_log_needed() -> Needed {
    use data_transfer_log::Column::{DataTransferId, Id, LogPath, Timestamp};
    let columns = [
        (Id, Use::Integer),
        (DataTransferId, Use::Integer),
        (Timestamp, Use::Time),
        (LogPath, Use::Text),
    ];
    Needed::of(data_transfer_log::Entity, columns)
        .optional([(data_transfer_log::Optional::Status, Use::Label)])
        .inserted([Id])
}

fn lease_needed() -> Needed {
    use transfer_worker_lease::Column::{
        AcquiredAt, Attempt, BytesDone, BytesTotal, DataTransferId, Destination, ExpiresAt,
        OwnerHost, OwnerNode, OwnerPid, OwnerPidScope, OwnerStarted, Phase, RateBytesPerS,
        RenewedAt, Streams, TaskId, Token,
    };
    let columns = [
        (DataTransferId, Use::Integer),
        (Token, Use::Text),
        (Attempt, Use::Integer),
        (TaskId, Use::Text),
        (OwnerNode, Use::Text),
        (OwnerHost, Use::Text),
        (OwnerPid, Use::Integer),
        (OwnerPidScope, Use::Text),
        (OwnerStarted, Use::Text),
        (AcquiredAt, Use::Time),
        (RenewedAt, Use::Time),
        (ExpiresAt, Use::Time),
        (BytesDone, Use::Integer),
        (BytesTotal, Use::Integer),
        (RateBytesPerS, Use::Integer),
        (Destination, Use::Text),
        (Phase, Use::Text),
        (Streams, Use::Integer),
    ];
    Needed::of(transfer_worker_lease::Entity, columns).inserted::<transfer_worker_lease::Column>([])
}

fn delay_needed() -> Needed {
    use transfer_worker_delay::Column::{DataTransferId, ErrorCode, NotBefore, RetryCount};
    let columns = [
        (DataTransferId, Use::Integer),
        (NotBefore, Use::Time),
        (RetryCount, Use::Integer),
        (ErrorCode, Use::Text),
    ];
    Needed::of(transfer_worker_delay::Entity, columns).inserted::<transfer_worker_delay::Column>([])
}

/// Optional table: a database that an older version of this program migrated can be used without it.
fn link_needed() -> Needed {
    use transfer_worker_link::Column::{
        Capacity, Destination, Issued, MaxActive, MaxRate, Origin, PauseReason, PausedAt, PausedBy,
        Priority, StopsRunning, Streams, TcpWindow,
    };
    let columns = [
        (Origin, Use::Text),
        (Destination, Use::Text),
        (MaxActive, Use::Integer),
        (Priority, Use::Integer),
        (Capacity, Use::Text),
        (Streams, Use::Integer),
        (TcpWindow, Use::Text),
        (MaxRate, Use::Text),
        (PausedAt, Use::Time),
        (PausedBy, Use::Text),
        (PauseReason, Use::Text),
        (StopsRunning, Use::Flag),
        (Issued, Use::Integer),
    ];
    Needed {
        may_be_missing: true,
        ..Needed::of(transfer_worker_link::Entity, columns)
            .inserted::<transfer_worker_link::Column>([])
    }
}

/// Optional table: a database without schedule records can be used.
fn schedule_needed() -> Needed {
    use transfer_worker_schedule::Column::{DataTransferId, Queue, Resent, ScheduledAt, TaskId};
    let columns = [
        (DataTransferId, Use::Integer),
        (ScheduledAt, Use::Time),
        (Queue, Use::Text),
        (TaskId, Use::Text),
        (Resent, Use::Integer),
    ];
    Needed {
        may_be_missing: true,
        ..Needed::of(transfer_worker_schedule::Entity, columns)
            .inserted::<transfer_worker_schedule::Column>([])
    }
}

fn action_needed() -> Needed {
    use transfer_worker_action::Column::{
        ActedAt, Action, DataTransferId, Id, Operator, PreviousStatus, Reason,
    };
    let columns = [
        (Id, Use::Integer),
        (DataTransferId, Use::Integer),
        (ActedAt, Use::Time),
        (Action, Use::Text),
        (Operator, Use::Text),
        (Reason, Use::Text),
        (PreviousStatus, Use::Text),
    ];
    Needed::of(transfer_worker_action::Entity, columns).inserted([Id])
}

fn attempt_needed() -> Needed {
    use transfer_worker_attempt::Column::{
        Attempt, Bytes, DataTransferId, Digest, EndedAt, ErrorCode, Id, LogPath, Message, Outcome,
        RateBytesPerS, StartedAt, TaskId, TemporaryName, Worker,
    };
    let columns = [
        (Id, Use::Integer),
        (DataTransferId, Use::Integer),
        (Attempt, Use::Integer),
        (TaskId, Use::Text),
        (Worker, Use::Text),
        (StartedAt, Use::Time),
        (EndedAt, Use::Time),
        (Outcome, Use::Text),
        (ErrorCode, Use::Text),
        (Message, Use::Text),
        (Bytes, Use::Integer),
        (RateBytesPerS, Use::Integer),
        (Digest, Use::Text),
        (LogPath, Use::Text),
        (TemporaryName, Use::Text),
    ];
    Needed::of(transfer_worker_attempt::Entity, columns).inserted([Id])
}
