//! Text of errors and panics for logs.

use std::any::Any;
use std::error::Error;
use std::fmt;

use crate::url::redacted;

/// Shows an error with its causes, `a: b: c`. Errors are otherwise passed on by `source()`; this
/// is for the edge, where a person reads them. What looks like a login in them is masked: some libraries quote URLs.
#[must_use]
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl fmt::Display + use<'a> {
    struct Chain<'a>(&'a (dyn Error + 'static));

    impl fmt::Display for Chain<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let mut last = self.0.to_string();
            f.write_str(&redacted(&last))?;
            let mut next = self.0.source();
            while let Some(error) = next {
                let text = error.to_string();
                // Some libraries repeat their cause in their own text.
                if !last.ends_with(&text) {
                    write!(f, ": {}", redacted(&text))?;
                }
                last = text;
                next = error.source();
            }
            Ok(())
        }
    }

    Chain(error)
}

/// Message of a panic.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
