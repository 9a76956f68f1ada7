//! `[ssh]`: access to remote locations.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::bbcp::is_word;
use celery_worker_cli::settings::SectionProblems;

/// `[ssh]`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// Program.
    pub program: PathBuf,
    /// Login; empty for the user of this process.
    pub user: String,
    /// Port.
    pub port: u16,
    /// Argument of `-i`; empty for ssh's default keys.
    pub identity_file: String,
    /// `UserKnownHostsFile`; empty for ssh's default.
    pub known_hosts_file: String,
    /// `ConnectTimeout`.
    #[serde(with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Further `-o` options, `Name=value`.
    pub options: Vec<String>,
    /// Maximum size in bytes of a package that is copied through the connection of ssh; 0 for none.
    pub max_package_bytes: u64,
    /// Remote program and arguments that print the SHA-256 of standard input; `auto` for the faster of two.
    pub sha256_command: Vec<String>,
    /// The same for BLAKE3.
    pub blake3_command: Vec<String>,
    /// The same for XXH3.
    pub xxh3_command: Vec<String>,
    /// The same for MD5.
    pub md5_command: Vec<String>,
}

impl Ssh {
    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            self.user.is_empty() || is_user(&self.user),
            "user",
            "must be a login name: small letters, digits, `_` and `-`, not beginning with `-`",
        );
        problems.require(self.port > 0, "port", "must be above 0");
        problems.require(
            self.connect_timeout >= Duration::from_secs(1),
            "connect_timeout",
            "must be 1s or more",
        );
        for (key, value) in [
            ("program", self.program.to_string_lossy().as_ref()),
            ("identity_file", &self.identity_file),
            ("known_hosts_file", &self.known_hosts_file),
        ] {
            problems.require(
                value.is_empty() || is_word(value),
                key,
                "must contain no blanks and not begin with `-`: bbcp splits its start command at blanks",
            );
        }
        for (key, command) in [
            ("sha256_command", &self.sha256_command),
            ("blake3_command", &self.blake3_command),
            ("xxh3_command", &self.xxh3_command),
            ("md5_command", &self.md5_command),
        ] {
            let usable = |word: &String| !word.is_empty() && !word.contains(char::is_control);
            problems.require(
                command.iter().all(usable) && command.first().is_some_and(|word| is_word(word)),
                key,
                "must be a program and its arguments, e.g. [\"sha256sum\"]",
            );
        }
        for option in &self.options {
            problems.require(
                is_word(option) && option.contains('='),
                "options",
                "each must be `Name=value` without blanks",
            );
        }
    }
}

/// Returns true for names that are safe on ssh's command line: ssh cannot interpret them as options.
fn is_user(name: &str) -> bool {
    let begins = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    let continues = |byte: u8| begins(byte) || byte.is_ascii_digit() || byte == b'-';
    name.bytes().next().is_some_and(begins) && name.bytes().all(continues)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ccat", true)]
    #[case("_data-2", true)]
    #[case("", false)]
    #[case("-l", false)]
    #[case("2a", false)]
    #[case("Ccat", false)]
    #[case("a b", false)]
    #[case("a\n", false)]
    fn users(#[case] name: &str, #[case] expected: bool) {
        assert_eq!(is_user(name), expected);
    }
}
