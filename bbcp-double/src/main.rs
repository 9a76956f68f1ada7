//! The bbcp test double.
fn main() {}
