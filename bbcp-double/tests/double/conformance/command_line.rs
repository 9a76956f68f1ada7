//! Command lines that are refused, and those that print a text.

use super::{A, After, Case, Step, USAGE};

pub(super) const CASES: &[Case] = &[
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
            Step::new(&["-s", "65", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid streams - 65$"]),
            Step::new(&["-s", "0", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid streams - 0$"]),
            Step::new(&["-s16", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid streams - a$"]),
            Step::new(&["--verb", "--str", "65", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid streams - 65$"]),
            Step::new(&["-P", "0", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid seconds - 0$"]),
            Step::new(&["-w", "1k", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid window size - 1k$"]),
            Step::new(&["-x", "2g", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid transfer rate - 2g$"]),
            Step::new(&["-t", "1h", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid time limit - 1h$"]),
            Step::new(&["-y", "x", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid sync option - x$"]),
            Step::new(&["-m", "9", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid mode - 9$"]),
            Step::new(&["-c", "10", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid compression level - 10$"]),
            Step::new(&["-q", "300", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid qos - 300$"]),
            Step::new(&["-u", "x", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid unbuffered options - x$"]),
            Step::new(&["-B", "1", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid block size - 1$"]),
            Step::new(&["-b", "0", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid blocking factor - 0$"]),
            Step::new(&["-U", "5", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid forced window size - 5$"]),
            Step::new(&["-4", "q", "a", "b"])
                .codes(&[1])
                .stderr(&["^bbcp: Invalid ipv4 options - q$"]),
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
];
