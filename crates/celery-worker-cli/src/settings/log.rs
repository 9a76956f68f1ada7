//! `[log]`: logging.

use serde::Deserialize;

use super::problem::SectionProblems;
use crate::log::filter;

/// The section `[log]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Level or filter of the log.
    pub level: String,
    /// Format of the lines.
    pub format: LogFormat,
}

impl Log {
    /// Adds a problem for each violated rule of the section.
    pub fn check(&self, problems: &mut SectionProblems<'_>) {
        if let Err(error) = filter(&self.level, env!("CARGO_CRATE_NAME")) {
            problems.add("level", error.to_string());
        }
    }
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `Human` on a terminal, `Json` otherwise.
    Auto,
    /// Lines for human readers.
    Human,
    /// One JSON object per line.
    Json,
}
