//! MessagePack as Python's `msgpack` reads and writes it for kombu (`unpackb(body, raw=False)`, `packb(value)`).
//!
//! Values that JSON cannot represent are put into kombu's envelopes: bytes and timestamps. Another extension becomes a
//! pair of its code and its data, as in Python. A length is only trusted up to the end of the body, so that no memory
//! is allocated for missing data.

use chrono::DateTime;
use rmp::Marker;
use rmp::encode::{self, ValueWriteError};
use serde_json::{Map, Value};

use super::envelope;
use super::json::{MAX_DEPTH, float};

/// Code of the extension for a timestamp.
const TIMESTAMP: i8 = -1;

/// Reason why bytes are not MessagePack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct MsgpackError(&'static str);

const TOO_SHORT: MsgpackError = MsgpackError("ends too early");

/// Parses one value.
pub(super) fn read(body: &[u8]) -> Result<Value, MsgpackError> {
    let mut reader = MsgpackReader(body);
    let value = reader.value(0)?;
    match reader.0 {
        [] => Ok(value),
        _ => Err(MsgpackError("more than one value")),
    }
}

/// Writes one value. The bytes in an envelope are written as such, and the content of another envelope as text; so is an
/// integer of more than 64 bits.
pub(super) fn write(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    // Memory takes every byte.
    let _ = put(&mut out, value);
    out
}

fn put(out: &mut Vec<u8>, value: &Value) -> Result<(), ValueWriteError> {
    match value {
        Value::Array(values) => {
            encode::write_array_len(out, size(values.len()))?;
            values.iter().try_for_each(|value| put(out, value))
        }
        Value::Object(map) => match envelope::open(map) {
            None => put_map(out, map),
            Some((kind, Value::Object(inner))) if kind == envelope::TABLE => put_map(out, inner),
            Some((kind, held)) => put_held(out, kind, held, value),
        },
        single => put_single(out, single),
    }
}

fn put_map(out: &mut Vec<u8>, map: &Map<String, Value>) -> Result<(), ValueWriteError> {
    encode::write_map_len(out, size(map.len()))?;
    map.iter().try_for_each(|(key, value)| {
        encode::write_str(out, key)?;
        put(out, value)
    })
}

/// Writes what an envelope holds.
fn put_held(
    out: &mut Vec<u8>,
    kind: &Value,
    held: &Value,
    whole: &Value,
) -> Result<(), ValueWriteError> {
    let text = held.as_str().unwrap_or_default();
    let bytes = match kind.as_str() {
        Some("bytes") => Some(text.as_bytes().to_vec()),
        Some("base64") => envelope::from_base64(text),
        _ => None,
    };
    match bytes {
        Some(bytes) => encode::write_bin(out, &bytes),
        None => put_single(out, &envelope::plain(whole.clone())),
    }
}

/// Writes a value that has no parts.
fn put_single(out: &mut Vec<u8>, value: &Value) -> Result<(), ValueWriteError> {
    match value {
        Value::Null => Ok(encode::write_nil(out).map_err(ValueWriteError::InvalidMarkerWrite)?),
        Value::Bool(is) => {
            Ok(encode::write_bool(out, *is).map_err(ValueWriteError::InvalidMarkerWrite)?)
        }
        Value::String(text) => encode::write_str(out, text),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), ..) => encode::write_sint(out, n).map(drop),
            (None, Some(n), _) => encode::write_uint(out, n).map(drop),
            (None, None, Some(x)) if number.is_f64() => encode::write_f64(out, x),
            _ => encode::write_str(out, &number.to_string()),
        },
        Value::Array(_) | Value::Object(_) => Ok(()),
    }
}

/// A length; no value in memory has more parts.
fn size(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

struct MsgpackReader<'a>(&'a [u8]);

impl<'a> MsgpackReader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], MsgpackError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(TOO_SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MsgpackError> {
        self.take(N)?.try_into().map_err(|_| TOO_SHORT)
    }

    /// Reads a length of 1, 2 or 4 bytes.
    fn length<const N: usize>(&mut self) -> Result<usize, MsgpackError> {
        let bytes = self.array::<N>()?;
        Ok(bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
    }

    fn value(&mut self, depth: usize) -> Result<Value, MsgpackError> {
        let [first] = self.array()?;
        match Marker::from_u8(first) {
            Marker::FixArray(length) => self.list(length.into(), depth),
            Marker::Array16 => self.length::<2>().and_then(|n| self.list(n, depth)),
            Marker::Array32 => self.length::<4>().and_then(|n| self.list(n, depth)),
            Marker::FixMap(length) => self.map(length.into(), depth),
            Marker::Map16 => self.length::<2>().and_then(|n| self.map(n, depth)),
            Marker::Map32 => self.length::<4>().and_then(|n| self.map(n, depth)),
            // A separate function keeps the stack frames of the recursion small.
            single => self.single(single),
        }
    }

    fn single(&mut self, marker: Marker) -> Result<Value, MsgpackError> {
        Ok(match marker {
            Marker::Null => Value::Null,
            Marker::True => true.into(),
            Marker::False => false.into(),
            Marker::FixPos(n) => n.into(),
            Marker::FixNeg(n) => n.into(),
            Marker::U8 => u8::from_be_bytes(self.array()?).into(),
            Marker::U16 => u16::from_be_bytes(self.array()?).into(),
            Marker::U32 => u32::from_be_bytes(self.array()?).into(),
            Marker::U64 => u64::from_be_bytes(self.array()?).into(),
            Marker::I8 => i8::from_be_bytes(self.array()?).into(),
            Marker::I16 => i16::from_be_bytes(self.array()?).into(),
            Marker::I32 => i32::from_be_bytes(self.array()?).into(),
            Marker::I64 => i64::from_be_bytes(self.array()?).into(),
            Marker::F32 => float(f32::from_be_bytes(self.array()?).into()),
            Marker::F64 => float(f64::from_be_bytes(self.array()?)),
            Marker::FixStr(length) => self.text(length.into())?.into(),
            Marker::Str8 => self.length::<1>().and_then(|n| self.text(n))?.into(),
            Marker::Str16 => self.length::<2>().and_then(|n| self.text(n))?.into(),
            Marker::Str32 => self.length::<4>().and_then(|n| self.text(n))?.into(),
            Marker::Bin8 => envelope::bytes(self.length::<1>().and_then(|n| self.take(n))?),
            Marker::Bin16 => envelope::bytes(self.length::<2>().and_then(|n| self.take(n))?),
            Marker::Bin32 => envelope::bytes(self.length::<4>().and_then(|n| self.take(n))?),
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => self.length::<1>().and_then(|n| self.extension(n))?,
            Marker::Ext16 => self.length::<2>().and_then(|n| self.extension(n))?,
            Marker::Ext32 => self.length::<4>().and_then(|n| self.extension(n))?,
            _ => return Err(MsgpackError("reserved byte")),
        })
    }

    fn text(&mut self, length: usize) -> Result<&'a str, MsgpackError> {
        std::str::from_utf8(self.take(length)?).map_err(|_| MsgpackError("text is not UTF-8"))
    }

    fn list(&mut self, length: usize, depth: usize) -> Result<Value, MsgpackError> {
        let depth = next_depth(depth)?;
        (0..length).map(|_| self.value(depth)).collect()
    }

    fn map(&mut self, length: usize, depth: usize) -> Result<Value, MsgpackError> {
        let depth = next_depth(depth)?;
        let mut map = Map::new();
        for _ in 0..length {
            let key = match self.value(depth)? {
                Value::String(key) => key,
                // Bytes are valid keys, too.
                Value::Object(key) => match envelope::open(&key) {
                    Some((kind, Value::String(text))) if kind == "bytes" => text.clone(),
                    _ => return Err(MsgpackError("a key is not text")),
                },
                _ => return Err(MsgpackError("a key is not text")),
            };
            map.insert(key, self.value(depth)?);
        }
        Ok(envelope::table(map))
    }

    fn extension(&mut self, length: usize) -> Result<Value, MsgpackError> {
        let code = i8::from_be_bytes(self.array()?);
        let data = self.take(length)?;
        if code < 0 && code != TIMESTAMP {
            return Err(MsgpackError("a reserved extension"));
        }
        if code != TIMESTAMP {
            return Ok(Value::Array(vec![code.into(), envelope::bytes(data)]));
        }
        let (seconds, nanoseconds) = timestamp(data).ok_or(MsgpackError("no timestamp"))?;
        // A time outside of the calendar stays a number of seconds.
        let time = DateTime::from_timestamp(seconds, nanoseconds);
        Ok(match time.filter(super::time::is_in_calendar) {
            Some(time) => envelope::utc(time),
            None => seconds.into(),
        })
    }
}

/// Decodes seconds since 1970 and nanoseconds.
fn timestamp(data: &[u8]) -> Option<(i64, u32)> {
    let (seconds, nanoseconds) = if let Ok(seconds) = data.try_into() {
        (u32::from_be_bytes(seconds).into(), 0)
    } else if let Ok(both) = data.try_into() {
        let both = u64::from_be_bytes(both);
        let seconds = i64::try_from(both & 0x3_FFFF_FFFF).ok()?;
        (seconds, u32::try_from(both >> 34).ok()?)
    } else {
        let (nanoseconds, seconds) = data.split_first_chunk()?;
        let seconds = i64::from_be_bytes(seconds.try_into().ok()?);
        (seconds, u32::from_be_bytes(*nanoseconds))
    };
    (nanoseconds < 1_000_000_000).then_some((seconds, nanoseconds))
}

fn next_depth(depth: usize) -> Result<usize, MsgpackError> {
    match depth < MAX_DEPTH {
        true => Ok(depth + 1),
        false => Err(MsgpackError("nested too deep")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes written by Python's msgpack 1.2, and the same value written by kombu's JSON encoder.
    const VALUES: &[(&str, &str)] = &[
        ("c0", r#"null"#),
        ("c3", r#"true"#),
        ("00", r#"0"#),
        ("7f", r#"127"#),
        ("cc80", r#"128"#),
        ("ccff", r#"255"#),
        ("cd0100", r#"256"#),
        ("ce00010000", r#"65536"#),
        ("cf0000000100000000", r#"4294967296"#),
        ("cf8000000000000000", r#"9223372036854775808"#),
        ("cfffffffffffffffff", r#"18446744073709551615"#),
        ("ff", r#"-1"#),
        ("e0", r#"-32"#),
        ("d0df", r#"-33"#),
        ("d1ff7f", r#"-129"#),
        ("d2ffff7fff", r#"-32769"#),
        ("d3ffffffff7fffffff", r#"-2147483649"#),
        ("d38000000000000000", r#"-9223372036854775808"#),
        ("cb3ff8000000000000", r#"1.5"#),
        ("cb7ff8000000000000", r#""NaN""#),
        ("a161", r#""a""#),
        (
            "d928c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9c3a9",
            r#""\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9""#,
        ),
        ("c403616263", r#"{"__type__": "bytes", "__value__": "abc"}"#),
        ("c402ff00", r#"{"__type__": "base64", "__value__": "/wA="}"#),
        ("90", r#"[]"#),
        ("920192029103", r#"[1, [2, [3]]]"#),
        (
            "dc0014000102030405060708090a0b0c0d0e0f10111213",
            r#"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]"#,
        ),
        ("80", r#"{}"#),
        ("82a16101a16291c0", r#"{"a": 1, "b": [null]}"#),
        (
            "de0014a13000a13101a13202a13303a13404a13505a13606a13707a13808a13909a231300aa231310ba231320ca231330da231340ea231350fa2313610a2313711a2313812a2313913",
            r#"{"0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7, "8": 8, "9": 9, "10": 10, "11": 11, "12": 12, "13": 13, "14": 14, "15": 15, "16": 16, "17": 17, "18": 18, "19": 19}"#,
        ),
        (
            "9391cd12678084a963616c6c6261636b73c0a86572726261636b73c0a5636861696ec0a563686f7264c0",
            r#"[[4711], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]"#,
        ),
        (
            "d7ff730f04606b050f03",
            r#"{"__type__": "datetime", "__value__": "2026-11-24T04:13:55.482591+00:00"}"#,
        ),
        (
            "d6ff00000001",
            r#"{"__type__": "datetime", "__value__": "1970-01-01T00:00:01+00:00"}"#,
        ),
        (
            "c70cff00000007fffffffffffffffb",
            r#"{"__type__": "datetime", "__value__": "1969-12-31T23:59:55+00:00"}"#,
        ),
        (
            "d5056162",
            r#"[5, {"__type__": "bytes", "__value__": "ab"}]"#,
        ),
        (
            "c750056162636461626364616263646162636461626364616263646162636461626364616263646162636461626364616263646162636461626364616263646162636461626364616263646162636461626364",
            r#"[5, {"__type__": "bytes", "__value__": "abcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcdabcd"}]"#,
        ),
        ("81c4016b01", r#"{"k": 1}"#),
    ];

    const BROKEN: &[&[u8]] = &[
        b"",
        b"\x91",
        b"\xc1",
        b"\xa2\xff\xfe",
        b"\x81\x01\x02",
        b"\x81\xc0\x01",
        b"\x81\x90\x01",
        b"\x01\x02",
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff\x00",
        b"\xc6\xff\xff\xff\xff\x00",
        b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xc7\x03\xff\x00\x00\x00",
        b"\xd6\xa4task",
    ];

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn msgpack_is_read_as_python_writes_it() {
        for (hex, json) in VALUES {
            let expected: Value = serde_json::from_str(json).unwrap();
            assert_eq!(read(&bytes(hex)), Ok(expected), "{hex}");
        }
    }

    /// The bytes are those of Python's msgpack, except for values that JSON has no form for.
    #[test]
    fn msgpack_is_written_as_python_writes_it() {
        for (hex, json) in VALUES {
            let value: Value = serde_json::from_str(json).unwrap();
            let has_own_form = hex.starts_with(['d', 'c']) && json.contains("datetime")
                || ["cb7ff8000000000000", "81c4016b01", "d5056162"].contains(hex)
                || hex.starts_with("c750");
            assert_eq!(write(&value) == bytes(hex), !has_own_form, "{hex}");
        }
        let large: Value = serde_json::from_str("[18446744073709551616, 1e400]").unwrap();
        let read = read(&write(&large)).unwrap();
        assert_eq!(read[0], "18446744073709551616");
        let table = envelope::table(Map::from_iter([
            ("__type__".to_owned(), "date".into()),
            ("__value__".to_owned(), 7.into()),
        ]));
        assert_eq!(super::read(&write(&table)), Ok(table));
    }

    #[test]
    fn invalid_msgpack_is_refused_as_in_python() {
        for body in BROKEN {
            assert!(read(body).is_err(), "{body:?}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth| [vec![0x91; depth], vec![0xc0]].concat();
        assert!(read(&nested(MAX_DEPTH)).is_ok());
        assert_eq!(
            read(&nested(MAX_DEPTH + 1)),
            Err(MsgpackError("nested too deep"))
        );
        assert!(read(&nested(1_000_000)).is_err());
    }

    proptest! {
        #[test]
        fn any_input_is_read_without_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&body);
        }
    }
}
