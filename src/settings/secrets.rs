//! Secrets that files hold, and how a URL is shown without its own.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use service_connection::url::with_password;

/// No secret is longer; a wrong path may lead to a file that never ends.
const MAX_BYTES: u64 = 64 << 10;

/// Permissions of whoever is neither the file's owner nor in its group.
const OTHERS: u32 = 0o007;

/// What a secret's file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// The value.
    Whole,
    /// The password of the value, which is a URL.
    Password,
}

/// A setting that is a secret, with the key of the file that may hold it.
#[derive(Debug)]
pub(super) struct Secret {
    /// Key of the secret itself.
    pub(super) key: &'static str,
    /// Key of the file.
    pub(super) file: &'static str,
    content: Content,
}

/// All of them. A URL that a file holds is there before its password is filled in.
pub(super) const SECRETS: [Secret; 8] = [
    secret("celery.broker_url", "celery.broker_url_file"),
    password("celery.broker_url", "celery.broker_password_file"),
    secret("celery.result_backend", "celery.result_backend_file"),
    password(
        "celery.result_backend",
        "celery.result_backend_password_file",
    ),
    secret(
        "ops_db.database_postgresql_password",
        "ops_db.database_postgresql_password_file",
    ),
    secret(
        "notifications.webhook_url",
        "notifications.webhook_url_file",
    ),
    secret("health.redis_url", "health.redis_url_file"),
    secret("traces.headers", "traces.headers_file"),
];

const fn secret(key: &'static str, file: &'static str) -> Secret {
    Secret {
        key,
        file,
        content: Content::Whole,
    }
}

const fn password(key: &'static str, file: &'static str) -> Secret {
    Secret {
        key,
        file,
        content: Content::Password,
    }
}

/// A secret that was read.
pub(super) struct Filled {
    /// The setting's value from now on.
    pub(super) value: String,
    /// What is risky about its file.
    pub(super) warning: Option<String>,
}

impl Secret {
    /// The setting's value with what `file` holds. `current` is the value until now, `stated` the
    /// same with its source where some layer has given it.
    ///
    /// # Errors
    /// What is wrong, without the secret.
    pub(super) fn filled(
        &self,
        file: &Path,
        current: &str,
        stated: Option<(&str, &str)>,
    ) -> Result<Filled, String> {
        let both = |source| {
            let what = match self.content {
                Content::Whole => "",
                Content::Password => " with a password",
            };
            format!(
                "{} is given{what}, too (from {source}); leave one of the two out",
                self.key
            )
        };
        match (self.content, stated) {
            (Content::Whole, Some((text, source))) if !text.is_empty() => return Err(both(source)),
            (Content::Password, Some((url, source))) if has_password(url) => {
                return Err(both(source));
            }
            _ => {}
        }
        let (text, warning) = read(file)?;
        let value = match self.content {
            Content::Whole => text,
            Content::Password => with_password(current, &text).ok_or_else(|| {
                format!("{} is not a URL to which a password can be added", self.key)
            })?,
        };
        Ok(Filled { value, warning })
    }
}

/// A file's content without the line break at its end, and what is risky about the file.
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
        return Err(format!("{shown} is longer than any secret"));
    }
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    if secret.is_empty() {
        return Err(format!("{shown} is empty"));
    }
    if secret.contains(char::is_control) {
        return Err(format!(
            "{shown} has more than one line, or control characters, in it"
        ));
    }
    let warning = (mode & OTHERS != 0).then(|| {
        format!(
            "{shown} is open to every user of this host (mode {:o}); chmod o= {shown}",
            mode & 0o777
        )
    });
    Ok((secret.to_owned(), warning))
}

/// Returns true if each URL of the setting has a password already.
fn has_password(urls: &str) -> bool {
    // If there is nothing to fill in, the URL is returned unchanged.
    with_password(urls, "x").is_some_and(|filled| filled == urls)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs::{self, Permissions};

    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;
    use crate::settings::{Settings, SettingsError, load};

    /// Loads a file of settings in which `FILE` stands for one that holds `content`.
    fn loaded(settings: &str, content: &str, mode: u32) -> Result<Settings, SettingsError> {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, content).unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(mode)).unwrap();
        let config = folder.path().join("config.toml");
        fs::write(&config, settings.replace("FILE", secret.to_str().unwrap())).unwrap();
        load(Some(&config), [])
    }

    #[rstest]
    #[case("amqp://u:p@h//", true)]
    #[case("amqp://u@h//", false)]
    #[case("amqp://u:@h//", false)]
    #[case("amqp://u:p@h//;amqp://v:q@g//", true)]
    #[case("amqp://u:p@h//;amqp://v@g//", false)]
    #[case("sentinel://:p@h;sentinel://g", true)]
    #[case("db+postgresql://u:p@h/d", true)]
    #[case("rpc://", false)]
    fn passwords_are_found(#[case] urls: &str, #[case] has: bool) {
        assert_eq!(has_password(urls), has);
    }

    #[test]
    fn a_file_holds_a_secret() {
        let settings = loaded(
            "[ops_db]\ndatabase_postgresql_password_file = 'FILE'",
            "s3cret \n",
            0o640,
        )
        .unwrap();
        let password = &settings.ops_db.database_postgresql_password;
        assert_eq!(secrecy::ExposeSecret::expose_secret(password), "s3cret ");
        assert_eq!(settings.warnings, []);
        let settings = loaded(
            "[celery]\nbroker_url = 'amqp://ccat@localhost//'\nbroker_password_file = 'FILE'",
            "s3cret",
            0o644,
        )
        .unwrap();
        assert_eq!(
            settings.celery.broker_url(),
            "amqp://ccat:s3cret@localhost//"
        );
        let [warning] = settings.warnings.as_slice() else {
            unreachable!("{:?}", settings.warnings)
        };
        assert_eq!(warning.key, "celery.broker_password_file");
        assert!(warning.message.contains("mode 644"), "{warning}");
    }

    #[rstest]
    #[case(
        "[ops_db]\ndatabase_postgresql_password = 'a'\ndatabase_postgresql_password_file = 'FILE'",
        "s3cret",
        "database_postgresql_password is given, too"
    )]
    #[case(
        "[celery]\nbroker_url = 'amqp://u:p@h//'\nbroker_password_file = 'FILE'",
        "s3cret",
        "broker_url is given with a password, too"
    )]
    #[case(
        "[celery]\nbroker_url_file = 'FILE'\nbroker_password_file = 'FILE'",
        "amqp://u:s3cret@h//",
        "celery.broker_password_file"
    )]
    #[case(
        "[ops_db]\ndatabase_postgresql_password = ['s3cret']",
        "x",
        "must be a text"
    )]
    #[case(
        "[ops_db]\ndatabase_postgresql_password = 's3cret",
        "x",
        "TOML parse error at line 2"
    )]
    #[case("[health]\nredis_url_file = 'FILE'", "\n", "is empty")]
    #[case(
        "[health]\nredis_url_file = 'FILE'",
        "s3cret\nx\n",
        "more than one line"
    )]
    #[case("[health]\nredis_url_file = 'FILE.no'", "s3cret", "cannot read")]
    #[case(
        "[health]\nredis_url_file = 'FILE'",
        "s3cret",
        "health.redis_url: the URL cannot be used"
    )]
    fn what_is_wrong_is_told_without_the_secret(
        #[case] settings: &str,
        #[case] content: &str,
        #[case] told: &str,
    ) {
        let error = loaded(settings, content, 0o600).unwrap_err().to_string();
        assert!(error.contains(told) && !error.contains("s3cret"), "{error}");
    }

    proptest! {
        /// The result of reading settings, including an error, contains no secret.
        #[test]
        fn no_secret_is_shown(
            before in "[a-z0-9@:/;%#?&=+ \\[\\]]{0,5}",
            after in "[a-z0-9@:/;%#?&=+\\[\\]]{0,5}",
            encode: bool,
            key in 0_usize..4,
            shape in 0_usize..8,
        ) {
            let mark = "S3CRET";
            let password = format!("{before}{mark}{after}");
            let password = match encode {
                true => percent_encoding::utf8_percent_encode(&password, percent_encoding::NON_ALPHANUMERIC).to_string(),
                false => password,
            };
            let url = match shape {
                0 => format!("amqp://u:{password}@far:1//v"),
                1 => format!("amqp://a:{password}@far//;pyamqp://b:{password}@[::1]:1//"),
                2 => format!("redis://:{password}@far/0"),
                3 => format!("sentinel://:{password}@far;sentinel://:{password}@h"),
                4 => format!("db+postgresql://u:{password}@far/d"),
                5 => format!("rediss://u:{password}@far/0?ssl_cert_reqs=none"),
                6 => format!("{mark}{password}"),
                _ => format!("amqp://u:{password}@far:99999//"),
            };
            let key = ["celery.broker_url", "celery.result_backend", "health.redis_url", "ops_db.database_postgresql_password"][key];
            let variable = format!("CCAT_DATA_TRANSFER_{}", key.replace('.', "__").to_uppercase());
            let shown = match load(None, [(variable, url.clone())]) {
                Err(error) => error.to_string(),
                Ok(settings) => {
                    let warnings: Vec<_> = settings.warnings.iter().map(ToString::to_string).collect();
                    format!("{settings:?} {} {warnings:?}", settings.celery.shown())
                }
            };
            prop_assert!(!shown.contains(mark), "{} = {}: {}", key, url, shown);
        }
    }
}
