//! Patterns of the output of bbcp, ssh and remote shells.
//!
//! All of them write to one pipe, and so does every start-up file at the other end. A line is attributed by
//! its form: lines of bbcp begin with `bbcp: `, lines of ssh have the beginnings from its sources, lines of a
//! shell begin with the shell's name and contain the name of the program that it should start. Other lines
//! are ignored. A row of the table contains its patterns; nothing here knows the failures.

use std::sync::LazyLock;

use regex::Regex;

use super::connection::DataConnection;
use super::row::Role;

/// Certainty with which a line states a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transfer) enum Confidence {
    /// The line states the cause.
    Known,
    /// The line states only that the other side is gone or never existed. If bbcp printed it, ssh or the
    /// remote shell may have printed the reason.
    Suspected,
    /// An exit status that means the failure only if a remote side exists and bbcp printed nothing.
    Assumed,
}

/// Lines that state a failure.
#[derive(Debug)]
pub(crate) struct Pattern<F> {
    /// Order among all patterns, the most specific first: a line states the first pattern that matches it,
    /// and where one source states several, the first is the cause and the others follow from it.
    pub(in crate::transfer) rank: u16,
    pub(in crate::transfer) confidence: Confidence,
    /// Makes the failure.
    pub(in crate::transfer) failure: fn(Observation) -> F,
    pub(crate) matchers: &'static [Matcher],
}

/// Values from which a failure is made.
#[derive(Debug, Clone)]
pub(crate) struct Observation {
    /// The line.
    pub(in crate::transfer) line: String,
    /// Path at the origin.
    pub(in crate::transfer) origin: String,
    /// Temporary path at the destination.
    pub(in crate::transfer) copy: String,
    /// Host at the other end.
    pub(in crate::transfer) host: String,
    /// End that is remote.
    pub(in crate::transfer) role: Role,
    /// Data connections of the copy.
    pub(in crate::transfer) connection: Box<DataConnection>,
}

/// Program that prints a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputSource {
    /// bbcp: its lines begin with `bbcp: `, which is not part of a [`Matcher`].
    Bbcp,
    /// The ssh client.
    Ssh,
    /// The remote shell that starts bbcp: its lines begin with its name, which is not part of a
    /// [`Matcher`], and name bbcp.
    Shell,
    /// No program: the exit status of bbcp, as text.
    ExitStatus,
}

/// Strings that occur in lines without a meaning for the failure.
#[derive(Debug, Clone, Copy)]
pub(in crate::transfer) struct Names<'a> {
    /// Path at the origin.
    pub(in crate::transfer) origin: &'a str,
    /// Temporary path at the destination.
    pub(in crate::transfer) copy: &'a str,
    /// Command that starts bbcp at the other end.
    pub(in crate::transfer) program: &'a str,
}

/// A line by its parts; empty parts always match.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matcher {
    pub(crate) source: OutputSource,
    pub(crate) begins: &'static str,
    pub(crate) contains: [&'static str; 2],
    pub(crate) ends_with: &'static str,
    /// True if the line ends with the path at the origin.
    pub(crate) names_origin: bool,
    /// Text that must not occur: lines with it have another meaning.
    without: &'static str,
}

/// A matcher for a line of bbcp.
pub(super) const fn bbcp(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Bbcp,
        begins,
        contains: ["", ""],
        ends_with: "",
        names_origin: false,
        without: "",
    }
}

/// A matcher for a line of ssh. With an empty beginning the line begins with `user@host`.
pub(super) const fn ssh(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Ssh,
        ..bbcp(begins)
    }
}

/// A matcher for a line of the remote shell.
pub(super) const fn shell(begins: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::Shell,
        ..bbcp(begins)
    }
}

/// A matcher for an exit status: `exit code 1`, `signal 9`.
pub(super) const fn exit(status: &'static str) -> Matcher {
    Matcher {
        source: OutputSource::ExitStatus,
        ..bbcp(status)
    }
}

impl Matcher {
    pub(super) const fn contains(self, text: &'static str) -> Self {
        Self {
            contains: [text, self.contains[0]],
            ..self
        }
    }

    pub(super) const fn ends_with(self, ends_with: &'static str) -> Self {
        Self { ends_with, ..self }
    }

    pub(super) const fn names_origin(self) -> Self {
        Self {
            names_origin: true,
            ..self
        }
    }

    pub(super) const fn without(self, without: &'static str) -> Self {
        Self { without, ..self }
    }

    /// Returns true if the pattern matches a line.
    fn matches(&self, line: &OutputLine<'_>) -> bool {
        let (Some(text), login) = (match self.source {
            OutputSource::Bbcp => (line.bbcp, true),
            OutputSource::Ssh => (
                line.other,
                !self.begins.is_empty() || line.begins_with_login,
            ),
            OutputSource::Shell => (line.shell, true),
            OutputSource::ExitStatus => (None, true),
        }) else {
            return false;
        };
        login
            && text.starts_with(self.begins)
            && self.contains.iter().all(|part| text.contains(part))
            && text.ends_with(self.ends_with)
            && (!self.names_origin || line.names_origin)
            && (self.without.is_empty() || !text.contains(self.without))
    }
}

impl<F> Pattern<F> {
    /// Program that states this pattern with a line, if the line matches.
    pub(super) fn source_of(&self, line: &OutputLine<'_>) -> Option<OutputSource> {
        let matcher = self.matchers.iter().find(|matcher| matcher.matches(line))?;
        Some(matcher.source)
    }

    /// Returns true if an exit status states this pattern.
    pub(super) fn is_exit(&self, status: &str) -> bool {
        self.matchers
            .iter()
            .any(|matcher| matcher.source == OutputSource::ExitStatus && matcher.begins == status)
    }
}

/// A line, taken apart.
pub(super) struct OutputLine<'a> {
    /// Text after bbcp's mark.
    bbcp: Option<&'a str>,
    /// A line without bbcp's mark.
    other: Option<&'a str>,
    /// Message of a shell about bbcp.
    shell: Option<&'a str>,
    begins_with_login: bool,
    names_origin: bool,
}

/// `bash: line 1: …`, `-zsh:1: …`, `/bin/sh: 1: …`, `env: …`: captures the text after the shell's name.
static SHELL: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"^-?(?:/\S*/)?(?:[a-z]*sh|env)(?:\[\d+\])?:(?: ?(?:line )?\d+:)? +(.*)$").ok()
});

/// Quotation marks around names in messages.
const QUOTES: [char; 5] = ['\'', '"', '`', '‘', '’'];

impl<'a> OutputLine<'a> {
    /// Takes apart a line whose paths are masked as `<origin>` and `<copy>`.
    pub(super) fn parse(masked: &'a str, program: &str) -> Self {
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

/// Replaces the paths of a line: they may contain any text.
pub(super) fn mask_paths(line: &str, names: Names<'_>) -> String {
    let mut masked = line.to_owned();
    for (path, mask) in [(names.origin, ORIGIN), (names.copy, COPY)] {
        if path.len() > 1 {
            masked = masked.replace(path, mask);
        }
    }
    masked
}
