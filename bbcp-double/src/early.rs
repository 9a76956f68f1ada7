//! Copies that end before the first byte: their output, duration and exit code.

use crate::effects::Early;
use crate::options::Options;
use crate::spec::Spec;
use std::time::Duration;

/// Context of a copy for these endings.
pub(crate) struct Scene<'a> {
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

impl Scene<'_> {
    /// Returns the ending of this copy.
    pub(crate) fn ending(&self, early: &Early) -> Ending {
        let target = self.target_file;
        let source = self.source.path.as_str();
        let from = self.source.host_name();
        let follower = "Broken pipe writing to stream.".to_owned();
        match early {
            Early::Exists => said(22, [format!("File {target} already exists.")]),
            Early::NoSource => said(
                2,
                [
                    format!("No such file or directory processing {source}"),
                    follower,
                ],
            ),
            Early::SourcePermission => said(
                2,
                [format!("Permission denied processing {source}"), follower],
            ),
            Early::SourceDirectory => said(2, [format!("{source} is a directory."), follower]),
            Early::NoDirectory => said(2, [format!("Target directory {target} not found")]),
            Early::TargetPermission => said(13, [format!("Permission denied opening {target}")]),
            Early::NoSpace => said(
                28,
                [format!(
                    "Insufficient space to copy all the files from {from}"
                )],
            ),
            Early::CheckpointChanged => said(
                22,
                [
                    format!(
                        "Source file ' {} ' on {from} appears to have changed after the previous copy ended.",
                        self.source.file_name()
                    ),
                    format!("Cannot append to  {}", self.target.file_name()),
                ],
            ),
            Early::NoAppend => said(
                22,
                [format!(
                    "File {target} changed since the copy completed; append not possible."
                )],
            ),
            Early::Skip => said(
                0,
                [format!(
                    "File {target} appears to have already been copied; copy skipped."
                )],
            ),
            Early::Streams(count) => {
                let mut ending = said(
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
            Early::PortBusy => said(
                255,
                [
                    "Address already in use binding socket".to_owned(),
                    format!(
                        "bbcp unexpectedly terminated on {}",
                        self.target.host_name()
                    ),
                ],
            ),
            Early::Exit(code, text) => Ending {
                foreign: text
                    .iter()
                    .flat_map(|text| text.lines().map(str::to_owned))
                    .collect(),
                ..said(*code, [])
            },
            Early::NoSsh => {
                let (side, command) = self.remote_side();
                let program = command
                    .and_then(|command| command.split_whitespace().next())
                    .unwrap_or("ssh");
                let host = side.host_name();
                said(
                    255,
                    [
                        format!("No such file or directory executing {program} {host}"),
                        format!("bbcp unexpectedly terminated on {host}"),
                    ],
                )
            }
            Early::Refused
            | Early::TimedOut(_)
            | Early::Unresolved
            | Early::Authentication
            | Early::HostKey
            | Early::NoBbcp
            | Early::Banner => self.unreachable(early),
        }
    }

    /// Returns true if ssh is used for the source. With two remote sides, the target is started first.
    fn pulls(&self) -> bool {
        self.target.host.is_none() && self.source.host.is_some()
    }

    /// Returns the side that ssh is used for, and its command.
    fn remote_side(&self) -> (&Spec, Option<&str>) {
        if self.pulls() {
            (self.source, self.options.source_command.as_deref())
        } else {
            (self.target, self.options.target_command.as_deref())
        }
    }

    /// Ending of a failed ssh. The agent detects it at once if the target is remote; if the source is, the local sink
    /// waits for connections that never arrive.
    fn unreachable(&self, early: &Early) -> Ending {
        let (side, _) = self.remote_side();
        let host = side.host_name();
        let user = side.user.as_deref().unwrap_or("bbcp");
        let foreign = match early {
            Early::Refused => Some(format!(
                "ssh: connect to host {host} port 22: Connection refused"
            )),
            Early::TimedOut(_) => Some(format!(
                "ssh: connect to host {host} port 22: Connection timed out"
            )),
            Early::Unresolved => Some(format!(
                "ssh: Could not resolve hostname {host}: Name or service not known"
            )),
            Early::Authentication => Some(format!("{user}@{host}: Permission denied (publickey).")),
            Early::HostKey => Some("Host key verification failed.".to_owned()),
            Early::NoBbcp => Some("bash: line 1: bbcp: command not found".to_owned()),
            _ => None,
        };
        let mut ending = if self.pulls() {
            self.connection_timeout()
        } else {
            said(255, [format!("bbcp unexpectedly terminated on {host}")])
        };
        if let Early::TimedOut(seconds) = early {
            ending.before = Duration::from_secs_f64(*seconds);
        }
        ending.foreign.extend(foreign);
        ending
    }

    /// Ending by the accept time-out: code 2.
    pub(crate) fn connection_timeout(&self) -> Ending {
        Ending {
            after: self.accept,
            ..said(
                2,
                [
                    format!("Accept timed out on port {}", self.options.port),
                    format!(
                        "Unable to allocate more than 0 of {} data streams.",
                        self.options.streams
                    ),
                ],
            )
        }
    }
}

/// Returns true if both sides have connected before a copy ends like this.
pub(crate) fn is_connected(early: &Early) -> bool {
    match early {
        Early::Exists
        | Early::NoSource
        | Early::SourcePermission
        | Early::SourceDirectory
        | Early::NoDirectory
        | Early::TargetPermission
        | Early::NoSpace
        | Early::CheckpointChanged
        | Early::NoAppend
        | Early::Skip => true,
        Early::Refused
        | Early::TimedOut(_)
        | Early::Unresolved
        | Early::Authentication
        | Early::HostKey
        | Early::NoBbcp
        | Early::NoSsh
        | Early::Banner
        | Early::Streams(_)
        | Early::PortBusy
        | Early::Exit(..) => false,
    }
}

fn said<const N: usize>(code: u8, lines: [String; N]) -> Ending {
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
