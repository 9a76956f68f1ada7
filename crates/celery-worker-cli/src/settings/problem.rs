//! Problems of the settings, and their collection by the checks of the sections.
//!
//! The crates `garde` and `validator` are not used: they check field by field, whereas these rules span keys and
//! sections, name entries of tables and lists, and keep their texts and their order.

use std::fmt;

use serde::Serialize;
use url::Url;

use crate::text::visible;

/// One problem of the settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Dotted key; empty if the problem concerns a whole file.
    pub key: String,
    /// The problem, and the accepted values.
    pub message: String,
    /// File or environment variable of the value; empty for a rule that spans keys.
    pub source: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", visible(&self.key))?;
        }
        f.write_str(&visible(&self.message))?;
        if !self.source.is_empty() {
            write!(f, " (from {})", visible(&self.source))?;
        }
        Ok(())
    }
}

/// Settings that cannot be used, with every problem found.
#[derive(Debug, thiserror::Error)]
#[error("{} in the settings:{}", count(.problems.len()), list(.problems))]
pub struct SettingsError {
    /// All problems, in the order of the layers.
    pub problems: Vec<Problem>,
}

fn count(n: usize) -> String {
    if n == 1 {
        "1 problem".into()
    } else {
        format!("{n} problems")
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

/// Problems in the order in which they were found.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// A view for the checks of one section; keys are prefixed by `section`.
    pub fn section<'a>(&'a mut self, section: &'a str) -> SectionProblems<'a> {
        SectionProblems {
            problems: self,
            section,
        }
    }

    /// Adds a problem of a dotted key.
    pub fn add(&mut self, key: &str, message: impl Into<String>) {
        self.0.push(Problem {
            key: key.into(),
            message: message.into(),
            source: String::new(),
        });
    }

    /// All problems.
    pub fn into_vec(self) -> Vec<Problem> {
        self.0
    }
}

/// Problems of one section. Keys are relative to the section, so that its checks do not depend on its name.
#[derive(Debug)]
pub struct SectionProblems<'a> {
    problems: &'a mut Problems,
    section: &'a str,
}

impl SectionProblems<'_> {
    /// Adds a problem with a key of the section.
    pub fn add(&mut self, key: &str, message: impl Into<String>) {
        let key = format!("{}.{key}", self.section);
        self.problems.add(&key, message);
    }

    /// Adds a problem if the rule does not hold.
    pub fn require(&mut self, holds: bool, key: &str, message: &str) {
        if !holds {
            self.add(key, message);
        }
    }

    /// Adds a problem if the text is not a URL with one of the schemes. The problem does not show the URL, which may
    /// contain a password.
    pub fn require_url(&mut self, key: &str, text: &str, schemes: &[&str]) {
        let message = match Url::parse(text) {
            Ok(url) if schemes.contains(&url.scheme()) => return,
            Ok(url) => format!(
                "scheme `{}` is not supported; use {}",
                url.scheme(),
                schemes.join(", ")
            ),
            Err(error) => format!("not a URL: {error}"),
        };
        self.add(key, message);
    }
}
