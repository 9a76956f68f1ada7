//! Name of the program that the worker is a part of.

/// Name and version of a program, as it appears in the broker's management, in tracebacks and in `celery inspect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Name, e.g. `image-worker`.
    pub name: &'static str,
    /// Version.
    pub version: &'static str,
}

impl Default for Product {
    /// This library.
    fn default() -> Self {
        Self {
            name: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}
