//! Links: pauses, limits and their traffic.

use std::sync::Arc;

use ccat_transfer::settings::EnumLabels;
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::lease::Snapshot;
use ccat_transfer::transfer::link::{Capacity, ClosedLink, FullLink, LinkName, Pause};
use ccat_transfer::transfer::repository::{
    Acquisition, Allowance, Candidate, LinkChange, LinkError, Renewal, Repository, Traffic,
};

use crate::ops_db::{Fixture, TTL, dead, me};
use crate::transfer_rows::{confirmed, finished, scheduled, wanted};

crate::on_both_databases!(
    concurrent_managers_respect_a_limit,
    nothing_is_sent_over_a_link_paused_meanwhile,
    a_message_of_a_paused_link_puts_its_row_back,
    a_message_of_a_full_link_puts_its_row_back,
    concurrent_workers_respect_a_limit,
    a_renewal_reports_a_pause_that_stops_copies,
    each_setting_of_a_link_is_changed_separately,
    traffic_is_counted_by_link,
    a_database_without_links_works_as_before,
);

fn link() -> LinkName {
    LinkName {
        origin: "ccat".into(),
        destination: "cologne".into(),
    }
}

async fn pause(db: &Fixture, by: &str, stops_running: bool) -> Pause {
    let name = link();
    let pausing = db.repository.pause_link(&name, by, "storm", stops_running);
    pausing.await.unwrap().pause.unwrap()
}

async fn limit(db: &Fixture, max_active: u32) {
    let change = LinkChange {
        max_active: Some(Some(max_active)),
        ..LinkChange::default()
    };
    db.repository.set_link(&link(), &change).await.unwrap();
}

/// Allowance of the link, as read by a manager.
async fn allowance(db: &Fixture, free: u64) -> Arc<Allowance> {
    let issued = db.repository.link(&link()).await.unwrap().issued;
    Arc::new(Allowance {
        link: link(),
        free,
        issued,
    })
}

async fn concurrent_managers_respect_a_limit(db: Fixture) {
    limit(&db, 5).await;
    let mut ids = Vec::new();
    for _ in 0..24 {
        ids.push(db.transfer().await);
    }
    // All have counted before the first of them schedules.
    let allowance = allowance(&db, 5).await;
    let managers: Vec<_> = ids
        .chunks(4)
        .map(|ids| {
            let repository = db.repository.clone();
            let candidate = |id: &TransferId| Candidate {
                id: *id,
                queue: "q".into(),
                allowance: Some(allowance.clone()),
            };
            let candidates: Vec<_> = ids.iter().map(candidate).collect();
            tokio::spawn(async move { repository.schedule(&candidates, confirmed).await.unwrap() })
        })
        .collect();
    let (mut sent, mut held_back) = (0, 0);
    for manager in managers {
        let batch = manager.await.unwrap();
        sent += batch.scheduled.len();
        held_back += batch.held_back.len();
    }
    assert_eq!((sent, held_back), (5, 19));
    assert_eq!(db.repository.link(&link()).await.unwrap().issued, 5);
}

async fn nothing_is_sent_over_a_link_paused_meanwhile(db: Fixture) {
    limit(&db, 5).await;
    let id = db.transfer().await;
    let candidates = [Candidate {
        id,
        queue: "q".into(),
        allowance: Some(allowance(&db, 5).await),
    }];
    pause(&db, "me@here", false).await;
    let batch = db
        .repository
        .schedule(&candidates, confirmed)
        .await
        .unwrap();
    assert_eq!(batch.held_back, [id]);
    assert_eq!(db.status(id).await, "PENDING");
}

async fn a_message_of_a_paused_link_puts_its_row_back(db: Fixture) {
    let [id, other] = [db.transfer().await, db.transfer().await];
    db.set_status(id, "SCHEDULED").await;
    let pause_of_link = pause(&db, "me@here", false).await;
    for _ in 0..2 {
        match db.repository.acquire(id, &me(), "t", TTL).await.unwrap() {
            Acquisition::LinkClosed(ClosedLink::Paused(paused)) => {
                assert_eq!((paused.name, paused.pause), (link(), pause_of_link.clone()));
            }
            answer => panic!("{answer:?}"),
        }
        assert_eq!(db.status(id).await, "PENDING");
    }
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
    assert_eq!(db.leases().await, "0");
    db.repository.resume_link(&link()).await.unwrap();
    db.acquire(id).await;

    // A paused link also prevents the takeover of a dead worker's lease.
    db.acquire_as(other, &dead()).await;
    pause(&db, "me@here", false).await;
    let answer = db.repository.acquire(other, &me(), "t", TTL).await.unwrap();
    let closed = matches!(answer, Acquisition::LinkClosed(ClosedLink::Paused(_)));
    assert!(closed, "{answer:?}");
    assert_eq!(db.status(other).await, "PENDING");
    assert_eq!(db.leases().await, "1");
}

/// The limit was higher at the time of sending.
async fn a_message_of_a_full_link_puts_its_row_back(db: Fixture) {
    let [running, left, id] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    let lease = db.acquire(running).await.lease;
    db.set_status(id, "SCHEDULED").await;
    limit(&db, 1).await;
    let full = FullLink {
        name: link(),
        limit: 1,
        copies: 1,
    };
    match db.repository.acquire(id, &me(), "t", TTL).await.unwrap() {
        Acquisition::LinkClosed(closed) => assert_eq!(closed, ClosedLink::Full(full)),
        answer => panic!("{answer:?}"),
    }
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
    assert_eq!(db.leases().await, "1");

    // Transfers of another link do not count, and neither does a dead worker's lease on this transfer.
    db.repository.complete(&lease, &finished()).await.unwrap();
    let back = LinkName {
        origin: link().destination,
        destination: link().origin,
    };
    let change = LinkChange {
        max_active: Some(Some(0)),
        ..LinkChange::default()
    };
    db.repository.set_link(&back, &change).await.unwrap();
    db.acquire_as(left, &dead()).await;
    db.acquire(left).await;

    // An acquisition by hand may exceed the limit, but a pause prevents it.
    let me = me();
    let by_hand = || db.repository.acquire_by_hand(id, &me, "t", TTL);
    pause(&db, "me@here", false).await;
    let answer = by_hand().await.unwrap();
    let closed = matches!(answer, Acquisition::LinkClosed(ClosedLink::Paused(_)));
    assert!(closed, "{answer:?}");
    db.repository.resume_link(&link()).await.unwrap();
    let answer = by_hand().await.unwrap();
    assert!(matches!(answer, Acquisition::Acquired(_)), "{answer:?}");
}

async fn concurrent_workers_respect_a_limit(db: Fixture) {
    limit(&db, 3).await;
    let mut workers = Vec::new();
    for _ in 0..10 {
        let id = db.transfer().await;
        db.set_status(id, "SCHEDULED").await;
        let repository = db.repository.clone();
        workers.push(async move { repository.acquire(id, &me(), "t", TTL).await.unwrap() });
    }
    let answers: Vec<_> = workers.into_iter().map(tokio::spawn).collect();
    let mut begun = 0;
    for answer in answers {
        match answer.await.unwrap() {
            Acquisition::Acquired(_) => begun += 1,
            Acquisition::LinkClosed(ClosedLink::Full(full)) => assert_eq!(full.copies, 3),
            answer => panic!("{answer:?}"),
        }
    }
    assert_eq!(begun, 3);
    assert_eq!(db.leases().await, "3");
}

async fn a_renewal_reports_a_pause_that_stops_copies(db: Fixture) {
    let id = db.transfer().await;
    let lease = db.acquire(id).await.lease;
    let renew = async || {
        let seen = Snapshot::default();
        db.repository.renew(&lease, seen).await.unwrap()
    };
    assert_eq!(renew().await, Renewal::Continue);
    pause(&db, "me@here", false).await;
    assert_eq!(renew().await, Renewal::Continue, "running copies continue");
    pause(&db, "you@here", true).await;
    match renew().await {
        Renewal::Stop(paused) => assert_eq!(paused.pause.by, "you@here"),
        answer => panic!("{answer:?}"),
    }
    let release = db.repository.release(&lease, "paused");
    release.await.unwrap();
    assert_eq!(db.status(id).await, "PENDING");
    assert_eq!(db.repository.get_retry_count(id).await.unwrap(), Some(0));
}

async fn each_setting_of_a_link_is_changed_separately(db: Fixture) {
    assert_eq!(db.repository.links().await.unwrap(), []);
    let unlimited = db.repository.link(&link()).await.unwrap();
    assert_eq!((unlimited.max_active, unlimited.pause), (None, None));
    limit(&db, 4).await;
    let windows = "18:00-06:00 UTC max_active=1\n12:00-13:00 UTC max_active=0";
    let change = LinkChange {
        priority: Some(-3),
        capacity: Some(Capacity::stored(windows)),
        streams: Some(Some(8)),
        tcp_window: Some(Some("4m".into())),
        max_rate: Some(Some("100m".into())),
        ..LinkChange::default()
    };
    let changed = db.repository.set_link(&link(), &change).await.unwrap();
    assert_eq!((changed.max_active, changed.priority), (Some(4), -3));
    assert_eq!(changed.capacity.lines().join("\n"), windows);
    let change = LinkChange {
        max_active: Some(None),
        streams: Some(None),
        ..LinkChange::default()
    };
    let changed = db.repository.set_link(&link(), &change).await.unwrap();
    assert_eq!(
        (changed.max_active, changed.overrides.streams),
        (None, None)
    );
    assert_eq!(changed.overrides.max_rate.as_deref(), Some("100m"));
    assert_eq!(db.repository.links().await.unwrap(), [changed]);

    let refused = db.repository.resume_link(&link()).await;
    assert!(matches!(refused, Err(LinkError::NotPaused(_))));
    let pause = async |reason, now| {
        let name = link();
        let pausing = db.repository.pause_link(&name, "me@here", reason, now);
        pausing.await
    };
    let paused = pause("storm", false).await.unwrap();
    assert_eq!(paused.pause.as_ref().unwrap().reason, "storm");
    match pause("again", false).await {
        Err(LinkError::Paused { pause, .. }) => assert_eq!(pause.reason, "storm"),
        answer => panic!("{answer:?}"),
    }
    // The pause can be changed to a stricter one.
    assert!(
        pause("now", true)
            .await
            .unwrap()
            .pause
            .unwrap()
            .stops_running
    );
    assert!(pause("later", false).await.is_err());
    let open = db.repository.resume_link(&link()).await.unwrap();
    assert_eq!((open.pause, open.priority), (None, -3));
}

async fn traffic_is_counted_by_link(db: Fixture) {
    assert!(db.repository.traffic().await.unwrap().is_empty());
    let mut ids = Vec::new();
    for status in ["COMPLETED", "PENDING", "PENDING", "SCHEDULED", "FAILED"] {
        let id = db.transfer().await;
        db.set_status(id, status).await;
        ids.push(id);
    }
    let running = db.transfer().await;
    db.acquire(running).await;
    let traffic = db.repository.traffic().await.unwrap();
    let pending_since = traffic
        .get(&link())
        .and_then(|traffic| traffic.pending_since);
    let age = db.database.now().await.unwrap() - pending_since.unwrap();
    assert!((-1..60).contains(&age.num_seconds()), "{age}");
    let expected = Traffic {
        active: 1,
        scheduled: 1,
        pending: 2,
        oldest_pending: Some(ids[1]),
        pending_since,
    };
    assert_eq!(
        traffic.into_iter().collect::<Vec<_>>(),
        [(link(), expected)]
    );
    let routed = db.repository.routed_links().await.unwrap();
    assert_eq!(
        routed.into_iter().map(|l| l.name).collect::<Vec<_>>(),
        [link()]
    );
}

/// A database of an earlier release, without tables for links.
async fn a_database_without_links_works_as_before(db: Fixture) {
    let id = db.transfer().await;
    db.sql("DROP TABLE transfer_worker_link").await;
    let repository = Repository::open(db.database.clone(), EnumLabels::Names)
        .await
        .unwrap();
    assert!(!repository.has_links());
    assert_eq!(repository.links().await.unwrap(), []);
    assert_eq!(repository.link(&link()).await.unwrap().max_active, None);
    let name = link();
    let refused = repository.pause_link(&name, "me@here", "storm", true);
    assert!(matches!(refused.await, Err(LinkError::NoTable)));
    let batch = repository.schedule(&[wanted(id)], confirmed).await.unwrap();
    assert_eq!(batch, scheduled(&[id]));
    let lease = match repository.acquire(id, &me(), "t", TTL).await.unwrap() {
        Acquisition::Acquired(acquired) => acquired.lease,
        answer => panic!("{answer:?}"),
    };
    let renewal = repository.renew(&lease, Snapshot::default()).await.unwrap();
    assert_eq!(renewal, Renewal::Continue);
    repository.complete(&lease, &finished()).await.unwrap();
}
