//! An end on another host: fixed scripts for its POSIX shell, run over the [connection](super::HostConnection) to it.
//!
//! Data are never part of a script, only its positional arguments. Known errors have exit codes defined in this module.

use std::collections::HashSet;
use std::io;
use std::time::Duration;

use super::{AbsolutePath, Facts, Links, Partial, Remote, RootProblem, TemporaryName, storage};
use crate::settings::Ssh;
use crate::transfer::endpoint::Host;
use crate::transfer::endpoint::ssh::{
    CopySession, LOGIN_LIMIT, LoginFailure, MasterEnd, RequestFailure, ScriptReply, SessionKind,
    SshConnections,
};
use crate::transfer::failures::{Role, TransferError, connection_failure};
use crate::transfer::id::TransferId;

use self::parse::{available, facts};
use self::scripts::{
    ABSENT, ADOPT, CHANGED, CLOCK, DENIED, DF, EXISTS, LIST, MARKER, MKDIR, NO_LINKS, NO_PROGRAM,
    PING, REMOVE, RENAME, ROOT, STAT, SYNC, VERSION,
};

mod digest;
mod network;
mod parse;
mod scripts;
mod stream;

pub(in crate::transfer) use stream::{StreamCommand, StreamEnd};

/// Time limit of a request. It is longer than ssh needs to notice that a host has become unreachable.
const REQUEST_LIMIT: Duration = Duration::from_secs(75);

/// A script with its arguments, role and path.
struct ScriptCall<'a> {
    role: Role,
    operation: &'static str,
    path: &'a AbsolutePath,
    script: &'static str,
    arguments: &'a [&'a str],
    limit: Duration,
}

impl<'a> ScriptCall<'a> {
    fn new(
        role: Role,
        operation: &'static str,
        path: &'a AbsolutePath,
        script: &'static str,
        arguments: &'a [&'a str],
    ) -> Self {
        Self {
            role,
            operation,
            path,
            script,
            arguments,
            limit: REQUEST_LIMIT,
        }
    }

    /// Converts an exit code to an error, for codes without a special meaning in the operation.
    fn failure(&self, reply: ScriptReply) -> TransferError {
        let path = self.path.to_string();
        let complaint = if reply.complaint.is_empty() {
            format!("exit code {}", reply.code)
        } else {
            reply.complaint
        };
        let line = format!("{}: {complaint}", self.operation);
        match (reply.code, self.role) {
            (ABSENT, Role::Origin) => TransferError::OriginMissing { path },
            (DENIED, Role::Origin) => TransferError::OriginUnreadable { path, line },
            (DENIED, Role::Destination) => TransferError::DestinationDenied { path, line },
            _ if complaint.contains("No space left") && self.role == Role::Destination => {
                TransferError::StorageFull { path, line }
            }
            _ => storage(self.operation, self.role, self.path, complaint),
        }
    }

    /// The error for an answer that the script cannot give.
    fn unexpected_answer(&self, answers: &[String]) -> TransferError {
        let text = format!("unexpected answer {answers:?}");
        storage(self.operation, self.role, self.path, text)
    }
}

impl Remote {
    /// Creates an end on `host`. Nothing is connected before the first request.
    pub(in crate::transfer) fn new(host: Host, ssh: &Ssh, connections: &SshConnections) -> Self {
        Self {
            connection: connections.to(&host, ssh),
            host,
            ssh: Box::new(ssh.clone()),
        }
    }

    pub(super) async fn stat(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
    ) -> Result<Option<Facts>, TransferError> {
        let arguments = [path.as_str(), word(links)];
        let request = ScriptCall::new(role, "stat", path, STAT, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => match facts(answer) {
                Some(facts) => Ok(Some(facts)),
                None => Err(request.unexpected_answer(&reply.answers)),
            },
            (ABSENT, _) => Ok(None),
            (0, answers) => Err(request.unexpected_answer(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    pub(super) async fn ensure_directory(
        &self,
        root: &AbsolutePath,
        directory: &AbsolutePath,
    ) -> Result<u64, TransferError> {
        let arguments = [root.as_str(), directory.as_str()];
        let request = ScriptCall::new(Role::Destination, "mkdir", directory, MKDIR, &arguments);
        let (request, reply) = self.run(request).await?;
        if reply.code == ABSENT {
            return Err(TransferError::DestinationRootMissing {
                path: root.to_string(),
            });
        }
        available_bytes(&request, reply)
    }

    pub(super) async fn free_space(&self, directory: &AbsolutePath) -> Result<u64, TransferError> {
        let arguments = [directory.as_str()];
        let request = ScriptCall::new(Role::Destination, "df", directory, DF, &arguments);
        let (request, reply) = self.run(request).await?;
        available_bytes(&request, reply)
    }

    pub(super) async fn rename_no_overwrite(
        &self,
        own: &Partial,
        verified: &Facts,
        to: &AbsolutePath,
        directories: &[AbsolutePath],
    ) -> Result<(), TransferError> {
        let directory = to.parent();
        let (copy, checkpoints) = own.names();
        let state = verified.modified.map_or_else(String::new, |time| {
            format!("{} {}", verified.size, time.seconds)
        });
        let mut arguments = vec![
            directory.as_str(),
            copy.as_str(),
            to.file_name().unwrap_or_default(),
            checkpoints.as_str(),
            state.as_str(),
        ];
        arguments.extend(directories.iter().map(AbsolutePath::as_str));
        let request = ScriptCall::new(Role::Destination, "rename", to, RENAME, &arguments);
        let (request, reply) = self.run(request).await?;
        let path = || to.to_string();
        match reply.code {
            EXISTS => Err(TransferError::DestinationExists { path: path() }),
            CHANGED => Err(TransferError::CopyChanged { path: path() }),
            NO_LINKS => Err(TransferError::RenameUnsupported { path: path() }),
            _ => expect_word(&request, reply, "renamed"),
        }
    }

    pub(super) async fn make_durable(
        &self,
        path: &AbsolutePath,
        directories: &[AbsolutePath],
    ) -> Result<(), TransferError> {
        let paths = std::iter::once(path).chain(directories);
        let arguments: Vec<&str> = paths.map(AbsolutePath::as_str).collect();
        let request = ScriptCall::new(Role::Destination, "fsync", path, SYNC, &arguments);
        let (request, reply) = self.run(request).await?;
        expect_word(&request, reply, "written")
    }

    pub(super) async fn make_marker(&self, own: &Partial) -> Result<(), TransferError> {
        let directory = own.copy.parent();
        let (copy, _) = own.names();
        let arguments = [directory.as_str(), copy.as_str()];
        let request = ScriptCall::new(Role::Destination, "create", &own.copy, MARKER, &arguments);
        let (request, reply) = self.run(request).await?;
        expect_word(&request, reply, "made")
    }

    pub(super) async fn root_problem(
        &self,
        root: &AbsolutePath,
    ) -> Result<Option<RootProblem>, TransferError> {
        let arguments = [root.as_str()];
        let request = ScriptCall::new(Role::Origin, "stat", root, ROOT, &arguments);
        let (request, reply) = self.run(request).await?;
        let problem = match (reply.code, reply.answers.first().map(String::as_str)) {
            (0, Some("good")) => return Ok(None),
            (0, Some("missing")) => "does not exist",
            (0, Some("closed")) => "cannot be entered",
            (0, Some("empty")) => return Ok(Some(RootProblem::Empty)),
            (0, _) => return Err(request.unexpected_answer(&reply.answers)),
            _ => return Err(request.failure(reply)),
        };
        Ok(Some(RootProblem::Unusable(problem.into())))
    }

    /// Removes a temporary; only [`super::Target`] calls this, and only with such names.
    pub(super) async fn remove(&self, partial: &Partial) -> Result<(), TransferError> {
        let directory = partial.copy.parent();
        let (copy, checkpoints) = partial.names();
        let arguments = [directory.as_str(), copy.as_str(), checkpoints.as_str()];
        let path = &partial.copy;
        let request = ScriptCall::new(Role::Destination, "unlink", path, REMOVE, &arguments);
        let (request, reply) = self.run(request).await?;
        if reply.code == ABSENT {
            return Ok(());
        }
        expect_word(&request, reply, "removed")
    }

    pub(super) async fn begin_partial(
        &self,
        earlier: Option<&Partial>,
        own: &Partial,
    ) -> Result<u64, TransferError> {
        let directory = own.copy.parent();
        let (copy, checkpoints) = own.names();
        let earlier = earlier.map(Partial::names);
        let mut arguments = vec![directory.as_str(), copy.as_str(), checkpoints.as_str()];
        if let Some((copy, checkpoints)) = &earlier {
            arguments.extend([copy.as_str(), checkpoints.as_str()]);
        }
        let request = ScriptCall::new(Role::Destination, "adopt", &own.copy, ADOPT, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => answer
                .parse()
                .map_err(|_| request.unexpected_answer(&reply.answers)),
            (0, answers) => Err(request.unexpected_answer(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    pub(super) async fn temporaries(
        &self,
        directory: &AbsolutePath,
        transfer_id: TransferId,
    ) -> Result<Vec<TemporaryName>, TransferError> {
        let id = transfer_id.to_string();
        let arguments = [directory.as_str(), id.as_str()];
        let request = ScriptCall::new(Role::Destination, "list", directory, LIST, &arguments);
        let (request, reply) = self.run(request).await?;
        if reply.code != 0 {
            return Err(request.failure(reply));
        }
        Ok(reply
            .answers
            .iter()
            .filter_map(|name| TemporaryName::of_entry(name))
            .filter(|name| name.transfer_id() == transfer_id)
            .collect::<HashSet<_>>()
            .into_iter()
            .collect())
    }

    /// Waits for an answer of the host that does not depend on its storage.
    pub(in crate::transfer) async fn ping(&self) -> Result<(), TransferError> {
        let nowhere = AbsolutePath::root();
        let request = ScriptCall::new(Role::Destination, "ping", &nowhere, PING, &[]);
        let (request, reply) = self.run(request).await?;
        expect_word(&request, reply, "pong")
    }

    /// Reserves a session of the connection for the ssh of a copy.
    pub(in crate::transfer) async fn copy_session(
        &self,
        role: Role,
    ) -> Result<CopySession, TransferError> {
        let session = self.connection.copy_session(SessionKind::Commands).await;
        session.map_err(|failure| self.login_error(role, failure))
    }

    /// The error for a copy whose connection was lost.
    pub(in crate::transfer) fn lost_connection(
        &self,
        role: Role,
        session: &CopySession,
    ) -> Option<TransferError> {
        let end = session.lost_connection()?;
        Some(match self.end_error(role, &end) {
            TransferError::RemoteDied { host, line } => TransferError::Network {
                host,
                line: format!("the ssh connection was lost ({line})"),
            },
            error => error,
        })
    }

    /// Reads the host's clock, in seconds since 1970.
    ///
    /// # Errors
    /// ssh could not connect, or the host has no such clock.
    pub async fn clock(&self) -> Result<i64, TransferError> {
        let nowhere = AbsolutePath::root();
        let request = ScriptCall::new(Role::Destination, "date", &nowhere, CLOCK, &[]);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => answer
                .parse()
                .map_err(|_| request.unexpected_answer(&reply.answers)),
            (0, answers) => Err(request.unexpected_answer(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    /// Version that bbcp reports on the host.
    ///
    /// # Errors
    /// [`TransferError::RemoteProgramMissing`], or the program could not be run.
    pub async fn bbcp_version(&self, program: &str) -> Result<String, TransferError> {
        let nowhere = AbsolutePath::root();
        let arguments = [program];
        let request = ScriptCall::new(Role::Destination, "bbcp", &nowhere, VERSION, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.first()) {
            (0, Some(version)) => Ok(version.clone()),
            (0, None) => Err(request.unexpected_answer(&reply.answers)),
            (NO_PROGRAM, _) => Err(TransferError::RemoteProgramMissing {
                role: request.role,
                host: self.host.to_string(),
                line: format!("{program}: not found"),
            }),
            _ => Err(request.failure(reply)),
        }
    }

    /// Runs a script to its end.
    ///
    /// # Errors
    /// The script could not be run. Errors that the script itself reports are in the reply.
    async fn run<'a>(
        &self,
        call: ScriptCall<'a>,
    ) -> Result<(ScriptCall<'a>, ScriptReply), TransferError> {
        let ScriptCall {
            script,
            arguments,
            limit,
            ..
        } = call;
        let failure = match self.connection.request(script, arguments, limit).await {
            Ok(reply) => return Ok((call, reply)),
            Err(failure) => failure,
        };
        Err(match failure {
            RequestFailure::Login(failure) => self.login_error(call.role, failure),
            RequestFailure::Lost(end) => self.end_error(call.role, &end),
            RequestFailure::TimedOut => TransferError::OperationTimeout {
                operation: call.operation,
                host: self.host.to_string(),
                limit,
            },
            RequestFailure::LineBreak => {
                let text = "a path or an argument contains a line break";
                storage(call.operation, call.role, call.path, text)
            }
        })
    }

    fn login_error(&self, role: Role, failure: LoginFailure) -> TransferError {
        let program = || self.ssh.program.display().to_string();
        match failure {
            LoginFailure::ProgramMissing => TransferError::ProgramMissing { program: program() },
            LoginFailure::Spawn(error) => TransferError::Spawn {
                program: program(),
                source: io::Error::new(error.kind(), error),
            },
            LoginFailure::Ended(end) => self.end_error(role, &end),
            LoginFailure::TimedOut => TransferError::OperationTimeout {
                operation: "ssh login",
                host: self.host.to_string(),
                limit: LOGIN_LIMIT,
            },
        }
    }

    /// The error for an ssh process that has ended.
    fn end_error(&self, role: Role, end: &MasterEnd) -> TransferError {
        let code = match end.code {
            Some(code) if !end.is_of_ssh() => code,
            _ => return self.connection_error(role, &end.stderr),
        };
        let said = match last_line(&end.stderr) {
            line if line.is_empty() => end.noise.clone(),
            line => line,
        };
        TransferError::RemoteDied {
            host: self.host.to_string(),
            line: format!("its login shell ended with {code} before the command ran: {said}"),
        }
    }

    /// The error for a failed connection of ssh, or one that broke.
    fn connection_error(&self, role: Role, complaint: &str) -> TransferError {
        let host = self.host.to_string();
        // The line with the cause may be followed by others; a denied login ranks above a broken pipe.
        match connection_failure(complaint, &host, role) {
            Some(failure) => failure,
            None if complaint.contains("command not found") => {
                let line = last_line(complaint);
                TransferError::RemoteProgramMissing { role, host, line }
            }
            None => TransferError::RemoteDied {
                host,
                line: match last_line(complaint) {
                    line if line.is_empty() => "ssh printed nothing".into(),
                    line => line,
                },
            },
        }
    }
}

/// Checks the reply of a script that prints only one word when it is done.
fn expect_word(
    request: &ScriptCall<'_>,
    reply: ScriptReply,
    word: &str,
) -> Result<(), TransferError> {
    if reply.code != 0 {
        return Err(request.failure(reply));
    }
    if reply.answers != [word] {
        return Err(request.unexpected_answer(&reply.answers));
    }
    Ok(())
}

/// Argument of the scripts for the treatment of symbolic links.
fn word(links: Links) -> &'static str {
    match links {
        Links::Follow => "follow",
        Links::Refuse => "keep",
    }
}

fn last_line(text: &str) -> String {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    line.unwrap_or_default().chars().take(500).collect()
}

/// Parses the reply of a script that prints the last line of `df`.
fn available_bytes(request: &ScriptCall<'_>, reply: ScriptReply) -> Result<u64, TransferError> {
    match (reply.code, reply.answers.as_slice()) {
        (0, [answer]) => available(answer).ok_or_else(|| request.unexpected_answer(&reply.answers)),
        (0, answers) => Err(request.unexpected_answer(answers)),
        _ => Err(request.failure(reply)),
    }
}
