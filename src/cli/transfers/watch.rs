//! `transfers watch`: shows running copies.
//!
//! The output comes from the leases, which workers update at each renewal. It is therefore as recent as
//! `transfer.lease_renew_interval` allows, and the same on every host. Watching changes nothing: ending it ends no
//! copy.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use entity::{Label, Status};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};

use super::super::{CliError, Context, output};
use super::selection::Filters;
use crate::clock;
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::repository::{Filter, ListError, Listing, Repository, Sort, TransferSummary};
use celery_worker_cli::Signals;
use service_connection::error_chain::chain;

/// Longest estimate in seconds; beyond it, the rate is too low for a useful estimate.
const LONGEST_ETA_S: i64 = 100 * 86_400;

#[derive(Debug, Args)]
pub(in crate::cli) struct Watch {
    /// Ids of the transfers; without any, and without --status, all running copies.
    ids: Vec<TransferId>,

    #[command(flatten)]
    filters: Filters,

    /// Interval between two updates.
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = pause)]
    interval: Duration,

    /// End when none of the transfers shown so far waits or runs any more: with exit code 1 if one has FAILED, else 0.
    #[arg(long)]
    until_done: bool,
}

/// Parses an interval, with a minimum that limits the load of the database.
fn pause(text: &str) -> Result<Duration, String> {
    let pause = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if pause < Duration::from_millis(100) {
        return Err("less than 100ms".into());
    }
    Ok(pause)
}

pub(super) async fn run(context: &Context, watch: Watch) -> Result<ExitCode, CliError> {
    if !watch.ids.is_empty() && !watch.filters.is_empty() {
        return Err(CliError::usage(
            "name the transfers, or choose them with filters, not both",
        ));
    }
    let mut signals = Signals::listen()?;
    let repository = context.repository().await?;
    let mut display = Display::new(context.json);
    let watching = watch_loop(&repository, &watch, &mut display);
    let code = tokio::select! {
        code = watching => code?,
        code = signals.ending() => code,
    };
    display.close();
    Ok(code)
}

async fn watch_loop(
    repository: &Repository,
    watch: &Watch,
    display: &mut Display,
) -> Result<ExitCode, CliError> {
    let mut watched = WatchedTransfers::new(watch);
    let mut ticks = interval(watch.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match watched.refresh(repository).await {
            Ok(()) => {}
            // A long watch continues when the database is reachable again.
            Err(ListError::Database(error)) if error.is_unreachable() && watched.has_read => {
                display.print_line(&format!("ccat-transfer: {}", chain(&error)));
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        if let Some(id) = watched.unknown() {
            return Err(super::unknown(id));
        }
        display.show(&watched.now)?;
        if watch.until_done && watched.is_over() {
            return Ok(watched.code());
        }
    }
}

/// The watched transfers.
struct WatchedTransfers {
    ids: Vec<TransferId>,
    filter: Filter,
    /// Transfers that had not ended at the last update.
    tracked: BTreeSet<TransferId>,
    now: BTreeMap<TransferId, TransferSnapshot>,
    has_failed: bool,
    has_read: bool,
}

impl WatchedTransfers {
    fn new(watch: &Watch) -> Self {
        let filter = Filter::from(&watch.filters);
        let by_state = watch.ids.is_empty() && watch.filters.statuses().is_empty();
        Self {
            ids: watch.ids.clone(),
            filter: Filter {
                ids: (!watch.ids.is_empty()).then(|| watch.ids.clone()),
                is_held: by_state,
                ..filter
            },
            tracked: BTreeSet::new(),
            now: BTreeMap::new(),
            has_failed: false,
            has_read: false,
        }
    }

    async fn refresh(&mut self, repository: &Repository) -> Result<(), ListError> {
        let now = repository.database().now().await?;
        let mut found = read(repository, self.filter.clone()).await?;
        let further: Vec<_> = self
            .tracked
            .iter()
            .copied()
            .filter(|id| !found.iter().any(|transfer| transfer.id == *id))
            .collect();
        if !further.is_empty() {
            let filter = Filter {
                ids: Some(further),
                ..Filter::default()
            };
            found.extend(read(repository, filter).await?);
        }
        self.now = found
            .into_iter()
            .map(|transfer| (transfer.id, TransferSnapshot::of(transfer, now)))
            .collect();
        let open = self.now.values().filter(|snapshot| snapshot.is_open());
        self.tracked = open.map(|snapshot| snapshot.id).collect();
        self.has_failed |= self
            .now
            .values()
            .any(|snapshot| snapshot.status.means(Status::Failed));
        self.has_read = true;
        Ok(())
    }

    /// Returns a requested id without a transfer.
    fn unknown(&self) -> Option<TransferId> {
        let is_there = |id: &&TransferId| self.now.contains_key(id);
        self.ids.iter().find(|id| !is_there(id)).copied()
    }

    fn is_over(&self) -> bool {
        self.tracked.is_empty()
    }

    fn code(&self) -> ExitCode {
        if self.has_failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}

async fn read(repository: &Repository, filter: Filter) -> Result<Vec<TransferSummary>, ListError> {
    repository
        .list(&Listing {
            filter,
            sort: Sort::Id,
            is_reversed: true,
            limit: None,
        })
        .await
}

/// State of a transfer at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct TransferSnapshot {
    id: TransferId,
    status: Label<Status>,
    file_name: Option<String>,
    phase: Option<String>,
    bytes_done: Option<i64>,
    bytes_total: Option<i64>,
    rate_bytes_per_s: Option<i64>,
    eta_s: Option<i64>,
    streams: Option<i32>,
    attempt: Option<AttemptNumber>,
    worker: Option<String>,
    not_before: Option<DateTime<Utc>>,
    error_code: Option<String>,
}

impl TransferSnapshot {
    fn of(transfer: TransferSummary, now: DateTime<Utc>) -> Self {
        // If the row has another state, the copy is about to be stopped.
        let lease = transfer
            .lease
            .filter(|lease| transfer.status.means(Status::InProgress) && lease.expires_at > now);
        let eta_s = lease.as_ref().and_then(|lease| {
            let left = lease.bytes_total?.saturating_sub(lease.bytes_done);
            let rate = (lease.rate_bytes_per_s > 0).then_some(lease.rate_bytes_per_s)?;
            let seconds = left.max(0).saturating_add(rate - 1) / rate;
            (left > 0 && seconds <= LONGEST_ETA_S).then_some(seconds)
        });
        Self {
            id: transfer.id,
            status: transfer.status,
            file_name: transfer.file_name,
            phase: lease.as_ref().and_then(|lease| lease.phase.clone()),
            bytes_done: lease.as_ref().map(|lease| lease.bytes_done),
            bytes_total: lease
                .as_ref()
                .map_or(transfer.size_bytes, |lease| lease.bytes_total),
            rate_bytes_per_s: lease.as_ref().map(|lease| lease.rate_bytes_per_s),
            eta_s,
            streams: lease.as_ref().and_then(|lease| lease.streams),
            attempt: lease.as_ref().map(|lease| lease.attempt),
            worker: lease.map(|lease| lease.owner.node),
            not_before: transfer.not_before,
            error_code: transfer.error_code,
        }
    }

    /// Returns true unless the transfer is COMPLETED or FAILED; only an operator changes those states.
    fn is_open(&self) -> bool {
        !self.status.means(Status::Completed) && !self.status.means(Status::Failed)
    }

    /// The values that change during a copy, in columns.
    fn details(&self) -> String {
        let mut words = Vec::new();
        if let (Some(done), Some(rate)) = (self.bytes_done, self.rate_bytes_per_s) {
            let total = self.bytes_total.unwrap_or(0);
            let bytes = format!("{} of {}", output::size(done), output::size(total));
            let eta = self.eta_s.map_or_else(String::new, |seconds| {
                format!("ETA {}", output::age(TimeDelta::seconds(seconds)))
            });
            words.push(format!(
                "{:>4}  {bytes:>24}  {:>12}  {eta:<11}",
                output::percent(done, total),
                output::rate(rate)
            ));
        }
        words.extend(self.streams.map(|streams| format!("{streams} streams")));
        words.extend(self.phase.clone());
        words.extend(self.worker.clone());
        if let Some(time) = self.not_before {
            words.push(format!("not before {}", output::second(time)));
        }
        if self.worker.is_none() {
            words.extend(self.error_code.clone());
        }
        output::clean(&words.join("  ")).into_owned()
    }

    fn title(&self) -> String {
        let name = self.file_name.as_deref().unwrap_or_default();
        output::clean(&format!("{} {name}", self.id)).into_owned()
    }
}

/// Form of the output.
enum Display {
    Bars(Bars),
    /// One line per change.
    Lines {
        json: bool,
        last: BTreeMap<TransferId, TransferSnapshot>,
    },
}

impl Display {
    fn new(json: bool) -> Self {
        if !json && std::io::stdout().is_terminal() {
            Self::Bars(Bars::new())
        } else {
            Self::Lines {
                json,
                last: BTreeMap::new(),
            }
        }
    }

    fn show(&mut self, now: &BTreeMap<TransferId, TransferSnapshot>) -> Result<(), CliError> {
        match self {
            Self::Bars(bars) => {
                bars.show(now);
                Ok(())
            }
            Self::Lines { json, last } => {
                let changed = now
                    .values()
                    .filter(|snapshot| last.get(&snapshot.id) != Some(*snapshot));
                for snapshot in changed {
                    line(*json, snapshot)?;
                }
                last.clone_from(now);
                Ok(())
            }
        }
    }

    /// Prints a line that is not about a transfer.
    fn print_line(&self, text: &str) {
        match self {
            Self::Bars(bars) => bars.print_line(text),
            Self::Lines { .. } => eprintln!("{}", output::clean(text)),
        }
    }

    fn close(&self) {
        if let Self::Bars(bars) = self {
            bars.close();
        }
    }
}

fn line(json: bool, snapshot: &TransferSnapshot) -> Result<(), CliError> {
    #[derive(Serialize)]
    struct At<'a> {
        at: DateTime<Utc>,
        #[serde(flatten)]
        snapshot: &'a TransferSnapshot,
    }
    let at = clock::now();
    if json {
        return output::json_line(&At { at, snapshot });
    }
    let (time, title, status) = (
        output::second(at),
        snapshot.title(),
        snapshot.status.as_str(),
    );
    let status = output::clean(status);
    output::print(&format!(
        "{time}  {title}  {status}  {}\n",
        snapshot.details()
    ))
}

/// Text that is too wide for the terminal is cut.
const BAR: &str = "{prefix:<20!} {bar:24.cyan/blue} {wide_msg}";
const SUM: &str = "{wide_msg}";

/// A bar for each transfer, and a line for all of them, redrawn in place.
struct Bars {
    all: MultiProgress,
    bars: BTreeMap<TransferId, ProgressBar>,
    /// Transfers whose end has been printed.
    ended: BTreeSet<TransferId>,
    sum: ProgressBar,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        let sum = all.add(ProgressBar::no_length());
        sum.set_style(style(SUM));
        Self {
            all,
            bars: BTreeMap::new(),
            ended: BTreeSet::new(),
            sum,
        }
    }

    fn show(&mut self, now: &BTreeMap<TransferId, TransferSnapshot>) {
        let gone: Vec<_> = self
            .bars
            .keys()
            .copied()
            .filter(|id| now.get(id).is_none_or(|snapshot| !snapshot.is_open()))
            .collect();
        for id in gone {
            if let Some(bar) = self.bars.remove(&id) {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
        }
        for snapshot in now.values() {
            if snapshot.is_open() {
                self.ended.remove(&snapshot.id);
                self.update(snapshot);
            } else if self.ended.insert(snapshot.id) {
                let status = output::clean(snapshot.status.as_str()).into_owned();
                let code = snapshot
                    .error_code
                    .as_deref()
                    .map(output::clean)
                    .unwrap_or_default();
                self.print_line(&format!("{}  {status}  {code}", snapshot.title()));
            }
        }
        self.sum_up(now);
    }

    fn update(&mut self, snapshot: &TransferSnapshot) {
        let bar = self.bars.entry(snapshot.id).or_insert_with(|| {
            let bar = self.all.insert_before(&self.sum, ProgressBar::new(0));
            bar.set_style(style(BAR).progress_chars("━╸─"));
            bar
        });
        let count = |bytes: Option<i64>| bytes.map_or(0, |n| u64::try_from(n).unwrap_or(0));
        bar.set_prefix(snapshot.title());
        // A bar of length 0 would be shown as complete.
        bar.set_length(count(snapshot.bytes_total).max(1));
        bar.set_position(count(snapshot.bytes_done));
        bar.set_message(match &snapshot.worker {
            Some(_) => snapshot.details(),
            None => format!("{}  {}", snapshot.status, snapshot.details()),
        });
    }

    fn sum_up(&self, now: &BTreeMap<TransferId, TransferSnapshot>) {
        let copies = now
            .values()
            .filter(|snapshot| snapshot.worker.is_some())
            .count();
        let rate: i64 = now
            .values()
            .filter_map(|snapshot| snapshot.rate_bytes_per_s)
            .sum();
        self.sum.set_message(match copies {
            0 => "no copy runs; Ctrl-C ends this view".into(),
            _ => format!(
                "{copies} running, {} in total; Ctrl-C ends this view, not the copies",
                output::rate(rate)
            ),
        });
        self.sum.tick();
    }

    fn print_line(&self, text: &str) {
        // An error means that the terminal is gone; nothing can be reported there.
        let _ = self.all.println(output::clean(text));
    }

    /// Leaves the last state of the bars on the screen.
    fn close(&self) {
        for bar in self.bars.values() {
            bar.abandon();
        }
        self.sum.finish_and_clear();
    }
}

/// Returns the style of a template. The templates are valid, as the tests prove.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::transfer::lease::{LeaseInfo, Owner};

    fn copying(done: i64, rate: i64) -> TransferSummary {
        let now = clock::now();
        TransferSummary {
            id: TransferId::new(7),
            status: Label::Known(Status::InProgress),
            retry_count: 0,
            changed_at: None,
            origin: None,
            destination: None,
            file_name: Some("night-7.tar".into()),
            size_bytes: Some(3 << 20),
            failure_error_message: None,
            error_code: None,
            lease: Some(LeaseInfo {
                data_transfer_id: TransferId::new(7),
                attempt: AttemptNumber::new(2),
                task_id: "t".into(),
                owner: Owner::current("celery@here"),
                acquired_at: now,
                renewed_at: now,
                expires_at: now + TimeDelta::hours(1),
                bytes_done: done,
                bytes_total: Some(3 << 20),
                rate_bytes_per_s: rate,
                phase: Some("copying".into()),
                streams: Some(16),
            }),
            not_before: None,
            schedule: None,
        }
    }

    #[test]
    fn progress_shows_all_known_values() {
        let snapshot = TransferSnapshot::of(copying(1 << 20, 100_000), clock::now());
        assert_eq!(snapshot.eta_s, Some(21));
        assert_eq!(
            snapshot.details(),
            " 33%            1 MiB of 3 MiB   97.66 KiB/s  ETA 21s      16 streams  copying  celery@here"
        );
        // Unknown values give no estimate.
        assert_eq!(
            TransferSnapshot::of(copying(0, 0), clock::now()).eta_s,
            None
        );
        assert_eq!(
            TransferSnapshot::of(copying(3 << 20, 1), clock::now()).eta_s,
            None
        );
    }

    #[test]
    fn ended_transfer_and_expired_lease_show_no_progress() {
        let mut transfer = copying(1, 1);
        transfer.status = Label::Known(Status::Failed);
        assert_eq!(TransferSnapshot::of(transfer, clock::now()).worker, None);
        let late = clock::now() + TimeDelta::hours(2);
        assert_eq!(TransferSnapshot::of(copying(1, 1), late).bytes_done, None);
    }

    #[test]
    fn progress_templates_are_valid() {
        for template in [BAR, SUM] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn too_short_intervals_are_refused() {
        assert_eq!(pause("2s"), Ok(Duration::from_secs(2)));
        assert!(pause("1ms").is_err() && pause("soon").is_err());
    }
}
