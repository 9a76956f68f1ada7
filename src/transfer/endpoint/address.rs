//! Checked names for bbcp, ssh and a shell. Code that receives values of these types need not check them again.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::Path;

use super::temporary::TemporaryName;

/// Longest host name in DNS.
const MAX_HOST_BYTES: usize = 253;

/// Longest file name on the usual file systems.
const MAX_NAME_BYTES: usize = 255;

/// A host name or address that neither ssh nor bbcp can interpret as an option.
///
/// bbcp passes `x@-oProxyCommand=…` to ssh as an option, so the pattern is strict.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Host {
    /// Name or address; an IPv6 address without brackets.
    name: String,
    ipv6: bool,
}

impl Host {
    /// Checks the host of a database row: a name, an IPv4 or an IPv6 address, the latter with or without brackets.
    ///
    /// # Errors
    /// The text is neither a host name nor an address; the error describes the problem.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        let bare = text
            .strip_prefix('[')
            .and_then(|t| t.strip_suffix(']'))
            .unwrap_or(text);
        if bare.parse::<Ipv6Addr>().is_ok() {
            return Ok(Self {
                name: bare.into(),
                ipv6: true,
            });
        }
        let alphanumeric = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        if !alphanumeric(bytes.first()) || !alphanumeric(bytes.last()) {
            return Err("a host name begins and ends with a letter or digit");
        }
        if !bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'))
        {
            return Err(
                "a host name contains only letters, digits, `.` and `-`; a login belongs in `ssh.user`, a \
                 port in `ssh.port`",
            );
        }
        if bytes.len() > MAX_HOST_BYTES {
            return Err("a host name has at most 253 bytes");
        }
        Ok(Self {
            name: text.into(),
            ipv6: false,
        })
    }

    /// Form for ssh: without brackets.
    pub fn as_ssh(&self) -> &str {
        &self.name
    }

    /// Form for bbcp in front of a path: an IPv6 address in brackets.
    pub fn as_bbcp(&self) -> String {
        if self.ipv6 {
            format!("[{}]", self.name)
        } else {
            self.name.clone()
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Returns true if `user` is a login name that ssh cannot interpret as an option.
pub fn is_login(user: &str) -> bool {
    let mut bytes = user.bytes();
    bytes
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
}

/// A normalised absolute path without `..` and without control characters.
///
/// An absolute path is neither an option nor `host:path`, for any components.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AbsolutePath(String);

impl AbsolutePath {
    /// Checks and normalises a path: removes `//`, `/./` and a trailing `/`.
    ///
    /// # Errors
    /// The path is not absolute or not safe; the error describes the problem.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        if !text.starts_with('/') {
            return Err("it must be absolute");
        }
        Self("/".into()).join(text)
    }

    /// The root directory.
    pub fn root() -> Self {
        Self("/".into())
    }

    /// The path below this one; `relative` may have several components, or none.
    ///
    /// # Errors
    /// The resulting path is not safe; the error describes the problem.
    pub fn join(&self, relative: &str) -> Result<Self, &'static str> {
        if relative.contains(char::is_control) {
            return Err("it must not contain control characters");
        }
        let mut path = self.0.trim_end_matches('/').to_owned();
        for component in relative.split('/') {
            match component {
                "" | "." => {}
                ".." => return Err("it must not contain `..`"),
                _ if component.len() > MAX_NAME_BYTES => {
                    return Err("a component has at most 255 bytes");
                }
                _ => {
                    path.push('/');
                    path.push_str(component);
                }
            }
        }
        if path.is_empty() {
            path.push('/');
        }
        Ok(Self(path))
    }

    /// Path of a temporary copy in the same directory.
    pub(super) fn temporary(&self, name: &TemporaryName) -> Self {
        self.sibling(&name.to_string())
    }

    /// The path of a temporary's checkpoint directory in the same directory.
    pub(super) fn checkpoints(&self, name: &TemporaryName) -> Self {
        self.sibling(&name.checkpoints())
    }

    fn sibling(&self, name: &str) -> Self {
        let directory = self.parent();
        Self(format!("{}/{name}", directory.0.trim_end_matches('/')))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path as a path of this host.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// The last component; `None` for the root.
    pub fn file_name(&self) -> Option<&str> {
        self.0
            .rsplit_once('/')
            .map(|(_, name)| name)
            .filter(|name| !name.is_empty())
    }

    /// The directory of the path; for the root, the root itself.
    pub fn parent(&self) -> Self {
        match self.0.rsplit_once('/') {
            Some((directory, _)) if !directory.is_empty() => Self(directory.into()),
            _ => Self("/".into()),
        }
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("telescope.ccat.cl", Some("telescope.ccat.cl"))]
    #[case("a", Some("a"))]
    #[case("10.0.0.1", Some("10.0.0.1"))]
    #[case("::1", Some("[::1]"))]
    #[case("[fe80::1]", Some("[fe80::1]"))]
    #[case("", None)]
    #[case("-oProxyCommand=id", None)]
    #[case("host-", None)]
    #[case("user@host", None)]
    #[case("host:22", None)]
    #[case("ho st", None)]
    #[case("[host]", None)]
    #[case("höst", None)]
    fn hosts(#[case] text: &str, #[case] bbcp: Option<&str>) {
        assert_eq!(Host::new(text).ok().map(|h| h.as_bbcp()).as_deref(), bbcp);
    }

    #[rstest]
    #[case("transfer", true)]
    #[case("_ccat-2", true)]
    #[case("-l", false)]
    #[case("", false)]
    #[case("Root", false)]
    #[case("a b", false)]
    fn logins(#[case] user: &str, #[case] good: bool) {
        assert_eq!(is_login(user), good);
    }

    #[rstest]
    #[case("/data//fyst/./x/", Some("/data/fyst/x"))]
    #[case("/", Some("/"))]
    #[case("/a b/c:d@e/-f", Some("/a b/c:d@e/-f"))]
    #[case("data", None)]
    #[case("", None)]
    #[case("/a/../b", None)]
    #[case("/a\nb", None)]
    #[case("/a\tb", None)]
    #[case("/a\0b", None)]
    fn paths(#[case] text: &str, #[case] normal: Option<&str>) {
        let path = AbsolutePath::new(text).ok();
        assert_eq!(path.as_ref().map(AbsolutePath::as_str), normal);
    }

    #[test]
    fn parts() {
        let path = AbsolutePath::new("/a/b").unwrap_or_else(|e| unreachable!("{e}"));
        assert_eq!(path.file_name(), Some("b"));
        assert_eq!(path.parent().as_str(), "/a");
        assert_eq!(path.parent().parent().as_str(), "/");
        assert_eq!(path.parent().parent().file_name(), None);
        assert_eq!(path.parent().parent().parent().as_str(), "/");
    }

    proptest! {
        #[test]
        fn a_path_stays_below_its_root(text in "\\PC*") {
            let root = AbsolutePath::new("/root").unwrap_or_else(|e| unreachable!("{e}"));
            if let Ok(path) = root.join(&text) {
                prop_assert!(path.as_str() == "/root" || path.as_str().starts_with("/root/"));
                prop_assert!(!path.as_str().split('/').any(|c| c == ".." || c == "."));
            }
        }

        #[test]
        fn no_host_is_an_option(text in any::<String>()) {
            if let Ok(host) = Host::new(&text) {
                prop_assert!(!host.as_ssh().starts_with('-'));
                prop_assert!(!host.as_ssh().contains(|c: char| c.is_whitespace() || c.is_control()));
            }
        }
    }
}
