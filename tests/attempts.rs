//! Whole attempts as in a worker, but without a broker: with the bbcp double (or the real bbcp that `$BBCP_REAL`
//! names), real files, and both databases.
//!
//! `$BBCP_DOUBLE` names the double; without it, it is built here.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "attempts/bench.rs"]
mod bench;
#[path = "support/double.rs"]
mod double;
#[path = "support/ops_db.rs"]
mod ops_db;
#[path = "attempts/proxy.rs"]
mod proxy;
#[path = "attempts/safety.rs"]
mod safety;

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use bench::{Bench, MB};
use ccat_transfer::settings::DigestAlgorithm;
use ccat_transfer::transfer::digest;
use ccat_transfer::transfer::request::{LeaseAtEnd, Success};
use entity::Outcome;
use rstest::rstest;

/// Runs each of the named functions on both databases.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$name(super::Bench::sqlite().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn postgres() {
                if let Some(bench) = super::Bench::postgres().await {
                    super::$name(bench).await;
                }
            }
        })+
    };
}

on_both!(
    an_interrupted_copy_is_completed,
    a_failed_copy_is_completed,
    a_damaged_partial_copy_is_replaced,
    a_partial_copy_of_another_source_is_replaced,
    a_transfer_that_is_given_up_leaves_nothing,
    without_resume_nothing_is_kept,
    a_lease_tells_the_phase_before_it_is_renewed,
    a_reset_stops_the_copy,
    a_cancel_stops_the_copy,
    a_deletion_stops_the_copy,
    one_destination_one_copy,
    a_message_before_its_time_is_refused,
    the_recorded_checksum_is_the_judge,
    names_are_moved_rightly_or_refused,
    administrators_are_told,
);

async fn an_interrupted_copy_is_completed(mut bench: Bench) {
    bench.resume();
    bench.double(&[("RATE", "4000000")]);
    let id = bench.package("p q.tar", 8 * MB).await;
    let stopped = bench.attempt_stopped_at(id, 3 * MB).await;
    assert_eq!(stopped.code(), "interrupted");
    let (kept, _) = bench.leftovers();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let there = fs::metadata(&kept[0]).unwrap().len();
    assert!((2 * MB..8 * MB).contains(&there), "{there}");

    bench.double(&[]);
    let done = bench.attempt(id).await.done();
    assert!(matches!(done, Success::Copied(_)), "{done:?}");
    bench.assert_moved(id, "p q.tar").await;
    let log = bench.log(id, 2).await;
    let appended = log
        .lines()
        .find_map(|line| line.split_once(" at offset "))
        .map(|(_, offset)| offset.parse::<u64>().unwrap());
    assert_eq!(appended, Some(there), "{log}");
    assert!(bench.record(id).await.retry_count == 0);
}

async fn a_lease_tells_the_phase_before_it_is_renewed(mut bench: Bench) {
    bench.settings.transfer.lease_renew_interval = Duration::from_secs(60);
    bench.double(&[("RATE", "1000000")]);
    let id = bench.package("a.tar", 4 * MB).await;
    let (ended, size) = bench
        .attempt_while(id, 1, async |bench| {
            // The loop ends with the lease, at the end of the copy.
            while let Some(lease) = bench.lease(id).await {
                if lease.phase.as_deref() == Some("copying") {
                    return Some(lease.bytes_total);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            None
        })
        .await;
    ended.done();
    assert_eq!(size.value, Some(Some(4 * MB as i64)));
}

async fn a_failed_copy_is_completed(mut bench: Bench) {
    bench.resume();
    bench.double(&[("PLAN", "reset@50%;ok")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    assert_eq!(bench.leftovers().0.len(), 1);
    bench.forget_delay(id).await;
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
    assert!(bench.log(id, 2).await.contains("Appending to "));
    assert_eq!(bench.record(id).await.retry_count, 1);
}

/// bbcp completes a partial file of any content, and exits with 0. The digest detects it, and the same attempt starts
/// again: this is not a failure.
async fn a_damaged_partial_copy_is_replaced(mut bench: Bench) {
    bench.resume();
    bench.double(&[("PLAN", "reset@50%;ok")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    let kept = bench.leftovers().0.remove(0);
    let mut bytes = fs::read(&kept).unwrap();
    bytes[1000] ^= 1;
    fs::write(&kept, bytes).unwrap();

    bench.forget_delay(id).await;
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
    assert_eq!(bench.record(id).await.retry_count, 1);
    assert_eq!(bench.copies(), 3, "one failed, one completed, one repeated");
}

async fn a_partial_copy_of_another_source_is_replaced(mut bench: Bench) {
    bench.resume();
    bench.double(&[("PLAN", "reset@50%;ok")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    // The owner replaces the file by one of the same size.
    bench.write_origin("a.tar", 4 * MB, 99);
    let later = std::time::SystemTime::now() + Duration::from_secs(10);
    let replaced = fs::File::options()
        .append(true)
        .open(bench.origin.join("a.tar"));
    replaced.unwrap().set_modified(later).unwrap();
    bench.forget_delay(id).await;
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
    assert!(bench.log(id, 2).await.contains("appears to have changed"));
}

async fn a_transfer_that_is_given_up_leaves_nothing(mut bench: Bench) {
    bench.resume();
    bench.settings.transfer.max_retries = 1;
    bench.double(&[("PLAN", "reset@50%")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    assert_eq!(bench.leftovers().0.len(), 1);
    bench.forget_delay(id).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    assert_eq!(bench.db.status(id).await, "FAILED");
    bench.assert_nothing_at_destination(id).await;
}

async fn without_resume_nothing_is_kept(bench: Bench) {
    bench.double(&[("PLAN", "reset@50%;ok")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    bench.assert_nothing_at_destination(id).await;
    bench.forget_delay(id).await;
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
    let names: Vec<String> = bench.targets();
    assert_eq!(names.len(), 2);
    assert_ne!(names[0], names[1], "each attempt has a name of its own");
}

/// An operator changes the row during a copy: the copy is stopped soon, and the operator's changes are not overwritten.
async fn the_operator_wins(mut bench: Bench, sql: &str, status: Option<&str>) {
    bench.resume();
    bench.double(&[("RATE", "1000000")]);
    let id = bench.package("a.tar", 20 * MB).await;
    let change = sql.replace("{id}", &id.to_string());
    let (ended, after) = bench
        .attempt_while(id, 2 * MB, async |bench: &Bench| {
            assert_eq!(bench.db.sql(&change).await, 1);
            bench.db.everything(id).await
        })
        .await;
    let (failed, before) = (ended.failed(), after.value);
    assert_eq!(failed.error.code(), "lease_lost", "{failed:?}");
    let limit = bench.settings.transfer.lease_renew_interval + Duration::from_secs(3);
    assert!(after.elapsed < limit, "{:?}", after.elapsed);
    assert_eq!(bench.no_bbcp_left(), Vec::<String>::new());
    let (copies, others) = bench.leftovers();
    assert!(
        copies.is_empty() && others.is_empty(),
        "{copies:?} {others:?}"
    );
    match status {
        Some(status) => {
            assert_eq!(bench.db.status(id).await, status);
            let now = bench.db.everything(id).await;
            // The lease is left out, since it was renewed until then.
            let without_lease = |text: &str| text.split("lease: ").next().unwrap().to_owned();
            assert_eq!(without_lease(&now), without_lease(&before));
        }
        None => assert!(bench.db.repository.show(id).await.unwrap().is_none()),
    }
}

async fn a_reset_stops_the_copy(bench: Bench) {
    let sql = "UPDATE data_transfer SET status = 'PENDING', retry_count = 0 WHERE id = {id}";
    the_operator_wins(bench, sql, Some("PENDING")).await;
}

async fn a_cancel_stops_the_copy(bench: Bench) {
    let sql = "UPDATE data_transfer SET status = 'FAILED', failure_error_message = 'not wanted' \
               WHERE id = {id}";
    the_operator_wins(bench, sql, Some("FAILED")).await;
}

async fn a_deletion_stops_the_copy(bench: Bench) {
    the_operator_wins(bench, "DELETE FROM data_transfer WHERE id = {id}", None).await;
}

async fn one_destination_one_copy(bench: Bench) {
    bench.double(&[("RATE", "4000000")]);
    let first = bench.package("a.tar", 8 * MB).await;
    let second = bench.again("a.tar").await;
    let (one, other) = bench
        .attempt_while(first, MB, async |bench: &Bench| bench.attempt(second).await)
        .await;
    one.done();
    assert_eq!(other.value.code(), "destination_busy");
    assert_eq!(bench.db.status(second).await, "PENDING");
    let record = bench.record(second).await;
    assert_eq!(
        (record.retry_count, record.failure_error_message),
        (0, None)
    );
    // At its next attempt, it finds the file.
    bench.forget_delay(second).await;
    let done = bench.attempt(second).await.done();
    assert!(matches!(done, Success::AlreadyThere(_)), "{done:?}");
    assert_eq!(bench.db.status(second).await, "COMPLETED");
    assert_eq!(bench.copies(), 1);
}

async fn a_message_before_its_time_is_refused(bench: Bench) {
    bench.double(&[("PLAN", "enospc@40%;ok")]);
    let id = bench.package("a.tar", MB).await;
    assert_eq!(bench.attempt(id).await.code(), "storage_full");
    let before = bench.db.everything(id).await;
    let shown = bench.db.repository.show(id).await.unwrap().unwrap();
    let wait = shown.not_before.unwrap() - bench.db.database.now().await.unwrap();
    assert!(
        wait.num_minutes() >= 23,
        "no quick retry on a full disk: {wait}"
    );
    let refused = bench.attempt(id).await.failed();
    assert_eq!(refused.error.code(), "not_due");
    assert!(matches!(refused.lease, LeaseAtEnd::NotAcquired));
    assert_eq!(bench.db.everything(id).await, before);
    assert_eq!(bench.copies(), 1);
}

async fn the_recorded_checksum_is_the_judge(bench: Bench) {
    // Both ends are equal, and both are wrong.
    bench.write_origin("bad.tar", MB, 5);
    let wrong = format!("md5:{}", "0".repeat(32));
    let bad = bench.transfer("bad.tar", Some(wrong)).await;
    let failed = bench.attempt(bad).await.failed();
    assert_eq!(failed.error.code(), "origin_corrupt", "{failed:?}");
    assert_eq!(bench.db.status(bad).await, "FAILED");
    bench.assert_nothing_at_destination(bad).await;

    fs::write(bench.origin.join("abc"), "abc").unwrap();
    let right = "md5:900150983cd24fb0d6963f7d28e17f72".to_owned();
    let good = bench.transfer("abc", Some(right.clone())).await;
    bench.attempt(good).await.done();
    bench.assert_moved(good, "abc").await;
    let detail = bench.db.repository.show(good).await.unwrap().unwrap();
    assert_eq!(detail.attempts[0].digest.as_ref(), Some(&right));
    assert_eq!(detail.attempts[0].outcome, Some(Outcome::Completed));
}

async fn names_are_moved_rightly_or_refused(bench: Bench) {
    let long = "x".repeat(255);
    let deep = "0123456789/".repeat(50);
    for name in [
        "two words.tar",
        "ünï→cødé.tar",
        "quo'te\"s.tar",
        "colon:name.tar",
        "user@host:path.tar",
        "-rf.tar",
        "$(touch oops)`id`.tar",
        "*?[a]{b}.tar",
        long.as_str(),
        &format!("{deep}a.tar"),
    ] {
        let id = bench.package(name, 1000).await;
        bench.attempt(id).await.done();
        bench.assert_moved(id, name).await;
    }
    let good = bench.package("good.tar", 1000).await;
    for (name, problem) in [
        ("a\nb.tar", "control characters"),
        ("a\tb.tar", "control characters"),
        (&"0123456789/".repeat(109), "longer than bbcp allows"),
        (&"x".repeat(256), "255 bytes"),
    ] {
        let id = bench.renamed(good, name).await;
        let failed = bench.attempt(id).await.failed();
        assert_eq!(failed.error.code(), "path_invalid", "{name:?}");
        assert!(
            failed.error.to_string().contains(problem),
            "{}",
            failed.error
        );
        assert_eq!(bench.db.status(id).await, "FAILED");
    }
    fs::create_dir(bench.origin.join("directory")).unwrap();
    let id = bench.renamed(good, "directory").await;
    let failed = bench.attempt(id).await.failed();
    assert_eq!(failed.error.code(), "origin_not_a_file");
    assert!(failed.error.to_string().contains("stage that assembles"));
}

async fn administrators_are_told(mut bench: Bench) {
    let sent = bench.origin.join("notices");
    let sent_to = sent.display().to_string();
    let script = r#"cat >>"$0""#.to_owned();
    bench.settings.notifications.command = vec!["sh".into(), "-c".into(), script, sent_to];
    let id = bench.transfer("late.tar", None).await;
    bench.write_origin("another.tar", 1, 1);
    assert_eq!(bench.attempt(id).await.code(), "origin_missing");
    let text = fs::read_to_string(&sent).unwrap();
    let path = bench.origin.join("late.tar").display().to_string();
    for part in [
        format!("data transfer {id} has FAILED and is not tried again: origin_missing").as_str(),
        &format!("{path} does not exist at the origin"),
        "what to do  Put it back",
        "from        here/from",
        "attempt     1 by celery@here",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    bench.write_origin("late.tar", 1000, 1);
    bench.db.set_status(id, "PENDING").await;
    bench.attempt(id).await.done();
    let text = fs::read_to_string(&sent).unwrap();
    let recovered = format!("data transfer {id} has completed after it had FAILED");
    assert!(text.contains(&recovered), "{text}");
}

/// The database is down from the middle of the copy on, for longer than the lifetime of the lease. The copy continues,
/// and is verified and committed after the database is back.
///
/// The outage takes some seconds; with `TEST_DATABASE_OUTAGE=60` it takes a minute.
#[tokio::test(flavor = "multi_thread")]
async fn copy_continues_without_the_database() {
    let Some(mut bench) = Bench::postgres().await else {
        return;
    };
    let seconds = std::env::var("TEST_DATABASE_OUTAGE").map_or(4, |text| text.parse().unwrap());
    let outage = Duration::from_secs(seconds);
    bench.settings.transfer.lease_ttl = Duration::from_secs(1);
    let proxy = bench.behind_a_proxy().await;
    bench.double(&[("RATE", "4000000")]);
    let id = bench.package("a.tar", 8 * MB).await;
    let (ended, away) = bench
        .attempt_while(id, 2 * MB, async |bench: &Bench| {
            proxy.cut();
            tokio::time::sleep(outage).await;
            let row = (
                bench.db.status(id).await,
                bench.destination.join("a.tar").exists(),
            );
            proxy.mend();
            row
        })
        .await;
    let done = ended.done();
    assert!(matches!(done, Success::Copied(_)), "{done:?}");
    // Observed over another connection during the outage: nothing was published or committed.
    assert_eq!(away.value, ("IN_PROGRESS".to_owned(), false));
    bench.assert_moved(id, "a.tar").await;
    assert_eq!((bench.copies(), bench.record(id).await.retry_count), (1, 0));
}

/// The same outage, but another worker takes the transfer over: no file of the copy remains.
#[tokio::test(flavor = "multi_thread")]
async fn copy_without_its_lease_is_not_published() {
    let Some(mut bench) = Bench::postgres().await else {
        return;
    };
    bench.settings.transfer.lease_ttl = Duration::from_secs(1);
    let proxy = bench.behind_a_proxy().await;
    bench.double(&[("RATE", "4000000")]);
    let id = bench.package("a.tar", 8 * MB).await;
    let (ended, _) = bench
        .attempt_while(id, 2 * MB, async |bench: &Bench| {
            proxy.cut();
            tokio::time::sleep(Duration::from_secs(4)).await;
            bench.db.acquire_as(id, &ops_db::stranger()).await;
            proxy.mend();
        })
        .await;
    assert_eq!(ended.code(), "lease_lost");
    assert_eq!(bench.db.status(id).await, "IN_PROGRESS", "the stranger's");
    assert_eq!(bench.db.leases().await, "1");
    assert!(!bench.destination.join("a.tar").exists());
    assert!(bench.leftovers().0.is_empty());
}

/// A remote end has digests of blocks only, and the origin has both: the recorded checksum is still compared.
#[tokio::test(flavor = "multi_thread")]
async fn large_remote_copies_are_compared_by_blocks() {
    const SIZE: u64 = (64 << 20) + 5;
    let mut bench = Bench::sqlite().await;
    if !bench.by_ssh().await {
        return;
    }
    bench.double(&[("ANYHOST", "1"), ("PLAN", "corrupt;ok")]);
    let origin = bench.origin.join("large.tar");
    let file = fs::File::create(&origin).unwrap();
    file.set_len(SIZE).unwrap();
    let mut file = &file;
    file.write_all(b"begin").unwrap();
    let reading = fs::File::open(&origin).unwrap();
    let digest = digest::of(DigestAlgorithm::Sha256, None, reading, |_| true).unwrap();
    let checksum = digest.whole.unwrap().to_string();

    let id = bench.transfer("large.tar", None).await;
    let failed = bench.attempt(id).await.failed();
    assert_eq!(failed.error.code(), "checksum_mismatch", "{failed:?}");
    assert!(
        failed.error.to_string().contains(" in bytes "),
        "{failed:?}"
    );
    bench.forget_delay(id).await;
    bench.attempt(id).await.done();
    let detail = bench.db.repository.show(id).await.unwrap().unwrap();
    let digests = detail
        .attempts
        .iter()
        .map(|attempt| attempt.digest.as_ref());
    assert!(
        digests.flatten().any(|digest| *digest == checksum),
        "{detail:?}"
    );

    // The copy exists now.
    for (recorded, expected) in [
        (checksum, None),
        (format!("sha256:{}", "0".repeat(64)), Some("origin_corrupt")),
    ] {
        let id = bench.transfer("large.tar", Some(recorded)).await;
        let ended = bench.attempt(id).await;
        match expected {
            None => assert!(matches!(ended.done(), Success::AlreadyThere(_))),
            Some(code) => assert_eq!(ended.code(), code),
        }
    }
    let copy = fs::OpenOptions::new()
        .write(true)
        .open(bench.destination.join("large.tar"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&copy, b"x", SIZE - 1).unwrap();
    let id = bench.again("large.tar").await;
    assert_eq!(bench.attempt(id).await.code(), "destination_exists");
}

/// Checks with the real program, here and over ssh, since the double's checkpoints are only a substitute.
#[rstest]
#[case::here(false)]
#[case::there(true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_real_bbcp_completes_a_renamed_copy(#[case] remote: bool) {
    let Some(real) = std::env::var_os("BBCP_REAL") else {
        println!("skipped: BBCP_REAL is not set");
        return;
    };
    let mut bench = Bench::sqlite().await;
    bench.resume();
    bench.settings.bbcp.program = real.clone().into();
    bench.settings.bbcp.remote_program = real.into();
    if remote && !bench.by_ssh().await {
        return;
    }
    bench.settings.bbcp.max_rate = "4m".into();
    bench.settings.bbcp.progress_interval = 2;
    let id = bench.package("p q.tar", 24 * MB).await;
    let stopped = bench.attempt_stopped_at(id, 8 * MB).await;
    assert_eq!(stopped.code(), "interrupted");
    let there = fs::metadata(&bench.leftovers().0[0]).unwrap().len();
    assert!(there >= 4 * MB, "{there}");
    bench.settings.bbcp.max_rate = String::new();
    bench.attempt(id).await.done();
    bench.assert_moved(id, "p q.tar").await;
    let log = bench.log(id, 2).await;
    assert!(log.contains(&format!("at offset {there}")), "{log}");
}
