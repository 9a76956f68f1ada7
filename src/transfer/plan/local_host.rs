//! Names of the worker's own host.

use std::collections::BTreeSet;

use crate::settings::Transfer;

/// Names of the host on which this worker runs.
#[derive(Debug, Clone, Default)]
pub struct LocalHost(BTreeSet<String>);

impl LocalHost {
    /// Collects this host's own name and further names (`transfer.local_hosts`).
    ///
    /// The first label of a full name counts too: resolvers with a search domain find the `telescope` of a row as
    /// `telescope.ccat.cl`.
    pub fn new<'a>(own_name: &'a str, further: impl IntoIterator<Item = &'a str>) -> Self {
        let label = own_name.split('.').next().unwrap_or_default();
        let names = [own_name, label, "localhost"].into_iter().chain(further);
        Self(
            names
                .map(Self::normalize)
                .filter(|n| !n.is_empty())
                .collect(),
        )
    }

    /// The names of this host with those of the settings.
    pub fn of_settings(own_name: &str, settings: &Transfer) -> Self {
        Self::new(own_name, settings.local_hosts.iter().map(String::as_str))
    }

    /// Returns true if `host` is a name of this host.
    pub fn has_name(&self, host: &str) -> bool {
        self.0.contains(&Self::normalize(host))
    }

    pub(super) fn normalize(host: &str) -> String {
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
            assert!(local.has_name(name), "{name}");
        }
        for name in ["fyst.other.cl", "ccat.cl", "", "127.0.0.1"] {
            assert!(!local.has_name(name), "{name}");
        }
    }
}
