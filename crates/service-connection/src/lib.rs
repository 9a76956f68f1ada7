//! Connections to services: URLs, retries and errors, each without secrets in its text.

pub mod backoff;
pub mod error_chain;
#[cfg(feature = "sql")]
pub mod sql;
pub mod url;
