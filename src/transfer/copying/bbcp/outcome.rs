//! Classification of the end of bbcp.
//!
//! Its exit codes do not classify a failure: the same full disk ends with 128 or 228 by chance, and 22 means more than
//! "exists". So the text decides, by the patterns of the [table](crate::transfer::failures), and the exit status only
//! where the table says so. A cause that bbcp itself states ranks above one that ssh or the remote shell states, unless
//! bbcp states only that the other side is gone. [`FailureClassifier`] reads one line at a time and its size is
//! bounded, however much bbcp and programs of the network print.
//!
//! Exit code 0 does not prove that the file is good; a separate verification does that.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use crate::transfer::failures::{
    Confidence, DataConnection, Names, Observation, PatternMatch, Role, THIS_HOST, TransferError,
};
use crate::transfer::plan::Plan;

/// Length at which a line in a message is cut, so that it fits a database column and a log line.
const LINE_CHARS: usize = 500;

/// Exit status of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Exit code.
    Code(i32),
    /// Number of the signal that ended it.
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

/// Paths and programs of a copy, for the classification of its output.
#[derive(Debug, Clone)]
pub struct CopyPaths {
    /// Path at the origin.
    pub source: String,
    /// Temporary path at the destination.
    pub target: String,
    /// Command that starts bbcp at the remote end.
    pub program: String,
    /// The remote end and its host, if one is remote.
    pub remote: Option<(Role, String)>,
    /// End that listens for the data connections.
    pub listener: Role,
}

impl CopyPaths {
    /// Takes the paths of a plan.
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
            listener: listener(plan),
        }
    }

    /// The data connections, before anything is known about them.
    fn connection(&self) -> DataConnection {
        match &self.remote {
            Some((role, host)) if *role == self.listener => DataConnection::new(host, THIS_HOST),
            Some((_, host)) => DataConnection::new(THIS_HOST, host),
            None => DataConnection::new(THIS_HOST, THIS_HOST),
        }
    }

    /// The values of a failure that `line` states.
    fn observation(self, line: String, connection: DataConnection) -> Observation {
        let (role, host) = self.remote.unwrap_or((Role::Destination, THIS_HOST.into()));
        Observation {
            line,
            origin: self.source,
            copy: self.target,
            host,
            role,
            connection: Box::new(connection),
        }
    }
}

/// End of a copy that listens for the data connections.
pub(super) fn listener(plan: &Plan) -> Role {
    match plan.bbcp.reverse_connection {
        true => Role::Origin,
        false => Role::Destination,
    }
}

/// Classifies the end of bbcp by its lines and its exit status. Its size is bounded.
#[derive(Debug)]
pub struct FailureClassifier {
    paths: CopyPaths,
    /// The cause that bbcp states.
    stated: Option<(PatternMatch, String)>,
    /// The cause that ssh or the remote shell states.
    hinted: Option<(PatternMatch, String)>,
    /// The last line of bbcp.
    last_of_bbcp: Option<String>,
    /// The last line of any program.
    last: Option<String>,
    /// The data connections, according to the lines of bbcp.
    connection: DataConnection,
}

impl FailureClassifier {
    /// The state before the first line.
    pub fn new(paths: CopyPaths) -> Self {
        Self {
            connection: paths.connection(),
            paths,
            stated: None,
            hinted: None,
            last_of_bbcp: None,
            last: None,
        }
    }

    /// Reads a line that is neither progress nor a result.
    pub fn observe(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if line.starts_with("bbcp: ") {
            self.last_of_bbcp = Some(shortened(line));
            self.connection.observe(&shortened(line));
        }
        self.last = Some(shortened(line));
        let names = Names {
            origin: &self.paths.source,
            copy: &self.paths.target,
            program: &self.paths.program,
        };
        let Some(found) = PatternMatch::of_line(line, names) else {
            return;
        };
        let cause = match found.is_from_bbcp() {
            true => &mut self.stated,
            false => &mut self.hinted,
        };
        if cause
            .as_ref()
            .is_none_or(|(before, _)| found.rank() < before.rank())
        {
            *cause = Some((found, shortened(line)));
        }
    }

    /// Returns true if bbcp has reported that no data connection arrived.
    pub(super) fn has_no_connection(&self) -> bool {
        self.connection.has_timed_out
    }

    /// The cause according to all lines.
    fn cause_by_output(&mut self) -> Option<(PatternMatch, String)> {
        match (self.stated.take(), self.hinted.take()) {
            (Some(stated), Some(hinted)) if stated.0.confidence() == Confidence::Suspected => {
                Some(match hinted.0.rank() < stated.0.rank() {
                    true => hinted,
                    false => stated,
                })
            }
            (stated, hinted) => stated.or(hinted),
        }
    }

    /// The cause according to the exit status.
    fn cause_by_exit(&self, exit: Exit) -> Option<(PatternMatch, String)> {
        let status = exit.to_string();
        let found = PatternMatch::of_exit(&status)?;
        let is_silent = self.paths.remote.is_some() && self.last_of_bbcp.is_none();
        (found.confidence() != Confidence::Assumed || is_silent).then_some((found, status))
    }

    /// Classifies the end of bbcp.
    ///
    /// # Errors
    /// The failure, for every exit status except 0.
    pub fn conclude(mut self, exit: Exit) -> Result<(), TransferError> {
        if exit == Exit::Code(0) {
            return Ok(());
        }
        let cause = match (self.cause_by_output(), self.cause_by_exit(exit)) {
            (Some(output), Some(status)) if output.0.rank() < status.0.rank() => Some(output),
            (output, status) => status.or(output),
        };
        Err(match cause {
            Some((found, line)) => found.failure(self.paths.observation(line, self.connection)),
            // Lines of other programs are shown if bbcp has printed nothing, but they do not decide the class.
            None => TransferError::BbcpFailed {
                exit: exit.to_string(),
                line: self
                    .last_of_bbcp
                    .or(self.last)
                    .unwrap_or_else(|| "it printed nothing".into()),
            },
        })
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

    fn paths(remote: Option<Role>) -> CopyPaths {
        CopyPaths {
            source: "/d/src/a.tar".into(),
            target: "/d/dst/.t.part".into(),
            program: "bbcp".into(),
            remote: remote.map(|role| (role, "H".into())),
            listener: Role::Destination,
        }
    }

    fn code(remote: Option<Role>, exit: Exit, lines: &[&str]) -> &'static str {
        let mut classifier = FailureClassifier::new(paths(remote));
        for line in lines {
            classifier.observe(line);
        }
        match classifier.conclude(exit) {
            Ok(()) => "ok",
            Err(e) => e.code(),
        }
    }

    const PIPE: &str = "bbcp: Broken pipe writing to stream.";
    const RESET: &str = "bbcp: Connection reset by peer writing to stream.";
    const ACCEPT: &str = "bbcp: Accept timed out on port 5031";
    const ALLOCATE: &str = "bbcp: Unable to allocate more than 0 of 4 data streams.";
    const GONE: &str = "bbcp: bbcp unexpectedly terminated on H";

    /// Contains each row of the table of outcomes in the notes on bbcp, with its original text.
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
    #[case::firewall(2, &[ACCEPT, ALLOCATE], "data_port")]
    #[case::data_refused(2, &["bbcp: Connection refused unable to connect to port HOST:5031", ALLOCATE], "data_port")]
    #[case::data_timed_out(2, &[ACCEPT, ALLOCATE, "bbcp: Connection timed out unable to connect to port HOST:5031"], "data_port")]
    #[case::data_name(
        2,
        &["bbcp: Unable to connect to  H.example.org ;  Temporary failure in name resolution", ALLOCATE, ACCEPT, ALLOCATE],
        "data_port"
    )]
    #[case::some_streams(2, &[ACCEPT, "bbcp: Unable to allocate more than 3 of 4 data streams."], "network")]
    #[case::pull_ssh_refused(2, &["ssh: connect to host H port 22: Connection refused", ACCEPT, ALLOCATE], "network")]
    #[case::pull_ssh_resolve(2, &["ssh: Could not resolve hostname H: Name or service not known", ACCEPT, ALLOCATE], "network")]
    #[case::pull_ssh_lost(2, &[ACCEPT, ALLOCATE, "client_loop: send disconnect: Broken pipe"], "network")]
    #[case::pull_host_key(2, &[ACCEPT, ALLOCATE, "Host key verification failed."], "ssh_host_key")]
    #[case::ssh_lost_before_the_data(
        2,
        &["bbcp: Connection refused unable to connect to port H:5031", "Connection to H closed by remote host."],
        "network"
    )]
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

    /// Output of a start-up file is not a cause and does not replace bbcp's cause.
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
    fn reason_is_bbcps_own_text() {
        let mut classifier = FailureClassifier::new(paths(None));
        classifier.observe("bbcp: something new");
        let error = classifier.conclude(Exit::Code(7)).err();
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
            let mut classifier = FailureClassifier::new(paths(Some(Role::Origin)));
            for line in &lines {
                classifier.observe(line);
            }
            let causes = [&classifier.stated, &classifier.hinted].into_iter().flatten();
            let last = [&classifier.last_of_bbcp, &classifier.last].into_iter().flatten();
            for kept in causes.map(|(_, line)| line).chain(last) {
                prop_assert!(kept.chars().count() <= LINE_CHARS);
            }
            prop_assert!(classifier.conclude(Exit::Code(exit)).is_err());
        }

        #[test]
        fn consequences_never_hide_a_cause(before in 0..5usize, after in 0..5usize) {
            let mut lines = vec![PIPE; before];
            lines.push("bbcp: Permission denied processing /d/priv/zz");
            lines.extend(vec![RESET; after]);
            prop_assert_eq!(code(None, Exit::Code(2), &lines), "origin_unreadable");
        }
    }
}
