//! Knobs: sizes, versions, hosts, plans, the rate of failures, and their file.

use std::fs;
use std::os::unix::fs::symlink;

use crate::support::{Bench, DOUBLE};

const SIZE: usize = 200_000;

#[test]
fn fake_size_multiplies_what_is_printed() {
    let bench = Bench::with_source(1000);
    let outcome = bench
        .call(&["-v", "{}/src/a", "{}/dst/x"])
        .knob("FAKE_SIZE", "50000000000")
        .run();
    outcome.expect(0, &["created; 50000000000000 bytes at "]);
    assert_eq!(bench.size("dst/x"), 1000);
}

#[test]
fn versions() {
    let bench = Bench::with_source(10);
    let version = bench.call(&["-#"]).knob("VERSION", "15.02.03.01.1").run();
    assert_eq!(
        (version.rc(), version.stdout.as_str()),
        (0, "15.02.03.01.1\n")
    );
    for (peer, text) in [
        (
            "18.01.00.00.0",
            "bbcp: Warning: siteb is running a newer version of bbcp",
        ),
        (
            "15.02.00.00.0",
            "bbcp: Warning: siteb is running an older version of bbcp",
        ),
    ] {
        bench
            .call(&["-f", "{}/src/a", "siteb:{}/dst/x"])
            .knob("ANYHOST", "1")
            .knob("PEER_VERSION", peer)
            .run()
            .expect(0, &[text]);
    }
}

#[test]
fn hosts_are_directories() {
    let bench = Bench::with_source(SIZE);
    fs::create_dir_all(bench.path("siteb/data")).unwrap();
    let hosts = "sitea={}/none,siteb={}/siteb";
    let push = bench
        .call(&["-v", "{}/src/a", "u@siteb:/data/x"])
        .knob("HOSTS", hosts)
        .run();
    push.expect(
        0,
        &[
            "bbcp: Host [::ffff:127.0.0.1] redirect connection to siteb 127.0.0.1",
            "File /data/x created; 200000 bytes",
        ],
    );
    assert!(bench.read("siteb/data/x") == bench.read("src/a"));
    let pull = bench
        .call(&["-E", "md5=/dev/stdout", "u@siteb:/data/x", "{}/dst/x"])
        .knob("HOSTS", hosts)
        .run();
    pull.expect(0, &[]);
    assert!(bench.read("dst/x") == bench.read("src/a"));
    let again = bench
        .call(&["-E", "md5=/dev/stdout", "{}/src/a", "u@siteb:/data/y"])
        .knob("HOSTS", hosts)
        .run();
    assert!(
        again.stdout.ends_with(" siteb:/data/y\n"),
        "{}",
        again.stdout
    );
    bench
        .call(&["{}/src/a", "u@sitez:/data/x"])
        .knob("HOSTS", hosts)
        .run()
        .expect(
            255,
            &[
                "ssh: Could not resolve hostname sitez: Name or service not known",
                "bbcp: bbcp unexpectedly terminated on sitez",
            ],
        );
}

#[test]
fn option_injection_is_reported() {
    let bench = Bench::with_source(10);
    for operand in [
        "x@-oProxyCommand=touch:/p",
        "-oProxyCommand=touch@h:/p",
        "--:/p",
    ] {
        bench
            .call(&["{}/src/a", operand])
            .knob("ANYHOST", "1")
            .run()
            .expect(99, &["DOUBLE: option injection"]);
    }
}

#[test]
fn plan_entries_are_used_in_order_and_the_last_repeats() {
    let bench = Bench::with_source(10);
    let run = || {
        bench
            .call(&["-f", "{}/src/a", "{}/dst/x"])
            .knob("PLAN", "exists; ok ;rc:5")
            .knob("STATE", "{}/state")
            .run()
            .rc()
    };
    assert_eq!(run(), 22);
    // A command line without a copy takes no entry.
    assert_eq!(bench.call(&["-#"]).knob("STATE", "{}/state").run().rc(), 0);
    assert_eq!(
        bench
            .call(&["-s", "65", "a", "b"])
            .knob("STATE", "{}/state")
            .run()
            .rc(),
        1
    );
    assert_eq!([run(), run(), run()], [0, 5, 5]);
}

#[test]
fn concurrent_copies_take_different_entries() {
    let bench = Bench::with_source(10);
    let plan: Vec<String> = (10..30).map(|code| format!("rc:{code}")).collect();
    let running: Vec<_> = (0..20)
        .map(|_| {
            bench
                .call(&["{}/src/a", "{}/dst/x"])
                .knob("PLAN", &plan.join(";"))
                .knob("STATE", "{}/state")
                .start()
        })
        .collect();
    let mut codes: Vec<i32> = running.into_iter().map(|run| run.finish().rc()).collect();
    codes.sort_unstable();
    assert_eq!(codes, (10..30).collect::<Vec<_>>());
}

#[test]
fn failure_rate() {
    let bench = Bench::with_source(10);
    let codes = |seed: &str, state: &str| -> Vec<i32> {
        (0..20)
            .map(|_| {
                bench
                    .call(&["-f", "{}/src/a", "{}/dst/x"])
                    .knob("FAIL_RATE", "0.5")
                    .knob("FAIL_SET", "rc:3;rc:4")
                    .knob("SEED", seed)
                    .knob("STATE", state)
                    .run()
                    .rc()
            })
            .collect()
    };
    let first = codes("42", "{}/state-1");
    assert_eq!(first, codes("42", "{}/state-2"));
    for code in [0, 3, 4] {
        assert!(first.contains(&code), "{first:?}");
    }
    let never = bench
        .call(&["-f", "{}/src/a", "{}/dst/x"])
        .knob("FAIL_RATE", "0")
        .run();
    never.expect(0, &[]);
}

#[test]
fn mistakes_in_knobs_are_reported() {
    let bench = Bench::with_source(10);
    for (name, value) in [
        ("PLAN", "stal@5%"),
        ("PLAN", "ok;stal"),
        ("PLAN", "ok;exists"),
        ("POLL", "soon"),
        ("HOSTS", "siteb"),
        ("REMOTE", "yes"),
        ("FAIL_RATE", "2"),
        ("PLANN", "ok"),
        ("LOG", "{}/none/log"),
    ] {
        bench
            .call(&["{}/src/a", "{}/dst/x"])
            .knob(name, value)
            .run()
            .expect(99, &["DOUBLE: "]);
    }
}

#[test]
fn knobs_from_a_file_beside_the_program_as_called() {
    let bench = Bench::with_source(10);
    fs::create_dir(bench.path("bin")).unwrap();
    let link = bench.path("bin/bbcp");
    symlink(DOUBLE, &link).unwrap();
    bench.write(
        "bin/bbcp-double.env",
        b"# what the worker meets\n\nBBCP_DOUBLE_PLAN=exists;rc:9:a=b\nBBCP_DOUBLE_VERSION=1\n",
    );
    let run = || bench.call_program(&link, &["{}/src/a", "{}/dst/x"]).run();
    run().expect(22, &["already exists."]);
    run().expect(9, &["a=b"]);
    assert!(bench.exists("bin/bbcp-double.state"));
    // The environment has precedence.
    bench
        .call_program(&link, &["{}/src/a", "{}/dst/x"])
        .knob("PLAN", "ok")
        .run()
        .expect(0, &[]);
    bench.write("bin/bbcp-double.env", b"PLAN=exists\n");
    run().expect(
        99,
        &["DOUBLE: bbcp-double.env has a line that is not a knob: PLAN=exists"],
    );
}
