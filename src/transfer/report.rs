//! Summary of the attempts that ended in a period: by link and day.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDate, Utc};
use entity::Outcome;
use serde::Serialize;

use super::failures::FailureKind;
use super::link::LinkName;
use super::repository::EndedAttempt;

/// Name of a site whose row no longer exists.
const UNKNOWN_SITE: &str = "?";

/// Summary of a period.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Start of the period.
    pub since: DateTime<Utc>,
    /// End of the period.
    pub until: DateTime<Utc>,
    /// Summary of all links.
    pub total: Summary,
    /// Summaries of the links that had attempts.
    pub links: Vec<LinkReport>,
}

/// Summary of one link.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkReport {
    /// Name of the link.
    #[serde(flatten)]
    pub name: LinkName,
    /// Summary of the whole period.
    pub total: Summary,
    /// Summary of each day with attempts, by UTC.
    pub days: Vec<DayReport>,
}

/// Summary of one day.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DayReport {
    /// The day, by UTC.
    pub day: NaiveDate,
    /// Summary of the day.
    #[serde(flatten)]
    pub summary: Summary,
}

/// Numbers of some attempts.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Number of transfers that were completed.
    pub packages: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Median of the mean rates of their copies, in bytes per second; `None` without copies.
    pub median_rate: Option<u64>,
    /// 95th percentile of these rates.
    pub p95_rate: Option<u64>,
    /// Median of the times from the creation of a transfer to the start of its first attempt, in seconds; `None` without
    /// first attempts, or if the database has no creation times.
    pub median_wait_s: Option<u64>,
    /// 95th percentile of these times.
    pub p95_wait_s: Option<u64>,
    /// Number of failed attempts that are followed by another one.
    pub retried: u64,
    /// Number of transfers that have FAILED.
    pub failed: u64,
    /// Number of attempts that do not count as failures: they were stopped, their worker died, or a cause outside of the
    /// transfer made it wait, such as a disk that is not mounted.
    pub interrupted: u64,
    /// Number of attempts by error code, without those that were only stopped.
    pub failures: BTreeMap<String, u64>,
}

impl Report {
    /// Summarizes attempts of the period from `since` to `until`.
    #[must_use]
    pub fn of(since: DateTime<Utc>, until: DateTime<Utc>, attempts: &[EndedAttempt]) -> Self {
        let mut links = BTreeMap::<LinkName, Vec<&EndedAttempt>>::new();
        for attempt in attempts {
            let unknown = || LinkName {
                origin: UNKNOWN_SITE.to_owned(),
                destination: UNKNOWN_SITE.to_owned(),
            };
            let link = attempt.link.clone().unwrap_or_else(unknown);
            links.entry(link).or_default().push(attempt);
        }
        Self {
            since,
            until,
            total: Summary::of(attempts),
            links: links.into_iter().map(LinkReport::of).collect(),
        }
    }
}

impl LinkReport {
    fn of((name, attempts): (LinkName, Vec<&EndedAttempt>)) -> Self {
        let mut days = BTreeMap::<NaiveDate, Vec<&EndedAttempt>>::new();
        for attempt in &attempts {
            let day = attempt.ended_at.date_naive();
            days.entry(day).or_default().push(attempt);
        }
        let days = days.into_iter().map(|(day, attempts)| DayReport {
            day,
            summary: Summary::of(attempts),
        });
        Self {
            name,
            days: days.collect(),
            total: Summary::of(attempts),
        }
    }
}

impl Summary {
    fn of<'a>(attempts: impl IntoIterator<Item = &'a EndedAttempt>) -> Self {
        let mut summary = Self::default();
        let (mut rates, mut waits) = (Vec::new(), Vec::new());
        for attempt in attempts {
            match attempt.outcome {
                Outcome::Completed => {
                    summary.packages += 1;
                    summary.bytes = summary.bytes.saturating_add(attempt.bytes);
                    // A file that was there already was not copied.
                    rates.extend(Some(attempt.rate_bytes_per_s).filter(|rate| *rate > 0));
                }
                Outcome::Retried => summary.retried += 1,
                Outcome::Failed => summary.failed += 1,
                Outcome::Interrupted => summary.interrupted += 1,
            }
            let code = attempt.error_code.as_ref();
            if let Some(code) = code.filter(|code| *code != FailureKind::Interrupted.code()) {
                *summary.failures.entry(code.clone()).or_default() += 1;
            }
            if let (1, Some(created)) = (attempt.attempt.get(), attempt.created_at) {
                let wait = (attempt.started_at - created).num_seconds();
                // The clock that set `created_at` may be ahead.
                waits.push(u64::try_from(wait).unwrap_or(0));
            }
        }
        rates.sort_unstable();
        waits.sort_unstable();
        summary.median_rate = percentile(&rates, 50);
        summary.p95_rate = percentile(&rates, 95);
        summary.median_wait_s = percentile(&waits, 50);
        summary.p95_wait_s = percentile(&waits, 95);
        summary
    }
}

/// The smallest of some sorted values that is not below `percent` of them (nearest rank).
fn percentile(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use rstest::rstest;

    use super::*;
    use crate::transfer::id::{AttemptNumber, TransferId};

    #[rstest]
    #[case(&[], 50, None)]
    #[case(&[7], 95, Some(7))]
    #[case(&[1, 2, 3, 4], 50, Some(2))]
    #[case(&[1, 2, 3, 4], 95, Some(4))]
    #[case(&[1, 2, 3, 4, 5], 50, Some(3))]
    fn percentiles(#[case] values: &[u64], #[case] percent: usize, #[case] found: Option<u64>) {
        assert_eq!(percentile(values, percent), found);
    }

    #[test]
    fn attempts_are_counted_by_link_and_day() {
        let midnight = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::days(20_000);
        let link = LinkName {
            origin: "ccat".to_owned(),
            destination: "cologne".to_owned(),
        };
        let attempt = |id, number, minutes, outcome, code: Option<&str>| EndedAttempt {
            data_transfer_id: TransferId::new(id),
            link: (id < 9).then(|| link.clone()),
            created_at: Some(midnight),
            attempt: AttemptNumber::new(number),
            started_at: midnight + TimeDelta::seconds(30 * id),
            ended_at: midnight + TimeDelta::minutes(minutes),
            outcome,
            error_code: code.map(str::to_owned),
            bytes: 10,
            rate_bytes_per_s: 2,
        };
        let attempts = [
            attempt(1, 1, -1, Outcome::Retried, Some("stalled")),
            attempt(1, 2, 1, Outcome::Completed, None),
            attempt(2, 1, 2, Outcome::Failed, Some("origin_missing")),
            attempt(3, 1, 3, Outcome::Interrupted, Some("interrupted")),
            attempt(9, 1, 4, Outcome::Completed, None),
            attempt(9, 2, 4, Outcome::Interrupted, Some("storage_low")),
        ];
        let report = Report::of(midnight, midnight, &attempts);
        let counts = |summary: &Summary| {
            let Summary {
                packages,
                bytes,
                retried,
                failed,
                interrupted,
                ..
            } = *summary;
            (packages, bytes, retried, failed, interrupted)
        };
        assert_eq!(counts(&report.total), (2, 20, 1, 1, 2));
        let failures: Vec<_> = report.total.failures.keys().collect();
        assert_eq!(failures, ["origin_missing", "stalled", "storage_low"]);
        let names: Vec<_> = report.links.iter().map(|l| l.name.to_string()).collect();
        assert_eq!(names, ["? → ?", "ccat → cologne"]);
        let known = &report.links[1];
        assert_eq!(counts(&known.total), (1, 10, 1, 1, 1));
        assert_eq!(
            (known.total.median_rate, known.total.median_wait_s),
            (Some(2), Some(60))
        );
        let days: Vec<_> = known.days.iter().map(|day| counts(&day.summary)).collect();
        assert_eq!(days, [(0, 0, 1, 0, 0), (1, 10, 0, 1, 1)]);
    }
}
