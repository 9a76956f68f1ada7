//! The names of the worker's own host.

use std::collections::BTreeSet;

/// Names that mean the host this worker runs on.
#[derive(Debug, Clone, Default)]
pub struct LocalHost(BTreeSet<String>);

impl LocalHost {
    /// From this host's own name and further ones (`transfer.local_hosts`).
    ///
    /// A full name stands for its first label too: what a row calls `telescope` is found on
    /// `telescope.ccat.cl` by every resolver with a search domain.
    pub fn new<'a>(own_name: &'a str, further: impl IntoIterator<Item = &'a str>) -> Self {
        let label = own_name.split('.').next().unwrap_or_default();
        let names = [own_name, label, "localhost"].into_iter().chain(further);
        Self(names.map(Self::normal).filter(|n| !n.is_empty()).collect())
    }

    /// Whether `host` is this host.
    pub fn is(&self, host: &str) -> bool {
        self.0.contains(&Self::normal(host))
    }

    pub(super) fn normal(host: &str) -> String {
        host.trim_matches(['[', ']'])
            .trim_end_matches('.')
            .to_ascii_lowercase()
    }
}

#[cfg(test)]
mod tests {
    use super::LocalHost;

    #[test]
    fn names_of_this_host() {
        let local = LocalHost::new("fyst.ccat.cl", ["::1"]);
        for name in [
            "FYST.ccat.cl",
            "fyst",
            "fyst.ccat.cl.",
            "localhost",
            "[::1]",
        ] {
            assert!(local.is(name), "{name}");
        }
        for name in ["fyst.other.cl", "ccat.cl", "", "127.0.0.1"] {
            assert!(!local.is(name), "{name}");
        }
    }
}
