#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod backoff;
pub mod error_chain;
#[cfg(feature = "sql")]
pub mod sql;
pub mod url;
