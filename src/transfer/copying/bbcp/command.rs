//! bbcp's command line.
//!
//! The command line is a vector of arguments, never a shell string. These dangerous options cannot be expressed: `-f`
//! (unlinks the target, or the source when both are one file), `-P 1` (floods the output), `-r` (broken), `-l` (hides
//! the errors), `-t`, `-O` (skips files, and exits with 0), `-N` (runs programs).

use std::fmt;
use std::path::PathBuf;

use crate::process::find_program;
use crate::settings::Bbcp;
use crate::transfer::endpoint::{AbsolutePath, CopySession, Endpoint, Remote};
use crate::transfer::failures::TransferError;
use crate::transfer::plan::Plan;

/// bbcp's environment variable for a file with further options. It is set so that an existing `~/.bbcp.cf` has no
/// effect.
pub(crate) const CONFIG_VARIABLE: (&str, &str) = ("bbcp_CONFIGFN", "/dev/null");

/// Minimum value of `-P`, in seconds: with 1, bbcp floods its output with rates that are not numbers.
const LEAST_PROGRESS_INTERVAL: u32 = 2;

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// Absolute path: bbcp starts itself again under this name.
    pub program: PathBuf,
    /// Arguments of the program.
    pub arguments: Vec<String>,
}

impl Invocation {
    /// Creates the command line of a plan, and searches for the program. A copy with a remote end uses `session`.
    ///
    /// # Errors
    /// [`TransferError::ProgramMissing`].
    pub(super) fn new(plan: &Plan, session: Option<&CopySession>) -> Result<Self, TransferError> {
        let program =
            find_program(&plan.bbcp.program).ok_or_else(|| TransferError::ProgramMissing {
                program: plan.bbcp.program.display().to_string(),
            })?;
        Ok(Self {
            program,
            arguments: arguments(
                plan,
                &session.map(CopySession::ssh_options).unwrap_or_default(),
            ),
        })
    }
}

impl fmt::Display for Invocation {
    /// Writes the command line as it would be typed in a shell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program.to_string_lossy();
        let words =
            std::iter::once(program.as_ref()).chain(self.arguments.iter().map(String::as_str));
        f.write_str(&shell_words::join(words))
    }
}

/// bbcp's arguments for a plan. `ssh_options` are the options of the ssh that starts bbcp at a remote end.
fn arguments(plan: &Plan, ssh_options: &[String]) -> Vec<String> {
    let bbcp = &plan.bbcp;
    let mut line = CommandLine(Vec::new());
    line.flag("-v");
    line.option("-P", bbcp.progress_interval.max(LEAST_PROGRESS_INTERVAL));
    line.option("-s", bbcp.streams);
    if !bbcp.window.is_empty() {
        line.option("-w", &bbcp.window);
    }
    if plan.reads_growing_copy() {
        // Written in order, the growing file has no holes.
        line.flag("-o");
    }
    // bbcp exits only after both the file and its directory are on disk.
    line.option("-y", "dd");
    if plan.keeps_partial() {
        // The order matters: bbcp takes a word after `-a` as its directory.
        line.option("-a", plan.target.checkpoint_path());
        line.flag("-k");
    }
    if !bbcp.in_flight_checksum.is_empty() {
        line.flag("-e");
        if plan.keeps_partial() {
            // bbcp cannot print the checksum of a file if it copies only its end.
            line.option("-E", &bbcp.in_flight_checksum);
        } else {
            // The checksum goes to the standard output, which has no other text.
            line.option("-E", format!("{}=/dev/stdout", bbcp.in_flight_checksum));
        }
    }
    if bbcp.no_dns {
        line.flag("-n");
    }
    if bbcp.reverse_connection {
        line.flag("-z");
    }
    if !bbcp.port_range.is_empty() {
        line.option("-Z", &bbcp.port_range);
    }
    if !bbcp.max_rate.is_empty() {
        line.option("-x", &bbcp.max_rate);
    }
    if let Some(remote) = plan.source.endpoint().remote() {
        line.option("-S", start_command(remote, bbcp, ssh_options));
    }
    if let Some(remote) = plan.target.endpoint().remote() {
        line.option("-T", start_command(remote, bbcp, ssh_options));
    }
    // End of the options, for any content of the paths.
    line.flag("--");
    line.0
        .push(spec(plan.source.endpoint(), plan.source.path()));
    line.0
        .push(spec(plan.target.endpoint(), &plan.target.temporary_path()));
    line.0
}

struct CommandLine(Vec<String>);

impl CommandLine {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    /// Adds an option with a value. bbcp accepts values as separate words only.
    fn option(&mut self, name: &str, value: impl ToString) {
        self.0.extend([name.into(), value.to_string()]);
    }
}

/// Command by which bbcp starts itself at the other end; `%U` and `%H` are bbcp's names for login and host.
fn start_command(remote: &Remote, bbcp: &Bbcp, ssh_options: &[String]) -> String {
    let mut words = vec![remote.ssh.program.display().to_string()];
    words.extend(ssh_options.iter().cloned());
    if !remote.ssh.user.is_empty() {
        words.extend(["-l".to_owned(), "%U".to_owned()]);
    }
    words.extend(["%H".to_owned(), bbcp.remote_program.display().to_string()]);
    words.join(" ")
}

fn spec(endpoint: &Endpoint, path: &AbsolutePath) -> String {
    match endpoint {
        Endpoint::Local => path.to_string(),
        Endpoint::Remote(Remote { host, ssh, .. }) if ssh.user.is_empty() => {
            format!("{}:{path}", host.as_bbcp())
        }
        Endpoint::Remote(Remote { host, ssh, .. }) => {
            format!("{}@{}:{path}", ssh.user, host.as_bbcp())
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::LinkSettings;
    use crate::transfer::plan::Location;
    use crate::transfer::plan::examples::{between, link, location, package};

    fn line(from: &Location, to: &Location, link: &LinkSettings) -> Vec<String> {
        let plan = between(from, to, &package("d", "p.tar"), link).unwrap();
        arguments(&plan, &["-oPort=22".to_owned()])
    }

    fn here(root: &str) -> Location {
        location("here", "here", root)
    }

    fn far(root: &str) -> Location {
        location("far", "far.example.org", root)
    }

    #[test]
    fn a_local_copy_with_the_defaults() {
        let expected = "-v -P 10 -s 16 -w 8m -y dd -e -E c32c=/dev/stdout -n -- \
                        /a/d/p.tar /b/d/.ccat-transfer-42-2-deadbeef.part";
        assert_eq!(line(&here("/a"), &here("/b"), &link()).join(" "), expected);
    }

    #[test]
    fn a_push_with_everything() {
        let mut link = link();
        link.bbcp.progress_interval = 1;
        link.bbcp.in_flight_checksum = String::new();
        link.bbcp.window = String::new();
        link.bbcp.reverse_connection = true;
        link.bbcp.no_dns = false;
        link.bbcp.port_range = "5031:5099".into();
        link.bbcp.max_rate = "100m".into();
        link.bbcp.remote_program = "/opt/bbcp".into();
        link.ssh.user = "transfer".into();
        let start = "ssh -oPort=22 -l %U %H /opt/bbcp";
        let expected = [
            "-v",
            "-P",
            "2",
            "-s",
            "16",
            "-o",
            "-y",
            "dd",
            "-z",
            "-Z",
            "5031:5099",
            "-x",
            "100m",
            "-T",
            start,
            "--",
            "/a/d/p.tar",
            "transfer@far.example.org:/b/d/.ccat-transfer-42-2-deadbeef.part",
        ];
        assert_eq!(line(&here("/a"), &far("/b"), &link), expected);
    }

    #[test]
    fn a_pull_without_a_login() {
        let line = line(&far("/a"), &here("/b"), &link());
        let at = line.iter().position(|word| word == "-S").unwrap();
        assert_eq!(line[at + 1], "ssh -oPort=22 %H bbcp");
        assert!(!line.contains(&"-T".to_owned()));
        assert!(line.contains(&"-o".to_owned()));
        assert_eq!(line[line.len() - 2], "far.example.org:/a/d/p.tar");
    }

    #[test]
    fn ipv6_address_has_brackets() {
        let line = line(&here("/a"), &location("far", "fe80::1", "/b"), &link());
        assert!(line[line.len() - 1].starts_with("[fe80::1]:/b/"));
    }

    #[test]
    fn a_missing_program() {
        let mut link = link();
        link.bbcp.program = "no-such-bbcp".into();
        let plan = between(&here("/a"), &here("/b"), &package("", "f"), &link).unwrap();
        let error = Invocation::new(&plan, None).unwrap_err();
        assert_eq!(error.code(), "program_missing");
    }

    #[test]
    fn command_is_shown_as_shell_words() {
        let invocation = Invocation {
            program: "/opt/bbcp".into(),
            arguments: vec!["-T".into(), "a b".into(), "/x'y".into()],
        };
        assert_eq!(invocation.to_string(), r#"/opt/bbcp -T 'a b' '/x'\''y'"#);
    }

    proptest! {
        /// For any content of the rows, the command line has two operands, each an absolute path after an optional
        /// checked host, and no word that could be taken for an option.
        #[test]
        fn data_are_never_options(
            host in "[-a-zA-Z0-9.@:\\[\\] ]{1,12}",
            root in "/?[-\\PC]{0,20}",
            relative in "[-\\PC]{0,20}",
            name in "-?\\PC{1,20}",
            pull: bool,
        ) {
            let other = location("far", &host, &root);
            let (from, to) = if pull { (other, here("/b")) } else { (here("/a"), other) };
            let Ok(plan) = between(&from, &to, &package(&relative, &name), &link()) else {
                return Ok(());
            };
            let line = arguments(&plan, &[]);
            let end = line.iter().position(|word| word == "--").unwrap();
            prop_assert_eq!(line.len(), end + 3);
            for operand in &line[end + 1..] {
                prop_assert!(!operand.starts_with('-'));
                prop_assert!(!operand.contains(char::is_control));
                let remote = !operand.starts_with('/');
                if remote {
                    let (host, path) = operand.split_once(":/").unwrap();
                    prop_assert!(!host.contains(['@', '/', ' ']));
                    prop_assert!(!path.split('/').any(|c| c == ".."));
                }
            }
            // No data of the rows come before the operands.
            for forbidden in ["-f", "-r", "-l", "-t", "-O", "-N", "-F", "-a", "-k"] {
                prop_assert!(!line[..end].contains(&forbidden.to_owned()));
            }
        }
    }
}
