//! Files that are generated from the source. A test of each compares it with the committed file.

use std::fs;
use std::path::Path;

use super::TaskError;
use super::{configuration, defaults};

/// A generated file.
pub(crate) struct Page {
    /// Path of the file in the repository.
    pub(crate) path: &'static str,
    /// Paths of the files it is generated from.
    pub(crate) sources: &'static [&'static str],
    /// Makes the text from the texts of those files.
    pub(crate) generate: fn(&[String]) -> String,
}

/// Every generated file.
pub(crate) const PAGES: [Page; 2] = [defaults::PAGE, configuration::PAGE];

impl Page {
    /// The text that the page should have.
    pub(crate) fn text(&self, repository: &Path) -> Result<String, TaskError> {
        let sources: Result<Vec<_>, _> = self
            .sources
            .iter()
            .map(|source| read(&repository.join(source)))
            .collect();
        sources.map(|sources| (self.generate)(&sources))
    }
}

/// Writes all pages and prints the paths of those that changed.
pub(crate) fn write_all(repository: &Path) -> Result<(), TaskError> {
    for page in PAGES {
        let text = page.text(repository)?;
        let path = repository.join(page.path);
        // A page that is missing is written as well.
        if fs::read_to_string(&path).is_ok_and(|committed| committed == text) {
            continue;
        }
        fs::write(&path, text).map_err(|source| TaskError::File { path, source })?;
        println!("{}", page.path);
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, TaskError> {
    fs::read_to_string(path).map_err(|source| TaskError::File {
        path: path.to_owned(),
        source,
    })
}

/// Fails if the committed page differs from the generated one.
#[cfg(test)]
pub(crate) fn assert_current(page: &Page) {
    let repository = crate::repository();
    let committed = fs::read_to_string(repository.join(page.path)).unwrap_or_default();
    let is_current = page.text(&repository).is_ok_and(|text| text == committed);
    assert!(
        is_current,
        "{} is not current: run `cargo xtask docs` and look at the change",
        page.path
    );
}
