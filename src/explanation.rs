//! Explanation of a transfer's state and its next step, for the command line and the status page.

use std::time::Duration;

use chrono::{DateTime, Utc};
use entity::{Outcome, Status};
use serde::Serialize;
use utoipa::ToSchema;

use crate::advice;
use crate::clock;
use crate::display;
use crate::manager::search_delay;
use crate::settings::{QueueLocation, Settings};
use crate::transfer::lease::Owner;
use crate::transfer::link::Link;
use crate::transfer::repository::{LocationRecord, TransferDetail};
use crate::transfer::routing::queue_name;

/// Settings that decide the route of a transfer.
#[derive(Debug)]
pub(crate) struct RoutingInfo<'a> {
    pub(crate) queue_location: QueueLocation,
    pub(crate) queue_prefix: &'a str,
    /// Pause between a manager's passes.
    pub(crate) sleep_time: Duration,
    /// Time after which a manager searches for a message.
    pub(crate) reconcile_after: Duration,
    /// The link of a waiting transfer, and the number of other transfers under way on it.
    pub(crate) link: Option<(Link, u64)>,
}

impl<'a> RoutingInfo<'a> {
    /// Routing by the settings; `link` is the link of a waiting transfer.
    pub(crate) fn new(settings: &'a Settings, link: Option<(Link, u64)>) -> Self {
        Self {
            queue_location: settings.transfer.queue_location,
            queue_prefix: &settings.transfer.queue_prefix,
            sleep_time: settings.manager.sleep_time,
            reconcile_after: settings.manager.reconcile_after,
            link,
        }
    }
}

/// Explanation of a transfer's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Explanation {
    /// Condition that the transfer waits for, or the reason why it ended.
    pub why: String,
    /// Actions for an operator, if any are necessary.
    pub next: Vec<String>,
}

impl Explanation {
    pub(crate) fn of(
        detail: &TransferDetail,
        routing: &RoutingInfo<'_>,
        observer: &Owner,
        now: DateTime<Utc>,
    ) -> Self {
        match detail.transfer.status.known() {
            Some(Status::Pending) => pending(detail, routing, now),
            Some(Status::Scheduled) => scheduled(detail, routing, now),
            Some(Status::InProgress) => in_progress(detail, observer, now),
            Some(Status::Completed) => completed(detail),
            Some(Status::Failed) => failed(detail),
            None => Self {
                why: format!(
                    "`{}` is a status that this program does not know, so nothing here touches the transfer",
                    display::clean(detail.transfer.status.as_str())
                ),
                next: vec!["a newer ccat-transfer may know it".into()],
            },
        }
    }
}

fn pending(detail: &TransferDetail, routing: &RoutingInfo<'_>, now: DateTime<Utc>) -> Explanation {
    let id = detail.transfer.id;
    if let Some(missing) = missing(detail) {
        return Explanation {
            why: format!(
                "it cannot be transferred: its row refers to {missing}, which does not exist"
            ),
            next: vec![
                "correct the row in the ops-db".into(),
                format!("or give it up: `ccat-transfer transfers fail {id} --reason TEXT`"),
            ],
        };
    }
    let link = routing.link.as_ref();
    let link_wait = link.and_then(|(link, under_way)| held_back(link, *under_way, now));
    let Some(time) = detail.not_before else {
        if let Some(explanation) = link_wait {
            return explanation;
        }
        let sleep = humantime::format_duration(routing.sleep_time);
        return Explanation {
            why: format!("due: a manager's next pass sends it, one every {sleep}"),
            next: vec!["if no manager runs: `ccat-transfer manager --once`".into()],
        };
    };
    let code = detail.waits_for.as_deref().unwrap_or("a failure");
    let mut why = format!(
        "waits until {}, in {}, after {}",
        display::second(time),
        display::age(time - now),
        display::clean(code)
    );
    if let Some(competing_lease) = &detail.competing_lease {
        why.push_str(&format!(
            "; transfer {} is copied to the same path by {}",
            competing_lease.data_transfer_id,
            display::clean(&competing_lease.owner.node)
        ));
    }
    let mut next: Vec<String> = advice::remedy_of_code(code)
        .map(Into::into)
        .into_iter()
        .collect();
    match link_wait {
        Some(link) => {
            why.push_str(&format!("; then {}", link.why));
            next.extend(link.next);
        }
        None => next.push(format!(
            "to try it now: `ccat-transfer transfers retry {id}`"
        )),
    }
    Explanation { why, next }
}

/// Returns the reason why a link lets no more transfers start now, if any.
fn held_back(link: &Link, under_way: u64, now: DateTime<Utc>) -> Option<Explanation> {
    let limit = u64::from(link.limit(now)?);
    let name = display::clean(&link.name.to_string()).into_owned();
    let words = format!(
        "{} {}",
        display::clean(&link.name.origin),
        display::clean(&link.name.destination)
    );
    if let Some(pause) = &link.pause {
        return Some(Explanation {
            why: format!(
                "its link {name} is paused since {} by {}: {}",
                display::second(pause.since),
                display::clean(&pause.by),
                display::clean(&pause.reason)
            ),
            next: vec![format!(
                "when that is over: `ccat-transfer links resume {words}`"
            )],
        });
    }
    let look = format!("limits of the link: `ccat-transfer links show {words}`");
    let why = match limit {
        0 => format!("its link {name} takes no copies now: its limit is 0"),
        _ if under_way >= limit => format!(
            "its link {name} has {under_way} under way, of {limit} at most; the oldest go first"
        ),
        _ => return None,
    };
    Some(Explanation {
        why,
        next: vec![look],
    })
}

fn scheduled(
    detail: &TransferDetail,
    routing: &RoutingInfo<'_>,
    now: DateTime<Utc>,
) -> Explanation {
    let id = detail.transfer.id;
    let end = match routing.queue_location {
        QueueLocation::Origin => detail.transfer.origin.as_ref(),
        QueueLocation::Destination => detail.transfer.destination.as_ref(),
    };
    let queue = end.and_then(|location: &LocationRecord| {
        let site = location.site.as_ref()?;
        Some(queue_name(
            routing.queue_prefix,
            &site.short_name,
            &location.name,
        ))
    });
    let queue = queue.map_or_else(
        || "a queue".into(),
        |queue| display::clean(&queue).into_owned(),
    );
    Explanation {
        why: format!(
            "{}; {}",
            scheduled_since(detail, &queue, now),
            lost_message(detail, routing, now)
        ),
        next: vec![
            format!("if no worker listens: `ccat-transfer worker -Q {queue}`"),
            format!(
                "to send another message now: `ccat-transfer transfers retry {id}`; a second message does no harm"
            ),
        ],
    }
}

/// Time since which a transfer is SCHEDULED. Its message may be in a queue or at a worker, or be lost.
fn scheduled_since(detail: &TransferDetail, queue: &str, now: DateTime<Utc>) -> String {
    let Some(record) = &detail.schedule else {
        let last = latest(detail).map_or_else(String::new, |time| {
            format!(", and nothing is recorded since {}", display::second(time))
        });
        return format!(
            "no worker has taken it, from {queue} or elsewhere; another program set it to SCHEDULED{last}"
        );
    };
    let sent = match (&record.queue, &record.task_id) {
        (Some(queue), Some(task_id)) => format!(
            "sent to {} as task {}",
            display::clean(queue),
            display::clean(task_id)
        ),
        _ => format!("sent by another program, and expected in {queue}"),
    };
    format!(
        "SCHEDULED since {}, {}: {sent}; no worker has taken it yet",
        display::second(record.scheduled_at),
        display::age(now - record.scheduled_at)
    )
}

/// Explanation of the next step if the message of the transfer is lost.
fn lost_message(detail: &TransferDetail, routing: &RoutingInfo<'_>, now: DateTime<Utc>) -> String {
    if routing.reconcile_after.is_zero() {
        return "a lost message is not noticed (manager.reconcile_after is 0s)".into();
    }
    let Some(record) = &detail.schedule else {
        return "a manager's next pass begins to watch it".into();
    };
    let delay = search_delay(routing.reconcile_after, record.resent);
    let due = clock::after(record.scheduled_at, delay);
    let when = match due > now {
        true => format!("from {} on", display::second(due)),
        false => "in each pass now".into(),
    };
    let so_far = match record.resent {
        0 => String::new(),
        1 => ", as once before".into(),
        n => format!(", as {n} times before"),
    };
    format!("a manager looks for its message {when} and sends it again if it is lost{so_far}")
}

fn in_progress(detail: &TransferDetail, observer: &Owner, now: DateTime<Utc>) -> Explanation {
    let id = detail.transfer.id;
    let Some(lease) = &detail.lease else {
        return Explanation {
            why: "it has no lease, so no worker of this program runs it".into(),
            next: vec![
                "check whether a Python worker runs it".into(),
                format!("if none does: `ccat-transfer transfers retry {id} --untracked`"),
            ],
        };
    };
    let holder = display::clean(&lease.owner.node).into_owned();
    if let Some(expiry_reason) = lease.expiry_reason(now, observer) {
        return Explanation {
            why: format!(
                "{holder} held its lease, but {expiry_reason}; the next pass of a manager makes it PENDING"
            ),
            next: vec!["if no manager runs: `ccat-transfer manager --once`".into()],
        };
    }
    Explanation {
        why: format!(
            "{holder} has its lease until {}, and renews it while it works",
            display::second(lease.expires_at)
        ),
        next: vec![
            format!("to watch it: `ccat-transfer transfers watch {id}`"),
            format!("to stop it: `ccat-transfer transfers cancel {id} --reason TEXT`"),
        ],
    }
}

fn completed(detail: &TransferDetail) -> Explanation {
    let digest = detail
        .attempts
        .iter()
        .rev()
        .find_map(|attempt| attempt.digest.as_deref());
    Explanation {
        why: digest.map_or_else(
            || "done".into(),
            |digest| format!("done: both ends have {}", display::clean(digest)),
        ),
        next: Vec::new(),
    }
}

fn failed(detail: &TransferDetail) -> Explanation {
    let id = detail.transfer.id;
    let message = detail.transfer.failure_error_message.as_deref();
    let why = message.map_or_else(
        || "given up, and its row does not say why".into(),
        |message| format!("given up: {}", display::clean(message)),
    );
    let last = detail.attempts.last();
    let code = last
        .filter(|attempt| attempt.outcome == Some(Outcome::Failed))
        .and_then(|attempt| attempt.error_code.as_deref());
    let mut next: Vec<String> = code
        .and_then(advice::remedy_of_code)
        .map(Into::into)
        .into_iter()
        .collect();
    if last.is_some_and(|attempt| attempt.log_path.is_some()) {
        next.push(format!("bbcp's output: `ccat-transfer transfers log {id}`"));
    }
    next.push(format!(
        "to try it again: `ccat-transfer transfers retry {id}`"
    ));
    Explanation { why, next }
}

/// Returns the kind of row that the transfer refers to but that does not exist.
fn missing(detail: &TransferDetail) -> Option<&'static str> {
    let transfer = &detail.transfer;
    let parts = [
        ("a package", transfer.package.is_some()),
        ("an origin", transfer.origin.is_some()),
        ("a destination", transfer.destination.is_some()),
    ];
    parts
        .into_iter()
        .find(|(_, is_there)| !is_there)
        .map(|(part, _)| part)
}

/// Time of the last recorded event of the transfer.
fn latest(detail: &TransferDetail) -> Option<DateTime<Utc>> {
    let attempt = detail.attempts.last();
    let times = [
        detail.transfer.created_at,
        detail.transfer.start_time,
        attempt.and_then(|attempt| attempt.ended_at),
        detail.actions.last().map(|action| action.acted_at),
    ];
    times.into_iter().flatten().max()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use chrono::TimeDelta;
    use entity::{Label, LocationType, StorageType};
    use rstest::rstest;

    use super::*;
    use crate::transfer::id::{AttemptNumber, TransferId};
    use crate::transfer::lease::LeaseInfo;
    use crate::transfer::link::{LinkName, Pause};
    use crate::transfer::repository::{
        AttemptRecord, PackageRecord, ScheduleRecord, SiteRecord, TransferRecord,
    };

    const WAY: RoutingInfo<'_> = RoutingInfo {
        queue_location: QueueLocation::Destination,
        queue_prefix: "test.",
        sleep_time: Duration::from_secs(60),
        reconcile_after: Duration::from_secs(300),
        link: None,
    };

    fn location(id: i64, site: &str) -> LocationRecord {
        LocationRecord {
            id,
            name: "buffer".into(),
            location_type: Label::Known(LocationType::Buffer),
            storage_type: Label::Known(StorageType::Disk),
            priority: None,
            active: true,
            site: Some(SiteRecord {
                id,
                name: site.into(),
                short_name: site.into(),
            }),
            disk: None,
        }
    }

    fn detail(status: Status) -> TransferDetail {
        TransferDetail {
            bytes_verified: None,
            transfer: TransferRecord {
                id: TransferId::new(7),
                status: Label::Known(status),
                retry_count: 0,
                start_time: None,
                end_time: None,
                created_at: None,
                failure_error_message: None,
                package: Some(PackageRecord {
                    id: 1,
                    file_name: "a.tar".into(),
                    relative_path: "a.tar".into(),
                    size_bytes: None,
                    checksum: None,
                }),
                origin: Some(location(1, "ccat")),
                destination: Some(location(2, "cologne")),
                route: None,
            },
            lease: None,
            schedule: None,
            not_before: None,
            waits_for: None,
            competing_lease: None,
            attempts: Vec::new(),
            actions: Vec::new(),
        }
    }

    fn lease(id: i64, expires_at: DateTime<Utc>) -> LeaseInfo {
        LeaseInfo {
            data_transfer_id: id.into(),
            attempt: AttemptNumber::new(1),
            task_id: "t".into(),
            owner: Owner {
                node: "celery@far".into(),
                host: "far".into(),
                pid: 1,
                pid_scope: String::new(),
                started: String::new(),
            },
            acquired_at: expires_at,
            renewed_at: expires_at,
            expires_at,
            bytes_done: 0,
            bytes_total: None,
            rate_bytes_per_s: 0,
            phase: None,
            streams: None,
        }
    }

    fn said(detail: &TransferDetail, now: DateTime<Utc>) -> String {
        let Explanation { why, next } = Explanation::of(detail, &WAY, &Owner::current("me"), now);
        format!("{why} | {}", next.join(" | "))
    }

    #[rstest]
    #[case(Status::Pending, "due: a manager's next pass sends it, one every 1m")]
    #[case(
        Status::Scheduled,
        "no worker has taken it, from test.cologne_buffer_data_transfer or elsewhere; another program set it \
         to SCHEDULED; a manager's next pass begins to watch it"
    )]
    #[case(Status::InProgress, "transfers retry 7 --untracked")]
    #[case(Status::Completed, "done |")]
    #[case(
        Status::Failed,
        "its row does not say why | to try it again: `ccat-transfer transfers retry 7`"
    )]
    fn each_state_has_an_explanation(#[case] status: Status, #[case] expected: &str) {
        let said = said(&detail(status), crate::clock::now());
        assert!(said.contains(expected), "{said}");
    }

    #[test]
    fn scheduled_transfer_shows_its_time_and_next_step() {
        let now = crate::clock::now();
        let mut detail = detail(Status::Scheduled);
        detail.schedule = Some(ScheduleRecord {
            data_transfer_id: TransferId::new(7),
            scheduled_at: now - TimeDelta::minutes(2),
            queue: Some("q".into()),
            task_id: Some("abc".into()),
            resent: 0,
        });
        let why = said(&detail, now);
        assert!(why.contains("sent to q as task abc; no worker"), "{why}");
        assert!(why.contains("looks for its message from 2"), "{why}");
        detail.schedule.as_mut().unwrap().resent = 3;
        detail.schedule.as_mut().unwrap().scheduled_at = now - TimeDelta::hours(1);
        let why = said(&detail, now);
        assert!(
            why.contains("in each pass now and sends it again if it is lost, as 3 times before"),
            "{why}"
        );
    }

    #[test]
    fn a_due_transfer_may_wait_for_its_link() {
        let name = LinkName {
            origin: "ccat".into(),
            destination: "cologne".into(),
        };
        let mut link = Link {
            max_active: Some(2),
            ..Link::unlimited(name)
        };
        let said = |link: &Link, under_way| {
            let routing = RoutingInfo {
                link: Some((link.clone(), under_way)),
                ..WAY
            };
            let detail = detail(Status::Pending);
            Explanation::of(
                &detail,
                &routing,
                &Owner::current("me"),
                crate::clock::now(),
            )
            .why
        };
        assert!(said(&link, 1).starts_with("due"));
        assert!(said(&link, 2).contains("ccat → cologne has 2 under way, of 2 at most"));
        link.max_active = Some(0);
        assert!(said(&link, 0).contains("no copies now"));
        link.pause = Some(Pause {
            since: crate::clock::now(),
            by: "me@here".into(),
            reason: "observing".into(),
            stops_running: false,
        });
        assert!(
            said(&link, 0).contains("paused since")
                && said(&link, 0).contains("by me@here: observing")
        );
        let routing = RoutingInfo {
            link: Some((link, 0)),
            ..WAY
        };
        let now = crate::clock::now();
        let mut delayed = detail(Status::Pending);
        delayed.not_before = Some(now + TimeDelta::minutes(12));
        let both = Explanation::of(&delayed, &routing, &Owner::current("me"), now);
        assert!(both.why.starts_with("waits until ") && both.why.contains("; then its link"));
        assert!(both.next.iter().any(|next| next.contains("links resume")));
        assert!(!both.next.iter().any(|next| next.contains("retry")));
    }

    #[test]
    fn a_wait_has_its_end_its_cause_and_its_remedy() {
        let now = crate::clock::now();
        let mut detail = detail(Status::Pending);
        detail.not_before = Some(now + TimeDelta::minutes(12));
        detail.waits_for = Some("destination_busy".into());
        detail.competing_lease = Some(lease(9, now));
        let said = said(&detail, now);
        assert!(said.contains("in 12m, after destination_busy; transfer 9 is copied to the same path by celery@far"), "{said}");
        assert!(said.contains("After that transfer this one"), "{said}");
        assert!(said.contains("transfers retry 7"), "{said}");
    }

    #[test]
    fn a_lease_is_alive_or_dead() {
        let now = crate::clock::now();
        let mut detail = detail(Status::InProgress);
        detail.lease = Some(lease(7, now + TimeDelta::minutes(1)));
        assert!(said(&detail, now).contains("transfers cancel 7"));
        detail.lease = Some(lease(7, now - TimeDelta::minutes(1)));
        let said = said(&detail, now);
        assert!(
            said.contains("not renewed in time") && said.contains("manager --once"),
            "{said}"
        );
    }

    #[test]
    fn incomplete_row_needs_an_operator() {
        let mut detail = detail(Status::Pending);
        detail.transfer.package = None;
        let said = said(&detail, crate::clock::now());
        assert!(
            said.contains("a package, which does not exist") && said.contains("transfers fail 7"),
            "{said}"
        );
    }

    #[test]
    fn a_failure_has_the_remedy_of_its_last_attempt_only() {
        let mut detail = detail(Status::Failed);
        let attempt = |outcome, error_code: Option<&str>| AttemptRecord {
            attempt: AttemptNumber::new(1),
            task_id: "t".into(),
            worker: "celery@far".into(),
            started_at: crate::clock::now(),
            ended_at: None,
            outcome: Some(outcome),
            error_code: error_code.map(Into::into),
            message: None,
            bytes: None,
            rate_bytes_per_s: None,
            digest: None,
            log_path: Some("/log".into()),
            temporary_name: None,
        };
        detail.attempts = vec![attempt(Outcome::Failed, Some("ssh_denied"))];
        let text = said(&detail, crate::clock::now());
        assert!(
            text.contains("`ssh.user`") && text.contains("transfers log 7"),
            "{text}"
        );
        // An operator cancelled it: an earlier failure does not explain that.
        detail.attempts.push(attempt(Outcome::Interrupted, None));
        let text = said(&detail, crate::clock::now());
        assert!(!text.contains("ssh.user"), "{text}");
    }
}
