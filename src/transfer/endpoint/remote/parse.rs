//! Parsers for the output of scripts and programs of a remote host.

use std::net::IpAddr;

use crate::settings::DigestAlgorithm;
use crate::transfer::digest::Digest;
use crate::transfer::endpoint::{Facts, FileKind, FileTime, HostAddresses};

/// Parses the answer of [`STAT`](super::scripts::STAT).
pub(super) fn facts(answer: &str) -> Option<Facts> {
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
        modified: parse_time(modified, parts.next())?,
        changed: parse_time(changed, parts.next())?,
        identity,
        names: known(names)?,
        boot: known(boot)?,
    })
}

/// Parses the answer of [`ADDRESSES`](super::scripts::ADDRESSES).
pub(super) fn addresses(answer: &str) -> Option<HostAddresses> {
    let words: Vec<&str> = answer.split(' ').collect();
    let [name, own, asked, client, server] = words.as_slice() else {
        return None;
    };
    let address = |word: &str| Some(known::<IpAddr>(word)?.map(|address| address.to_canonical()));
    Some(HostAddresses {
        own_name: known(name)?,
        own_address: address(own)?,
        asked: address(asked)?,
        ssh_client: address(client)?,
        ssh_server: address(server)?,
    })
}

/// Parses a word of an answer; `-` stands for an unknown value.
fn known<T: std::str::FromStr>(word: &str) -> Option<Option<T>> {
    match word {
        "-" => Some(None),
        word => word.parse().ok().map(Some),
    }
}

/// Parses a time; `text` (`2026-11-29 13:09:24.123456789 +0000`) contains its nanoseconds.
fn parse_time(seconds: &str, text: Option<&str>) -> Option<Option<FileTime>> {
    let fraction = text.and_then(|text| {
        let (_, rest) = text.split_once('.')?;
        rest.get(..9)?.parse().ok()
    });
    let seconds = known::<i64>(seconds)?;
    Some(seconds.map(|seconds| FileTime {
        seconds,
        nanoseconds: fraction.unwrap_or(0),
    }))
}

/// Parses the available bytes from a line of `df -P -k`: device, total, used, available, per cent, mount point. Device
/// and mount point may contain blanks, so the function searches for the per cent.
pub(super) fn available(line: &str) -> Option<u64> {
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

/// Answer of [`DIGEST`](super::scripts::DIGEST).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BlockAnswer {
    /// The file does not have all bytes of the block yet.
    Short,
    /// Digest of the block.
    Digest {
        /// The digest.
        digest: Digest,
        /// Name of the program that computed it.
        program: String,
    },
}

/// Parses the answer of [`DIGEST`](super::scripts::DIGEST).
pub(super) fn block(algorithm: DigestAlgorithm, answer: &str) -> Option<BlockAnswer> {
    match answer.split_once(' ')? {
        ("short", _) => Some(BlockAnswer::Short),
        ("digest", rest) => {
            let (program, printed) = rest.split_once(' ')?;
            Some(BlockAnswer::Digest {
                digest: printed_digest(algorithm, printed)?,
                program: program.to_owned(),
            })
        }
        _ => None,
    }
}

/// Parses `HEX  -`, or xxhsum's `XXH3_HEX  stdin` (0.8.1 and later) and `XXH3 (stdin) = HEX`.
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
        modified: Some(FileTime {
            seconds: 1_790_000_000,
            nanoseconds: 123_456_789,
        }),
        changed: Some(FileTime {
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

    #[test]
    fn block_answers() {
        let of = |answer| block(DigestAlgorithm::Xxh3, answer);
        assert_eq!(of("short 12"), Some(BlockAnswer::Short));
        assert!(matches!(
            of("digest xxhsum 78af5f94892f3950 -"),
            Some(BlockAnswer::Digest { program, .. }) if program == "xxhsum"
        ));
        assert_eq!(of("digest xxhsum xxhsum: -"), None);
        assert_eq!(of("78af5f94892f3950"), None);
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
        fn any_answer_is_read_without_panic(answer in "\\PC*") {
            facts(&answer);
            available(&answer);
            block(DigestAlgorithm::Xxh3, &answer);
        }
    }
}
