//! Copies that end before the first byte: their output, duration and exit code.

use crate::effects::EarlyEnd;
use crate::failure::Failure;
use crate::options::Options;
use crate::spec::Spec;
use std::time::Duration;

/// Context of a copy for these endings.
pub(crate) struct EarlyContext<'a> {
    pub(crate) options: &'a Options,
    pub(crate) source: &'a Spec,
    pub(crate) target: &'a Spec,
    /// Path of the target file as shown in messages
    pub(crate) target_file: &'a str,
    /// Accept time-out
    pub(crate) accept: Duration,
}

/// End of a copy.
pub(crate) struct Ending {
    /// Delay before the line of ssh
    pub(crate) before: Duration,
    /// Lines of ssh or the remote shell, without `bbcp: `
    pub(crate) foreign: Vec<String>,
    /// Delay after the line of ssh
    pub(crate) after: Duration,
    /// Lines of bbcp
    pub(crate) lines: Vec<Vec<u8>>,
    /// Exit code
    pub(crate) code: u8,
}

impl EarlyContext<'_> {
    /// Returns the ending of this copy.
    pub(crate) fn ending(&self, early: &EarlyEnd) -> Ending {
        let target = self.target_file;
        let source = self.source.path.as_str();
        let from = self.source.host_name();
        let follower = "Broken pipe writing to stream.".to_owned();
        match early {
            EarlyEnd::Exists => failure_output(22, [format!("File {target} already exists.")]),
            EarlyEnd::NoSource => failure_output(
                2,
                [
                    format!("No such file or directory processing {source}"),
                    follower,
                ],
            ),
            EarlyEnd::SourcePermission => failure_output(
                2,
                [format!("Permission denied processing {source}"), follower],
            ),
            EarlyEnd::SourceDirectory => {
                failure_output(2, [format!("{source} is a directory."), follower])
            }
            EarlyEnd::NoDirectory => {
                failure_output(2, [format!("Target directory {target} not found")])
            }
            EarlyEnd::TargetPermission => {
                failure_output(13, [format!("Permission denied opening {target}")])
            }
            EarlyEnd::NoSpace => failure_output(
                28,
                [format!(
                    "Insufficient space to copy all the files from {from}"
                )],
            ),
            EarlyEnd::CheckpointChanged => failure_output(
                22,
                [
                    format!(
                        "Source file ' {} ' on {from} appears to have changed after the previous copy ended.",
                        self.source.file_name()
                    ),
                    format!("Cannot append to  {}", self.target.file_name()),
                ],
            ),
            EarlyEnd::NoAppend => failure_output(
                22,
                [format!(
                    "File {target} changed since the copy completed; append not possible."
                )],
            ),
            EarlyEnd::Skip => failure_output(
                0,
                [format!(
                    "File {target} appears to have already been copied; copy skipped."
                )],
            ),
            EarlyEnd::Streams(count) => {
                let mut ending = failure_output(
                    2,
                    [format!(
                        "Unable to allocate more than {count} of {} data streams.",
                        self.options.streams
                    )],
                );
                let garbage = b"bbcp: Unable to connect to \xc0\xff\xfe\x8a ;  System error";
                ending.lines.insert(0, garbage.to_vec());
                ending.after = self.accept;
                ending
            }
            EarlyEnd::Unreached => self.connection_timeout(),
            EarlyEnd::PortBusy => failure_output(
                255,
                [
                    "Address already in use binding socket".to_owned(),
                    format!(
                        "bbcp unexpectedly terminated on {}",
                        self.target.host_name()
                    ),
                ],
            ),
            EarlyEnd::Exit(code, text) => Ending {
                foreign: text
                    .iter()
                    .flat_map(|text| text.lines().map(str::to_owned))
                    .collect(),
                ..failure_output(*code, [])
            },
            EarlyEnd::NoSsh => {
                let (side, command) = self.remote_side();
                let program = command
                    .and_then(|command| command.split_whitespace().next())
                    .unwrap_or("ssh");
                let host = side.host_name();
                failure_output(
                    255,
                    [
                        format!("No such file or directory executing {program} {host}"),
                        format!("bbcp unexpectedly terminated on {host}"),
                    ],
                )
            }
            EarlyEnd::Refused
            | EarlyEnd::TimedOut(_)
            | EarlyEnd::Unresolved
            | EarlyEnd::Authentication
            | EarlyEnd::HostKey
            | EarlyEnd::NoBbcp
            | EarlyEnd::Banner => self.unreachable(early),
        }
    }

    /// Returns true if ssh is used for the source. With two remote sides, the target is started first.
    fn is_pull(&self) -> bool {
        self.target.host.is_none() && self.source.host.is_some()
    }

    /// Returns the side that ssh is used for, and its command.
    fn remote_side(&self) -> (&Spec, Option<&str>) {
        if self.is_pull() {
            (self.source, self.options.source_command.as_deref())
        } else {
            (self.target, self.options.target_command.as_deref())
        }
    }

    /// Ending of a failed ssh. The agent detects it at once if the target is remote; if the source is, the local sink
    /// waits for connections that never arrive.
    fn unreachable(&self, early: &EarlyEnd) -> Ending {
        let (side, _) = self.remote_side();
        let host = side.host_name();
        let user = side.user.as_deref().unwrap_or("bbcp");
        let foreign = match early {
            EarlyEnd::Refused => Some(format!(
                "ssh: connect to host {host} port 22: Connection refused"
            )),
            EarlyEnd::TimedOut(_) => Some(format!(
                "ssh: connect to host {host} port 22: Connection timed out"
            )),
            EarlyEnd::Unresolved => Some(format!(
                "ssh: Could not resolve hostname {host}: Name or service not known"
            )),
            EarlyEnd::Authentication => {
                Some(format!("{user}@{host}: Permission denied (publickey)."))
            }
            EarlyEnd::HostKey => Some("Host key verification failed.".to_owned()),
            EarlyEnd::NoBbcp => Some("bash: line 1: bbcp: command not found".to_owned()),
            _ => None,
        };
        let mut ending = if self.is_pull() {
            self.connection_timeout()
        } else {
            failure_output(255, [format!("bbcp unexpectedly terminated on {host}")])
        };
        if let EarlyEnd::TimedOut(seconds) = early {
            ending.before = Duration::from_secs_f64(*seconds);
        }
        ending.foreign.extend(foreign);
        ending
    }

    /// Ending by the accept time-out: code 2.
    pub(crate) fn connection_timeout(&self) -> Ending {
        let port = self.options.ports.map_or(5031, |(first, _)| first);
        let Failure { code, lines } = Failure::accept_timeout(port, self.options.streams);
        Ending {
            after: self.accept,
            ..failure_output(code, lines)
        }
    }
}

/// Returns true if both sides have started before a copy ends like this.
pub(crate) fn has_started(early: &EarlyEnd) -> bool {
    match early {
        EarlyEnd::Exists
        | EarlyEnd::NoSource
        | EarlyEnd::SourcePermission
        | EarlyEnd::SourceDirectory
        | EarlyEnd::NoDirectory
        | EarlyEnd::TargetPermission
        | EarlyEnd::NoSpace
        | EarlyEnd::CheckpointChanged
        | EarlyEnd::NoAppend
        | EarlyEnd::Skip
        | EarlyEnd::Unreached => true,
        EarlyEnd::Refused
        | EarlyEnd::TimedOut(_)
        | EarlyEnd::Unresolved
        | EarlyEnd::Authentication
        | EarlyEnd::HostKey
        | EarlyEnd::NoBbcp
        | EarlyEnd::NoSsh
        | EarlyEnd::Banner
        | EarlyEnd::Streams(_)
        | EarlyEnd::PortBusy
        | EarlyEnd::Exit(..) => false,
    }
}

fn failure_output(code: u8, lines: impl IntoIterator<Item = String>) -> Ending {
    Ending {
        before: Duration::ZERO,
        foreign: Vec::new(),
        after: Duration::ZERO,
        lines: lines
            .into_iter()
            .map(|line| format!("bbcp: {line}").into_bytes())
            .collect(),
        code,
    }
}
