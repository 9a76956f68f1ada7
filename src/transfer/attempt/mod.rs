//! Steps of an attempt.

mod leftovers;
mod verify;

pub use leftovers::Cleared;
pub(super) use verify::{ReadAlong, reading};
