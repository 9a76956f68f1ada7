//! `config.default.toml`, which is compiled into the program: the defaults of the worker's process, whose sections
//! belong to the crate `celery-worker-cli`, and those of the application.

use super::pages::Page;

pub(crate) const PAGE: Page = Page {
    path: "config.default.toml",
    sources: &[
        "src/settings/defaults.toml",
        "crates/celery-worker-cli/src/settings/defaults.toml",
    ],
    generate: joined,
};

/// The introduction of the first file, the sections of the others, and the sections of the first file.
pub(crate) fn joined(sources: &[String]) -> String {
    let mut text = String::new();
    let Some((own, others)) = sources.split_first() else {
        return text;
    };
    let (introduction, sections) = own.split_at(own.find("\n[").map_or(0, |end| end + 1));
    text.push_str(introduction);
    for other in others {
        text.push_str(other);
        text.push('\n');
    }
    text.push_str(sections);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_current() {
        crate::pages::assert_current(&PAGE);
    }

    #[test]
    fn sections_of_the_crate_follow_the_introduction() {
        let sources = ["# All.\n\n[b]\nx = 1\n", "[a]\ny = 2\n"].map(str::to_owned);
        assert_eq!(joined(&sources), "# All.\n\n[a]\ny = 2\n\n[b]\nx = 1\n");
    }
}
