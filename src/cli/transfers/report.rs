//! `transfers report`.

use std::borrow::Cow;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use serde::Serialize;

use super::super::{CliError, Context, output};
use crate::advice;
use crate::transfer::report::{Report, Summary};

/// Width of the longest bar, in characters.
const BAR_WIDTH: u64 = 20;

#[derive(Debug, Args)]
pub(in crate::cli) struct ReportOptions {
    /// Length of the period, which ends now.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "24h")]
    since: Duration,

    /// Only this link, by the short names of its sites.
    #[arg(long, num_args = 2, value_names = ["ORIGIN", "DESTINATION"])]
    link: Option<Vec<String>>,

    /// Print a line of comma-separated values for each link and day.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

pub(super) async fn run(context: &Context, options: ReportOptions) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let until = repository.database().now().await?;
    let length = TimeDelta::from_std(options.since).unwrap_or(TimeDelta::MAX);
    let since = until
        .checked_sub_signed(length)
        .unwrap_or(DateTime::<Utc>::UNIX_EPOCH);
    let mut attempts = repository.ended_attempts(since).await?;
    if let Some([origin, destination]) = options.link.as_deref() {
        for site in [origin, destination] {
            repository.locations_of_site(site).await?;
        }
        attempts.retain(|attempt| {
            let link = attempt.link.as_ref();
            link.is_some_and(|link| link.origin == *origin && link.destination == *destination)
        });
    }
    let report = Report::of(since, until, &attempts);
    if context.json {
        output::json(&report)
    } else if options.csv {
        output::print(&csv(&report)?)
    } else {
        output::print(&text(&report))
    }
}

fn text(report: &Report) -> String {
    let span = report.until - report.since;
    let mut text = format!(
        "{} to {} ({})\n\n",
        output::second(report.since),
        output::second(report.until),
        output::age(span)
    );
    if report.links.is_empty() {
        text.push_str("no attempt has ended in this time\n");
        return text;
    }
    let mut table = output::table(&[
        "LINK", "DAY", "PACKAGES", "SIZE", "MEDIAN", "P95", "WAIT", "RETRIED", "FAILED", "STOPPED",
        "",
    ]);
    let days = report.links.iter().flat_map(|link| &link.days);
    let most = days.map(|day| day.summary.bytes).max().unwrap_or(0);
    for link in &report.links {
        for day in &link.days {
            let name = output::clean(&link.name.to_string()).into_owned();
            let bar = bar(day.summary.bytes, most);
            table.add_row(row(name, day.day.to_string(), &day.summary, bar));
        }
    }
    table.add_row(row(
        "all".to_owned(),
        String::new(),
        &report.total,
        String::new(),
    ));
    text.push_str(&format!("{table}\n"));
    for link in &report.links {
        for (code, count) in &link.total.failures {
            let remedy = advice::remedy_of_code(code).unwrap_or_default();
            text.push_str(&format!(
                "\n{}  {} × {count}\n    {remedy}\n",
                output::clean(&link.name.to_string()),
                output::clean(code)
            ));
        }
    }
    text
}

fn row(link: String, day: String, summary: &Summary, bar: String) -> [String; 11] {
    let rate = |rate: Option<u64>| {
        rate.map(|rate| output::rate(signed(rate)))
            .unwrap_or_default()
    };
    let wait = summary
        .median_wait_s
        .map(|seconds| output::age(TimeDelta::seconds(signed(seconds))));
    [
        link,
        day,
        summary.packages.to_string(),
        output::size(signed(summary.bytes)),
        rate(summary.median_rate),
        rate(summary.p95_rate),
        wait.unwrap_or_default(),
        summary.retried.to_string(),
        summary.failed.to_string(),
        summary.interrupted.to_string(),
        bar,
    ]
}

/// A bar of a length in proportion to `value`.
fn bar(value: u64, most: u64) -> String {
    let width = u128::from(value) * u128::from(BAR_WIDTH) / u128::from(most.max(1));
    "#".repeat(usize::try_from(width).unwrap_or(0))
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A line of the CSV form.
#[derive(Serialize)]
struct Line<'a> {
    origin: Cow<'a, str>,
    destination: Cow<'a, str>,
    day: String,
    packages: u64,
    bytes: u64,
    median_rate: Option<u64>,
    p95_rate: Option<u64>,
    median_wait_s: Option<u64>,
    p95_wait_s: Option<u64>,
    retried: u64,
    failed: u64,
    interrupted: u64,
}

fn csv(report: &Report) -> Result<String, CliError> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for link in &report.links {
        for day in &link.days {
            let summary = &day.summary;
            writer
                .serialize(Line {
                    origin: cell(&link.name.origin),
                    destination: cell(&link.name.destination),
                    day: day.day.to_string(),
                    packages: summary.packages,
                    bytes: summary.bytes,
                    median_rate: summary.median_rate,
                    p95_rate: summary.p95_rate,
                    median_wait_s: summary.median_wait_s,
                    p95_wait_s: summary.p95_wait_s,
                    retried: summary.retried,
                    failed: summary.failed,
                    interrupted: summary.interrupted,
                })
                .map_err(no_csv)?;
        }
    }
    let bytes = writer.into_inner().map_err(no_csv)?;
    String::from_utf8(bytes).map_err(no_csv)
}

/// A text that no spreadsheet takes for a formula.
fn cell(text: &str) -> Cow<'_, str> {
    match text.starts_with(['=', '+', '-', '@', '\t', '\r']) {
        true => Cow::Owned(format!("'{text}")),
        false => Cow::Borrowed(text),
    }
}

fn no_csv(error: impl std::fmt::Display) -> CliError {
    CliError::failed(format!("cannot show the report as CSV: {error}"))
}
