//! Parser for the output of bbcp: bytes to lines to events.
//!
//! Lines of up to four processes and ssh interleave, and may contain anything. An unknown line becomes
//! [`Event::Other`]; parsing never fails.

/// One line of output.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A progress line, from the sink.
    Progress {
        /// Completed part in whole per cent; `None` if bbcp does not know the size (`not done`).
        percent: Option<u32>,
        /// Bytes per second since the last progress line; `None` for `nan` and `inf`.
        rate: Option<f64>,
        /// Bytes per second since the start; only printed with `-v`.
        average: Option<f64>,
    },
    /// The target was created.
    Creating,
    /// A partial target is completed (or, with `-a`, a new one is started at 0).
    Appending {
        /// Size of the partial target in bytes.
        offset: u64,
    },
    /// A file is complete.
    Created {
        /// Bytes copied in this session.
        bytes: u64,
        /// Rate from disk to disk, in bytes per second.
        rate: Option<f64>,
    },
    /// The last line: number of copied files, and the rate including start and end.
    Total {
        /// Number of files.
        files: u64,
        /// Rate in bytes per second.
        rate: Option<f64>,
    },
    /// Checksum of the whole file, computed by the target from the received bytes.
    Checksum {
        /// Name of the algorithm in bbcp.
        algorithm: String,
        /// Value in hexadecimal digits.
        hex: String,
    },
    /// Any other line, without its line end.
    Other(String),
}

/// Parses one line, with or without its end.
pub fn parse(line: &[u8]) -> Event {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end_matches(['\n', '\r']);
    progress(text)
        .or_else(|| parse_creating(text))
        .or_else(|| parse_appending(text))
        .or_else(|| created(text))
        .or_else(|| total(text))
        .or_else(|| checksum(text))
        .unwrap_or_else(|| Event::Other(text.to_owned()))
}

/// `bbcp: 261124 04:11:43  19% done; 259.5 MB/s, avg 259.5 MB/s compressed 0.9`; the time stamp, the average and the
/// compression may be missing.
fn progress(text: &str) -> Option<Event> {
    let (head, rates) = text.strip_prefix("bbcp: ")?.split_once(" done; ")?;
    let done = match head.len().checked_sub(STAMP_CHARS) {
        Some(_) if is_stamp(head.get(..STAMP_CHARS)?) => head.get(STAMP_CHARS..)?,
        _ => head,
    };
    let percent = match done.trim_start() {
        "not" => None,
        done => Some(done.strip_suffix('%')?.parse().ok()?),
    };
    let rates = without_compression(rates)?;
    let (rate, average) = match rates.split_once(", avg ") {
        Some((rate, average)) => (self::rate(rate)?, self::rate(average)?),
        None => (self::rate(rates)?, None),
    };
    Some(Event::Progress {
        percent,
        rate,
        average,
    })
}

/// Length of `261124 04:11:43 `.
const STAMP_CHARS: usize = 16;

fn is_stamp(text: &str) -> bool {
    let like = |(found, wanted): (u8, u8)| match wanted {
        b'0' => found.is_ascii_digit(),
        exact => found == exact,
    };
    text.bytes().zip(*b"000000 00:00:00 ").all(like)
}

/// `bbcp: Creating /d/dst/x`
fn parse_creating(text: &str) -> Option<Event> {
    let path = text.strip_prefix("bbcp: Creating ")?;
    (!path.is_empty()).then_some(Event::Creating)
}

/// `bbcp: Appending to /d/dst/k at offset 5750784`
fn parse_appending(text: &str) -> Option<Event> {
    // Searched from the right: the path may contain anything.
    let (path, offset) = text
        .strip_prefix("bbcp: Appending to ")?
        .rsplit_once(" at offset ")?;
    (!path.is_empty()).then_some(())?;
    Some(Event::Appending {
        offset: offset.parse().ok()?,
    })
}

/// `File /d/tm/out created; 2400000000 bytes at 259.4 MB/s`
fn created(text: &str) -> Option<Event> {
    // Searched from the right: the path may contain anything.
    let (path, rest) = text.strip_prefix("File ")?.rsplit_once(" created; ")?;
    let (bytes, rate) = without_compression(rest)?.split_once(" bytes at ")?;
    (!path.is_empty()).then_some(())?;
    Some(Event::Created {
        bytes: bytes.parse().ok()?,
        rate: self::rate(rate)?,
    })
}

/// `1 file copied at effectively 225.1 MB/s`
fn total(text: &str) -> Option<Event> {
    let (files, rest) = text.split_once(" file")?;
    let rest = rest.strip_prefix('s').unwrap_or(rest);
    Some(Event::Total {
        files: files.parse().ok()?,
        rate: rate(rest.strip_prefix(" copied at effectively ")?)?,
    })
}

/// `Checksum: c32c 9ef60ae6 host:/d/dst/x`
fn checksum(text: &str) -> Option<Event> {
    let mut words = text.strip_prefix("Checksum: ")?.splitn(3, ' ');
    let (algorithm, hex, place) = (words.next()?, words.next()?, words.next()?);
    let well_formed = !algorithm.is_empty()
        && algorithm.bytes().all(|b| b.is_ascii_alphanumeric())
        && !hex.is_empty()
        && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        && place.contains(':');
    well_formed.then(|| Event::Checksum {
        algorithm: algorithm.into(),
        hex: hex.into(),
    })
}

/// Removes ` compressed 0.9` from the end. Returns `None` if other text follows the word.
fn without_compression(text: &str) -> Option<&str> {
    match text.split_once(" compressed ") {
        None => Some(text),
        Some((text, factor)) => factor.parse::<f64>().is_ok().then_some(text),
    }
}

/// Parses `259.5 MB/s` to bytes per second. The outer `None` means that the text is not a rate, the inner one that the
/// rate is not a number (`nan`, `inf`).
fn rate(text: &str) -> Option<Option<f64>> {
    let (value, unit) = text.split_once(' ')?;
    // The units are steps of 1024, although written like powers of 1000; the unit after T is E.
    let exponent = match unit.strip_suffix("B/s")? {
        "" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        "P" | "E" => 5,
        "Z" => 6,
        "Y" => 7,
        _ => return None,
    };
    if matches!(value.trim_start_matches('-'), "nan" | "inf") {
        return Some(None);
    }
    let plain = value.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let value: f64 = plain.then(|| value.parse().ok()).flatten()?;
    Some(Some(value * 1024_f64.powi(exponent)).filter(|rate| rate.is_finite()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    fn progress(percent: Option<u32>, rate: Option<f64>, average: Option<f64>) -> Event {
        Event::Progress {
            percent,
            rate,
            average,
        }
    }

    #[rstest]
    #[case("bbcp: 261124 03:59:47  35% done; 4.0 MB/s", progress(Some(35), Some(4.0 * MIB), None))]
    #[case(
        "bbcp: 261124 04:11:43  19% done; 259.5 MB/s, avg 259.5 MB/s",
        progress(Some(19), Some(259.5 * MIB), Some(259.5 * MIB))
    )]
    #[case(
        "bbcp: 261124 03:59:52  17% done; -nan B/s, avg 8.2 MB/s",
        progress(Some(17), None, Some(8.2 * MIB))
    )]
    #[case("bbcp: 261124 04:00:00  61% done; inf B/s, avg 8.1 MB/s", progress(Some(61), None, Some(8.1 * MIB)))]
    #[case(
        "bbcp: 261124 03:59:57  79% done; 8.0 MB/s, avg 7.8 MB/s compressed 0.9",
        progress(Some(79), Some(8.0 * MIB), Some(7.8 * MIB))
    )]
    #[case(
        "bbcp: 261124 03:59:57 100% done; 0.0 B/s",
        progress(Some(100), Some(0.0), None)
    )]
    #[case("bbcp:  7% done; 1.0 KB/s", progress(Some(7), Some(1024.0), None))]
    #[case("bbcp: 7% done; 1.0 EB/s", progress(Some(7), Some(1024_f64.powi(5)), None))]
    #[case(
        "bbcp: 261124 03:59:57 not done; 1.0 B/s",
        progress(None, Some(1.0), None)
    )]
    #[case("bbcp: 1% done; 1.0 KB/s\r\n", progress(Some(1), Some(1024.0), None))]
    #[case("bbcp: Creating /d/dst/x", Event::Creating)]
    #[case(
        "File /d/tm/out created; 2400000000 bytes at 259.4 MB/s",
        Event::Created { bytes: 2_400_000_000, rate: Some(259.4 * MIB) }
    )]
    #[case(
        "File /d/a created; 1 bytes at 1.0 B/s created; 7 bytes at inf B/s compressed 1.0",
        Event::Created { bytes: 7, rate: None }
    )]
    #[case("File /d/dst/empty created; 0 bytes at 0.0 B/s", Event::Created { bytes: 0, rate: Some(0.0) })]
    #[case("1 file copied at effectively 225.1 MB/s", Event::Total { files: 1, rate: Some(225.1 * MIB) })]
    #[case("2 files copied at effectively 18.1 B/s", Event::Total { files: 2, rate: Some(18.1) })]
    #[case(
        "Checksum: md5 da4f157b8d4fcddbce7b9699e8ac3f6a localhost:/d/dst/x",
        Event::Checksum { algorithm: "md5".into(), hex: "da4f157b8d4fcddbce7b9699e8ac3f6a".into() }
    )]
    fn known_lines_are_parsed(#[case] line: &str, #[case] event: Event) {
        assert_eq!(parse(line.as_bytes()), event);
    }

    #[rstest]
    #[case("")]
    #[case("bbcp: Creating ")]
    #[case("bbcp: 261124 03:59:47  35% done; fast")]
    #[case("bbcp: 261124 03:59:47  x% done; 4.0 MB/s")]
    #[case("bbcp: 261124 03:59:47  35% done; 4.0 XB/s")]
    #[case("bbcp: File /d/dst/a.tar already exists.")]
    #[case("Source localhost using initial send window of 3939840")]
    #[case("12 buffers used with 0 reorders; peaking at 0.")]
    #[case("Checksum: md5 none of:this")]
    fn other_lines_are_kept_as_text(#[case] line: &str) {
        assert_eq!(parse(line.as_bytes()), Event::Other(line.into()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            parse(&bytes);
        }

        #[test]
        fn inputs_near_the_grammar_are_read_without_panic(
            line in "(bbcp: )?([0-9é ]{0,18})([0-9]{0,12}%|not)? ?(done; )?(-?nan|inf|[0-9.]{0,6}) ?[KMGTEZYX]?B?/?s?(, avg [0-9.]{0,4} MB/s)?( compressed [0-9.]{0,4})?"
        ) {
            parse(line.as_bytes());
        }

        #[test]
        fn rates_are_numbers(value in "[0-9.]{1,400}", unit in "[KMGTEZY]?") {
            if let Event::Progress { rate: Some(rate), .. } =
                parse(format!("bbcp: 1% done; {value} {unit}B/s").as_bytes())
            {
                prop_assert!(rate.is_finite() && rate >= 0.0);
            }
        }
    }
}
