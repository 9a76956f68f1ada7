//! The reference of all settings, `docs/configuration.md`, generated from the defaults.

use std::fmt::Write as _;

use super::pages::Page;

pub(crate) const PAGE: Page = Page {
    path: "docs/configuration.md",
    sources: super::defaults::PAGE.sources,
    generate,
};

const INTRODUCTION: &str = "\
# Every setting

This page is generated from `config.default.toml`, which is compiled into the program:
`cargo xtask docs` writes it, and a test compares the two.

A setting can be given in several places; what comes later wins:

1. the defaults below;
2. the file of `--config` or `CCAT_DATA_TRANSFER_CONFIG`, with only the keys that differ;
3. `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and `CCAT_OPS_DB_*`, as the Python system knows them, and some of
   OpenTelemetry's `OTEL_*`, see [traces](operations/traces.md#opentelemetrys-own-variables);
4. `CCAT_DATA_TRANSFER_<SECTION>__<KEY>`, such as `CCAT_DATA_TRANSFER_BBCP__STREAMS=32`;
5. options of the command line.

`ccat-transfer config check` prints every problem at once. An unknown key is an error that names the nearest one.
A secret can be in a file of its own: set the key of the same name with the ending `_file`; see
[doctor, secrets](operations/doctor.md#secrets). Durations are written as `\"90s\"`, `\"5m\"`, `\"2h\"`; sizes are bytes.
";

/// Makes the page from the files of the defaults.
fn generate(sources: &[String]) -> String {
    let defaults = super::defaults::joined(sources);
    let mut page = INTRODUCTION.to_owned();
    // The introduction replaces the comment before the first section.
    let sections = defaults
        .split_once("\n[")
        .map_or(String::new(), |(_, rest)| format!("[{rest}"));
    let mut comment: Vec<&str> = Vec::new();
    let mut lines = sections.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix('#') {
            comment.push(text.strip_prefix(' ').unwrap_or(text));
        } else if line.starts_with('[') {
            // A comment on what follows stands above it; examples stand by themselves.
            explain(&mut page, &mut comment);
            let _ = write!(page, "\n## `{line}`\n");
        } else if line.contains('=') {
            let mut value = line.to_owned();
            // Arrays go over several lines.
            while value.matches('[').count() > value.matches(']').count() {
                let Some(more) = lines.next() else { break };
                let _ = write!(value, "\n{more}");
            }
            explain(&mut page, &mut comment);
            let _ = write!(page, "\n```toml\n{value}\n```\n");
        } else {
            explain(&mut page, &mut comment);
        }
    }
    explain(&mut page, &mut comment);
    page
}

/// Writes a comment as text, and the example that it ends with as code.
fn explain(page: &mut String, comment: &mut Vec<&str>) {
    let example = comment
        .iter()
        .position(|line| line.starts_with('['))
        .unwrap_or(comment.len());
    let (text, example) = comment.split_at(example);
    if !text.is_empty() {
        let _ = write!(page, "\n{}\n", text.join("\n").trim_end());
    }
    if !example.is_empty() {
        let _ = write!(page, "\n```toml\n{}\n```\n", example.join("\n"));
    }
    comment.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::assert_current;

    #[test]
    fn page_is_generated_from_the_defaults() {
        assert_current(&PAGE);
    }
}
