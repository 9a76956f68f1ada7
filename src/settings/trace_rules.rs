//! Rules of `[traces]`, whose type belongs to the crate of the exporter.

use std::time::Duration;

use traces::Traces;
use url::Url;

use super::problem::SectionProblems;

/// Adds the broken rules of the section.
pub(super) fn check(traces: &Traces, problems: &mut SectionProblems<'_>) {
    if !traces.endpoint.is_empty() {
        problems.require_url("endpoint", &traces.endpoint, &["http", "https"]);
        let has_login = Url::parse(&traces.endpoint)
            .is_ok_and(|url| !url.username().is_empty() || url.password().is_some());
        problems.require(
            !has_login,
            "endpoint",
            "must have no login in it; use traces.headers, e.g. \"authorization=Basic%20…\"",
        );
    }
    if let Err(message) = traces.header_pairs() {
        problems.add(
            "headers",
            format!("{message}; write name=value,name=value, with %20 for a blank"),
        );
    }
    problems.require(
        (0.0..=1.0).contains(&traces.ratio),
        "ratio",
        "must be between 0 and 1",
    );
    problems.require(
        traces.timeout >= Duration::from_millis(100),
        "timeout",
        "must be 100ms or more",
    );
}
