//! A reader of AMQP's types that corrects the bytes that it reads.

use std::ops::Range;

use crate::broker::consumer::Damage;
use crate::clock;
use celery_protocol::message as wire;

/// Maximum depth of nested header values, so that the library's recursion fits into any stack.
const MAX_DEPTH: usize = 64;

/// Reason why properties cannot be read.
pub(super) struct Unreadable(pub(super) &'static str);

pub(super) const CUT: Unreadable = Unreadable("they end too early");

/// Reader of AMQP's types.
pub(super) struct Walk<'a> {
    data: &'a mut [u8],
    at: usize,
    pub(super) damage: Damage,
    headers: Seen,
}

/// Headers that identify a task with an eta in the future, as far as they were read.
#[derive(Debug, Default)]
struct Seen {
    task: bool,
    id: bool,
    /// Position of the eta in the headers.
    eta: Option<Range<usize>>,
    /// True if the broker counts the deliveries of the message: it must not be requeued too often.
    deliveries: bool,
}

impl<'a> Walk<'a> {
    pub(super) fn new(data: &'a mut [u8]) -> Self {
        Self {
            data,
            at: 0,
            damage: Damage::default(),
            headers: Seen::default(),
        }
    }

    /// Returns true if the headers belong to a task whose eta has not been reached.
    pub(super) fn awaits_eta(&self) -> bool {
        let Seen {
            task: true,
            id: true,
            eta: Some(eta),
            deliveries: false,
        } = &self.headers
        else {
            return false;
        };
        let text = self.data.get(eta.clone());
        let eta = text
            .and_then(|text| str::from_utf8(text).ok())
            .and_then(wire::eta);
        eta.is_some_and(|eta| eta > clock::now())
    }

    pub(super) fn skip(&mut self, count: usize) -> Option<()> {
        let end = self.at.checked_add(count)?;
        (end <= self.data.len()).then(|| self.at = end)
    }

    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let chunk = *self.data.get(self.at..)?.first_chunk()?;
        self.at += N;
        Some(chunk)
    }

    fn octet(&mut self) -> Option<u8> {
        self.chunk().map(u8::from_be_bytes)
    }

    pub(super) fn short(&mut self) -> Option<u16> {
        self.chunk().map(u16::from_be_bytes)
    }

    pub(super) fn long(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_be_bytes)
    }

    pub(super) fn long_long(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_be_bytes)
    }

    /// Reads a short string.
    pub(super) fn text(&mut self) -> Option<()> {
        let size = self.octet()?;
        let begin = self.at;
        self.skip(size.into())?;
        let text = self.data.get_mut(begin..self.at)?;
        if !text.is_ascii() && str::from_utf8(text).is_err() {
            cover(text);
            self.damage.is_not_utf8 = true;
        }
        Some(())
    }

    /// Reads a length and returns the end of the value.
    fn end(&mut self, limit: usize) -> Option<usize> {
        let size = usize::try_from(self.long()?).ok()?;
        let end = self.at.checked_add(size)?;
        (end <= limit).then_some(end)
    }

    /// Reads the properties of a message, up to the end.
    pub(super) fn properties(&mut self) -> Result<(), Unreadable> {
        const TEXT: Option<usize> = None;
        // From the highest flag to the lowest.
        const FIELDS: [Option<usize>; 11] = [
            Some(1),
            Some(1),
            TEXT,
            TEXT,
            TEXT,
            TEXT,
            Some(8),
            TEXT,
            TEXT,
            TEXT,
            TEXT,
        ];
        let flags = self.short().ok_or(CUT)?;
        let has = |bit: usize| flags & (1 << (15 - bit)) != 0;
        for bit in [0, 1] {
            if has(bit) {
                self.text().ok_or(CUT)?;
            }
        }
        if has(2) {
            let end = self.end(self.data.len()).ok_or(CUT)?;
            self.table(end, 1)?;
        }
        for (field, bit) in FIELDS.into_iter().zip(3..) {
            if has(bit) {
                let read = match field {
                    TEXT => self.text(),
                    Some(size) => self.skip(size),
                };
                read.ok_or(CUT)?;
            }
        }
        match self.at == self.data.len() {
            true => Ok(()),
            false => Err(Unreadable("they are longer than their flags state")),
        }
    }

    fn table(&mut self, end: usize, depth: usize) -> Result<(), Unreadable> {
        while self.at < end {
            let name = self.at + 1;
            self.text().ok_or(CUT)?;
            let name = name..self.at;
            self.value(end, depth)?;
            if depth == 1 {
                self.evaluate(name);
            }
        }
        self.ends_at(end)
    }

    /// Evaluates a header that was read up to this position.
    fn evaluate(&mut self, name: Range<usize>) {
        let Some((name, value)) = self
            .data
            .get(name.clone())
            .zip(self.data.get(name.end..self.at))
        else {
            return;
        };
        // A long text, after its type tag and its length.
        let text = value.first() == Some(&b'S') && value.len() > 5;
        match name {
            b"task" => self.headers.task = text,
            b"id" => self.headers.id = text,
            b"eta" => self.headers.eta = text.then_some(self.at - value.len() + 5..self.at),
            b"x-delivery-count" => self.headers.deliveries = true,
            _ => {}
        }
    }

    fn array(&mut self, end: usize, depth: usize) -> Result<(), Unreadable> {
        while self.at < end {
            self.value(end, depth)?;
        }
        self.ends_at(end)
    }

    fn ends_at(&self, end: usize) -> Result<(), Unreadable> {
        match self.at == end {
            true => Ok(()),
            false => Err(Unreadable("a value is longer than its table")),
        }
    }

    fn value(&mut self, limit: usize, depth: usize) -> Result<(), Unreadable> {
        let tag_at = self.at;
        let tag = self.octet().ok_or(CUT)?;
        let size = match tag {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' | b'A' | b'F' => {
                let end = self.end(limit).ok_or(CUT)?;
                match tag {
                    b'A' | b'F' if depth == MAX_DEPTH => {
                        // Bytes have the same encoding: a length, and this number of bytes.
                        self.data[tag_at] = b'x';
                        self.damage.is_too_deep = true;
                    }
                    b'A' => return self.array(end, depth + 1),
                    b'F' => return self.table(end, depth + 1),
                    _ => {}
                }
                end - self.at
            }
            _ => return Err(Unreadable("a header is of an unknown type")),
        };
        self.skip(size).ok_or(CUT)
    }
}

/// Replaces each byte that is not part of a character by a question mark.
fn cover(text: &mut [u8]) {
    let mut covered = Vec::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        covered.extend_from_slice(chunk.valid().as_bytes());
        covered.resize(covered.len() + chunk.invalid().len(), b'?');
    }
    text.copy_from_slice(&covered);
}
