//! `transfers list`.

use chrono::{DateTime, Utc};
use clap::{Args, ValueEnum};

use super::super::{CliError, Context, output};
use super::selection::Filters;
use crate::transfer::lease::LeaseInfo;
use crate::transfer::repository::{Listing, Sort, TransferEnd, TransferSummary};

/// Maximum result of the count: on a large table, counting takes longer than the list.
const MAX_COUNT: u64 = 100_000;

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    #[command(flatten)]
    filters: Filters,

    /// Order: the newest id, the longest unchanged, the state (pending first), the largest, or the most retries first.
    #[arg(long, value_enum, default_value_t = SortArgument::Id)]
    sort: SortArgument,

    /// Reverse the order.
    #[arg(long)]
    reverse: bool,

    /// Maximum number of rows; 0 for all.
    #[arg(long, default_value_t = 50)]
    limit: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SortArgument {
    Id,
    Age,
    Status,
    Size,
    Retries,
}

impl From<SortArgument> for Sort {
    fn from(argument: SortArgument) -> Self {
        match argument {
            SortArgument::Id => Self::Id,
            SortArgument::Age => Self::Age,
            SortArgument::Status => Self::Status,
            SortArgument::Size => Self::Size,
            SortArgument::Retries => Self::Retries,
        }
    }
}

pub(super) async fn run(context: &Context, list: List) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let mut listing = Listing {
        filter: (&list.filters).into(),
        sort: list.sort.into(),
        is_reversed: list.reverse,
        // One row more shows whether the list is complete.
        limit: (list.limit > 0).then(|| list.limit.saturating_add(1)),
    };
    let mut transfers = repository.list(&listing).await?;
    let shown = usize::try_from(list.limit).unwrap_or(usize::MAX);
    let is_cut = list.limit > 0 && transfers.len() > shown;
    if is_cut {
        transfers.truncate(shown);
    }
    if context.json {
        output::json(&transfers)?;
    } else {
        let now = repository.database().now().await?;
        output::print(&table(&transfers, now))?;
    }
    if is_cut {
        let filter = std::mem::take(&mut listing.filter);
        let count = repository.count(&filter, MAX_COUNT + 1).await?;
        let all = if count > MAX_COUNT {
            format!("more than {MAX_COUNT}")
        } else {
            count.to_string()
        };
        eprintln!("{shown} of {all}; --limit 0 for all");
    }
    Ok(())
}

/// Transfers as a table.
pub(super) fn table(transfers: &[TransferSummary], now: DateTime<Utc>) -> String {
    let mut table = output::table(&[
        "ID", "STATUS", "AGE", "RETRIES", "FROM", "TO", "FILE", "SIZE", "DETAIL",
    ]);
    for transfer in transfers {
        table.add_row([
            transfer.id.to_string(),
            output::clean(transfer.status.as_str()).into_owned(),
            transfer
                .changed_at
                .map(|time| output::age(now - time))
                .unwrap_or_default(),
            transfer.retry_count.to_string(),
            endpoint(transfer.origin.as_ref()),
            endpoint(transfer.destination.as_ref()),
            output::clean(transfer.file_name.as_deref().unwrap_or_default()).into_owned(),
            transfer.size_bytes.map(output::size).unwrap_or_default(),
            detail(transfer, now),
        ]);
    }
    format!("{table}\n")
}

/// The most important fact besides the state.
fn detail(transfer: &TransferSummary, now: DateTime<Utc>) -> String {
    if let (None, Some(record)) = (&transfer.lease, &transfer.schedule) {
        let age = output::age(now - record.scheduled_at);
        return match record.resent {
            0 => format!("sent {age} ago"),
            1 => format!("sent {age} ago, after one lost message"),
            n => format!("sent {age} ago, after {n} lost messages"),
        };
    }
    match (&transfer.lease, transfer.not_before, &transfer.error_code) {
        (Some(lease), _, _) => progress(lease),
        (None, Some(time), Some(code)) => {
            format!(
                "not before {}, {}",
                output::second(time),
                output::clean(code)
            )
        }
        (None, Some(time), None) => format!("not before {}", output::second(time)),
        (None, None, Some(code)) => output::clean(code).into_owned(),
        (None, None, None) => String::new(),
    }
}

fn endpoint(endpoint: Option<&TransferEnd>) -> String {
    endpoint.map_or_else(
        || "?".into(),
        |e| output::clean(&format!("{}/{}", e.site, e.location)).into_owned(),
    )
}

/// Progress of a copy, in a few words.
pub(super) fn progress(lease: &LeaseInfo) -> String {
    let share = output::percent(lease.bytes_done, lease.bytes_total.unwrap_or(0));
    let rate = output::rate(lease.rate_bytes_per_s);
    let words = [lease.phase.as_deref().unwrap_or_default(), &*share, &*rate];
    let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
    output::clean(&words.join(" ")).into_owned()
}
