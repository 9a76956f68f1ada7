//! Conformance of the double with the real bbcp: one table of cases, which always runs on the double, and also on the
//! real program if `BBCP_REAL` names one.
//!
//! The tests compare the exit code (a set if the real program has a race), patterns in the output, and the files at the
//! target. All cases are local, because ssh to this machine may be impossible.

mod checksums;
mod command_line;
mod copies;
mod interruptions;

use nix::sys::signal::Signal;
use regex::Regex;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{Bench, DOUBLE, content, usual_mode};

const MD5_OF_HELLO: &str = "5d41402abc4b2a76b9719d911017c592";
const NO_MD5: &str = "00000000000000000000000000000000";

/// A file before the first step.
#[derive(Clone, Copy)]
enum Before {
    /// A file of this many bytes, by seed
    File(&'static str, usize, u64),
    /// A file with this text
    Text(&'static str, &'static str),
    /// The file's mode
    Mode(&'static str, u32),
}

/// A file after the last step.
#[derive(Clone, Copy)]
enum After {
    /// Equal to this source, with the usual mode
    Copied(&'static str, &'static str),
    /// Missing
    Absent(&'static str),
    /// Exactly this text
    Text(&'static str, &'static str),
    /// This mode
    Mode(&'static str, u32),
    /// Partial: mode 0200, shorter than the source and a prefix of it
    Partial(&'static str, &'static str),
    /// Size in bytes
    Size(&'static str, u64),
    /// Number of entries in the directory
    Entries(&'static str, usize),
}

/// One command line and its expected effect.
struct Step {
    /// `{}` stands for the directory of the test
    arguments: &'static [&'static str],
    /// Send SIGTERM to the process group when this file has begun to grow
    killed_at: Option<&'static str>,
    /// Before the step, a target file and its checkpoint in `ckp` are renamed
    renamed: Option<(&'static str, &'static str)>,
    /// Possible exit codes
    codes: &'static [i32],
    /// Patterns that each match in standard error (multi-line mode, `{}` as above)
    stderr: &'static [&'static str],
    /// Patterns that do not match in standard error
    not_stderr: &'static [&'static str],
    /// Pattern that matches the whole standard output
    stdout: &'static str,
}

impl Step {
    const fn new(arguments: &'static [&'static str]) -> Self {
        Self {
            arguments,
            killed_at: None,
            renamed: None,
            codes: &[0],
            stderr: &[],
            not_stderr: &[],
            stdout: "^$",
        }
    }

    const fn killed_at(mut self, file: &'static str) -> Self {
        self.killed_at = Some(file);
        self.codes = &[128 + 15];
        self
    }

    const fn renamed(mut self, from: &'static str, to: &'static str) -> Self {
        self.renamed = Some((from, to));
        self
    }

    const fn codes(mut self, codes: &'static [i32]) -> Self {
        self.codes = codes;
        self
    }

    const fn stderr(mut self, patterns: &'static [&'static str]) -> Self {
        self.stderr = patterns;
        self
    }

    const fn silent(mut self) -> Self {
        self.stderr = &["^$"];
        self.not_stderr = &["."];
        self
    }

    const fn without(mut self, patterns: &'static [&'static str]) -> Self {
        self.not_stderr = patterns;
        self
    }

    const fn stdout(mut self, pattern: &'static str) -> Self {
        self.stdout = pattern;
        self
    }
}

struct Case {
    name: &'static str,
    before: &'static [Before],
    steps: &'static [Step],
    after: &'static [After],
}

const A: Before = Before::File("src/a", 300_000, 1);
const BIG: Before = Before::File("src/a", 3_000_000, 1);
const USAGE: &str = "^Usage: ";

/// All cases.
fn cases() -> Vec<&'static Case> {
    [
        copies::CASES,
        command_line::CASES,
        checksums::CASES,
        interruptions::CASES,
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl Case {
    fn run(&self, program: &Path) {
        let bench = Bench::new();
        bench.write("list", b"another source\n");
        for before in self.before {
            match before {
                Before::File(name, size, seed) => bench.write(name, &content(*size, *seed)),
                Before::Text(name, text) => bench.write(name, text.as_bytes()),
                Before::Mode(name, mode) => {
                    use std::os::unix::fs::PermissionsExt;
                    std::fs::set_permissions(
                        bench.path(name),
                        std::fs::Permissions::from_mode(*mode),
                    )
                    .unwrap();
                }
            }
        }
        for step in self.steps {
            self.run_step(step, &bench, program);
        }
        for after in self.after {
            self.check(after, &bench);
        }
    }

    fn run_step(&self, step: &Step, bench: &Bench, program: &Path) {
        let name = format!("{} [{}]", self.name, step.arguments.join(" "));
        if let Some((from, to)) = step.renamed {
            let rename = |from: PathBuf, to: PathBuf| std::fs::rename(from, to).unwrap();
            rename(
                bench.path(&format!("dst/{from}")),
                bench.path(&format!("dst/{to}")),
            );
            for entry in std::fs::read_dir(bench.path("ckp")).unwrap() {
                let checkpoint = entry.unwrap().file_name().into_string().unwrap();
                let stem = checkpoint.strip_suffix(from).unwrap();
                rename(
                    bench.path(&format!("ckp/{checkpoint}")),
                    bench.path(&format!("ckp/{stem}{to}")),
                );
            }
        }
        let mut running = bench.call_program(program, step.arguments).start();
        if let Some(file) = step.killed_at {
            running.await_size(file, 1);
            running.signal_group(Signal::SIGTERM);
        }
        let outcome = running.finish();
        let stderr = outcome.stderr();
        assert!(
            step.codes.contains(&outcome.rc()),
            "{name}: code {} is not in {:?}\n{stderr}",
            outcome.rc(),
            step.codes
        );
        let pattern = |text: &str| {
            let here = regex::escape(bench.root().to_str().unwrap());
            let text = text
                .replace("{}", &here)
                .replace("NONE", NO_MD5)
                .replace("HELLO", MD5_OF_HELLO);
            Regex::new(&format!("(?m){text}")).unwrap()
        };
        for wanted in step.stderr {
            assert!(
                pattern(wanted).is_match(&stderr),
                "{name}: no {wanted} in\n{stderr}"
            );
        }
        for unwanted in step.not_stderr {
            assert!(
                !pattern(unwanted).is_match(&stderr),
                "{name}: {unwanted} in\n{stderr}"
            );
        }
        let whole = pattern(step.stdout).as_str().replacen("(?m)", "", 1);
        assert!(
            Regex::new(&whole).unwrap().is_match(&outcome.stdout),
            "{name}: standard output is {:?}",
            outcome.stdout
        );
    }

    fn check(&self, after: &After, bench: &Bench) {
        let name = self.name;
        match after {
            After::Copied(target, source) => {
                assert!(
                    bench.read(target) == bench.read(source),
                    "{name}: {target} differs"
                );
                assert_eq!(bench.mode(target), usual_mode(), "{name}: mode of {target}");
            }
            After::Absent(target) => assert!(!bench.exists(target), "{name}: {target} is there"),
            After::Text(target, text) => {
                assert_eq!(bench.read(target), text.as_bytes(), "{name}: {target}");
            }
            After::Mode(target, mode) => {
                assert_eq!(bench.mode(target), *mode, "{name}: mode of {target}");
            }
            After::Partial(target, source) => {
                assert_eq!(bench.mode(target), 0o200, "{name}: mode of {target}");
                let (partial, whole) = (bench.read(target), bench.read(source));
                assert!(
                    !partial.is_empty() && partial.len() < whole.len(),
                    "{name}: {} bytes in {target}",
                    partial.len()
                );
                assert!(
                    whole.starts_with(&partial),
                    "{name}: {target} is not a prefix"
                );
            }
            After::Size(target, size) => assert_eq!(bench.size(target), *size, "{name}: {target}"),
            After::Entries(directory, count) => {
                let entries = std::fs::read_dir(bench.path(directory)).unwrap().count();
                assert_eq!(entries, *count, "{name}: entries in {directory}");
            }
        }
    }
}

/// Runs all cases concurrently, since they wait most of their time.
fn run_all(program: &Path) {
    let cases = cases();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    case.run(program);
                }
            });
        }
    });
}

#[test]
fn the_double_conforms() {
    run_all(Path::new(DOUBLE));
}

#[test]
fn the_real_bbcp_conforms() {
    match std::env::var_os("BBCP_REAL") {
        Some(real) => run_all(&PathBuf::from(real)),
        // Written directly, since the test harness hides the output of a passing test.
        None => writeln!(std::io::stderr(), "skipped: BBCP_REAL not set").unwrap(),
    }
}
