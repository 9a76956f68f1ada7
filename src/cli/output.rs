//! Output of results.

use std::io::{ErrorKind, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::CliError;
pub(super) use crate::display::{age, clean, percent, rate, second, size};
use celery_worker_cli::text::{visible_json, visible_lines};

/// Writes to standard output; control characters other than line breaks and tabs are shown as escapes.
///
/// # Errors
/// [`CliError::Unread`] if the reader has closed the output, as `head` does after its last line; `println!` would
/// panic.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    print_bytes(visible_lines(text).as_bytes())
}

/// Writes bytes to standard output without changes.
///
/// # Errors
/// As [`print`].
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => CliError::Unread,
            _ => CliError::failed(format!("cannot write to standard output: {error}")),
        })
}

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(no_json)?;
    print_bytes(format!("{}\n", visible_json(&text)).as_bytes())
}

/// Prints a value as JSON, in one line.
pub(super) fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(no_json)?;
    print_bytes(format!("{}\n", visible_json(&text)).as_bytes())
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` passes it")]
fn no_json(error: serde_json::Error) -> CliError {
    CliError::failed(format!("cannot show the result as JSON: {error}"))
}

/// Creates a table without lines, for people and for `awk`.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}
