//! Copies of small packages through the ssh connection.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use ccat_transfer::transfer::failures::Role;
use ccat_transfer::transfer::plan::Plan;
use rstest::rstest;
use tokio::time::timeout;

use crate::bench::{Bench, SIZE, eventually};
use crate::endpoints::{LOOPBACK, with_sshd};
use crate::noise::{FAR, behind};

/// A name with characters that a shell or ssh could misinterpret.
const ODD: &str = "-a b;c'd\"e$(touch oops)`f`*?[g]&|<>#~!{h}\\i:j@k é";

/// Creates a bench whose other end has this role; `None` without an sshd for tests.
fn bench(role: Role) -> Option<Bench> {
    let mut bench = with_sshd()?;
    bench.put(role, LOOPBACK);
    bench.link.ssh.max_package_bytes = SIZE;
    Some(bench)
}

fn copy_of(plan: &Plan) -> std::path::PathBuf {
    plan.target.temporary_path().as_path().to_owned()
}

/// True if no process has this text in its command line.
fn is_unused(text: &Path) -> bool {
    let text = text.to_str().unwrap();
    let own = std::process::id().to_string();
    fs::read_dir("/proc").unwrap().flatten().all(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        entry.file_name() == *own || !String::from_utf8_lossy(&line).contains(text)
    })
}

#[rstest]
#[tokio::test]
async fn both_directions(#[values(Role::Origin, Role::Destination)] role: Role) {
    let Some(mut bench) = bench(role) else { return };
    bench.file_name = ODD.into();
    bench.relative_path = "é 'x".into();
    for directory in ["origin", "destination"] {
        fs::create_dir(bench.path(directory).join(&bench.relative_path)).unwrap();
    }
    let package = bench.path("origin").join(&bench.relative_path).join(ODD);
    fs::rename(bench.path("origin/p.tar"), &package).unwrap();
    let plan = bench.plan();
    assert!(!plan.keeps_partial());
    let report = bench.copy(&plan).await.unwrap();
    assert_eq!(report.bytes, Some(SIZE));
    let copy = copy_of(&plan);
    assert_eq!(fs::read(&package).unwrap(), fs::read(&copy).unwrap());
    let mode = fs::metadata(&copy).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
    assert_eq!(bench.progress.borrow().bytes_done, SIZE);
    assert!(bench.record().is_null(), "bbcp was not used");
    assert!(!bench.path("oops").exists());
    let log = bench.log();
    assert!(
        log.starts_with("# 20") && log.contains("/ssh -x -a"),
        "{log}"
    );
    assert!(
        log.trim_end().contains("ended with exit code 0, after "),
        "{log}"
    );
    // A larger package is copied by bbcp.
    bench.link.ssh.max_package_bytes = SIZE - 1;
    bench.knobs(&[("ANYHOST", "1")]);
    bench.copy(&bench.plan()).await.unwrap();
    assert!(!bench.record().is_null());
}

#[rstest]
#[tokio::test]
async fn a_stopped_copy_leaves_nothing(
    #[values(Role::Origin, Role::Destination)] role: Role,
    #[values("cancelled", "stalled", "dropped")] end: &str,
) {
    let Some(mut bench) = bench(role) else { return };
    bench.link.bbcp.max_rate = "100k".into();
    if end == "stalled" {
        // The first 64 KiB are sent at once.
        bench.link.bbcp.max_rate = "1k".into();
        bench.link.stall_timeout = Duration::from_secs(1);
    }
    let plan = bench.plan();
    let copy = copy_of(&plan);
    let mut seen = bench.progress.subscribe();
    let ended = {
        let copying = bench.copy(&plan);
        tokio::pin!(copying);
        let running = async {
            seen.wait_for(|progress| progress.bytes_done > 0)
                .await
                .unwrap();
            eventually("the copy has begun", || {
                fs::metadata(&copy).is_ok_and(|copy| copy.len() > 0)
            })
            .await;
        };
        tokio::select! {
            ended = &mut copying => panic!("{ended:?}"),
            () = running => {}
        }
        match end {
            "dropped" => None,
            end => {
                if end == "cancelled" {
                    bench.cancel.cancel();
                }
                let ended = timeout(Duration::from_secs(10), copying).await.unwrap();
                Some(ended.unwrap_err().code())
            }
        }
    };
    let expected = match end {
        "cancelled" => Some("interrupted"),
        "stalled" => Some("stalled"),
        _ => None,
    };
    assert_eq!(ended, expected);
    let other = match role {
        Role::Destination => {
            // The other end removes what is not complete.
            eventually("the copy is removed", || !copy.exists()).await;
            copy
        }
        Role::Origin => plan.source.path().as_path().to_owned(),
    };
    eventually("no process is left", || is_unused(&other)).await;
}

#[rstest]
#[case::push_grown(Role::Destination, SIZE + 70_000, "origin_changed")]
#[case::push_shrunk(Role::Destination, SIZE - 1, "origin_changed")]
#[case::pull_grown(Role::Origin, SIZE + 70_000, "origin_changed")]
#[case::pull_shrunk(Role::Origin, SIZE - 1, "origin_changed")]
#[tokio::test]
async fn a_package_that_changes(#[case] role: Role, #[case] bytes: u64, #[case] code: &str) {
    let Some(bench) = bench(role) else { return };
    let package = fs::File::options()
        .write(true)
        .open(bench.path("origin/p.tar"));
    package.unwrap().set_len(bytes).unwrap();
    let error = bench.copy(&bench.plan()).await.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
}

#[rstest]
#[case::missing(Role::Origin, "origin_missing")]
#[case::missing_here(Role::Destination, "origin_missing")]
#[case::no_directory(Role::Destination, "storage")]
#[case::no_directory_here(Role::Origin, "storage")]
#[case::name_is_taken(Role::Destination, "storage")]
#[case::name_is_taken_here(Role::Origin, "storage")]
#[tokio::test]
async fn refused_by_a_file_system(#[case] role: Role, #[case] code: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let Some(bench) = bench(role) else { return };
    let plan = bench.plan();
    if name.contains("missing") {
        fs::remove_file(bench.path("origin/p.tar")).unwrap();
    } else if name.contains("no_directory") {
        fs::remove_dir(bench.path("destination")).unwrap();
    } else {
        fs::write(copy_of(&plan), "of another").unwrap();
    }
    let error = bench.copy(&plan).await.unwrap_err();
    assert_eq!(error.code(), code, "{}", error.chain());
    if name.contains("taken") {
        assert_eq!(fs::read(copy_of(&plan)).unwrap(), b"of another");
    }
}

/// Neither the output nor the exit code of a start-up file belongs to the copy.
#[rstest]
#[case::silent("", None)]
#[case::much("head -c 300000 /dev/zero | tr '\\0' x; echo more >&2", None)]
#[case::ends("echo 'not today' >&2; exit 66", Some("remote_died"))]
#[case::ends_well("exit 0", Some("remote_died"))]
#[tokio::test]
async fn login_shells(
    #[case] startup: &str,
    #[case] code: Option<&str>,
    #[values(Role::Origin, Role::Destination)] role: Role,
    #[values("dash", "bash", "ksh", "mksh", "yash", "zsh")] shell: &str,
) {
    if std::process::Command::new(shell)
        .arg("-c")
        .arg(":")
        .status()
        .is_err()
    {
        return;
    }
    // Only the session with the content has the start-up file; the connection itself is made without it.
    let startup = format!(
        "case \"$*\" in *ControlMaster=no*) {}{startup};; esac",
        if startup.is_empty() { ":" } else { "" }
    );
    let mut bench = behind(&startup, shell);
    bench.put(role, FAR);
    bench.link.ssh.max_package_bytes = SIZE;
    let plan = bench.plan();
    let ended = bench.copy(&plan).await;
    assert_eq!(
        ended.as_ref().err().map(|error| error.code()),
        code,
        "{ended:?}"
    );
    if code.is_none() {
        let content = fs::read(bench.path("origin/p.tar")).unwrap();
        assert!(content == fs::read(copy_of(&plan)).unwrap());
    }
}
