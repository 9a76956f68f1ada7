//! Check for transfers that are SCHEDULED and that no worker takes.

use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::Status;

use super::Outcome;
use crate::manager::is_overdue;
use crate::transfer::repository::{Filter, Listing, Repository, ScheduleRecord, Sort};
use service_connection::error_chain::chain;

/// Maximum number of transfers to check; the longest unchanged come first.
const MAX_ROWS: u64 = 10_000;

/// Number of messages without effect after which a lost message is not a coincidence.
const MAX_RESENT: i64 = 3;

pub(super) async fn check(repository: &Repository, reconcile_after: Duration) -> Outcome {
    if !repository.has_schedule() {
        return Outcome::yellow(
            "this database does not record when transfers became SCHEDULED, so lost messages are not noticed",
            "run `ccat-transfer db migrate`",
        );
    }
    if reconcile_after.is_zero() {
        return Outcome::yellow(
            "lost messages are not noticed: manager.reconcile_after is 0s",
            "set it to some minutes",
        );
    }
    let listing = Listing {
        filter: Filter {
            statuses: vec![Status::Scheduled],
            ..Filter::default()
        },
        sort: Sort::Age,
        is_reversed: false,
        limit: Some(MAX_ROWS),
    };
    let reading = async {
        let now = repository.database().now().await?;
        Ok::<_, crate::transfer::repository::ListError>((now, repository.list(&listing).await?))
    };
    let (now, transfers) = match reading.await {
        Ok(reading) => reading,
        Err(error) => {
            return Outcome::yellow(
                chain(&error).to_string(),
                "let this user read transfer_worker_schedule",
            );
        }
    };
    let untaken = transfers.iter().filter(|transfer| transfer.lease.is_none());
    let records: Vec<_> = untaken.map(|transfer| transfer.schedule.as_ref()).collect();
    outcome_of(&records, now, reconcile_after)
}

fn outcome_of(
    records: &[Option<&ScheduleRecord>],
    now: DateTime<Utc>,
    reconcile_after: Duration,
) -> Outcome {
    let known = records.iter().copied().flatten();
    let fruitless = known
        .clone()
        .filter(|record| record.resent >= MAX_RESENT)
        .max_by_key(|record| record.resent);
    if let Some(record) = fruitless {
        let id = record.data_transfer_id;
        return Outcome::red(
            format!(
                "transfer {id} was sent {} times and no worker has taken it",
                record.resent.saturating_add(1)
            ),
            format!(
                "check that workers of this program listen to its queue, and find out which other program \
                 takes or drops its messages: `ccat-transfer transfers show {id}`"
            ),
        );
    }
    let after = humantime::format_duration(reconcile_after);
    let overdue: Vec<_> = known
        .filter(|record| is_overdue(record, now, reconcile_after))
        .collect();
    let oldest = overdue.iter().min_by_key(|record| record.scheduled_at);
    if let Some(oldest) = oldest {
        return Outcome::yellow(
            format!(
                "{} transfers are SCHEDULED for more than {after} and no worker has taken them; the oldest is {}",
                overdue.len(),
                oldest.data_transfer_id
            ),
            format!(
                "check that workers listen to their queues, and that a manager runs: it sends transfers \
                 without a message again (`ccat-transfer manager --once` does so now): `ccat-transfer \
                 transfers list --scheduled-for {after}`"
            ),
        );
    }
    let unseen = records.iter().filter(|record| record.is_none()).count();
    if unseen > 0 {
        return Outcome::yellow(
            format!(
                "another program has set {unseen} transfers to SCHEDULED, and no manager has seen them yet"
            ),
            "check that a manager runs: it watches them, and sends those without a message again",
        );
    }
    Outcome::green(format!(
        "no transfer is SCHEDULED for more than {after} without a worker"
    ))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use rstest::rstest;

    use super::super::Verdict;
    use super::*;

    #[rstest]
    #[case(&[], Verdict::Green)]
    #[case(&[Some((1, 0))], Verdict::Green)]
    #[case(&[Some((1, 0)), None], Verdict::Yellow)]
    #[case(&[Some((6, 0))], Verdict::Yellow)]
    // It was sent again, so it may be older.
    #[case(&[Some((6, 1))], Verdict::Green)]
    #[case(&[Some((1, 3))], Verdict::Red)]
    fn rows_that_wait(#[case] rows: &[Option<(i64, i64)>], #[case] expected: Verdict) {
        let now = crate::clock::now();
        let record = |&(minutes, resent): &(i64, i64)| ScheduleRecord {
            data_transfer_id: 7.into(),
            scheduled_at: now - TimeDelta::minutes(minutes),
            queue: None,
            task_id: None,
            resent,
        };
        let records: Vec<_> = rows.iter().map(|row| row.as_ref().map(record)).collect();
        let records: Vec<_> = records.iter().map(Option::as_ref).collect();
        let outcome = outcome_of(&records, now, Duration::from_secs(300));
        assert_eq!(outcome.verdict, expected, "{}", outcome.found);
    }
}
