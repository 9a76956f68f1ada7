//! All pages with hostile values.

use super::super::model::*;
use super::*;
use crate::explanation::Explanation;
use crate::transfer::id::AttemptNumber;
use crate::transfer::lease::{LeaseInfo, Owner};
use crate::transfer::link::{LinkName, Pause};
use crate::transfer::repository::{
    ActionRecord, AttemptRecord, DiskRecord, LocationRecord, PackageRecord, SiteRecord,
    TransferDetail, TransferEnd, TransferRecord, TransferSummary,
};
use axum::body::to_bytes;
use chrono::{DateTime, TimeDelta, Utc};
use entity::{Action, Label, LocationType, Outcome, Status, StorageType};
use regex::Regex;

/// A text that would add an element, leave an attribute, or be displayed as another text.
const HOSTILE: &str = "<img src=x onerror=alert(1)>\"'&`\u{202e}\u{1b}[2J\r\n";
const BASE: &str = "/under/this";

fn hostile() -> String {
    HOSTILE.to_owned()
}

fn at() -> DateTime<Utc> {
    "2026-12-01T05:07:09Z".parse().unwrap()
}

fn link_name() -> LinkName {
    LinkName {
        origin: hostile(),
        destination: hostile(),
    }
}

fn problem(kind: ProblemKind, requires_action: bool) -> ProblemGroup {
    ProblemGroup {
        kind,
        requires_action,
        error_code: Some(hostile()),
        title: hostile(),
        remedy: hostile(),
        command: Some(hostile()),
        count: 30,
        transfers: vec![Problem {
            id: 7.into(),
            file_name: Some(hostile()),
            link: Some(link_name()),
            message: Some(hostile()),
            since: Some(at()),
            retry_count: 1,
            next_attempt_at: Some(at()),
        }],
    }
}

fn overview_data() -> Overview {
    let running = RunningTransfer {
        id: 7.into(),
        file_name: Some(hostile()),
        origin: Some(hostile()),
        destination: None,
        link: Some(link_name()),
        attempt: AttemptNumber::new(2),
        phase: Some(hostile()),
        bytes_done: 3 << 30,
        bytes_total: Some(4 << 30),
        percent: Some(75),
        bytes_per_second: 30 << 20,
        remaining_s: Some(34),
        ends_at: Some(at()),
        worker: hostile(),
        started_at: at(),
        renewed_at: at(),
        is_overdue: true,
    };
    let link = LinkState {
        origin: hostile(),
        destination: hostile(),
        active: 1,
        limit: Some(2),
        scheduled: 1,
        waiting: 3,
        oldest_waiting: Some(8.into()),
        waiting_since: Some(at()),
        bytes_per_second: 1,
        bytes_per_second_24h: 1,
        packages_24h: 1,
        bytes_24h: 1,
        failures_24h: 1,
        pause: Some(Pause {
            since: at(),
            by: hostile(),
            reason: hostile(),
            stops_running: true,
        }),
        closed_until: Some(at()),
    };
    let program = ProgramState {
        name: hostile(),
        kind: hostile(),
        host: hostile(),
        version: hostile(),
        started_at: at(),
        seen_at: at(),
        ended_at: None,
        state: ProgramCondition::Lost,
        running_transfers: 1,
    };
    Overview {
        at: Some(at()),
        unreachable: Some(Unreachable {
            since: at(),
            error: hostile(),
        }),
        verdict: Verdict {
            level: Level::Action,
            text: hostile(),
        },
        counts: Some(Counts {
            at: at(),
            pending: 1,
            scheduled: 2,
            in_progress: 3,
            completed: 4,
            failed: 5,
        }),
        running: vec![running],
        links: vec![link],
        problems: vec![
            problem(ProblemKind::Failed, true),
            problem(ProblemKind::Delayed, false),
        ],
        programs: Some(vec![program]),
        last_24h: Vec::new(),
    }
}

fn throughput(period: Period) -> Throughput {
    let since = at() - TimeDelta::from_std(period.length()).unwrap();
    let bucket = Bucket {
        start: since,
        packages: 1,
        bytes: 5 << 30,
        failures: 2,
    };
    Throughput {
        period,
        since,
        until: at(),
        bucket_s: period.bucket().as_secs(),
        links: vec![LinkThroughput {
            origin: hostile(),
            destination: hostile(),
            buckets: vec![bucket],
        }],
    }
}

fn location() -> LocationRecord {
    LocationRecord {
        id: 1,
        name: hostile(),
        location_type: Label::Known(LocationType::Buffer),
        storage_type: Label::Known(StorageType::Disk),
        priority: None,
        active: true,
        site: Some(SiteRecord {
            id: 1,
            name: hostile(),
            short_name: hostile(),
        }),
        disk: Some(DiskRecord {
            host: Some(hostile()),
            path: hostile(),
        }),
    }
}

fn lease() -> LeaseInfo {
    LeaseInfo {
        data_transfer_id: 7.into(),
        attempt: AttemptNumber::new(2),
        task_id: hostile(),
        owner: Owner {
            node: hostile(),
            host: hostile(),
            pid: 1,
            pid_scope: String::new(),
            started: String::new(),
        },
        acquired_at: at(),
        renewed_at: at(),
        expires_at: at(),
        bytes_done: 1 << 30,
        bytes_total: Some(2 << 30),
        rate_bytes_per_s: 0,
        phase: Some(hostile()),
        streams: Some(8),
    }
}

fn transfer_data(status: Label<Status>) -> Transfer {
    let attempt = |number, outcome| AttemptRecord {
        attempt: AttemptNumber::new(number),
        task_id: hostile(),
        worker: hostile(),
        started_at: at(),
        ended_at: Some(at()),
        outcome,
        error_code: Some(hostile()),
        message: Some(hostile()),
        bytes: Some(1),
        rate_bytes_per_s: Some(1),
        digest: Some(hostile()),
        log_path: Some(hostile()),
        temporary_name: Some(hostile()),
    };
    let detail = TransferDetail {
        transfer: TransferRecord {
            id: 7.into(),
            status,
            retry_count: 1,
            start_time: Some(at()),
            end_time: Some(at()),
            created_at: Some(at()),
            failure_error_message: Some(hostile()),
            package: Some(PackageRecord {
                id: 1,
                file_name: hostile(),
                relative_path: hostile(),
                size_bytes: Some(2 << 30),
                checksum: None,
            }),
            origin: Some(location()),
            destination: Some(location()),
            route: None,
        },
        lease: Some(lease()),
        bytes_verified: Some(1),
        schedule: None,
        not_before: Some(at()),
        waits_for: None,
        competing_lease: None,
        attempts: vec![attempt(1, Some(Outcome::Retried)), attempt(2, None)],
        actions: vec![ActionRecord {
            acted_at: at(),
            action: Action::Retry,
            operator: hostile(),
            reason: Some(hostile()),
            previous_status: hostile(),
        }],
    };
    Transfer {
        at: at(),
        detail,
        explanation: Explanation {
            why: hostile(),
            next: vec![hostile()],
        },
        log: Some(LogTail {
            attempt: AttemptNumber::new(1),
            path: hostile(),
            lines: vec![hostile()],
            is_complete: false,
        }),
    }
}

fn found() -> Transfers {
    let end = || {
        Some(TransferEnd {
            site: hostile(),
            location: hostile(),
        })
    };
    let summary = |status, lease| TransferSummary {
        id: 7.into(),
        status,
        retry_count: 1,
        changed_at: Some(at()),
        origin: end(),
        destination: end(),
        file_name: Some(hostile()),
        size_bytes: Some(1),
        failure_error_message: Some(hostile()),
        error_code: Some(hostile()),
        lease,
        not_before: Some(at()),
        schedule: None,
    };
    Transfers {
        transfers: vec![
            summary(Label::Known(Status::InProgress), Some(lease())),
            summary(Label::Unknown(hostile()), None),
        ],
        next_cursor: Some(hostile()),
        searched_to: None,
    }
}

async fn html(response: Response) -> String {
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    String::from_utf8(body.to_vec()).unwrap()
}

async fn pages() -> Vec<String> {
    let data = overview_data();
    let sections = Sections::render(BASE, &data).unwrap();
    let periods = Period::ALL.map(throughput);
    let form = SearchForm::parse("status=failed&package=%3Cimg%20onerror%3E%22&since=");
    let responses = [
        overview::render(BASE, &data, &sections, Some(&periods[0])),
        link::render(BASE, &link_name(), &data, &periods),
        transfer::render(BASE, &transfer_data(Label::Known(Status::InProgress))),
        transfer::render(BASE, &transfer_data(Label::Unknown(hostile()))),
        transfers::render(BASE, &form, Ok(&found())),
        transfers::render(BASE, &form, Err(&WebError::BadRequest(hostile()))),
        error(BASE, StatusCode::NOT_FOUND, HOSTILE),
    ];
    let mut pages = Vec::new();
    for response in responses {
        pages.push(html(response).await);
    }
    pages
}

#[tokio::test]
async fn hostile_texts_stay_texts() {
    let tag =
        Regex::new(r#"<[a-z][a-z0-9]*((?:\s+[a-zA-Z0-9:-]+(?:="[^"<>]*")?)*)\s*/?>"#).unwrap();
    let value = Regex::new(r#"="[^"]*""#).unwrap();
    for page in pages().await {
        assert!(page.contains("&#60;img src=x onerror"), "{page}");
        assert!(!page.contains(|c: char| c.is_control() && c != '\n'));
        assert!(!page.contains('\u{202e}'));
        // What begins like a tag is a complete tag of the templates.
        for (start, _) in page.match_indices('<') {
            let rest = &page[start..];
            if rest.starts_with("</") || rest.starts_with("<!DOCTYPE html>") {
                continue;
            }
            let found = tag.find(rest).filter(|found| found.start() == 0);
            let found = found.unwrap_or_else(|| panic!("{}", &rest[..rest.len().min(200)]));
            assert!(!found.as_str().starts_with("<img"));
            let names = value.replace_all(found.as_str(), "");
            assert!(!names.contains(" on"), "{}", found.as_str());
        }
    }
}

#[tokio::test]
async fn pages_obey_the_content_security_policy() {
    let address = Regex::new(r#"(?:href|src|action|data-events)="([^"]*)""#).unwrap();
    for page in pages().await {
        assert!(
            !page.contains(" style=") && !page.contains("<style"),
            "{page}"
        );
        assert_eq!(page.matches("<script").count(), 1, "{page}");
        for found in address.captures_iter(&page) {
            let address = &found[1];
            let is_local = address.starts_with(&format!("{BASE}/"))
                || address.starts_with('#')
                || address == "data:,";
            assert!(is_local, "{address}");
        }
    }
}

#[tokio::test]
async fn ids_in_a_page_are_unique() {
    let id = Regex::new(r#" id="([^"]*)""#).unwrap();
    for page in pages().await {
        let mut ids: Vec<_> = id
            .captures_iter(&page)
            .map(|found| found[1].to_owned())
            .collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count, "{ids:?}");
    }
}

#[tokio::test]
async fn the_next_page_is_the_same_search() {
    let form = SearchForm::parse("status=FAILED&status=PENDING&package=a%26b&since=&cursor=1");
    let mut found = found();
    found.next_cursor = Some("9".to_owned());
    let page = html(transfers::render(BASE, &form, Ok(&found))).await;
    let next = "transfers?status=FAILED&#38;status=PENDING&#38;package=a%26b&#38;cursor=9";
    assert!(page.contains(next), "{page}");
    assert_eq!(page.matches(" checked").count(), 2, "{page}");
}

#[tokio::test]
async fn nothing_is_said_of_a_database_that_was_not_read() {
    let unread = Overview {
        at: None,
        counts: None,
        running: Vec::new(),
        links: Vec::new(),
        problems: Vec::new(),
        programs: None,
        last_24h: Vec::new(),
        ..overview_data()
    };
    let sections = Sections::render(BASE, &unread).unwrap();
    let page = html(overview::render(BASE, &unread, &sections, None)).await;
    assert_eq!(page.matches("<p>Not known: ").count(), 6, "{page}");
    for wrong in [
        "Nothing:",
        "No copy",
        "no link",
        "No package",
        "no table",
        "being counted",
    ] {
        assert!(!page.contains(wrong), "{wrong}");
    }
}
