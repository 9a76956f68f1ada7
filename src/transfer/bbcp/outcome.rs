//! What bbcp's end means.
//!
//! Its exit codes are no classification: the same full disk ends with 128 or 228 by chance, and 22
//! is more than "exists". So the text decides, in the order of [`Pattern`], and the code only where
//! there is no text. What bbcp itself says ranks above what ssh and the remote shell say, unless it
//! says only that the other side is gone. [`Evidence`] looks at one line at a time and keeps little,
//! however much bbcp and the network's noise print.
//!
//! Exit code 0 is not proof of a good file; verification is, and it is not done here.

use std::collections::VecDeque;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use crate::transfer::error::{Role, TransferError};
use crate::transfer::patterns::{Names, Pattern};
use crate::transfer::plan::Plan;

/// Lines that did not tell anything and are kept for the log.
const TAIL_LINES: usize = 20;

/// A line in a message is cut here, so that it fits a database column and a log line.
const LINE_CHARS: usize = 500;

/// SIGSEGV, and how a shell reports it.
const SEGV: i32 = 11;
const SEGV_BY_SHELL: i32 = 128 + SEGV;

/// With no text, these mean that the remote side crashed.
const REMOTE_DIED: [i32; 2] = [255, 32];

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or_default()),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// What a classification needs to know of a copy.
#[derive(Debug, Clone)]
pub struct Ends {
    /// Path at the origin.
    pub source: String,
    /// Temporary path at the destination.
    pub target: String,
    /// bbcp at the remote end, as it is started.
    pub program: String,
    /// The remote end and its host, if one is remote.
    pub remote: Option<(Role, String)>,
}

impl Ends {
    /// Those of a plan.
    pub fn of(plan: &Plan) -> Self {
        let ends = [
            (Role::Origin, plan.source.endpoint()),
            (Role::Destination, plan.target.endpoint()),
        ];
        let remote = ends
            .into_iter()
            .find_map(|(role, end)| end.remote().map(|remote| (role, remote.host.to_string())));
        Self {
            source: plan.source.path().to_string(),
            target: plan.target.temporary_path().to_string(),
            program: plan.bbcp.remote_program.display().to_string(),
            remote,
        }
    }

    fn peer(&self) -> String {
        match &self.remote {
            Some((_, host)) => host.clone(),
            None => "this host".into(),
        }
    }

    fn remote_role(&self) -> Role {
        match self.remote {
            Some((role, _)) => role,
            None => Role::Destination,
        }
    }
}

/// What bbcp's lines told so far. Bounded.
#[derive(Debug)]
pub struct Evidence {
    ends: Ends,
    /// The cause that bbcp states.
    stated: Option<(Pattern, String)>,
    /// The cause that ssh or the remote shell states.
    hinted: Option<(Pattern, String)>,
    tail: VecDeque<String>,
}

impl Evidence {
    /// Before the first line.
    pub fn new(ends: Ends) -> Self {
        Self {
            ends,
            stated: None,
            hinted: None,
            tail: VecDeque::new(),
        }
    }

    /// Takes a line that is neither progress nor a result.
    pub fn observe(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(shortened(line));
        let names = Names {
            origin: &self.ends.source,
            copy: &self.ends.target,
            program: &self.ends.program,
        };
        let Some((pattern, by_bbcp)) = Pattern::of(line, names) else {
            return;
        };
        let cause = match by_bbcp {
            true => &mut self.stated,
            false => &mut self.hinted,
        };
        if cause.as_ref().is_none_or(|(before, _)| pattern < *before) {
            *cause = Some((pattern, shortened(line)));
        }
    }

    /// The cause according to all lines.
    fn cause(&mut self) -> Option<(Pattern, String)> {
        match (self.stated.take(), self.hinted.take()) {
            (Some(stated), Some(hinted)) if stated.0.leaves_the_reason_open() => {
                Some(if hinted.0 < stated.0 { hinted } else { stated })
            }
            (stated, hinted) => stated.or(hinted),
        }
    }

    /// The last lines, for a log.
    pub fn tail(&self) -> impl Iterator<Item = &str> {
        self.tail.iter().map(String::as_str)
    }

    /// What it all means.
    ///
    /// # Errors
    /// The classified failure, for every end but exit code 0.
    pub fn conclude(mut self, exit: Exit) -> Result<(), TransferError> {
        if exit == Exit::Code(0) {
            return Ok(());
        }
        let crashed = matches!(exit, Exit::Signal(SEGV) | Exit::Code(SEGV_BY_SHELL));
        match self.cause() {
            Some((Pattern::Exists, line)) => Err(self.error(Pattern::Exists, line)),
            _ if crashed => Err(self.error(Pattern::Segfault, exit.to_string())),
            Some((pattern, line)) => Err(self.error(pattern, line)),
            None => Err(self.unexplained(exit)),
        }
    }

    fn unexplained(self, exit: Exit) -> TransferError {
        // Other lines are shown if bbcp has printed nothing, but they decide nothing.
        let own = self.tail.iter().rfind(|line| line.starts_with("bbcp: "));
        match (own, exit, &self.ends.remote) {
            (None, Exit::Code(code), Some(_)) if REMOTE_DIED.contains(&code) => {
                self.error(Pattern::PeerGone, exit.to_string())
            }
            (own, ..) => TransferError::BbcpFailed {
                exit: exit.to_string(),
                line: own
                    .or(self.tail.back())
                    .map_or_else(|| "it said nothing".into(), Clone::clone),
            },
        }
    }

    /// The error for a stated cause.
    pub(in crate::transfer) fn error(self, pattern: Pattern, line: String) -> TransferError {
        let host = self.ends.peer();
        let role = self.ends.remote_role();
        let Ends { source, target, .. } = self.ends;
        match pattern {
            Pattern::Exists => TransferError::TemporaryExists { path: target },
            Pattern::Segfault => TransferError::Segfault { line },
            Pattern::Full => TransferError::StorageFull { path: target, line },
            Pattern::Damaged => TransferError::DamagedInFlight { line },
            Pattern::HostKey => TransferError::HostKey { host, line },
            Pattern::LoginDenied => TransferError::SshDenied { host, line },
            Pattern::OriginDenied => TransferError::OriginUnreadable { path: source, line },
            Pattern::DestinationDenied => TransferError::DestinationDenied { path: target, line },
            Pattern::Network | Pattern::NoStreams | Pattern::Follower => {
                TransferError::Network { host, line }
            }
            Pattern::RemoteProgram => TransferError::RemoteProgramMissing { role, host, line },
            Pattern::LocalProgram => TransferError::ProgramMissing { program: line },
            Pattern::BadOption => TransferError::BadOption { line },
            Pattern::OriginMissing => TransferError::OriginMissing { path: source },
            Pattern::OriginDirectory => TransferError::OriginNotAFile { path: source },
            Pattern::OriginPathTooLong => TransferError::BadPath {
                role: Role::Origin,
                path: source,
                problem: "bbcp finds it too long",
            },
            Pattern::NoDirectory => TransferError::DestinationDirectory { path: target, line },
            Pattern::ResumeRefused => TransferError::ResumeRefused { line },
            Pattern::OriginChanged => TransferError::OriginChanged { path: source, line },
            Pattern::PortBusy => TransferError::PortBusy { line },
            Pattern::TimeLimit => TransferError::TimeLimit { line },
            Pattern::PeerGone => TransferError::RemoteDied { host, line },
        }
    }
}

fn shortened(line: &str) -> String {
    line.chars().take(LINE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn ends(remote: Option<Role>) -> Ends {
        Ends {
            source: "/d/src/a.tar".into(),
            target: "/d/dst/.t.part".into(),
            program: "bbcp".into(),
            remote: remote.map(|role| (role, "H".into())),
        }
    }

    fn code(remote: Option<Role>, exit: Exit, lines: &[&str]) -> &'static str {
        let mut evidence = Evidence::new(ends(remote));
        for line in lines {
            evidence.observe(line);
        }
        match evidence.conclude(exit) {
            Ok(()) => "ok",
            Err(e) => e.code(),
        }
    }

    const PIPE: &str = "bbcp: Broken pipe writing to stream.";
    const RESET: &str = "bbcp: Connection reset by peer writing to stream.";
    const ACCEPT: &str = "bbcp: Accept timed out on port 5031";
    const ALLOCATE: &str = "bbcp: Unable to allocate more than 0 of 4 data streams.";
    const GONE: &str = "bbcp: bbcp unexpectedly terminated on H";

    /// Every row of the table of outcomes in the notes on bbcp, with its real text.
    #[rstest]
    #[case::success(0, &[], "ok")]
    #[case::no_arguments(1, &["bbcp: Copy arguments not specified."], "bad_option")]
    #[case::no_target(1, &["bbcp: Copy target not specified."], "bad_option")]
    #[case::streams(1, &["bbcp: Invalid streams - 65"], "bad_option")]
    #[case::checksum_type(1, &["bbcp: Invalid checksum type - sha256"], "bad_option")]
    #[case::unknown_option(255, &["bbcp: Invalid option, '-Q'."], "bad_option")]
    #[case::missing_value(255, &["bbcp: Value not specified for '-s'."], "bad_option")]
    #[case::config_file(1, &["bbcp: No such file or directory opening config file F"], "bad_option")]
    #[case::source_missing(2, &["bbcp: No such file or directory processing /d/src/nope", PIPE], "origin_missing")]
    #[case::source_missing_reset(2, &[RESET, "bbcp: No such file or directory processing /d/src/nope"], "origin_missing")]
    #[case::not_searchable(2, &["bbcp: Permission denied processing /d/priv/zz"], "origin_unreadable")]
    #[case::not_readable(128, &["bbcp: Permission denied opening /d/src/a.tar"], "origin_unreadable")]
    #[case::source_directory(2, &["bbcp: /d/src is a directory.", PIPE], "origin_not_a_file")]
    #[case::target_directory(2, &["bbcp: Target directory /d/nodir/x.tar not found"], "destination_directory")]
    #[case::target_directory_dot(2, &["bbcp: Target directory /d/nodir/x.tar not found."], "destination_directory")]
    #[case::exists(22, &["bbcp: File /d/dst/a.tar already exists."], "temporary_exists")]
    #[case::target_denied(13, &["bbcp: Permission denied opening /d/ro/x"], "destination_denied")]
    #[case::device(1, &["bbcp: Invalid file offset - -1", "bbcp: get from H failed to create P"], "destination_denied")]
    #[case::no_space(28, &["bbcp: Insufficient space to copy all the files from HOST"], "storage_full")]
    #[case::disk_full(228, &["bbcp: No space left on device writing /d/small/x", RESET], "storage_full")]
    #[case::disk_full_128(128, &["bbcp: No space left on device writing /d/small/x"], "storage_full")]
    #[case::checkpoint(254, &["bbcp: No such file or directory opening /d/ckp/bbcp.HOST.HEX.NAME"], "destination_directory")]
    #[case::append_size(22, &["bbcp: File P changed since the copy completed; append not possible."], "resume_refused")]
    #[case::append_source(
        22,
        &["bbcp: Source file ' a.tar ' on HOST appears to have changed after the previous copy ended.", "bbcp: Cannot append to  k"],
        "resume_refused"
    )]
    #[case::skipped(0, &["bbcp: File P appears to have already been copied; copy skipped."], "ok")]
    #[case::checksum(
        172,
        &["bbcp: /d/src/a source checksum 000 does not match da4f", "bbcp: /d/dst/x target checksum 000 does not match da4f"],
        "damaged_in_flight"
    )]
    #[case::checksum_link(128, &["bbcp: Invalid checksum from HOST"], "damaged_in_flight")]
    #[case::checksum_offset(128, &["bbcp: xfr checksum error at offset 5"], "damaged_in_flight")]
    #[case::time_limit(128, &["bbcp: Time limit exceeded"], "time_limit")]
    #[case::source_changed(128, &["bbcp: Error -143808 writing /d/src/t.tar"], "origin_changed")]
    #[case::data_reset(128, &["bbcp: Connection reset by peer reading data from HOST"; 4], "network")]
    #[case::firewall(2, &[ACCEPT, ALLOCATE], "network")]
    #[case::data_refused(2, &["bbcp: Connection refused unable to connect to port HOST:5031", ALLOCATE], "network")]
    #[case::ports(255, &["bbcp: Address already in use binding socket", GONE], "port_busy")]
    #[case::ssh_refused(255, &["ssh: connect to host H port 22: Connection refused", GONE], "network")]
    #[case::ssh_timeout(255, &["ssh: connect to host H port 22: Connection timed out", GONE], "network")]
    #[case::ssh_resolve(255, &["ssh: Could not resolve hostname H: Name or service not known", GONE], "network")]
    #[case::ssh_auth(255, &["U@H: Permission denied (publickey).", GONE], "ssh_denied")]
    #[case::ssh_host_key(255, &["Host key verification failed.", GONE], "ssh_host_key")]
    #[case::pull_auth(2, &["U@H: Permission denied (publickey).", ACCEPT, ALLOCATE], "ssh_denied")]
    #[case::no_bbcp(255, &["bash: line 1: bbcp: command not found", GONE], "remote_program_missing")]
    #[case::no_bbcp_pull(2, &["bash: line 1: bbcp: command not found", ACCEPT, ALLOCATE], "remote_program_missing")]
    #[case::no_bbcp_dash(255, &["sh: 1: /opt/bbcp: not found", GONE], "remote_program_missing")]
    #[case::no_ssh(255, &["bbcp: No such file or directory executing nosuchssh H", GONE], "program_missing")]
    #[case::descriptors(
        2,
        &["bbcp: Unable to connect to  localhost ;  System error", "bbcp: Unable to allocate more than 13 of 16 data streams.\u{fffd}\u{fffd}"],
        "network"
    )]
    #[case::long_source(2, &["bbcp: Message too long record truncated.", ACCEPT], "path_invalid")]
    #[case::segfault_text(255, &["bbcp: Copy process 10016 was killed via signal 11"], "segfault")]
    #[case::segfault_shell(255, &["bash: line 1:  4711 Segmentation fault      bbcp", GONE], "segfault")]
    #[case::version(0, &["bbcp: Warning: HOST is running a newer version of bbcp"], "ok")]
    #[case::remote_crash(255, &[], "remote_died")]
    #[case::remote_crash_and_a_greeting(255, &["Welcome to H!"], "remote_died")]
    #[case::remote_crash_long_path(32, &[], "remote_died")]
    #[case::control_stream(255, &["bbcp: Unexpected end of control stream from H"], "remote_died")]
    #[case::banner(255, &["Welcome to H!", GONE], "remote_died")]
    #[case::only_followers(2, &[PIPE, RESET], "network")]
    #[case::unlinked_by_an_orphan(2, &["bbcp: No such file or directory finding P"], "bbcp_failed")]
    #[case::recursive(197, &["bbcp: Invalid return code - 21957"], "bbcp_failed")]
    #[case::silent(1, &[], "bbcp_failed")]
    fn rows(#[case] exit: i32, #[case] lines: &[&str], #[case] expected: &str) {
        let found = code(Some(Role::Destination), Exit::Code(exit), lines);
        assert_eq!(found, expected);
    }

    /// Output of a start-up file is not a reason and does not replace bbcp's reason.
    #[rstest]
    #[case::missing(
        "bbcp: No such file or directory processing /d/src/a.tar",
        "origin_missing"
    )]
    #[case::full("bbcp: No space left on device writing /d/dst/.t.part", "storage_full")]
    #[case::changed("bbcp: Error -143808 writing /d/src/a.tar", "origin_changed")]
    #[case::option("bbcp: Invalid option, '-Q'.", "bad_option")]
    #[case::ports("bbcp: Address already in use binding socket", "port_busy")]
    #[case::unknown("bbcp: No such file or directory finding P", "bbcp_failed")]
    #[case::gone(GONE, "remote_died")]
    fn noise_changes_nothing(#[case] line: &str, #[case] expected: &str) {
        const NOISE: &[&str] = &[
            "cat: /etc/motd.d/x: No such file or directory",
            "/etc/profile: line 9: nosuch: command not found",
            "ls: cannot open directory '/x': Permission denied",
            "nc: connect to 10.0.0.1: Connection refused",
            "mount.nfs: Permission denied (server)",
            "Segmentation fault of the day",
            "No space left on device",
        ];
        for exit in [1, 2, 128, 255] {
            let exit = Exit::Code(exit);
            let mut lines = NOISE.to_vec();
            lines.push(line);
            assert_eq!(code(Some(Role::Destination), exit, &lines), expected);
            lines.rotate_left(NOISE.len());
            assert_eq!(code(Some(Role::Destination), exit, &lines), expected);
        }
        assert_eq!(code(Some(Role::Destination), Exit::Code(0), NOISE), "ok");
    }

    #[rstest]
    #[case(Exit::Signal(11), &[], "segfault")]
    #[case(Exit::Code(139), &[], "segfault")]
    #[case(Exit::Signal(11), &["bbcp: File /d/dst/x already exists."], "temporary_exists")]
    #[case(Exit::Signal(11), &["bbcp: No space left on device writing /x"], "segfault")]
    #[case(Exit::Signal(9), &[], "bbcp_failed")]
    #[case(Exit::Code(255), &[], "bbcp_failed")]
    fn local(#[case] exit: Exit, #[case] lines: &[&str], #[case] expected: &str) {
        assert_eq!(code(None, exit, lines), expected);
    }

    #[test]
    fn says_what_bbcp_said() {
        let mut evidence = Evidence::new(ends(None));
        evidence.observe("bbcp: something new");
        let error = evidence.conclude(Exit::Code(7)).err();
        assert_eq!(
            error.map(|e| e.to_string()).as_deref(),
            Some("bbcp failed (exit code 7): bbcp: something new")
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_text_is_bounded_and_no_failure_is_lost(
            lines in proptest::collection::vec("\\PC{0,600}", 0..50),
            exit in 1..256i32,
        ) {
            let mut evidence = Evidence::new(ends(Some(Role::Origin)));
            for line in &lines {
                evidence.observe(line);
            }
            prop_assert!(evidence.tail().count() <= TAIL_LINES);
            prop_assert!(evidence.tail().all(|line| line.chars().count() <= LINE_CHARS));
            prop_assert!(evidence.conclude(Exit::Code(exit)).is_err());
        }

        #[test]
        fn followers_never_hide_a_cause(before in 0..5usize, after in 0..5usize) {
            let mut lines = vec![PIPE; before];
            lines.push("bbcp: Permission denied processing /d/priv/zz");
            lines.extend(vec![RESET; after]);
            prop_assert_eq!(code(None, Exit::Code(2), &lines), "origin_unreadable");
        }
    }
}
