//! Runs of the double.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use ccat_transfer::transfer::failures::{Role, TransferError};
use rstest::rstest;
use tokio::time::timeout;

use crate::bench::{Bench, SIZE, eventually, living};
use crate::noise::{FAR, behind};

/// Time limit of every run.
const LIMIT: Duration = Duration::from_secs(15);

#[tokio::test]
async fn ok_with_progress() {
    let bench = Bench::new(&[("RATE", "8000000")]);
    let plan = bench.plan();
    let mut seen = bench.progress.subscribe();
    let watching = tokio::spawn(async move {
        let mut all = Vec::new();
        while seen.changed().await.is_ok() {
            all.push(*seen.borrow_and_update());
        }
        all
    });
    let report = bench.copy(&plan).await.unwrap();

    assert_eq!(report.bytes, Some(SIZE));
    let (algorithm, hex) = report.checksum.unwrap();
    assert_eq!((algorithm.as_str(), hex.len()), ("c32c", 8));
    assert_eq!(
        fs::read(bench.path("origin/p.tar")).unwrap(),
        fs::read(plan.target.temporary_path().as_path()).unwrap()
    );
    assert!(!plan.target.path().as_path().exists());

    let record = bench.record();
    assert_ne!(
        record["pgid"],
        nix::unistd::getpgrp().as_raw(),
        "a group of its own"
    );
    assert_eq!(record["stdin_is_null"], true);
    let known = ["HOME", "LC_ALL", "PATH", "SSH_AUTH_SOCK", "bbcp_CONFIGFN"];
    for name in record["env"].as_array().unwrap() {
        assert!(known.contains(&name.as_str().unwrap()), "{name}");
    }

    let log = bench.log();
    let first = log.lines().next().unwrap();
    assert!(
        first.starts_with("# 20") && first.contains("/bin/bbcp -v -P 10"),
        "{first}"
    );
    assert!(log.contains("Checksum: c32c"), "{log}");
    assert!(
        log.lines()
            .last()
            .unwrap()
            .contains("ended with exit code 0"),
        "{log}"
    );

    drop(bench.progress);
    let all = watching.await.unwrap();
    assert!(all.len() > 3, "{all:?}");
    assert!(all.is_sorted_by_key(|p| p.bytes_done), "{all:?}");
    assert!(
        all.iter()
            .any(|p| p.rate_bytes_per_s.is_some_and(|r| r > 1e6)),
        "{all:?}"
    );
}

#[rstest]
#[case::stall("stall@40%")]
#[case::never_starts("hang-start")]
#[case::never_ends("hang-exit")]
#[case::deaf_to_term("ignore-term+stall@40%")]
#[tokio::test]
async fn copy_without_progress_is_stopped(#[case] entry: &str) {
    let mut bench = Bench::new(&[("PLAN", entry), ("RATE", "20000000")]);
    bench.link.stall_timeout = Duration::from_millis(600);
    let plan = bench.plan();
    let start = Instant::now();
    let error = timeout(LIMIT, bench.copy(&plan))
        .await
        .unwrap()
        .unwrap_err();
    let TransferError::Stalled {
        bytes_done,
        bytes_total,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert!(bytes_done <= bytes_total);
    assert!(start.elapsed() >= Duration::from_millis(600));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(living(bench.group().await), Vec::<String>::new());
    assert!(
        bench.log().contains("stopped: no byte moved"),
        "{}",
        bench.log()
    );
}

#[rstest]
#[case::below_its_rate(true, "too_slow")]
#[case::past_its_deadline(false, "deadline")]
#[tokio::test]
async fn a_copy_that_is_too_slow_is_stopped(#[case] by_rate: bool, #[case] code: &str) {
    let mut bench = Bench::new(&[("RATE", "200000")]);
    let slowness = &mut bench.link.slowness;
    if by_rate {
        (slowness.min_rate, slowness.window) = (1_000_000, Duration::from_secs(1));
    } else {
        (slowness.deadline_rate, slowness.deadline_grace) = (4_000_000, Duration::ZERO);
    }
    let plan = bench.plan();
    let error = timeout(LIMIT, bench.copy(&plan))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.code(), code, "{error}");
    assert_eq!(living(bench.group().await), Vec::<String>::new());
}

#[tokio::test]
async fn copy_that_is_fast_enough_continues() {
    let mut bench = Bench::new(&[("RATE", "2000000")]);
    bench.link.slowness.min_rate = 500_000;
    bench.link.slowness.window = Duration::from_millis(500);
    bench.copy(&bench.plan()).await.unwrap();
}

#[tokio::test]
async fn a_slow_copy_is_not_a_stalled_one() {
    let mut bench = Bench::new(&[("RATE", "1500000")]);
    bench.link.stall_timeout = Duration::from_secs(1);
    bench.copy(&bench.plan()).await.unwrap();
}

#[rstest]
#[case::ordinary("slow:500000")]
#[case::deaf_to_term("ignore-term+slow:500000")]
#[tokio::test]
async fn a_cancelled_copy_leaves_no_process(#[case] entry: &str) {
    let bench = Bench::new(&[("PLAN", entry)]);
    let plan = bench.plan();
    let cancel = async {
        let group = bench.group().await;
        eventually("it copies", || living(group).len() >= 3).await;
        bench.cancel.cancel();
        group
    };
    let (result, group) = timeout(LIMIT, async { tokio::join!(bench.copy(&plan), cancel) })
        .await
        .unwrap();
    assert_eq!(result.unwrap_err().code(), "interrupted");
    assert_eq!(living(group), Vec::<String>::new());
}

#[tokio::test]
async fn a_dropped_copy_leaves_no_process() {
    let bench = Bench::new(&[("PLAN", "ignore-term+slow:500000")]);
    let plan = bench.plan();
    let group = tokio::select! {
        _ = bench.copy(&plan) => panic!("it should still run"),
        group = bench.group() => group,
    };
    eventually("nothing lives", || living(group).is_empty()).await;
}

#[rstest]
#[case::enospc("enospc@40%", "storage_full")]
#[case::exists("exists", "temporary_exists")]
#[case::no_source("nosrc", "origin_missing")]
#[case::unreadable("srcperm", "origin_unreadable")]
#[case::directory("srcdir", "origin_not_a_file")]
#[case::no_directory("nodir", "destination_directory")]
#[case::denied("dstperm", "destination_denied")]
#[case::no_space("nospace", "storage_full")]
#[case::changed("srcchanged", "origin_changed")]
#[case::reset("reset@30%", "network")]
#[case::ports("portbusy", "port_busy")]
#[case::time_limit("timelimit", "time_limit")]
#[case::sink("segv-sink@30%", "segfault")]
#[case::agent("segv-agent@30%", "segfault")]
#[case::killed("kill@30%", "bbcp_failed")]
#[case::other("rc:7:bbcp: something new", "bbcp_failed")]
#[tokio::test]
async fn failures_are_classified(#[case] entry: &str, #[case] code: &str) {
    let bench = Bench::new(&[("PLAN", entry), ("RATE", "20000000")]);
    let result = timeout(LIMIT, bench.copy(&bench.plan())).await.unwrap();
    let error = result.unwrap_err();
    assert_eq!(error.code(), code, "{error}\n{}", bench.log());
    assert_eq!(living(bench.group().await), Vec::<String>::new());
}

/// Returns the failure of a copy to or from another host.
async fn failure_between_hosts(role_of_other: Role, entry: &str) -> (&'static str, String) {
    let mut bench = behind("", "sh");
    bench.knobs(&[("PLAN", entry), ("ANYHOST", "1"), ("ACCEPT", "0.1")]);
    bench.put(role_of_other, FAR);
    let result = timeout(LIMIT, bench.copy(&bench.plan())).await.unwrap();
    let error = result.unwrap_err();
    (error.code(), format!("{error}\n{}", bench.log()))
}

/// With a remote origin bbcp prints the lines of a closed data port after any failure of ssh.
#[rstest]
#[case::refused("refused", "network")]
#[case::unresolved("noresolve", "network")]
#[case::login("auth", "ssh_denied")]
#[case::host_key("hostkey", "ssh_host_key")]
#[case::no_bbcp("nobbcp", "remote_program_missing")]
#[case::no_ssh("nossh", "program_missing")]
#[tokio::test]
async fn failures_of_ssh_are_classified(
    #[case] entry: &str,
    #[case] code: &str,
    #[values(Role::Origin, Role::Destination)] remote: Role,
) {
    let (found, text) = failure_between_hosts(remote, entry).await;
    assert_eq!(found, code, "{text}");
}

#[rstest]
#[case::banner(Role::Destination, "banner", "remote_died")]
#[case::remote_crash(Role::Destination, "segv-remote@30%", "remote_died")]
#[case::streams(Role::Destination, "streams:2", "network")]
#[case::data_port(Role::Origin, "unreached", "data_port")]
#[tokio::test]
async fn failures_between_hosts_are_classified(
    #[case] remote: Role,
    #[case] entry: &str,
    #[case] code: &str,
) {
    let (found, text) = failure_between_hosts(remote, entry).await;
    assert_eq!(found, code, "{text}");
}

/// The error names the end that listens, its port, the announced address and why that is not reached. A bbcp that does
/// not end (its connection waits for two minutes) is stopped.
#[rstest]
#[case::push(
    false,
    false,
    "this host could not connect to bbcp's data port 5070 at far.example.org"
)]
#[case::reversed(
    false,
    true,
    "far.example.org could not connect to bbcp's data port 5070 at this host"
)]
#[case::pull(
    true,
    false,
    "far.example.org could not connect to bbcp's data port 5070 at this host"
)]
#[tokio::test]
async fn a_closed_data_port_is_explained(
    #[case] is_pull: bool,
    #[case] reverse_connection: bool,
    #[case] expected: &str,
    #[values(false, true)] is_loopback: bool,
) {
    // The stand-in for ssh runs on this host; so both ends have its addresses, and the shell may give other answers.
    let own = if is_loopback {
        "127.0.1.1"
    } else {
        "192.0.2.7"
    };
    let startup = format!(
        "export SSH_CONNECTION='192.0.2.1 50000 192.0.2.2 22'; getent() {{ echo {own} STREAM x; }}; export -f getent"
    );
    let mut bench = behind(&startup, "bash");
    bench.link.bbcp.reverse_connection = reverse_connection;
    bench.link.bbcp.port_range = "5070:5070".into();
    let hangs = is_loopback && !is_pull;
    let plan = if hangs {
        "unreached+hang-exit"
    } else {
        "unreached"
    };
    bench.knobs(&[("PLAN", plan), ("ANYHOST", "1"), ("ACCEPT", "0.1")]);
    bench.put(
        if is_pull {
            Role::Origin
        } else {
            Role::Destination
        },
        FAR,
    );
    let error = timeout(LIMIT, bench.copy(&bench.plan()))
        .await
        .unwrap()
        .unwrap_err();
    let text = error.to_string();
    assert_eq!(error.code(), "data_port", "{text}");
    assert!(text.contains(expected), "{text}");
    assert!(
        text.ends_with("bbcp: Accept timed out on port 5070"),
        "{text}"
    );
    for setting in [
        "`bbcp.reverse_connection`",
        "`bbcp.no_dns`",
        "`bbcp.port_range`",
    ] {
        assert!(text.contains(setting), "{text}");
    }
    let reason = match (is_loopback, expected.ends_with("this host")) {
        (_, true) => "which announced the address ",
        (true, false) => {
            "127.0.1.1; that is a loopback address, which only far.example.org itself can reach"
        }
        (false, false) => {
            "192.0.2.7; in the connection of ssh far.example.org has the address 192.0.2.2"
        }
    };
    assert!(text.contains(reason), "{text}");
    let is_stopped = bench.log().contains("stopped: no data connection was made");
    assert_eq!(is_stopped, hangs, "{}", bench.log());
    assert_eq!(living(bench.group().await), Vec::<String>::new());
}

#[rstest]
#[case::noise("noise:200000")]
#[case::long_line("longline:100000000")]
#[case::binary("binary")]
#[case::junk("stdout-junk")]
#[case::line_ends("crlf")]
#[case::not_numbers("nan")]
#[case::infinite("inf")]
#[case::flood("flood:20000")]
#[case::other_version("version-warn")]
#[tokio::test]
async fn unusual_output_does_no_harm(#[case] entry: &str) {
    let bench = Bench::new(&[("PLAN", entry)]);
    let before = peak_memory_kib();
    let report = timeout(LIMIT, bench.copy(&bench.plan()))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        report.bytes,
        Some(SIZE),
        "{}",
        &bench.log()[..1000.min(bench.log().len())]
    );
    let log = fs::metadata(bench.path("logs/7.log")).unwrap().len();
    assert!(log < (64 << 20) + 1000, "{log}");
    let grown = peak_memory_kib().saturating_sub(before);
    assert!(grown < 48 << 10, "grew by {grown} KiB");
}

/// Maximum memory of this process so far.
fn peak_memory_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn grandchild_with_the_pipe_does_not_delay_the_end() {
    let bench = Bench::new(&[("PLAN", "fork-stderr")]);
    let start = Instant::now();
    bench.copy(&bench.plan()).await.unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(living(bench.group().await), Vec::<String>::new());
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_starts_nothing() {
    let bench = Bench::new(&[]);
    fs::write(bench.path("logs"), "a file").unwrap();
    let error = bench.copy(&bench.plan()).await.unwrap_err();
    assert_eq!(error.code(), "log_file");
    assert!(bench.record().is_null());
}

#[tokio::test]
async fn a_program_that_cannot_be_started() {
    let mut bench = Bench::new(&[]);
    let broken = bench.path("bin/broken");
    fs::write(&broken, "\x7fELF nonsense").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    bench.link.bbcp.program = broken;
    let error = bench.copy(&bench.plan()).await.unwrap_err();
    assert_eq!(error.code(), "bbcp_failed", "{error}");
    assert!(error.chain().contains("Exec format error"), "{error}");
}
