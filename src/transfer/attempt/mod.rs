//! Steps of an attempt.

mod verify;

pub(super) use verify::{ReadAlong, reading};
