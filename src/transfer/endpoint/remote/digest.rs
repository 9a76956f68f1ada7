//! Digest of a file on another host, by a program there.
//!
//! The file is read in blocks, each by a request of its own. Each request therefore ends soon, the next one is sent before
//! the answer of the last one has arrived, and a file that still grows is read while it arrives.

use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use super::parse::{BlockAnswer, block};
use super::scripts::{DIGEST, NO_PROGRAM};
use super::{ScriptCall, word};
use crate::settings::{DigestAlgorithm, Ssh};
use crate::transfer::digest::{Digest, FileDigest, ReadBlock, block_bytes};
use crate::transfer::endpoint::{AbsolutePath, DigestResult, Links, ReadOptions, Remote};
use crate::transfer::failures::{Role, TransferError};

/// Number of requests at the same time: one is executed while the other is on its way.
const CONCURRENT_REQUESTS: usize = 2;

/// Time for which a request waits at the other host until the file has grown. Then it is repeated, so that nothing waits
/// there for long after this process has ended.
const GROWTH_WAIT: Duration = Duration::from_secs(20);

/// Value of `ssh.sha256_command` by which the other host chooses the program.
const AUTOMATIC: &str = "auto";

/// Rate of the slowest supported storage, in bytes per second; limits the time of a digest.
const SLOWEST_DIGEST_BYTES_PER_S: u64 = 10_000_000;

/// Unit of the positions of a block, in bytes.
const MEBIBYTE: u64 = 1 << 20;

impl Remote {
    pub(in crate::transfer::endpoint) async fn digest(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
        options: ReadOptions<'_>,
    ) -> DigestResult {
        let block_bytes = block_bytes(options.size);
        let count = options.size.div_ceil(block_bytes).max(1);
        let known = options.blocks.map(|blocks| blocks.known.digests.clone());
        let mut digests = known.unwrap_or_default();
        let first = digests.len() as u64;
        let blocks = stream::iter(first..count).map(|index| async move {
            let start = index * block_bytes;
            let range = start..options.size.min(start + block_bytes);
            let read = self.digest_block(role, path, links, options, range).await?;
            Ok::<_, TransferError>((index, read))
        });
        let mut blocks = blocks.buffered(CONCURRENT_REQUESTS);
        let mut program = (first == count).then(|| "recorded digests".to_owned());
        while let Some((index, read)) = blocks.try_next().await? {
            let (digest, by) = read;
            if let Some(blocks) = options.blocks {
                blocks.read.send(ReadBlock {
                    index,
                    digest: digest.clone(),
                    state: None,
                });
            }
            digests.push(digest);
            program = Some(by);
        }
        Ok(FileDigest::of_blocks(digests, first * block_bytes, program))
    }

    /// Digest of the bytes `range` of a file, and the name of the program that computed it.
    async fn digest_block(
        &self,
        role: Role,
        path: &AbsolutePath,
        links: Links,
        options: ReadOptions<'_>,
        range: std::ops::Range<u64>,
    ) -> Result<(Digest, String), TransferError> {
        let command = digest_command(&self.ssh, options.algorithm);
        let bytes = range.end - range.start;
        let is_recorded = role == Role::Destination && options.blocks.is_some();
        let reading = Duration::from_secs(bytes / SLOWEST_DIGEST_BYTES_PER_S);
        loop {
            let copy_goes_on = options
                .behind
                .is_none_or(|copied| copied.has_changed().is_ok());
            // After the copy the file is read as it is, so that the wait ends in any case.
            let (needed, wait) = match options.is_growing && copy_goes_on {
                true => (range.end, GROWTH_WAIT),
                false => (0, Duration::ZERO),
            };
            let numbers = [
                needed,
                wait.as_secs(),
                range.start / MEBIBYTE,
                bytes.div_ceil(MEBIBYTE).max(1),
            ];
            let numbers = numbers.map(|number| number.to_string());
            let arguments: Vec<&str> = [path.as_str(), word(links)]
                .into_iter()
                .chain(numbers.iter().map(String::as_str))
                .chain([if is_recorded { "disk" } else { "memory" }])
                .chain(command.iter().map(String::as_str))
                .collect();
            let call = ScriptCall {
                limit: options.stall_timeout + wait + reading,
                ..ScriptCall::new(role, "digest", path, DIGEST, &arguments)
            };
            let (call, reply) = self.run(call).await?;
            match (reply.code, reply.answers.as_slice()) {
                (0, [answer]) => match block(options.algorithm, answer) {
                    Some(BlockAnswer::Digest { digest, program }) => return Ok((digest, program)),
                    Some(BlockAnswer::Short) => {}
                    None => return Err(call.unexpected_answer(&reply.answers)),
                },
                (NO_PROGRAM, _) => {
                    let program = match command {
                        [word] if word == AUTOMATIC => "openssl, sha256sum".to_owned(),
                        command => shell_words::join(command),
                    };
                    return Err(TransferError::RemoteProgramMissing {
                        role,
                        host: self.host.to_string(),
                        line: format!("{program}: not found"),
                    });
                }
                (0, answers) => return Err(call.unexpected_answer(answers)),
                _ => return Err(call.failure(reply)),
            }
        }
    }
}

/// Program with arguments that computes a digest.
fn digest_command(ssh: &Ssh, algorithm: DigestAlgorithm) -> &[String] {
    match algorithm {
        DigestAlgorithm::Sha256 => &ssh.sha256_command,
        DigestAlgorithm::Blake3 => &ssh.blake3_command,
        DigestAlgorithm::Xxh3 => &ssh.xxh3_command,
        DigestAlgorithm::Md5 => &ssh.md5_command,
    }
}
