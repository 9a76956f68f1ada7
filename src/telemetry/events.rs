//! Compares docs/LOGGING.md with the source: every event is in its table as it is logged, and
//! nothing else is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use rstest::rstest;

const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// What is known of a message: at which levels it comes, with which fields.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Event {
    levels: BTreeSet<String>,
    fields: BTreeSet<String>,
}

type Events = BTreeMap<String, Event>;

/// The first columns of a row, to be pasted.
struct Row<'a>(&'a str, &'a Event);

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(message, event) = self;
        let levels: Vec<_> = event.levels.iter().map(String::as_str).collect();
        let fields: Vec<_> = event
            .fields
            .iter()
            .map(|name| format!("`{name}`"))
            .collect();
        let fields = match fields.is_empty() {
            true => "–".to_owned(),
            false => fields.join(", "),
        };
        write!(f, "| {message} | {} | {fields} |", levels.join(", "))
    }
}

/// Splits what stands between a macro's parentheses at its commas; the rest after them is left out.
fn arguments(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' if !quoted && depth == 0 => break,
            ')' | ']' | '}' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    let trimmed = parts.iter().map(|part| part.trim().to_owned());
    trimmed.filter(|part| !part.is_empty()).collect()
}

/// A string literal's text.
fn literal(source: &str) -> Option<String> {
    let inner = source.strip_prefix('"')?.strip_suffix('"')?;
    let lines: Vec<_> = inner.split("\\\n").collect();
    let joined: String = lines
        .iter()
        .enumerate()
        .map(|(n, line)| if n == 0 { line } else { line.trim_start() })
        .collect();
    Some(joined)
}

/// The name of a field: of `name = value`, `%name`, `?name` and `name`.
fn field(argument: &str) -> String {
    let name = argument.split('=').next().unwrap_or_default().trim();
    name.trim_start_matches(['%', '?']).to_owned()
}

/// Adds the events of a file's source.
fn read(source: &str, path: &str, events: &mut Events) {
    for level in LEVELS {
        let call = format!("{level}!(");
        for (at, _) in source.match_indices(&call) {
            let before = &source[..at];
            if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let line = before.lines().count();
            assert!(
                before.ends_with("tracing::"),
                "{path}:{line}: write `tracing::{call}…)`, so that this test finds it"
            );
            let mut arguments = arguments(&source[at + call.len()..]);
            let message = arguments.pop().and_then(|last| literal(&last));
            let Some(message) = message else {
                unreachable!("{path}:{line}: the message is to be one constant text, at the end")
            };
            assert!(
                !message.contains('{'),
                "{path}:{line}: data go into fields: {message}"
            );
            let event = events.entry(message).or_default();
            event.levels.insert(level.to_owned());
            event.fields.extend(arguments.iter().map(|a| field(a)));
        }
    }
}

fn read_all(folder: &Path, events: &mut Events) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_all(&path, events)?;
        } else if path.ends_with("telemetry/events.rs") {
            // This file speaks of them, and logs nothing.
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            read(
                &fs::read_to_string(&path)?,
                &path.display().to_string(),
                events,
            );
        }
    }
    Ok(())
}

/// The rows of the manual's tables of events.
fn manual(text: &str) -> Events {
    let names = |cell: &str| -> BTreeSet<String> {
        let names = cell.split(',').map(|name| name.trim().trim_matches('`'));
        names
            .filter(|name| *name != "–")
            .map(str::to_owned)
            .collect()
    };
    let (_, tables) = text.split_once("\n## Events\n").unwrap_or_default();
    tables
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").collect();
            let [message, levels, fields, _means, _to_do] = cells.as_slice() else {
                return None;
            };
            let event = Event {
                levels: names(levels),
                fields: names(fields),
            };
            Some(((*message).to_owned(), event))
        })
        .filter(|(message, _)| !matches!(message.as_str(), "event" | "---"))
        .collect()
}

#[test]
fn the_manual_has_every_event_as_it_is() -> std::io::Result<()> {
    let mut events = Events::new();
    read_all(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut events,
    )?;
    assert!(events.len() > 50, "only {} events were found", events.len());
    let manual = manual(include_str!("../../docs/LOGGING.md"));
    let mut wrong = String::new();
    for (message, event) in &events {
        if manual.get(message) != Some(event) {
            wrong.push_str(&format!("\nto be: {}", Row(message, event)));
        }
    }
    for (message, event) in &manual {
        if events.get(message) != Some(event) {
            wrong.push_str(&format!("\nis now: {}", Row(message, event)));
        }
    }
    assert!(
        wrong.is_empty(),
        "docs/LOGGING.md differs from the source:{wrong}"
    );
    Ok(())
}

#[rstest]
#[case(r#"tracing::warn!("a");"#, "a", &["warn"], &[])]
#[case(
    "tracing::info!(\n  id = f(1, \"x, y\"),\n  %error, ?ids, n,\n  \"a \\\n   b\"\n);",
    "a b",
    &["info"],
    &["error", "id", "ids", "n"]
)]
#[case(
    r#"tracing::info!(a, "x") } else { tracing::debug!(b, "x")"#,
    "x",
    &["debug", "info"],
    &["a", "b"]
)]
fn events_are_found(
    #[case] source: &str,
    #[case] message: &str,
    #[case] levels: &[&str],
    #[case] fields: &[&str],
) {
    let mut events = Events::new();
    read(source, "x.rs", &mut events);
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let event = Event {
        levels: set(levels),
        fields: set(fields),
    };
    assert_eq!(events, Events::from([(message.to_owned(), event)]));
}
