//! Copies between hosts (knob `NETWORK`). The start command runs the other side on this machine.

use std::net::ToSocketAddrs;

use nix::sys::signal::Signal;

use crate::support::{Bench, DOUBLE, Outcome, Running, content, eventually, usual_mode};

/// Start command that runs the rest of its words, as ssh would on host `%H`.
const HERE: &str = "env REMOTE=%H";

fn copy<'a>(bench: &'a Bench, options: &[&str], from: &str, to: &str) -> Running<'a> {
    let start = format!("{HERE} {DOUBLE}");
    let with = ["-v", "-n", "-S", &start, "-T", &start];
    bench
        .call(&[with.as_slice(), options, &[from, to]].concat())
        .knob("NETWORK", "1")
        .knob("POLL", "0.05")
        .knob("ACCEPT", "0.3")
        .start()
}

fn finish(bench: &Bench, options: &[&str], from: &str, to: &str) -> Outcome {
    copy(bench, options, from, to).finish()
}

/// True if this machine's name has an address: the listening side announces it.
fn name_has_address() -> bool {
    let name = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let has_address = (name.as_str(), 0).to_socket_addrs().is_ok();
    if !has_address {
        println!("skipped: {name} has no address");
    }
    has_address
}

#[test]
fn copies_in_both_directions_between_hosts() {
    if !name_has_address() {
        return;
    }
    for (from, to) in [
        ("{}/src/a", "far:{}/dst/x"),
        ("far:{}/src/a", "{}/dst/x"),
        ("u@far:{}/src/a", "u@other:{}/dst/x"),
    ] {
        for options in [&["-e", "-E", "c32c="][..], &["-z"], &["-Z", "15000:15999"]] {
            let bench = Bench::with_source(3_000_000);
            let outcome = finish(&bench, options, from, to);
            outcome.expect(
                0,
                &["created; 3000000 bytes", "1 file copied at effectively"],
            );
            assert_eq!(bench.read("dst/x"), content(3_000_000, 1), "{from} {to}");
            assert_eq!(bench.mode("dst/x"), usual_mode());
            assert_eq!(outcome.stdout, "");
            let has_sum = outcome.stderr().contains("Checksum: c32c ");
            assert_eq!(has_sum, options.contains(&"-e"));
        }
    }
}

#[test]
fn failure_of_the_remote_side_is_reported() {
    if !name_has_address() {
        return;
    }
    let bench = Bench::with_source(10);
    bench.write("dst/x", b"old");
    finish(&bench, &[], "{}/src/a", "far:{}/dst/x").expect(22, &["already exists."]);
    finish(&bench, &[], "far:{}/src/b", "{}/dst/y")
        .expect(2, &["No such file or directory processing"]);
}

#[test]
fn start_command_that_fails_ends_a_push() {
    let bench = Bench::with_source(10);
    let outcome = finish(&bench, &["-T", "false"], "{}/src/a", "far:{}/dst/x");
    outcome.expect(1, &["bbcp: bbcp unexpectedly terminated on far"]);
    assert!(!bench.exists("dst/x"));
}

#[test]
fn side_that_is_not_reached_times_out() {
    let bench = Bench::with_source(10);
    let outcome = finish(&bench, &["-S", "false"], "far:{}/src/a", "{}/dst/x");
    let texts = [
        "Accept timed out on port ",
        "Unable to allocate more than 0 of 4 data streams.",
    ];
    outcome.expect(2, &texts);
}

/// The start command gives the connecting side a listener that has ended.
#[test]
fn side_that_does_not_reach_the_other_one_says_why() {
    let bench = Bench::with_source(10);
    let listener = r#"{"Listening":["127.0.0.1",1]}"#;
    let script = bench.path("listener");
    std::fs::write(&script, format!("echo '{listener}'\nsleep 0.3\nexit 2\n")).unwrap();
    let start = format!("sh {}", script.display());
    let outcome = finish(&bench, &["-T", &start], "{}/src/a", "far:{}/dst/x");
    let texts = [
        "bbcp: Connection refused unable to connect to port [::ffff:127.0.0.1]:1",
        "Unable to allocate more than 0 of 4 data streams.",
    ];
    outcome.expect(2, &texts);
}

#[test]
fn output_of_the_remote_shell_ends_the_copy() {
    let bench = Bench::with_source(10);
    let outcome = finish(&bench, &["-T", "echo welcome"], "{}/src/a", "far:{}/dst/x");
    assert!(outcome.stderr().contains("unexpectedly terminated on far"));
}

#[test]
fn remote_side_ends_with_its_agent() {
    if !name_has_address() {
        return;
    }
    let bench = Bench::with_source(3_000_000);
    let mut running = copy(&bench, &["-x", "1m"], "{}/src/a", "far:{}/dst/x");
    running.await_size("dst/x", 1);
    running.signal_group(Signal::SIGKILL);
    eventually("the remote sink removes its target", || {
        !bench.exists("dst/x")
    });
}
