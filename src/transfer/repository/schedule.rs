//! Scheduling: sending messages for PENDING transfers, and changing their rows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use entity::{Status, data_transfer, transfer_worker_link};
use sea_orm::sea_query::{Expr, ExprTrait as _, LockBehavior, LockType, Query};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, UpdateMany,
};

use super::ends::ID;
use super::links::{count_issued, lock_links};
use super::scan::{RETRY_COUNT, has_delay, id_column};
use super::{Repository, delay};
use crate::faults::fault_point;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::link::LinkName;

/// Maximum number of ids per statement.
pub(super) const MAX_IDS: usize = 500;

/// A transfer to schedule.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Id of the transfer.
    pub id: TransferId,
    /// Queue of the message.
    pub queue: Arc<str>,
    /// Free capacity of the link; `None` if the link has no limit.
    pub allowance: Option<Arc<Allowance>>,
}

/// Number of transfers of a link that may be scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowance {
    /// Name of the link.
    pub link: LinkName,
    /// Free capacity, if no other manager schedules a transfer.
    pub free: u64,
    /// [`Link::issued`](crate::transfer::link::Link::issued), read before the active transfers were counted: transfers
    /// that were issued since then reduce `free`.
    pub issued: i64,
}

/// Result of scheduling candidates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The message was confirmed, and the row is SCHEDULED.
    pub scheduled: Vec<TransferId>,
    /// No message was confirmed, and the row is PENDING. If the broker's answer was lost, a worker may still receive
    /// the message, and can start the transfer.
    pub unpublished: Vec<TransferId>,
    /// The row is not PENDING (any more), has a delay, or is locked by another transaction; nothing was published.
    pub taken: Vec<TransferId>,
    /// The link has reached its limit; the row is PENDING, and nothing was published.
    pub held_back: Vec<TransferId>,
}

/// Rows that are locked and SCHEDULED, in a transaction that is not committed.
#[derive(Default)]
struct LockedRows {
    ids: Vec<TransferId>,
    /// Allowances of the transfers whose link has a limit.
    links: HashMap<TransferId, Arc<Allowance>>,
    batch: Batch,
}

impl LockedRows {
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
    /// Publishes the messages of PENDING transfers and makes their rows SCHEDULED, in this order: the rows are locked
    /// and changed, `publish` is awaited, and the changes of the transfers that it returns (with Celery's ids of their
    /// tasks) are committed; the others stay PENDING.
    ///
    /// Therefore no row becomes SCHEDULED without a message. The opposite is possible: after a crash or a lost
    /// connection between publishing and committing, messages exist while the rows are PENDING. A worker accepts a
    /// PENDING row as well, and if the manager publishes again, the second message finds the transfer held or
    /// completed. A worker that receives the message before the commit waits for the row lock.
    ///
    /// A row that another transaction has locked is skipped. If a link has a limit, its row is locked first: managers
    /// that schedule over the same link at the same time run one after the other, and the later one sees how much of
    /// the limit the earlier one has used.
    ///
    /// The rows are locked while `publish` runs (on SQLite no other program can write), so `publish` needs its own time
    /// limit of one or two seconds.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement. Every row is then PENDING, or SCHEDULED with its
    /// message.
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
                // As in `Database::write`: a caller that tries again at once must not wait for its own locks.
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

    /// Locks the candidates that can be scheduled, and makes them SCHEDULED.
    async fn take(
        &self,
        tx: &DatabaseTransaction,
        candidates: &[Candidate],
    ) -> Result<LockedRows, DatabaseError> {
        let mut free = free_capacities(tx, candidates).await?;
        let due = self.lock_due_rows(tx, candidates).await?;
        let mut taken = LockedRows::default();
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

    /// Locks the candidates that are PENDING and due, and that no other transaction has locked.
    async fn lock_due_rows(
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
            // As in `lock`. Locked rows are skipped, because the transaction that holds the lock is about to change
            // them.
            .lock_with_behavior(LockType::NoKeyUpdate, LockBehavior::SkipLocked)
            .to_owned();
        let rows = tx.query_all(&query).await?;
        let delays = delay::current_delays(tx, Some(&ids)).await?;
        let mut due = HashSet::with_capacity(rows.len());
        for row in rows {
            let id = row.try_get("", ID)?;
            if !has_delay(&delays, id, row.try_get("", RETRY_COUNT)?) {
                due.insert(id);
            }
        }
        Ok(due)
    }

    /// Makes transfers that were not published PENDING again. At this time messages are already sent, so this writes
    /// only values that the same rows had before, which can hardly fail.
    async fn close(
        &self,
        tx: &DatabaseTransaction,
        taken: LockedRows,
        published: &HashMap<TransferId, String>,
    ) -> Result<Batch, DatabaseError> {
        let mut batch = taken.batch.clone();
        (batch.scheduled, batch.unpublished) =
            taken.ids.iter().partition(|id| published.contains_key(id));
        // If nothing was published, the caller rolls back the transaction.
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

    /// Update of the status of several transfers.
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

/// Returns the free capacity of each limited link, under the locks of the links' rows.
async fn free_capacities<'a>(
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
                // A negative number means that the row was deleted and created again: no capacity until the next scan.
                let since = u64::try_from(since).unwrap_or(u64::MAX);
                allowance.free.saturating_sub(since)
            }
            // The row was removed in the meantime, and the limit with it.
            None => allowance.free,
        };
        (link, left)
    };
    Ok(allowances.into_iter().map(left).collect())
}
