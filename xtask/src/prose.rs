//! Word list for comments, documentation and scripts: patterns that make a text hard to read for a non-native
//! speaker. See `docs/development/style.md`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// Words that begin a clause, where a doc comment needs a noun or a verb.
const CLAUSES: [&str; 7] = ["What", "How", "Whether", "Who", "Why", "Where", "That"];

/// Words and phrases that have a plain replacement.
const PHRASES: [&str; 6] = [
    "told", "whoever", "somebody", "nobody", "of which", "so many",
];

/// Files whose text may contain the phrases, with the reason.
const EXCEPTIONS: [(&str, &str); 6] = [
    ("CHANGELOG.md", "lists old texts"),
    ("tests/python/test_pooler.py", "the user `nobody`"),
    ("docs/development/style.md", "names the words"),
    ("xtask/src/prose.rs", "contains the list"),
    ("scripts/lib/services.sh", "the user `nobody`"),
    ("tests/copy/endpoints.rs", "the user `nobody`"),
];

/// A failed check.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProseError {
    #[error("cannot list the files of the repository with git")]
    List(#[source] io::Error),
    #[error("cannot read {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{count} sentences have to be read twice (docs/development/style.md names the alternatives):{findings}"
    )]
    Findings { count: usize, findings: String },
}

/// Checks every file of the repository that git knows.
///
/// # Errors
/// [`ProseError::Findings`] with a line for each place.
pub(crate) fn check(repository: &Path) -> Result<(), ProseError> {
    let mut count = 0;
    let mut findings = String::new();
    for name in files(repository)? {
        let path = repository.join(&name);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Deleted in the working tree.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ProseError::File { path, source }),
        };
        for (number, line) in text.lines().enumerate() {
            if let Some(problem) = problem(&name, line) {
                count += 1;
                findings.push_str(&format!("\n{name}:{}: {problem}", number + 1));
            }
        }
    }
    match count {
        0 => Ok(()),
        count => Err(ProseError::Findings { count, findings }),
    }
}

fn files(repository: &Path) -> Result<Vec<String>, ProseError> {
    let listed = Command::new("git")
        .args(["ls-files", "*.rs", "*.md", "*.py", "*.sh", "*.toml"])
        .current_dir(repository)
        .output()
        .map_err(ProseError::List)?;
    if !listed.status.success() {
        let text = String::from_utf8_lossy(&listed.stderr).into_owned();
        return Err(ProseError::List(io::Error::other(text)));
    }
    let names = String::from_utf8_lossy(&listed.stdout).into_owned();
    let is_checked = |name: &&str| !EXCEPTIONS.iter().any(|(exception, _)| exception == name);
    Ok(names
        .lines()
        .filter(is_checked)
        .map(str::to_owned)
        .collect())
}

/// The problem of a line of the file `name`.
fn problem(name: &str, line: &str) -> Option<String> {
    let line = line.trim_start();
    if name.ends_with(".rs")
        && let Some(comment) = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"))
        && let Some(first) = comment
            .strip_prefix(' ')
            .and_then(|text| text.split(' ').next())
        && CLAUSES.contains(&first)
    {
        return Some(format!("begins with `{first}`"));
    }
    let lower = line.to_lowercase();
    let found = PHRASES
        .iter()
        .find(|phrase| contains_words(&lower, phrase))?;
    Some(format!("`{found}`"))
}

/// Returns true if `text` contains `phrase` between other characters than letters, digits and `_`.
fn contains_words(text: &str, phrase: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(phrase).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + phrase.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("a.rs", "    /// What a worker needs.", true)]
    #[case("a.rs", "//! How it works.", true)]
    #[case("a.rs", "/// Whatever follows.", false)]
    #[case("a.rs", "// What follows is ordered.", false)]
    #[case("a.md", "What it is", false)]
    #[case("a.md", "The caller is told the reason.", true)]
    #[case("a.py", "# So many seconds", true)]
    #[case("a.sh", "toldness untold", false)]
    #[case("a.rs", "/// Number of attempts.", false)]
    fn lines_with_and_without_a_pattern(
        #[case] name: &str,
        #[case] line: &str,
        #[case] has_problem: bool,
    ) {
        assert_eq!(problem(name, line).is_some(), has_problem);
    }
}
