use std::collections::HashSet;
use std::io;

use rstest::rstest;

use super::*;

const NAMES: Names<'_> = Names {
    origin: "/d/checksum error, not specified.tar",
    copy: "/e/.t.part",
    program: "/opt/bbcp",
};

/// Code and rank of the failure that a line states.
fn of(line: &str) -> Option<(&'static str, u16)> {
    let found = PatternMatch::of_line(line, NAMES)?;
    Some((found.kind.code(), found.rank()))
}

fn code_of(line: &str) -> Option<&'static str> {
    of(line).map(|(code, _)| code)
}

#[rstest]
#[case("bash: line 1: /opt/bbcp: No such file or directory")]
#[case("-bash: /opt/bbcp: command not found")]
#[case("/bin/sh: 1: /opt/bbcp: not found")]
#[case("sh: 1: /opt/bbcp: Permission denied")]
#[case("zsh:1: command not found: /opt/bbcp")]
#[case("zsh:1: no such file or directory: /opt/bbcp")]
#[case("fish: Unknown command: /opt/bbcp")]
#[case("env: ‘/opt/bbcp’: No such file or directory")]
#[case("bbcp: Command not found.")]
fn shells_report_a_missing_bbcp(#[case] line: &str) {
    assert_eq!(code_of(line), Some("remote_program_missing"));
}

#[rstest]
#[case("cat: /etc/motd: No such file or directory")]
#[case("bash: line 1: /opt/module: No such file or directory")]
#[case("/root/.bashrc: line 3: /opt/bbcp: No such file or directory")]
#[case("bash: alias: /opt/bbcp: not found")]
#[case("No such file or directory")]
#[case("ls: cannot open directory '.': Permission denied")]
#[case("mount: Permission denied (nfs)")]
#[case("nc: Connection refused")]
#[case("Last login: Connection closed by a user")]
#[case("bash: line 1:  4711 Segmentation fault      fortune")]
#[case("Welcome! Broken pipe tobacco")]
#[case("bbcp: Warning: H is running a newer version of bbcp")]
#[case("exit code 255")]
#[case("signal 11")]
fn noise_is_not_a_failure(#[case] line: &str) {
    assert_eq!(of(line), None);
}

#[rstest]
#[case("bbcp: No such file or directory processing {}", "origin_missing")]
#[case("bbcp: Permission denied opening {}", "origin_unreadable")]
#[case("bbcp: {} is a directory.", "origin_not_a_file")]
fn text_of_a_path_is_ignored(#[case] line: &str, #[case] code: &str) {
    assert_eq!(code_of(&line.replace("{}", NAMES.origin)), Some(code));
}

#[rstest]
#[case("signal 11", Some("segfault"))]
#[case("exit code 139", Some("segfault"))]
#[case("exit code 255", Some("remote_died"))]
#[case("exit code 25", None)]
#[case("signal 9", None)]
fn exit_status_states_a_failure(#[case] status: &str, #[case] code: Option<&str>) {
    let found = PatternMatch::of_exit(status);
    assert_eq!(found.map(|found| found.kind.code()), code);
}

#[rstest]
#[case(
    "Connection closed by 10.0.0.1\nU@H: Permission denied (publickey).",
    Some("ssh_denied")
)]
#[case(
    "Host key verification failed.\r\nWrite failed: Broken pipe",
    Some("ssh_host_key")
)]
#[case("ssh: connect to host H port 22: Connection refused", Some("network"))]
#[case("Segmentation fault", None)]
#[case("bbcp: Connection refused", None)]
#[case("Welcome to H!", None)]
fn ssh_states_why_it_does_not_connect(#[case] output: &str, #[case] code: Option<&str>) {
    let failure = connection_failure(output, "H", Role::Origin);
    assert_eq!(failure.map(|failure| failure.code()), code);
}

#[test]
fn codes_are_names_and_unique() {
    let codes: HashSet<&str> = FailureKind::ALL.iter().map(|kind| kind.code()).collect();
    assert_eq!(codes.len(), FailureKind::ALL.len());
    for kind in FailureKind::ALL {
        let row = kind.row();
        assert_eq!(FailureKind::from_code(row.code), Some(*kind));
        assert!(
            row.code
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b == b'_'),
            "{}",
            row.code
        );
        assert!(
            row.description.ends_with(['.', ')']) && row.remedy.ends_with(['.', ')']),
            "{}",
            row.code
        );
        // A row that is not tried again neither waits nor keeps a partial copy.
        let ends = matches!(row.retry, RetryRule::Never | RetryRule::NotOurs);
        assert!(
            !ends || row.wait == Wait::None && row.partial == PartialCopy::Discard,
            "{}",
            row.code
        );
    }
}

#[test]
fn every_pattern_makes_a_failure_of_its_row() {
    let mut ranks = HashSet::new();
    for (kind, pattern) in PATTERNS.iter() {
        assert!(ranks.insert(pattern.rank), "{} is used twice", pattern.rank);
        let observation = Observation {
            line: "line".into(),
            origin: "/o".into(),
            copy: "/d".into(),
            host: "h".into(),
            role: Role::Destination,
            connection: Box::new(DataConnection::new("h", THIS_HOST)),
        };
        assert_eq!((pattern.failure)(observation).kind(), *kind);
    }
    assert!(PATTERNS.is_sorted_by_key(|(_, pattern)| pattern.rank));
}

/// The domain is used by other programs than this one: commands are named by the layers above.
#[test]
fn no_remedy_names_a_command() {
    for kind in FailureKind::ALL {
        let remedy = kind.row().remedy.replace("`.ccat-transfer-`", "");
        assert!(!remedy.contains("ccat-transfer"), "{}", kind.code());
    }
}

#[test]
fn chain_is_one_line_with_every_cause() {
    let inner = io::Error::other("disk on fire");
    let error = TransferError::Storage {
        operation: "mkdir",
        role: Role::Destination,
        path: "/d".into(),
        source: inner.into(),
    };
    assert_eq!(
        error.chain(),
        "mkdir failed at the destination, /d: disk on fire"
    );
    assert_eq!(error.scope(), Scope::Destination);
    assert_eq!(error.retry(), RetryRule::General);
}

#[test]
fn own_limit_and_ownership() {
    let changed = TransferError::OriginChanged {
        path: "/a".into(),
        line: String::new(),
    };
    assert_eq!(changed.retry(), RetryRule::AtMost(1));
    let held = TransferError::Held {
        id: 1.into(),
        owner: "w".into(),
    };
    assert_eq!(held.retry(), RetryRule::NotOurs);
}
