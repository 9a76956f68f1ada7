//! Compression of message bodies, by kombu's names.
//!
//! Decompression stops at the limit, independently of the sizes in a body: a few kilobytes can expand to gigabytes.

use std::borrow::Cow;
use std::io::{self, Read, Write as _};

use brotli_decompressor::{BrotliDecompressStream, BrotliResult, BrotliState, StandardAlloc};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use serde_json::Value;

use super::message::{Reason, is_falsy};

/// Maximum memory for the dictionary of LZMA and zstd, in bytes; bodies that need more are rejected. Python's `lzma`
/// uses 8 MiB by default (preset 6), and 64 MiB for preset 9.
const MAX_DICTIONARY: u32 = 64 << 20;

/// A method that can also compress, not only decompress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Zlib (RFC 1950), which kombu calls gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// Zstandard.
    Zstd,
}

impl Method {
    /// The method with this name of kombu.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "application/x-gzip" | "gzip" | "zlib" => Some(Self::Gzip),
            "application/x-bz2" | "bzip2" | "bzip" => Some(Self::Bzip2),
            "application/zstd" | "zstd" | "zstandard" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Kombu's MIME type of the method.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/x-gzip",
            Self::Bzip2 => "application/x-bz2",
            Self::Zstd => "application/zstd",
        }
    }

    /// Compresses bytes; `None` if the encoder cannot write to memory.
    pub(super) fn compress(self, bytes: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Gzip => {
                let level = flate2::Compression::default();
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(bytes).ok()?;
                encoder.finish().ok()
            }
            Self::Bzip2 => {
                let level = bzip2::Compression::default();
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
                encoder.write_all(bytes).ok()?;
                encoder.finish().ok()
            }
            Self::Zstd => {
                use ruzstd::encoding::{CompressionLevel, compress_to_vec};
                Some(compress_to_vec(bytes, CompressionLevel::Fastest))
            }
        }
    }
}

/// Decompresses a body according to the header `compression`, up to `limit` bytes.
///
/// # Errors
/// [`Reason::Compression`] for an unknown method or broken data, [`Reason::Inflated`] at the limit.
pub(super) fn undo<'a>(
    body: &'a [u8],
    method: Option<&Value>,
    limit: usize,
) -> Result<Cow<'a, [u8]>, Reason> {
    let name = match method {
        None => return Ok(body.into()),
        Some(method) if is_falsy(method) => return Ok(body.into()),
        Some(Value::String(name)) => name.as_str(),
        Some(other) => return Err(Reason::Compression(format!("`{other}` is not a method"))),
    };
    let mut out = Output {
        bytes: Vec::new(),
        limit,
    };
    let inflated = match name {
        // Kombu's gzip is zlib (RFC 1950).
        "application/x-gzip" | "gzip" | "zlib" => zlib(body, &mut out),
        "application/x-bz2" | "bzip2" | "bzip" => streams(body, &mut out, Rest::Ignored, bzip2),
        // Only bzip2 compresses empty data to empty data.
        _ if body.is_empty() && !name.contains("bz") => Err(invalid("no data")),
        "application/x-lzma" | "lzma" | "xz" => streams(body, &mut out, Rest::Ignored, lzma),
        "application/x-brotli" | "brotli" => brotli(body, &mut out),
        "application/zstd" | "zstd" | "zstandard" => streams(body, &mut out, Rest::Broken, zstd),
        other => Err(invalid(format!("`{other}` is not a known method"))),
    };
    match inflated {
        Ok(()) => Ok(out.bytes.into()),
        Err(_) if out.is_full() => Err(Reason::Inflated { limit }),
        Err(e) => Err(Reason::Compression(format!("{name}: {e}"))),
    }
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// The bytes that were decompressed so far.
struct Output {
    bytes: Vec<u8>,
    limit: usize,
}

impl Output {
    /// Returns true if the data exceed the limit. One further byte is read to distinguish this from data of exactly
    /// that length.
    fn is_full(&self) -> bool {
        self.bytes.len() > self.limit
    }

    /// Reads everything that a decoder returns.
    fn fill(&mut self, decoder: impl Read) -> io::Result<()> {
        let left = self
            .limit
            .saturating_add(1)
            .saturating_sub(self.bytes.len());
        decoder.take(left as u64).read_to_end(&mut self.bytes)?;
        match self.is_full() {
            true => Err(invalid("too much")),
            false => Ok(()),
        }
    }
}

/// Meaning of bytes that follow a complete stream and are not a stream.
#[derive(Clone, Copy, PartialEq)]
enum Rest {
    /// The bytes are ignored, as Python's `bz2` and `lzma` do.
    Ignored,
    /// The body is invalid.
    Broken,
}

type Decoder<'a> = Box<dyn Read + 'a>;

/// Decompresses any number of consecutive streams.
fn streams(
    mut body: &[u8],
    out: &mut Output,
    rest: Rest,
    open: for<'a, 'body> fn(&'a mut &'body [u8]) -> io::Result<Decoder<'a>>,
) -> io::Result<()> {
    let mut is_first = true;
    while !body.is_empty() {
        let before = out.bytes.len();
        let decoded = open(&mut body).and_then(|decoder| out.fill(decoder));
        match decoded {
            Ok(()) => is_first = false,
            Err(e)
                if !is_first
                    && rest == Rest::Ignored
                    && !out.is_full()
                    && e.kind() != io::ErrorKind::UnexpectedEof =>
            {
                out.bytes.truncate(before);
                return Ok(());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn bzip2<'a>(body: &'a mut &[u8]) -> io::Result<Decoder<'a>> {
    Ok(Box::new(bzip2::bufread::BzDecoder::new(body)))
}

/// Decoder for the two container formats of LZMA.
fn lzma<'a>(body: &'a mut &[u8]) -> io::Result<Decoder<'a>> {
    const XZ: &[u8] = b"\xFD7zXZ\0";
    let limit_kib = MAX_DICTIONARY / 1024;
    Ok(match body.starts_with(XZ) {
        true => Box::new(lzma_rust2::XzReader::new_mem_limit(body, false, limit_kib)),
        false => Box::new(lzma_rust2::LzmaReader::new_mem_limit(
            body, limit_kib, None,
        )?),
    })
}

fn zstd<'a>(body: &'a mut &[u8]) -> io::Result<Decoder<'a>> {
    let window = MAX_DICTIONARY.into();
    let decoder = StreamingDecoder::new_with_max_window_size(body, window)
        .map_err(|e| invalid(e.to_string()))?;
    Ok(Box::new(Frame { decoder, read: 0 }))
}

/// A zstd frame; its content must have the length that its header contains.
struct Frame<'a, 'body> {
    decoder: StreamingDecoder<&'a mut &'body [u8], FrameDecoder>,
    read: u64,
}

impl Read for Frame<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        self.read += read as u64;
        // The crate also returns 0 if the header contains no length.
        let said = self.decoder.decoder.content_size();
        if read == 0 && !buffer.is_empty() && said != 0 && said != self.read {
            return Err(invalid("the content does not have the stated length"));
        }
        Ok(read)
    }
}

/// Uses the decoder's low-level interface, since the crate's reader ignores bytes after the data, and allows windows of
/// gigabytes.
fn brotli(body: &[u8], out: &mut Output) -> io::Result<()> {
    let alloc = StandardAlloc::default;
    let mut state = BrotliState::new(alloc(), alloc(), alloc());
    state.large_window = false;
    let (mut left, mut at, mut total) = (body.len(), 0, 0);
    let mut buffer = [0; 8192];
    loop {
        let (mut room, mut written) = (buffer.len(), 0);
        let result = BrotliDecompressStream(
            &mut left,
            &mut at,
            body,
            &mut room,
            &mut written,
            &mut buffer,
            &mut total,
            &mut state,
        );
        out.fill(buffer.get(..written).unwrap_or_default())?;
        match result {
            BrotliResult::NeedsMoreOutput => {}
            BrotliResult::ResultSuccess if left == 0 => return Ok(()),
            BrotliResult::ResultSuccess => return Err(invalid("unexpected bytes after the data")),
            BrotliResult::NeedsMoreInput => {
                return Err(invalid("the compressed data ends too early"));
            }
            BrotliResult::ResultFailure => return Err(invalid("the compressed data is damaged")),
        }
    }
}

/// Uses the decoder's low-level interface, since the crate's reader accepts a truncated stream.
fn zlib(mut body: &[u8], out: &mut Output) -> io::Result<()> {
    let mut decoder = flate2::Decompress::new(true);
    let mut buffer = [0; 8192];
    loop {
        let (read, written) = (decoder.total_in(), decoder.total_out());
        let status = decoder.decompress(body, &mut buffer, flate2::FlushDecompress::None)?;
        let consumed = usize::try_from(decoder.total_in() - read).unwrap_or(usize::MAX);
        let produced = usize::try_from(decoder.total_out() - written).unwrap_or(usize::MAX);
        body = body.get(consumed..).unwrap_or_default();
        out.fill(buffer.get(..produced).unwrap_or_default())?;
        match status {
            flate2::Status::StreamEnd => return Ok(()),
            _ if consumed == 0 && produced == 0 => {
                return Err(invalid("the compressed data ends too early"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const BODY: &[u8] =
        br#"[[4711], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#;

    // BODY, compressed by Python 3.11's zlib, bz2 and lzma, and by its brotli and backports.zstd.
    const ZLIB: &str = "789c8b8e363137348cd551a8ae0562a5e4c49c9ca4c4e4ec62252b85bcd29c1c1d05a5d4a2223491e48cc4cc3c646e7e510a945b1b0b0012e91a0e";
    const BZ2: &str = "425a6839314159265359cca3fe2500000f9b8050042490000a3e6d9a0a200054350068001a025269a9ea01ea0f50c8a8e143d9a459d3c4bc6fb44402e0cfc93ddb5cd24aab15a0c1742d2a3b0045eef8180e1b87c5dc914e14243328ff8940";
    const XZ: &str = "fd377a585a000004e6d6b4460200210116000000742fe5a3e0005000375d002de0cc6e33f0e9450f1904db0a7bc30bf03fce5f991d4aed709323f6ee5b1a6eebe459dd6eb9de4db39afe1824c366a2233916671bd400000070ada52af3cece0400015351deda7cad1fb6f37d010000000004595a";
    const LZMA: &str = "5d00008000ffffffffffffffff002de0cc6e33f0e9450f1904db0a7bc30bf03fce5f991d4aed709323f6ee5b1a6eebe459dd6eb9de4db39afe1824c366a22339169b4d6edfffe5642800";
    const BROTLI: &str = "1b5000e01d07764ce6fd2353f49adbd8fa6e6710b46eb7766033aa98ae00810d38a2c068b075a349471836e0209230587e99e6e43d0fa52ce2d22db424ad54302a7f";
    const ZSTD: &str = "28b52ffd2051f5010014035b5b343731315d2c207b7d2c207b2263616c6c6261636b73223a206e756c6c2c2022657272636861696e63686f72647d5d030032b3266ad3ad6e3e01";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    fn undone(method: &str, body: &[u8], limit: usize) -> Result<Vec<u8>, Reason> {
        undo(body, Some(&method.into()), limit).map(Cow::into_owned)
    }

    #[rstest]
    #[case(&["application/x-gzip", "gzip", "zlib"], ZLIB)]
    #[case(&["application/x-bz2", "bzip2", "bzip"], BZ2)]
    #[case(&["application/x-lzma", "lzma", "xz"], XZ)]
    #[case(&["application/x-lzma"], LZMA)]
    #[case(&["application/x-brotli", "brotli"], BROTLI)]
    #[case(&["application/zstd", "zstd", "zstandard"], ZSTD)]
    fn every_method_by_every_name(#[case] names: &[&str], #[case] hex: &str) {
        let body = bytes(hex);
        for name in names {
            assert_eq!(undone(name, &body, BODY.len()).unwrap(), BODY, "{name}");
            assert_eq!(
                undone(name, &body, BODY.len() - 1),
                Err(Reason::Inflated {
                    limit: BODY.len() - 1
                }),
                "{name}"
            );
            for cut in usize::from(name.contains("bz"))..body.len() {
                let broken = undone(name, &body[..cut], 1000);
                assert!(
                    matches!(broken, Err(Reason::Compression(_))),
                    "{name} cut at {cut}: {broken:?}"
                );
            }
            assert!(undone(name, b"no such thing", 1000).is_err(), "{name}");
        }
    }

    #[rstest]
    #[case("gzip", ZLIB, true)]
    #[case("bzip2", BZ2, true)]
    #[case("xz", XZ, true)]
    #[case("zstd", ZSTD, false)]
    #[case("brotli", BROTLI, false)]
    fn bytes_after_a_stream_are_an_error(
        #[case] name: &str,
        #[case] hex: &str,
        #[case] is_ignored: bool,
    ) {
        let body = [bytes(hex), b"something else that is long enough".to_vec()].concat();
        assert_eq!(undone(name, &body, 1000).is_ok(), is_ignored);
    }

    #[test]
    fn a_zstd_frame_of_another_length() {
        let body = bytes("28b52ffd20b71100003231");
        assert!(matches!(
            undone("zstd", &body, 1000),
            Err(Reason::Compression(_))
        ));
    }

    #[rstest]
    #[case("bzip2", BZ2)]
    #[case("xz", XZ)]
    #[case("zstd", ZSTD)]
    fn concatenated_streams_are_read(#[case] name: &str, #[case] hex: &str) {
        let twice = bytes(hex).repeat(2);
        assert_eq!(undone(name, &twice, 1000).unwrap(), BODY.repeat(2));
    }

    #[rstest]
    #[case(Value::Null)]
    #[case("".into())]
    #[case(0.into())]
    fn empty_method_means_uncompressed(#[case] method: Value) {
        assert_eq!(undo(BODY, Some(&method), 0).unwrap(), BODY);
        assert_eq!(undo(BODY, None, 0).unwrap(), BODY);
    }

    #[rstest]
    #[case("lz4".into())]
    #[case(7.into())]
    fn unknown_methods(#[case] method: Value) {
        assert!(matches!(
            undo(BODY, Some(&method), 1000),
            Err(Reason::Compression(_))
        ));
    }

    proptest! {
        #[test]
        fn compressed_data_is_decompressed_unchanged(
            method in proptest::sample::select(&[Method::Gzip, Method::Bzip2, Method::Zstd][..]),
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        ) {
            let compressed = method.compress(&bytes).unwrap();
            prop_assert_eq!(undone(method.content_type(), &compressed, 3000).unwrap(), bytes);
        }

        #[test]
        fn any_input_is_read_without_panic(
            name in proptest::sample::select(&["gzip", "bzip2", "xz", "brotli", "zstd"][..]),
            start in proptest::sample::select(&["", ZLIB, BZ2, XZ, LZMA, BROTLI, ZSTD][..]),
            at in any::<proptest::sample::Index>(),
            noise in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut body = bytes(start);
            let at = at.index(body.len() + 1);
            body.splice(at..(at + noise.len() / 2).min(body.len()), noise);
            if let Ok(out) = undone(name, &body, 10_000) {
                prop_assert!(out.len() <= 10_000);
            }
        }
    }
}
