//! Injections into one copy, and the parser of a plan's entries.
//!
//! Entry = effects joined by `+`; effect = `name[:argument…][@position]`; position = bytes from the start of the file,
//! or `N%` of its size (50 % if it is missing). `rc:N:text` takes the rest of the entry as text, in which `\n` stands
//! for a line end.

use serde::{Deserialize, Serialize};

/// A position in a file.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) enum Position {
    /// Bytes from the start
    Offset(u64),
    /// Part of the size
    Percent(f64),
}

impl Position {
    /// Offset in a file of this size; never beyond its end.
    pub(crate) fn within(self, size: u64) -> u64 {
        match self {
            Self::Offset(offset) => offset.min(size),
            Self::Percent(percent) => ((size as f64 * percent / 100.0) as u64).min(size),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('%') {
            Some(percent) => percent
                .parse()
                .ok()
                .filter(|percent| (0.0..=100.0).contains(percent))
                .map(Self::Percent),
            None => text.parse().ok().map(Self::Offset),
        }
    }
}

/// Copies that end before the first byte: the agent decides all of them, see [`crate::early`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum EarlyEnd {
    /// Target exists
    Exists,
    /// Source missing
    NoSource,
    /// Source not readable
    SourcePermission,
    /// Source is a directory
    SourceDirectory,
    /// Target directory missing
    NoDirectory,
    /// Target directory not writable
    TargetPermission,
    /// Space check fails
    NoSpace,
    /// `-a`: source changed
    CheckpointChanged,
    /// `-a`: target changed
    NoAppend,
    /// `-a`: same size
    Skip,
    /// ssh: connection refused
    Refused,
    /// ssh: connection timed out, after this many seconds
    TimedOut(f64),
    /// ssh: unknown host
    Unresolved,
    /// ssh: authentication
    Authentication,
    /// ssh: host key
    HostKey,
    /// No bbcp on the other side
    NoBbcp,
    /// No ssh here
    NoSsh,
    /// Start-up files that print text
    Banner,
    /// Only this many data streams
    Streams(u64),
    /// The data port cannot be reached, as behind a firewall
    Unreached,
    /// No port to listen on
    PortBusy,
    /// Any code and text
    Exit(u8, Option<String>),
}

/// An event at a certain size of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Event {
    /// ENOSPC
    DiskFull,
    /// Data connections reset
    Reset,
    /// The sink's writer dies by SIGSEGV
    SinkSegv,
    /// The remote side vanishes; the agent ends with this code
    RemoteDeath(u8),
    /// The agent dies by SIGSEGV
    AgentSegv,
    /// The agent dies by SIGKILL
    AgentKill,
    /// `-t`
    TimeLimit,
    /// Source truncated or grown
    SourceChanged,
}

/// One effect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Effect {
    /// Ends before the copy
    Early(EarlyEnd),
    /// Ends (or is orphaned) at a point of the copy
    At(Position, Event),
    /// Data stop at this position, for this many seconds or forever
    Stall(Position, Option<f64>),
    /// Bytes per second
    Slow(u64),
    /// Progress lines without a file
    ProgressOnly,
    /// A sink that outlives its agent and may then unlink the target
    Orphan {
        /// Life after the agent's death
        seconds: f64,
        /// Unlink by name at the end
        unlink: bool,
    },
    /// The checksum comparison fails
    BadSum,
    /// One byte differs on disk
    Corrupt(Position),
    /// Bytes missing at the end of the target
    Short(u64),
    /// Surplus bytes at the end of the target
    Long(u64),
    /// Number of junk lines
    Noise(u64),
    /// A line of this many bytes
    LongLine(usize),
    /// Lines that are not UTF-8
    Binary,
    /// Text on standard output
    StandardOutputJunk,
    /// Lines end in `\r\n`
    CarriageReturn,
    /// Rates are `-nan`
    NotANumber,
    /// Rates are `inf`
    Infinite,
    /// Number of progress lines at once
    Flood(u64),
    /// Never starts
    HangAtStart,
    /// Never ends
    HangAtEnd,
    /// Ends while a grandchild holds standard error for this many seconds
    HeldStandardError(f64),
    /// SIGTERM is ignored
    IgnoreTerm,
    /// The other side is of another version
    VersionWarning,
}

/// Parses an entry.
///
/// # Errors
/// A text for the author of the test.
pub(crate) fn parse_entry(entry: &str) -> Result<Vec<Effect>, String> {
    let mut effects = Vec::new();
    let mut rest = entry.trim();
    while !rest.is_empty() {
        let text;
        (text, rest) = if rest.starts_with("rc:") {
            (rest, "")
        } else {
            rest.split_once('+').unwrap_or((rest, ""))
        };
        effects.extend(parse_effect(text).ok_or_else(|| format!("no such injection: {text}"))?);
    }
    Ok(effects)
}

/// Parses one effect or several joined ones; returns `None` for invalid text.
fn parse_effect(text: &str) -> Option<Vec<Effect>> {
    if let Some(arguments) = text.strip_prefix("rc:") {
        let (code, line) = match arguments.split_once(':') {
            Some((code, line)) => (code, Some(line.replace("\\n", "\n"))),
            None => (arguments, None),
        };
        return Some(vec![Effect::Early(EarlyEnd::Exit(
            code.parse().ok()?,
            line,
        ))]);
    }
    let (call, at) = match text.split_once('@') {
        Some((call, at)) => (call, Some(Position::parse(at)?)),
        None => (text, None),
    };
    let mut words = call.split(':');
    let name = words.next()?;
    let arguments: Vec<&str> = words.collect();
    let position = at.unwrap_or(Position::Percent(50.0));
    let event = |event| Effect::At(position, event);
    let effect = match (name, arguments.as_slice()) {
        ("ok", []) => return Some(Vec::new()),
        ("ignore-term", []) => {
            let stall = at.map(|at| Effect::Stall(at, None));
            return Some(std::iter::once(Effect::IgnoreTerm).chain(stall).collect());
        }

        ("exists", []) => Effect::Early(EarlyEnd::Exists),
        ("nosrc", []) => Effect::Early(EarlyEnd::NoSource),
        ("srcperm", []) => Effect::Early(EarlyEnd::SourcePermission),
        ("srcdir", []) => Effect::Early(EarlyEnd::SourceDirectory),
        ("nodir", []) => Effect::Early(EarlyEnd::NoDirectory),
        ("dstperm", []) => Effect::Early(EarlyEnd::TargetPermission),
        ("nospace", []) => Effect::Early(EarlyEnd::NoSpace),
        ("ckpchanged", []) => Effect::Early(EarlyEnd::CheckpointChanged),
        ("noappend", []) => Effect::Early(EarlyEnd::NoAppend),
        ("skip", []) => Effect::Early(EarlyEnd::Skip),
        ("refused", []) => Effect::Early(EarlyEnd::Refused),
        ("timeout", []) => Effect::Early(EarlyEnd::TimedOut(0.0)),
        ("timeout", [seconds]) => Effect::Early(EarlyEnd::TimedOut(seconds_of(seconds)?)),
        ("noresolve", []) => Effect::Early(EarlyEnd::Unresolved),
        ("auth", []) => Effect::Early(EarlyEnd::Authentication),
        ("hostkey", []) => Effect::Early(EarlyEnd::HostKey),
        ("nobbcp", []) => Effect::Early(EarlyEnd::NoBbcp),
        ("nossh", []) => Effect::Early(EarlyEnd::NoSsh),
        ("banner", []) => Effect::Early(EarlyEnd::Banner),
        ("streams", [count]) => Effect::Early(EarlyEnd::Streams(count.parse().ok()?)),
        ("unreached", []) => Effect::Early(EarlyEnd::Unreached),
        ("portbusy", []) => Effect::Early(EarlyEnd::PortBusy),

        ("enospc", []) => event(Event::DiskFull),
        ("reset", []) => event(Event::Reset),
        ("segv-sink", []) => event(Event::SinkSegv),
        ("segv-remote", []) => event(Event::RemoteDeath(255)),
        ("segv-remote", [code]) => event(Event::RemoteDeath(code.parse().ok()?)),
        ("segv-agent", []) => event(Event::AgentSegv),
        ("kill", []) => event(Event::AgentKill),
        ("timelimit", []) => event(Event::TimeLimit),
        ("srcchanged", []) => event(Event::SourceChanged),

        ("stall", []) => Effect::Stall(position, None),
        ("stall", [seconds]) => Effect::Stall(position, Some(seconds_of(seconds)?)),
        ("slow", [rate]) => Effect::Slow(rate.parse().ok()?),
        ("progress-only", []) => Effect::ProgressOnly,
        ("orphan", [seconds]) => Effect::Orphan {
            seconds: seconds_of(seconds)?,
            unlink: false,
        },
        ("orphan", [seconds, "unlink"]) => Effect::Orphan {
            seconds: seconds_of(seconds)?,
            unlink: true,
        },

        ("badsum", []) => Effect::BadSum,
        ("corrupt", []) => Effect::Corrupt(position),
        ("corrupt", [offset]) => Effect::Corrupt(Position::parse(offset)?),
        ("short", [bytes]) => Effect::Short(bytes.parse().ok()?),
        ("long", [bytes]) => Effect::Long(bytes.parse().ok()?),

        ("noise", [lines]) => Effect::Noise(lines.parse().ok()?),
        ("longline", [bytes]) => Effect::LongLine(bytes.parse().ok()?),
        ("binary", []) => Effect::Binary,
        ("stdout-junk", []) => Effect::StandardOutputJunk,
        ("crlf", []) => Effect::CarriageReturn,
        ("nan", []) => Effect::NotANumber,
        ("inf", []) => Effect::Infinite,
        ("flood", [lines]) => Effect::Flood(lines.parse().ok()?),

        ("hang-start", []) => Effect::HangAtStart,
        ("hang-exit", []) => Effect::HangAtEnd,
        ("fork-stderr", []) => Effect::HeldStandardError(10.0),
        ("fork-stderr", [seconds]) => Effect::HeldStandardError(seconds_of(seconds)?),
        ("version-warn", []) => Effect::VersionWarning,
        _ => return None,
    };
    // Effects without a position accept none, so that a mistake in a test is detected.
    let positioned = matches!(
        effect,
        Effect::At(..) | Effect::Stall(..) | Effect::Corrupt(_)
    );
    (at.is_none() || positioned).then(|| vec![effect])
}

fn seconds_of(text: &str) -> Option<f64> {
    text.parse()
        .ok()
        .filter(|seconds: &f64| (0.0..1e9).contains(seconds))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn entries() {
        assert_eq!(parse_entry("ok").unwrap(), []);
        assert_eq!(
            parse_entry("enospc@40%").unwrap(),
            [Effect::At(Position::Percent(40.0), Event::DiskFull)]
        );
        assert_eq!(
            parse_entry("slow:1000+stall:2@7").unwrap(),
            [
                Effect::Slow(1000),
                Effect::Stall(Position::Offset(7), Some(2.0))
            ]
        );
        assert_eq!(
            parse_entry("crlf+rc:255:u@h: no+entry\\nagain").unwrap(),
            [
                Effect::CarriageReturn,
                Effect::Early(EarlyEnd::Exit(255, Some("u@h: no+entry\nagain".into())))
            ]
        );
        for bad in ["stal", "streams", "exists@5", "stall@101%", "rc:x", "short"] {
            assert!(parse_entry(bad).is_err(), "{bad}");
        }
    }

    /// The table of injections in the README: effects in backquotes, in the first column.
    #[test]
    fn the_effects_of_the_readme_are_read() {
        let (_, table) = include_str!("../README.md")
            .split_once("| effects |")
            .unwrap();
        let rows = table
            .lines()
            .skip(2)
            .take_while(|line| line.starts_with('|'));
        let cells = rows.filter_map(|row| row.split('|').nth(1));
        let effects: Vec<&str> = cells
            .flat_map(|cell| cell.split('`').skip(1).step_by(2))
            .collect();
        assert!(effects.len() > 50, "{effects:?}");
        for effect in effects {
            let bare = effect.trim_end_matches("[@N]");
            assert!(parse_entry(bare).is_ok(), "{bare}");
            if effect != bare {
                assert!(parse_entry(&format!("{bare}@7")).is_ok(), "{effect}");
            }
        }
    }
}
