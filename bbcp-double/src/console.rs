//! Lines on standard error. Every line is one `write`, so that those of three processes do not mix.
//!
//! A closed output is not an error: bbcp ignores SIGPIPE, and so does the double.

use crate::failure::Failure;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static CARRIAGE_RETURN: AtomicBool = AtomicBool::new(false);

/// Makes all following lines end in `\r\n` (the injection `crlf`).
pub(crate) fn end_lines_with_carriage_return() {
    CARRIAGE_RETURN.store(true, Ordering::Relaxed);
}

/// Prints a line without changes.
pub(crate) fn line(text: &str) {
    raw(text.as_bytes());
}

/// Prints a line of bbcp itself: `bbcp: ` and the text.
pub(crate) fn message(text: &str) {
    line(&format!("bbcp: {text}"));
}

/// Prints all lines of a failure.
pub(crate) fn failure(failure: &Failure) {
    for text in &failure.lines {
        message(text);
    }
}

/// Prints a line of any bytes.
pub(crate) fn raw(bytes: &[u8]) {
    let end: &[u8] = if CARRIAGE_RETURN.load(Ordering::Relaxed) {
        b"\r\n"
    } else {
        b"\n"
    };
    let whole = [bytes, end].concat();
    let _ = std::io::stderr().write_all(&whole);
}

/// Prints a line on standard output.
pub(crate) fn standard_output(text: &str) {
    let mut output = std::io::stdout();
    let _ = output
        .write_all(format!("{text}\n").as_bytes())
        .and_then(|()| output.flush());
}
