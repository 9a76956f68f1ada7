//! bbcp's command line.
//!
//! An argument vector, never a shell string. What bbcp must never be told is not expressible here:
//! `-f` (unlinks the target, or the source when both are one file), `-P 1` (floods), `-r` (broken),
//! `-l` (hides the errors), `-t`, `-O` (skips, and ends 0), `-N` (runs programs).

use std::fmt;
use std::path::PathBuf;

use crate::process::find_program;
use crate::settings::Bbcp;
use crate::transfer::endpoint::{AbsolutePath, Endpoint, Remote, ssh_options};
use crate::transfer::error::TransferError;
use crate::transfer::plan::Plan;

/// bbcp's own variable for a file with further options; a stray `~/.bbcp.cf` must not count.
pub const CONFIG_VARIABLE: (&str, &str) = ("bbcp_CONFIGFN", "/dev/null");

/// With 1, bbcp floods its output with rates that are no numbers.
const LEAST_PROGRESS_INTERVAL: u32 = 2;

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// Absolute: bbcp starts itself again by this name.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Invocation {
    /// The command line of a plan, with the program looked up.
    ///
    /// # Errors
    /// [`TransferError::ProgramMissing`].
    pub fn new(plan: &Plan) -> Result<Self, TransferError> {
        let program =
            find_program(&plan.bbcp.program).ok_or_else(|| TransferError::ProgramMissing {
                program: plan.bbcp.program.display().to_string(),
            })?;
        Ok(Self {
            program,
            arguments: arguments(plan),
        })
    }
}

impl fmt::Display for Invocation {
    /// As one would type it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program.to_string_lossy();
        let words =
            std::iter::once(program.as_ref()).chain(self.arguments.iter().map(String::as_str));
        f.write_str(&shell_words::join(words))
    }
}

/// bbcp's arguments for a plan.
pub fn arguments(plan: &Plan) -> Vec<String> {
    let bbcp = &plan.bbcp;
    let mut line = Line(Vec::new());
    line.flag("-v");
    line.option("-P", bbcp.progress_interval.max(LEAST_PROGRESS_INTERVAL));
    line.option("-s", bbcp.streams);
    if !bbcp.window.is_empty() {
        line.option("-w", &bbcp.window);
    }
    // Both the file and its directory are on disk before bbcp says that it is done.
    line.option("-y", "dd");
    if !bbcp.in_flight_checksum.is_empty() {
        line.flag("-e");
        // Alone on the other output, where nothing can be mistaken for it.
        line.option("-E", format!("{}=/dev/stdout", bbcp.in_flight_checksum));
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
        line.option("-S", start_command(remote, bbcp));
    }
    if let Some(remote) = plan.target.endpoint().remote() {
        line.option("-T", start_command(remote, bbcp));
    }
    // Options end here, whatever the paths are.
    line.flag("--");
    line.0
        .push(spec(plan.source.endpoint(), plan.source.path()));
    line.0
        .push(spec(plan.target.endpoint(), &plan.target.temporary_path()));
    line.0
}

struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    /// bbcp takes values as words of their own only.
    fn option(&mut self, name: &str, value: impl ToString) {
        self.0.extend([name.into(), value.to_string()]);
    }
}

/// How bbcp starts itself at the other end; `%U` and `%H` are bbcp's names for login and host.
fn start_command(remote: &Remote, bbcp: &Bbcp) -> String {
    let mut words = vec![remote.ssh.program.display().to_string()];
    words.extend(ssh_options(&remote.ssh));
    if !remote.ssh.user.is_empty() {
        words.extend(["-l".to_owned(), "%U".to_owned()]);
    }
    words.extend(["%H".to_owned(), bbcp.remote_program.display().to_string()]);
    words.join(" ")
}

fn spec(endpoint: &Endpoint, path: &AbsolutePath) -> String {
    match endpoint {
        Endpoint::Local => path.to_string(),
        Endpoint::Remote(Remote { host, ssh }) if ssh.user.is_empty() => {
            format!("{}:{path}", host.as_bbcp())
        }
        Endpoint::Remote(Remote { host, ssh }) => {
            format!("{}@{}:{path}", ssh.user, host.as_bbcp())
        }
    }
}
