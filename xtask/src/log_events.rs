//! Comparison of docs/LOGGING.md with the source: each event has a row in its table with the levels
//! and fields that the source has, and the table has no other rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// Path of the page in the repository.
const PAGE: &str = "docs/LOGGING.md";

/// Levels and fields of the events with one message.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Event {
    levels: BTreeSet<String>,
    fields: BTreeSet<String>,
}

/// Events by their message.
type Events = BTreeMap<String, Event>;

/// A failed comparison of the page with the source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogEventsError {
    #[error("cannot read {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}:{line}: {problem}")]
    Event {
        path: String,
        line: usize,
        problem: String,
    },
    #[error("{PAGE} differs from the source:{0}")]
    Differences(String),
}

/// Compares the page with the source of the program and of its crates.
///
/// # Errors
/// Files that cannot be read, the first event that is not written as the scanner needs it, or the
/// rows that differ, as they should be and as they are.
pub(crate) fn compare(repository: &Path) -> Result<(), LogEventsError> {
    let events = of_source(repository)?;
    let rows = rows(&read_file(&repository.join(PAGE))?);
    let mut differences = String::new();
    for (message, event) in &events {
        if rows.get(message) != Some(event) {
            differences.push_str(&format!("\nshould be: {}", Row(message, event)));
        }
    }
    for (message, event) in &rows {
        if events.get(message) != Some(event) {
            differences.push_str(&format!("\nis: {}", Row(message, event)));
        }
    }
    match differences.is_empty() {
        true => Ok(()),
        false => Err(LogEventsError::Differences(differences)),
    }
}

/// The first columns of a row, ready to be pasted.
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

/// Splits the arguments of a macro at their commas; ignores the text after its closing parenthesis.
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

/// Text of a string literal.
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

/// Name of a field, written as `name = value`, `%name`, `?name` or `name`.
fn field(argument: &str) -> String {
    let name = argument.split('=').next().unwrap_or_default().trim();
    name.trim_start_matches(['%', '?']).to_owned()
}

/// Adds the events of one file.
fn scan(source: &str, path: &str, events: &mut Events) -> Result<(), LogEventsError> {
    for level in LEVELS {
        let call = format!("{level}!(");
        for (at, _) in source.match_indices(&call) {
            let before = &source[..at];
            let line_start = before.rfind('\n').map_or(0, |end| end + 1);
            let is_comment = before[line_start..].trim_start().starts_with("//");
            if is_comment || before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let error = |problem: String| LogEventsError::Event {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                problem,
            };
            if !before.ends_with("tracing::") {
                let problem = format!("write `tracing::{call}…)`, so that the event is found");
                return Err(error(problem));
            }
            let mut arguments = arguments(&source[at + call.len()..]);
            let message = arguments.pop().and_then(|last| literal(&last));
            let Some(message) = message else {
                let problem = "the last argument must be the message, a constant text";
                return Err(error(problem.to_owned()));
            };
            if message.contains('{') {
                return Err(error(format!("data belong into fields: {message}")));
            }
            let event = events.entry(message).or_default();
            event.levels.insert(level.to_owned());
            event.fields.extend(arguments.iter().map(|a| field(a)));
        }
    }
    Ok(())
}

/// The events of the program and of the crates that it is built from.
fn of_source(repository: &Path) -> Result<Events, LogEventsError> {
    let mut events = Events::new();
    scan_folder(&repository.join("src"), &mut events)?;
    let crates = repository.join("crates");
    if crates.is_dir() {
        for path in list(&crates)? {
            let source = path.join("src");
            if source.is_dir() {
                scan_folder(&source, &mut events)?;
            }
        }
    }
    Ok(events)
}

fn scan_folder(folder: &Path, events: &mut Events) -> Result<(), LogEventsError> {
    for path in list(folder)? {
        if path.is_dir() {
            scan_folder(&path, events)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            scan(&read_file(&path)?, &path.display().to_string(), events)?;
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, LogEventsError> {
    let paths = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect());
    paths.map_err(|source| LogEventsError::File {
        path: folder.to_owned(),
        source,
    })
}

fn read_file(path: &Path) -> Result<String, LogEventsError> {
    fs::read_to_string(path).map_err(|source| LogEventsError::File {
        path: path.to_owned(),
        source,
    })
}

/// The rows of the page's tables of events.
fn rows(text: &str) -> Events {
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn page_lists_every_event() {
        let repository = crate::repository();
        let events = of_source(&repository).unwrap();
        assert!(events.len() > 50, "only {} events were found", events.len());
        if let Err(error) = compare(&repository) {
            unreachable!("{error}");
        }
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
        scan(source, "x.rs", &mut events).unwrap();
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let event = Event {
            levels: set(levels),
            fields: set(fields),
        };
        assert_eq!(events, Events::from([(message.to_owned(), event)]));
    }

    #[rstest]
    #[case(r#"warn!("a");"#, "x.rs:1: write `tracing::warn!(…)`")]
    #[case("\ntracing::warn!(a, text);", "x.rs:2: the last argument")]
    #[case(r#"tracing::warn!("a {b}");"#, "x.rs:1: data belong into fields")]
    fn other_forms_of_events_are_refused(#[case] source: &str, #[case] expected: &str) {
        let error = scan(source, "x.rs", &mut Events::new()).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }

    #[test]
    fn examples_in_comments_are_not_events() {
        let mut events = Events::new();
        scan("/// info!(\"a\");\n", "x.rs", &mut events).unwrap();
        assert_eq!(events, Events::new());
    }
}
