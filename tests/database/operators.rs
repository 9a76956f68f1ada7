//! Lists of transfers, and the actions of an operator on them.

use std::time::Duration;

use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::repository::{
    Acquisition, Applicability, Change, Filter, Instruction, ListError, Listing, Refusal, Sort,
};
use entity::{Action, Label, Outcome, Status};

use crate::on_both_databases;
use crate::ops_db::{Fixture, TTL, me, stranger};
use crate::transfer_rows::{assert_powerless, copying, delayed, due, failure, finished, is_lost};
use ccat_transfer::transfer::lease::{Lease, Progress};

on_both_databases!(
    allowed_actions_depend_on_the_state,
    a_retried_transfer_starts_over,
    a_cancelled_copy_can_write_nothing,
    a_transfer_given_up_has_operator_and_reason,
    a_dry_run_changes_nothing,
    a_transfer_chosen_by_state_is_untouched_in_another,
    a_transfer_whose_worker_is_gone_is_sent_again,
    an_unknown_transfer_is_reported,
    transfers_are_filtered,
    transfers_are_ordered,
    unknown_locations_are_reported,
    competing_lease_for_a_destination_is_shown,
);

fn wants(action: Action) -> Instruction {
    Instruction {
        action,
        operator: "alice@here".into(),
        reason: Some("the wrong night".into()),
        only: Vec::new(),
        untracked: false,
    }
}

/// A transfer in each state, named by the event that led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Due,
    Waiting,
    Scheduled,
    Running,
    Expired,
    Untracked,
    Completed,
    Failed,
    Unknown,
}

impl State {
    const ALL: [Self; 9] = [
        Self::Due,
        Self::Waiting,
        Self::Scheduled,
        Self::Running,
        Self::Expired,
        Self::Untracked,
        Self::Completed,
        Self::Failed,
        Self::Unknown,
    ];

    async fn make(self, db: &Fixture) -> (TransferId, Option<Lease>) {
        let id = db.transfer().await;
        let repository = &db.repository;
        match self {
            Self::Due => {}
            Self::Scheduled => db.set_status(id, "SCHEDULED").await,
            Self::Untracked => db.set_status(id, "IN_PROGRESS").await,
            Self::Unknown if db.database.backend() == sea_orm::DbBackend::Sqlite => {
                db.set_status(id, "PAUSED").await;
            }
            // PostgreSQL's type has no such label, so a known status stands for it.
            Self::Unknown => db.set_status(id, "COMPLETED").await,
            Self::Waiting => {
                let lease = db.acquire(id).await.lease;
                repository
                    .reset_for_retry(&lease, &delayed())
                    .await
                    .unwrap();
            }
            Self::Completed => {
                let lease = db.acquire(id).await.lease;
                repository.complete(&lease, &finished()).await.unwrap();
            }
            Self::Failed => {
                let lease = db.acquire(id).await.lease;
                repository
                    .mark_permanent_failure(&lease, &failure())
                    .await
                    .unwrap();
            }
            Self::Running | Self::Expired => {
                let lease = db.acquire_as(id, &stranger()).await.lease;
                if self == Self::Expired {
                    db.expire(id).await;
                }
                return (id, Some(lease));
            }
        }
        (id, None)
    }
}

async fn allowed_actions_depend_on_the_state(db: Fixture) {
    use Action::{Cancel, Fail, Retry};
    for action in [Retry, Cancel, Fail] {
        for state in State::ALL {
            let (id, _) = state.make(&db).await;
            let before = db.everything(id).await;
            let verdict = db.repository.execute(id, &wants(action)).await.unwrap();
            let to = match (state, action) {
                (State::Due, Retry) => {
                    assert_eq!(verdict, Applicability::Unchanged);
                    None
                }
                (State::Waiting | State::Scheduled | State::Expired | State::Failed, Retry) => {
                    Some(Status::Pending)
                }
                (
                    State::Due | State::Waiting | State::Scheduled | State::Expired,
                    Cancel | Fail,
                )
                | (State::Running, Cancel) => Some(Status::Failed),
                (State::Running, Retry | Fail) => {
                    assert!(matches!(
                        verdict,
                        Applicability::Refused(Refusal::Running(_))
                    ));
                    None
                }
                (State::Untracked, _) => {
                    let refusal = Refusal::Untracked { action };
                    assert_eq!(verdict, Applicability::Refused(refusal));
                    None
                }
                (State::Completed | State::Unknown, _) => {
                    assert!(matches!(
                        verdict,
                        Applicability::Refused(Refusal::Completed | Refusal::UnknownStatus(_))
                    ));
                    None
                }
                (State::Failed, Cancel | Fail) => {
                    assert!(matches!(
                        verdict,
                        Applicability::Refused(Refusal::Failed { .. })
                    ));
                    None
                }
            };
            match to {
                Some(to) => {
                    assert!(
                        matches!(&verdict, Applicability::Changed(change) if change.to == to),
                        "{state:?} {action:?} {verdict:?}"
                    );
                    assert_eq!(db.status(id).await, to.to_string());
                }
                None => assert_eq!(db.everything(id).await, before, "{state:?} {action:?}"),
            }
        }
    }
}

async fn a_retried_transfer_starts_over(db: Fixture) {
    for state in [State::Failed, State::Waiting] {
        let (id, _) = state.make(&db).await;
        db.repository
            .execute(id, &wants(Action::Retry))
            .await
            .unwrap();
        let detail = db.repository.show(id).await.unwrap().unwrap();
        assert_eq!(detail.transfer.retry_count, 0);
        assert_eq!((detail.not_before, detail.transfer.end_time), (None, None));
        // The reason of the earlier failure is kept.
        assert!(detail.transfer.failure_error_message.is_some());
        let [action] = &detail.actions[..] else {
            panic!("{:?}", detail.actions)
        };
        assert_eq!(action.action, Action::Retry);
        assert_eq!(action.operator, "alice@here");
        assert_eq!(action.reason.as_deref(), Some("the wrong night"));
        assert!(due(&db).await.contains(&id));
        db.acquire(id).await;
    }
}

async fn a_cancelled_copy_can_write_nothing(db: Fixture) {
    let (id, lease) = State::Running.make(&db).await;
    let lease = lease.unwrap();
    let progress = Progress {
        bytes_done: 5,
        bytes_total: Some(9),
        rate_bytes_per_s: 3,
        ..Progress::default()
    };
    db.repository
        .renew(&lease, copying(progress))
        .await
        .unwrap();
    let cancel = wants(Action::Cancel);
    match db.repository.execute(id, &cancel).await.unwrap() {
        Applicability::Changed(Change {
            from,
            stopped: Some(stopped),
            ..
        }) => {
            assert_eq!(from, Label::Known(Status::InProgress));
            assert_eq!(stopped.owner, stranger());
            assert_eq!(stopped.phase.as_deref(), Some("copying"));
        }
        verdict => panic!("{verdict:?}"),
    }
    assert!(is_lost(
        db.repository.renew(&lease, copying(progress)).await
    ));
    assert_powerless(&db, &lease).await;
    let detail = db.repository.show(id).await.unwrap().unwrap();
    let message = "cancelled by alice@here: the wrong night";
    assert!(detail.transfer.status.means(Status::Failed));
    assert_eq!(
        detail.transfer.failure_error_message.as_deref(),
        Some(message)
    );
    assert!(detail.transfer.end_time.is_some() && detail.lease.is_none());
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Interrupted));
    assert_eq!(detail.attempts[0].message.as_deref(), Some(message));
    assert_eq!(detail.attempts[0].bytes, Some(5));
    // A repeated request (for example after a lost answer) reports the earlier result.
    match db.repository.execute(id, &cancel).await.unwrap() {
        Applicability::Refused(Refusal::Failed { message: found }) => {
            assert_eq!(found.as_deref(), Some(message));
        }
        verdict => panic!("{verdict:?}"),
    }
    // The message of the transfer is still in a queue, and has no effect.
    let answer = db.repository.acquire(id, &me(), "task-1", TTL).await;
    assert!(matches!(answer, Ok(Acquisition::Failed { .. })));
}

async fn a_transfer_given_up_has_operator_and_reason(db: Fixture) {
    let (id, _) = State::Waiting.make(&db).await;
    db.repository
        .execute(id, &wants(Action::Fail))
        .await
        .unwrap();
    let detail = db.repository.show(id).await.unwrap().unwrap();
    assert_eq!(
        detail.transfer.failure_error_message.as_deref(),
        Some("given up by alice@here: the wrong night")
    );
    assert_eq!(detail.transfer.retry_count, 1, "what was tried stays known");
    assert_eq!(detail.actions[0].previous_status, "PENDING");
    let untracked = State::Untracked.make(&db).await.0;
    let anyway = Instruction {
        untracked: true,
        reason: None,
        ..wants(Action::Fail)
    };
    db.repository.execute(untracked, &anyway).await.unwrap();
    let message = db.repository.transfer(untracked).await.unwrap().unwrap();
    assert_eq!(
        message.failure_error_message.as_deref(),
        Some("given up by alice@here")
    );
}

async fn a_dry_run_changes_nothing(db: Fixture) {
    for action in [Action::Retry, Action::Cancel, Action::Fail] {
        for state in State::ALL {
            let (id, _) = state.make(&db).await;
            let before = db.everything(id).await;
            let said = db.repository.preview(id, &wants(action)).await.unwrap();
            assert_eq!(db.everything(id).await, before);
            let done = db.repository.execute(id, &wants(action)).await.unwrap();
            assert_eq!(said, done, "{action:?} {state:?}");
        }
    }
}

async fn a_transfer_chosen_by_state_is_untouched_in_another(db: Fixture) {
    let (id, _) = State::Running.make(&db).await;
    let waiting = Instruction {
        only: vec![Status::Pending, Status::Scheduled],
        ..wants(Action::Cancel)
    };
    let otherwise = Refusal::Otherwise(Label::Known(Status::InProgress));
    assert_eq!(
        db.repository.execute(id, &waiting).await.unwrap(),
        Applicability::Refused(otherwise)
    );
    assert_eq!(db.status(id).await, "IN_PROGRESS");
}

async fn a_transfer_whose_worker_is_gone_is_sent_again(db: Fixture) {
    let (id, lease) = State::Expired.make(&db).await;
    db.repository
        .execute(id, &wants(Action::Retry))
        .await
        .unwrap();
    assert_powerless(&db, &lease.unwrap()).await;
    assert_eq!(db.acquire(id).await.lease.attempt().get(), 2);
}

async fn an_unknown_transfer_is_reported(db: Fixture) {
    for action in [Action::Retry, Action::Cancel, Action::Fail] {
        let wants = wants(action);
        let verdict = db.repository.execute(4711.into(), &wants).await.unwrap();
        assert_eq!(verdict, Applicability::Unknown);
        let verdict = db.repository.preview(4711.into(), &wants).await.unwrap();
        assert_eq!(verdict, Applicability::Unknown);
    }
}

async fn transfers_are_filtered(db: Fixture) {
    let mut made = Vec::new();
    for state in State::ALL {
        made.push((state, state.make(&db).await.0));
    }
    // In the other direction: from cologne to ccat.
    let back = db.transfer().await;
    db.sql(&format!(
        "UPDATE data_transfer SET origin_location_id = destination_location_id, \
         destination_location_id = (SELECT id FROM data_location WHERE name = 'telescope_computer') \
         WHERE id = {back}"
    ))
    .await;
    let old = made[0].1;
    db.sql(&format!(
        "UPDATE data_transfer SET created_at = '2020-01-01 00:00:00' WHERE id = {old}"
    ))
    .await;
    let id = |wanted| made.iter().find(|(state, _)| *state == wanted).unwrap().1;
    let everything: Vec<_> = made.iter().map(|(_, id)| *id).chain([back]).collect();
    let place = |text: &str| Some(text.parse().unwrap());
    let hour = Some(Duration::from_secs(3600));
    let none = Filter::default();
    let cases = [
        (none.clone(), everything.clone()),
        (
            Filter {
                ids: Some(vec![old, back, 4711.into()]),
                ..none.clone()
            },
            vec![old, back],
        ),
        (
            Filter {
                ids: Some(Vec::new()),
                ..none.clone()
            },
            Vec::new(),
        ),
        (
            Filter {
                statuses: vec![Status::Failed, Status::Scheduled],
                ..none.clone()
            },
            vec![id(State::Scheduled), id(State::Failed)],
        ),
        (
            Filter {
                site: place("ccat"),
                ..none.clone()
            },
            everything.clone(),
        ),
        (
            Filter {
                site: place("ccat/buffer"),
                ..none.clone()
            },
            Vec::new(),
        ),
        (
            Filter {
                origin: place("cologne"),
                ..none.clone()
            },
            vec![back],
        ),
        (
            Filter {
                origin: place("cologne/buffer"),
                destination: place("ccat/telescope_computer"),
                ..none.clone()
            },
            vec![back],
        ),
        (
            Filter {
                older_than: hour,
                ..none.clone()
            },
            vec![old],
        ),
        (
            Filter {
                newer_than: hour,
                ..none.clone()
            },
            everything[1..].to_vec(),
        ),
        (
            Filter {
                error_code: Some("network".into()),
                ..none.clone()
            },
            vec![id(State::Waiting), id(State::Failed)],
        ),
        (
            Filter {
                held_by: Some(stranger().node),
                ..none.clone()
            },
            vec![id(State::Running), id(State::Expired)],
        ),
        (
            Filter {
                held_by: Some(stranger().host),
                ..none.clone()
            },
            vec![id(State::Running), id(State::Expired)],
        ),
        (
            Filter {
                held_by: Some("celery@other".into()),
                ..none.clone()
            },
            Vec::new(),
        ),
        (
            Filter {
                is_held: true,
                ..none.clone()
            },
            vec![id(State::Running), id(State::Expired)],
        ),
        (
            Filter {
                is_waiting: true,
                ..none.clone()
            },
            vec![id(State::Waiting)],
        ),
        (
            Filter {
                is_waiting: true,
                error_code: Some("stalled".into()),
                ..none.clone()
            },
            Vec::new(),
        ),
    ];
    for (filter, expected) in cases {
        let listing = Listing {
            filter: filter.clone(),
            is_reversed: true,
            ..Listing::default()
        };
        let listed = db.repository.list(&listing).await.unwrap();
        let ids: Vec<_> = listed.iter().map(|transfer| transfer.id).collect();
        assert_eq!(ids, expected, "{filter:?}");
        let count = db.repository.count(&filter, 100).await.unwrap();
        assert_eq!(count, expected.len() as u64, "{filter:?}");
    }
    assert_eq!(db.repository.count(&none, 3).await.unwrap(), 3);

    // After a later attempt without this error, the error is not the latest any more.
    let waiting = id(State::Waiting);
    let listed = db.repository.list(&Listing::default()).await.unwrap();
    let of = |id| listed.iter().find(|transfer| transfer.id == id).unwrap();
    assert_eq!(of(waiting).error_code.as_deref(), Some("network"));
    assert!(of(waiting).not_before.is_some());
    assert_eq!(of(old).not_before, None);
    db.repository.forget_delay(waiting).await.unwrap();
    db.acquire(waiting).await;
    let failing = Listing {
        filter: Filter {
            error_code: Some("network".into()),
            ..none
        },
        ..Listing::default()
    };
    let listed = db.repository.list(&failing).await.unwrap();
    assert!(listed.iter().all(|transfer| transfer.id != waiting));
}

async fn transfers_are_ordered(db: Fixture) {
    let ids = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    let [first, second, third] = ids;
    for (id, status, retries, size, made) in [
        (first, "FAILED", 2, "10", "2026-01-03"),
        (second, "PENDING", 2, "30", "2026-01-01"),
        (third, "IN_PROGRESS", 0, "NULL", "2026-01-02"),
    ] {
        db.sql(&format!(
            "UPDATE data_transfer SET status = '{status}', retry_count = {retries}, \
             created_at = '{made} 00:00:00' WHERE id = {id}"
        ))
        .await;
        db.sql(&format!(
            "UPDATE data_transfer_package SET size = {size} WHERE id = \
             (SELECT data_transfer_package_id FROM data_transfer WHERE id = {id})"
        ))
        .await;
    }
    for (sort, forwards, backwards) in [
        (Sort::Id, [third, second, first], [first, second, third]),
        (Sort::Age, [second, third, first], [first, third, second]),
        (Sort::Status, [second, third, first], [first, third, second]),
        // An unknown size is last in both orders.
        (Sort::Size, [second, first, third], [first, second, third]),
        (
            Sort::Retries,
            [second, first, third],
            [third, second, first],
        ),
    ] {
        for (is_reversed, expected) in [(false, forwards), (true, backwards)] {
            let mut listing = Listing {
                sort,
                is_reversed,
                ..Listing::default()
            };
            let listed = db.repository.list(&listing).await.unwrap();
            let ids: Vec<_> = listed.iter().map(|transfer| transfer.id).collect();
            assert_eq!(ids, expected, "{sort:?} {is_reversed}");
            listing.limit = Some(2);
            let listed = db.repository.list(&listing).await.unwrap();
            let ids: Vec<_> = listed.iter().map(|transfer| transfer.id).collect();
            assert_eq!(ids, expected[..2], "{sort:?} {is_reversed}, cut");
        }
    }
}

async fn unknown_locations_are_reported(db: Fixture) {
    for (place, known) in [
        ("mars", vec!["ccat", "cologne"]),
        ("cologne/attic", vec!["cologne/buffer", "cologne/tapes"]),
    ] {
        let listing = Listing {
            filter: Filter {
                destination: Some(place.parse().unwrap()),
                ..Filter::default()
            },
            ..Listing::default()
        };
        match db.repository.list(&listing).await.unwrap_err() {
            ListError::UnknownPlace { known: found, .. } => assert_eq!(found, known),
            error => panic!("{error:?}"),
        }
    }
}

async fn competing_lease_for_a_destination_is_shown(db: Fixture) {
    let [first, second, third] = [
        db.transfer().await,
        db.transfer().await,
        db.transfer().await,
    ];
    db.sql(&format!(
        "UPDATE data_transfer SET data_transfer_package_id = \
         (SELECT data_transfer_package_id FROM data_transfer WHERE id = {first}) WHERE id = {second}"
    ))
    .await;
    let competing_lease = async |id| {
        db.repository
            .show(id)
            .await
            .unwrap()
            .unwrap()
            .competing_lease
    };
    assert!(competing_lease(second).await.is_none());
    db.acquire(first).await;
    db.acquire(third).await;
    assert_eq!(
        competing_lease(second).await.unwrap().data_transfer_id,
        first
    );
    assert!(competing_lease(first).await.is_none());
}
