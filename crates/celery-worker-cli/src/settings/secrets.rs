//! Secrets that are read from files.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use service_connection::url::with_password;

/// Maximum length of a secret in bytes; the path may wrongly name a file without an end.
const MAX_BYTES: u64 = 64 << 10;

/// Permission bits of users who are neither the owner of a file nor in its group.
const OTHER_USERS: u32 = 0o007;

/// Content of a secret's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// The whole value.
    Value,
    /// The password of the value, which is a URL.
    Password,
}

/// A setting that is a secret, with the key of the setting that names its file.
#[derive(Debug, Clone, Copy)]
pub struct Secret {
    /// Key of the secret.
    pub(super) key: &'static str,
    /// Key of the setting with the file's path.
    pub(super) file: &'static str,
    content: Content,
}

/// Secrets of the sections of this crate. A URL is read from its file before its password is added.
pub(super) const SECRETS: [Secret; 6] = [
    Secret::value("celery.broker_url", "celery.broker_url_file"),
    Secret::password("celery.broker_url", "celery.broker_password_file"),
    Secret::value("celery.result_backend", "celery.result_backend_file"),
    Secret::password(
        "celery.result_backend",
        "celery.result_backend_password_file",
    ),
    Secret::value("http.page_token", "http.page_token_file"),
    Secret::value("traces.headers", "traces.headers_file"),
];

/// A secret that was read from its file.
pub(super) struct Filled {
    /// New value of the setting.
    pub(super) value: String,
    /// Warning about the file's permissions.
    pub(super) warning: Option<String>,
}

impl Secret {
    /// The secret setting `key`; its value may be in the file that the setting `file` names.
    #[must_use]
    pub const fn value(key: &'static str, file: &'static str) -> Self {
        Self {
            key,
            file,
            content: Content::Value,
        }
    }

    /// The setting `key`, a URL; its password may be in the file that the setting `file` names.
    #[must_use]
    pub const fn password(key: &'static str, file: &'static str) -> Self {
        Self {
            key,
            file,
            content: Content::Password,
        }
    }

    /// Returns the value of the setting after `file` was read. `current` is the value before; `stated` is the value
    /// that a layer sets, with the layer's name.
    ///
    /// # Errors
    /// The problem, without the secret.
    pub(super) fn filled(
        &self,
        file: &Path,
        current: &str,
        stated: Option<(&str, &str)>,
    ) -> Result<Filled, String> {
        let both = |source| {
            let what = match self.content {
                Content::Value => "",
                Content::Password => " with a password",
            };
            format!(
                "{} is given{what}, too (from {source}); leave one of the two out",
                self.key
            )
        };
        match (self.content, stated) {
            (Content::Value, Some((text, source))) if !text.is_empty() => return Err(both(source)),
            (Content::Password, Some((url, source))) if has_password(url) => {
                return Err(both(source));
            }
            _ => {}
        }
        let (text, warning) = read(file)?;
        let value = match self.content {
            Content::Value => text,
            Content::Password => with_password(current, &text).ok_or_else(|| {
                format!("{} is not a URL to which a password can be added", self.key)
            })?,
        };
        Ok(Filled { value, warning })
    }
}

/// Reads a file without the line break at its end, and checks its permissions.
fn read(path: &Path) -> Result<(String, Option<String>), String> {
    let shown = path.display();
    let failed = |error: std::io::Error| format!("cannot read {shown}: {error}");
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    let mut text = String::new();
    file.take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(format!("{shown} is too long for a secret"));
    }
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    if secret.is_empty() {
        return Err(format!("{shown} is empty"));
    }
    if secret.contains(char::is_control) {
        return Err(format!(
            "{shown} contains more than one line, or control characters"
        ));
    }
    let warning = (mode & OTHER_USERS != 0).then(|| {
        format!(
            "{shown} is readable by every user of this host (mode {:o}); chmod o= {shown}",
            mode & 0o777
        )
    });
    Ok((secret.to_owned(), warning))
}

/// Returns true if each URL of the setting already has a password.
fn has_password(urls: &str) -> bool {
    // If nothing needs a password, `with_password` returns the text unchanged.
    with_password(urls, "x").is_some_and(|filled| filled == urls)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("amqp://u:p@h//", true)]
    #[case("amqp://u@h//", false)]
    #[case("amqp://u:@h//", false)]
    #[case("amqp://u:p@h//;amqp://v:q@g//", true)]
    #[case("amqp://u:p@h//;amqp://v@g//", false)]
    #[case("sentinel://:p@h;sentinel://g", true)]
    #[case("db+postgresql://u:p@h/d", true)]
    #[case("rpc://", false)]
    fn urls_with_and_without_password(#[case] urls: &str, #[case] has: bool) {
        assert_eq!(has_password(urls), has);
    }
}
