//! Digests of files and their blocks, to compare origin and destination.

use std::collections::HashMap;
use std::fmt;

use entity::FileEnd;

use crate::settings::DigestAlgorithm;

mod hasher;

pub use hasher::{FileHasher, of};

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
    /// First byte that was read for them; the blocks before it were known.
    pub read_from: u64,
    /// Program that computed them; `None` for this program.
    pub program: Option<String>,
}

/// A block that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadBlock {
    /// Number of the block: 0, 1, …
    pub index: u64,
    /// Its digest.
    pub digest: Digest,
    /// State of the digest of the whole file after this block, as hex; `None` if the reader does not compute that digest,
    /// or if the algorithm's state cannot be saved.
    pub state: Option<String>,
}

/// The first blocks of a file that were read before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownBlocks {
    /// Their digests.
    pub digests: Vec<Digest>,
    /// State of the digest of the whole file after them, see [`ReadBlock::state`].
    pub state: Option<String>,
}

impl KnownBlocks {
    /// The longest sequence of blocks from the start of a file, of at most `count` blocks, in blocks that are ordered by
    /// their numbers.
    pub fn first(
        algorithm: DigestAlgorithm,
        count: u64,
        blocks: impl IntoIterator<Item = ReadBlock>,
    ) -> Self {
        let mut known = Self::default();
        let usable = blocks.into_iter().zip(0..count);
        for (block, _) in usable.take_while(|(block, number)| {
            block.index == *number && block.digest.algorithm == algorithm
        }) {
            known.digests.push(block.digest);
            known.state = block.state;
        }
        known
    }
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
    pub fn of_blocks(mut blocks: Vec<Digest>, read_from: u64, program: Option<String>) -> Self {
        let whole = if blocks.len() == 1 {
            blocks.pop()
        } else {
            None
        };
        Self {
            whole,
            blocks,
            read_from,
            program,
        }
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

/// Counts the blocks whose digests agree.
pub(super) struct BlockCount {
    file_bytes: u64,
    /// Digests that only one end has computed yet, by block.
    pending: HashMap<u64, (FileEnd, Digest)>,
    verified_bytes: u64,
}

impl BlockCount {
    pub(super) fn new(file_bytes: u64) -> Self {
        Self {
            file_bytes,
            pending: HashMap::new(),
            verified_bytes: 0,
        }
    }

    /// Adds the digest of a block. Returns true if more bytes are verified now.
    pub(super) fn add(&mut self, end: FileEnd, index: u64, digest: Digest) -> bool {
        match self.pending.remove(&index) {
            Some((other_end, other)) if other_end != end => {
                let bytes = block_bytes(self.file_bytes);
                let rest = self.file_bytes.saturating_sub(index.saturating_mul(bytes));
                if other == digest {
                    self.verified_bytes += rest.min(bytes);
                }
                other == digest
            }
            _ => {
                self.pending.insert(index, (end, digest));
                false
            }
        }
    }

    /// Number of bytes on which both ends agree.
    pub(super) fn verified_bytes(&self) -> u64 {
        self.verified_bytes
    }
}

/// Digests that cannot be compared: of the whole file at one end, and of blocks at the other.
#[derive(Debug, thiserror::Error)]
#[error("the two ends have no digest in common")]
pub struct NothingInCommon;

#[cfg(test)]
mod tests {
    use std::io;

    use rstest::rstest;

    use super::*;

    pub(super) const ABC_SHA256: &str =
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_block_counts_when_both_ends_agree() -> io::Result<()> {
        let digest = |content: &[u8]| {
            let digest = of(DigestAlgorithm::Xxh3, None, content, |_| true)?;
            digest.whole.ok_or_else(|| io::Error::other("no digest"))
        };
        let (one, other) = (digest(b"one")?, digest(b"other")?);
        let size = 3 * MIN_BLOCK_BYTES / 2;
        let mut count = BlockCount::new(size);
        assert!(!count.add(FileEnd::Origin, 0, one.clone()));
        assert!(count.add(FileEnd::Destination, 0, one.clone()));
        assert_eq!(count.verified_bytes(), MIN_BLOCK_BYTES);
        assert!(!count.add(FileEnd::Destination, 1, one));
        assert!(!count.add(FileEnd::Origin, 1, other.clone()));
        assert!(!count.add(FileEnd::Origin, 1, other.clone()));
        assert!(count.add(FileEnd::Destination, 1, other));
        assert_eq!(count.verified_bytes(), size);
        Ok(())
    }

    #[test]
    fn a_difference_names_the_block() -> io::Result<()> {
        let digest = |content: &[u8]| of(DigestAlgorithm::Xxh3, Some(2), content, |_| true);
        let one = digest(b"abcdef")?;
        let remote = FileDigest::of_blocks(digest(b"abcxef")?.blocks, 0, None);
        let found = one.difference(&remote).map_err(io::Error::other)?;
        assert_eq!(found.map(|difference| difference.block), Some(Some(1)));
        let found = one
            .difference(&digest(b"abcxef")?)
            .map_err(io::Error::other)?;
        assert_eq!(found.map(|difference| difference.block), Some(None));
        let same = FileDigest::of_blocks(one.blocks.clone(), 0, None);
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
