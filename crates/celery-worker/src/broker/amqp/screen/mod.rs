//! Changes deliveries so that the AMQP library can read them.
//!
//! A broker forwards the bytes of a publisher unchanged. The library ends the connection because of bytes that are not
//! UTF-8 in a short string (a header's name, `message_id`, a routing key …), because of headers that are larger than a
//! frame, and because of types that it does not know. It reads nested headers by recursion without a limit. Such a
//! message would be delivered again on the next connection and end that one, too. The screen therefore reads the
//! broker's bytes frame by frame before the library:
//!
//! * bytes of a short string that are not UTF-8 become `?`;
//! * header values that are nested too deeply become bytes, which have the same encoding;
//! * properties that cannot be read are omitted, together with their body;
//! * a body above the limit is omitted before it takes memory, and so is a large body of a task whose eta has not been
//!   reached. A heartbeat replaces each of its frames, so that the library does not take the time of a long body for
//!   silence.
//!
//! Only omitted frames change in size, so all changes are made in place. Changes of a delivery are recorded by its
//! channel and tag.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::connector::LARGE_FRAME;
use crate::broker::consumer::Damage;
use walk::{CUT, Unreadable, Walk};

mod walk;

/// Maximum size of a frame that is buffered until it is complete, for connections without a limit.
const HELD: usize = 4 << 20;

/// Size of a frame's type, channel and length.
const HEAD: usize = 7;
const END: u8 = 206;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;

/// Ids of the methods that the screen evaluates.
const TUNE: (u16, u16) = (10, 30);
const DELIVER: (u16, u16) = (60, 60);

/// A frame without a meaning.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, END];

/// Bytes of a content header without properties: class, weight, size of the body, flags.
const BARE: usize = 14;

/// Changes that were made to the deliveries of one connection, by channel and tag.
#[derive(Debug, Default)]
pub(super) struct Notes(Mutex<HashMap<(u16, u64), Damage>>);

impl Notes {
    /// Removes and returns the changes of a delivery.
    pub(super) fn take(&self, channel: u16, tag: u64) -> Option<Damage> {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.remove(&(channel, tag))
    }

    fn put(&self, (channel, tag): (u16, u64), damage: Damage) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.insert((channel, tag), damage);
    }
}

/// Limits of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionLimits {
    /// Maximum frame size that the library requests; 0 for none.
    pub(super) frame: u32,
    /// True if a frame that exceeds the limit is omitted. If false, a frame of up to [`LARGE_FRAME`] passes, and the
    /// connection is replaced by one with frames of that size.
    pub(super) is_last: bool,
    /// Limits of bodies.
    pub(super) bodies: Bodies,
}

/// Limits of bodies, in bytes; larger ones are omitted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bodies {
    /// Maximum size of a body.
    pub(super) max: u64,
    /// Maximum size of the body of a task whose eta has not been reached.
    pub(super) max_waiting: u64,
}

impl Bodies {
    /// No limits: no body is omitted.
    pub(super) const ALL: Self = Self {
        max: u64::MAX,
        max_waiting: u64::MAX,
    };
}

/// Follows the frames of one connection.
#[derive(Debug)]
pub(super) struct Screen {
    limits: ConnectionLimits,
    notes: Arc<Notes>,
    /// Number of following bytes that pass unchanged.
    passing: u64,
    /// Number of following bytes that are omitted.
    dropping: u64,
    /// The beginning of a frame whose end has not arrived yet.
    partial: Vec<u8>,
    channels: HashMap<u16, Content>,
}

/// The content that arrives on a channel.
#[derive(Debug, Default)]
struct Content {
    /// Tag of the delivery, if it is one.
    tag: Option<u64>,
    /// Number of bytes still to arrive of a body that is omitted.
    left_out: u64,
}

#[derive(Debug, Clone, Copy)]
struct Head {
    kind: u8,
    channel: u16,
    /// Size of the whole frame.
    total: u64,
}

impl Head {
    fn read(data: &[u8]) -> Option<Self> {
        let (kind, rest) = data.split_first()?;
        let (channel, rest) = rest.split_first_chunk()?;
        let (size, _) = rest.split_first_chunk()?;
        Some(Self {
            kind: *kind,
            channel: u16::from_be_bytes(*channel),
            total: u64::from(u32::from_be_bytes(*size)) + HEAD as u64 + 1,
        })
    }
}

impl Screen {
    pub(super) fn new(limits: ConnectionLimits, notes: Arc<Notes>) -> Self {
        Self {
            limits,
            notes,
            passing: 0,
            dropping: 0,
            partial: Vec::new(),
            channels: HashMap::new(),
        }
    }

    /// The beginning of an incomplete frame: the next bytes must be passed to [`Screen::process`] behind it.
    pub(super) fn partial(&mut self) -> &mut Vec<u8> {
        &mut self.partial
    }

    /// Screens received bytes in place. Returns the number of bytes that are ready, from the first one; all others are
    /// omitted or kept for later.
    pub(super) fn process(&mut self, data: &mut [u8]) -> usize {
        let (mut ready, mut at) = (0, 0);
        loop {
            let left = data.len() - at;
            let dropped = take(&mut self.dropping, left);
            at += dropped;
            let passed = take(&mut self.passing, left - dropped);
            keep(data, at, passed, &mut ready);
            at += passed;
            let Some(head) = data.get(at..).and_then(Head::read) else {
                break;
            };
            let rest = data.get_mut(at..).unwrap_or_default();
            match self.frame(head, rest) {
                FrameAction::Incomplete => break,
                FrameAction::Pass => self.passing = head.total,
                FrameAction::Replace(by) => {
                    // The replacement is never longer than the part of the frame that has arrived.
                    if let Some(room) = data.get_mut(ready..ready + by.len()) {
                        room.copy_from_slice(&by);
                        ready += by.len();
                    }
                    self.dropping = head.total;
                }
            }
        }
        self.partial.clear();
        self.partial
            .extend_from_slice(data.get(at..).unwrap_or_default());
        ready
    }

    /// Decides about a frame whose head has arrived.
    fn frame(&mut self, head: Head, data: &mut [u8]) -> FrameAction {
        match head.kind {
            METHOD | HEADER => {}
            BODY => return self.body(head, data),
            _ => return FrameAction::Pass,
        }
        let is_header = head.kind == HEADER;
        if head.total > self.largest_frame() {
            return match is_header {
                true if data.len() <= HEAD + BARE => FrameAction::Incomplete,
                true => self.leave_out(head, data, "they do not fit into a frame"),
                // The library reports this error.
                false => FrameAction::Pass,
            };
        }
        let Some(payload) = usize::try_from(head.total - 1)
            .ok()
            .filter(|end| *end < data.len())
            .and_then(|end| data.get_mut(HEAD..end))
        else {
            return FrameAction::Incomplete;
        };
        match is_header {
            false => {
                self.method(head.channel, payload);
                FrameAction::Pass
            }
            true => match self.header(head.channel, payload) {
                Ok(()) => FrameAction::Pass,
                Err(Unreadable(why)) => self.leave_out(head, data, why),
            },
        }
    }

    /// The largest frame that is screened.
    fn largest_frame(&self) -> u64 {
        match self.limits.frame {
            0 => HELD as u64,
            limit if self.limits.is_last => limit.into(),
            limit => limit.max(LARGE_FRAME).into(),
        }
    }

    fn body(&mut self, head: Head, data: &[u8]) -> FrameAction {
        let Some(content) = self.channels.get_mut(&head.channel) else {
            return FrameAction::Pass;
        };
        if content.left_out == 0 {
            return FrameAction::Pass;
        }
        if data.len() < HEARTBEAT.len() {
            return FrameAction::Incomplete;
        }
        content.left_out = content
            .left_out
            .saturating_sub(head.total - HEAD as u64 - 1);
        FrameAction::Replace(HEARTBEAT.to_vec())
    }

    /// Screens the short strings of a method. A method with unknown fields is left to the library.
    fn method(&mut self, channel: u16, payload: &mut [u8]) {
        let mut walk = Walk::new(payload);
        let (Some(class), Some(method)) = (walk.short(), walk.short()) else {
            return;
        };
        let fields: &[Field] = match (class, method) {
            TUNE => {
                walk.skip(2);
                if let Some(theirs) = walk.long() {
                    self.agree(theirs);
                }
                return;
            }
            (10, 41 | 60) | (50, 11) | (60, 21 | 30 | 31) => &[Field::Text],
            // A code and an error text, which repeats names from a client and may be truncated.
            (10, 50) | (20, 40) => &[Field::Skip(2), Field::Text],
            (60, 50) => &[Field::Skip(2), Field::Text, Field::Text, Field::Text],
            DELIVER => &[Field::Text, Field::Skip(9), Field::Text, Field::Text],
            (60, 71) => &[Field::Skip(9), Field::Text, Field::Text],
            _ => return,
        };
        for field in fields {
            let known = match field {
                Field::Text => walk.text(),
                Field::Skip(size) => walk.skip(*size),
            };
            if known.is_none() {
                return;
            }
        }
        let damage = walk.damage;
        if class != DELIVER.0 {
            return;
        }
        let content = self.channels.entry(channel).or_default();
        *content = Content::default();
        if method != DELIVER.1 {
            return;
        }
        let mut walk = Walk::new(payload);
        let tag = walk.skip(4).and_then(|()| walk.text());
        content.tag = tag.and_then(|()| walk.long_long());
        self.note(channel, damage);
    }

    /// The limit that both sides observe, computed as in the library.
    fn agree(&mut self, theirs: u32) {
        let ours = self.limits.frame;
        self.limits.frame = match (ours, theirs) {
            (0, limit) | (limit, 0) => limit,
            (ours, theirs) => ours.min(theirs),
        };
    }

    /// Screens a content header.
    fn header(&mut self, channel: u16, payload: &mut [u8]) -> Result<(), Unreadable> {
        let mut walk = Walk::new(payload);
        walk.skip(4).ok_or(CUT)?;
        let size = walk.long_long().ok_or(CUT)?;
        walk.properties()?;
        let Bodies { max, max_waiting } = self.limits.bodies;
        let awaits_eta = size <= max && size > max_waiting && walk.awaits_eta();
        let mut damage = walk.damage;
        if size > max || awaits_eta {
            damage.body_bytes = Some(size);
            damage.awaits_eta = awaits_eta;
            if let Some(field) = payload.get_mut(4..12) {
                field.fill(0);
            }
            self.channels.entry(channel).or_default().left_out = size;
        }
        self.note(channel, damage);
        Ok(())
    }

    /// An empty content header that replaces one that cannot be read.
    fn leave_out(&mut self, head: Head, data: &[u8], why: &'static str) -> FrameAction {
        let Some(start) = data.get(..HEAD + BARE) else {
            // Too short for a content header; the library reports this error.
            return FrameAction::Pass;
        };
        let mut bare = start.to_vec();
        bare[3..HEAD].copy_from_slice(&[0, 0, 0, BARE as u8]);
        let size = bare[HEAD + 4..HEAD + 12].try_into();
        bare[HEAD + 4..].fill(0);
        bare.push(END);
        let content = self.channels.entry(head.channel).or_default();
        content.left_out = size.map_or(0, u64::from_be_bytes);
        let damage = Damage {
            unreadable: Some(why),
            ..Damage::default()
        };
        self.note(head.channel, damage);
        FrameAction::Replace(bare)
    }

    /// Records a change of the current delivery of a channel.
    fn note(&self, channel: u16, damage: Damage) {
        if damage == Damage::default() {
            return;
        }
        if let Some(tag) = self.channels.get(&channel).and_then(|content| content.tag) {
            let key = (channel, tag);
            let before = self.notes.take(channel, tag).unwrap_or_default();
            self.notes.put(key, damage.and(before));
        }
    }
}

/// Decision about a frame.
enum FrameAction {
    /// The rest of the frame must arrive first.
    Incomplete,
    /// The frame passes.
    Pass,
    /// These bytes replace the frame.
    Replace(Vec<u8>),
}

/// A field of a method.
enum Field {
    Text,
    Skip(usize),
}

/// Subtracts up to `limit` from a count.
fn take(count: &mut u64, limit: usize) -> usize {
    let taken = usize::try_from(*count).unwrap_or(usize::MAX).min(limit);
    *count -= taken as u64;
    taken
}

/// Moves passing bytes to the bytes that are ready.
fn keep(data: &mut [u8], at: usize, count: usize, ready: &mut usize) {
    if at != *ready && count > 0 {
        data.copy_within(at..at + count, *ready);
    }
    *ready += count;
}

#[cfg(test)]
mod tests;
