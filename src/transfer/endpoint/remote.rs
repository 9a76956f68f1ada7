//! An end on another host: fixed scripts for its POSIX shell, run by ssh.
//!
//! ssh hands one string to the login shell there, so every word is quoted, and data are never part
//! of a script but its positional arguments. Scripts are single lines, since not every login shell
//! takes a line break inside quotes. An answer is a line that begins with [`MARK`]; what a chatty
//! start-up file prints is passed over. Known troubles are exit codes of our own.

use std::collections::HashSet;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use super::ssh::{Refusal, options, refusal};
use super::{
    AbsolutePath, DigestResult, Facts, FileKind, OPERATION_LIMIT, Partial, Reading, Remote,
    TemporaryName, storage,
};
use crate::process::{Group, command, find_program};
use crate::settings::{DigestAlgorithm, Ssh};
use crate::transfer::digest::Digest;
use crate::transfer::error::{Role, TransferError};

/// Begins every line of ours, and is the scripts' `$0`.
const MARK: &str = "ccat-transfer";

/// ssh's own exit code for "did not get through"; also what a killed remote command gives.
const SSH_FAILED: i32 = 255;

// Exit codes of the scripts. They stand in the scripts as digits.
const ABSENT: i32 = 66;
const DENIED: i32 = 77;
const EXISTS: i32 = 73;
const NO_LINKS: i32 = 72;
const NO_PROGRAM: i32 = 69;

/// $1 path. Answers `size mtime device inode kind readable`; `-` is unknown. Without GNU's or
/// busybox's `stat`, `ls` tells the size. An absent path below a directory that we may not search
/// is no absent path.
const STAT: &str = r#"export LC_ALL=C; if test -e "$1"; then :; else case $(ls -ld "$1" 2>&1) in *"ermission denied"*) exit 77;; esac; exit 66; fi; f=$(stat -L -c "%s %Y %d %i" "$1" 2>/dev/null) || { set -- "$1" $(ls -lndL "$1"); f="$6 - - -"; }; k=other; test -d "$1" && k=directory; test -f "$1" && k=file; r=no; test -r "$1" && r=yes; echo "ccat-transfer $f $k $r""#;

/// $1 the location's directory, $2 the one to make.
const MKDIR: &str = r#"export LC_ALL=C; test -d "$1" || exit 66; mkdir -p "$2" || { case $(mkdir -p "$2" 2>&1) in *"ermission denied"*|*"Read-only"*) exit 77;; esac; exit 1; }; test -w "$2" && test -x "$2" || exit 77; echo "ccat-transfer made""#;

/// $1 directory. Answers df's last line.
const DF: &str = r#"export LC_ALL=C; echo "ccat-transfer $(df -P -k "$1" | tail -n 1)""#;

/// $1 temporary, $2 final name, $3 their directory, $4 the temporary's checkpoints. `sync` with a name is not POSIX, but where it
/// takes none it does more, not less.
const RENAME: &str = r#"export LC_ALL=C; if test -d "$4" && ! test -L "$4"; then rm -f "$4"/bbcp.*; rmdir "$4" || exit 1; fi; if test -e "$2" || test -L "$2"; then test "$1" -ef "$2" 2>/dev/null || exit 73; else e=$(ln "$1" "$2" 2>&1) || { test -e "$2" && exit 73; echo "$e" >&2; case $e in *"not permitted"*|*"not supported"*|*"not implemented"*) exit 72;; *"ermission denied"*|*"Read-only"*) exit 77;; esac; exit 1; }; fi; rm -f "$1" || exit 1; sync "$3" >/dev/null 2>&1; echo "ccat-transfer renamed""#;

/// $1 temporary, $2 its checkpoints.
const REMOVE: &str = r#"rm -f "$1" || exit 1; if test -d "$2" && ! test -L "$2"; then rm -f "$2"/bbcp.*; rmdir "$2" || exit 1; fi; echo "ccat-transfer removed""#;

/// $1 our temporary, $2 its checkpoints; the rest is an earlier attempt's, or not there: $3
/// temporary, $4 its checkpoints, $5 its name, $6 our name. Answers the bytes that are there. The
/// copy itself is renamed last, as at a local end.
const ADOPT: &str = r#"export LC_ALL=C; n=0; if test -n "$3" && test -f "$3" && test -d "$4"; then mv "$4" "$2" || exit 1; for f in "$2"/bbcp.*"$5"; do if test -e "$f"; then mv "$f" "${f%"$5"}$6" || exit 1; fi; done; fi; mkdir -p "$2" || exit 1; if test -n "$3" && test -f "$3"; then mv "$3" "$1" || exit 1; set -- $(ls -lnd "$1"); n=$5; fi; echo "ccat-transfer $n""#;

/// $1 directory, $2 transfer id.
const LIST: &str = r#"cd "$1" 2>/dev/null || { test -e "$1" && exit 77; exit 0; }; for f in .ccat-transfer-"$2"-*.part .ccat-transfer-"$2"-*.ckpt; do test -e "$f" && echo "ccat-transfer $f"; done; exit 0"#;

/// $1 path; then the program and its arguments. Reads until done, or until its own standard input
/// ends: that is how it learns that we gave up, and else it would go on for hours.
const DIGEST: &str = r#"export LC_ALL=C; f=$1; shift; command -v "$1" >/dev/null 2>&1 || exit 69; test -e "$f" || exit 66; test -r "$f" || exit 77; exec 3<&0; printf "ccat-transfer "; "$@" <"$f" & p=$!; { cat <&3; kill "$p"; } >/dev/null 2>&1 & c=$!; wait "$p"; r=$?; kill "$c" 2>/dev/null; exit "$r""#;

/// Answers the host's clock, in seconds since 1970. No `date` of POSIX tells them, every real one does.
const CLOCK: &str = r#"echo "ccat-transfer $(date +%s)""#;

/// $1 bbcp. Answers its version.
const VERSION: &str = r#"export LC_ALL=C bbcp_CONFIGFN=/dev/null; command -v "$1" >/dev/null 2>&1 || exit 69; v=$("$1" "-#" 2>&1) || { echo "$v" >&2; exit 1; }; echo "ccat-transfer $v""#;

/// What is kept of an answer; the longest is a list of leftovers.
const MAX_OUTPUT_BYTES: usize = 64 << 10;

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
    ) -> Result<Option<Facts>, TransferError> {
        let arguments = [path.as_str()];
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
        how: Reading<'_>,
    ) -> DigestResult {
        let command = digest_command(&self.ssh, how.algorithm);
        let arguments: Vec<&str> = std::iter::once(path.as_str())
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
    ) -> Result<(), TransferError> {
        let directory = to.parent();
        let arguments = [
            own.copy.as_str(),
            to.as_str(),
            directory.as_str(),
            own.checkpoints.as_str(),
        ];
        let request = Request::new(Role::Destination, "rename", to, RENAME, &arguments);
        let (request, reply) = self.run(request).await?;
        let path = || to.to_string();
        match reply.code {
            EXISTS => Err(TransferError::DestinationExists { path: path() }),
            NO_LINKS => Err(TransferError::RenameUnsupported { path: path() }),
            _ => done(&request, reply, "renamed"),
        }
    }

    /// Removes a temporary; only [`super::Target`] calls this, and only with such names.
    pub(super) async fn remove(&self, partial: &Partial) -> Result<(), TransferError> {
        let path = &partial.copy;
        let arguments = [path.as_str(), partial.checkpoints.as_str()];
        let request = Request::new(Role::Destination, "unlink", path, REMOVE, &arguments);
        let (request, reply) = self.run(request).await?;
        done(&request, reply, "removed")
    }

    pub(super) async fn begin_partial(
        &self,
        earlier: Option<&Partial>,
        own: &Partial,
    ) -> Result<u64, TransferError> {
        let names = (
            earlier.map(|earlier| earlier.name.to_string()),
            own.name.to_string(),
        );
        let mut arguments = vec![own.copy.as_str(), own.checkpoints.as_str()];
        if let (Some(earlier), (Some(before), now)) = (earlier, &names) {
            arguments.extend([
                earlier.copy.as_str(),
                earlier.checkpoints.as_str(),
                before,
                now,
            ]);
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
        transfer_id: i64,
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
        let mut ssh = command(&find_program(program).ok_or_else(missing)?);
        ssh.args(self.arguments(&request));
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
        let work = async { tokio::join!(ended, read(stdout), read(stderr)) };
        let Ok((status, output, complaint)) = timeout(request.limit, work).await else {
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
        let reply = Reply {
            code,
            answers: answers(&output),
            complaint: last_line(&complaint),
        };
        Ok((request, reply))
    }

    fn arguments(&self, request: &Request<'_>) -> Vec<String> {
        let script = ["sh", "-c", request.script, MARK];
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
        let told = complaint
            .lines()
            .filter_map(|line| Some((refusal(line)?, line.trim().to_owned())))
            .min_by_key(|(refusal, _)| *refusal);
        match told {
            Some((Refusal::HostKey, line)) => TransferError::HostKey { host, line },
            Some((Refusal::Denied, line)) => TransferError::SshDenied { host, line },
            Some((Refusal::Network, line)) => TransferError::Network { host, line },
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

/// Reads to the end, keeps the beginning.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut pipe) = pipe else {
        return String::new();
    };
    let mut kept = Vec::new();
    let mut buffer = vec![0; 8 << 10];
    // A pipe that breaks is at its end; the exit code tells the rest.
    while let Ok(n @ 1..) = pipe.read(&mut buffer).await {
        let room = MAX_OUTPUT_BYTES - kept.len();
        kept.extend_from_slice(&buffer[..n.min(room)]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

fn answers(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix(MARK)?.strip_prefix(' '))
        .map(|answer| answer.trim_end().to_owned())
        .collect()
}

fn last_line(text: &str) -> String {
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    line.unwrap_or_default().chars().take(500).collect()
}

/// Reads [`STAT`]'s answer.
fn facts(answer: &str) -> Option<Facts> {
    let words: Vec<&str> = answer.split(' ').collect();
    let [size, modified, device, inode, kind, readable] = words.as_slice() else {
        return None;
    };
    let identity = match (*device, *inode) {
        ("-", "-") => None,
        (device, inode) => Some((device.parse().ok()?, inode.parse().ok()?)),
    };
    let modified = match *modified {
        "-" => None,
        seconds => Some(seconds.parse().ok()?),
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
        modified,
        identity,
    })
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

    use super::*;

    const FACTS: Facts = Facts {
        size: 12,
        kind: FileKind::File,
        readable: true,
        modified: Some(1_790_000_000),
        identity: Some((64, 99)),
    };

    #[rstest]
    #[case("12 1790000000 64 99 file yes", Some(FACTS))]
    #[case("12 - - - file no", Some(Facts { readable: false, modified: None, identity: None, ..FACTS }))]
    #[case("12 - - - other", None)]
    #[case("x - - - file yes", None)]
    #[case("12 - - - socket yes", None)]
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

    #[test]
    fn only_marked_lines_are_answers() {
        let output = "Welcome!\nccat-transfer made\nccat-transferred\n";
        assert_eq!(answers(output), ["made"]);
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
