//! Scheduling: messages for transfers that wait, and their rows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use entity::{Status, data_transfer, transfer_worker_link};
use sea_orm::sea_query::{Expr, ExprTrait as _, LockBehavior, LockType, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, UpdateMany,
};

use super::ends::ID;
use super::links::{count_issued, lock_links};
use super::scan::{RETRY_COUNT, id_column, waits};
use super::{Repository, delay};
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::link::LinkName;

/// Ids that are asked for in one statement.
pub(super) const IDS_AT_ONCE: usize = 500;

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
