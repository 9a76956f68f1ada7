//! Finding transfers.
//!
//! A list is one statement: a page of ids first, filtered, ordered and cut, and only for these the
//! names, sizes and errors. So a database with very many transfers is not joined as a whole. What
//! this asks of the ops-db's tables, and which indexes their owners may add for more than some
//! hundred thousand rows, is in docs/operations/queries.md.

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

use super::ends::{ID, TransferEnd, ends, with_ends};
use super::place::{Place, ids_of, known_places};
use super::{Repository, ScheduleRecord, delay};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;
use crate::transfer::lease::LeaseInfo;

/// A transfer in a list.
#[derive(Debug, Clone, Serialize)]
pub struct TransferSummary {
    /// Its id.
    pub id: TransferId,
    /// How far it is.
    pub status: Label<Status>,
    /// Failures so far.
    pub retry_count: u32,
    /// The latest time that its row tells: its end, else the begin of its latest attempt, else when
    /// it was made (where the database has that).
    pub changed_at: Option<DateTime<Utc>>,
    /// From here.
    pub origin: Option<TransferEnd>,
    /// To there.
    pub destination: Option<TransferEnd>,
    /// Name of the file.
    pub file_name: Option<String>,
    /// Its size.
    pub size_bytes: Option<i64>,
    /// Why the latest attempt failed.
    pub failure_error_message: Option<String>,
    /// Class of the latest attempt's error.
    pub error_code: Option<String>,
    /// Who is at it.
    pub lease: Option<LeaseInfo>,
    /// Until when it waits to be tried again.
    pub not_before: Option<DateTime<Utc>>,
    /// Since when it is SCHEDULED, and by which message.
    pub schedule: Option<ScheduleRecord>,
}

/// Which transfers; those for which all of it holds. The default is: all.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// With one of these ids.
    pub ids: Option<Vec<TransferId>>,
    /// With one of these statuses, if there are any.
    pub statuses: Vec<Status>,
    /// From or to this place.
    pub site: Option<Place>,
    /// From this place.
    pub origin: Option<Place>,
    /// To this place.
    pub destination: Option<Place>,
    /// Whose [time](TransferSummary::changed_at) lies farther back than this.
    pub older_than: Option<Duration>,
    /// Whose time does not lie farther back than this.
    pub newer_than: Option<Duration>,
    /// Whose latest attempt ended with an error of this class.
    pub error_code: Option<String>,
    /// Held by the worker of this name, or by any on the host of this name.
    pub held_by: Option<String>,
    /// Held by anybody.
    pub is_held: bool,
    /// PENDING, and waiting for a time that has not come.
    pub is_waiting: bool,
    /// SCHEDULED for longer than this, and taken by no worker.
    pub scheduled_for: Option<Duration>,
}

/// What a list is ordered by. Those that are equal, and those without a time or a size, follow with
/// the highest id first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sort {
    /// The highest first.
    #[default]
    Id,
    /// The longest unchanged first, by [`TransferSummary::changed_at`].
    Age,
    /// In the order of a transfer's life, FAILED last.
    Status,
    /// The largest first.
    Size,
    /// Those with the most failures first.
    Retries,
}

/// Which transfers are listed, and how.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Which.
    pub filter: Filter,
    /// In which order.
    pub sort: Sort,
    /// The other way round.
    pub is_reversed: bool,
    /// So many at most.
    pub limit: Option<u64>,
}

/// Why transfers could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// There is no such site or location.
    #[error("there is no `{place}`; the database has {}", or_nothing(.known))]
    UnknownPlace {
        /// What was asked for.
        place: Place,
        /// What there is: locations of that site, or else sites.
        known: Vec<String>,
    },
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for ListError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn or_nothing(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Names of columns of the page.
const PAGE: &str = "page";
const KEY: &str = "sort_key";

impl Repository {
    /// Transfers.
    ///
    /// # Errors
    /// [`ListError::UnknownPlace`]; else what the database says.
    pub async fn list(&self, listing: &Listing) -> Result<Vec<TransferSummary>, ListError> {
        self.database.bounded(self.read_list(listing)).await
    }

    /// How many transfers there are, or `at_most` if there are more: counting takes time.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn count(&self, filter: &Filter, at_most: u64) -> Result<u64, ListError> {
        let counting = async {
            let db = self.database.connection();
            let mut some = Query::select();
            some.expr(Expr::val(1)).from(data_transfer::Entity);
            self.restrict(db, &mut some, filter).await?;
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
        // Few: one for each copy that runs.
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

    /// The ids that are listed, with what they are ordered by.
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
            Sort::Age => self.comparable(self.changed_at()),
            Sort::Status => self.stage(),
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
        self.restrict(db, &mut page, &listing.filter).await?;
        order(&mut page, listing, key, id);
        if let Some(limit) = listing.limit {
            page.limit(limit);
        }
        Ok(page)
    }

    /// Adds a filter's conditions to a query of transfers.
    async fn restrict(
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
            let changed = || self.comparable(self.changed_at());
            if let Some(age) = filter.older_than {
                query.and_where(changed().lt(self.comparable(Expr::val(ago(now, age)))));
            }
            if let Some(age) = filter.newer_than {
                query.and_where(changed().gte(self.comparable(Expr::val(ago(now, age)))));
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
                .and_where(Expr::exists(delay::stands(database::now(db).await?)));
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

    /// See [`TransferSummary::changed_at`].
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

    /// A time by which rows can be ordered. On SQLite a time is a text, with or without a `T`, a
    /// fraction and an offset.
    fn comparable(&self, time: Expr) -> Expr {
        match self.database.backend() {
            DbBackend::Sqlite => Func::cust("julianday").arg(time).into(),
            _ => time,
        }
    }

    /// Where in its life a transfer is, as a number.
    fn stage(&self) -> Expr {
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

/// Orders a page, or what was selected for one.
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
        // NULLs last in either direction; both databases can.
        query.order_by_expr_with_nulls(key, direction, NullOrdering::Last);
        query.order_by(id, Order::Desc);
    } else {
        query.order_by(id, direction);
    }
}

/// So long before `now`; the beginning of time where that is farther back than the calendar goes.
fn ago(now: DateTime<Utc>, age: Duration) -> Timestamp {
    let time = TimeDelta::from_std(age)
        .ok()
        .and_then(|age| now.checked_sub_signed(age))
        // PostgreSQL's calendar begins later than chrono's.
        .filter(|time| *time > DateTime::UNIX_EPOCH)
        .unwrap_or(DateTime::UNIX_EPOCH);
    Timestamp(time)
}

/// The class of error of a transfer's latest attempt, for each row of the outer query.
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

/// Transfers whose latest attempt ended with this class of error.
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

/// Transfers that somebody holds: anybody, or the worker or host of this name.
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
    // As `delay::stands` has it.
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
    fn long_ago_is_in_the_calendar() {
        let now = Utc::now();
        assert_eq!(ago(now, Duration::MAX).0, DateTime::UNIX_EPOCH);
        assert_eq!(
            now - ago(now, Duration::from_secs(5)).0,
            TimeDelta::seconds(5)
        );
    }
}
