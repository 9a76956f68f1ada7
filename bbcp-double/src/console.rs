//! Lines on standard error. Every line is one `write`, so that those of three processes do not mix.
//!
//! A closed output is no error: bbcp ignores SIGPIPE, and so does the double.

use crate::failure::Failure;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static CARRIAGE_RETURN: AtomicBool = AtomicBool::new(false);

/// From now on lines end in `\r\n` (the injection `crlf`).
pub(crate) fn end_lines_with_carriage_return() {
    CARRIAGE_RETURN.store(true, Ordering::Relaxed);
}

/// A line as it stands.
pub(crate) fn line(text: &str) {
    raw(text.as_bytes());
}

/// A line of bbcp's own: `bbcp: ` and the text.
pub(crate) fn message(text: &str) {
    line(&format!("bbcp: {text}"));
}

/// All lines of a failure.
pub(crate) fn failure(failure: &Failure) {
    for text in &failure.lines {
        message(text);
    }
}

/// A line of any bytes.
pub(crate) fn raw(bytes: &[u8]) {
    let end: &[u8] = if CARRIAGE_RETURN.load(Ordering::Relaxed) {
        b"\r\n"
    } else {
        b"\n"
    };
    let whole = [bytes, end].concat();
    let _ = std::io::stderr().write_all(&whole);
}

/// A line on standard output.
pub(crate) fn standard_output(text: &str) {
    let mut output = std::io::stdout();
    let _ = output
        .write_all(format!("{text}\n").as_bytes())
        .and_then(|()| output.flush());
}
