//! `[traces]`: export of spans.

use std::time::Duration;

use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use url::Url;

use super::problem::SectionProblems;

/// The section `[traces]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// True if spans are recorded and sent, provided that an endpoint is set.
    pub enabled: bool,
    /// URL of a collector for OTLP over HTTP, with its path; empty for none.
    pub endpoint: String,
    /// Headers of every request, `name=value,name=value`, values percent-encoded; a secret, since they may contain a
    /// key.
    pub headers: SecretString,
    /// File that contains the headers instead; empty for none.
    pub headers_file: String,
    /// Name of the service in the traces; empty for the name of the program.
    pub service_name: String,
    /// Share of the traces begun in this process that are recorded, 0 to 1.
    pub ratio: f64,
    /// Time limit of one request.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Traces {
    /// Returns true if spans are recorded and sent.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled && !self.endpoint.is_empty()
    }

    /// The headers, by name.
    ///
    /// # Errors
    /// The format is wrong; the error does not contain the value.
    pub fn header_pairs(&self) -> Result<Vec<(String, SecretString)>, String> {
        header_pairs(self.headers.expose_secret())
    }

    /// Adds a problem for each violated rule of the section.
    pub fn check(&self, problems: &mut SectionProblems<'_>) {
        if !self.endpoint.is_empty() {
            problems.require_url("endpoint", &self.endpoint, &["http", "https"]);
            let has_login = Url::parse(&self.endpoint)
                .is_ok_and(|url| !url.username().is_empty() || url.password().is_some());
            problems.require(
                !has_login,
                "endpoint",
                "must contain no login; use traces.headers, e.g. \"authorization=Basic%20…\"",
            );
        }
        if let Err(message) = self.header_pairs() {
            problems.add(
                "headers",
                format!("{message}; write name=value,name=value, with %20 for a blank"),
            );
        }
        problems.require(
            (0.0..=1.0).contains(&self.ratio),
            "ratio",
            "must be between 0 and 1",
        );
        problems.require(
            self.timeout >= Duration::from_millis(100),
            "timeout",
            "must be 100ms or more",
        );
    }
}

/// HTTP headers in the format of OpenTelemetry's environment variables: `name=value,name=value`, the values
/// percent-encoded.
///
/// # Errors
/// The format is wrong; the error does not contain the values.
fn header_pairs(text: &str) -> Result<Vec<(String, SecretString)>, String> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let pairs = text
        .split(',')
        .map(str::trim)
        .filter(|pair| !pair.is_empty());
    pairs
        .enumerate()
        .map(|(index, pair)| {
            let wrong = |what: &str| format!("header {} {what}", index + 1);
            let (name, value) = pair.split_once('=').ok_or_else(|| wrong("has no `=`"))?;
            let (name, value) = (name.trim(), value.trim());
            if name.is_empty() || !name.chars().all(is_token) {
                return Err(wrong("has a name that HTTP does not allow"));
            }
            let value = percent_decode_str(value).decode_utf8();
            let value = value.map_err(|_| wrong("has a value that is not text"))?;
            if !value.chars().all(|c| matches!(c, ' '..='~')) {
                return Err(wrong(
                    "has a value with characters other than printable ASCII",
                ));
            }
            Ok((name.to_owned(), value.into_owned().into()))
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", Ok(vec![]))]
    #[case("api-key=k, x = a%3Db%20c=d,", Ok(vec![("api-key", "k"), ("x", "a=b c=d")]))]
    #[case("a=1,s3cret", Err("header 2 has no `=`"))]
    #[case("s3 cret=x", Err("header 1 has a name that HTTP does not allow"))]
    #[case(
        "a=s3cret%0A",
        Err("header 1 has a value with characters other than printable ASCII")
    )]
    #[case("a=s3cret%ff", Err("header 1 has a value that is not text"))]
    fn headers_are_read(#[case] text: &str, #[case] expected: Result<Vec<(&str, &str)>, &str>) {
        let pairs = header_pairs(text);
        let pairs = pairs.as_ref().map_err(String::as_str).map(|pairs| {
            let shown = |(name, value): &'_ (String, SecretString)| {
                let value = secrecy::ExposeSecret::expose_secret(value).to_owned();
                (name.clone(), value)
            };
            pairs.iter().map(shown).collect::<Vec<_>>()
        });
        let expected = expected.map(|pairs| {
            let owned = pairs.into_iter().map(|(a, b)| (a.to_owned(), b.to_owned()));
            owned.collect()
        });
        assert_eq!(pairs, expected);
    }
}
