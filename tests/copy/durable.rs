//! Durability at a remote end before a copy counts as complete. (Test for a local end: `test_durable.py`.)

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rstest::rstest;

use crate::bench::Bench;
use crate::endpoints::publish;
use crate::noise::{FAR, behind};

/// Creates a bench with a remote destination, where `sync` records its arguments and runs `script`.
fn with_sync(script: &str) -> Bench {
    let mut bench = behind("", "sh");
    let folder = bench.path("bin/shell");
    fs::create_dir_all(&folder).unwrap();
    let noted = bench.path("synced");
    let program = format!("#!/bin/sh\necho \"$@\" >>{}\n{script}\n", noted.display());
    fs::write(folder.join("sync"), program).unwrap();
    fs::set_permissions(folder.join("sync"), fs::Permissions::from_mode(0o755)).unwrap();
    bench.destination_host = Some(FAR);
    bench.relative_path = "2026/11".into();
    bench
}

fn synced(bench: &Bench) -> Vec<String> {
    let text = fs::read_to_string(bench.path("synced")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn chain(bench: &Bench) -> String {
    ["2026/11", "2026", ""]
        .map(|name| {
            let path = bench.path("destination").join(name).display().to_string();
            path.trim_end_matches('/').to_owned()
        })
        .join(" ")
}

#[tokio::test]
async fn content_and_directories_are_written() {
    let bench = with_sync("exit 0");
    let target = bench.plan().target;
    target.ensure_directory().await.unwrap();
    fs::write(target.temporary_path().as_path(), "new").unwrap();
    publish(&target).await.unwrap();
    let copy = format!("./{}", target.temporary());
    assert_eq!(synced(&bench), [copy, chain(&bench)]);

    fs::remove_file(bench.path("synced")).unwrap();
    target.make_durable().await.unwrap();
    assert_eq!(
        synced(&bench),
        [format!("{} {}", target.path(), chain(&bench))]
    );
}

#[rstest]
#[case::disk(
    "echo \"sync: error syncing 'x': Input/output error\" >&2; exit 1",
    false
)]
#[case::old("test $# = 0 || { echo 'sync: extra operand' >&2; exit 1; }", true)]
#[tokio::test]
async fn only_disk_errors_fail_a_sync(#[case] script: &str, #[case] good: bool) {
    let bench = with_sync(script);
    let target = bench.plan().target;
    target.ensure_directory().await.unwrap();
    fs::write(target.path().as_path(), "there").unwrap();
    match target.make_durable().await {
        Ok(()) => assert!(
            good && synced(&bench).last().unwrap().is_empty(),
            "everything"
        ),
        Err(error) => {
            assert!(!good, "{}", error.chain());
            assert_eq!(error.code(), "storage");
        }
    }
}
