//! The manager's side: what waits, and sending it on its way.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use entity::{Label, Status, data_location, data_transfer, site, transfer_worker_link};
use sea_orm::sea_query::{
    Expr, ExprTrait as _, Func, IntoIden, JoinType, LockBehavior, LockType, Order, Query,
    SelectStatement,
};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder,
    QueryResult, UpdateMany,
};
use serde::Serialize;

use super::links::{count_issued, lock_links};
use super::{Repository, delay};
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::link::LinkName;

/// Rows that are read at once.
const PAGE: u64 = 10_000;

/// Ids that are asked for in one statement.
pub(super) const IDS_AT_ONCE: usize = 500;

/// Ids below the highest one seen that are looked at again. Ids are given when a row is inserted and
/// seen when that is committed, so a lower one may come after a higher one.
const LATE_IDS: i64 = 1_000;

/// So many single ids are worth being remembered; with more of them a look at all rows costs no more.
const MOST_WATCHED: usize = 5_000;

/// One end of a transfer, as far as a queue's name needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub location: String,
}

/// A transfer that is not over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenTransfer {
    /// The transfer.
    pub id: TransferId,
    /// How far it is: PENDING, SCHEDULED or IN_PROGRESS.
    pub status: Status,
    /// Its origin location.
    pub origin_location_id: Option<i64>,
    /// Its destination location.
    pub destination_location_id: Option<i64>,
    /// It is PENDING, and to be tried again later.
    pub waits: bool,
}

/// What a look has found, for the next one to know where to look.
///
/// COMPLETED rows grow without end, and the ops-db has no index by which they could be passed over.
/// So they are looked at once: a later look goes to the rows that were not COMPLETED, and to those
/// that have come since. What becomes of a COMPLETED row afterwards (an operator's reset) is seen by
/// the next look at all rows.
#[derive(Debug, Clone)]
pub struct Watch {
    highest: TransferId,
    ids: Vec<TransferId>,
}

/// A transfer that is to be scheduled.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The transfer.
    pub id: TransferId,
    /// Queue of the message.
    pub queue: Arc<str>,
    /// What its link allows; none where that has no limit.
    pub allowance: Option<Arc<Allowance>>,
}

/// How many transfers of a link may be scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowance {
    /// The link.
    pub link: LinkName,
    /// How many, if nobody else schedules one.
    pub free: u64,
    /// [`Link::issued`](crate::transfer::link::Link::issued), read before what is under way was
    /// counted: what has been issued since takes from `free`.
    pub issued: i64,
}

/// What became of candidates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// A message is out and the row says SCHEDULED.
    pub scheduled: Vec<TransferId>,
    /// No message was confirmed; the row is PENDING. Where the broker's answer was lost, a worker
    /// may get the message all the same, and can start on it.
    pub unpublished: Vec<TransferId>,
    /// The row is not PENDING (any more), waits, or somebody else is at it; nothing was published.
    pub taken: Vec<TransferId>,
    /// The link's limit is reached; the row is PENDING and nothing was published.
    pub held_back: Vec<TransferId>,
}

/// Why a site's locations could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// There is no site of this short name.
    #[error("there is no site `{name}`; the database has {}", list(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The short names that there are.
        known: Vec<String>,
    },
    /// The database.
    #[error("the site's locations could not be read")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for SiteError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Rows that are locked and say SCHEDULED, in a transaction that is not committed.
#[derive(Default)]
struct Taken {
    ids: Vec<TransferId>,
    /// The link of each that has a limit.
    links: HashMap<TransferId, Arc<Allowance>>,
    batch: Batch,
}

impl Taken {
    /// Number of these transfers per limited link, times `sign`.
    fn issued(&self, ids: &[TransferId], sign: i64) -> BTreeMap<&LinkName, i64> {
        let mut issued = BTreeMap::new();
        for allowance in ids.iter().filter_map(|id| self.links.get(id)) {
            *issued.entry(&allowance.link).or_default() += sign;
        }
        issued
    }
}

impl Repository {
    /// Shows `see` every transfer that is not over, the lowest id first; those whose origin is one of
    /// `origins`, if these are given.
    ///
    /// With the [`Watch`] of the look before, it looks only where something is to be expected, and
    /// the cost does not grow with the number of COMPLETED rows. Returns the watch for the next look;
    /// none where a look at all rows is as good.
    ///
    /// # Errors
    /// What the database says.
    pub async fn look(
        &self,
        origins: Option<&[i64]>,
        before: Option<&Watch>,
        mut see: impl FnMut(OpenTransfer),
    ) -> Result<Option<Watch>, DatabaseError> {
        let (delays, highest) = self
            .database
            .bounded(async {
                let delays = delay::all_standing(self.database.connection(), None).await?;
                Ok::<_, DatabaseError>((delays, self.highest_id().await?))
            })
            .await?;
        let mut seen = Seen::new(delays);
        // Lower than before: it is not the database that was looked at.
        let before = before.filter(|before| before.highest <= highest);
        let mut after = before.map_or(i64::MIN, |before| before.highest.get() - LATE_IDS);
        let watched = before.map_or(&[][..], |before| &before.ids);
        let watched: Vec<_> = watched
            .iter()
            .copied()
            .filter(|id| id.get() <= after)
            .collect();
        for ids in watched.chunks(IDS_AT_ONCE) {
            let mut query = self.unfinished(origins);
            query.and_where(id_column().is_in(ids.iter().copied()));
            seen.page(&self.rows(&query).await?, &mut see)
                .map_err(DatabaseError::from)?;
        }
        loop {
            let mut query = self.unfinished(origins);
            // Both ends are given: PostgreSQL then knows, without statistics too, that this is a part
            // of the table, and goes by the key.
            query
                .and_where(id_column().gt(after))
                .and_where(id_column().lte(highest))
                .order_by(
                    (data_transfer::Entity, data_transfer::Column::Id),
                    Order::Asc,
                )
                .limit(PAGE);
            let rows = self.rows(&query).await?;
            let last = seen.page(&rows, &mut see).map_err(DatabaseError::from)?;
            match last {
                Some(last) if rows.len() as u64 == PAGE => after = last.get(),
                _ => break,
            }
        }
        Ok(seen.watch(highest))
    }

    pub(super) async fn rows(
        &self,
        query: &SelectStatement,
    ) -> Result<Vec<QueryResult>, DatabaseError> {
        let reading = async { Ok(self.database.connection().query_all(query).await?) };
        self.database.bounded(reading).await
    }

    /// Transfers that are not COMPLETED, without their order.
    fn unfinished(&self, origins: Option<&[i64]>) -> SelectStatement {
        use data_transfer::{Column, Entity};
        let number = |column: Column| Expr::col((Entity, column)).cast_as("bigint");
        let mut query = Query::select();
        query
            .from(Entity)
            .expr_as(number(Column::Id), ID)
            .expr_as(number(Column::OriginLocationId), ORIGIN_ID)
            .expr_as(number(Column::DestinationLocationId), DESTINATION_ID)
            .expr_as(number(Column::RetryCount), RETRY_COUNT)
            .expr_as(Expr::col((Entity, Column::Status)).cast_as("text"), STATUS)
            .and_where(self.status_is(&[
                Status::Pending,
                Status::Scheduled,
                Status::InProgress,
                Status::Failed,
            ]));
        if let Some(origins) = origins {
            let origins = origins.iter().copied();
            query.and_where(Expr::col((Entity, Column::OriginLocationId)).is_in(origins));
        }
        query
    }

    async fn highest_id(&self) -> Result<TransferId, DbErr> {
        let query = Query::select()
            .expr(Func::max(id_column()).cast_as("bigint"))
            .from(data_transfer::Entity)
            .to_owned();
        let row = self.database.connection().query_one(&query).await?;
        let highest: Option<TransferId> = row
            .map(|row| row.try_get_by_index(0))
            .transpose()?
            .flatten();
        Ok(highest.unwrap_or(TransferId::new(0)))
    }

    /// Every location that has a site, by id.
    ///
    /// # Errors
    /// What the database says.
    pub async fn places(&self) -> Result<HashMap<i64, Endpoint>, DatabaseError> {
        let reading = async {
            let db = self.database.connection();
            let sites = self.short_names().await?;
            let locations = data_location::Entity::find().all(db).await?;
            let place = |location: data_location::Model| {
                let endpoint = Endpoint {
                    site: sites.get(&location.site_id)?.clone(),
                    location: location.name,
                };
                Some((location.id, endpoint))
            };
            Ok(locations.into_iter().filter_map(place).collect())
        };
        self.database.bounded(reading).await
    }

    /// Publishes the messages of PENDING transfers and makes their rows SCHEDULED, in this order of
    /// effect: the rows are locked and changed, `publish` is awaited, and the changes of those that it
    /// returns (with Celery's ids of their tasks) are committed; the others stay PENDING.
    ///
    /// So no row is ever SCHEDULED without a message. The other way round does happen: after a
    /// crash or a lost connection between publishing and committing, messages are out and the rows
    /// are PENDING. A worker takes a PENDING row just the same, and if the manager publishes again,
    /// the second message finds the transfer held or completed. A worker that gets the message
    /// before the commit waits for the row lock, and then goes on.
    ///
    /// A row that somebody else has locked is left to them. A link's row, where the link has a limit,
    /// is locked first: managers that schedule over one link at once come one after the other, and
    /// the later one sees what the earlier one has taken of the limit.
    ///
    /// While `publish` runs, the rows are locked (SQLite: nobody else writes), so it must end in a
    /// second or two, by a time-out of its own.
    ///
    /// # Errors
    /// What the database says. Every row is PENDING then, or SCHEDULED with its message.
    pub async fn schedule<F>(
        &self,
        candidates: &[Candidate],
        publish: impl FnOnce(Vec<TransferId>) -> F,
    ) -> Result<Batch, DatabaseError>
    where
        F: Future<Output = HashMap<TransferId, String>>,
    {
        let tx = self.database.bounded(self.database.begin()).await?;
        let batch = self.schedule_in(&tx, candidates, publish).await;
        let is_published = batch
            .as_ref()
            .is_ok_and(|batch| !batch.scheduled.is_empty());
        let ending = async {
            if is_published {
                tx.commit().await?;
            } else {
                // As in `Database::write`: whoever tries again at once must not meet our locks.
                let _ = tx.rollback().await;
            }
            batch
        };
        self.database.bounded(ending).await
    }

    async fn schedule_in<F>(
        &self,
        tx: &DatabaseTransaction,
        candidates: &[Candidate],
        publish: impl FnOnce(Vec<TransferId>) -> F,
    ) -> Result<Batch, DatabaseError>
    where
        F: Future<Output = HashMap<TransferId, String>>,
    {
        let taking = || self.database.bounded(self.take(tx, candidates));
        let taken = fault_point!(ManagerRowLocked, taking().await)?;
        let published = match taken.ids.is_empty() {
            true => HashMap::new(),
            false => publish(taken.ids.clone()).await,
        };
        let closing = self.close(tx, taken, &published);
        self.database.bounded(closing).await
    }

    /// Locks what can be scheduled, and makes it SCHEDULED.
    async fn take(
        &self,
        tx: &DatabaseTransaction,
        candidates: &[Candidate],
    ) -> Result<Taken, DatabaseError> {
        let mut free = free(tx, candidates).await?;
        let due = self.lock_due(tx, candidates).await?;
        let mut taken = Taken::default();
        let mut queues = Vec::with_capacity(candidates.len());
        for candidate in candidates {
            let id = candidate.id;
            if !due.contains(&id) {
                taken.batch.taken.push(id);
                continue;
            }
            if let Some(allowance) = &candidate.allowance {
                let left = free.entry(&allowance.link).or_default();
                if *left == 0 {
                    taken.batch.held_back.push(id);
                    continue;
                }
                *left -= 1;
                taken.links.insert(id, allowance.clone());
            }
            taken.ids.push(id);
            queues.push((id, candidate.queue.clone()));
        }
        if !taken.ids.is_empty() {
            self.set_statuses(&taken.ids, Status::Scheduled)
                .exec(tx)
                .await?;
            self.begin_schedule(tx, &queues).await?;
            count_issued(tx, &taken.issued(&taken.ids, 1)).await?;
        }
        Ok(taken)
    }

    /// Locks those that are PENDING and due, and that nobody else has locked.
    async fn lock_due(
        &self,
        tx: &DatabaseTransaction,
        candidates: &[Candidate],
    ) -> Result<HashSet<TransferId>, DbErr> {
        use data_transfer::{Column, Entity};
        let ids: Vec<_> = candidates.iter().map(|candidate| candidate.id).collect();
        let query = Query::select()
            .expr_as(id_column().cast_as("bigint"), ID)
            .expr_as(
                Expr::col((Entity, Column::RetryCount)).cast_as("bigint"),
                RETRY_COUNT,
            )
            .from(Entity)
            .and_where(id_column().is_in(ids.iter().copied()))
            .and_where(self.status_is(&[Status::Pending]))
            // As in `lock`. Skipped, since who has locked a row is about to change it.
            .lock_with_behavior(LockType::NoKeyUpdate, LockBehavior::SkipLocked)
            .to_owned();
        let rows = tx.query_all(&query).await?;
        let delays = delay::all_standing(tx, Some(&ids)).await?;
        let mut due = HashSet::with_capacity(rows.len());
        for row in rows {
            let id = row.try_get("", ID)?;
            if !waits(&delays, id, row.try_get("", RETRY_COUNT)?) {
                due.insert(id);
            }
        }
        Ok(due)
    }

    /// Makes transfers that were not published PENDING again. Messages are sent by now, so this writes only
    /// values that the same rows had before: it can hardly fail.
    async fn close(
        &self,
        tx: &DatabaseTransaction,
        taken: Taken,
        published: &HashMap<TransferId, String>,
    ) -> Result<Batch, DatabaseError> {
        let mut batch = taken.batch.clone();
        (batch.scheduled, batch.unpublished) =
            taken.ids.iter().partition(|id| published.contains_key(id));
        // Where nothing was published, all of it is rolled back.
        if batch.scheduled.is_empty() {
            return Ok(batch);
        }
        if !batch.unpublished.is_empty() {
            self.set_statuses(&batch.unpublished, Status::Pending)
                .exec(tx)
                .await?;
            count_issued(tx, &taken.issued(&batch.unpublished, -1)).await?;
        }
        self.complete_schedule(tx, published).await?;
        Ok(batch)
    }

    /// An update of some transfers' status.
    fn set_statuses(
        &self,
        ids: &[TransferId],
        status: Status,
    ) -> UpdateMany<data_transfer::Entity> {
        data_transfer::Entity::update_many()
            .col_expr(
                data_transfer::Column::Status,
                self.schema.transfer_status.write(status),
            )
            .filter(data_transfer::Column::Id.is_in(ids.iter().copied()))
    }

    /// Names of a site's locations, in their order of use.
    ///
    /// # Errors
    /// [`SiteError::Unknown`], which lists the sites that there are; else what the database says.
    pub async fn locations_of_site(&self, short_name: &str) -> Result<Vec<String>, SiteError> {
        let reading = async {
            let db = self.database.connection();
            let sites = site::Entity::find()
                .order_by_asc(site::Column::ShortName)
                .all(db)
                .await?;
            let Some(site) = sites.iter().find(|site| site.short_name == short_name) else {
                let known = sites.into_iter().map(|site| site.short_name).collect();
                return Err(SiteError::Unknown {
                    name: short_name.to_owned(),
                    known,
                });
            };
            let locations = data_location::Entity::find()
                .filter(data_location::Column::SiteId.eq(site.id))
                .order_by_asc(data_location::Column::Priority)
                .order_by_asc(data_location::Column::Id)
                .all(db)
                .await?;
            Ok(locations
                .into_iter()
                .map(|location| location.name)
                .collect())
        };
        self.database.bounded(reading).await
    }
}

/// How many transfers of each limited link can be scheduled, now that the links' rows are locked.
async fn free<'a>(
    tx: &DatabaseTransaction,
    candidates: &'a [Candidate],
) -> Result<BTreeMap<&'a LinkName, u64>, DbErr> {
    let allowances = candidates.iter().filter_map(|c| c.allowance.as_deref());
    let allowances: BTreeMap<_, _> = allowances.map(|a| (&a.link, a)).collect();
    if allowances.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows = lock_links(tx, allowances.keys().copied()).await?;
    let left = |(link, allowance): (&'a LinkName, &Allowance)| {
        let is_of = |row: &&transfer_worker_link::Model| {
            row.origin == link.origin && row.destination == link.destination
        };
        let left = match rows.iter().find(is_of) {
            Some(row) if row.paused_at.is_some() => 0,
            Some(row) => {
                let since = row.issued.saturating_sub(allowance.issued);
                // Below 0 the row is another one than that which was read: the next look tells.
                let since = u64::try_from(since).unwrap_or(u64::MAX);
                allowance.free.saturating_sub(since)
            }
            // Somebody has just removed it, and the limit with it.
            None => allowance.free,
        };
        (link, left)
    };
    Ok(allowances.into_iter().map(left).collect())
}

/// What a look has come across.
struct Seen {
    delays: HashMap<TransferId, i64>,
    open: Vec<TransferId>,
    failed: Vec<TransferId>,
}

impl Seen {
    fn new(delays: HashMap<TransferId, i64>) -> Self {
        Self {
            delays,
            open: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Shows the rows of one statement; the id of the last one.
    fn page(
        &mut self,
        rows: &[QueryResult],
        see: &mut impl FnMut(OpenTransfer),
    ) -> Result<Option<TransferId>, DbErr> {
        let mut last = None;
        for row in rows {
            let id: TransferId = row.try_get("", ID)?;
            last = Some(id);
            let status: Label<Status> = row.try_get("", STATUS)?;
            match status.known() {
                Some(Status::Failed) => self.failed.push(id),
                Some(status) => {
                    // One more than is remembered tells that there are too many.
                    if self.open.len() <= MOST_WATCHED {
                        self.open.push(id);
                    }
                    let retry_count = row.try_get("", RETRY_COUNT)?;
                    see(OpenTransfer {
                        id,
                        status,
                        origin_location_id: row.try_get("", ORIGIN_ID)?,
                        destination_location_id: row.try_get("", DESTINATION_ID)?,
                        waits: status == Status::Pending && waits(&self.delays, id, retry_count),
                    });
                }
                None => {}
            }
        }
        Ok(last)
    }

    /// FAILED rows are watched as far as there is room, the latest first: these are what an operator
    /// resets.
    fn watch(mut self, highest: TransferId) -> Option<Watch> {
        let room = MOST_WATCHED.checked_sub(self.open.len())?;
        self.failed.sort_unstable_by_key(|id| Reverse(*id));
        self.failed.truncate(room);
        let mut ids = self.open;
        ids.append(&mut self.failed);
        ids.sort_unstable();
        Some(Watch { highest, ids })
    }
}

/// Whether a wait stands for a transfer with this `retry_count`.
fn waits(delays: &HashMap<TransferId, i64>, id: TransferId, retry_count: Option<i64>) -> bool {
    // As `retry_count` of a row is read.
    delays.get(&id) == Some(&Ord::max(retry_count.unwrap_or(0), 0))
}

fn id_column() -> Expr {
    Expr::col((data_transfer::Entity, data_transfer::Column::Id))
}

/// Names under which the numbers of [`Repository::look`] are selected.
const RETRY_COUNT: &str = "retry_count";
const STATUS: &str = "status";
const ORIGIN_ID: &str = "origin_id";
const DESTINATION_ID: &str = "destination_id";

/// Name under which [`with_endpoints`] selects the transfer's id.
pub(super) const ID: &str = "id";

/// The two ends: aliases of the location and of its site, and names of the selected columns.
const ORIGIN: [&str; 4] = [
    "origin",
    "origin_site",
    "origin_location",
    "origin_site_name",
];
const DESTINATION: [&str; 4] = [
    "destination",
    "destination_site",
    "destination_location",
    "destination_site_name",
];

/// Adds the id and the names of both ends to a query of transfers. Rows that lead nowhere are not
/// left out: they would wait for ever without anybody knowing.
pub(super) fn with_endpoints(query: &mut SelectStatement) -> &mut SelectStatement {
    use data_transfer::{Column, Entity};
    query.expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID);
    for ([location, site, location_name, site_name], key) in [
        (ORIGIN, Column::OriginLocationId),
        (DESTINATION, Column::DestinationLocationId),
    ] {
        query
            .join_as(
                JoinType::LeftJoin,
                data_location::Entity,
                location,
                Expr::col((location, data_location::Column::Id)).equals((Entity, key)),
            )
            .join_as(
                JoinType::LeftJoin,
                site::Entity,
                site,
                Expr::col((site, site::Column::Id))
                    .equals((location, data_location::Column::SiteId)),
            )
            .expr_as(
                Expr::col((location, data_location::Column::Name)),
                location_name.into_iden(),
            )
            .expr_as(
                Expr::col((site, site::Column::ShortName)),
                site_name.into_iden(),
            );
    }
    query
}

/// Reads what [`with_endpoints`] selects.
pub(super) fn endpoints(row: &QueryResult) -> Result<(Option<Endpoint>, Option<Endpoint>), DbErr> {
    let read = |[_, _, location, site]: [&str; 4]| {
        let location: Option<String> = row.try_get("", location)?;
        let site: Option<String> = row.try_get("", site)?;
        Ok::<_, DbErr>(
            site.zip(location)
                .map(|(site, location)| Endpoint { site, location }),
        )
    };
    Ok((read(ORIGIN)?, read(DESTINATION)?))
}
