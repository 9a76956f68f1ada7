//! How results are shown.

use comfy_table::{ContentArrangement, Table, presets};
use humansize::{BINARY, format_size};
use serde::Serialize;

use super::CliError;

/// Prints a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| CliError::Failed(format!("cannot show the result as JSON: {e}")))?;
    println!("{text}");
    Ok(())
}

/// A table without lines, for reading and for `awk`.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

/// A size in bytes for people.
pub(super) fn size(bytes: i64) -> String {
    format_size(u64::try_from(bytes).unwrap_or(0), BINARY)
}

/// A rate for people.
pub(super) fn rate(bytes_per_s: i64) -> String {
    format!("{}/s", size(bytes_per_s))
}

/// A share in whole per cent.
pub(super) fn percent(done: i64, total: i64) -> String {
    if total > 0 {
        format!("{}%", done.saturating_mul(100) / total)
    } else {
        String::new()
    }
}
