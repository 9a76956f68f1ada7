//! Recognition of failures by the output of bbcp, ssh and remote shells.
//!
//! All of them write to one pipe, and so does every start-up file at the other end. A line is attributed by
//! its form: lines of bbcp begin with `bbcp: `, lines of ssh have the beginnings from its sources, lines of a
//! shell begin with the shell's name and contain the name of the program that it should start. Other lines
//! are ignored.

use std::sync::LazyLock;

use regex::Regex;

/// Cause that a line states, the most specific first: where one source states several, the first of
/// these is the cause and the others follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Pattern {
    Exists,
    Segfault,
    Full,
    Damaged,
    HostKey,
    LoginDenied,
    OriginDenied,
    DestinationDenied,
    Network,
    RemoteProgram,
    LocalProgram,
    BadOption,
    OriginMissing,
    OriginDirectory,
    OriginPathTooLong,
    NoDirectory,
    ResumeRefused,
    OriginChanged,
    PortBusy,
    TimeLimit,
    // Messages of a side that only sees the other one fail. If the source is remote, bbcp prints the
    // first of these half a minute after any failure of ssh.
    NoStreams,
    PeerGone,
    Follower,
}

/// Program that prints a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputSource {
    /// bbcp: its lines begin with `bbcp: `, which is not part of a [`Matcher`].
    Bbcp,
    /// The ssh client.
    Ssh,
    /// The remote shell that starts bbcp: its lines begin with its name, which is not part of a
    /// [`Matcher`], and name bbcp.
    Shell,
}

/// Strings that occur in lines without a meaning for the failure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names<'a> {
    /// Path at the origin.
    pub(super) origin: &'a str,
    /// Temporary path at the destination.
    pub(super) copy: &'a str,
    /// bbcp at the other end, as it is started.
    pub(super) program: &'a str,
}

/// A line by its parts; empty parts always match.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matcher {
    pub(super) source: OutputSource,
    pub(super) begins: &'static str,
    pub(super) holds: [&'static str; 2],
    pub(super) ends: &'static str,
    /// True if the line ends with the path at the origin.
    pub(super) names_origin: bool,
    /// Text that must not occur: lines with it have another meaning.
    unless: &'static str,
}

const fn bbcp(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Bbcp,
        begins,
        holds: ["", ""],
        ends: "",
        names_origin: false,
        unless: "",
    }
}

/// A matcher for a line of ssh. With an empty beginning the line begins with `user@host`.
const fn ssh(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Ssh,
        ..bbcp(begins)
    }
}

const fn shell(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Shell,
        ..bbcp(begins)
    }
}

impl Matcher {
    const fn holds(self, text: &'static str) -> Self {
        Self {
            holds: [text, self.holds[0]],
            ..self
        }
    }

    const fn ends(self, ends: &'static str) -> Self {
        Self { ends, ..self }
    }

    const fn names_origin(self) -> Self {
        Self {
            names_origin: true,
            ..self
        }
    }

    const fn unless(self, unless: &'static str) -> Self {
        Self { unless, ..self }
    }

    /// Returns true if the pattern matches a line.
    fn matches(&self, line: &Line<'_>) -> bool {
        let (Some(text), login) = (match self.source {
            OutputSource::Bbcp => (line.bbcp, true),
            OutputSource::Ssh => (
                line.other,
                !self.begins.is_empty() || line.begins_with_login,
            ),
            OutputSource::Shell => (line.shell, true),
        }) else {
            return false;
        };
        login
            && text.starts_with(self.begins)
            && self.holds.iter().all(|part| text.contains(part))
            && text.ends_with(self.ends)
            && (!self.names_origin || line.names_origin)
            && (self.unless.is_empty() || !text.contains(self.unless))
    }
}

/// A line, taken apart.
struct Line<'a> {
    /// Text after bbcp's mark.
    bbcp: Option<&'a str>,
    /// A line without bbcp's mark.
    other: Option<&'a str>,
    /// Message of a shell about bbcp.
    shell: Option<&'a str>,
    begins_with_login: bool,
    names_origin: bool,
}

/// `bash: line 1: …`, `-zsh:1: …`, `/bin/sh: 1: …`, `env: …`: what follows the shell's name.
static SHELL: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"^-?(?:/\S*/)?(?:[a-z]*sh|env)(?:\[\d+\])?:(?: ?(?:line )?\d+:)? +(.*)$").ok()
});

/// Quotation marks around names in messages.
const QUOTES: [char; 5] = ['\'', '"', '`', '‘', '’'];

impl<'a> Line<'a> {
    /// Takes apart a line whose paths are masked as `<origin>` and `<copy>`.
    fn parse(masked: &'a str, program: &str) -> Self {
        let bbcp = masked.strip_prefix("bbcp: ");
        let other = bbcp.is_none().then_some(masked);
        let shell = SHELL.as_ref().and_then(|shell| {
            let said = shell.captures(masked)?.get(1)?.as_str();
            names(said, program).then_some(said)
        });
        let login = masked.split(": ").next().unwrap_or_default();
        Self {
            bbcp,
            other,
            shell,
            begins_with_login: login.contains('@') && !login.contains(char::is_whitespace),
            names_origin: masked.ends_with(ORIGIN),
        }
    }
}

/// Returns true if a shell's message is about the program: its name comes first (`bbcp: not found`) or is in
/// the last part (`command not found: bbcp`, `4711 Segmentation fault  bbcp SNK`).
fn names(said: &str, program: &str) -> bool {
    // The shell may print a path although the settings contain only the name.
    let file_name = |path: &str| path.rsplit('/').next().map(str::to_owned);
    let is_program = |word: &str| file_name(word.trim_matches(QUOTES)) == file_name(program);
    let mut parts = said.split(": ");
    parts.next().is_some_and(is_program)
        || said
            .rsplit(": ")
            .next()
            .is_some_and(|last| last.split_whitespace().any(is_program))
}

const ORIGIN: &str = "<origin>";
const COPY: &str = "<copy>";

/// Ending of the message of a side that sees the other one go. It is a consequence, never the cause.
const FOLLOWS: &str = " writing to stream.";

/// All matchers. A line states the first pattern with one that matches it.
pub(super) static MATCHERS: &[(Pattern, &[Matcher])] = &[
    (Pattern::Exists, &[bbcp("").ends("already exists.")]),
    (
        Pattern::Segfault,
        &[
            bbcp("").ends("killed via signal 11"),
            shell("").holds("egmentation fault"),
            // dash prints no name.
            ssh("Segmentation fault").ends("Segmentation fault"),
            ssh("Segmentation fault (core dumped)").ends("Segmentation fault (core dumped)"),
        ],
    ),
    (
        Pattern::Full,
        &[bbcp("No space left on device"), bbcp("Insufficient space")],
    ),
    (
        Pattern::Damaged,
        &[
            bbcp("").holds(" checksum ").holds(" does not match "),
            bbcp("").holds("checksum error"),
            bbcp("Invalid checksum from"),
        ],
    ),
    (
        Pattern::HostKey,
        &[
            ssh("Host key verification failed"),
            ssh("@ ").holds("REMOTE HOST IDENTIFICATION HAS CHANGED"),
            ssh("No ").holds(" host key is known for "),
        ],
    ),
    (
        Pattern::LoginDenied,
        &[
            ssh("Permission denied ("),
            ssh("").holds(": Permission denied ("),
            ssh("Received disconnect from ").holds("Too many authentication failures"),
        ],
    ),
    (
        Pattern::OriginDenied,
        &[
            bbcp("Permission denied processing "),
            bbcp("Permission denied ")
                .names_origin()
                .unless(" executing "),
        ],
    ),
    (
        Pattern::DestinationDenied,
        &[
            bbcp("Permission denied ").unless(" executing "),
            bbcp("").holds(" failed to create "),
        ],
    ),
    (
        Pattern::Network,
        &[
            bbcp("Connection refused"),
            bbcp("Connection timed out"),
            bbcp("Connection reset").unless(FOLLOWS),
            bbcp("No route to host"),
            bbcp("Network is unreachable"),
            ssh("ssh: connect to host "),
            ssh("ssh: Could not resolve hostname "),
            ssh("ssh_exchange_identification: "),
            ssh("kex_exchange_identification: "),
            ssh("banner exchange: "),
            ssh("Connection timed out during banner exchange"),
            ssh("Connection closed by "),
            ssh("Connection reset by "),
            ssh("Connection to ").holds(" closed by remote host"),
            ssh("Connection to ").holds(" timed out"),
            ssh("Timeout, server ").ends(" not responding."),
            ssh("Received disconnect from "),
            ssh("Disconnected from "),
            ssh("Read from remote host "),
            ssh("Write failed: "),
            ssh("client_loop: "),
            ssh("packet_write_"),
            ssh("ssh_dispatch_run_fatal: "),
        ],
    ),
    (
        Pattern::RemoteProgram,
        &[
            shell("").ends("not found"),
            shell("").ends("No such file or directory"),
            shell("").ends("Permission denied"),
            shell("command not found"),
            shell("no such file or directory"),
            shell("permission denied"),
            shell("Unknown command"),
            // csh does not print its name; it prints the program's name at the place of bbcp's mark.
            bbcp("Command not found."),
        ],
    ),
    (Pattern::LocalProgram, &[bbcp("").holds(" executing ")]),
    (
        Pattern::BadOption,
        &[
            bbcp("Invalid option"),
            bbcp("Invalid ").holds(" - ").unless("return code"),
            bbcp("").holds("not specified"),
            bbcp("").holds("opening config file"),
        ],
    ),
    (
        Pattern::OriginMissing,
        &[bbcp("No such file or directory processing ")],
    ),
    (
        Pattern::OriginDirectory,
        &[bbcp("").ends("is a directory.")],
    ),
    (Pattern::OriginPathTooLong, &[bbcp("Message too long")]),
    (
        Pattern::NoDirectory,
        &[
            bbcp("Target directory ").holds(" not found"),
            bbcp("No such file or directory opening "),
        ],
    ),
    (
        Pattern::ResumeRefused,
        &[
            bbcp("").holds("changed since the copy completed"),
            bbcp("").holds("appears to have changed"),
            bbcp("Cannot append to "),
        ],
    ),
    (
        Pattern::OriginChanged,
        &[bbcp("Error -").holds(" writing ")],
    ),
    (Pattern::PortBusy, &[bbcp("Address already in use")]),
    (Pattern::TimeLimit, &[bbcp("Time limit exceeded")]),
    (
        Pattern::NoStreams,
        &[
            bbcp("Accept timed out"),
            bbcp("Unable to allocate more than"),
            bbcp("Unable to connect to "),
        ],
    ),
    (
        Pattern::PeerGone,
        &[
            bbcp("Unexpected end of control stream"),
            bbcp("").holds("unexpectedly terminated"),
        ],
    ),
    (
        Pattern::Follower,
        &[
            bbcp("").ends("Broken pipe writing to stream."),
            bbcp("").ends("Connection reset by peer writing to stream."),
        ],
    ),
];

impl Pattern {
    /// The cause that a line states, if any, and true if bbcp itself states it.
    pub(super) fn of(line: &str, names: Names<'_>) -> Option<(Self, bool)> {
        // A path may contain any text.
        let mut masked = line.to_owned();
        for (path, mask) in [(names.origin, ORIGIN), (names.copy, COPY)] {
            if path.len() > 1 {
                masked = masked.replace(path, mask);
            }
        }
        let parsed = Line::parse(&masked, names.program);
        let (pattern, matcher) = MATCHERS.iter().find_map(|(pattern, matchers)| {
            let found = matchers.iter().find(|matcher| matcher.matches(&parsed))?;
            Some((*pattern, found))
        })?;
        Some((pattern, matcher.source == OutputSource::Bbcp))
    }

    /// Returns true if bbcp reports only that the other side is gone or never existed, so that ssh or the
    /// remote shell may have printed the reason.
    pub(super) fn leaves_the_reason_open(self) -> bool {
        matches!(
            self,
            Self::Network | Self::NoStreams | Self::PeerGone | Self::Follower
        )
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const NAMES: Names<'_> = Names {
        origin: "/d/checksum error, not specified.tar",
        copy: "/e/.t.part",
        program: "/opt/bbcp",
    };

    fn of(line: &str) -> Option<Pattern> {
        Pattern::of(line, NAMES).map(|(pattern, _)| pattern)
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
    fn shells_miss_bbcp(#[case] line: &str) {
        assert_eq!(of(line), Some(Pattern::RemoteProgram));
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
    fn noise_means_nothing(#[case] line: &str) {
        assert_eq!(of(line), None);
    }

    #[rstest]
    #[case(
        "bbcp: No such file or directory processing {}",
        Pattern::OriginMissing
    )]
    #[case("bbcp: Permission denied opening {}", Pattern::OriginDenied)]
    #[case("bbcp: {} is a directory.", Pattern::OriginDirectory)]
    fn a_path_is_no_text(#[case] line: &str, #[case] pattern: Pattern) {
        assert_eq!(of(&line.replace("{}", NAMES.origin)), Some(pattern));
    }
}
