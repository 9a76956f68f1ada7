//! Check that this program can work with the schema of the live database.
//!
//! The ops-db belongs to another project, and some of its column names are assumptions. [`check`] compares all of them
//! with the live catalog before anything else is done, and reports all differences at once. It accepts harmless
//! differences: widths of integers, kinds of text, times with or without a zone, additional tables and columns.
//!
//! The check also determines how the database stores enums, see [`EnumColumn`].

use std::collections::HashMap;

use entity::{
    DatabaseEnum, LocationType, PackageState, RouteType, Status, StorageType, data_location,
    data_transfer, data_transfer_log, data_transfer_package, data_transfer_route,
    transfer_worker_digest, transfer_worker_link, transfer_worker_program,
    transfer_worker_schedule,
};
use sea_orm::sea_query::Iden;
use sea_orm::{DatabaseConnection, DbErr};

use self::columns::{ColumnKind, LiveColumn, LiveColumns, columns};
use self::labels::spelling_in_use;
use self::needed::required_tables;
use super::database::Database;
use crate::settings::EnumLabels;

mod columns;
mod difference;
mod labels;
mod needed;

pub use difference::{Difference, SchemaError};
pub use labels::EnumColumn;

/// Properties of the live database that [`check`] determined.
#[derive(Debug, Clone)]
pub struct Schema {
    /// Enum column `data_transfer.status`.
    pub(super) transfer_status: EnumColumn<Status>,
    /// Enum column `data_transfer.unpack_status`. As all optional columns, `None` if it does not exist.
    pub(super) unpack_status: Option<EnumColumn<Status>>,
    /// Enum column `data_transfer_log.status`.
    pub(super) log_status: Option<EnumColumn<Status>>,
    /// Enum column `data_transfer_package.status`.
    pub(super) package_state: Option<EnumColumn<PackageState>>,
    /// Enum column `data_location.location_type`.
    pub(super) location_type: EnumColumn<LocationType>,
    /// Enum column `data_location.storage_type`.
    pub(super) storage_type: EnumColumn<StorageType>,
    /// Enum column `data_transfer_route.route_type`.
    pub(super) route_type: EnumColumn<RouteType>,
    /// Maximum length of `data_transfer.failure_error_message` in characters, if the type has one.
    failure_message_limit: Option<usize>,
    /// True if the column `data_location.active` exists.
    pub(super) has_active: bool,
    /// True if the table `transfer_worker_link` exists, which a migration creates.
    pub(super) has_links: bool,
    /// True if the table `transfer_worker_schedule` exists, which a migration creates.
    pub(super) has_schedule: bool,
    /// True if the table `transfer_worker_digest` exists, which a migration creates.
    pub(super) has_digests: bool,
    /// True if the table `transfer_worker_program` exists, which a migration creates.
    pub(super) has_programs: bool,
    /// True if the column `data_transfer_package.created_at` exists.
    pub(super) has_package_created_at: bool,
    /// True if the column `data_transfer.created_at` exists.
    pub(super) has_transfer_created_at: bool,
}

impl Schema {
    /// Shortens an error message to the length of its column: a long message must not prevent the failure from being
    /// recorded.
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

/// Compares the live database with the schema that this program needs, and determines how the database stores enums.
///
/// `text_enum_labels` is the spelling in text columns of a database without rows.
///
/// # Errors
/// [`SchemaError::Differs`] with all differences; [`SchemaError::Database`] if the catalog could not be read.
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
    for needed in required_tables() {
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
        .spelling_of_locations()
        .await?
        .unwrap_or(text_enum_labels);
    Ok(catalog.schema(elsewhere).await?)
}

/// Columns of the live database, by table.
struct Catalog<'a> {
    db: &'a DatabaseConnection,
    live: HashMap<String, LiveColumns>,
}

impl Catalog<'_> {
    fn column(&self, table: impl Iden, column: impl Iden) -> Option<&LiveColumn> {
        self.live
            .get(table.to_string().as_str())?
            .get(column.to_string().as_str())
    }

    /// Returns the statuses that the database's enum type does not have. Regular operation writes statuses, so the type
    /// must have all of them.
    fn missing_status_labels(&self) -> Option<Difference> {
        let (table, column) = (data_transfer::Entity, data_transfer::Column::Status);
        let found = self.column(table, column)?;
        if found.kind != ColumnKind::Enum {
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

    /// Returns the spelling of labels in the table of locations, which has rows in every database with transfers. Other
    /// tables, such as the log, may be empty.
    async fn spelling_of_locations(&self) -> Result<Option<EnumLabels>, DbErr> {
        use data_location::{Column, Entity};
        match self.column(Entity, Column::LocationType) {
            Some(found) if found.kind != ColumnKind::Enum => {
                spelling_in_use::<LocationType>(self.db, Entity, Column::LocationType).await
            }
            _ => Ok(None),
        }
    }

    /// Determines the schema; `elsewhere` is the spelling in text columns without rows.
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
            has_digests: self
                .column(
                    transfer_worker_digest::Entity,
                    transfer_worker_digest::Column::Digest,
                )
                .is_some(),
            has_programs: self
                .column(
                    transfer_worker_program::Entity,
                    transfer_worker_program::Column::Name,
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
            Some(found) if found.kind == ColumnKind::Enum => Ok(EnumColumn::native(
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
