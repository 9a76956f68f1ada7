//! Checksums of `-e` and `-E`: algorithm, computing side, expected value, and output.

use crate::failure::Failure;
use crc::{CRC_32_CKSUM, CRC_32_ISCSI, CRC_32_ISO_HDLC, Crc, Digest as CrcDigest, Table};
use md5::{Digest as _, Md5};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

static CASTAGNOLI: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);
static ZLIB: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC);
static POSIX: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_CKSUM);

/// Algorithms of 17.12, except `a32`: its output there is broken, so the double refuses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Algorithm {
    /// `md5`
    Md5,
    /// `c32`: the POSIX `cksum`, which includes the length
    Cksum,
    /// `c32z`: zlib's CRC-32
    Zlib,
    /// `c32c`: Castagnoli
    Castagnoli,
}

impl Algorithm {
    const NAMES: [(&'static str, Self); 4] = [
        ("md5", Self::Md5),
        ("c32", Self::Cksum),
        ("c32z", Self::Zlib),
        ("c32c", Self::Castagnoli),
    ];

    fn named(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, algorithm)| *algorithm)
    }

    /// Name on the command line and in the `Checksum:` line.
    pub(crate) fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, algorithm)| *algorithm == self)
            .map_or("md5", |(name, _)| name)
    }

    fn hex_digits(self) -> usize {
        match self {
            Self::Md5 => 32,
            Self::Cksum | Self::Zlib | Self::Castagnoli => 8,
        }
    }

    /// Starts a new running sum.
    pub(crate) fn start(self) -> Running {
        match self {
            Self::Md5 => Running::Md5(Md5::new()),
            Self::Cksum => Running::Cksum(POSIX.digest(), 0),
            Self::Zlib => Running::Crc(ZLIB.digest()),
            Self::Castagnoli => Running::Crc(CASTAGNOLI.digest()),
        }
    }
}

/// Sum over the bytes read so far.
pub(crate) enum Running {
    /// MD5
    Md5(Md5),
    /// A plain CRC
    Crc(CrcDigest<'static, u32, Table<16>>),
    /// POSIX CRC, and the number of bytes, which is included at the end
    Cksum(CrcDigest<'static, u32, Table<16>>, u64),
}

impl Running {
    /// Adds the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Md5(digest) => digest.update(bytes),
            Self::Crc(digest) => digest.update(bytes),
            Self::Cksum(digest, length) => {
                digest.update(bytes);
                *length += bytes.len() as u64;
            }
        }
    }

    /// Returns the sum in lower-case hex.
    pub(crate) fn finish(self) -> String {
        match self {
            Self::Md5(digest) => digest
                .finalize()
                .iter()
                .fold(String::new(), |mut hex, byte| {
                    let _ = write!(hex, "{byte:02x}");
                    hex
                }),
            Self::Crc(digest) => format!("{:08x}", digest.finalize()),
            Self::Cksum(mut digest, length) => {
                let bytes = length.to_le_bytes();
                let used = bytes
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |last| last + 1);
                digest.update(&bytes[..used]);
                format!("{:08x}", digest.finalize())
            }
        }
    }
}

/// Destination of the line `Checksum: …`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Output {
    /// Standard error (`-E md5=`)
    StandardError,
    /// This file, appended to (`-E md5=/dev/stdout`)
    File(String),
}

/// Use of the sum of the whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Print it.
    Print(Output),
    /// Compare it with this value.
    Compare(String),
}

/// Value of `-E [%]alg=…`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WholeFile {
    /// A leading `%`: the source computes.
    pub(crate) at_source: bool,
    /// Print or compare
    pub(crate) purpose: Purpose,
}

/// Values of `-e` and `-E`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checksum {
    /// `None` stands for MD5 by default.
    algorithm: Option<Algorithm>,
    /// `-e`, or `-E` without `=`: every buffer is checked on its way.
    pub(crate) on_link: bool,
    /// `-E alg=…`
    pub(crate) whole: Option<WholeFile>,
}

impl Checksum {
    /// The algorithm in force.
    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm.unwrap_or(Algorithm::Md5)
    }

    /// Reads the value of `-E`.
    ///
    /// # Errors
    /// The real program's texts, code 1.
    pub(crate) fn apply(&mut self, specification: &str) -> Result<(), Failure> {
        let invalid = |line: String| Failure::new(1, line);
        let (at_source, rest) = match specification.strip_prefix('%') {
            Some("") => return Err(invalid("Checksum type not specified.".into())),
            Some(rest) => (true, rest),
            None => (false, specification),
        };
        let (name, argument) = match rest.split_once('=') {
            Some((name, argument)) => (name, Some(argument)),
            None => (rest, None),
        };
        let algorithm = Algorithm::named(name)
            .ok_or_else(|| invalid(format!("Invalid checksum type - {name}")))?;
        self.algorithm = Some(algorithm);
        let Some(argument) = argument else {
            self.on_link = true;
            self.whole = None;
            return Ok(());
        };
        let purpose = if argument.starts_with(|first: char| first.is_ascii_hexdigit()) {
            let well_formed = argument.len() == algorithm.hex_digits()
                && argument
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            if !well_formed {
                return Err(invalid(format!(
                    "Invalid {name} checksum value - {argument}"
                )));
            }
            Purpose::Compare(argument.to_owned())
        } else if argument.is_empty() {
            Purpose::Print(Output::StandardError)
        } else {
            Purpose::Print(Output::File(argument.to_owned()))
        };
        self.whole = Some(WholeFile { at_source, purpose });
        Ok(())
    }

    /// True if the source computes the sum of the file.
    pub(crate) fn computed_at_source(&self) -> bool {
        self.on_link || self.whole.as_ref().is_some_and(|whole| whole.at_source)
    }

    /// True if the sink computes the sum of the file: not with a `%`, unless buffers are checked in order anyway.
    pub(crate) fn computed_at_sink(&self, ordered: bool) -> bool {
        match &self.whole {
            Some(whole) => !whole.at_source || (self.on_link && ordered),
            None => self.on_link,
        }
    }

    /// The value to compare with, if any.
    pub(crate) fn expected(&self) -> Option<&str> {
        match self.whole.as_ref().map(|whole| &whole.purpose) {
            Some(Purpose::Compare(value)) => Some(value),
            _ => None,
        }
    }

    /// Output that the sum is printed to.
    pub(crate) fn output(&self) -> Option<&Output> {
        match self.whole.as_ref().map(|whole| &whole.purpose) {
            Some(Purpose::Print(output)) => Some(output),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn known_sums() {
        for (name, text, sum) in [
            ("md5", "", "d41d8cd98f00b204e9800998ecf8427e"),
            ("md5", "123456789", "25f9e794323b453885f5181f1b624d0b"),
            ("c32c", "", "00000000"),
            ("c32c", "123456789", "e3069283"),
            ("c32z", "123456789", "cbf43926"),
            // The values of cksum(1): 930766865, and 4294967295 for no input.
            ("c32", "123456789", "377a6011"),
            ("c32", "", "ffffffff"),
        ] {
            let mut running = Algorithm::named(name).unwrap().start();
            running.update(text.as_bytes());
            assert_eq!(running.finish(), sum, "{name} of {text:?}");
        }
    }
}
