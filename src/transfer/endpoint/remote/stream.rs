//! Commands at the other host that read or write a file, whose content flows through a session of the connection.

use std::fmt;
use std::path::PathBuf;

use super::scripts::{READ, WRITE};
use super::{ScriptCall, last_line};
use crate::process::find_program;
use crate::transfer::endpoint::ssh::{MasterEnd, ScriptReply, SessionKind};
use crate::transfer::endpoint::{AbsolutePath, CopySession, Remote};
use crate::transfer::failures::{Role, TransferError};

/// A command line of ssh. Its standard input or output is the content of a file.
#[derive(Debug)]
pub(in crate::transfer) struct StreamCommand {
    /// Absolute path of ssh.
    pub(in crate::transfer) program: PathBuf,
    /// Arguments of ssh.
    pub(in crate::transfer) arguments: Vec<String>,
    /// Text on standard output with which the command at the other host begins. What follows is its own.
    pub(in crate::transfer) beginning: Vec<u8>,
}

/// End of the ssh of a [`StreamCommand`].
#[derive(Debug)]
pub(in crate::transfer) struct StreamEnd {
    /// True if the command at the other host has begun.
    pub(in crate::transfer) has_begun: bool,
    /// Exit code; `None` after a signal.
    pub(in crate::transfer) code: Option<i32>,
    /// End of standard error.
    pub(in crate::transfer) stderr: Vec<u8>,
}

impl fmt::Display for StreamCommand {
    /// Writes the command line as it would be typed in a shell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program.to_string_lossy();
        let words = self.arguments.iter().map(String::as_str);
        f.write_str(&shell_words::join(
            std::iter::once(program.as_ref()).chain(words),
        ))
    }
}

impl Remote {
    /// Reserves a session of the connection for the data of a copy.
    pub(in crate::transfer) async fn data_session(
        &self,
        role: Role,
    ) -> Result<CopySession, TransferError> {
        let session = self.connection.copy_session(SessionKind::Data).await;
        session.map_err(|failure| self.login_error(role, failure))
    }

    /// The command that reads a file of this host.
    ///
    /// # Errors
    /// [`TransferError::ProgramMissing`].
    pub(in crate::transfer) fn read_command(
        &self,
        session: &CopySession,
        path: &AbsolutePath,
    ) -> Result<StreamCommand, TransferError> {
        self.stream_command(session, READ, &[path.as_str()])
    }

    /// The command that writes a new file of `bytes` bytes on this host. It removes the file if the content is not complete.
    ///
    /// # Errors
    /// [`TransferError::ProgramMissing`].
    pub(in crate::transfer) fn write_command(
        &self,
        session: &CopySession,
        path: &AbsolutePath,
        bytes: u64,
    ) -> Result<StreamCommand, TransferError> {
        let (directory, bytes) = (path.parent(), bytes.to_string());
        let name = path.file_name().unwrap_or_default();
        self.stream_command(session, WRITE, &[directory.as_str(), name, &bytes])
    }

    fn stream_command(
        &self,
        session: &CopySession,
        script: &str,
        script_arguments: &[&str],
    ) -> Result<StreamCommand, TransferError> {
        let program =
            find_program(&self.ssh.program).ok_or_else(|| TransferError::ProgramMissing {
                program: self.ssh.program.display().to_string(),
            })?;
        let mark = format!("ccat-transfer-{}", uuid::Uuid::new_v4().simple());
        let mut arguments = session.ssh_options();
        arguments.push("-T".into());
        if !self.ssh.user.is_empty() {
            arguments.extend(["-l".to_owned(), self.ssh.user.clone()]);
        }
        let words = ["sh", "-c", script, mark.as_str()];
        let command = shell_words::join(words.iter().chain(script_arguments));
        arguments.extend(["--".to_owned(), self.host.as_ssh().to_owned(), command]);
        Ok(StreamCommand {
            program,
            arguments,
            beginning: format!("\n{mark} begin\n").into_bytes(),
        })
    }

    /// The error for a command that has ended.
    pub(in crate::transfer) fn stream_error(
        &self,
        role: Role,
        path: &AbsolutePath,
        session: &CopySession,
        end: &StreamEnd,
    ) -> TransferError {
        let stderr = String::from_utf8_lossy(&end.stderr).into_owned();
        let complaint = last_line(&stderr);
        let of_ssh = MasterEnd {
            code: end.code,
            stderr,
            noise: String::new(),
        };
        match end.code {
            // Exit codes have a meaning only if they come from our script.
            Some(code) if end.has_begun && !of_ssh.is_of_ssh() => {
                let operation = match role {
                    Role::Origin => "read",
                    Role::Destination => "write",
                };
                let answers = Vec::new();
                let reply = ScriptReply {
                    code,
                    answers,
                    complaint,
                };
                ScriptCall::new(role, operation, path, "", &[]).failure(reply)
            }
            _ => {
                let lost = self.lost_connection(role, session);
                lost.unwrap_or_else(|| self.end_error(role, &of_ssh))
            }
        }
    }
}
