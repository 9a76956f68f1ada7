//! MessagePack as Python's `msgpack` reads it for kombu (`unpackb(body, raw=False)`).
//!
//! What JSON has no form for is put into kombu's envelopes: bytes and timestamps. Another extension
//! becomes the pair of its code and its data that it is in Python. Lengths are believed only as far
//! as the body goes, so that nothing is allocated for what is not there.

use chrono::DateTime;
use rmp::Marker;
use serde_json::{Map, Value};

use super::json::{MAX_DEPTH, float};
use super::{envelope, isoformat};

/// Code of the extension that holds a time.
const TIMESTAMP: i8 = -1;

/// Why bytes are not MessagePack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct MsgpackError(&'static str);

const TOO_SHORT: MsgpackError = MsgpackError("ends too early");

/// Reads one value.
pub(super) fn read(body: &[u8]) -> Result<Value, MsgpackError> {
    let mut reader = Reader(body);
    let value = reader.value(0)?;
    match reader.0 {
        [] => Ok(value),
        _ => Err(MsgpackError("more than one value")),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], MsgpackError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(TOO_SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MsgpackError> {
        self.take(N)?.try_into().map_err(|_| TOO_SHORT)
    }

    /// A length of 1, 2 or 4 bytes.
    fn length<const N: usize>(&mut self) -> Result<usize, MsgpackError> {
        let bytes = self.array::<N>()?;
        Ok(bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
    }

    fn value(&mut self, depth: usize) -> Result<Value, MsgpackError> {
        let [first] = self.array()?;
        Ok(match Marker::from_u8(first) {
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
            Marker::FixArray(length) => self.list(length.into(), depth)?,
            Marker::Array16 => self.length::<2>().and_then(|n| self.list(n, depth))?,
            Marker::Array32 => self.length::<4>().and_then(|n| self.list(n, depth))?,
            Marker::FixMap(length) => self.map(length.into(), depth)?,
            Marker::Map16 => self.length::<2>().and_then(|n| self.map(n, depth))?,
            Marker::Map32 => self.length::<4>().and_then(|n| self.map(n, depth))?,
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => self.length::<1>().and_then(|n| self.extension(n))?,
            Marker::Ext16 => self.length::<2>().and_then(|n| self.extension(n))?,
            Marker::Ext32 => self.length::<4>().and_then(|n| self.extension(n))?,
            Marker::Reserved => return Err(MsgpackError("reserved byte")),
        })
    }

    fn text(&mut self, length: usize) -> Result<&'a str, MsgpackError> {
        std::str::from_utf8(self.take(length)?).map_err(|_| MsgpackError("text is no UTF-8"))
    }

    fn list(&mut self, length: usize, depth: usize) -> Result<Value, MsgpackError> {
        let depth = deeper(depth)?;
        (0..length).map(|_| self.value(depth)).collect()
    }

    fn map(&mut self, length: usize, depth: usize) -> Result<Value, MsgpackError> {
        let depth = deeper(depth)?;
        let mut map = Map::new();
        for _ in 0..length {
            let key = match self.value(depth)? {
                Value::String(key) => key,
                // Bytes may be keys, too.
                Value::Object(key) => match envelope::open(&key) {
                    Some((kind, Value::String(text))) if kind == "bytes" => text.clone(),
                    _ => return Err(MsgpackError("a key is no text")),
                },
                _ => return Err(MsgpackError("a key is no text")),
            };
            map.insert(key, self.value(depth)?);
        }
        Ok(map.into())
    }

    fn extension(&mut self, length: usize) -> Result<Value, MsgpackError> {
        let code = i8::from_be_bytes(self.array()?);
        let data = self.take(length)?;
        if code != TIMESTAMP {
            return Ok(Value::Array(vec![code.into(), envelope::bytes(data)]));
        }
        let (seconds, nanoseconds) = timestamp(data).ok_or(MsgpackError("no timestamp"))?;
        // One beyond the calendar is still a number of seconds.
        Ok(match DateTime::from_timestamp(seconds, nanoseconds) {
            Some(time) => envelope::sealed("datetime", isoformat(time)),
            None => seconds.into(),
        })
    }
}

/// Seconds since 1970 and nanoseconds.
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

fn deeper(depth: usize) -> Result<usize, MsgpackError> {
    match depth < MAX_DEPTH {
        true => Ok(depth + 1),
        false => Err(MsgpackError("nested too deep")),
    }
}
