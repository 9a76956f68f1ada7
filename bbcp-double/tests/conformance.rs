//! The double may not drift from the real bbcp: one table of cases, which is run against the double always
//! and against the real binary when `BBCP_REAL` names one.
//!
//! Of each case are compared the exit code (a set where the real one races), patterns in the output, and what
//! is left at the target. All cases are local, because ssh to this machine cannot be taken for granted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failing test has to stop"
)]

mod support;

use nix::sys::signal::Signal;
use regex::Regex;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Bench, DOUBLE, content, usual_mode};

const MD5_OF_HELLO: &str = "5d41402abc4b2a76b9719d911017c592";
const NO_MD5: &str = "00000000000000000000000000000000";

/// What is there before.
#[derive(Clone, Copy)]
enum Before {
    /// A file of so many bytes, by seed
    File(&'static str, usize, u64),
    /// A file with this text
    Text(&'static str, &'static str),
    /// The file's mode
    Mode(&'static str, u32),
}

/// What is there afterwards.
#[derive(Clone, Copy)]
enum After {
    /// Equal to this source, with the usual mode
    Copied(&'static str, &'static str),
    /// Not there
    Absent(&'static str),
    /// Exactly this text
    Text(&'static str, &'static str),
    /// This mode
    Mode(&'static str, u32),
    /// Begun: mode 0200, shorter than the source and a prefix of it
    Partial(&'static str, &'static str),
    /// Of so many bytes
    Size(&'static str, u64),
    /// So many entries in the directory
    Entries(&'static str, usize),
}

/// One command line and what it does.
struct Step {
    /// `{}` is the test's directory
    arguments: &'static [&'static str],
    /// TERM the process group when this file has begun to grow
    killed_at: Option<&'static str>,
    /// Before: a target file and its checkpoint in `ckp` get another name
    renamed: Option<(&'static str, &'static str)>,
    /// Possible exit codes
    codes: &'static [i32],
    /// Each matches in standard error (multi-line mode, `{}` as above)
    stderr: &'static [&'static str],
    /// None matches in standard error
    not_stderr: &'static [&'static str],
    /// Matches standard output as a whole
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

const CASES: &[Case] = &[
    Case {
        name: "plain copy",
        before: &[A],
        steps: &[Step::new(&["{}/src/a", "{}/dst/x"]).silent()],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "into a directory",
        before: &[A],
        steps: &[Step::new(&["{}/src/a", "{}/dst"]).silent()],
        after: &[After::Copied("dst/a", "src/a")],
    },
    Case {
        name: "relative names",
        before: &[A],
        steps: &[Step::new(&["src/a", "dst/x"]).silent()],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "several sources",
        before: &[A, Before::Text("src/b", "hello")],
        steps: &[Step::new(&["-v", "{}/src/a", "{}/src/b", "{}/dst"]).stderr(&[
            r"^File {}/dst/a created; 300000 bytes at [\d.]+ [KMG]?B/s$",
            r"^File {}/dst/b created; 5 bytes at ",
            r"^2 files copied at effectively [\d.]+ [KMG]?B/s$",
        ])],
        after: &[After::Copied("dst/a", "src/a"), After::Copied("dst/b", "src/b")],
    },
    Case {
        name: "several sources need a directory",
        before: &[A, Before::Text("src/b", "hello")],
        steps: &[Step::new(&["{}/src/a", "{}/src/b", "{}/dst/new"])
            .codes(&[2])
            .stderr(&[r"^bbcp: Target directory {}/dst/new not found\.$"])],
        after: &[After::Absent("dst/new")],
    },
    Case {
        name: "-A makes it",
        before: &[A, Before::Text("src/b", "hello")],
        steps: &[Step::new(&["-A", "{}/src/a", "{}/src/b", "{}/dst/new"]).silent()],
        after: &[
            After::Copied("dst/new/a", "src/a"),
            After::Copied("dst/new/b", "src/b"),
        ],
    },
    Case {
        name: "-A does nothing for one source",
        before: &[A],
        steps: &[Step::new(&["-A", "{}/src/a", "{}/dst/new/x"])
            .codes(&[2])
            .stderr(&["^bbcp: Target directory {}/dst/new/x not found"])],
        after: &[After::Absent("dst/new")],
    },
    Case {
        name: "-I list",
        before: &[A, Before::Text("list", "src/a\n")],
        steps: &[Step::new(&["-I", "list", "{}/dst/x"]).silent()],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-I without its list",
        before: &[],
        steps: &[Step::new(&["-I", "{}/none", "{}/dst"])
            .codes(&[2])
            .stderr(&["^bbcp: No such file or directory opening {}/none$"])],
        after: &[],
    },
    Case {
        name: "-v",
        before: &[A],
        steps: &[Step::new(&["-v", "{}/src/a", "{}/dst/x"]).stderr(&[
            r"^bbcp: Host \S+ redirect connection to \S+ \S+$",
            r"^File {}/dst/x created; 300000 bytes at [\d.]+ [KMG]?B/s$",
            r"^1 file copied at effectively [\d.]+ [KMG]?B/s$",
        ])],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-v -n does not look for names",
        before: &[A],
        steps: &[Step::new(&["-v", "-n", "{}/src/a", "{}/dst/x"])
            .stderr(&["^File {}/dst/x created"])
            .without(&["redirect"])],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-V",
        before: &[A],
        steps: &[Step::new(&["-V", "{}/src/a", "{}/dst/x"]).stderr(&[
            r"^Source \S+ using initial send window of \d+$",
            r"^Target \S+ using initial recv window of \d+$",
            r"^bbcp: Creating {}/dst/x$",
            r"^File {}/dst/x created; 300000 bytes at ",
            r"^\d+ buffers used with \d+ reorders; peaking at \d+\.$",
            r"^Source cpu=\d+\.\d{3} \(sys=\d+\.\d{3} usr=\d+\.\d{3}\)\.$",
            r"^Target cpu=\d+\.\d{3} \(sys=\d+\.\d{3} usr=\d+\.\d{3}\)\.$",
            r"^1 file copied at effectively ",
        ])],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-P and -x",
        before: &[BIG],
        steps: &[Step::new(&["-P", "2", "-x", "1m", "{}/src/a", "{}/dst/x"])
            .stderr(&[
                r"^bbcp: Creating {}/dst/x$",
                r"^bbcp: \d{6} \d\d:\d\d:\d\d  \d+% done; [\d.]+ [KM]B/s$",
            ])
            .without(&["avg", "created"])],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-P and -v",
        before: &[BIG],
        steps: &[
            Step::new(&["-P", "2", "-v", "-x", "1m", "{}/src/a", "{}/dst/x"]).stderr(&[
                r"^bbcp: \d{6} \d\d:\d\d:\d\d  \d+% done; [\d.]+ [KM]B/s, avg [\d.]+ [KM]B/s$",
                r"^File {}/dst/x created; 3000000 bytes at (1\.[01] M|[3-9]\d\d\.\d K|10\d\d\.\d K)B/s$",
            ]),
        ],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "target exists",
        before: &[A, Before::Text("dst/x", "old")],
        steps: &[Step::new(&["{}/src/a", "{}/dst/x"])
            .codes(&[22])
            .stderr(&[r"^bbcp: File {}/dst/x already exists\.$"])],
        after: &[After::Text("dst/x", "old")],
    },
    Case {
        name: "target exists, -O",
        before: &[A, Before::Text("dst/x", "old")],
        steps: &[Step::new(&["-O", "{}/src/a", "{}/dst/x"]).silent()],
        after: &[After::Text("dst/x", "old")],
    },
    Case {
        name: "target exists, -O -v",
        before: &[A, Before::Text("dst/x", "old")],
        steps: &[Step::new(&["-Ov", "{}/src/a", "{}/dst/x"])
            .stderr(&[r"^bbcp: Skipping {}/dst/x already exists\.$"])
            .without(&["copied"])],
        after: &[After::Text("dst/x", "old")],
    },
    Case {
        name: "target exists, -f",
        before: &[A, Before::File("dst/x", 999_999, 2), Before::Mode("dst/x", 0o440)],
        steps: &[Step::new(&["-f", "{}/src/a", "{}/dst/x"]).silent()],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-f unlinks first: a failure has destroyed the earlier file",
        before: &[BIG, Before::Text("dst/x", "old")],
        steps: &[Step::new(&["-f", "-t", "1", "-x", "1m", "{}/src/a", "{}/dst/x"])
            .codes(&[128])
            .stderr(&["^bbcp: Time limit exceeded$"])],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "-f -K truncates in place",
        before: &[A, Before::Text("dst/x", "old")],
        steps: &[Step::new(&["-f", "-K", "{}/src/a", "{}/dst/x"]).silent()],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "source missing",
        before: &[],
        steps: &[Step::new(&["{}/src/nope", "{}/dst/x"])
            .codes(&[2])
            .stderr(&["^bbcp: No such file or directory processing {}/src/nope$"])],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "source is a directory",
        before: &[A],
        steps: &[Step::new(&["{}/src", "{}/dst/x"])
            .codes(&[2])
            .stderr(&[r"^bbcp: {}/src is a directory\.$"])],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "target directory missing",
        before: &[A],
        steps: &[Step::new(&["{}/src/a", "{}/no/x"])
            .codes(&[2])
            .stderr(&["^bbcp: Target directory {}/no/x not found$"])],
        after: &[After::Absent("no")],
    },
    Case {
        name: "a bare new name is in no known file system",
        before: &[A],
        steps: &[Step::new(&["{}/src/a", "newname"])
            .codes(&[2])
            .stderr(&["^bbcp: Target directory newname is not in a known file system$"])],
        after: &[After::Absent("newname")],
    },
    Case {
        name: "no arguments",
        before: &[],
        steps: &[Step::new(&[])
            .codes(&[1])
            .stderr(&[r"^bbcp: Copy arguments not specified\.$"])
            .stdout(USAGE)],
        after: &[],
    },
    Case {
        name: "no operands",
        before: &[],
        steps: &[Step::new(&["-v"])
            .codes(&[1])
            .stderr(&[r"^bbcp: Copy source not specified\.$"])
            .stdout(USAGE)],
        after: &[],
    },
    Case {
        name: "one operand",
        before: &[A],
        steps: &[Step::new(&["{}/src/a"])
            .codes(&[1])
            .stderr(&[r"^bbcp: Copy target not specified\.$"])
            .stdout(USAGE)],
        after: &[],
    },
    Case {
        name: "unknown options and missing values",
        before: &[A],
        steps: &[
            Step::new(&["-Q", "a", "b"])
                .codes(&[255])
                .stderr(&[r"^bbcp: Invalid option, '-Q'\.$"])
                .stdout(USAGE),
            Step::new(&["--nonsense", "a", "b"])
                .codes(&[255])
                .stderr(&[r"^bbcp: Invalid option, '-'\.$"])
                .stdout(USAGE),
            Step::new(&["-", "a", "b"])
                .codes(&[255])
                .stderr(&[r"^bbcp: Option letter missing after '-'\.$"])
                .stdout(USAGE),
            Step::new(&["-s"])
                .codes(&[255])
                .stderr(&[r"^bbcp: Value not specified for '-s'\.$"])
                .stdout(USAGE),
            Step::new(&["-s", "-v", "{}/src/a", "{}/dst/x"])
                .codes(&[255])
                .stderr(&[r"^bbcp: Value not specified for '-s'\.$"])
                .stdout(USAGE),
            Step::new(&["u@foo", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Missing host name for user u$"])
                .stdout(USAGE),
        ],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "values out of range",
        before: &[A],
        steps: &[
            Step::new(&["-s", "65", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid streams - 65$"]),
            Step::new(&["-s", "0", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid streams - 0$"]),
            Step::new(&["-s16", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid streams - a$"]),
            Step::new(&["--verb", "--str", "65", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid streams - 65$"]),
            Step::new(&["-P", "0", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid seconds - 0$"]),
            Step::new(&["-w", "1k", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid window size - 1k$"]),
            Step::new(&["-x", "2g", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid transfer rate - 2g$"]),
            Step::new(&["-t", "1h", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid time limit - 1h$"]),
            Step::new(&["-y", "x", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid sync option - x$"]),
            Step::new(&["-m", "9", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid mode - 9$"]),
            Step::new(&["-c", "10", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid compression level - 10$"]),
            Step::new(&["-q", "300", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid qos - 300$"]),
            Step::new(&["-u", "x", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid unbuffered options - x$"]),
            Step::new(&["-B", "1", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid block size - 1$"]),
            Step::new(&["-b", "0", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid blocking factor - 0$"]),
            Step::new(&["-U", "5", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid forced window size - 5$"]),
            Step::new(&["-4", "q", "a", "b"]).codes(&[1]).stderr(&["^bbcp: Invalid ipv4 options - q$"]),
            Step::new(&["-Z", "foo", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid port number - foo$"]),
            Step::new(&["-E", "sha256", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid checksum type - sha256$"]),
            Step::new(&["-E", "%", "a", "b"])
                .codes(&[1])
                .stderr(&[r"^bbcp: Checksum type not specified\.$"]),
            Step::new(&["-E", "md5=00", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid md5 checksum value - 00$"]),
        ],
        after: &[],
    },
    Case {
        name: "options that exclude each other",
        before: &[A],
        steps: &[
            Step::new(&["-a", "-E", "md5=", "a", "b"])
                .codes(&[1])
                .stderr(&[r"^bbcp: -a and -E \.\.\.= are mutually exclusive\.$"]),
            Step::new(&["-k", "-K", "a", "b"])
                .codes(&[1])
                .stderr(&[r"^bbcp: -k and -K are mutually exclusive\.$"]),
        ],
        after: &[],
    },
    Case {
        name: "version",
        before: &[],
        steps: &[Step::new(&["-#"]).silent().stdout(r"^17\.12\.00\.00\.0\n$")],
        after: &[],
    },
    Case {
        name: "help",
        before: &[],
        steps: &[Step::new(&["-h"]).silent().stdout(USAGE)],
        after: &[],
    },
    Case {
        name: "-- is an option that does nothing",
        before: &[A],
        steps: &[Step::new(&["-v", "-4", "--", "-n", "{}/src/a", "{}/dst/x"]).stderr(&["^File "])],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "empty file",
        before: &[Before::Text("src/e", "")],
        steps: &[Step::new(&["-v", "{}/src/e", "{}/dst/x"])
            .stderr(&[r"^File {}/dst/x created; 0 bytes at 0\.0 B/s$"])
            .without(&["effectively"])],
        after: &[After::Copied("dst/x", "src/e")],
    },
    Case {
        name: "names with blanks and beyond ASCII",
        before: &[Before::Text("src/a b", "hello"), Before::Text("src/ünï", "hello")],
        steps: &[
            Step::new(&["-v", "{}/src/a b", "{}/dst/x y"])
                .stderr(&["^File {}/dst/x y created; 5 bytes at "]),
            Step::new(&["-v", "{}/src/ünï", "{}/dst/ünï"])
                .stderr(&["^File {}/dst/ünï created; 5 bytes at "]),
        ],
        after: &[
            After::Copied("dst/x y", "src/a b"),
            After::Copied("dst/ünï", "src/ünï"),
        ],
    },
    Case {
        name: "-E md5 on standard output, error, and into a file",
        before: &[Before::Text("src/h", "hello")],
        steps: &[
            Step::new(&["-E", "md5=/dev/stdout", "{}/src/h", "{}/dst/1"])
                .silent()
                .stdout("^Checksum: md5 5d41402abc4b2a76b9719d911017c592 [^:]+:{}/dst/1\n$"),
            Step::new(&["-E", "md5=", "{}/src/h", "{}/dst/2"])
                .stderr(&["^Checksum: md5 5d41402abc4b2a76b9719d911017c592 [^:]+:{}/dst/2$"]),
            Step::new(&["-E", "%md5=", "{}/src/h", "{}/dst/3"])
                .stderr(&["^Checksum: md5 5d41402abc4b2a76b9719d911017c592 [^:]+:{}/dst/3$"]),
            Step::new(&["-E", "md5={}/sums", "{}/src/h", "{}/dst/4"]).silent(),
            Step::new(&["-E", "md5={}/none/sums", "{}/src/h", "{}/dst/5"])
                .codes(&[2])
                .stderr(&["^bbcp: No such file or directory opening checksum file {}/none/sums$"]),
            Step::new(&["-E", "md5=/dev/stdout", "{}/src/h", "{}/dst/a b"])
                .silent()
                .stdout("^Checksum: md5 5d41402abc4b2a76b9719d911017c592 [^:]+:{}/dst/a\n$"),
        ],
        after: &[
            After::Copied("dst/1", "src/h"),
            After::Copied("dst/2", "src/h"),
            After::Copied("dst/3", "src/h"),
            After::Copied("dst/4", "src/h"),
            After::Copied("dst/a b", "src/h"),
            After::Absent("dst/5"),
        ],
    },
    Case {
        name: "the CRCs",
        before: &[Before::Text("src/n", "123456789")],
        steps: &[
            Step::new(&["-e", "-E", "c32c=/dev/stdout", "{}/src/n", "{}/dst/1"])
                .silent()
                .stdout("^Checksum: c32c e3069283 [^:]+:{}/dst/1\n$"),
            Step::new(&["-E", "c32z=/dev/stdout", "{}/src/n", "{}/dst/2"])
                .silent()
                .stdout("^Checksum: c32z cbf43926 "),
            Step::new(&["-E", "c32=/dev/stdout", "{}/src/n", "{}/dst/3"])
                .silent()
                .stdout("^Checksum: c32 377a6011 "),
            Step::new(&["-e", "{}/src/n", "{}/dst/4"]).silent(),
            Step::new(&["-E", "c32c", "{}/src/n", "{}/dst/5"]).silent(),
        ],
        after: &[After::Copied("dst/1", "src/n"), After::Copied("dst/5", "src/n")],
    },
    Case {
        name: "a given checksum that matches",
        before: &[Before::Text("src/h", "hello")],
        steps: &[
            Step::new(&["-E", "md5=5d41402abc4b2a76b9719d911017c592", "{}/src/h", "{}/dst/x"]).silent(),
        ],
        after: &[After::Copied("dst/x", "src/h")],
    },
    Case {
        name: "a given checksum that does not match, at both ends",
        before: &[Before::Text("src/h", "hello")],
        steps: &[
            Step::new(&["-e", "-E", "md5=00000000000000000000000000000000", "{}/src/h", "{}/dst/x"])
                // The real one ends with the code of whichever side it hears from first.
                .codes(&[172, 84])
                .stderr(&[
                    "^bbcp: {}/src/h source checksum NONE does not match HELLO$",
                    "^bbcp: {}/dst/x target checksum NONE does not match HELLO$",
                ]),
        ],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "a given checksum that does not match, at the target",
        before: &[Before::Text("src/h", "hello")],
        steps: &[
            Step::new(&["-E", "md5=00000000000000000000000000000000", "{}/src/h", "{}/dst/x"])
                .codes(&[172])
                .stderr(&["^bbcp: {}/dst/x target checksum NONE does not match HELLO$"])
                .without(&["source checksum"]),
        ],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "a given checksum that does not match, at the source: the target stays",
        before: &[Before::Text("src/h", "hello")],
        steps: &[
            Step::new(&["-E", "%md5=00000000000000000000000000000000", "{}/src/h", "{}/dst/x"])
                .codes(&[84])
                .stderr(&["^bbcp: {}/src/h source checksum NONE does not match HELLO$"])
                .without(&["target checksum"]),
        ],
        after: &[After::Copied("dst/x", "src/h")],
    },
    Case {
        name: "modes",
        before: &[Before::Text("src/h", "hello"), Before::Mode("src/h", 0o750)],
        steps: &[
            Step::new(&["-m", "600", "{}/src/h", "{}/dst/m"]).silent(),
            Step::new(&["-p", "{}/src/h", "{}/dst/p"]).silent(),
            Step::new(&["-~", "{}/src/h", "{}/dst/t"]).silent(),
            Step::new(&["-y", "d", "{}/src/h", "{}/dst/d"]).silent(),
            Step::new(&["-y", "dd", "{}/src/h", "{}/dst/dd"]).silent(),
        ],
        after: &[
            After::Mode("dst/m", 0o600),
            After::Mode("dst/p", 0o750),
            After::Copied("dst/t", "src/h"),
            After::Copied("dst/dd", "src/h"),
        ],
    },
    Case {
        name: "-t",
        before: &[BIG],
        steps: &[
            Step::new(&["-t", "1", "-x", "1m", "{}/src/a", "{}/dst/x"])
                .codes(&[128])
                .stderr(&["^bbcp: Time limit exceeded$"]),
            Step::new(&["-t", "1", "-k", "-x", "1m", "{}/src/a", "{}/dst/y"])
                .codes(&[128])
                .stderr(&["^bbcp: Time limit exceeded$"]),
        ],
        after: &[After::Absent("dst/x"), After::Partial("dst/y", "src/a")],
    },
    Case {
        name: "the group killed: a partial of mode 0200, which is then in the way",
        before: &[BIG],
        steps: &[
            Step::new(&["-x", "1m", "-o", "{}/src/a", "{}/dst/x"]).killed_at("dst/x"),
            Step::new(&["{}/src/a", "{}/dst/x"]).codes(&[22]).stderr(&[r"already exists\.$"]),
        ],
        after: &[After::Partial("dst/x", "src/a")],
    },
    Case {
        name: "-k, the group killed",
        before: &[BIG],
        steps: &[Step::new(&["-k", "-x", "1m", "{}/src/a", "{}/dst/x"]).killed_at("dst/x")],
        after: &[After::Partial("dst/x", "src/a")],
    },
    Case {
        name: "-a -k, the group killed, resumed",
        before: &[BIG],
        steps: &[
            Step::new(&["-a", "{}/ckp", "-k", "-P", "5", "-x", "1m", "{}/src/a", "{}/dst/x"])
                .killed_at("dst/x")
                .stderr(&["^bbcp: Appending to {}/dst/x at offset 0$"]),
            Step::new(&["-a", "{}/ckp", "-k", "-P", "5", "-v", "{}/src/a", "{}/dst/x"]).stderr(&[
                "^bbcp: Will try to complete copying {}/dst/x$",
                r"^bbcp: Appending to {}/dst/x at offset [1-9]\d+$",
                r"^File {}/dst/x created; [12]\d{6} bytes at ",
            ]),
        ],
        after: &[After::Copied("dst/x", "src/a"), After::Entries("ckp", 0)],
    },
    Case {
        // As the worker resumes: each attempt has a name of its own.
        name: "-a -k -e, the group killed, the partial renamed with its checkpoint, resumed",
        before: &[BIG],
        steps: &[
            Step::new(&["-e", "-E", "c32c", "-a", "{}/ckp", "-k", "-x", "1m", "{}/src/a", "{}/dst/x"])
                .killed_at("dst/x"),
            Step::new(&["-e", "-E", "c32c", "-a", "{}/ckp", "-k", "-P", "5", "{}/src/a", "{}/dst/y"])
                .renamed("x", "y")
                .stderr(&[r"^bbcp: Appending to {}/dst/y at offset [1-9]\d+$"]),
        ],
        after: &[
            After::Copied("dst/y", "src/a"),
            After::Absent("dst/x"),
            After::Entries("ckp", 0),
        ],
    },
    Case {
        name: "-a on a source that has changed",
        before: &[BIG],
        steps: &[
            Step::new(&["-a", "{}/ckp", "-k", "-x", "1m", "{}/src/a", "{}/dst/x"]).killed_at("dst/x"),
            // Another source under the same target name is a changed source.
            Step::new(&["-a", "{}/ckp", "-k", "{}/src/../list", "{}/dst/x"])
                .codes(&[22])
                .stderr(&[
                    r"^bbcp: Source file ' list ' on \S+ appears to have changed after the previous copy ended\.$",
                    "^bbcp: Cannot append to  x$",
                ]),
        ],
        after: &[After::Partial("dst/x", "src/a"), After::Entries("ckp", 1)],
    },
    Case {
        name: "-a, same size: skipped, whatever the content",
        before: &[A, Before::File("dst/x", 300_000, 2), Before::Mode("dst/x", 0o200)],
        steps: &[Step::new(&["-a", "{}/ckp", "{}/src/a", "{}/dst/x"]).stderr(&[
            r"^bbcp: File {}/dst/x appears to have already been copied; copy skipped\.$",
        ])],
        after: &[After::Size("dst/x", 300_000), After::Mode("dst/x", 0o644)],
    },
    Case {
        name: "-a, other size, no checkpoint",
        before: &[A, Before::Text("dst/x", "old")],
        steps: &[
            Step::new(&["-a", "{}/ckp", "{}/src/a", "{}/dst/x"]).codes(&[22]).stderr(&[
                r"^bbcp: File {}/dst/x changed since the copy completed; append not possible\.$",
            ]),
            Step::new(&["-a", "{}/ckp", "-f", "{}/src/a", "{}/dst/x"]).stderr(&[
                r"^bbcp: File {}/dst/x changed since the copy completed; copy restarting\.$",
            ]),
        ],
        after: &[After::Copied("dst/x", "src/a")],
    },
    Case {
        name: "-a, no checkpoint directory",
        before: &[A],
        steps: &[
            Step::new(&["-a", "{}/none", "{}/src/a", "{}/dst/x"]).codes(&[254, 128]).stderr(&[
                r"^bbcp: No such file or directory opening {}/none/bbcp\.\S+\.[0-9a-f]+\.x$",
            ]),
        ],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "the command line that the project uses",
        before: &[A],
        steps: &[Step::new(&[
            "-v", "-P", "10", "-s", "16", "-w", "8m", "-y", "dd", "-e", "-E", "c32c=/dev/stdout", "-n",
            "-Z", "5031:5099", "-S", "ssh -x %I -l %U %H /opt/bbcp", "-T", "ssh -x %I -l %U %H /opt/bbcp",
            "{}/src/a", "{}/dst/x",
        ])
        .stderr(&["^File {}/dst/x created; 300000 bytes at "])
        .stdout("^Checksum: c32c [0-9a-f]{8} [^:]+:{}/dst/x\n$")],
        after: &[After::Copied("dst/x", "src/a")],
    },
];

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
                assert!(whole.starts_with(&partial), "{name}: {target} is no prefix");
            }
            After::Size(target, size) => assert_eq!(bench.size(target), *size, "{name}: {target}"),
            After::Entries(directory, count) => {
                let entries = std::fs::read_dir(bench.path(directory)).unwrap().count();
                assert_eq!(entries, *count, "{name}: entries in {directory}");
            }
        }
    }
}

/// Runs all cases, several at a time: most of their time is spent waiting.
fn run_all(program: &Path) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while let Some(case) = CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
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
        // Past the test harness, which hides what a passing test prints.
        None => writeln!(std::io::stderr(), "skipped: BBCP_REAL not set").unwrap(),
    }
}
