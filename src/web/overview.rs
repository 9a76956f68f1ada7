//! The overview, from the data that were read. Pure functions.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use entity::{DatabaseEnum as _, Status};

use super::model::{
    Bucket, Counts, Level, LinkState, LinkThroughput, LinkTotal, Overview, Period, Problem,
    ProblemGroup, ProblemKind, ProgramCondition, ProgramState, RunningTransfer, Throughput,
    Unreachable, Verdict,
};
use super::snapshots::{Inputs, Live};
use crate::transfer::failures::{FailureKind, Wait};
use crate::transfer::lease::LeaseInfo;
use crate::transfer::link::{Link, LinkName};
use crate::transfer::repository::{
    Cause, EndedCount, PROGRAM_INTERVAL, TransferCount, TransferEnd, TransferSummary,
};
use crate::{advice, display};

/// Name of a site whose row no longer exists.
const UNKNOWN_SITE: &str = "?";

/// Number of intervals without a sign of life after which a program counts as lost.
const MISSED_SIGNS: u32 = 3;

/// Maximum number of listed transfers in a group of problems.
const LISTED: usize = 20;

/// Ended attempts of a period.
#[derive(Debug)]
pub(super) struct EndedAttempts {
    pub(super) throughput: Throughput,
    totals: BTreeMap<LinkName, LinkSum>,
}

/// Sums of one link over a whole period.
#[derive(Debug, Clone, Copy, Default)]
struct LinkSum {
    packages: u64,
    bytes: u64,
    failed: u64,
    retried: u64,
    failures: u64,
}

impl EndedAttempts {
    pub(super) fn new(
        period: Period,
        since: DateTime<Utc>,
        until: DateTime<Utc>,
        counts: &[EndedCount],
    ) -> Self {
        let step_s = i64::try_from(period.bucket().as_secs()).unwrap_or(i64::MAX);
        let step_of = |time: DateTime<Utc>| time.timestamp().div_euclid(step_s);
        let steps = step_of(since)..=step_of(until);
        let empty: Vec<Bucket> = steps
            .clone()
            .filter_map(|step| {
                Some(Bucket {
                    start: DateTime::from_timestamp(step.checked_mul(step_s)?, 0)?,
                    packages: 0,
                    bytes: 0,
                    failures: 0,
                })
            })
            .collect();
        let mut links: BTreeMap<LinkName, Vec<Bucket>> = BTreeMap::new();
        let mut totals: BTreeMap<LinkName, LinkSum> = BTreeMap::new();
        for count in counts {
            let name = count.link.clone().unwrap_or_else(|| LinkName {
                origin: UNKNOWN_SITE.to_owned(),
                destination: UNKNOWN_SITE.to_owned(),
            });
            let failures = count.failed + count.retried + count.hindered;
            let sum = totals.entry(name.clone()).or_default();
            sum.packages += count.packages;
            sum.bytes = sum.bytes.saturating_add(count.bytes);
            sum.failed += count.failed;
            sum.retried += count.retried;
            sum.failures += failures;
            let buckets = links.entry(name).or_insert_with(|| empty.clone());
            let index = usize::try_from(count.step - steps.start()).ok();
            if let Some(bucket) = index.and_then(|index| buckets.get_mut(index)) {
                bucket.packages += count.packages;
                bucket.bytes = bucket.bytes.saturating_add(count.bytes);
                bucket.failures += failures;
            }
        }
        let links = links.into_iter().map(|(name, buckets)| LinkThroughput {
            origin: name.origin,
            destination: name.destination,
            buckets,
        });
        Self {
            throughput: Throughput {
                period,
                since,
                until,
                bucket_s: period.bucket().as_secs(),
                links: links.collect(),
            },
            totals,
        }
    }
}

/// Makes the overview.
pub(super) fn compose(inputs: &Inputs) -> Overview {
    let counted = inputs.counted.as_deref();
    let ended = inputs.ended.as_deref();
    let last_24h = ended.map(link_totals).unwrap_or_default();
    let counts = counted.map(counts);
    let Some(live) = inputs.live.as_deref() else {
        return Overview {
            at: None,
            unreachable: inputs.unreachable.clone(),
            verdict: unknown(inputs.unreachable.as_ref()),
            counts,
            running: Vec::new(),
            links: Vec::new(),
            problems: Vec::new(),
            programs: None,
            last_24h,
        };
    };
    let running: Vec<_> = live
        .running
        .iter()
        .filter_map(|transfer| running_transfer(transfer, live.at))
        .collect();
    let programs = live.programs.as_ref().map(|_| programs(live, &running));
    let problems = problems(live, counted, programs.as_deref().unwrap_or_default());
    let links = links(live, counted, ended, &running);
    let verdict = match &inputs.unreachable {
        Some(unreachable) => unknown(Some(unreachable)),
        None => verdict(&problems, &links, counted.is_some(), &running, &last_24h),
    };
    Overview {
        at: Some(live.at),
        unreachable: inputs.unreachable.clone(),
        verdict,
        counts,
        running,
        links,
        problems,
        programs,
        last_24h,
    }
}

fn counts(counted: &TransferCount) -> Counts {
    let count = |status: Status| counted.by_status.get(status.name()).copied().unwrap_or(0);
    Counts {
        at: counted.at,
        pending: count(Status::Pending),
        scheduled: count(Status::Scheduled),
        in_progress: count(Status::InProgress),
        completed: count(Status::Completed),
        failed: count(Status::Failed),
    }
}

fn link_totals(ended: &EndedAttempts) -> Vec<LinkTotal> {
    let total = |(name, sum): (&LinkName, &LinkSum)| LinkTotal {
        origin: name.origin.clone(),
        destination: name.destination.clone(),
        packages: sum.packages,
        bytes: sum.bytes,
        failed: sum.failed,
        retried: sum.retried,
    };
    ended.totals.iter().map(total).collect()
}

/// Link of a transfer; `None` if one of its sites no longer exists.
fn link_of(transfer: &TransferSummary) -> Option<LinkName> {
    Some(LinkName {
        origin: transfer.origin.as_ref()?.site.clone(),
        destination: transfer.destination.as_ref()?.site.clone(),
    })
}

fn running_transfer(transfer: &TransferSummary, now: DateTime<Utc>) -> Option<RunningTransfer> {
    let lease = transfer.lease.as_ref()?;
    let unsigned = |count: i64| u64::try_from(count).unwrap_or(0);
    let (done, rate) = (unsigned(lease.bytes_done), unsigned(lease.rate_bytes_per_s));
    let total = lease.bytes_total.or(transfer.size_bytes).map(unsigned);
    let percent = total.filter(|total| *total > 0).map(|total| {
        let percent = u128::from(done) * 100 / u128::from(total);
        u8::try_from(percent.min(100)).unwrap_or(100)
    });
    let remaining_s = total.filter(|_| rate > 0).map(|total| {
        let remaining = total.saturating_sub(done);
        remaining.div_ceil(rate)
    });
    let place = |end: &TransferEnd| format!("{}/{}", end.site, end.location);
    let left = remaining_s.and_then(|seconds| i64::try_from(seconds).ok());
    let left = left.and_then(TimeDelta::try_seconds);
    Some(RunningTransfer {
        id: transfer.id,
        file_name: transfer.file_name.clone(),
        origin: transfer.origin.as_ref().map(place),
        destination: transfer.destination.as_ref().map(place),
        link: link_of(transfer),
        attempt: lease.attempt,
        phase: lease.phase.clone(),
        bytes_done: done,
        bytes_total: total,
        percent,
        bytes_per_second: rate,
        remaining_s,
        ends_at: left.and_then(|left| now.checked_add_signed(left)),
        worker: lease.owner.node.clone(),
        started_at: lease.acquired_at,
        renewed_at: lease.renewed_at,
        is_overdue: is_overdue(lease, now),
    })
}

fn is_overdue(lease: &LeaseInfo, now: DateTime<Utc>) -> bool {
    lease.expires_at <= now
}

fn programs(live: &Live, running: &[RunningTransfer]) -> Vec<ProgramState> {
    let mut transfers: HashMap<&str, u64> = HashMap::new();
    for transfer in running {
        *transfers.entry(&transfer.worker).or_default() += 1;
    }
    let patience = TimeDelta::from_std(PROGRAM_INTERVAL * MISSED_SIGNS).unwrap_or(TimeDelta::MAX);
    let records = live.programs.iter().flatten();
    let state = records.map(|record| ProgramState {
        name: record.name.clone(),
        kind: record.kind.clone(),
        host: record.host.clone(),
        version: record.version.clone(),
        started_at: record.started_at,
        seen_at: record.seen_at,
        ended_at: record.ended_at,
        state: match record.ended_at {
            Some(_) => ProgramCondition::Ended,
            None if live.at - record.seen_at > patience => ProgramCondition::Lost,
            None => ProgramCondition::Running,
        },
        running_transfers: transfers.get(&*record.name).copied().unwrap_or(0),
    });
    state.collect()
}

fn links(
    live: &Live,
    counted: Option<&TransferCount>,
    ended: Option<&EndedAttempts>,
    running: &[RunningTransfer],
) -> Vec<LinkState> {
    let mut found: BTreeMap<LinkName, LinkState> = BTreeMap::new();
    let limits: HashMap<&LinkName, &Link> =
        live.links.iter().map(|link| (&link.name, link)).collect();
    let traffic = counted.iter().flat_map(|counted| &counted.traffic);
    let known = live
        .routes
        .iter()
        .chain(live.links.iter().map(|link| &link.name));
    let active = running.iter().filter_map(|transfer| transfer.link.as_ref());
    let names = known
        .chain(active)
        .chain(traffic.clone().map(|(name, _)| name));
    for name in names {
        found
            .entry(name.clone())
            .or_insert_with(|| idle_link(name, limits.get(name).copied(), live.at));
    }
    for (name, traffic) in traffic {
        let Some(link) = found.get_mut(name) else {
            continue;
        };
        link.scheduled = traffic.scheduled;
        link.waiting = traffic.pending;
        link.oldest_waiting = traffic.oldest_pending;
        link.waiting_since = traffic.pending_since;
    }
    // Workers that do not use leases run the other ones.
    let untracked = counted.iter().flat_map(|counted| &counted.untracked);
    for transfer in untracked.flat_map(|cause| &cause.transfers) {
        let link = link_of(transfer).and_then(|name| found.get_mut(&name));
        if let Some(link) = link {
            link.active += 1;
        }
    }
    for transfer in running {
        let link = transfer.link.as_ref().and_then(|name| found.get_mut(name));
        if let Some(link) = link {
            link.active += 1;
            link.bytes_per_second = link
                .bytes_per_second
                .saturating_add(transfer.bytes_per_second);
        }
    }
    for (name, sum) in ended.iter().flat_map(|ended| &ended.totals) {
        // Links without a route, e.g. of a site that no longer exists, are only in `last_24h`.
        let Some(link) = found.get_mut(name) else {
            continue;
        };
        link.packages_24h = sum.packages;
        link.bytes_24h = sum.bytes;
        link.bytes_per_second_24h = sum.bytes / Period::Day.length().as_secs();
        link.failures_24h = sum.failures;
    }
    found.into_values().collect()
}

fn idle_link(name: &LinkName, link: Option<&Link>, now: DateTime<Utc>) -> LinkState {
    LinkState {
        origin: name.origin.clone(),
        destination: name.destination.clone(),
        active: 0,
        limit: link.and_then(|link| link.limit(now)),
        scheduled: 0,
        waiting: 0,
        oldest_waiting: None,
        waiting_since: None,
        bytes_per_second: 0,
        bytes_per_second_24h: 0,
        packages_24h: 0,
        bytes_24h: 0,
        failures_24h: 0,
        pause: link.and_then(|link| link.pause.clone()),
        closed_until: link.and_then(|link| link.closed_until(now)),
    }
}

fn problems(
    live: &Live,
    counted: Option<&TransferCount>,
    programs: &[ProgramState],
) -> Vec<ProblemGroup> {
    let mut groups: Vec<ProblemGroup> = Vec::new();
    groups.extend(counted.iter().flat_map(|c| &c.failed).map(failed));
    groups.extend(
        programs
            .iter()
            .filter(|program| program.state == ProgramCondition::Lost)
            .map(lost_program),
    );
    groups.extend(counted.iter().flat_map(|c| &c.untracked).map(untracked));
    groups.extend(overdue(live));
    groups.extend(live.untaken.iter().map(untaken));
    groups.extend(live.delayed.iter().map(delayed));
    groups.sort_by_key(|group| {
        let count = std::cmp::Reverse(group.count);
        (!group.requires_action, group.kind, count)
    });
    groups
}

fn failed(cause: &Cause) -> ProblemGroup {
    let code = cause.name.as_deref();
    let kind = code.and_then(FailureKind::from_code);
    let command = match code {
        Some(code) if is_word(code) => {
            format!("ccat-transfer transfers retry --status failed --error {code}")
        }
        _ => {
            let ids = cause
                .transfers
                .iter()
                .map(|transfer| transfer.id.to_string());
            let ids: Vec<_> = ids.collect();
            format!("ccat-transfer transfers retry {}", ids.join(" "))
        }
    };
    ProblemGroup {
        kind: ProblemKind::Failed,
        requires_action: true,
        error_code: cause.name.clone(),
        title: match (kind, code) {
            (Some(kind), _) => kind.row().description.to_owned(),
            (None, Some(code)) => format!("Failed with `{}`.", display::clean(code)),
            (None, None) => {
                "Given up by an operator or another program, or without a recorded attempt."
                    .to_owned()
            }
        },
        remedy: kind
            .map_or(
                "Each transfer's page has the reason. Correct it, then try the transfers again.",
                advice::remedy,
            )
            .to_owned(),
        command: Some(command),
        count: cause.count,
        transfers: cause.transfers.iter().map(problem).collect(),
    }
}

fn delayed(cause: &Cause) -> ProblemGroup {
    let code = cause.name.as_deref();
    let kind = code.and_then(FailureKind::from_code);
    ProblemGroup {
        kind: ProblemKind::Delayed,
        // Only an operator can make room or mount a disk.
        requires_action: kind.is_some_and(|kind| kind.row().wait == Wait::Storage),
        error_code: cause.name.clone(),
        title: match (kind, code) {
            (Some(kind), _) => kind.row().description.to_owned(),
            (None, code) => format!(
                "Failed with `{}`, and will be tried again.",
                display::clean(code.unwrap_or_default())
            ),
        },
        remedy: kind
            .map_or("They are tried again after a time.", advice::remedy)
            .to_owned(),
        command: code
            .filter(|code| is_word(code))
            .map(|code| format!("ccat-transfer transfers retry --waiting --error {code}")),
        count: cause.count,
        transfers: cause.transfers.iter().map(problem).collect(),
    }
}

fn untaken(cause: &Cause) -> ProblemGroup {
    let queue = cause.name.as_deref();
    ProblemGroup {
        kind: ProblemKind::Untaken,
        requires_action: true,
        error_code: None,
        title: match queue {
            Some(queue) => format!(
                "No worker takes the transfers in the queue {}.",
                display::clean(queue)
            ),
            None => "No worker takes these transfers, which another program has scheduled.".to_owned(),
        },
        remedy: "Start a worker that listens to the queue, or find out why the running one takes nothing: all of \
                 its slots may be in use. A manager sends lost messages again."
            .to_owned(),
        command: queue
            .filter(|queue| is_word(queue))
            .map(|queue| format!("ccat-transfer worker -Q {queue}")),
        count: cause.count,
        transfers: cause.transfers.iter().map(problem).collect(),
    }
}

fn untracked(cause: &Cause) -> ProblemGroup {
    let ids: Vec<_> = cause
        .transfers
        .iter()
        .map(|transfer| transfer.id.to_string())
        .collect();
    ProblemGroup {
        kind: ProblemKind::Untracked,
        requires_action: false,
        error_code: None,
        title: "IN_PROGRESS without a lease: no worker of this program runs them.".to_owned(),
        remedy: "If no Python worker runs them either, try them again.".to_owned(),
        command: Some(format!(
            "ccat-transfer transfers retry {} --untracked",
            ids.join(" ")
        )),
        count: cause.count,
        transfers: cause.transfers.iter().map(problem).collect(),
    }
}

fn overdue(live: &Live) -> Option<ProblemGroup> {
    let is_overdue = |transfer: &&TransferSummary| {
        transfer
            .lease
            .as_ref()
            .is_some_and(|l| is_overdue(l, live.at))
    };
    let transfers: Vec<_> = live.running.iter().filter(is_overdue).collect();
    if transfers.is_empty() {
        return None;
    }
    Some(ProblemGroup {
        kind: ProblemKind::Overdue,
        requires_action: false,
        error_code: None,
        title: "The worker has not renewed its lease in time.".to_owned(),
        remedy: "A manager makes the transfers PENDING in its next pass, and they are tried again. If none runs, make \
                 a pass."
            .to_owned(),
        command: Some("ccat-transfer manager --once".to_owned()),
        count: u64::try_from(transfers.len()).unwrap_or(u64::MAX),
        transfers: transfers.into_iter().take(LISTED).map(problem).collect(),
    })
}

fn lost_program(program: &ProgramState) -> ProblemGroup {
    let (remedy, command) = match program.kind.as_str() {
        "manager" => (
            "Without a manager, no transfer starts. Look at its host, and start it again.",
            "ccat-transfer manager",
        ),
        _ => (
            "Look at its host, and start it again. Other workers take over its transfers.",
            "ccat-transfer worker",
        ),
    };
    let name = display::clean(&program.name);
    ProblemGroup {
        kind: ProblemKind::Program,
        requires_action: true,
        error_code: None,
        title: format!(
            "The {} {name} has given no sign of life since {}.",
            display::clean(&program.kind),
            display::second(program.seen_at)
        ),
        remedy: remedy.to_owned(),
        command: Some(command.to_owned()),
        count: program.running_transfers,
        transfers: Vec::new(),
    }
}

fn problem(transfer: &TransferSummary) -> Problem {
    let scheduled_at = transfer.schedule.as_ref().map(|record| record.scheduled_at);
    let renewed_at = transfer.lease.as_ref().map(|lease| lease.renewed_at);
    Problem {
        id: transfer.id,
        file_name: transfer.file_name.clone(),
        link: link_of(transfer),
        message: transfer.failure_error_message.clone(),
        since: scheduled_at.or(renewed_at).or(transfer.changed_at),
        retry_count: transfer.retry_count,
        next_attempt_at: transfer.not_before,
    }
}

/// Returns true if a text has the same meaning in every shell.
fn is_word(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./@".contains(&byte);
    !text.is_empty() && !text.starts_with('-') && text.bytes().all(is_allowed)
}

fn unknown(unreachable: Option<&Unreachable>) -> Verdict {
    Verdict {
        level: Level::Unknown,
        text: match unreachable {
            Some(unreachable) => format!(
                "The database cannot be read since {}.",
                display::second(unreachable.since)
            ),
            None => "The database has not answered yet.".to_owned(),
        },
    }
}

fn verdict(
    problems: &[ProblemGroup],
    links: &[LinkState],
    is_counted: bool,
    running: &[RunningTransfer],
    last_24h: &[LinkTotal],
) -> Verdict {
    let count = |of: &dyn Fn(&ProblemGroup) -> bool| -> u64 {
        let groups = problems.iter().filter(|group| of(group));
        groups.map(|group| group.count).sum()
    };
    let is_program = |group: &ProblemGroup| group.kind == ProblemKind::Program;
    let programs = problems.iter().filter(|group| is_program(group)).count();
    let programs = u64::try_from(programs).unwrap_or(u64::MAX);
    let action = count(&|group| group.requires_action && !is_program(group));
    let waiting = count(&|group| !group.requires_action);
    let waiting_for_links: u64 = links
        .iter()
        .filter(|link| link.limit == Some(0))
        .map(|link| link.waiting)
        .sum();
    let mut parts = Vec::new();
    if action > 0 {
        let verb = if action == 1 { "requires" } else { "require" };
        parts.push(format!("{} {verb} action", transfers(action)));
    }
    if programs > 0 {
        let noun = if programs == 1 {
            "program is"
        } else {
            "programs are"
        };
        parts.push(format!("{programs} {noun} lost"));
    }
    let level = match (action + programs, is_counted, waiting + waiting_for_links) {
        (1.., ..) => Level::Action,
        (_, false, _) => Level::Unknown,
        (_, _, 1..) => Level::Waiting,
        _ => Level::Ok,
    };
    match level {
        Level::Action => {}
        Level::Unknown => parts.push("the transfers are being counted".to_owned()),
        Level::Ok | Level::Waiting => parts.push("nothing requires action".to_owned()),
    }
    if waiting > 0 {
        let verb = if waiting == 1 { "waits" } else { "wait" };
        parts.push(format!("{} {verb} for another attempt", transfers(waiting)));
    }
    if waiting_for_links > 0 {
        let verb = if waiting_for_links == 1 {
            "waits"
        } else {
            "wait"
        };
        parts.push(format!(
            "{} {verb} for a paused or closed link",
            transfers(waiting_for_links)
        ));
    }
    let running = u64::try_from(running.len()).unwrap_or(u64::MAX);
    if running > 0 {
        let verb = if running == 1 { "is" } else { "are" };
        parts.push(format!("{} {verb} running", transfers(running)));
    }
    let packages: u64 = last_24h.iter().map(|total| total.packages).sum();
    let bytes = last_24h
        .iter()
        .fold(0_u64, |sum, total| sum.saturating_add(total.bytes));
    parts.push(match packages {
        0 => "no package arrived in the last 24 h".to_owned(),
        1 => format!("1 package ({}) arrived in the last 24 h", size(bytes)),
        n => format!("{n} packages ({}) arrived in the last 24 h", size(bytes)),
    });
    let text = parts.join("; ");
    let mut characters = text.chars();
    let text = characters
        .next()
        .map(|first| first.to_uppercase().chain(characters).collect::<String>())
        .unwrap_or_default();
    Verdict {
        level,
        text: format!("{text}."),
    }
}

fn transfers(count: u64) -> String {
    match count {
        1 => "1 transfer".to_owned(),
        n => format!("{n} transfers"),
    }
}

fn size(bytes: u64) -> String {
    display::size(i64::try_from(bytes).unwrap_or(i64::MAX))
}
