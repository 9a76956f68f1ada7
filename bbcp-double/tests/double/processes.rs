//! The processes of a copy: groups and sessions, survival, leftovers, and records.

use crate::support::{Bench, DOUBLE, Running, children, eventually, lives};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpgid, getsid};
use std::fs;
use std::time::{Duration, Instant};

const SIZE: usize = 400_000;
/// Knobs and their values.
type KnobValues = &'static [(&'static str, &'static str)];
/// Slow enough that a test can act during the copy.
const SLOW: KnobValues = &[("RATE", "20000")];

fn slow<'a>(bench: &'a Bench, arguments: &[&str], knobs: &[(&str, &str)]) -> Running<'a> {
    let mut call = bench.call(arguments);
    for (name, value) in SLOW.iter().chain(knobs) {
        call = call.knob(name, value);
    }
    let mut running = call.start();
    running.await_size("dst/x", 1);
    running
}

/// Process ids of sink and source.
fn pair(running: &Running) -> (i32, i32) {
    let children = children(running.id());
    let of = |role: &str| {
        children
            .iter()
            .find(|(_, line)| line.ends_with(role))
            .unwrap_or_else(|| panic!("no {role} in {children:?}"))
            .0
    };
    assert_eq!(children.len(), 2, "{children:?}");
    (of(" SNK"), of(" SRC"))
}

fn session(pid: i32) -> i32 {
    getsid(Some(Pid::from_raw(pid))).unwrap().as_raw()
}

fn gone(pids: &[i32]) {
    eventually("the end of all children", || {
        pids.iter().all(|pid| !lives(*pid))
    });
}

#[test]
fn a_local_copy_is_one_group() {
    let bench = Bench::with_source(SIZE);
    let running = slow(&bench, &["{}/src/a", "{}/dst/x"], &[]);
    let (sink, source) = pair(&running);
    for pid in [sink, source] {
        assert_eq!(
            getpgid(Some(Pid::from_raw(pid))).unwrap().as_raw(),
            running.id()
        );
        assert_eq!(session(pid), session(running.id()));
    }
    running.signal_group(Signal::SIGTERM);
    let outcome = running.finish();
    assert_eq!(outcome.signal, Some(15));
    gone(&[sink, source]);
    assert_eq!(bench.mode("dst/x"), 0o200);
}

#[test]
fn remote_child_has_its_own_session_and_ends_with_the_other() {
    // Arguments, knobs, true if the sink is the remote side, true if the partial file stays.
    type Row = (&'static [&'static str], KnobValues, bool, bool);
    let table: &[Row] = &[
        (
            &["{}/src/a", "b:{}/dst/x"],
            &[("ANYHOST", "1")],
            true,
            false,
        ),
        (&["{}/src/a", "{}/dst/x"], &[("REMOTE", "1")], true, false),
        (
            &["-k", "{}/src/a", "{}/dst/x"],
            &[("REMOTE", "1")],
            true,
            true,
        ),
        (
            &["b:{}/src/a", "{}/dst/x"],
            &[("ANYHOST", "1")],
            false,
            true,
        ),
    ];
    for (arguments, knobs, sink_is_remote, stays) in table {
        let bench = Bench::with_source(SIZE);
        let running = slow(&bench, arguments, knobs);
        let (sink, source) = pair(&running);
        let (remote, local) = if *sink_is_remote {
            (sink, source)
        } else {
            (source, sink)
        };
        eventually("own session", || session(remote) == remote);
        assert_ne!(session(local), local);
        running.signal_group(Signal::SIGKILL);
        assert_eq!(running.finish().signal, Some(9));
        gone(&[sink, source]);
        assert_eq!(bench.exists("dst/x"), *stays, "{arguments:?}");
    }
}

#[test]
fn children_outlive_a_killed_agent_until_they_notice() {
    for (knobs, stays) in [
        (&[("POLL", "2")][..], true),
        (&[("POLL", "2"), ("REMOTE", "1")], false),
    ] {
        let bench = Bench::with_source(SIZE);
        let running = slow(&bench, &["{}/src/a", "{}/dst/x"], knobs);
        let (sink, source) = pair(&running);
        running.signal_agent(Signal::SIGKILL);
        assert_eq!(running.finish().signal, Some(9));
        let grown = bench.size("dst/x");
        eventually("growth without an agent", || bench.size("dst/x") > grown);
        gone(&[sink, source]);
        assert_eq!(bench.exists("dst/x"), stays, "{knobs:?}");
    }
}

#[test]
fn a_child_that_dies_by_a_signal_is_named() {
    // Killed child, exit code, true if the partial file stays.
    for (role, code, stays) in [("SNK", 255, true), ("SRC", 128, false)] {
        let bench = Bench::with_source(SIZE);
        let running = slow(&bench, &["{}/src/a", "{}/dst/x"], &[]);
        let (sink, source) = pair(&running);
        let victim = if role == "SNK" { sink } else { source };
        nix::sys::signal::kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
        let text = format!("bbcp: Copy process {victim} was killed via signal 9");
        running.finish().expect(code, &[&text]);
        assert_eq!(bench.exists("dst/x"), stays, "{role}");
    }
    // Over ssh, no remaining process can print it.
    let bench = Bench::with_source(SIZE);
    let running = slow(&bench, &["{}/src/a", "{}/dst/x"], &[("REMOTE", "1")]);
    let (sink, _) = pair(&running);
    nix::sys::signal::kill(Pid::from_raw(sink), Signal::SIGKILL).unwrap();
    let outcome = running.finish();
    assert_eq!((outcome.rc(), outcome.stderr().as_str()), (255, ""));
    assert_eq!(bench.mode("dst/x"), 0o200);
}

#[test]
fn stall_is_silent_and_without_end() {
    for (plan, size) in [("stall@50%", SIZE as u64 / 2), ("stall@0", 0)] {
        let bench = Bench::with_source(SIZE);
        let mut running = bench
            .call(&["-P", "5", "{}/src/a", "{}/dst/x"])
            .knob("PLAN", plan)
            .knob("TICK", "0.02")
            .start();
        eventually("the start", || bench.exists("dst/x"));
        running.await_size("dst/x", size);
        std::thread::sleep(Duration::from_millis(100));
        let said = running.stderr();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(running.stderr(), said, "{plan}");
        assert_eq!(bench.size("dst/x"), size);
        assert!(!running.ended());
        running.signal_group(Signal::SIGTERM);
        assert_eq!(running.finish().signal, Some(15));
    }
}

#[test]
fn a_stalled_remote_sink_still_ends_with_the_group() {
    let bench = Bench::with_source(SIZE);
    let mut running = bench.injected("stall@50%").knob("REMOTE", "1").start();
    running.await_size("dst/x", SIZE as u64 / 2);
    let (sink, source) = pair(&running);
    running.signal_group(Signal::SIGTERM);
    running.finish();
    gone(&[sink, source]);
    assert!(!bench.exists("dst/x"));
}

#[test]
fn progress_only() {
    let bench = Bench::with_source(SIZE);
    let mut running = bench
        .call(&["-P", "5", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "progress-only")
        .knob("TICK", "0.02")
        .start();
    eventually("progress", || {
        running.stderr().matches("% done").count() > 5
    });
    assert_eq!(bench.size("dst/x"), 0);
    assert!(!running.ended());
}

#[test]
fn slow_trickles() {
    let bench = Bench::with_source(3000);
    let start = Instant::now();
    bench.injected("slow:10000").run().expect(0, &[]);
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[test]
fn ignore_term() {
    let bench = Bench::with_source(SIZE);
    let mut running = bench.injected("ignore-term@50%").start();
    running.await_size("dst/x", SIZE as u64 / 2);
    let (sink, source) = pair(&running);
    running.signal_group(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!running.ended());
    assert!(lives(sink) && lives(source));
    running.signal_group(Signal::SIGKILL);
    assert_eq!(running.finish().signal, Some(9));
    gone(&[sink, source]);
}

#[test]
fn hang_start_and_hang_exit() {
    let bench = Bench::with_source(SIZE);
    let mut running = bench.injected("hang-start").start();
    std::thread::sleep(Duration::from_millis(200));
    assert!(!running.ended());
    assert!(!bench.exists("dst/x"));
    running.signal_group(Signal::SIGTERM);
    assert_eq!(running.finish().signal, Some(15));

    let mut running = bench.injected("hang-exit").start();
    eventually("the total", || running.stderr().contains("1 file copied"));
    assert!(bench.read("dst/x") == bench.read("src/a"));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!running.ended());
}

#[test]
fn fork_stderr_leaves_a_holder() {
    let bench = Bench::with_source(10);
    let running = bench.injected("fork-stderr:2").start();
    let group = running.id();
    running.finish().expect(0, &["1 file copied"]);
    let holder = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| getpgid(Some(Pid::from_raw(*pid))).is_ok_and(|found| found.as_raw() == group));
    gone(&[holder.expect("a holder in the group")]);
}

#[test]
fn orphan_unlinks_the_file_with_the_targets_name() {
    for (plan, stays) in [("orphan:2:unlink", false), ("orphan:1", true)] {
        let bench = Bench::with_source(SIZE);
        let running = slow(&bench, &["{}/src/a", "{}/dst/x"], &[("PLAN", plan)]);
        let (sink, source) = pair(&running);
        eventually("own session", || session(sink) == sink);
        running.signal_group(Signal::SIGKILL);
        running.finish();
        gone(&[source]);
        assert!(lives(sink), "{plan}: ignores the group's death");
        // A retry with the same name.
        fs::remove_file(bench.path("dst/x")).unwrap();
        bench.call(&["{}/src/a", "{}/dst/x"]).run().expect(0, &[]);
        gone(&[sink]);
        assert_eq!(bench.exists("dst/x"), stays, "{plan}");
    }
}

#[test]
fn end_sleep() {
    let bench = Bench::with_source(10);
    let start = Instant::now();
    bench
        .call(&["{}/src/a", "{}/dst/x"])
        .knob("ENDSLEEP", "0.3")
        .run()
        .expect(0, &[]);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn closed_output_is_not_an_error() {
    let bench = Bench::with_source(SIZE);
    let status = std::process::Command::new(DOUBLE)
        .args(["-V", &bench.fill("{}/src/a"), &bench.fill("{}/dst/x")])
        .stderr(std::io::pipe().unwrap().1)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(bench.read("dst/x") == bench.read("src/a"));
}

#[test]
fn source_that_changes_while_it_is_copied() {
    for grows in [true, false] {
        let bench = Bench::with_source(SIZE);
        let running = slow(&bench, &["{}/src/a", "{}/dst/x"], &[("RATE", "300000")]);
        let size = if grows { SIZE + 10 } else { SIZE - 10 };
        fs::OpenOptions::new()
            .write(true)
            .open(bench.path("src/a"))
            .unwrap()
            .set_len(size as u64)
            .unwrap();
        let text = bench.fill("bbcp: Error -143808 writing {}/src/a");
        running.finish().expect(128, &[&text]);
        assert!(!bench.exists("dst/x"));
    }
}

#[test]
fn every_invocation_is_recorded_once() {
    let bench = Bench::with_source(SIZE);
    let log = |bench: &Bench| -> Vec<serde_json::Value> {
        String::from_utf8(bench.read("log"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let call = |arguments: &[&str]| bench.call(arguments).knob("LOG", "{}/log");
    call(&["-#"]).run().expect(0, &[]);
    call(&["-s", "65", "a", "b"]).run().expect(1, &[]);
    call(&["-n", "-Z", "5031:5099", "{}/src/a", "{}/dst/1"])
        .knob("PLAN", "rc:9")
        .run()
        .expect(9, &[]);
    let mut killed = call(&["{}/src/a", "{}/dst/x"])
        .knob("RATE", "20000")
        .start();
    killed.await_size("dst/x", 1);
    let agent = killed.id();
    let during = log(&bench);
    assert_eq!(during.len(), 4);
    assert_eq!(during[3]["pid"], agent);
    assert_eq!(during[3]["pgid"], agent);
    assert!(during[3]["rc"].is_null());
    killed.signal_group(Signal::SIGKILL);
    killed.finish();

    let entries = log(&bench);
    let codes: Vec<_> = entries.iter().map(|entry| entry["rc"].as_i64()).collect();
    assert_eq!(codes, [Some(0), Some(1), Some(9), None]);
    let copy = &entries[2];
    assert_eq!(copy["plan"], "rc:9");
    assert_eq!(copy["argv"][2], "-Z");
    assert_eq!(
        copy["cwd"],
        bench.root().canonicalize().unwrap().to_str().unwrap()
    );
    assert_eq!(copy["stdin_is_null"], true);
    assert!(
        copy["env"]
            .as_array()
            .unwrap()
            .contains(&"bbcp_CONFIGFN".into())
    );
    assert!(copy["end"].as_f64().unwrap() >= copy["start"].as_f64().unwrap());
    assert!(entries[0]["plan"].is_null());
}

#[test]
fn record_lists_the_copies_that_run_at_the_same_time() {
    let bench = Bench::with_source(SIZE);
    let log = [("LOG", "{}/log")];
    let first = slow(&bench, &["{}/src/a", "{}/dst/x"], &log);
    let other = || {
        let call = bench.call(&["{}/src/a", "{}/dst/y"]).knob("LOG", "{}/log");
        call.run().expect(0, &[]);
        fs::remove_file(bench.path("dst/y")).unwrap();
        let text = String::from_utf8(bench.read("log")).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last["beside"].clone()
    };
    assert_eq!(other(), serde_json::json!([first.id()]));
    // The death of the agent does not end its children.
    let (sink, source) = pair(&first);
    first.signal_agent(Signal::SIGKILL);
    eventually("the agent is gone", || !lives(first.id()));
    assert_eq!(other(), serde_json::json!([first.id()]));
    first.signal_group(Signal::SIGKILL);
    first.finish();
    gone(&[sink, source]);
    // The record has no end, but no process lives.
    assert_eq!(other(), serde_json::json!([]));
}

#[test]
fn simultaneous_invocations_are_all_recorded() {
    let bench = Bench::with_source(10);
    let running: Vec<_> = (0..16)
        .map(|number| {
            bench
                .call(&["{}/src/a", &format!("{{}}/dst/{number}")])
                .knob("LOG", "{}/log")
                .start()
        })
        .collect();
    for run in running {
        run.finish().expect(0, &[]);
    }
    let log = String::from_utf8(bench.read("log")).unwrap();
    let complete = log
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|entry| entry["rc"] == 0)
        .count();
    assert_eq!(complete, 16);
}
