//! Sharing of the ssh connection to a host. A stand-in for ssh counts its starts.

use std::fs;
use std::time::Duration;

use ccat_transfer::transfer::copying::bbcp;
use ccat_transfer::transfer::endpoint::ReadOptions;
use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use tokio::time::timeout;

use crate::bench::{Bench, eventually};
use crate::endpoints::READ_OPTIONS;
use crate::noise::{FAR, behind};

/// Creates a bench whose other end is a shell. It records the process id of each login, then runs `startup`.
fn recorded(startup: &str) -> Bench {
    let mut bench = behind(&format!("echo $$ >>\"${{0%/*}}/logins\"; {startup}"), "sh");
    bench.destination_host = Some(FAR);
    bench
}

/// Process ids of all logins.
fn logins(bench: &Bench) -> Vec<Pid> {
    let text = fs::read_to_string(bench.path("bin/logins")).unwrap_or_default();
    let ids = text.lines().map(|line| line.parse().unwrap());
    ids.map(Pid::from_raw).collect()
}

/// Returns true if a process has not ended.
fn runs(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn concurrent_requests_share_one_login() {
    let bench = recorded("sleep 0.2");
    let plans = [bench.plan(), bench.plan(), bench.plan()];
    let requests = plans
        .iter()
        .flat_map(|plan| [&plan.target; 8])
        .map(|target| async {
            target.ensure_directory().await.unwrap();
            target.inspect().await.unwrap()
        });
    assert_eq!(join_all(requests).await.iter().flatten().count(), 0);
    assert_eq!(logins(&bench).len(), 1);
}

/// Those who wait for a login share its failure; a later request tries again.
#[tokio::test]
async fn an_unreachable_host_is_tried_once_at_a_time() {
    let bench = recorded(
        "sleep 0.2; echo 'ssh: connect to host far port 22: Connection refused' >&2; exit 255",
    );
    let target = bench.plan().target;
    for attempts in [1, 2] {
        let errors =
            join_all([&target; 8].map(|target| async { target.inspect().await.unwrap_err() }));
        for error in errors.await {
            assert_eq!(error.code(), "network", "{error}");
        }
        assert_eq!(logins(&bench).len(), attempts);
    }
}

/// The connection is lost between two requests, or during one.
#[rstest]
#[tokio::test]
async fn a_lost_connection_is_made_again(#[values(false, true)] during_a_request: bool) {
    let mut bench = recorded("");
    let (started, go) = (bench.path("started"), bench.path("go"));
    let script = format!(
        ": >'{}'; until test -e '{}'; do sleep 0.02; done; sha256sum",
        started.display(),
        go.display()
    );
    bench.link.ssh.sha256_command = vec!["sh".into(), "-c".into(), script];
    let target = bench.plan().target;
    fs::write(target.path().as_path(), "content").unwrap();
    target.inspect().await.unwrap();
    let lose = || kill(logins(&bench)[0], Signal::SIGKILL).unwrap();
    let digest = async { target.digest(READ_OPTIONS).await.unwrap() };
    let digest = if during_a_request {
        let losing = async {
            eventually("the digest runs", || started.exists()).await;
            lose();
            eventually("a second login", || logins(&bench).len() == 2).await;
            fs::write(&go, "").unwrap();
        };
        tokio::join!(digest, losing).0
    } else {
        lose();
        fs::write(&go, "").unwrap();
        digest.await
    };
    assert!(digest.whole.is_some());
    assert_eq!(logins(&bench).len(), 2);
}

/// A shell that hangs is replaced after the first request without an answer.
#[tokio::test]
async fn a_silent_connection_is_replaced() {
    let bench = recorded("");
    let target = bench.plan().target;
    fs::write(target.path().as_path(), "content").unwrap();
    target.inspect().await.unwrap();
    let shell = children(logins(&bench)[0]);
    let stop = |signal| {
        shell
            .iter()
            .for_each(|process| kill(*process, signal).unwrap())
    };
    stop(Signal::SIGSTOP);
    let options = ReadOptions {
        size: 0,
        stall_timeout: Duration::from_secs(1),
        ..READ_OPTIONS
    };
    let error = target.digest(options).await.unwrap_err();
    assert_eq!(error.code(), "operation_timeout", "{error}");
    target.digest(options).await.unwrap();
    assert_eq!(logins(&bench).len(), 2);
}

/// Processes whose parent is this one.
fn children(parent: Pid) -> Vec<Pid> {
    let text = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let ids = text.split_whitespace().map(|id| id.parse().unwrap());
    ids.map(Pid::from_raw).collect()
}

/// Copies beyond the sessions of one connection use a further one, which is closed after them.
#[tokio::test]
async fn many_copies_use_further_connections() {
    let bench = recorded("");
    bench.knobs(&[("ANYHOST", "1"), ("PLAN", "stall@50%")]);
    let plans: Vec<_> = (0..11).map(|_| bench.plan()).collect();
    let logs: Vec<_> = (0..11)
        .map(|n| bench.path(&format!("logs/{n}.log")))
        .collect();
    let copies = join_all(
        plans
            .iter()
            .zip(&logs)
            .map(|(plan, log)| bbcp::copy(plan, log, &bench.cancel, &bench.progress)),
    );
    let stopping = async {
        let record = || fs::read_to_string(bench.path("record")).unwrap_or_default();
        eventually("all copies run", || record().lines().count() == 11).await;
        assert_eq!(logins(&bench).len(), 2);
        bench.cancel.cancel();
    };
    let (results, ()) = timeout(Duration::from_secs(30), async {
        tokio::join!(copies, stopping)
    })
    .await
    .unwrap();
    assert!(results.iter().all(Result::is_err));
    let [first, further] = logins(&bench)[..] else {
        panic!("{:?}", logins(&bench));
    };
    eventually("the further connection is closed", || !runs(further)).await;
    assert!(runs(first));
    drop(plans);
    drop(bench);
    eventually("nothing is left", || !runs(first)).await;
}

/// The ssh of bbcp cannot continue without the connection. The double does not use ssh, so it is set to fail in the same way.
#[tokio::test]
async fn a_copy_that_loses_its_connection_names_the_network() {
    let bench = recorded("");
    bench.knobs(&[
        ("ANYHOST", "1"),
        ("PLAN", "segv-remote@30%"),
        ("RATE", "2000000"),
    ]);
    let plan = bench.plan();
    let losing = async {
        bench.group().await;
        kill(logins(&bench)[0], Signal::SIGKILL).unwrap();
    };
    let (result, ()) = tokio::join!(bench.copy(&plan), losing);
    let error = result.unwrap_err();
    assert_eq!(error.code(), "network", "{error}");
    assert!(error.to_string().contains("connection was lost"), "{error}");
}
