//! Copies that reach their end: names, several files, existing targets, output, modes.

use super::{A, After, BIG, Before, Case, Step};

pub(super) const CASES: &[Case] = &[
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
