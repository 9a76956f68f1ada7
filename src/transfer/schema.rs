//! Whether the live database is one that this program can work with.
//!
//! The ops-db belongs to somebody else, and some of its column names are assumptions. [`check`]
//! compares all of them with the live catalog before anything is done, and reports every
//! difference at once. It is liberal in what cannot do harm: widths of integers, kinds of text,
//! times with or without a zone, further tables and columns.
//!
//! On the way it learns how enums are stored there, see [`EnumColumn`].

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use entity::{
    DatabaseEnum, LocationType, PackageState, RouteType, Status, StorageType, data_location,
    data_transfer, data_transfer_log, data_transfer_package, data_transfer_route,
    disk_data_location, site, transfer_worker_action, transfer_worker_attempt,
    transfer_worker_delay, transfer_worker_lease, transfer_worker_link, transfer_worker_schedule,
};
use sea_orm::sea_query::{Expr, ExprTrait as _, Iden, Query};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, DbErr, QueryResult, Statement};

use super::database::{Database, DatabaseError};
use crate::settings::EnumLabels;

/// What [`check`] found out about the live database.
#[derive(Debug, Clone)]
pub struct Schema {
    /// `data_transfer.status`.
    pub(super) transfer_status: EnumColumn<Status>,
    /// `data_transfer.unpack_status`, where it exists, as all that is optional here.
    pub(super) unpack_status: Option<EnumColumn<Status>>,
    /// `data_transfer_log.status`.
    pub(super) log_status: Option<EnumColumn<Status>>,
    /// `data_transfer_package.status`.
    pub(super) package_state: Option<EnumColumn<PackageState>>,
    /// `data_location.location_type`.
    pub(super) location_type: EnumColumn<LocationType>,
    /// `data_location.storage_type`.
    pub(super) storage_type: EnumColumn<StorageType>,
    /// `data_transfer_route.route_type`.
    pub(super) route_type: EnumColumn<RouteType>,
    /// Characters that `data_transfer.failure_error_message` holds, where it is limited.
    failure_message_limit: Option<usize>,
    /// Whether `data_location.active` exists.
    pub(super) has_active: bool,
    /// Whether `transfer_worker_link` exists: not where the last migration was not made.
    pub(super) has_links: bool,
    /// True if `transfer_worker_schedule` exists.
    pub(super) has_schedule: bool,
    /// Whether `data_transfer_package.created_at` exists.
    pub(super) has_package_created_at: bool,
    /// Whether `data_transfer.created_at` exists.
    pub(super) has_transfer_created_at: bool,
}

impl Schema {
    /// Cuts a failure's message to what its column holds: a long message must not keep the failure
    /// from being recorded.
    pub(super) fn fit_failure_message(&self, message: String) -> String {
        match self.failure_message_limit {
            Some(limit) if message.chars().count() > limit => message
                .chars()
                .take(limit.saturating_sub(1))
                .chain(['…'])
                .collect(),
            _ => message,
        }
    }
}

/// How one enum column of the live database is written and compared.
///
/// A native PostgreSQL type has its own labels, and a value needs a cast to it. A text column
/// holds names or values; both are looked for, and that one is written which the column's rows
/// show, or those of another column if it has none. (There must be no cast on SQLite: there, `CAST(x AS status)` makes a number of any text.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnumColumn<E> {
    spelling: Spelling,
    member: PhantomData<E>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Spelling {
    Native {
        type_name: String,
        labels: Vec<String>,
    },
    Text(EnumLabels),
}

impl<E: DatabaseEnum> EnumColumn<E> {
    /// A native PostgreSQL type. The name is used as it is, so it must be quoted where it has to.
    pub(super) fn native(type_name: String, labels: Vec<String>) -> Self {
        Self {
            spelling: Spelling::Native { type_name, labels },
            member: PhantomData,
        }
    }

    /// A text column.
    pub(super) fn text(labels: EnumLabels) -> Self {
        Self {
            spelling: Spelling::Text(labels),
            member: PhantomData,
        }
    }

    /// The label that is written for a member.
    pub fn label(&self, member: E) -> String {
        match &self.spelling {
            Spelling::Native { labels, .. } => labels
                .iter()
                .find(|label| E::from_label(label) == Some(member))
                .cloned()
                // The type lacks the member; the database will say so better than we can here.
                .unwrap_or_else(|| member.name().to_owned()),
            Spelling::Text(EnumLabels::Names) => member.name().to_owned(),
            Spelling::Text(EnumLabels::Values) => member.value(),
        }
    }

    /// The value to write for a member.
    pub fn write(&self, member: E) -> Expr {
        let label = Expr::val(self.label(member));
        match &self.spelling {
            Spelling::Native { type_name, .. } => label.cast_as(type_name.clone()),
            Spelling::Text(_) => label,
        }
    }

    /// The values by which rows with one of these members are found.
    pub fn one_of(&self, members: &[E]) -> Vec<Expr> {
        let exprs = members.iter().map(|&member| match &self.spelling {
            Spelling::Native { .. } => vec![self.write(member)],
            Spelling::Text(_) => vec![Expr::val(member.name()), Expr::val(member.value())],
        });
        exprs.flatten().collect()
    }
}

/// One way in which the live database differs from what is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// No such table.
    MissingTable {
        /// The table.
        table: String,
    },
    /// No such column.
    MissingColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The column's values cannot be used.
    WrongType {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Its type.
        found: String,
        /// What is needed.
        needed: &'static str,
    },
    /// The enum type lacks members.
    MissingLabels {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// Names of the members.
        members: Vec<&'static str>,
        /// The labels that there are.
        found: Vec<String>,
    },
    /// A column that must be given a value when a row is inserted, and that this program gives none.
    Unwritten {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
}

impl Difference {
    /// The table that differs.
    pub fn table(&self) -> &str {
        match self {
            Self::MissingTable { table }
            | Self::MissingColumn { table, .. }
            | Self::WrongType { table, .. }
            | Self::MissingLabels { table, .. }
            | Self::Unwritten { table, .. } => table,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingTable { table } => write!(f, "table {table} is missing"),
            Self::MissingColumn { table, column } => {
                write!(f, "column {table}.{column} is missing")
            }
            Self::WrongType {
                table,
                column,
                found,
                needed,
            } => {
                write!(
                    f,
                    "column {table}.{column} is of type `{found}`, and {needed} is needed"
                )
            }
            Self::MissingLabels {
                table,
                column,
                members,
                found,
            } => write!(
                f,
                "the type of column {table}.{column} has no label for {}, only {}",
                members.join(", "),
                found.join(", ")
            ),
            Self::Unwritten { table, column } => write!(
                f,
                "column {table}.{column} must be given a value, and this program gives it none"
            ),
        }
    }
}

/// Why the database cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It differs; the message has a line for each difference and says what to do.
    #[error("{}", explain(.0))]
    Differs(Vec<Difference>),
    /// It could not be looked at.
    #[error("the database's schema could not be read")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for SchemaError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn explain(differences: &[Difference]) -> String {
    let mut text = String::from("the database does not fit this program:");
    for difference in differences {
        text.push_str("\n  - ");
        text.push_str(&difference.to_string());
    }
    let is_own = |difference: &Difference| entity::WORKER_TABLES.contains(&difference.table());
    if differences.iter().any(is_own) {
        text.push_str(
            "\nTables named transfer_worker_* are this program's own: run `ccat-transfer db migrate`.",
        );
    }
    let no_ops_db = entity::OPS_DB_TABLES.into_iter().all(|table| {
        differences.contains(&Difference::MissingTable {
            table: table.to_owned(),
        })
    });
    if no_ops_db {
        text.push_str(
            "\nThere is no ops-db at all. If the database is the right one and is to be filled from \
             here (a test, a development machine), run `ccat-transfer db migrate`.",
        );
    } else if !differences.iter().all(is_own) {
        text.push_str(
            "\nThe other tables belong to ccat_ops_db and its Alembic migrations, and are never \
             altered from here: bring that schema up to date, or run a ccat-transfer that was made \
             for it.",
        );
    }
    text
}

/// What a column is used for.
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

    fn fits(self, kind: Kind) -> bool {
        match self {
            Self::Integer => matches!(kind, Kind::Number | Kind::Any),
            Self::Text => matches!(kind, Kind::Text | Kind::Any),
            Self::Label => matches!(kind, Kind::Text | Kind::Enum | Kind::Any),
            Self::Time => matches!(kind, Kind::Time | Kind::Any),
            Self::Flag => matches!(kind, Kind::Flag | Kind::Any),
        }
    }
}

/// What a column can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    Text,
    Enum,
    Time,
    Flag,
    /// Whatever is put there: SQLite, with a declared type that tells nothing.
    Any,
    Other,
}

/// A column of the live database.
#[derive(Debug)]
struct Found {
    kind: Kind,
    type_name: String,
    labels: Vec<String>,
    /// Characters that it holds, where it is limited.
    limit: Option<usize>,
    /// Whether an insert without it fails.
    required: bool,
}

type FoundColumns = HashMap<String, Found>;

/// What is needed of a table.
struct Needed {
    table: String,
    columns: Vec<(String, Use)>,
    optional: Vec<(String, Use)>,
    /// Where rows are inserted in regular work: the columns that the database fills by itself. Any
    /// other one that must be given a value, and is unknown here, does harm.
    generated: Option<Vec<String>>,
    /// Whether everything works without the table.
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

    fn compare(&self, found: &FoundColumns) -> Vec<Difference> {
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

    /// Columns that must be given a value and are given none.
    fn unwritten(&self, found: &FoundColumns, generated: &[String]) -> Vec<Difference> {
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

/// In the order in which differences are reported.
fn needed() -> [Needed; 13] {
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

/// A database that was migrated before there were links is worked with as it is.
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

/// A database without the table of schedule records can be used.
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

/// Compares the live database with what is needed, and learns how its enums are stored.
///
/// `text_enum_labels` decides the spelling in text columns of a database without rows.
///
/// # Errors
/// [`SchemaError::Differs`] with every difference; [`SchemaError::Database`] if the catalog could
/// not be read.
pub async fn check(
    database: &Database,
    text_enum_labels: EnumLabels,
) -> Result<Schema, SchemaError> {
    database
        .bounded(inspect(database.connection(), text_enum_labels))
        .await
}

async fn inspect(
    db: &DatabaseConnection,
    text_enum_labels: EnumLabels,
) -> Result<Schema, SchemaError> {
    let mut live = HashMap::new();
    let mut differences = Vec::new();
    for needed in needed() {
        let found = columns(db, &needed.table).await?;
        differences.extend(needed.compare(&found));
        live.insert(needed.table, found);
    }
    let catalog = Catalog { db, live };
    differences.extend(catalog.missing_status_labels());
    if !differences.is_empty() {
        return Err(SchemaError::Differs(differences));
    }
    let elsewhere = catalog
        .spelling_elsewhere()
        .await?
        .unwrap_or(text_enum_labels);
    Ok(catalog.schema(elsewhere).await?)
}

/// The live columns, by table.
struct Catalog<'a> {
    db: &'a DatabaseConnection,
    live: HashMap<String, FoundColumns>,
}

impl Catalog<'_> {
    fn column(&self, table: impl Iden, column: impl Iden) -> Option<&Found> {
        self.live
            .get(table.to_string().as_str())?
            .get(column.to_string().as_str())
    }

    /// Statuses are written in regular work, so the type must have all of them.
    fn missing_status_labels(&self) -> Option<Difference> {
        let (table, column) = (data_transfer::Entity, data_transfer::Column::Status);
        let found = self.column(table, column)?;
        if found.kind != Kind::Enum {
            return None;
        }
        let known = |status: &Status| {
            found
                .labels
                .iter()
                .any(|label| Status::from_label(label) == Some(*status))
        };
        let members: Vec<_> = Status::ALL
            .iter()
            .filter(|status| !known(status))
            .map(|status| status.name())
            .collect();
        (!members.is_empty()).then(|| Difference::MissingLabels {
            table: table.to_string(),
            column: column.to_string(),
            members,
            found: found.labels.clone(),
        })
    }

    /// How the database spells labels where there are rows for certain: one that has anything to
    /// transfer has locations. A table of logs may be empty.
    async fn spelling_elsewhere(&self) -> Result<Option<EnumLabels>, DbErr> {
        use data_location::{Column, Entity};
        match self.column(Entity, Column::LocationType) {
            Some(found) if found.kind != Kind::Enum => {
                spelling_in_use::<LocationType>(self.db, Entity, Column::LocationType).await
            }
            _ => Ok(None),
        }
    }

    /// `elsewhere` is the spelling in text columns without rows.
    async fn schema(&self, elsewhere: EnumLabels) -> Result<Schema, DbErr> {
        use data_location::{Column as Location, Entity as Locations};
        use data_transfer::{Column as Transfer, Entity as Transfers, Optional as MaybeTransfer};
        use data_transfer_log::{Entity as Logs, Optional as MaybeLog};
        use data_transfer_package::{Entity as Packages, Optional as MaybePackage};
        use data_transfer_route::{Column as Route, Entity as Routes};
        Ok(Schema {
            transfer_status: self
                .enum_column(Transfers, Transfer::Status, elsewhere)
                .await?,
            unpack_status: self
                .maybe_enum_column(Transfers, MaybeTransfer::UnpackStatus, elsewhere)
                .await?,
            log_status: self
                .maybe_enum_column(Logs, MaybeLog::Status, elsewhere)
                .await?,
            package_state: self
                .maybe_enum_column(Packages, MaybePackage::Status, elsewhere)
                .await?,
            location_type: self
                .enum_column(Locations, Location::LocationType, elsewhere)
                .await?,
            storage_type: self
                .enum_column(Locations, Location::StorageType, elsewhere)
                .await?,
            route_type: self
                .enum_column(Routes, Route::RouteType, elsewhere)
                .await?,
            failure_message_limit: self
                .column(Transfers, Transfer::FailureErrorMessage)
                .and_then(|found| found.limit),
            has_active: self
                .column(Locations, data_location::Optional::Active)
                .is_some(),
            has_links: self
                .column(
                    transfer_worker_link::Entity,
                    transfer_worker_link::Column::Origin,
                )
                .is_some(),
            has_schedule: self
                .column(
                    transfer_worker_schedule::Entity,
                    transfer_worker_schedule::Column::ScheduledAt,
                )
                .is_some(),
            has_package_created_at: self.column(Packages, MaybePackage::CreatedAt).is_some(),
            has_transfer_created_at: self.column(Transfers, MaybeTransfer::CreatedAt).is_some(),
        })
    }

    async fn maybe_enum_column<E: DatabaseEnum>(
        &self,
        table: impl Iden + Copy,
        column: impl Iden + Copy,
        elsewhere: EnumLabels,
    ) -> Result<Option<EnumColumn<E>>, DbErr> {
        if self.column(table, column).is_none() {
            return Ok(None);
        }
        self.enum_column(table, column, elsewhere).await.map(Some)
    }

    async fn enum_column<E: DatabaseEnum>(
        &self,
        table: impl Iden + Copy,
        column: impl Iden + Copy,
        elsewhere: EnumLabels,
    ) -> Result<EnumColumn<E>, DbErr> {
        match self.column(table, column) {
            Some(found) if found.kind == Kind::Enum => Ok(EnumColumn::native(
                found.type_name.clone(),
                found.labels.clone(),
            )),
            _ => {
                let shown = spelling_in_use::<E>(self.db, table, column).await?;
                Ok(EnumColumn::text(shown.unwrap_or(elsewhere)))
            }
        }
    }
}

/// How the column's rows spell their labels.
async fn spelling_in_use<E: DatabaseEnum>(
    db: &DatabaseConnection,
    table: impl Iden,
    column: impl Iden + Copy,
) -> Result<Option<EnumLabels>, DbErr> {
    let query = Query::select()
        .column(column)
        .from(table)
        .and_where(Expr::col(column).is_not_null())
        .limit(1)
        .to_owned();
    let Some(row) = db.query_one(&query).await? else {
        return Ok(None);
    };
    let label: String = row.try_get_by_index(0)?;
    Ok(E::from_label(&label).map(|member| {
        if label == member.value() {
            EnumLabels::Values
        } else {
            EnumLabels::Names
        }
    }))
}

async fn columns(db: &DatabaseConnection, table: &str) -> Result<FoundColumns, DbErr> {
    let backend = db.get_database_backend();
    let query = |sql| Statement::from_sql_and_values(backend, sql, [table.into()]);
    match backend {
        DbBackend::Postgres => {
            let rows = db.query_all_raw(query(POSTGRES_COLUMNS)).await?;
            rows.iter().map(postgres_column).collect()
        }
        _ => {
            let rows = db.query_all_raw(query(SQLITE_COLUMNS)).await?;
            rows.iter().map(sqlite_column).collect()
        }
    }
}

/// Labels are joined by line feeds, so that no array needs to be decoded. Types are looked up
/// behind domains.
const POSTGRES_COLUMNS: &str = "
    SELECT CAST(a.attname AS text) AS name,
           CAST(t.typcategory AS text) AS category,
           format_type(a.atttypid, NULL) AS type_name,
           a.attnotnull AND NOT (a.atthasdef OR a.attidentity <> '') AS required,
           CASE WHEN t.typname IN ('varchar', 'bpchar') AND a.atttypmod > 4
                THEN a.atttypmod - 4 END AS char_limit,
           (SELECT string_agg(e.enumlabel, chr(10) ORDER BY e.enumsortorder)
              FROM pg_catalog.pg_enum e
             WHERE e.enumtypid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)) AS labels
      FROM pg_catalog.pg_attribute a
      JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
     WHERE a.attrelid = to_regclass(quote_ident($1)) AND a.attnum > 0 AND NOT a.attisdropped";

fn postgres_column(row: &QueryResult) -> Result<(String, Found), DbErr> {
    let type_name: String = row.try_get("", "type_name")?;
    let category: String = row.try_get("", "category")?;
    let labels: Option<String> = row.try_get("", "labels")?;
    let limit: Option<i32> = row.try_get("", "char_limit")?;
    let kind = match category.as_str() {
        "N" => Kind::Number,
        "S" => Kind::Text,
        "E" => Kind::Enum,
        "D" if type_name.starts_with("timestamp") => Kind::Time,
        "B" => Kind::Flag,
        _ => Kind::Other,
    };
    let found = Found {
        kind,
        type_name,
        labels: labels
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect(),
        limit: limit.and_then(|limit| usize::try_from(limit).ok()),
        required: row.try_get("", "required")?,
    };
    Ok((row.try_get("", "name")?, found))
}

const SQLITE_COLUMNS: &str = "
    SELECT name, type AS type_name, \"notnull\" AND dflt_value IS NULL AND pk = 0 AS required
      FROM pragma_table_info($1)";

fn sqlite_column(row: &QueryResult) -> Result<(String, Found), DbErr> {
    let type_name: String = row.try_get("", "type_name")?;
    let found = Found {
        kind: sqlite_kind(&type_name),
        type_name,
        labels: Vec::new(),
        // SQLite does not enforce any.
        limit: None,
        required: row.try_get("", "required")?,
    };
    Ok((row.try_get("", "name")?, found))
}

/// By SQLite's rules for affinity, and with a look at what the declared type says beyond them.
fn sqlite_kind(declared: &str) -> Kind {
    let declared = declared.to_ascii_uppercase();
    let mentions = |words: &[&str]| words.iter().any(|word| declared.contains(word));
    if mentions(&["DATE", "TIME"]) {
        Kind::Time
    } else if mentions(&["BOOL"]) {
        Kind::Flag
    } else if mentions(&["INT"]) {
        Kind::Number
    } else if mentions(&["CHAR", "CLOB", "TEXT"]) {
        Kind::Text
    } else {
        Kind::Any
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::sea_query::{PostgresQueryBuilder, SqliteQueryBuilder};

    use super::*;

    fn where_status(column: &EnumColumn<Status>) -> sea_orm::sea_query::SelectStatement {
        Query::select()
            .expr(Expr::val(1))
            .from(data_transfer::Entity)
            .and_where(Expr::col("status").is_in(column.one_of(&[Status::Pending])))
            .to_owned()
    }

    #[test]
    fn native_labels_are_the_types_own_and_cast_to_it() {
        let labels = ["pending", "Scheduled", "IN_PROGRESS"];
        let labels = labels.map(str::to_owned).to_vec();
        let column = EnumColumn::native("types.\"Status\"".to_owned(), labels);
        assert_eq!(column.label(Status::Scheduled), "Scheduled");
        let sql = where_status(&column).to_string(PostgresQueryBuilder);
        assert!(
            sql.ends_with("IN (CAST('pending' AS types.\"Status\"))"),
            "{sql}"
        );
    }

    #[test]
    fn text_is_never_cast_and_found_in_both_spellings() {
        for (labels, written) in [
            (EnumLabels::Names, "PENDING"),
            (EnumLabels::Values, "pending"),
        ] {
            let column = EnumColumn::text(labels);
            assert_eq!(column.label(Status::Pending), written);
            let sql = where_status(&column).to_string(SqliteQueryBuilder);
            assert!(sql.ends_with("IN ('PENDING', 'pending')"), "{sql}");
        }
    }

    #[test]
    fn sqlites_declared_types_are_understood() {
        for (declared, kind) in [
            ("INTEGER", Kind::Number),
            ("bigint", Kind::Number),
            ("VARCHAR(250)", Kind::Text),
            ("DATETIME", Kind::Time),
            ("timestamp_with_timezone_text", Kind::Time),
            ("BOOLEAN", Kind::Flag),
            ("NUMERIC", Kind::Any),
            ("", Kind::Any),
        ] {
            assert_eq!(sqlite_kind(declared), kind, "{declared}");
        }
    }
}
