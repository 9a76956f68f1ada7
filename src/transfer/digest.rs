//! Digests of files and their blocks, to compare origin and destination.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};

use entity::FileEnd;
use sha2::Digest as _;
use sha2::digest::common::hazmat::SerializableState;

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

    /// Continues a computation. Returns `None` if the state is not one of this algorithm, or cannot be restored.
    fn restored(algorithm: DigestAlgorithm, state: &str) -> Option<Self> {
        let bytes = hex::decode(state).ok()?;
        match algorithm {
            DigestAlgorithm::Sha256 => restored(&bytes).map(Self::Sha256),
            DigestAlgorithm::Md5 => restored(&bytes).map(Self::Md5),
            DigestAlgorithm::Blake3 | DigestAlgorithm::Xxh3 => None,
        }
    }

    /// The state of the computation, as hex, from which it can be [`restored`](Self::restored).
    fn state(&self) -> Option<String> {
        match self {
            Self::Sha256(state) => Some(hex::encode(state.serialize())),
            Self::Md5(state) => Some(hex::encode(state.serialize())),
            Self::Blake3(_) | Self::Xxh3(_) => None,
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
            Self::Sha256(state) => hex::encode(state.finalize()),
            Self::Md5(state) => hex::encode(state.finalize()),
            Self::Blake3(state) => state.finalize().to_hex().to_string(),
            Self::Xxh3(state) => format!("{:016x}", state.digest()),
        }
    }
}

fn restored<H: SerializableState>(bytes: &[u8]) -> Option<H> {
    H::deserialize(bytes.try_into().ok()?).ok()
}

/// Computes the digest of all bytes of `reader`, and with `block_bytes` those of its blocks.
///
/// # Errors
/// As [`FileHasher::read`].
pub fn of(
    algorithm: DigestAlgorithm,
    block_bytes: Option<u64>,
    reader: impl Read,
    read: impl FnMut(u64) -> bool,
) -> io::Result<FileDigest> {
    FileHasher::new(algorithm, block_bytes).read(reader, read, |_| Ok(()))
}

/// Computation of the digest of a file, and of those of its blocks.
pub struct FileHasher {
    algorithm: DigestAlgorithm,
    whole: Hasher,
    blocks: Option<BlockHasher>,
    /// First byte that is read.
    start: u64,
}

impl FileHasher {
    /// Starts a computation, with `block_bytes` also for blocks of this size.
    #[must_use]
    pub fn new(algorithm: DigestAlgorithm, block_bytes: Option<u64>) -> Self {
        Self {
            algorithm,
            whole: Hasher::new(algorithm),
            blocks: block_bytes.map(|bytes| BlockHasher::new(algorithm, bytes, Vec::new())),
            start: 0,
        }
    }

    /// Continues a computation after the known blocks, or starts one if their state cannot be used.
    #[must_use]
    pub fn after(known: &KnownBlocks, algorithm: DigestAlgorithm, block_bytes: u64) -> Self {
        let state = known.state.as_deref();
        let whole = state.and_then(|state| Hasher::restored(algorithm, state));
        let Some(whole) = whole else {
            return Self::new(algorithm, Some(block_bytes));
        };
        let digests = known.digests.clone();
        Self {
            algorithm,
            whole,
            start: block_bytes * digests.len() as u64,
            blocks: Some(BlockHasher::new(algorithm, block_bytes, digests)),
        }
    }

    /// First byte of the file that has to be read.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Reads `reader`, which begins with the byte [`start`](Self::start) of the file, to its end.
    ///
    /// `read` is called after each buffer with the position in the file. If it returns false, reading stops with
    /// [`io::ErrorKind::Interrupted`]. `block` is called after each complete block, and for the rest at the end.
    ///
    /// # Errors
    /// The errors of the reader and of `block`.
    pub fn read(
        mut self,
        mut reader: impl Read,
        mut read: impl FnMut(u64) -> bool,
        mut block: impl FnMut(ReadBlock) -> io::Result<()>,
    ) -> io::Result<FileDigest> {
        let mut room = vec![0; BUFFER_BYTES + ALIGNMENT];
        let start = room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let buffer = &mut room[start..start + BUFFER_BYTES];
        let mut position = self.start;
        loop {
            let n = match reader.read(buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            self.update(&buffer[..n], &mut block)?;
            position += n as u64;
            if !read(position) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        // An empty file is one empty block.
        let mut done = Vec::new();
        if let Some(mut blocks) = self.blocks {
            let is_between_blocks = blocks.missing == blocks.block_bytes;
            if blocks.done.is_empty() || !is_between_blocks {
                block(blocks.end_block(None))?;
            }
            done = blocks.done;
        }
        Ok(FileDigest {
            whole: Some(Digest {
                algorithm: self.algorithm,
                hex: self.whole.finish(),
            }),
            blocks: done,
            read_from: self.start,
            program: None,
        })
    }

    fn update(
        &mut self,
        mut bytes: &[u8],
        block: &mut impl FnMut(ReadBlock) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(blocks) = &mut self.blocks else {
            self.whole.update(bytes);
            return Ok(());
        };
        while !bytes.is_empty() {
            let n = usize::try_from(blocks.missing)
                .map_or(bytes.len(), |missing| missing.min(bytes.len()));
            let (now, later) = bytes.split_at(n);
            self.whole.update(now);
            blocks.current.update(now);
            blocks.missing -= n as u64;
            bytes = later;
            if blocks.missing == 0 {
                block(blocks.end_block(self.whole.state()))?;
            }
        }
        Ok(())
    }
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
    fn new(algorithm: DigestAlgorithm, block_bytes: u64, done: Vec<Digest>) -> Self {
        Self {
            algorithm,
            block_bytes,
            current: Hasher::new(algorithm),
            missing: block_bytes,
            done,
        }
    }

    /// Ends the current block.
    fn end_block(&mut self, state: Option<String>) -> ReadBlock {
        let ended = std::mem::replace(&mut self.current, Hasher::new(self.algorithm));
        let digest = Digest {
            algorithm: self.algorithm,
            hex: ended.finish(),
        };
        self.done.push(digest.clone());
        self.missing = self.block_bytes;
        ReadBlock {
            index: self.done.len() as u64 - 1,
            digest,
            state,
        }
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

    /// A computation goes on after known blocks, if the algorithm's state can be saved.
    #[rstest]
    #[case(DigestAlgorithm::Sha256, 20)]
    #[case(DigestAlgorithm::Md5, 20)]
    #[case(DigestAlgorithm::Blake3, 0)]
    #[case(DigestAlgorithm::Xxh3, 0)]
    fn known_blocks_are_not_read_again(
        #[case] algorithm: DigestAlgorithm,
        #[case] start: u64,
        #[values(25, 30)] bytes: u8,
    ) -> io::Result<()> {
        const BLOCK: u64 = 10;
        let content: Vec<u8> = (0..bytes).collect();
        let mut blocks = Vec::new();
        let whole = FileHasher::new(algorithm, Some(BLOCK)).read(
            &content[..],
            |_| true,
            |block| {
                blocks.push(block);
                Ok(())
            },
        )?;
        assert_eq!((whole.read_from, blocks.len()), (0, 3));
        let known = KnownBlocks::first(algorithm, 2, blocks.clone());
        let hasher = FileHasher::after(&known, algorithm, BLOCK);
        assert_eq!(hasher.start(), start);
        let rest = content.iter().copied().skip(start as usize);
        let rest: Vec<u8> = rest.collect();
        let mut last = None;
        let again = hasher.read(
            &rest[..],
            |_| true,
            |block| {
                last = Some(block);
                Ok(())
            },
        )?;
        assert_eq!(again.read_from, start);
        assert_eq!((again.whole, again.blocks), (whole.whole, whole.blocks));
        assert_eq!(last.as_ref(), blocks.last());

        let gap = blocks.iter().filter(|block| block.index != 1).cloned();
        assert_eq!(KnownBlocks::first(algorithm, 3, gap).digests.len(), 1);
        let mut foreign = known;
        foreign.state = Some("00".to_owned());
        assert_eq!(FileHasher::after(&foreign, algorithm, BLOCK).start(), 0);
        Ok(())
    }

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
