//! Checksums that are printed, compared and given.

use super::{After, Before, Case, Step};

pub(super) const CASES: &[Case] = &[
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
        after: &[
            After::Copied("dst/1", "src/n"),
            After::Copied("dst/5", "src/n"),
        ],
    },
    Case {
        name: "a given checksum that matches",
        before: &[Before::Text("src/h", "hello")],
        steps: &[Step::new(&[
            "-E",
            "md5=5d41402abc4b2a76b9719d911017c592",
            "{}/src/h",
            "{}/dst/x",
        ])
        .silent()],
        after: &[After::Copied("dst/x", "src/h")],
    },
    Case {
        name: "a given checksum that does not match, at both ends",
        before: &[Before::Text("src/h", "hello")],
        steps: &[Step::new(&[
            "-e",
            "-E",
            "md5=00000000000000000000000000000000",
            "{}/src/h",
            "{}/dst/x",
        ])
        // The exit code of the real program is that of the side that reports first.
        .codes(&[172, 84])
        .stderr(&[
            "^bbcp: {}/src/h source checksum NONE does not match HELLO$",
            "^bbcp: {}/dst/x target checksum NONE does not match HELLO$",
        ])],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "a given checksum that does not match, at the target",
        before: &[Before::Text("src/h", "hello")],
        steps: &[Step::new(&[
            "-E",
            "md5=00000000000000000000000000000000",
            "{}/src/h",
            "{}/dst/x",
        ])
        .codes(&[172])
        .stderr(&["^bbcp: {}/dst/x target checksum NONE does not match HELLO$"])
        .without(&["source checksum"])],
        after: &[After::Absent("dst/x")],
    },
    Case {
        name: "a given checksum that does not match, at the source: the target stays",
        before: &[Before::Text("src/h", "hello")],
        steps: &[Step::new(&[
            "-E",
            "%md5=00000000000000000000000000000000",
            "{}/src/h",
            "{}/dst/x",
        ])
        .codes(&[84])
        .stderr(&["^bbcp: {}/src/h source checksum NONE does not match HELLO$"])
        .without(&["target checksum"])],
        after: &[After::Copied("dst/x", "src/h")],
    },
];
