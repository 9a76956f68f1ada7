//! State of the whole system, for the status page. All statements only read.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use entity::{
    Label, Outcome, Status, Timestamp, data_transfer, transfer_worker_attempt,
    transfer_worker_delay, transfer_worker_lease, transfer_worker_schedule,
};
use sea_orm::sea_query::{
    Expr, ExprTrait as _, Func, JoinType, Order, OverStatement as _, Query, SelectStatement,
    WindowStatement,
};
use sea_orm::{ConnectionTrait, DbBackend, DbErr, QueryResult};

use super::ends::TransferEnd;
use super::{Filter, ListError, Listing, Repository, Traffic, TransferSummary};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::failures::FailureKind;
use crate::transfer::id::TransferId;
use crate::transfer::link::LinkName;

/// Maximum number of listed transfers of one cause.
const LISTED: i64 = 20;

/// Transfers with the same cause of a problem.
#[derive(Debug, Clone)]
pub struct Cause {
    /// Error code of the latest attempt, or name of the queue; `None` if nothing is recorded.
    pub name: Option<String>,
    /// Number of transfers.
    pub count: u64,
    /// The newest of them, at most 20.
    pub transfers: Vec<TransferSummary>,
}

/// Result of reading the whole table of transfers.
#[derive(Debug, Clone)]
pub struct TransferCount {
    /// Time of the count, by the database's clock.
    pub at: DateTime<Utc>,
    /// Number of transfers by status. Rows with an unknown status are not counted.
    pub by_status: BTreeMap<&'static str, u64>,
    /// Transfers of each link that have not ended.
    pub traffic: BTreeMap<LinkName, Traffic>,
    /// FAILED transfers by the error code of their last attempt.
    pub failed: Vec<Cause>,
    /// Transfers that are IN_PROGRESS without a lease; at most one cause, without a name.
    pub untracked: Vec<Cause>,
}

/// Ended attempts of one link in one step of a period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedCount {
    /// Name of the link; `None` if the transfer, or one of its sites, no longer exists.
    pub link: Option<LinkName>,
    /// Number of the step: seconds since 1970, divided by the length of a step.
    pub step: i64,
    /// Number of completed transfers.
    pub packages: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Number of transfers that have FAILED.
    pub failed: u64,
    /// Number of failed attempts that are followed by another one.
    pub retried: u64,
    /// Number of attempts that a cause outside of the transfer has ended, such as a disk that is not mounted.
    pub hindered: u64,
}

/// Names of columns of the queries below.
const ID: &str = "id";
const NAME: &str = "name";
const NUMBER: &str = "number";
const COUNT: &str = "count";

impl Repository {
    /// Returns the transfers that have a lease, the oldest id first.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn running(&self, at_most: u64) -> Result<Vec<TransferSummary>, DatabaseError> {
        let listing = Listing {
            filter: Filter {
                is_held: true,
                ..Filter::default()
            },
            is_reversed: true,
            limit: Some(at_most),
            ..Listing::default()
        };
        self.list(&listing).await.map_err(no_place)
    }

    /// Returns the PENDING transfers that wait for the time of their next attempt, by the error code of the last one.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn delayed(&self) -> Result<Vec<Cause>, DatabaseError> {
        use data_transfer::Column as Transfer;
        use transfer_worker_delay::{Column, Entity};
        let reading = async {
            let now = database::now(self.database.connection()).await?;
            let retries = Func::coalesce([
                Expr::col((data_transfer::Entity, Transfer::RetryCount)),
                Expr::val(0),
            ]);
            let transfers = of_transfers(Entity, Column::DataTransferId)
                .expr_as(Expr::col((Entity, Column::ErrorCode)), NAME)
                .and_where(Expr::col((Entity, Column::NotBefore)).gt(now))
                .and_where(Expr::col((Entity, Column::RetryCount)).eq(retries))
                .and_where(self.status_is(&[Status::Pending]))
                .to_owned();
            Ok(self.causes(transfers).await?)
        };
        let found: Result<_, DatabaseError> = self.database.bounded(reading).await;
        self.with_transfers(found?).await
    }

    /// Returns the SCHEDULED transfers that no worker has taken for `age`, by the name of their queue.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn untaken(&self, age: TimeDelta) -> Result<Vec<Cause>, DatabaseError> {
        use transfer_worker_schedule::{Column, Entity};
        if !self.schema.has_schedule {
            return Ok(Vec::new());
        }
        let reading = async {
            let now = database::now(self.database.connection()).await?;
            let since = now
                .checked_sub_signed(age)
                .unwrap_or(DateTime::<Utc>::UNIX_EPOCH);
            let transfers = of_transfers(Entity, Column::DataTransferId)
                .expr_as(Expr::col((Entity, Column::Queue)), NAME)
                .and_where(Expr::col((Entity, Column::ScheduledAt)).lte(since))
                .and_where(self.status_is(&[Status::Scheduled]))
                .and_where(Expr::exists(lease_of_transfer()).not())
                .to_owned();
            Ok(self.causes(transfers).await?)
        };
        let found: Result<_, DatabaseError> = self.database.bounded(reading).await;
        self.with_transfers(found?).await
    }

    /// Counts all transfers. Reads the whole table three times, and takes no lock that blocks others.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn count_transfers(&self) -> Result<TransferCount, DatabaseError> {
        let ends = self.transfer_ends().await?;
        let reading = async {
            let at = database::now(self.database.connection()).await?;
            let (by_status, traffic) = self.counts(&ends).await?;
            let failed = self.causes(self.failed_by_code()).await?;
            let untracked = self.causes(self.without_lease()).await?;
            Ok::<_, DatabaseError>((at, by_status, traffic, failed, untracked))
        };
        let (at, by_status, traffic, failed, untracked) = self.database.bounded(reading).await?;
        Ok(TransferCount {
            at,
            by_status,
            traffic,
            failed: self.with_transfers(failed).await?,
            untracked: self.with_transfers(untracked).await?,
        })
    }

    /// Counts transfers by status, and those of each link that have not ended.
    async fn counts(
        &self,
        ends: &HashMap<i64, TransferEnd>,
    ) -> Result<(BTreeMap<&'static str, u64>, BTreeMap<LinkName, Traffic>), DbErr> {
        use data_transfer::{Column, Entity, Optional};
        use entity::DatabaseEnum as _;
        let columns = [
            Column::Status,
            Column::OriginLocationId,
            Column::DestinationLocationId,
        ];
        let oldest = match self.schema.has_transfer_created_at {
            true => Expr::col(Optional::CreatedAt).min().cast_as("text"),
            false => Expr::val(None::<String>),
        };
        let query = Query::select()
            .expr(Expr::col(Column::Status).cast_as("text"))
            .expr(Expr::col(Column::OriginLocationId).cast_as("bigint"))
            .expr(Expr::col(Column::DestinationLocationId).cast_as("bigint"))
            .expr(Expr::col(Column::Id).count())
            .expr(Expr::col(Column::Id).min().cast_as("bigint"))
            .expr(oldest)
            .from(Entity)
            .group_by_columns(columns)
            .to_owned();
        let mut by_status: BTreeMap<_, _> = Status::ALL.iter().map(|s| (s.name(), 0)).collect();
        let mut traffic: BTreeMap<LinkName, Traffic> = BTreeMap::new();
        for row in self.database.connection().query_all(&query).await? {
            let status: Option<Label<Status>> = row.try_get_by_index(0)?;
            let Some(status) = status.and_then(|label| label.known()) else {
                continue;
            };
            let count = unsigned(row.try_get_by_index(3)?);
            *by_status.entry(status.name()).or_default() += count;
            let link = link_of(row.try_get_by_index(1)?, row.try_get_by_index(2)?, ends);
            let Some(link) = link else { continue };
            if matches!(status, Status::Completed | Status::Failed) {
                continue;
            }
            let of_link = traffic.entry(link).or_default();
            match status {
                Status::InProgress => of_link.active += count,
                Status::Scheduled => of_link.scheduled += count,
                _ => {
                    let lowest: Option<TransferId> = row.try_get_by_index(4)?;
                    // A time that cannot be read is not worth more than the rest of the page.
                    let oldest: Option<Timestamp> = row.try_get_by_index(5).ok().flatten();
                    let oldest = oldest.map(|Timestamp(time)| time);
                    of_link.pending += count;
                    of_link.oldest_pending = least(of_link.oldest_pending, lowest);
                    of_link.pending_since = least(of_link.pending_since, oldest);
                }
            }
        }
        Ok((by_status, traffic))
    }

    /// Query: FAILED transfers with the error code of their last attempt, if it explains the state.
    fn failed_by_code(&self) -> SelectStatement {
        use data_transfer::{Column, Entity};
        use transfer_worker_attempt::{Column as Attempt, Entity as Attempts};
        let code = Expr::case(
            Expr::col((Attempts, Attempt::Outcome)).eq(Outcome::Failed),
            Expr::col((Attempts, Attempt::ErrorCode)),
        );
        let code = Query::select()
            .expr(code.finally(Expr::val(None::<String>)))
            .from(Attempts)
            .and_where(Expr::col((Attempts, Attempt::DataTransferId)).equals((Entity, Column::Id)))
            .order_by((Attempts, Attempt::Attempt), Order::Desc)
            .limit(1)
            .to_owned();
        Query::select()
            .expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID)
            .expr_as(Expr::from(code), NAME)
            .from(Entity)
            .and_where(self.status_is(&[Status::Failed]))
            .to_owned()
    }

    /// Query: IN_PROGRESS transfers without a lease.
    fn without_lease(&self) -> SelectStatement {
        use data_transfer::{Column, Entity};
        Query::select()
            .expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID)
            .expr_as(Expr::val(None::<String>).cast_as("text"), NAME)
            .from(Entity)
            .and_where(self.status_is(&[Status::InProgress]))
            .and_where(Expr::exists(lease_of_transfer()).not())
            .to_owned()
    }

    /// Groups a query of transfers (id and name of the cause): the number and the newest ids of each cause.
    async fn causes(
        &self,
        transfers: SelectStatement,
    ) -> Result<Vec<(Option<String>, u64, Vec<TransferId>)>, DbErr> {
        const TRANSFERS: &str = "transfers";
        const NUMBERED: &str = "numbered";
        let of_cause = || {
            let mut window = WindowStatement::new();
            window.partition_by(NAME);
            window
        };
        let newest_first = of_cause().order_by(ID, Order::Desc).to_owned();
        let numbered = Query::select()
            .columns([ID, NAME])
            .expr_window_as(Func::cust("row_number"), newest_first, NUMBER)
            .expr_window_as(Expr::col(ID).count(), of_cause(), COUNT)
            .from_subquery(transfers, TRANSFERS)
            .to_owned();
        let query = Query::select()
            .columns([NAME, COUNT, ID])
            .from_subquery(numbered, NUMBERED)
            .and_where(Expr::col(NUMBER).lte(LISTED))
            .order_by(NAME, Order::Asc)
            .order_by(ID, Order::Desc)
            .to_owned();
        let mut causes: Vec<(Option<String>, u64, Vec<TransferId>)> = Vec::new();
        for row in self.database.connection().query_all(&query).await? {
            let name: Option<String> = row.try_get_by_index(0)?;
            let id: TransferId = row.try_get_by_index(2)?;
            match causes.last_mut().filter(|(last, ..)| *last == name) {
                Some((.., ids)) => ids.push(id),
                None => causes.push((name, unsigned(row.try_get_by_index(1)?), vec![id])),
            }
        }
        Ok(causes)
    }

    /// Reads the listed transfers of some causes.
    async fn with_transfers(
        &self,
        causes: Vec<(Option<String>, u64, Vec<TransferId>)>,
    ) -> Result<Vec<Cause>, DatabaseError> {
        let ids: Vec<_> = causes.iter().flat_map(|(.., ids)| ids).copied().collect();
        let mut transfers = HashMap::new();
        if !ids.is_empty() {
            let listing = Listing {
                filter: Filter {
                    ids: Some(ids),
                    ..Filter::default()
                },
                ..Listing::default()
            };
            let found = self.list(&listing).await.map_err(no_place)?;
            transfers.extend(found.into_iter().map(|transfer| (transfer.id, transfer)));
        }
        let with_transfers = |(name, count, ids): (_, _, Vec<TransferId>)| Cause {
            name,
            count,
            transfers: ids.iter().filter_map(|id| transfers.remove(id)).collect(),
        };
        Ok(causes.into_iter().map(with_transfers).collect())
    }

    /// Counts the attempts that have ended since a time, by link and by steps of `step_s` seconds.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn ended_counts(
        &self,
        since: DateTime<Utc>,
        step_s: u32,
    ) -> Result<Vec<EndedCount>, DatabaseError> {
        let ends = self.transfer_ends().await?;
        let reading = async {
            let rows = self
                .database
                .connection()
                .query_all(&self.ended_query(since, step_s))
                .await?;
            let mut counts: BTreeMap<(Option<LinkName>, i64), EndedCount> = BTreeMap::new();
            for row in &rows {
                let count = ended_count(row, &ends)?;
                match counts.entry((count.link.clone(), count.step)) {
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        entry.insert(count);
                    }
                    // Another pair of locations of the same sites.
                    std::collections::btree_map::Entry::Occupied(mut entry) => {
                        entry.get_mut().add(&count);
                    }
                }
            }
            Ok(counts.into_values().collect())
        };
        self.database.bounded(reading).await
    }

    fn ended_query(&self, since: DateTime<Utc>, step_s: u32) -> SelectStatement {
        use data_transfer::{Column as Transfer, Entity as Transfers};
        use transfer_worker_attempt::{Column, Entity};
        let step = match self.database.backend() {
            DbBackend::Sqlite => Expr::cust(format!(
                "CAST(strftime('%s', transfer_worker_attempt.ended_at) AS integer) / {step_s}"
            )),
            _ => Expr::cust(format!(
                "CAST(floor(extract(epoch FROM transfer_worker_attempt.ended_at) / {step_s}) AS bigint)"
            )),
        };
        let outcome = |outcome: Outcome| Expr::col((Entity, Column::Outcome)).eq(outcome);
        let sum = |condition: Expr, value: Expr| {
            Func::sum(Expr::case(condition, value).finally(0)).cast_as("bigint")
        };
        let hindered = outcome(Outcome::Interrupted)
            .and(Expr::col((Entity, Column::ErrorCode)).is_not_null())
            .and(Expr::col((Entity, Column::ErrorCode)).ne(FailureKind::Interrupted.code()));
        let bytes = Func::coalesce([Expr::col((Entity, Column::Bytes)), Expr::val(0)]);
        const STEP: &str = "step";
        const ORIGIN: &str = "origin";
        const DESTINATION: &str = "destination";
        Query::select()
            .expr_as(step, STEP)
            .expr_as(
                Expr::col((Transfers, Transfer::OriginLocationId)).cast_as("bigint"),
                ORIGIN,
            )
            .expr_as(
                Expr::col((Transfers, Transfer::DestinationLocationId)).cast_as("bigint"),
                DESTINATION,
            )
            .expr(sum(outcome(Outcome::Completed), Expr::val(1)))
            .expr(sum(outcome(Outcome::Completed), bytes.into()))
            .expr(sum(outcome(Outcome::Failed), Expr::val(1)))
            .expr(sum(outcome(Outcome::Retried), Expr::val(1)))
            .expr(sum(hindered, Expr::val(1)))
            .from(Entity)
            .join(
                JoinType::LeftJoin,
                Transfers,
                Expr::col((Transfers, Transfer::Id)).equals((Entity, Column::DataTransferId)),
            )
            .and_where(Expr::col((Entity, Column::EndedAt)).gte(since))
            .and_where(Expr::col((Entity, Column::Outcome)).is_not_null())
            .add_group_by([Expr::col(STEP), Expr::col(ORIGIN), Expr::col(DESTINATION)])
            .to_owned()
    }
}

impl EndedCount {
    fn add(&mut self, other: &Self) {
        self.packages += other.packages;
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.failed += other.failed;
        self.retried += other.retried;
        self.hindered += other.hindered;
    }
}

fn ended_count(row: &QueryResult, ends: &HashMap<i64, TransferEnd>) -> Result<EndedCount, DbErr> {
    let count = |index: usize| row.try_get_by_index(index).map(unsigned);
    Ok(EndedCount {
        link: link_of(row.try_get_by_index(1)?, row.try_get_by_index(2)?, ends),
        step: row.try_get_by_index(0)?,
        packages: count(3)?,
        bytes: count(4)?,
        failed: count(5)?,
        retried: count(6)?,
        hindered: count(7)?,
    })
}

/// Query of the transfers in one of our own tables.
fn of_transfers<T, C>(table: T, id: C) -> SelectStatement
where
    T: sea_orm::sea_query::IntoIden + Copy + sea_orm::sea_query::IntoTableRef,
    C: sea_orm::sea_query::IntoIden + Copy,
{
    use data_transfer::{Column, Entity};
    Query::select()
        .expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID)
        .from(table)
        .join(
            JoinType::InnerJoin,
            Entity,
            Expr::col((Entity, Column::Id)).equals((table, id)),
        )
        .to_owned()
}

/// Subquery: the lease on the transfer of the outer query.
fn lease_of_transfer() -> SelectStatement {
    use transfer_worker_lease::{Column, Entity};
    Query::select()
        .expr(Expr::val(1))
        .from(Entity)
        .and_where(
            Expr::col((Entity, Column::DataTransferId))
                .equals((data_transfer::Entity, data_transfer::Column::Id)),
        )
        .to_owned()
}

fn link_of(
    origin: Option<i64>,
    destination: Option<i64>,
    ends: &HashMap<i64, TransferEnd>,
) -> Option<LinkName> {
    let site = |location: Option<i64>| Some(ends.get(&location?)?.site.clone());
    Some(LinkName {
        origin: site(origin)?,
        destination: site(destination)?,
    })
}

/// The lesser of two values, which may be missing.
fn least<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    one.into_iter().chain(other).min()
}

fn unsigned(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

/// Error of a list without conditions on places.
fn no_place(error: ListError) -> DatabaseError {
    match error {
        ListError::Database(error) => error,
        error @ ListError::UnknownPlace { .. } => DbErr::Custom(error.to_string()).into(),
    }
}
