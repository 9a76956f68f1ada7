//! The ccat-transfer binary.
fn main() {}
