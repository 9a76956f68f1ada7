//! The injections of a plan.

use crate::support::{Bench, content, eventually};
use regex::Regex;
use std::time::{Duration, Instant};

const SIZE: usize = 200_000;

/// State of `dst/x` afterwards.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Left {
    Nothing,
    Whole,
    /// Mode 0200, with this many bytes
    Partial(u64),
}

#[test]
fn copy_ends_as_injected() {
    // Plan, code, text in standard error, target.
    let table: &[(&str, i32, &str, Left)] = &[
        (
            "ok",
            0,
            "File {}/dst/x created; 200000 bytes at",
            Left::Whole,
        ),
        (
            "exists",
            22,
            "bbcp: File {}/dst/x already exists.",
            Left::Nothing,
        ),
        (
            "nosrc",
            2,
            "bbcp: No such file or directory processing {}/src/a\nbbcp: Broken pipe writing to stream.",
            Left::Nothing,
        ),
        (
            "srcperm",
            2,
            "bbcp: Permission denied processing {}/src/a\nbbcp: Broken pipe",
            Left::Nothing,
        ),
        (
            "srcdir",
            2,
            "bbcp: {}/src/a is a directory.\nbbcp: Broken pipe",
            Left::Nothing,
        ),
        (
            "nodir",
            2,
            "bbcp: Target directory {}/dst/x not found",
            Left::Nothing,
        ),
        (
            "dstperm",
            13,
            "bbcp: Permission denied opening {}/dst/x",
            Left::Nothing,
        ),
        (
            "enospc@40%",
            228,
            "bbcp: No space left on device writing {}/dst/x",
            Left::Nothing,
        ),
        (
            "nospace",
            28,
            "bbcp: Insufficient space to copy all the files from localhost",
            Left::Nothing,
        ),
        (
            "refused",
            255,
            "ssh: connect to host localhost port 22: Connection refused\nbbcp: bbcp unexpectedly terminated on localhost",
            Left::Nothing,
        ),
        (
            "timeout:0.05",
            255,
            "port 22: Connection timed out\nbbcp: bbcp unexpectedly",
            Left::Nothing,
        ),
        (
            "noresolve",
            255,
            "ssh: Could not resolve hostname localhost: Name or service not known",
            Left::Nothing,
        ),
        (
            "auth",
            255,
            "@localhost: Permission denied (publickey).\nbbcp: bbcp unexpectedly",
            Left::Nothing,
        ),
        (
            "hostkey",
            255,
            "Host key verification failed.\nbbcp: bbcp unexpectedly",
            Left::Nothing,
        ),
        (
            "nobbcp",
            255,
            "bash: line 1: bbcp: command not found\nbbcp: bbcp unexpectedly",
            Left::Nothing,
        ),
        (
            "nossh",
            255,
            "bbcp: No such file or directory executing ssh localhost\nbbcp: bbcp unexpectedly",
            Left::Nothing,
        ),
        (
            "banner",
            255,
            "bbcp: bbcp unexpectedly terminated on localhost",
            Left::Nothing,
        ),
        (
            "streams:1",
            2,
            "bbcp: Unable to allocate more than 1 of 4 data streams.",
            Left::Nothing,
        ),
        (
            "portbusy",
            255,
            "bbcp: Address already in use binding socket",
            Left::Nothing,
        ),
        (
            "reset@30%",
            128,
            "bbcp: Connection reset by peer reading data from localhost",
            Left::Nothing,
        ),
        ("segv-agent@100", 139, "", Left::Whole),
        ("kill@100", 137, "", Left::Whole),
        (
            "segv-sink@50%",
            255,
            "was killed via signal 11",
            Left::Partial(100_000),
        ),
        (
            "segv-sink@0",
            255,
            "was killed via signal 11",
            Left::Partial(0),
        ),
        ("segv-remote@7", 255, "", Left::Partial(7)),
        (
            "segv-remote:32@25%",
            32,
            "bbcp: Unexpected end of control stream from localhost",
            Left::Partial(50_000),
        ),
        (
            "skip",
            0,
            "bbcp: File {}/dst/x appears to have already been copied; copy skipped.",
            Left::Nothing,
        ),
        (
            "srcchanged@99%",
            128,
            "bbcp: Error -143808 writing {}/src/a",
            Left::Nothing,
        ),
        (
            "ckpchanged",
            22,
            "bbcp: Source file ' a ' on localhost appears to have changed after the previous copy ended.\nbbcp: Cannot append to  x",
            Left::Nothing,
        ),
        (
            "noappend",
            22,
            "bbcp: File {}/dst/x changed since the copy completed; append not possible.",
            Left::Nothing,
        ),
        ("timelimit", 128, "bbcp: Time limit exceeded", Left::Nothing),
        ("stall:0.05@10%", 0, "File {}/dst/x created", Left::Whole),
        ("rc:77", 77, "", Left::Nothing),
        ("rc:3:first\\nsecond", 3, "first\nsecond\n", Left::Nothing),
        (
            "noise:2+rc:5:why",
            5,
            "noise 1: not a line of bbcp's\nwhy",
            Left::Nothing,
        ),
        (
            "version-warn",
            0,
            "bbcp: Warning: localhost is running a newer version of bbcp",
            Left::Whole,
        ),
    ];
    for (plan, code, text, left) in table {
        let bench = Bench::with_source(SIZE);
        let outcome = bench.injected(plan).knob("ACCEPT", "0.05").run();
        outcome.expect(*code, &[&bench.fill(text)]);
        if *code > 128 && outcome.signal.is_some() {
            // The orphans of a dead agent complete their copy.
            eventually("the orphans' end", || {
                bench.exists("dst/x") && bench.mode("dst/x") != 0o200
            });
        }
        let found = match bench.exists("dst/x") {
            false => Left::Nothing,
            true if bench.mode("dst/x") == 0o200 => Left::Partial(bench.size("dst/x")),
            true => Left::Whole,
        };
        assert_eq!(found, *left, "{plan}");
        if found == Left::Whole {
            assert!(bench.read("dst/x") == bench.read("src/a"), "{plan}");
        }
        assert_eq!(outcome.stdout, "", "{plan}");
    }
}

#[test]
fn one_reset_line_per_stream() {
    let bench = Bench::with_source(SIZE);
    let outcome = bench
        .call(&["-s", "7", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "reset@1%")
        .run();
    outcome.expect(128, &[]);
    assert_eq!(outcome.stderr().matches("Connection reset").count(), 7);
}

#[test]
fn enospc_alternates_its_code_and_respects_k() {
    let bench = Bench::with_source(SIZE);
    let codes: Vec<i32> = (0..4)
        .map(|_| {
            bench
                .injected("enospc@40%")
                .knob("STATE", "{}/state")
                .run()
                .rc()
        })
        .collect();
    assert_eq!(codes, [228, 128, 228, 128]);
    let outcome = bench
        .call(&["-k", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "enospc@40%")
        .run();
    outcome.expect(228, &[]);
    assert_eq!((bench.size("dst/x"), bench.mode("dst/x")), (80_000, 0o200));
}

#[test]
fn a_remote_source_shows_connection_failures_otherwise() {
    let bench = Bench::with_source(SIZE);
    for (plan, line) in [
        (
            "refused",
            "ssh: connect to host far port 22: Connection refused",
        ),
        ("auth", "me@far: Permission denied (publickey)."),
        ("nobbcp", "bash: line 1: bbcp: command not found"),
        ("banner", ""),
    ] {
        let outcome = bench
            .call(&["-s", "8", "me@far:{}/src/a", "{}/dst/x"])
            .knob("PLAN", plan)
            .knob("ACCEPT", "0.05")
            .run();
        let accept = "bbcp: Accept timed out on port 5031\n\
                      bbcp: Unable to allocate more than 0 of 8 data streams.";
        outcome.expect(2, &[line, accept]);
    }
}

#[test]
fn accept_waits_for_its_time_limit() {
    let bench = Bench::with_source(10);
    let start = Instant::now();
    let outcome = bench
        .call(&["-a", "{}/ckp", "-A", "{}/src/a", "{}/dst/x"])
        .knob("ACCEPT", "0.3")
        .run();
    outcome.expect(2, &["bbcp: Accept timed out on port 5031"]);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn silent_damage_is_not_reported() {
    let whole = content(SIZE, 1);
    for (plan, damaged) in [
        ("corrupt:5", {
            let mut damaged = whole.clone();
            damaged[5] ^= 0xff;
            damaged
        }),
        ("corrupt@100%", {
            let mut damaged = whole.clone();
            damaged[SIZE - 1] ^= 0xff;
            damaged
        }),
        ("short:3", whole[..SIZE - 3].to_vec()),
        ("long:2", [whole.as_slice(), &[0, 0]].concat()),
    ] {
        let bench = Bench::with_source(SIZE);
        let outcome = bench
            .call(&["-v", "-e", "-E", "c32c=/dev/stdout", "{}/src/a", "{}/dst/x"])
            .knob("PLAN", plan)
            .run();
        outcome.expect(0, &["created; 200000 bytes"]);
        assert!(outcome.stdout.starts_with("Checksum: c32c "));
        assert!(bench.read("dst/x") == damaged, "{plan}");
    }
}

#[test]
fn badsum() {
    let bench = Bench::new();
    bench.write("src/a", b"hello");
    let right = "md5=5d41402abc4b2a76b9719d911017c592";
    let both = bench
        .call(&["-e", "-E", right, "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "badsum")
        .run();
    both.expect(
        172,
        &[
            "source checksum 5d4",
            "target checksum 5d4",
            "does not match 0d4",
        ],
    );
    assert!(!bench.exists("dst/x"));
    let link = bench
        .call(&["-e", "-E", "c32c=/dev/stdout", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "badsum")
        .run();
    link.expect(172, &["xfr checksum error at offset 0"]);
    assert!(!bench.exists("dst/x"));
    let source = bench
        .call(&["-E", &format!("%{right}"), "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "badsum")
        .run();
    source.expect(84, &["source checksum 5d4"]);
    assert_eq!(bench.read("dst/x"), b"hello");
    let printed = bench
        .call(&["-f", "-E", "md5=/dev/stdout", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "badsum")
        .run();
    printed.expect(0, &[]);
    assert!(printed.stdout.starts_with("Checksum: md5 0d41402a"));
}

#[test]
fn junk_output() {
    let bench = Bench::with_source(SIZE);
    let run = |plan: &str| {
        let outcome = bench
            .call(&["-f", "-v", "-P", "2", "{}/src/a", "{}/dst/x"])
            .knob("PLAN", plan)
            .run();
        outcome.expect(0, &["File "]);
        outcome
    };
    assert_eq!(run("noise:500").stderr().matches("noise ").count(), 500);
    assert!(
        run("longline:70000")
            .stderr()
            .lines()
            .any(|line| line.len() == 70_000)
    );
    assert!(String::from_utf8(run("binary").stderr_bytes).is_err());
    assert_eq!(run("stdout-junk").stdout, "junk on standard output\n");
    let crlf = run("crlf").stderr();
    assert!(crlf.lines().count() > 3);
    assert!(
        crlf.split_terminator('\n').all(|line| line.ends_with('\r')),
        "{crlf:?}"
    );
    assert!(
        run("nan")
            .stderr()
            .contains("% done; -nan B/s, avg -nan B/s")
    );
    assert!(run("inf").stderr().contains("% done; inf B/s, avg inf B/s"));
    assert_eq!(run("flood:300").stderr().matches("% done; ").count(), 300);
    let streams = bench.injected("streams:3").knob("ACCEPT", "0").run();
    assert!(String::from_utf8(streams.stderr_bytes).is_err());
}

#[test]
fn progress_follows_the_tick() {
    let bench = Bench::with_source(SIZE);
    let line = Regex::new(
        r"^bbcp: \d{6} \d\d:\d\d:\d\d  (\d+)% done; ([\d.]+) ([KM]?)B/s, avg ([\d.]+) ([KM]?)B/s$",
    )
    .unwrap();
    let outcome = bench
        .call(&["-v", "-P", "10", "{}/src/a", "{}/dst/x"])
        .knob("TICK", "0.05")
        .knob("RATE", "400000")
        .run();
    outcome.expect(0, &[]);
    let percents: Vec<u32> = outcome
        .stderr()
        .lines()
        .filter_map(|text| line.captures(text)?[1].parse().ok())
        .collect();
    assert!(percents.len() >= 3, "{}", outcome.stderr());
    assert!(percents.is_sorted() && percents.iter().all(|percent| *percent <= 100));
}

#[test]
fn p_1_floods() {
    let bench = Bench::with_source(SIZE);
    let outcome = bench
        .call(&["-v", "-P", "1", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "stall:0.5@50%+ok")
        .run();
    outcome.expect(0, &[]);
    // A stalled copy prints nothing, so the flood needs a slow copy.
    let flood = bench
        .call(&["-f", "-v", "-P", "1", "{}/src/a", "{}/dst/x"])
        .knob("PLAN", "slow:200000")
        .run();
    flood.expect(0, &["done; -nan B/s, avg "]);
    assert!(flood.stderr().matches("% done").count() > 10);
}
