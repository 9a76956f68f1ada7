//! Search for transfers.
//!
//! A list is one statement: it first selects a page of ids (filtered, ordered and limited), and joins names, sizes and
//! errors only for these. Therefore a database with many transfers is not joined as a whole. For the requirements on
//! the ops-db's tables, and the indexes that their owners may add for more than some hundred thousand rows, see
//! docs/operations/queries.md.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::{
    Label, Status, Timestamp, data_transfer, data_transfer_package, transfer_worker_attempt,
    transfer_worker_delay, transfer_worker_lease,
};
use sea_orm::sea_query::{
    CaseStatement, Expr, ExprTrait as _, Func, JoinType, NullOrdering, Order, Query,
    SelectStatement,
};
use sea_orm::{ConnectionTrait, DbBackend, DbErr, EntityTrait, QueryResult};
use serde::Serialize;
use utoipa::ToSchema;

use super::ends::{ID, TransferEnd, ends, with_ends};
use super::place::{Place, ids_of, known_places};
use super::{Repository, ScheduleRecord, delay};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;
use crate::transfer::lease::LeaseInfo;

/// A transfer in a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TransferSummary {
    /// Id of the transfer.
    pub id: TransferId,
    /// State of the transfer.
    #[schema(value_type = String)]
    pub status: Label<Status>,
    /// Number of failed attempts so far.
    pub retry_count: u32,
    /// Latest time in the row: its end, otherwise the start of its latest attempt, otherwise its creation (if the
    /// database has that column).
    pub changed_at: Option<DateTime<Utc>>,
    /// Location to copy from.
    pub origin: Option<TransferEnd>,
    /// Location to copy to.
    pub destination: Option<TransferEnd>,
    /// Name of the file.
    pub file_name: Option<String>,
    /// Size in bytes.
    pub size_bytes: Option<i64>,
    /// Error message of the latest failed attempt.
    pub failure_error_message: Option<String>,
    /// Error code of the latest attempt.
    pub error_code: Option<String>,
    /// Lease on the transfer, if a worker holds one.
    pub lease: Option<LeaseInfo>,
    /// Time until which the transfer waits for its next attempt.
    pub not_before: Option<DateTime<Utc>>,
    /// Time since which the transfer is SCHEDULED, and its message.
    pub schedule: Option<ScheduleRecord>,
}

/// Selection of transfers: those that meet all conditions. The default selects all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Has one of these ids.
    pub ids: Option<Vec<TransferId>>,
    /// Has one of these statuses; an empty list allows all.
    pub statuses: Vec<Status>,
    /// Id is from the first of these ids on, and below the second one.
    pub id_range: Option<(TransferId, TransferId)>,
    /// Name of the file contains this text, in upper or lower case.
    pub file_name: Option<String>,
    /// Starts or ends at this site or location.
    pub site: Option<Place>,
    /// Starts at this site or location.
    pub origin: Option<Place>,
    /// Ends at this site or location.
    pub destination: Option<Place>,
    /// [Last change](TransferSummary::changed_at) is earlier than this long ago.
    pub older_than: Option<Duration>,
    /// Last change is at most this long ago.
    pub newer_than: Option<Duration>,
    /// Last change is at this time or later.
    pub changed_from: Option<DateTime<Utc>>,
    /// Last change is before this time.
    pub changed_before: Option<DateTime<Utc>>,
    /// Latest attempt ended with this error code.
    pub error_code: Option<String>,
    /// Lease is held by the worker with this name, or by any worker on the host with this name.
    pub held_by: Option<String>,
    /// Has a lease.
    pub is_held: bool,
    /// Is PENDING with a retry delay that has not passed.
    pub is_waiting: bool,
    /// Has been SCHEDULED for longer than this, without a lease.
    pub scheduled_for: Option<Duration>,
}

/// Order of a list. Entries that are equal are ordered by descending id; entries without a time or a size are last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sort {
    /// Highest id first.
    #[default]
    Id,
    /// Longest unchanged first, by [`TransferSummary::changed_at`].
    Age,
    /// By the normal order of states: PENDING, SCHEDULED, IN_PROGRESS, COMPLETED, FAILED.
    Status,
    /// Largest file first.
    Size,
    /// Most failures first.
    Retries,
}

/// Request for a list of transfers.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Conditions of the listed transfers.
    pub filter: Filter,
    /// Order of the list.
    pub sort: Sort,
    /// True for the reverse order.
    pub is_reversed: bool,
    /// Maximum number of transfers.
    pub limit: Option<u64>,
}

/// Error of listing transfers.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The site or location does not exist.
    #[error("there is no `{place}`; the database has {}", known_names_text(.known))]
    UnknownPlace {
        /// Name in the request.
        place: Place,
        /// Names that exist: the locations of the site, or all sites if the site does not exist.
        known: Vec<String>,
    },
    /// The database returned an error.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for ListError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn known_names_text(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Alias of the page, and name of its column with the sort key.
const PAGE: &str = "page";
const KEY: &str = "sort_key";

impl Repository {
    /// Returns the transfers of a listing.
    ///
    /// # Errors
    /// [`ListError::UnknownPlace`], [`ListError::Database`].
    pub async fn list(&self, listing: &Listing) -> Result<Vec<TransferSummary>, ListError> {
        self.database.bounded(self.read_list(listing)).await
    }

    /// Counts transfers, up to `at_most` to limit the time.
    ///
    /// # Errors
    /// The errors of [`Self::list`].
    pub async fn count(&self, filter: &Filter, at_most: u64) -> Result<u64, ListError> {
        let counting = async {
            let db = self.database.connection();
            let mut some = Query::select();
            some.expr(Expr::val(1)).from(data_transfer::Entity);
            self.add_conditions(db, &mut some, filter).await?;
            some.limit(at_most);
            let query = Query::select()
                .expr(Expr::val(1).count())
                .from_subquery(some, PAGE)
                .to_owned();
            let row = db.query_one(&query).await?;
            let count: i64 = row.map_or(Ok(0), |row| row.try_get_by_index(0))?;
            Ok(u64::try_from(count).unwrap_or(0))
        };
        self.database.bounded(counting).await
    }

    async fn read_list(&self, listing: &Listing) -> Result<Vec<TransferSummary>, ListError> {
        let db = self.database.connection();
        let query = self.list_query(db, listing).await?;
        let now = database::now(db).await?;
        let rows = db.query_all(&query).await?;
        // Few rows: one for each copy that runs.
        let leases = transfer_worker_lease::Entity::find().all(db).await?;
        let leases: HashMap<TransferId, LeaseInfo> = leases
            .iter()
            .map(|lease| (lease.data_transfer_id.into(), lease.into()))
            .collect();
        let summaries: Result<Vec<_>, DbErr> =
            rows.iter().map(|row| summary(row, &leases, now)).collect();
        let mut summaries = summaries?;
        self.add_schedules(&mut summaries).await?;
        Ok(summaries)
    }

    async fn list_query(
        &self,
        db: &impl ConnectionTrait,
        listing: &Listing,
    ) -> Result<SelectStatement, ListError> {
        use data_transfer::{Column, Entity};
        use data_transfer_package::{Column as PackageColumn, Entity as Packages};
        use transfer_worker_delay::{Column as DelayColumn, Entity as Delays};
        let page = self.page(db, listing).await?;
        let mut query = Query::select();
        query.from_subquery(page, PAGE).join(
            JoinType::InnerJoin,
            Entity,
            Expr::col((Entity, Column::Id)).equals((PAGE, ID)),
        );
        with_ends(&mut query)
            .join(
                JoinType::LeftJoin,
                Packages,
                Expr::col((Packages, PackageColumn::Id))
                    .equals((Entity, Column::DataTransferPackageId)),
            )
            .join(
                JoinType::LeftJoin,
                Delays,
                Expr::col((Delays, DelayColumn::DataTransferId)).equals((Entity, Column::Id)),
            )
            .expr_as(
                Expr::col((Entity, Column::Status)).cast_as("text"),
                "status",
            )
            .expr_as(
                Expr::col((Entity, Column::RetryCount)).cast_as("bigint"),
                "retry_count",
            )
            .expr_as(self.changed_at().cast_as("text"), "changed_at")
            .expr_as(
                Expr::col((Entity, Column::FailureErrorMessage)),
                "failure_error_message",
            )
            .expr_as(Expr::col((Packages, PackageColumn::FileName)), "file_name")
            .expr_as(
                Expr::col((Packages, PackageColumn::Size)).cast_as("bigint"),
                "size_bytes",
            )
            .expr_as(latest_error(), "error_code")
            .expr_as(Expr::col((Delays, DelayColumn::NotBefore)), "not_before")
            .expr_as(
                Expr::col((Delays, DelayColumn::RetryCount)),
                "delay_retry_count",
            );
        order(&mut query, listing, Expr::col((PAGE, KEY)), (PAGE, ID));
        Ok(query)
    }

    /// Query for the ids of the listed transfers, with their sort keys.
    async fn page(
        &self,
        db: &impl ConnectionTrait,
        listing: &Listing,
    ) -> Result<SelectStatement, ListError> {
        use data_transfer::{Column, Entity};
        use data_transfer_package::{Column as PackageColumn, Entity as Packages};
        let id = (Entity, Column::Id);
        let key = match listing.sort {
            Sort::Id => Expr::col(id),
            Sort::Age => self.comparable_time(self.changed_at()),
            Sort::Status => self.status_rank(),
            Sort::Size => Expr::col((Packages, PackageColumn::Size)),
            Sort::Retries => {
                Func::coalesce([Expr::col((Entity, Column::RetryCount)), Expr::val(0)]).into()
            }
        };
        let mut page = Query::select();
        page.from(Entity)
            .expr_as(Expr::col(id), ID)
            .expr_as(key.clone(), KEY);
        if listing.sort == Sort::Size {
            page.join(
                JoinType::LeftJoin,
                Packages,
                Expr::col((Packages, PackageColumn::Id))
                    .equals((Entity, Column::DataTransferPackageId)),
            );
        }
        self.add_conditions(db, &mut page, &listing.filter).await?;
        order(&mut page, listing, key, id);
        if let Some(limit) = listing.limit {
            page.limit(limit);
        }
        Ok(page)
    }

    /// Adds the conditions of a filter to a query of transfers.
    async fn add_conditions(
        &self,
        db: &impl ConnectionTrait,
        query: &mut SelectStatement,
        filter: &Filter,
    ) -> Result<(), ListError> {
        use data_transfer::{Column, Entity};
        let id = || Expr::col((Entity, Column::Id));
        if let Some(ids) = &filter.ids {
            query.and_where(id().is_in(ids.iter().copied()));
        }
        if let Some((from, below)) = filter.id_range {
            query.and_where(id().gte(from)).and_where(id().lt(below));
        }
        if let Some(part) = &filter.file_name {
            query.and_where(self.file_name_contains(part));
        }
        for (time, is_begin) in [(filter.changed_from, true), (filter.changed_before, false)] {
            let Some(time) = time else { continue };
            let changed = self.comparable_time(self.changed_at());
            let time = self.comparable_time(Expr::val(Timestamp(time)));
            query.and_where(match is_begin {
                true => changed.gte(time),
                false => changed.lt(time),
            });
        }
        if !filter.statuses.is_empty() {
            query.and_where(self.status_is(&filter.statuses));
        }
        let places = [&filter.site, &filter.origin, &filter.destination];
        if places.iter().any(|place| place.is_some()) {
            let known = known_places(db).await?;
            let at = |column, place| {
                let ids = ids_of(&known, place)?;
                Ok::<_, ListError>(Expr::col((Entity, column)).is_in(ids))
            };
            if let Some(place) = &filter.site {
                let from = at(Column::OriginLocationId, place)?;
                query.and_where(from.or(at(Column::DestinationLocationId, place)?));
            }
            if let Some(place) = &filter.origin {
                query.and_where(at(Column::OriginLocationId, place)?);
            }
            if let Some(place) = &filter.destination {
                query.and_where(at(Column::DestinationLocationId, place)?);
            }
        }
        if filter.older_than.is_some() || filter.newer_than.is_some() {
            let now = database::now(db).await?;
            let changed = || self.comparable_time(self.changed_at());
            if let Some(age) = filter.older_than {
                query.and_where(changed().lt(self.comparable_time(Expr::val(ago(now, age)))));
            }
            if let Some(age) = filter.newer_than {
                query.and_where(changed().gte(self.comparable_time(Expr::val(ago(now, age)))));
            }
        }
        if let Some(code) = &filter.error_code {
            query.and_where(id().in_subquery(latest_with_error(code)));
        }
        if filter.is_held || filter.held_by.is_some() {
            query.and_where(id().in_subquery(held(filter.held_by.as_deref())));
        }
        if filter.is_waiting {
            query
                .and_where(self.status_is(&[Status::Pending]))
                .and_where(Expr::exists(delay::delay_applies(database::now(db).await?)));
        }
        if let Some(age) = filter.scheduled_for {
            let now = database::now(db).await?;
            query
                .and_where(self.status_is(&[Status::Scheduled]))
                .and_where(id().not_in_subquery(held(None)))
                .and_where(self.is_scheduled_since(age, now));
        }
        Ok(())
    }

    /// Expression for [`TransferSummary::changed_at`].
    fn changed_at(&self) -> Expr {
        use data_transfer::{Column, Entity, Optional};
        let mut times = vec![
            Expr::col((Entity, Column::EndTime)),
            Expr::col((Entity, Column::StartTime)),
        ];
        if self.schema.has_transfer_created_at {
            times.push(Expr::col((Entity, Optional::CreatedAt)));
        }
        Func::coalesce(times).into()
    }

    /// Condition: the name of the transfer's file contains a text.
    fn file_name_contains(&self, part: &str) -> Expr {
        use data_transfer::{Column, Entity};
        use data_transfer_package::{Column as PackageColumn, Entity as Packages};
        let position = match self.database.backend() {
            DbBackend::Sqlite => "instr",
            _ => "strpos",
        };
        let lower = |text: Expr| Expr::from(Func::lower(text));
        let name = lower(Expr::col((Packages, PackageColumn::FileName)));
        let position: Expr = Func::cust(position)
            .arg(name)
            .arg(lower(Expr::val(part)))
            .into();
        let package = Query::select()
            .expr(Expr::val(1))
            .from(Packages)
            .and_where(
                Expr::col((Packages, PackageColumn::Id))
                    .equals((Entity, Column::DataTransferPackageId)),
            )
            .and_where(position.gt(0))
            .to_owned();
        Expr::exists(package)
    }

    /// Converts a time to a form that can be compared. On SQLite a time is a text, with or without `T`, fraction and
    /// offset.
    fn comparable_time(&self, time: Expr) -> Expr {
        match self.database.backend() {
            DbBackend::Sqlite => Func::cust("julianday").arg(time).into(),
            _ => time,
        }
    }

    /// Number of a transfer's state in the normal order of states.
    fn status_rank(&self) -> Expr {
        let stages = [
            Status::Pending,
            Status::Scheduled,
            Status::InProgress,
            Status::Completed,
            Status::Failed,
        ];
        let mut case = CaseStatement::new();
        for (stage, status) in (0i32..).zip(stages) {
            case = case.case(self.status_is(&[status]), Expr::val(stage));
        }
        case.into()
    }
}

/// Orders the page, or the final list by the columns of the page.
fn order<C>(query: &mut SelectStatement, listing: &Listing, key: Expr, id: C)
where
    C: sea_orm::sea_query::IntoColumnRef,
{
    let is_ascending = matches!(listing.sort, Sort::Age | Sort::Status) != listing.is_reversed;
    let direction = if is_ascending {
        Order::Asc
    } else {
        Order::Desc
    };
    if listing.sort != Sort::Id {
        // NULLs are last in both directions; both databases support this.
        query.order_by_expr_with_nulls(key, direction, NullOrdering::Last);
        query.order_by(id, Order::Desc);
    } else {
        query.order_by(id, direction);
    }
}

/// Time `age` before `now`, at the earliest 1970-01-01.
fn ago(now: DateTime<Utc>, age: Duration) -> Timestamp {
    let time = TimeDelta::from_std(age)
        .ok()
        .and_then(|age| now.checked_sub_signed(age))
        // PostgreSQL's calendar begins later than chrono's.
        .filter(|time| *time > DateTime::UNIX_EPOCH)
        .unwrap_or(DateTime::UNIX_EPOCH);
    Timestamp(time)
}

/// Expression: error code of the latest attempt, for each row of the outer query.
fn latest_error() -> Expr {
    use transfer_worker_attempt::{Column, Entity};
    let latest = Query::select()
        .column((Entity, Column::ErrorCode))
        .from(Entity)
        .and_where(
            Expr::col((Entity, Column::DataTransferId))
                .equals((data_transfer::Entity, data_transfer::Column::Id)),
        )
        .order_by((Entity, Column::Attempt), Order::Desc)
        .limit(1)
        .to_owned();
    Expr::from(latest)
}

/// Subquery: transfers whose latest attempt ended with this error code.
fn latest_with_error(code: &str) -> SelectStatement {
    use transfer_worker_attempt::{Column, Entity};
    const LATER: &str = "later";
    let later = Query::select()
        .expr(Expr::val(1))
        .from_as(Entity, LATER)
        .and_where(
            Expr::col((LATER, Column::DataTransferId)).equals((Entity, Column::DataTransferId)),
        )
        .and_where(Expr::col((LATER, Column::Attempt)).gt(Expr::col((Entity, Column::Attempt))))
        .to_owned();
    Query::select()
        .column((Entity, Column::DataTransferId))
        .from(Entity)
        .and_where(Expr::col((Entity, Column::ErrorCode)).eq(code))
        .and_where(Expr::exists(later).not())
        .to_owned()
}

/// Subquery: transfers with a lease; with `by`, of the worker or host of this name.
fn held(by: Option<&str>) -> SelectStatement {
    use transfer_worker_lease::{Column, Entity};
    let mut query = Query::select();
    query.column((Entity, Column::DataTransferId)).from(Entity);
    if let Some(name) = by {
        let node = Expr::col((Entity, Column::OwnerNode)).eq(name);
        query.and_where(node.or(Expr::col((Entity, Column::OwnerHost)).eq(name)));
    }
    query
}

fn summary(
    row: &QueryResult,
    leases: &HashMap<TransferId, LeaseInfo>,
    now: DateTime<Utc>,
) -> Result<TransferSummary, DbErr> {
    let id = row.try_get("", ID)?;
    let (origin, destination) = ends(row)?;
    let retry_count: Option<i64> = row.try_get("", "retry_count")?;
    let retry_count = retry_count
        .and_then(|count| u32::try_from(count).ok())
        .unwrap_or(0);
    let status: Label<Status> = row.try_get("", "status")?;
    let not_before: Option<DateTime<Utc>> = row.try_get("", "not_before")?;
    let delay_retry_count: Option<i64> = row.try_get("", "delay_retry_count")?;
    let changed_at: Option<Timestamp> = row.try_get("", "changed_at")?;
    // Same condition as `delay::stands`.
    let waits = status.means(Status::Pending) && delay_retry_count == Some(i64::from(retry_count));
    Ok(TransferSummary {
        id,
        not_before: not_before.filter(|time| waits && *time > now),
        retry_count,
        status,
        changed_at: changed_at.map(|Timestamp(time)| time),
        origin,
        destination,
        file_name: row.try_get("", "file_name")?,
        size_bytes: row.try_get("", "size_bytes")?,
        failure_error_message: row.try_get("", "failure_error_message")?,
        error_code: row.try_get("", "error_code")?,
        lease: leases.get(&id).cloned(),
        schedule: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn very_long_durations_are_accepted() {
        let now = crate::clock::now();
        assert_eq!(ago(now, Duration::MAX).0, DateTime::UNIX_EPOCH);
        assert_eq!(
            now - ago(now, Duration::from_secs(5)).0,
            TimeDelta::seconds(5)
        );
    }
}
