//! Reconciliation of SCHEDULED rows with the messages that exist.
//!
//! A row becomes SCHEDULED together with a confirmed message, but the message can get lost: its queue is purged or
//! deleted, it expires or is dead-lettered, or a worker acknowledges it early and dies. A row that an operator set to
//! SCHEDULED never had a message. Such a row would wait forever, and would count against the limit of its link.
//!
//! Therefore each pass searches for rows that no worker has taken for `manager.reconcile_after`. A row without a
//! message becomes PENDING, and is then scheduled like any other row.
//!
//! A queue cannot be read without disturbing it, but its messages can be counted. The rows of one queue are compared
//! with them. Workers report the messages that they hold; the rows of these messages are not counted. Each other row
//! needs one message in the queue. If the queue has fewer messages than rows, the oldest rows are sent again. If the
//! lost message belongs to another row, the row that is sent again has two messages. This does no harm: the worker that
//! receives the second one finds the transfer held or completed. When the queue is empty, all remaining rows have lost
//! their messages.
//!
//! Workers that do not answer (a busy Celery worker with the solo pool) seem to hold no messages. Therefore the time
//! until the next search for the same row doubles each time that its message was sent again without effect, up to
//! [`MAX_SEARCH_DELAY`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::{Manager, Pass};
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::repository::ScheduleRecord;
use service_connection::error_chain::chain;

/// Upper limit of [`search_delay`], unless `manager.reconcile_after` is longer.
const MAX_SEARCH_DELAY: Duration = Duration::from_secs(6 * 3600);

/// Searches for the messages of transfers.
#[async_trait]
pub trait FindMessages: Send + Sync {
    /// Number of messages that wait in each of these queues; 0 for a queue that does not exist.
    async fn ready(&self, queues: &[String]) -> Result<HashMap<String, u64>, FindError>;

    /// Returns the messages that workers hold.
    async fn held(&self) -> Result<HeldMessages, FindError>;
}

/// The search for messages failed.
#[derive(Debug, thiserror::Error)]
#[error("the broker did not return the number of messages")]
pub struct FindError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Messages of transfers that workers hold, according to their answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldMessages {
    /// The transfers.
    pub transfers: HashSet<TransferId>,
    /// Celery's ids of the tasks.
    pub task_ids: HashSet<String>,
    /// Number of workers that have answered.
    pub workers: usize,
}

impl HeldMessages {
    fn has(&self, record: &ScheduleRecord) -> bool {
        let by_task = |id: &String| self.task_ids.contains(id);
        self.transfers.contains(&record.data_transfer_id)
            || record.task_id.as_ref().is_some_and(by_task)
    }
}

/// Time that a row may be SCHEDULED before its message is searched for. It doubles with each of the `resent` messages
/// that were sent again without effect.
#[must_use]
pub fn search_delay(reconcile_after: Duration, resent: i64) -> Duration {
    let doublings = u32::try_from(resent).unwrap_or(0).min(20);
    reconcile_after
        .saturating_mul(1 << doublings)
        .min(MAX_SEARCH_DELAY.max(reconcile_after))
}

/// Returns true if a row has been SCHEDULED for too long.
#[must_use]
pub fn is_overdue(record: &ScheduleRecord, now: DateTime<Utc>, reconcile_after: Duration) -> bool {
    let age = (now - record.scheduled_at).to_std().unwrap_or_default();
    age >= search_delay(reconcile_after, record.resent)
}

/// The rows that wait for a message of one queue.
#[derive(Debug, Default)]
struct WaitingRows {
    /// Number of SCHEDULED rows, except those whose message a worker holds.
    rows: u64,
    /// Number of messages in the queue.
    ready: u64,
    /// Overdue rows, the oldest first.
    overdue: Vec<ScheduleRecord>,
}

impl WaitingRows {
    /// Returns the rows with a lost message: as many overdue rows as messages are missing, the oldest first.
    fn lost(&self) -> &[ScheduleRecord] {
        let lacking = usize::try_from(self.rows.saturating_sub(self.ready)).unwrap_or(usize::MAX);
        self.overdue.get(..lacking).unwrap_or(&self.overdue)
    }
}

/// The rows of each queue. The key `None` is for rows whose queue is unknown; they count as rows without a message.
type Queues = BTreeMap<Option<String>, WaitingRows>;

/// Schedule records of all rows, and the queue in which each row waits.
struct ScheduleRecords {
    records: Vec<ScheduleRecord>,
    /// Queues by location, for rows whose record does not contain the queue.
    queues: HashMap<TransferId, Option<Arc<str>>>,
    overdue: HashSet<TransferId>,
}

impl ScheduleRecords {
    fn queue(&self, record: &ScheduleRecord) -> Option<String> {
        let by_locations = || {
            let queue = self.queues.get(&record.data_transfer_id)?;
            queue.as_deref().map(str::to_owned)
        };
        record.queue.clone().or_else(by_locations)
    }

    /// Counts the rows `ids`, except those whose message is `held`, in each queue that has an overdue row.
    fn count(
        &self,
        ids: &HashSet<TransferId>,
        ready: &HashMap<String, u64>,
        held: &HeldMessages,
    ) -> Queues {
        let mut queues = Queues::new();
        for record in &self.records {
            let id = record.data_transfer_id;
            if !ids.contains(&id) || held.has(record) {
                continue;
            }
            let name = self.queue(record);
            let messages = name.as_ref().and_then(|name| ready.get(name));
            let queue = queues.entry(name).or_default();
            queue.ready = messages.copied().unwrap_or(0);
            queue.rows += 1;
            if self.overdue.contains(&id) {
                queue.overdue.push(record.clone());
            }
        }
        queues.retain(|_, queue| !queue.overdue.is_empty());
        queues
    }
}

impl Manager {
    /// Sets each row whose message is lost to PENDING, and returns these rows. `scheduled` contains the rows that this
    /// pass has read as SCHEDULED, with the queue that belongs to their locations.
    pub(super) async fn reconcile(
        &self,
        scheduled: Vec<(TransferId, Option<Arc<str>>)>,
        pass: &mut Pass,
    ) -> Result<HashSet<TransferId>, DatabaseError> {
        let after = self.settings.manager.reconcile_after;
        let nothing = HashSet::new();
        if after.is_zero() || !self.repository.has_schedule() {
            return Ok(nothing);
        }
        let records = self.records(scheduled, after).await?;
        pass.overdue = records.overdue.len();
        let (Some(find), false) = (&self.find, records.overdue.is_empty()) else {
            return Ok(nothing);
        };
        self.liveness.tick();
        let counted = self.count(&**find, &records).await?;
        self.liveness.tick();
        let (queues, held) = match counted {
            Ok(counted) => counted,
            Err(error) => {
                tracing::warn!(
                    overdue = pass.overdue,
                    error = %chain(&error),
                    "search for the messages of overdue transfers failed; the next pass tries again"
                );
                return Ok(nothing);
            }
        };
        let mut lost = HashSet::new();
        for (name, queue) in &queues {
            for record in queue.lost() {
                if self.repository.send_again(record).await? {
                    tracing::warn!(
                        data_transfer_id = record.data_transfer_id.get(),
                        queue = name.as_deref(),
                        task_id = record.task_id,
                        scheduled_at = %record.scheduled_at,
                        resent = record.resent + 1,
                        rows = queue.rows,
                        messages = queue.ready,
                        workers = held.workers,
                        "transfer was SCHEDULED and its message is lost; it is sent again"
                    );
                    lost.insert(record.data_transfer_id);
                }
            }
        }
        pass.resent.extend(lost.iter().copied());
        pass.resent.sort_unstable();
        Ok(lost)
    }

    /// Reads the records, completes them, and finds the overdue ones.
    async fn records(
        &self,
        scheduled: Vec<(TransferId, Option<Arc<str>>)>,
        after: Duration,
    ) -> Result<ScheduleRecords, DatabaseError> {
        // The records are newer than the rows in `scheduled`. They must be: rows that were scheduled in between have
        // messages in the queues, too.
        let records = self.repository.schedule_records().await?;
        let queues: HashMap<_, _> = scheduled.into_iter().collect();
        let recorded: HashSet<_> = records.iter().map(|r| r.data_transfer_id).collect();
        let missing: Vec<_> = queues
            .keys()
            .copied()
            .filter(|id| !recorded.contains(id))
            .collect();
        if !missing.is_empty() {
            self.repository.record_scheduled(&missing).await?;
        }
        if recorded.iter().any(|id| !queues.contains_key(id)) {
            self.repository.forget_stale_schedules().await?;
        }
        let now = self.repository.database().now().await?;
        let overdue = records
            .iter()
            .filter(|record| queues.contains_key(&record.data_transfer_id))
            .filter(|record| is_overdue(record, now, after))
            .map(|record| record.data_transfer_id)
            .collect();
        Ok(ScheduleRecords {
            records,
            queues,
            overdue,
        })
    }

    /// Compares rows and messages, queue by queue. Messages are counted before rows: if a worker takes a message in
    /// between, it also takes the row, which then is not counted as a row without a message. Workers are asked only if
    /// a queue has too few messages.
    async fn count(
        &self,
        find: &dyn FindMessages,
        records: &ScheduleRecords,
    ) -> Result<Result<(Queues, HeldMessages), FindError>, DatabaseError> {
        let all = records.records.iter();
        let mut names: Vec<_> = all
            .filter(|record| records.overdue.contains(&record.data_transfer_id))
            .filter_map(|record| records.queue(record))
            .collect();
        names.sort_unstable();
        names.dedup();
        let ready = match find.ready(&names).await {
            Ok(ready) => ready,
            Err(error) => return Ok(Err(error)),
        };
        let waiting = |record: &&ScheduleRecord| {
            records.overdue.contains(&record.data_transfer_id)
                || records.queue(record).is_some_and(|q| names.contains(&q))
        };
        let ids: Vec<_> = records.records.iter().filter(waiting).collect();
        let ids: Vec<_> = ids.into_iter().map(|r| r.data_transfer_id).collect();
        let untaken = self.repository.still_scheduled(&ids).await?;
        let none = HeldMessages::default();
        let mut queues = records.count(&untaken, &ready, &none);
        queues.retain(|_, queue| !queue.lost().is_empty());
        if queues.is_empty() {
            return Ok(Ok((queues, none)));
        }
        let held = match find.held().await {
            Ok(held) => held,
            Err(error) => return Ok(Err(error)),
        };
        let untaken = self.repository.still_scheduled(&ids).await?;
        Ok(Ok((records.count(&untaken, &ready, &held), held)))
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    const AFTER: Duration = Duration::from_secs(300);

    fn record(id: i64, queue: &str) -> ScheduleRecord {
        ScheduleRecord {
            data_transfer_id: id.into(),
            scheduled_at: DateTime::UNIX_EPOCH + TimeDelta::seconds(id),
            queue: Some(queue.to_owned()),
            task_id: Some(format!("task-{id}")),
            resent: 0,
        }
    }

    /// Returns the lost ones of rows 1 to 6 in the queue `a`, where 5 and 6 are not overdue, and of row 7 in `b`.
    fn lost(ready: u64, held: &HeldMessages) -> Vec<i64> {
        let mut all: Vec<_> = (1..=6).map(|id| record(id, "a")).collect();
        all.push(record(7, "b"));
        let records = ScheduleRecords {
            overdue: [1, 2, 3, 4, 7].map(TransferId::new).into(),
            queues: HashMap::new(),
            records: all,
        };
        let ready = HashMap::from([("a".to_owned(), ready), ("b".to_owned(), 1)]);
        let queues = records.count(&(1..=7).map(TransferId::new).collect(), &ready, held);
        let lost = queues.values().flat_map(|queue| queue.lost());
        lost.map(|record| record.data_transfer_id.get()).collect()
    }

    #[test]
    fn missing_messages_are_lost_transfers() {
        let none = HeldMessages::default();
        assert_eq!(lost(6, &none), [] as [i64; 0]);
        assert_eq!(lost(9, &none), [] as [i64; 0]);
        assert_eq!(lost(5, &none), [1]);
        // Rows that are not overdue are checked later.
        assert_eq!(lost(0, &none), [1, 2, 3, 4]);
    }

    #[test]
    fn messages_of_workers_are_counted() {
        let held = HeldMessages {
            transfers: [1, 5].map(TransferId::new).into(),
            task_ids: HashSet::from(["task-2".to_owned(), "another".to_owned()]),
            workers: 1,
        };
        assert_eq!(lost(3, &held), [] as [i64; 0]);
        assert_eq!(lost(2, &held), [3]);
    }

    #[test]
    fn search_delay_grows_to_a_limit() {
        assert_eq!(search_delay(AFTER, 0), AFTER);
        assert_eq!(search_delay(AFTER, 2), AFTER * 4);
        assert_eq!(search_delay(AFTER, 50), MAX_SEARCH_DELAY);
        assert_eq!(search_delay(AFTER, -1), AFTER);
        let long = MAX_SEARCH_DELAY * 2;
        assert_eq!(search_delay(long, 3), long);
        let now = DateTime::UNIX_EPOCH + TimeDelta::seconds(301);
        assert!(is_overdue(&record(1, "a"), now, AFTER));
        assert!(!is_overdue(&record(2, "a"), now, AFTER));
    }
}
