//! An end on another host: fixed scripts for its POSIX shell, run by ssh.
//!
//! ssh hands one string to the login shell there, so every word is quoted, and data are never part
//! of a script but its positional arguments. Scripts are single lines, since not every login shell
//! takes a line break inside quotes. [A mark](Mark) separates the answer from the output of start-up
//! files. Known errors have exit codes of our own.

use std::collections::HashSet;
use std::process::Stdio;
use std::time::Duration;

use tokio::time::timeout;

use self::answer::{Answer, Mark};
use self::scripts::{
    ABSENT, ADOPT, CLOCK, DENIED, DF, DIGEST, EXISTS, LIST, MARKER, MKDIR, NO_LINKS, NO_PROGRAM,
    REMOVE, RENAME, ROOT, STAT, SYNC, VERSION,
};
use super::ssh::options;
use super::{
    AbsolutePath, DigestResult, Facts, FileKind, Links, Moment, OPERATION_LIMIT, Partial, Reading,
    Remote, RootProblem, TemporaryName, storage,
};
use crate::process::{Group, command, find_program};
use crate::settings::{DigestAlgorithm, Ssh};
use crate::transfer::digest::Digest;
use crate::transfer::failures::{Role, TransferError, connection_failure};
use crate::transfer::id::TransferId;

mod answer;
mod scripts;

/// ssh's own exit code for "did not get through"; also what a killed remote command gives.
const SSH_FAILED: i32 = 255;

/// What a script answered.
struct Reply {
    code: i32,
    answers: Vec<String>,
    complaint: String,
}

/// A script and what it is run for.
struct Request<'a> {
    role: Role,
    operation: &'static str,
    path: &'a AbsolutePath,
    script: &'static str,
    arguments: &'a [&'a str],
    limit: Duration,
    stdin: Stdio,
}

impl<'a> Request<'a> {
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
            limit: OPERATION_LIMIT,
            stdin: Stdio::null(),
        }
    }

    /// What the exit codes mean wherever an operation has no other meaning for them.
    fn failure(&self, reply: Reply) -> TransferError {
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

    /// The answer was not one that the script gives.
    fn garbled(&self, answers: &[String]) -> TransferError {
        let text = format!("unexpected answer {answers:?}");
        storage(self.operation, self.role, self.path, text)
    }
}

impl Remote {
    pub(super) async fn stat(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
    ) -> Result<Option<Facts>, TransferError> {
        let arguments = [path.as_str(), word(links)];
        let request = Request::new(role, "stat", path, STAT, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => match facts(answer) {
                Some(facts) => Ok(Some(facts)),
                None => Err(request.garbled(&reply.answers)),
            },
            (ABSENT, _) => Ok(None),
            (0, answers) => Err(request.garbled(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    pub(super) async fn ensure_directory(
        &self,
        root: &AbsolutePath,
        directory: &AbsolutePath,
    ) -> Result<(), TransferError> {
        let arguments = [root.as_str(), directory.as_str()];
        let request = Request::new(Role::Destination, "mkdir", directory, MKDIR, &arguments);
        let (request, reply) = self.run(request).await?;
        if reply.code == ABSENT {
            return Err(TransferError::DestinationRootMissing {
                path: root.to_string(),
            });
        }
        done(&request, reply, "made")
    }

    pub(super) async fn free_space(&self, directory: &AbsolutePath) -> Result<u64, TransferError> {
        let arguments = [directory.as_str()];
        let request = Request::new(Role::Destination, "df", directory, DF, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => available(answer).ok_or_else(|| request.garbled(&reply.answers)),
            (0, answers) => Err(request.garbled(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    pub(super) async fn digest(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
        how: Reading<'_>,
    ) -> DigestResult {
        let command = digest_command(&self.ssh, how.algorithm);
        let arguments: Vec<&str> = [path.as_str(), word(links)]
            .into_iter()
            .chain(command.iter().map(String::as_str))
            .collect();
        let request = Request {
            limit: how.limit(),
            stdin: Stdio::piped(),
            ..Request::new(role, "digest", path, DIGEST, &arguments)
        };
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => {
                printed_digest(how.algorithm, answer).ok_or_else(|| request.garbled(&reply.answers))
            }
            (NO_PROGRAM, _) => Err(TransferError::RemoteProgramMissing {
                role,
                host: self.host.to_string(),
                line: format!("{}: not found", shell_words::join(command)),
            }),
            (0, answers) => Err(request.garbled(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    pub(super) async fn rename_no_overwrite(
        &self,
        own: &Partial,
        to: &AbsolutePath,
        directories: &[AbsolutePath],
    ) -> Result<(), TransferError> {
        let directory = to.parent();
        let (copy, checkpoints) = own.names();
        let mut arguments = vec![
            directory.as_str(),
            copy.as_str(),
            to.file_name().unwrap_or_default(),
            checkpoints.as_str(),
        ];
        arguments.extend(directories.iter().map(AbsolutePath::as_str));
        let request = Request::new(Role::Destination, "rename", to, RENAME, &arguments);
        let (request, reply) = self.run(request).await?;
        let path = || to.to_string();
        match reply.code {
            EXISTS => Err(TransferError::DestinationExists { path: path() }),
            NO_LINKS => Err(TransferError::RenameUnsupported { path: path() }),
            _ => done(&request, reply, "renamed"),
        }
    }

    pub(super) async fn make_durable(
        &self,
        path: &AbsolutePath,
        directories: &[AbsolutePath],
    ) -> Result<(), TransferError> {
        let paths = std::iter::once(path).chain(directories);
        let arguments: Vec<&str> = paths.map(AbsolutePath::as_str).collect();
        let request = Request::new(Role::Destination, "fsync", path, SYNC, &arguments);
        let (request, reply) = self.run(request).await?;
        done(&request, reply, "written")
    }

    pub(super) async fn make_marker(&self, own: &Partial) -> Result<(), TransferError> {
        let directory = own.copy.parent();
        let (copy, _) = own.names();
        let arguments = [directory.as_str(), copy.as_str()];
        let request = Request::new(Role::Destination, "create", &own.copy, MARKER, &arguments);
        let (request, reply) = self.run(request).await?;
        done(&request, reply, "made")
    }

    pub(super) async fn root_problem(
        &self,
        root: &AbsolutePath,
    ) -> Result<Option<RootProblem>, TransferError> {
        let arguments = [root.as_str()];
        let request = Request::new(Role::Origin, "stat", root, ROOT, &arguments);
        let (request, reply) = self.run(request).await?;
        let problem = match (reply.code, reply.answers.first().map(String::as_str)) {
            (0, Some("good")) => return Ok(None),
            (0, Some("missing")) => "does not exist",
            (0, Some("closed")) => "cannot be entered",
            (0, Some("empty")) => return Ok(Some(RootProblem::Empty)),
            (0, _) => return Err(request.garbled(&reply.answers)),
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
        let request = Request::new(Role::Destination, "unlink", path, REMOVE, &arguments);
        let (request, reply) = self.run(request).await?;
        if reply.code == ABSENT {
            return Ok(());
        }
        done(&request, reply, "removed")
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
        let request = Request::new(Role::Destination, "adopt", &own.copy, ADOPT, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => answer.parse().map_err(|_| request.garbled(&reply.answers)),
            (0, answers) => Err(request.garbled(answers)),
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
        let request = Request::new(Role::Destination, "list", directory, LIST, &arguments);
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

    /// The host's clock, in seconds since 1970.
    ///
    /// # Errors
    /// That ssh does not get through, or that there is no such clock.
    pub async fn clock(&self) -> Result<i64, TransferError> {
        let nowhere = AbsolutePath::root();
        let request = Request::new(Role::Destination, "date", &nowhere, CLOCK, &[]);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.as_slice()) {
            (0, [answer]) => answer.parse().map_err(|_| request.garbled(&reply.answers)),
            (0, answers) => Err(request.garbled(answers)),
            _ => Err(request.failure(reply)),
        }
    }

    /// The version that bbcp tells there.
    ///
    /// # Errors
    /// [`TransferError::RemoteProgramMissing`], or that it does not run.
    pub async fn bbcp_version(&self, program: &str) -> Result<String, TransferError> {
        let nowhere = AbsolutePath::root();
        let arguments = [program];
        let request = Request::new(Role::Destination, "bbcp", &nowhere, VERSION, &arguments);
        let (request, reply) = self.run(request).await?;
        match (reply.code, reply.answers.first()) {
            (0, Some(version)) => Ok(version.clone()),
            (0, None) => Err(request.garbled(&reply.answers)),
            (NO_PROGRAM, _) => Err(TransferError::RemoteProgramMissing {
                role: request.role,
                host: self.host.to_string(),
                line: format!("{program}: not found"),
            }),
            _ => Err(request.failure(reply)),
        }
    }

    /// Runs a script to its end. An error says that it could not be run; what it said itself is in
    /// the reply.
    async fn run<'a>(
        &self,
        mut request: Request<'a>,
    ) -> Result<(Request<'a>, Reply), TransferError> {
        let program = &self.ssh.program;
        let missing = || TransferError::ProgramMissing {
            program: program.display().to_string(),
        };
        let spawn = |source| TransferError::Spawn {
            program: program.display().to_string(),
            source,
        };
        let mark = Mark::new();
        let mut ssh = command(&find_program(program).ok_or_else(missing)?);
        ssh.args(self.arguments(&request, &mark));
        ssh.stdin(std::mem::replace(&mut request.stdin, Stdio::null()));
        let mut child = ssh.spawn().map_err(spawn)?;
        // Declared after the child, so that it is dropped before it.
        let group = Group::of(&child).map_err(spawn)?;
        // Held open: the digest script stops when it closes.
        let _stdin = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());

        let ended = async {
            let status = child.wait().await;
            // Whatever ssh left behind must not keep the outputs open.
            group.end(Duration::ZERO).await;
            status
        };
        let outputs = async {
            let complaint = answer::complaint(stderr, &mark);
            tokio::join!(Answer::read(stdout, &mark), complaint)
        };
        let work = async { tokio::join!(ended, outputs) };
        let Ok((status, (answer, complaint))) = timeout(request.limit, work).await else {
            return Err(TransferError::OperationTimeout {
                operation: request.operation,
                host: self.host.to_string(),
                limit: request.limit,
            });
        };
        let code = match status.map_err(spawn)?.code() {
            Some(code) if code != SSH_FAILED => code,
            _ => return Err(self.not_through(request.role, &complaint)),
        };
        let complaint = last_line(&complaint);
        if !answer.begun {
            let said = match complaint.is_empty() {
                true => &answer.noise,
                false => &complaint,
            };
            return Err(TransferError::RemoteDied {
                host: self.host.to_string(),
                line: format!("its login shell ended with {code} before our script: {said}"),
            });
        }
        let reply = Reply {
            code,
            answers: answer.lines,
            complaint,
        };
        Ok((request, reply))
    }

    fn arguments(&self, request: &Request<'_>, mark: &Mark) -> Vec<String> {
        let script = ["sh", "-c", request.script, mark.as_str()];
        let words = script.iter().chain(request.arguments);
        let mut arguments = options(&self.ssh);
        arguments.push("-T".into());
        if !self.ssh.user.is_empty() {
            arguments.extend(["-l".to_owned(), self.ssh.user.clone()]);
        }
        arguments.extend([
            "--".to_owned(),
            self.host.as_ssh().to_owned(),
            shell_words::join(words),
        ]);
        arguments
    }

    /// ssh did not get through, or the connection broke.
    fn not_through(&self, role: Role, complaint: &str) -> TransferError {
        let host = self.host.to_string();
        // The line that matters may be followed by others; being denied outweighs a broken pipe.
        match connection_failure(complaint, &host, role) {
            Some(failure) => failure,
            None if complaint.contains("command not found") => {
                let line = last_line(complaint);
                TransferError::RemoteProgramMissing { role, host, line }
            }
            None => TransferError::RemoteDied {
                host,
                line: match last_line(complaint) {
                    line if line.is_empty() => "ssh said nothing".into(),
                    line => line,
                },
            },
        }
    }
}

/// A script that only has to say that it is done.
fn done(request: &Request<'_>, reply: Reply, word: &str) -> Result<(), TransferError> {
    if reply.code != 0 {
        return Err(request.failure(reply));
    }
    if reply.answers != [word] {
        return Err(request.garbled(&reply.answers));
    }
    Ok(())
}

/// The word for the scripts.
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

/// Reads [`STAT`]'s answer.
fn facts(answer: &str) -> Option<Facts> {
    let mut parts = answer.split('|');
    let words: Vec<&str> = parts.next()?.split(' ').collect();
    let [
        kind,
        readable,
        boot,
        size,
        device,
        inode,
        names,
        modified,
        changed,
    ] = words.as_slice()
    else {
        return None;
    };
    let identity = match (*device, *inode) {
        ("-", "-") => None,
        (device, inode) => Some((device.parse().ok()?, inode.parse().ok()?)),
    };
    Some(Facts {
        size: size.parse().ok()?,
        kind: match *kind {
            "file" => FileKind::File,
            "directory" => FileKind::Directory,
            "other" => FileKind::Other,
            _ => return None,
        },
        readable: match *readable {
            "yes" => true,
            "no" => false,
            _ => return None,
        },
        modified: moment(modified, parts.next())?,
        changed: moment(changed, parts.next())?,
        identity,
        names: known(names)?,
        boot: known(boot)?,
    })
}

/// A word of an answer; `-` is unknown.
fn known<T: std::str::FromStr>(word: &str) -> Option<Option<T>> {
    match word {
        "-" => Some(None),
        word => word.parse().ok().map(Some),
    }
}

/// A time; `text` (`2026-11-29 13:09:24.123456789 +0000`) contains its nanoseconds.
fn moment(seconds: &str, text: Option<&str>) -> Option<Option<Moment>> {
    let fraction = text.and_then(|text| {
        let (_, rest) = text.split_once('.')?;
        rest.get(..9)?.parse().ok()
    });
    let seconds = known::<i64>(seconds)?;
    Some(seconds.map(|seconds| Moment {
        seconds,
        nanoseconds: fraction.unwrap_or(0),
    }))
}

/// Available bytes from a line of `df -P -k`: device, total, used, available, per cent, mount point.
/// Device and mount point may hold blanks, so the per cent is what is looked for.
fn available(line: &str) -> Option<u64> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let number = |word: &str| word.parse::<u64>().ok();
    words.windows(4).find_map(|window| {
        let [total, used, available, percent] = window else {
            return None;
        };
        number(total)?;
        number(used)?;
        let available = number(available)?;
        (*percent == "-" || number(percent.strip_suffix('%')?).is_some())
            .then(|| available.saturating_mul(1024))
    })
}

/// The program for a digest, with its arguments.
fn digest_command(ssh: &Ssh, algorithm: DigestAlgorithm) -> &[String] {
    match algorithm {
        DigestAlgorithm::Sha256 => &ssh.sha256_command,
        DigestAlgorithm::Blake3 => &ssh.blake3_command,
        DigestAlgorithm::Xxh3 => &ssh.xxh3_command,
        DigestAlgorithm::Md5 => &ssh.md5_command,
    }
}

/// Reads `HEX  -`, or xxhsum's `XXH3_HEX  stdin` (0.8.1 and later) and `XXH3 (stdin) = HEX`.
fn printed_digest(algorithm: DigestAlgorithm, answer: &str) -> Option<Digest> {
    let mut words = answer.split_ascii_whitespace();
    let hex = match words.next()? {
        "XXH3" => words.next_back()?,
        word => word.strip_prefix("XXH3_").unwrap_or(word),
    };
    Digest::from_hex(algorithm, hex)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use uuid::Uuid;

    use super::*;

    const FACTS: Facts = Facts {
        size: 12,
        kind: FileKind::File,
        readable: true,
        modified: Some(Moment {
            seconds: 1_790_000_000,
            nanoseconds: 123_456_789,
        }),
        changed: Some(Moment {
            seconds: 1_790_000_001,
            nanoseconds: 0,
        }),
        identity: Some((64, 99)),
        names: Some(1),
        boot: Some(Uuid::from_u128(1)),
    };

    const BARE: Facts = Facts {
        readable: false,
        modified: None,
        changed: None,
        identity: None,
        names: Some(2),
        boot: None,
        ..FACTS
    };

    #[rstest]
    #[case::gnu(
        "file yes 00000000-0000-0000-0000-000000000001 12 64 99 1 1790000000 1790000001\
         |2026-09-21 14:13:20.123456789 +0000|2026-09-21 14:13:21.000000000 +0000",
        Some(FACTS)
    )]
    #[case::ls("file no - 12 - - 2 - -", Some(BARE))]
    #[case("other no - 12 - - - -", None)]
    #[case("file yes - x - - - - -", None)]
    #[case("socket yes - 12 - - - - -", None)]
    #[case("", None)]
    fn stat_answers(#[case] answer: &str, #[case] expected: Option<Facts>) {
        assert_eq!(facts(answer), expected);
    }

    #[rstest]
    #[case("/dev/sda1 1000 400 600 40% /", Some(600 * 1024))]
    #[case("nas:/a b 100% 1000 400 600 40% /mnt/two words", Some(600 * 1024))]
    #[case("tmpfs 0 0 0 - /proc", Some(0))]
    #[case("Filesystem 1024-blocks Used Available Capacity Mounted on", None)]
    #[case("", None)]
    fn df_lines(#[case] line: &str, #[case] expected: Option<u64>) {
        assert_eq!(available(line), expected);
    }

    #[rstest]
    #[case(DigestAlgorithm::Xxh3, "XXH3_78af5f94892f3950  stdin", true)]
    #[case(DigestAlgorithm::Xxh3, "XXH3 (stdin) = 78af5f94892f3950", true)]
    #[case(DigestAlgorithm::Xxh3, "78af5f94892f395", false)]
    #[case(
        DigestAlgorithm::Sha256,
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  -",
        true
    )]
    #[case(DigestAlgorithm::Sha256, "sha256sum: -: Input/output error", false)]
    fn digests(#[case] algorithm: DigestAlgorithm, #[case] answer: &str, #[case] good: bool) {
        assert_eq!(printed_digest(algorithm, answer).is_some(), good);
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(answer in "\\PC*") {
            facts(&answer);
            available(&answer);
            printed_digest(DigestAlgorithm::Xxh3, &answer);
        }
    }
}
