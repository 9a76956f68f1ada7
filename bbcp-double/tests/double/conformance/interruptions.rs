//! Copies that end early, and their continuation.

use super::{A, After, BIG, Before, Case, Step};

pub(super) const CASES: &[Case] = &[
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
        // The same steps as in the worker: each attempt has a name of its own.
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
            // Another source with the same target name counts as a changed source.
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
];
