//! Digests of files and their blocks, to compare origin and destination.

use std::fmt;
use std::io::{self, Read};

use sha2::Digest as _;

use crate::settings::DigestAlgorithm;

/// Size of the read buffer: large enough to make the cost of system calls negligible, small enough for the cache of one
/// core.
const BUFFER_BYTES: usize = 256 << 10;

/// Alignment of the read buffer, in bytes: one page. The kernel copies pages of the file to the buffer, and AMD's Zen 3
/// copies four times slower to an address 16 bytes after the start of a page, which is where glibc places large
/// allocations (glibc bug 30994; measured on an EPYC with Linux 6.18: 1.2 s for 2 GB in memory, and 0.25 s when
/// aligned).
const ALIGNMENT: usize = 4096;

/// A digest and its algorithm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    algorithm: DigestAlgorithm,
    hex: String,
}

impl Digest {
    /// Parses the hexadecimal form, in upper or lower case.
    ///
    /// Returns `None` if the text is not a digest of `algorithm`.
    pub fn from_hex(algorithm: DigestAlgorithm, hex: &str) -> Option<Self> {
        let well_formed =
            hex.len() == hex_len(algorithm) && hex.bytes().all(|b| b.is_ascii_hexdigit());
        well_formed.then(|| Self {
            algorithm,
            hex: hex.to_ascii_lowercase(),
        })
    }

    /// Name of the algorithm.
    pub fn algorithm_name(&self) -> &'static str {
        name(self.algorithm)
    }

    /// Hexadecimal value, in lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// Parses the checksum of a package's row; returns `None` for an unknown format.
    ///
    /// Known formats are `algorithm:hex`, and hex without a prefix of the length of SHA-256. The algorithm of other
    /// values without a prefix is unknown, and a wrong guess would reject files that are correct.
    pub fn recorded(text: &str) -> Option<Self> {
        let (algorithm, hex) = match text.trim().split_once(':') {
            None => (DigestAlgorithm::Sha256, text.trim()),
            Some((algorithm, hex)) => {
                let plain = algorithm.trim().to_ascii_lowercase().replace('-', "");
                let known = ALGORITHMS.into_iter().find(|known| name(*known) == plain)?;
                (known, hex.trim())
            }
        };
        Self::from_hex(algorithm, hex)
    }

    /// The algorithm.
    pub fn algorithm(&self) -> DigestAlgorithm {
        self.algorithm
    }
}

const ALGORITHMS: [DigestAlgorithm; 4] = [
    DigestAlgorithm::Sha256,
    DigestAlgorithm::Blake3,
    DigestAlgorithm::Xxh3,
    DigestAlgorithm::Md5,
];

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm_name(), self.hex)
    }
}

/// Name of an algorithm, as used in settings and messages.
#[must_use]
pub fn name(algorithm: DigestAlgorithm) -> &'static str {
    match algorithm {
        DigestAlgorithm::Sha256 => "sha256",
        DigestAlgorithm::Blake3 => "blake3",
        DigestAlgorithm::Xxh3 => "xxh3",
        DigestAlgorithm::Md5 => "md5",
    }
}

fn hex_len(algorithm: DigestAlgorithm) -> usize {
    match algorithm {
        DigestAlgorithm::Sha256 | DigestAlgorithm::Blake3 => 64,
        DigestAlgorithm::Xxh3 => 16,
        DigestAlgorithm::Md5 => 32,
    }
}

/// Least number of bytes per block. A block is read again after the last of its bytes has arrived, so it must be small.
const MIN_BLOCK_BYTES: u64 = 64 << 20;

/// Maximum number of blocks of a file.
const MAX_BLOCKS: u64 = 1024;

/// Size of the blocks of a file, in bytes: a power of two, so that both ends always use the same blocks.
#[must_use]
pub fn block_bytes(file_bytes: u64) -> u64 {
    let least = file_bytes.div_ceil(MAX_BLOCKS).next_power_of_two();
    least.max(MIN_BLOCK_BYTES)
}

/// Digests of a file. An end that can only run other programs computes those of its blocks, and not that of the whole
/// file, unless the file is a single block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileDigest {
    /// Digest of the whole file.
    pub whole: Option<Digest>,
    /// Digests of its blocks; empty if they were not requested, or if the file is a single block.
    pub blocks: Vec<Digest>,
}

/// Two digests that differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Index of the block; `None` if the whole files were compared.
    pub block: Option<usize>,
    /// Digest of the first file.
    pub one: Digest,
    /// Digest of the second file.
    pub other: Digest,
}

impl FileDigest {
    /// Digests of a file whose blocks were read one by one.
    #[must_use]
    pub fn of_blocks(mut blocks: Vec<Digest>) -> Self {
        let whole = if blocks.len() == 1 {
            blocks.pop()
        } else {
            None
        };
        Self { whole, blocks }
    }

    /// First difference to a file of the same size; `None` if both have the same content.
    ///
    /// # Errors
    /// The two have no digest in common.
    pub fn difference(&self, other: &Self) -> Result<Option<Difference>, NothingInCommon> {
        let differ = |block, one: &Digest, other: &Digest| {
            (one != other).then(|| Difference {
                block,
                one: one.clone(),
                other: other.clone(),
            })
        };
        if let (Some(one), Some(other)) = (&self.whole, &other.whole) {
            return Ok(differ(None, one, other));
        }
        if self.blocks.is_empty() || self.blocks.len() != other.blocks.len() {
            return Err(NothingInCommon);
        }
        let mut pairs = self.blocks.iter().zip(&other.blocks).enumerate();
        Ok(pairs.find_map(|(block, (one, other))| differ(Some(block), one, other)))
    }
}

/// Digests that cannot be compared: of the whole file at one end, and of blocks at the other.
#[derive(Debug, thiserror::Error)]
#[error("the two ends have no digest in common")]
pub struct NothingInCommon;

/// State of a digest computation.
enum Hasher {
    Sha256(sha2::Sha256),
    Blake3(Box<blake3::Hasher>),
    Xxh3(Box<xxhash_rust::xxh3::Xxh3>),
    Md5(md5::Md5),
}

impl Hasher {
    fn new(algorithm: DigestAlgorithm) -> Self {
        match algorithm {
            DigestAlgorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
            DigestAlgorithm::Blake3 => Self::Blake3(Box::default()),
            DigestAlgorithm::Xxh3 => Self::Xxh3(Box::default()),
            DigestAlgorithm::Md5 => Self::Md5(md5::Md5::new()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(state) => state.update(bytes),
            Self::Blake3(state) => {
                state.update(bytes);
            }
            Self::Xxh3(state) => state.update(bytes),
            Self::Md5(state) => state.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(state) => hex_of(&state.finalize()),
            Self::Md5(state) => hex_of(&state.finalize()),
            Self::Blake3(state) => state.finalize().to_hex().to_string(),
            Self::Xxh3(state) => format!("{:016x}", state.digest()),
        }
    }
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Computes the digest of all bytes of `reader`, and with `block_bytes` those of its blocks.
///
/// `read` is called after each buffer with the number of bytes read so far. If it returns false, reading stops with
/// [`io::ErrorKind::Interrupted`].
///
/// # Errors
/// The errors of the reader.
pub fn of(
    algorithm: DigestAlgorithm,
    block_bytes: Option<u64>,
    mut reader: impl Read,
    mut read: impl FnMut(u64) -> bool,
) -> io::Result<FileDigest> {
    let mut whole = Hasher::new(algorithm);
    let mut blocks = block_bytes.map(|bytes| BlockHasher::new(algorithm, bytes));
    let mut room = vec![0; BUFFER_BYTES + ALIGNMENT];
    let start = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let buffer = &mut room[start..start + BUFFER_BYTES];
    let mut total = 0;
    loop {
        let n = match reader.read(buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        whole.update(&buffer[..n]);
        if let Some(blocks) = &mut blocks {
            blocks.update(&buffer[..n]);
        }
        total += n as u64;
        if !read(total) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    Ok(FileDigest {
        whole: Some(Digest {
            algorithm,
            hex: whole.finish(),
        }),
        blocks: blocks.map(BlockHasher::finish).unwrap_or_default(),
    })
}

/// State of a computation for each block of a file.
struct BlockHasher {
    algorithm: DigestAlgorithm,
    block_bytes: u64,
    current: Hasher,
    /// Bytes that the current block lacks.
    missing: u64,
    done: Vec<Digest>,
}

impl BlockHasher {
    fn new(algorithm: DigestAlgorithm, block_bytes: u64) -> Self {
        Self {
            algorithm,
            block_bytes,
            current: Hasher::new(algorithm),
            missing: block_bytes,
            done: Vec::new(),
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.missing == 0 {
                self.end_block();
            }
            let n = usize::try_from(self.missing)
                .map_or(bytes.len(), |missing| missing.min(bytes.len()));
            let (now, later) = bytes.split_at(n);
            self.current.update(now);
            self.missing -= n as u64;
            bytes = later;
        }
    }

    fn end_block(&mut self) {
        let ended = std::mem::replace(&mut self.current, Hasher::new(self.algorithm));
        self.done.push(Digest {
            algorithm: self.algorithm,
            hex: ended.finish(),
        });
        self.missing = self.block_bytes;
    }

    /// The digests of all blocks; an empty file is one empty block.
    fn finish(mut self) -> Vec<Digest> {
        self.end_block();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const ABC_SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[rstest]
    #[case(DigestAlgorithm::Sha256, ABC_SHA256)]
    #[case(
        DigestAlgorithm::Blake3,
        "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    )]
    #[case(DigestAlgorithm::Xxh3, "78af5f94892f3950")]
    #[case(DigestAlgorithm::Md5, "900150983cd24fb0d6963f7d28e17f72")]
    fn known_answers(#[case] algorithm: DigestAlgorithm, #[case] hex: &str) -> io::Result<()> {
        let mut seen = 0;
        let digest = of(algorithm, None, &b"abc"[..], |n| {
            seen = n;
            true
        })?;
        let expected = Digest::from_hex(algorithm, &hex.to_uppercase());
        assert_eq!((digest.whole, digest.blocks), (expected, vec![]));
        assert_eq!(seen, 3);
        Ok(())
    }

    #[rstest]
    #[case(0, &[0])]
    #[case(1, &[1])]
    #[case(10, &[10])]
    #[case(11, &[10, 1])]
    #[case(30, &[10, 10, 10])]
    fn blocks(#[case] bytes: usize, #[case] expected: &[usize]) -> io::Result<()> {
        let content: Vec<u8> = (0..=255).cycle().take(bytes).collect();
        let whole = |part: &[u8]| {
            Ok::<_, io::Error>(of(DigestAlgorithm::Xxh3, None, part, |_| true)?.whole)
        };
        let digest = of(DigestAlgorithm::Xxh3, Some(10), &content[..], |_| true)?;
        let mut rest = &content[..];
        for (index, length) in expected.iter().enumerate() {
            let (block, later) = rest.split_at(*length);
            assert_eq!(whole(block)?.as_ref(), digest.blocks.get(index));
            rest = later;
        }
        assert_eq!(digest.blocks.len(), expected.len());
        assert_eq!(whole(&content)?, digest.whole);
        Ok(())
    }

    #[test]
    fn a_difference_names_the_block() -> io::Result<()> {
        let digest = |content: &[u8]| of(DigestAlgorithm::Xxh3, Some(2), content, |_| true);
        let one = digest(b"abcdef")?;
        let remote = FileDigest::of_blocks(digest(b"abcxef")?.blocks);
        let found = one.difference(&remote).map_err(io::Error::other)?;
        assert_eq!(found.map(|difference| difference.block), Some(Some(1)));
        let found = one
            .difference(&digest(b"abcxef")?)
            .map_err(io::Error::other)?;
        assert_eq!(found.map(|difference| difference.block), Some(None));
        let same = FileDigest::of_blocks(one.blocks.clone());
        assert!(one.difference(&same).is_ok_and(|found| found.is_none()));
        let whole = FileDigest {
            blocks: vec![],
            ..one.clone()
        };
        assert!(whole.difference(&same).is_err());
        Ok(())
    }

    #[rstest]
    #[case(0, 64 << 20)]
    #[case(64 << 30, 64 << 20)]
    #[case((64 << 30) + 1, 128 << 20)]
    #[case(50_000_000_000_000, 64 << 30)]
    fn block_sizes(#[case] file: u64, #[case] expected: u64) {
        assert_eq!(block_bytes(file), expected);
    }

    #[test]
    fn digest_stops_on_request() {
        let stopped = of(DigestAlgorithm::Xxh3, None, io::repeat(0), |n| {
            n < 5_000_000
        });
        assert_eq!(
            stopped.map_err(|e| e.kind()),
            Err(io::ErrorKind::Interrupted)
        );
    }

    #[rstest]
    #[case(ABC_SHA256, Some(DigestAlgorithm::Sha256))]
    #[case(&format!("sha256:{}", ABC_SHA256.to_uppercase()), Some(DigestAlgorithm::Sha256))]
    #[case(&format!("SHA-256:{ABC_SHA256}"), Some(DigestAlgorithm::Sha256))]
    #[case(&format!(" blake3: {ABC_SHA256} "), Some(DigestAlgorithm::Blake3))]
    #[case("MD5:900150983cd24fb0d6963f7d28e17f72", Some(DigestAlgorithm::Md5))]
    #[case("md5:78af5f94892f3950", None)]
    #[case("78af5f94892f3950", None)]
    #[case("adler32:024d0127", None)]
    #[case("", None)]
    fn recorded(#[case] text: &str, #[case] algorithm: Option<DigestAlgorithm>) -> io::Result<()> {
        let recorded = Digest::recorded(text);
        assert_eq!(recorded.as_ref().map(Digest::algorithm), algorithm);
        if algorithm.is_some_and(|a| a != DigestAlgorithm::Blake3) {
            let made = of(
                algorithm.unwrap_or(DigestAlgorithm::Md5),
                None,
                &b"abc"[..],
                |_| true,
            )?;
            assert_eq!(recorded, made.whole);
        }
        Ok(())
    }
}
