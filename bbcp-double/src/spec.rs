//! `[user@][host:]path`, and the path on this machine.

use crate::failure::{Failure, MISUSE};
use crate::knobs::Knobs;
use serde::{Deserialize, Serialize};

/// Name of the local machine in every message.
pub(crate) const LOCAL_HOST: &str = "localhost";

/// A parsed operand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Text before `@`
    pub(crate) user: Option<String>,
    /// Text before the first `:` that no `/` precedes; brackets of an IPv6 address included
    pub(crate) host: Option<String>,
    /// Path as written, shown in messages
    pub(crate) path: String,
    /// Path on this machine, under the root of its host
    pub(crate) place: String,
}

impl Spec {
    /// Parses an operand. The caller must then call [`Self::locate`].
    ///
    /// # Errors
    /// A user without a host, code 1. A user or host that ssh would interpret as an option, code 99.
    pub(crate) fn parse(operand: &str) -> Result<Self, Failure> {
        let (before_slash, _) = operand.split_once('/').unwrap_or((operand, ""));
        let colon = match before_slash.rfind(']') {
            Some(bracket) if before_slash.contains('[') => before_slash[bracket..]
                .starts_with("]:")
                .then_some(bracket + 1),
            _ => before_slash.find(':'),
        };
        let (login, path) = match colon {
            Some(colon) => (Some(&operand[..colon]), &operand[colon + 1..]),
            None => (None, operand),
        };
        let (user, host, path) = match login {
            Some(login) => match login.split_once('@') {
                Some((user, host)) => (Some(user), Some(host), path),
                None => (None, Some(login), path),
            },
            None => match before_slash.split_once('@') {
                Some((user, _)) => {
                    return Err(Failure::new(
                        1,
                        format!("Missing host name for user {user}"),
                    ));
                }
                None => (None, None, path),
            },
        };
        if [user, host]
            .into_iter()
            .flatten()
            .any(|name| name.starts_with('-'))
        {
            return Err(Failure {
                code: MISUSE,
                lines: vec![format!("DOUBLE: option injection by {operand}")],
            });
        }
        let given = |name: Option<&str>| name.filter(|name| !name.is_empty()).map(str::to_owned);
        Ok(Self {
            user: given(user),
            host: given(host),
            path: path.to_owned(),
            place: path.to_owned(),
        })
    }

    /// Finds the path on this machine. Returns false if the host is unknown.
    pub(crate) fn locate(&mut self, knobs: &Knobs) -> bool {
        let Some(host) = &self.host else { return true };
        match knobs.hosts.iter().find(|(name, _)| name == host) {
            Some((_, root)) => {
                self.place = format!(
                    "{}/{}",
                    root.trim_end_matches('/'),
                    self.path.trim_start_matches('/')
                );
                true
            }
            None => knobs.any_host || knobs.network,
        }
    }

    /// Host as shown in messages.
    pub(crate) fn host_name(&self) -> &str {
        self.host.as_deref().unwrap_or(LOCAL_HOST)
    }

    /// File name as bbcp uses it: the last part of an absolute path, but *all* of a relative one.
    pub(crate) fn file_name(&self) -> &str {
        if self.path.starts_with('/') {
            self.path.rsplit('/').next().unwrap_or(&self.path)
        } else {
            &self.path
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn operands() {
        for (operand, user, host, path) in [
            ("/a/b", None, None, "/a/b"),
            ("h:/a:b@c", None, Some("h"), "/a:b@c"),
            ("u@h:/a", Some("u"), Some("h"), "/a"),
            ("u@[::1]:/a", Some("u"), Some("[::1]"), "/a"),
            ("./c:x", None, None, "./c:x"),
            ("c:x", None, Some("c"), "x"),
            ("/a@b", None, None, "/a@b"),
        ] {
            let spec = Spec::parse(operand).unwrap();
            assert_eq!(
                (
                    spec.user.as_deref(),
                    spec.host.as_deref(),
                    spec.path.as_str()
                ),
                (user, host, path),
                "{operand}"
            );
        }
        assert_eq!(
            Spec::parse("x@-oProxyCommand=y:/p").unwrap_err().code,
            MISUSE
        );
        assert_eq!(Spec::parse("u@foo").unwrap_err().code, 1);
    }
}
