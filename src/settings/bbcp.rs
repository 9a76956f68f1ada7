//! `[bbcp]`: bbcp's command line.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use celery_worker_cli::settings::{Problem, Problems, SectionProblems};

/// `[bbcp]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Bbcp {
    /// Local program.
    pub program: PathBuf,
    /// Program at the other end.
    pub remote_program: PathBuf,
    /// Data streams, 1 to 64.
    pub streams: u8,
    /// TCP window in bbcp's notation; empty for its default.
    pub window: String,
    /// Seconds between progress lines, 2 or more.
    pub progress_interval: u32,
    /// Listener ports `first:last`; empty for bbcp's default.
    pub port_range: String,
    /// `-z`.
    pub reverse_connection: bool,
    /// `-n`.
    pub no_dns: bool,
    /// Buffer checksum: `c32c`, `md5` or empty.
    pub in_flight_checksum: String,
    /// Rate limit in bbcp's notation; empty for none.
    pub max_rate: String,
    /// Pause between SIGTERM and SIGKILL to the process group.
    #[serde(with = "humantime_serde")]
    pub kill_after: Duration,
}

impl Bbcp {
    /// Returns the problems of values that come from the database, not from a file; `key` is the prefix of their keys.
    pub(crate) fn problems(&self, key: &str) -> Vec<Problem> {
        let mut problems = Problems::default();
        self.check(&mut problems.section(key));
        problems.into_vec()
    }

    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            (1..=64).contains(&self.streams),
            "streams",
            "must be 1 to 64",
        );
        // With -P 1, bbcp floods its output with rates that are not numbers.
        problems.require(
            self.progress_interval >= 2,
            "progress_interval",
            "must be 2 or more",
        );
        problems.require(
            self.window.is_empty() || is_size(&self.window),
            "window",
            "must be a size such as \"8m\", or empty",
        );
        problems.require(
            self.max_rate.is_empty() || is_size(&self.max_rate),
            "max_rate",
            "must be a rate such as \"100m\", or empty",
        );
        problems.require(
            self.port_range.is_empty() || is_port_range(&self.port_range),
            "port_range",
            "must be \"first:last\", or empty",
        );
        problems.require(
            ["", "c32c", "md5"].contains(&self.in_flight_checksum.as_str()),
            "in_flight_checksum",
            "must be \"c32c\", \"md5\" or empty",
        );
        problems.require(
            is_word(&self.remote_program.to_string_lossy()),
            "remote_program",
            "must contain no blanks and not begin with `-`",
        );
    }

    /// Adds a problem if `time` is too short to see progress in bbcp's output.
    pub(super) fn check_stall(
        &self,
        key: &str,
        time: Duration,
        problems: &mut SectionProblems<'_>,
    ) {
        problems.require(
            time >= Duration::from_secs(u64::from(self.progress_interval)) * 2,
            key,
            "must be twice bbcp.progress_interval or more: between two progress lines no progress is visible",
        );
    }
}

/// Returns true for a size or rate of `bbcp -w` and `-x`.
fn is_size(text: &str) -> bool {
    let number = text.strip_prefix('=').unwrap_or(text);
    let digits = number.strip_suffix(['k', 'm', 'g']).unwrap_or(number);
    is_number(digits) && !digits.starts_with('0')
}

/// Returns true for two ports `first:last` in order.
fn is_port_range(text: &str) -> bool {
    let port = |text: &str| text.parse::<u16>().ok().filter(|_| is_number(text));
    text.split_once(':')
        .and_then(|(first, last)| Some((port(first)?, port(last)?)))
        .is_some_and(|(first, last)| first > 0 && first <= last)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns true for one word of the start commands, which bbcp splits at blanks without quoting.
pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("8m", true)]
    #[case("=100k", true)]
    #[case("1", true)]
    #[case("30g", true)]
    #[case("0", false)]
    #[case("08m", false)]
    #[case("8mm", false)]
    #[case("8M", false)]
    #[case("m", false)]
    #[case("==8", false)]
    #[case("+8", false)]
    #[case("8 m", false)]
    fn sizes(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_size(text), expected);
    }

    #[rstest]
    #[case("5031:5099", true)]
    #[case("5031:5031", true)]
    #[case("00001:2", true)]
    #[case("0:5", false)]
    #[case("9:1", false)]
    #[case("1:65536", false)]
    #[case("+1:2", false)]
    #[case("1:", false)]
    #[case("1", false)]
    #[case("1:2:3", false)]
    fn port_ranges(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_port_range(text), expected);
    }
}
