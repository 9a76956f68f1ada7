//! Details of a transfer, for the worker that copies it and for people.

use chrono::{DateTime, Utc};
use entity::{
    Action, Label, LocationType, Outcome, RouteType, Status, StorageType, Timestamp, data_location,
    data_transfer, data_transfer_package, data_transfer_route, disk_data_location, site,
    transfer_worker_action, transfer_worker_attempt, transfer_worker_lease,
};
use sea_orm::sea_query::{Expr, ExprTrait as _, JoinType, Query};
use sea_orm::{ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Repository, ScheduleRecord, delay, find_lease, retry_count};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::lease::LeaseInfo;

/// A transfer with all rows that it refers to. A field is `None` if the database has no such row or value.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TransferRecord {
    /// Id of the transfer.
    pub id: TransferId,
    /// State of the transfer.
    #[schema(value_type = String)]
    pub status: Label<Status>,
    /// Number of failed attempts so far.
    pub retry_count: u32,
    /// Start of the latest attempt.
    pub start_time: Option<DateTime<Utc>>,
    /// End of the last attempt; `None` while further attempts are possible.
    pub end_time: Option<DateTime<Utc>>,
    /// Time at which the row was created, if the database has that column.
    pub created_at: Option<DateTime<Utc>>,
    /// Error message of the latest failed attempt.
    pub failure_error_message: Option<String>,
    /// Package to transfer.
    pub package: Option<PackageRecord>,
    /// Location to copy from.
    pub origin: Option<LocationRecord>,
    /// Location to copy to.
    pub destination: Option<LocationRecord>,
    /// Route between the sites of both locations.
    pub route: Option<RouteRecord>,
}

/// A package: one file to transfer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PackageRecord {
    /// Id of the package.
    pub id: i64,
    /// Name of the file.
    pub file_name: String,
    /// Path relative to the root directory of a location, including the file name.
    pub relative_path: String,
    /// Size in bytes, according to the database.
    pub size_bytes: Option<i64>,
    /// Checksum, in the format that the producer wrote.
    pub checksum: Option<String>,
}

/// One end of a transfer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct LocationRecord {
    /// Id of the location.
    pub id: i64,
    /// Name of the location.
    pub name: String,
    /// Purpose of the location.
    #[schema(value_type = String)]
    pub location_type: Label<LocationType>,
    /// Kind of storage.
    #[schema(value_type = String)]
    pub storage_type: Label<StorageType>,
    /// Order of use among the locations of one site, lowest first.
    pub priority: Option<i64>,
    /// True if the location is in use.
    pub active: bool,
    /// Site of the location.
    pub site: Option<SiteRecord>,
    /// Host and path, if the location is on a disk.
    pub disk: Option<DiskRecord>,
}

/// A site.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SiteRecord {
    /// Id of the site.
    pub id: i64,
    /// Full name.
    pub name: String,
    /// Short name, as used in queue names.
    pub short_name: String,
}

/// Disk of a location.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct DiskRecord {
    /// Host with the disk; `None` if the disk is mounted on the host that reads the row.
    pub host: Option<String>,
    /// Root directory of the location.
    pub path: String,
}

/// Route from the site of the origin to the site of the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct RouteRecord {
    /// Id of the route.
    pub id: i64,
    /// Program that makes the copies, e.g. `bbcp`.
    pub method: Option<String>,
    /// Kind of route.
    #[schema(value_type = String)]
    pub route_type: Label<RouteType>,
}

/// A transfer with its whole history.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TransferDetail {
    /// The transfer.
    pub transfer: TransferRecord,
    /// Lease on the transfer, if a worker holds one.
    pub lease: Option<LeaseInfo>,
    /// Bytes of an incomplete copy on which both ends agree, according to the recorded blocks; `None` if none are recorded.
    pub bytes_verified: Option<u64>,
    /// Time since which the transfer is SCHEDULED, and its message.
    pub schedule: Option<ScheduleRecord>,
    /// Time until which the transfer waits for its next attempt.
    pub not_before: Option<DateTime<Utc>>,
    /// Error code of the failure that causes this delay.
    pub waits_for: Option<String>,
    /// Lease on another transfer to the same path.
    #[serde(rename = "rival")]
    pub competing_lease: Option<LeaseInfo>,
    /// Attempts of the transfer, oldest first.
    pub attempts: Vec<AttemptRecord>,
    /// Actions of operators on the transfer, oldest first.
    pub actions: Vec<ActionRecord>,
}

/// An action of an operator.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ActionRecord {
    /// Time of the action.
    pub acted_at: DateTime<Utc>,
    /// The action.
    #[schema(value_type = String)]
    pub action: Action,
    /// The operator, as `login@host`.
    pub operator: String,
    /// Reason, if the operator gave one.
    pub reason: Option<String>,
    /// Status of the transfer before the action.
    pub previous_status: String,
}

/// One attempt of a transfer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AttemptRecord {
    /// Number of the attempt.
    pub attempt: AttemptNumber,
    /// Celery's id of the task.
    pub task_id: String,
    /// Celery's name of the worker.
    pub worker: String,
    /// Start of the attempt.
    pub started_at: DateTime<Utc>,
    /// End of the attempt; `None` while it runs.
    pub ended_at: Option<DateTime<Utc>>,
    /// Outcome of the attempt; `None` while it runs.
    #[schema(value_type = Option<String>)]
    pub outcome: Option<Outcome>,
    /// Stable error code, for programs.
    pub error_code: Option<String>,
    /// Message for people: the error, or how the copy of a completed attempt was verified.
    pub message: Option<String>,
    /// Bytes copied.
    pub bytes: Option<i64>,
    /// Mean rate of the copy, in bytes per second.
    pub rate_bytes_per_s: Option<i64>,
    /// Digest on which both ends agree.
    pub digest: Option<String>,
    /// Path of the log file on the worker's host.
    pub log_path: Option<String>,
    /// Name of a temporary file that may still be at the destination.
    pub temporary_name: Option<String>,
}

impl Repository {
    /// Returns a transfer with all rows that it refers to; `None` if the transfer does not exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn transfer(&self, id: TransferId) -> Result<Option<TransferRecord>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_transfer(id).await?) })
            .await
    }

    /// Returns a transfer with its lease and all attempts; `None` if the transfer does not exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn show(&self, id: TransferId) -> Result<Option<TransferDetail>, DatabaseError> {
        let reading = async {
            let Some(transfer) = self.read_transfer(id).await? else {
                return Ok(None);
            };
            let db = self.database.connection();
            let lease = find_lease(db, id).await?.as_ref().map(LeaseInfo::from);
            let attempts = transfer_worker_attempt::Entity::find()
                .filter(transfer_worker_attempt::Column::DataTransferId.eq(id))
                .order_by_asc(transfer_worker_attempt::Column::Attempt)
                .all(db)
                .await?;
            let actions = transfer_worker_action::Entity::find()
                .filter(transfer_worker_action::Column::DataTransferId.eq(id))
                .order_by_asc(transfer_worker_action::Column::Id)
                .all(db)
                .await?;
            let delay = match self.row(id).await? {
                Some(row) if row.status.means(Status::Pending) => {
                    delay::current_delay(db, &row, database::now(db).await?).await?
                }
                _ => None,
            };
            let schedule = match transfer.status.means(Status::Scheduled) {
                true => self.schedule_record(id).await?,
                false => None,
            };
            let size = transfer
                .package
                .as_ref()
                .and_then(|package| package.size_bytes);
            let size = size.or(lease.as_ref().and_then(|lease| lease.bytes_total));
            let size = size.and_then(|bytes| u64::try_from(bytes).ok());
            Ok(Some(TransferDetail {
                bytes_verified: self.verified_bytes(id, size).await?,
                schedule,
                competing_lease: self.competing_lease(&transfer).await?,
                transfer,
                lease,
                not_before: delay.as_ref().map(|delay| delay.not_before),
                waits_for: delay.map(|delay| delay.error_code),
                attempts: attempts.into_iter().map(AttemptRecord::from).collect(),
                actions: actions.into_iter().map(ActionRecord::from).collect(),
            }))
        };
        self.database.bounded(reading).await
    }

    async fn read_transfer(&self, id: TransferId) -> Result<Option<TransferRecord>, DbErr> {
        let Some(row) = self.row(id).await? else {
            return Ok(None);
        };
        let retry_count = retry_count(&row);
        let package = self.package(row.data_transfer_package_id).await?;
        let origin = self.location(row.origin_location_id).await?;
        let destination = self.location(row.destination_location_id).await?;
        let route = match (&origin, &destination) {
            (Some(origin), Some(destination)) => self.route(origin, destination).await?,
            _ => None,
        };
        Ok(Some(TransferRecord {
            id,
            status: row.status,
            retry_count,
            start_time: row.start_time.map(|Timestamp(time)| time),
            end_time: row.end_time.map(|Timestamp(time)| time),
            created_at: self.created_at(id).await?,
            failure_error_message: row.failure_error_message,
            package,
            origin,
            destination,
            route,
        }))
    }

    /// Returns the lease on another transfer to the same destination path, if one exists.
    async fn competing_lease(&self, transfer: &TransferRecord) -> Result<Option<LeaseInfo>, DbErr> {
        use data_transfer::{Column, Entity};
        use data_transfer_package::{Column as PackageColumn, Entity as Packages};
        let (Some(package), Some(destination)) = (&transfer.package, &transfer.destination) else {
            return Ok(None);
        };
        let db = self.database.connection();
        // Few rows: one for each copy that runs.
        let leases = transfer_worker_lease::Entity::find()
            .filter(transfer_worker_lease::Column::DataTransferId.ne(transfer.id))
            .all(db)
            .await?;
        let held = leases.iter().map(|lease| lease.data_transfer_id);
        let query = Query::select()
            .expr(Expr::col((Entity, Column::Id)).cast_as("bigint"))
            .from(Entity)
            .join(
                JoinType::InnerJoin,
                Packages,
                Expr::col((Packages, PackageColumn::Id))
                    .equals((Entity, Column::DataTransferPackageId)),
            )
            .and_where(Expr::col((Entity, Column::Id)).is_in(held))
            .and_where(Expr::col((Entity, Column::DestinationLocationId)).eq(destination.id))
            .and_where(
                Expr::col((Packages, PackageColumn::RelativePath)).eq(&*package.relative_path),
            )
            .limit(1)
            .to_owned();
        let Some(row) = db.query_one(&query).await? else {
            return Ok(None);
        };
        let id: i64 = row.try_get_by_index(0)?;
        let competing_lease = leases.iter().find(|lease| lease.data_transfer_id == id);
        Ok(competing_lease.map(LeaseInfo::from))
    }

    async fn package(&self, id: Option<i64>) -> Result<Option<PackageRecord>, DbErr> {
        let Some(id) = id else { return Ok(None) };
        let row = data_transfer_package::Entity::find_by_id(id)
            .one(self.database.connection())
            .await?;
        Ok(row.map(|row| PackageRecord {
            id: row.id,
            file_name: row.file_name,
            relative_path: row.relative_path,
            size_bytes: row.size,
            checksum: row.checksum,
        }))
    }

    pub(in crate::transfer) async fn location(
        &self,
        id: Option<i64>,
    ) -> Result<Option<LocationRecord>, DbErr> {
        let Some(id) = id else { return Ok(None) };
        let db = self.database.connection();
        let Some(row) = data_location::Entity::find_by_id(id).one(db).await? else {
            return Ok(None);
        };
        let site = site::Entity::find_by_id(row.site_id).one(db).await?;
        let disk = disk_data_location::Entity::find_by_id(id).one(db).await?;
        Ok(Some(LocationRecord {
            id: row.id,
            name: row.name,
            location_type: row.location_type,
            storage_type: row.storage_type,
            priority: row.priority,
            active: self.is_active(id).await?,
            site: site.map(|row| SiteRecord {
                id: row.id,
                name: row.name,
                short_name: row.short_name,
            }),
            disk: disk.map(|row| DiskRecord {
                host: row.host,
                path: row.path,
            }),
        }))
    }

    /// Returns the time at which a transfer's row was created.
    async fn created_at(&self, id: TransferId) -> Result<Option<DateTime<Utc>>, DbErr> {
        if !self.schema.has_transfer_created_at {
            return Ok(None);
        }
        let query = Query::select()
            .expr(Expr::col(data_transfer::Optional::CreatedAt).cast_as("text"))
            .from(data_transfer::Entity)
            .and_where(Expr::col(data_transfer::Column::Id).eq(id))
            .to_owned();
        let row = self.database.connection().query_one(&query).await?;
        let time: Option<Timestamp> = row
            .map(|row| row.try_get_by_index(0))
            .transpose()?
            .flatten();
        Ok(time.map(|Timestamp(time)| time))
    }

    /// Returns true if the location is in use; also if the database does not record this.
    async fn is_active(&self, location_id: i64) -> Result<bool, DbErr> {
        if !self.schema.has_active {
            return Ok(true);
        }
        let query = Query::select()
            .column(data_location::Optional::Active)
            .from(data_location::Entity)
            .and_where(Expr::col(data_location::Column::Id).eq(location_id))
            .to_owned();
        let row = self.database.connection().query_one(&query).await?;
        let active: Option<bool> = row
            .map(|row| row.try_get_by_index(0))
            .transpose()?
            .flatten();
        Ok(active.unwrap_or(true))
    }

    async fn route(
        &self,
        origin: &LocationRecord,
        destination: &LocationRecord,
    ) -> Result<Option<RouteRecord>, DbErr> {
        use data_transfer_route::{Column, Entity};
        let (Some(from), Some(to)) = (&origin.site, &destination.site) else {
            return Ok(None);
        };
        let routes = Entity::find()
            .filter(Column::OriginSiteId.eq(from.id))
            .filter(Column::DestinationSiteId.eq(to.id))
            .order_by_asc(Column::Id)
            .all(self.database.connection())
            .await?;
        Ok(
            best_route(routes, origin.id, destination.id).map(|row| RouteRecord {
                id: row.id,
                method: row.method,
                route_type: row.route_type,
            }),
        )
    }
}

/// Returns the route that fits two locations best: a route for both locations, otherwise one for either location,
/// otherwise one for the sites. Of equally specific routes, the one with the lowest id.
fn best_route(
    routes: Vec<data_transfer_route::Model>,
    origin_id: i64,
    destination_id: i64,
) -> Option<data_transfer_route::Model> {
    let fits = |named: Option<i64>, id: i64| named.is_none_or(|named| named == id);
    let names = |route: &data_transfer_route::Model| {
        usize::from(route.origin_location_id.is_some())
            + usize::from(route.destination_location_id.is_some())
    };
    routes
        .into_iter()
        .filter(|route| {
            fits(route.origin_location_id, origin_id)
                && fits(route.destination_location_id, destination_id)
        })
        .min_by_key(|route| (std::cmp::Reverse(names(route)), route.id))
}

impl From<transfer_worker_action::Model> for ActionRecord {
    fn from(row: transfer_worker_action::Model) -> Self {
        Self {
            acted_at: row.acted_at,
            action: row.action,
            operator: row.operator,
            reason: row.reason,
            previous_status: row.previous_status,
        }
    }
}

impl From<transfer_worker_attempt::Model> for AttemptRecord {
    fn from(row: transfer_worker_attempt::Model) -> Self {
        Self {
            attempt: AttemptNumber::new(row.attempt),
            task_id: row.task_id,
            worker: row.worker,
            started_at: row.started_at,
            ended_at: row.ended_at,
            outcome: row.outcome,
            error_code: row.error_code,
            message: row.message,
            bytes: row.bytes,
            rate_bytes_per_s: row.rate_bytes_per_s,
            digest: row.digest,
            log_path: row.log_path,
            temporary_name: row.temporary_name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(id: i64, from: Option<i64>, to: Option<i64>) -> data_transfer_route::Model {
        data_transfer_route::Model {
            id,
            origin_site_id: 1,
            destination_site_id: 2,
            method: Some("bbcp".to_owned()),
            route_type: Label::Known(RouteType::Direct),
            origin_location_id: from,
            destination_location_id: to,
        }
    }

    #[test]
    fn the_most_particular_route_counts() {
        let all = vec![
            route(1, None, None),
            route(2, None, None),
            route(3, Some(10), None),
            route(4, Some(10), Some(20)),
            route(5, Some(11), Some(20)),
        ];
        let best = |from, to| best_route(all.clone(), from, to).map(|route| route.id);
        assert_eq!(best(10, 20), Some(4));
        assert_eq!(best(10, 21), Some(3));
        assert_eq!(best(11, 20), Some(5));
        assert_eq!(best(12, 20), Some(1));
        assert_eq!(best_route(vec![route(3, Some(10), None)], 11, 20), None);
    }
}
