//! Celery's node names, and its abbreviations in file names.

use std::path::{Path, PathBuf};

use crate::error::ProcessError;

/// Default name of a node.
const DEFAULT: &str = "celery";

/// Value of `%i`, the index of the process. Celery's child processes count from 1; this program has none.
const PROCESS_INDEX: &str = "0";

/// Expands abbreviations as Celery does: `%%` is a `%`. Another character after `%` must be one of `keys` if it could
/// be part of a name; otherwise both characters stay unchanged.
///
/// # Errors
/// The first unknown abbreviation.
fn expand(text: &str, keys: &[(char, &str)]) -> Result<String, char> {
    let mut expanded = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            expanded.push(c);
            continue;
        }
        let mut after = characters.clone();
        match after.next() {
            Some('%') => expanded.push('%'),
            Some(key) if key.is_alphanumeric() || key == '_' => {
                let found = keys.iter().find(|(name, _)| *name == key);
                expanded.push_str(found.map(|(_, value)| *value).ok_or(key)?);
            }
            _ => {
                expanded.push('%');
                continue;
            }
        }
        characters = after;
    }
    Ok(expanded)
}

fn unknown(flag: &str, key: char) -> ProcessError {
    ProcessError::Usage(format!(
        "{flag}: `%{key}` is unknown; known are %h (the host), %n, %d, %i, %I, and %% for a `%`"
    ))
}

/// The node name for `-n`: `celery@HOST` without a given name, `NAME@HOST` for a name without a host. `%h` is the host,
/// `%n` its first label, `%d` the rest, `%i` the index of the process, 0. `%I` is the index with a dash for a worker
/// with child processes, and therefore empty here.
///
/// # Errors
/// [`ProcessError::Usage`] for other abbreviations.
pub fn node_name(given: Option<&str>, host: &str) -> Result<String, ProcessError> {
    let (label, domain) = host.split_once('.').unwrap_or((host, ""));
    let keys = [
        ('h', host),
        ('n', label),
        ('d', domain),
        ('i', PROCESS_INDEX),
        ('I', ""),
    ];
    let name = expand(given.unwrap_or(DEFAULT), &keys).map_err(|key| unknown("--hostname", key))?;
    Ok(match name.split_once('@') {
        None => format!("{name}@{host}"),
        Some((name, at)) => {
            let name = if name.is_empty() { DEFAULT } else { name };
            let at = if at.is_empty() { host } else { at };
            format!("{name}@{at}")
        }
    })
}

/// Expands the abbreviations in the file name of the flag `flag` for the node `node`: `%n` is the node's name, `%h` its
/// host, `%d` the host's domain, `%p` both, `%i` and `%I` as in a node name.
///
/// # Errors
/// [`ProcessError::Usage`] for other abbreviations.
pub fn node_path(flag: &str, path: &Path, node: &str) -> Result<PathBuf, ProcessError> {
    let Some(text) = path.to_str() else {
        // The path is not valid UTF-8, so it contains no abbreviations of Celery.
        return Ok(path.to_owned());
    };
    let (name, host) = node.split_once('@').unwrap_or((DEFAULT, node));
    let keys = [
        ('h', host),
        ('n', name),
        ('d', host.split_once('.').map_or("", |(_, domain)| domain)),
        ('p', node),
        ('i', PROCESS_INDEX),
        ('I', ""),
    ];
    let expanded = expand(text, &keys).map_err(|key| unknown(flag, key))?;
    Ok(expanded.into())
}

/// Name of this host.
#[must_use]
pub fn host() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{node_name, node_path};
    use rstest::rstest;

    #[rstest]
    #[case(None, "celery@a.b.c")]
    #[case(Some("w1"), "w1@a.b.c")]
    #[case(Some("w1@%h"), "w1@a.b.c")]
    #[case(Some("%n@%d"), "a@b.c")]
    // The expected values are those of Celery 5.7.
    #[case(Some("n%i@%h"), "n0@a.b.c")]
    #[case(Some("a%Ib@%h"), "ab@a.b.c")]
    #[case(Some("@h"), "celery@h")]
    #[case(Some("x@"), "x@a.b.c")]
    #[case(Some("%%h@%h"), "%h@a.b.c")]
    fn names(#[case] given: Option<&str>, #[case] expected: &str) {
        let name = node_name(given, "a.b.c").ok();
        assert_eq!(name.as_deref(), Some(expected));
    }

    #[rstest]
    #[case("%n", "w1")]
    #[case("%h", "a.b.c")]
    #[case("%d", "b.c")]
    #[case("%i", "0")]
    #[case("%p", "w1@a.b.c")]
    #[case("%n%I.log", "w1.log")]
    #[case("/run/%n.pid", "/run/w1.pid")]
    #[case("100%", "100%")]
    #[case("%n%", "w1%")]
    #[case("a%%n", "a%n")]
    #[case("%%%n", "%w1")]
    #[case("% n", "% n")]
    fn files(#[case] given: &str, #[case] expected: &str) {
        let path = node_path("-f", Path::new(given), "w1@a.b.c").ok();
        assert_eq!(path.as_deref(), Some(Path::new(expected)));
    }

    #[rstest]
    #[case("%x")]
    #[case("%N")]
    #[case("%5")]
    #[case("%\u{e9}")]
    fn unknown_abbreviations_are_refused(#[case] given: &str) {
        assert!(node_path("-f", Path::new(given), "w1@a.b.c").is_err());
        assert!(node_name(Some(given), "a.b.c").is_err());
    }

    #[test]
    fn node_name_without_abbreviations_of_the_node() {
        assert!(node_name(Some("%p@h"), "a.b.c").is_err());
    }
}
