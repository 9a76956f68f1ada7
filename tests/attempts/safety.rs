//! Protection of the only copy, and transfers that wait instead of failing.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use rstest::rstest;

use crate::bench::{Bench, MB};

/// Way to reach the destination's host.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Local,
    Ssh,
    /// By a host with an unusable `stat`, like a host that gives the files of a mount numbers of its own.
    Opaque,
}

/// The destination is the origin's own directory. The file in it is not a second copy.
#[rstest]
#[case::link(Way::Local, true)]
#[case::host_name(Way::Ssh, false)]
#[case::host_name_and_link(Way::Ssh, true)]
#[case::export(Way::Opaque, false)]
#[tokio::test(flavor = "multi_thread")]
async fn only_copy_is_not_counted_as_two(#[case] way: Way, #[case] link: bool) {
    let mut bench = Bench::sqlite().await;
    match way {
        Way::Local => {}
        Way::Ssh if !bench.by_ssh().await => return,
        Way::Ssh => {}
        Way::Opaque => bench.by_a_shell_without(&["stat"]).await,
    }
    let id = bench.package("2026/a.tar", MB).await;
    let same = if link {
        let path = bench.origin.with_file_name("link");
        symlink(&bench.origin, &path).unwrap();
        path
    } else {
        bench.origin.clone()
    };
    bench.move_destination(same).await;
    let before = fs::read(bench.origin.join("2026/a.tar")).unwrap();
    assert_eq!(bench.attempt(id).await.code(), "same_place");
    assert_eq!(bench.db.status(id).await, "FAILED");
    assert_eq!(bench.copies(), 0);
    assert!(fs::read(bench.origin.join("2026/a.tar")).unwrap() == before);
    let entries = fs::read_dir(bench.origin.join("2026")).unwrap().count();
    assert_eq!(entries, 1, "nothing else is left there");
}

/// A file that another program has put at the destination is a second copy.
#[rstest]
#[case(Way::Local)]
#[case(Way::Opaque)]
#[tokio::test(flavor = "multi_thread")]
async fn identical_second_copy_completes(#[case] way: Way) {
    let mut bench = Bench::sqlite().await;
    if way == Way::Opaque {
        bench.by_a_shell_without(&["stat"]).await;
    }
    let id = bench.package("a.tar", MB).await;
    fs::copy(bench.origin.join("a.tar"), bench.destination.join("a.tar")).unwrap();
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
    assert_eq!(bench.copies(), 0);
}

/// A disk is not mounted, at either end: the transfers wait, and no retry is counted.
#[rstest]
#[case::origin(true, "origin_root_missing")]
#[case::destination(false, "destination_root_missing")]
#[tokio::test(flavor = "multi_thread")]
async fn transfers_wait_for_a_disk(#[case] origin: bool, #[case] code: &str) {
    let mut bench = Bench::sqlite().await;
    bench.settings.transfer.max_retries = 1;
    let id = bench.package("a.tar", MB).await;
    let root = if origin {
        &bench.origin
    } else {
        &bench.destination
    };
    let away = root.with_file_name("away");
    fs::rename(root, &away).unwrap();
    for _ in 0..3 {
        assert_eq!(bench.attempt(id).await.code(), code);
        assert_eq!(bench.db.status(id).await, "PENDING");
        assert_eq!(bench.record(id).await.retry_count, 0);
        // The transfer waits as long as it does for a full disk.
        assert_eq!(bench.attempt(id).await.code(), "not_due");
        bench.forget_delay(id).await;
    }
    fs::rename(&away, root).unwrap();
    bench.attempt(id).await.done();
    bench.assert_moved(id, "a.tar").await;
}

/// The disk is unmounted in the middle of a copy.
#[tokio::test(flavor = "multi_thread")]
async fn unmounted_disk_is_not_a_missing_package() {
    let bench = Bench::sqlite().await;
    bench.double(&[("RATE", "4000000")]);
    let id = bench.package("a.tar", 4 * MB).await;
    let (ended, _) = bench
        .attempt_while(id, MB, async |bench: &Bench| {
            fs::rename(&bench.origin, bench.origin.with_file_name("away")).unwrap();
            fs::create_dir(&bench.origin).unwrap();
        })
        .await;
    let failed = ended.failed();
    assert_eq!(failed.error.code(), "origin_root_missing", "{failed:?}");
    assert_eq!(bench.db.status(id).await, "PENDING");
}

/// The origin is replaced during the copy by a file of the same size that was changed in the same second.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_package_is_noticed() {
    let bench = Bench::sqlite().await;
    bench.double(&[("RATE", "4000000")]);
    let id = bench.package("a.tar", 4 * MB).await;
    let (ended, _) = bench
        .attempt_while(id, MB, async |bench: &Bench| {
            let path = bench.origin.join("a.tar");
            let before = fs::metadata(&path).unwrap().modified().unwrap();
            bench.write_origin("b.tar", 4 * MB, 2);
            let other = bench.origin.join("b.tar");
            let file = fs::File::options().append(true).open(&other).unwrap();
            let since = before.duration_since(std::time::UNIX_EPOCH).unwrap();
            let second = Duration::from_secs(since.as_secs());
            file.set_modified(std::time::UNIX_EPOCH + second).unwrap();
            fs::rename(other, path).unwrap();
        })
        .await;
    assert_eq!(ended.code(), "origin_changed");
    bench.assert_nothing_at_destination(id).await;
}

/// A transfer may be given up by another attempt than the one that kept a partial copy.
#[rstest]
#[case::never_tried_again("origin_missing")]
#[case::limit("origin_root_missing")]
#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_is_given_up_leaves_no_earlier_copy(#[case] reason: &str) {
    let mut bench = Bench::sqlite().await;
    bench.resume();
    bench.double(&[("PLAN", "reset@50%;ok")]);
    let id = bench.package("a.tar", 4 * MB).await;
    assert_eq!(bench.attempt(id).await.code(), "network");
    assert_eq!(bench.leftovers().0.len(), 1);
    bench.forget_delay(id).await;
    fs::remove_file(bench.origin.join("a.tar")).unwrap();
    let gives_up = reason == "origin_missing";
    if gives_up {
        bench.write_origin("b.tar", 1, 1);
    }
    assert_eq!(bench.attempt(id).await.code(), reason);
    if gives_up {
        assert_eq!(bench.db.status(id).await, "FAILED");
        bench.assert_nothing_at_destination(id).await;
        assert_eq!(bench.db.repository.partials_of(id).await.unwrap(), []);
    } else {
        assert_eq!(bench.db.status(id).await, "PENDING");
        assert_eq!(
            bench.leftovers().0.len(),
            1,
            "it waits, and is completed later"
        );
    }
}
