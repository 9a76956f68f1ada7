//! Options with behaviour specific to the double, and those without a case in the conformance table.

use crate::support::{Bench, DOUBLE};
use std::fs;
use std::time::{Duration, Instant, UNIX_EPOCH};

#[test]
fn options_without_effect_are_accepted() {
    let bench = Bench::with_source(1000);
    let outcome = bench
        .call(&[
            "-z",
            "-n",
            "-o",
            "-F",
            "-Z",
            "5031:5099",
            "-S",
            "ssh %H /opt/bbcp",
            "-T",
            "ssh %H /opt/bbcp",
            "-i",
            "id",
            "-B",
            "1m",
            "-b",
            "+2",
            "-U",
            "64k",
            "-q",
            "1",
            "-c",
            "1",
            "-u",
            "st",
            "-l",
            "log",
            "-w",
            "=8m",
            "-W",
            "1m",
            "-4",
            "t",
            "{}/src/a",
            "{}/dst/x",
        ])
        .run();
    outcome.expect(0, &[]);
    assert_eq!(outcome.stderr(), "");
    assert!(bench.read("dst/x") == bench.read("src/a"));
}

#[test]
fn long_options() {
    let bench = Bench::with_source(1000);
    bench
        .call(&[
            "--streams",
            "16",
            "--progress",
            "5",
            "--force",
            "--verb",
            "--nodns",
            "--sync",
            "dd",
            "--windowsz",
            "1m",
            "{}/src/a",
            "{}/dst/x",
        ])
        .run()
        .expect(
            0,
            &["bbcp: Creating {}/dst/x"
                .replace("{}", bench.root().to_str().unwrap())
                .as_str()],
        );
    bench
        .call(&["--streams"])
        .run()
        .expect(255, &["bbcp: Value not specified for '--streams'."]);
}

#[test]
fn unsupported_options_are_unknown() {
    let bench = Bench::with_source(10);
    for letter in [
        "r", "R", "d", "N", "L", "D", "C", "@", "+", "^", "$", "g", "Q",
    ] {
        let text = format!("bbcp: Invalid option, '-{letter}'.");
        bench
            .call(&[&format!("-{letter}"), "{}/src/a", "{}/dst/x"])
            .run()
            .expect(255, &[&text]);
    }
    bench
        .call(&["-E", "a32=", "{}/src/a", "{}/dst/x"])
        .run()
        .expect(1, &["bbcp: Invalid checksum type - a32"]);
}

#[test]
fn options_end_at_the_first_operand() {
    let bench = Bench::with_source(10);
    bench
        .call(&["{}/src/a", "-v", "{}/dst"])
        .run()
        .expect(2, &["bbcp: No such file or directory processing -v"]);
}

#[test]
fn the_last_repetition_wins() {
    let bench = Bench::with_source(1000);
    let outcome = bench
        .call(&[
            "-E",
            "md5=",
            "-E",
            "c32c=/dev/stdout",
            "-m",
            "600",
            "-m",
            "640",
            "{}/src/a",
            "{}/dst/x",
        ])
        .run();
    outcome.expect(0, &[]);
    assert!(outcome.stdout.starts_with("Checksum: c32c "));
    assert_eq!(bench.mode("dst/x"), 0o640);
}

#[test]
fn forced_copy_onto_itself_loses_the_file() {
    let bench = Bench::with_source(1000);
    let outcome = bench.call(&["-f", "{}/src/a", "{}/src/a"]).run();
    assert_ne!(outcome.rc(), 0);
    assert!(!bench.exists("src/a"));
}

#[test]
fn times_are_kept() {
    let bench = Bench::with_source(1000);
    let past = UNIX_EPOCH + Duration::from_secs(1_577_836_800);
    fs::File::options()
        .write(true)
        .open(bench.path("src/a"))
        .unwrap()
        .set_modified(past)
        .unwrap();
    for option in ["-p", "-~"] {
        bench
            .call(&["-f", option, "{}/src/a", "{}/dst/x"])
            .run()
            .expect(0, &[]);
        let modified = fs::metadata(bench.path("dst/x"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(modified, past, "{option}");
    }
}

#[test]
fn x_paces() {
    let bench = Bench::with_source(400_000);
    let start = Instant::now();
    bench
        .call(&["-x", "1m", "{}/src/a", "{}/dst/x"])
        .run()
        .expect(0, &[]);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn names_that_are_not_utf8_are_refused() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let output = std::process::Command::new(DOUBLE)
        .arg(OsStr::from_bytes(b"/d/\xff"))
        .arg("/d/x")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(99));
}
