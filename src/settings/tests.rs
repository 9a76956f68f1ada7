//! Tests that load all sections together.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use proptest::prelude::*;
use rstest::rstest;

use super::*;

/// Loads a settings file in which `FILE` stands for the path of a file with `content`.
fn loaded(settings: &str, content: &str, mode: u32) -> Result<Settings, SettingsError> {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, content).unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(mode)).unwrap();
    let config = folder.path().join("config.toml");
    fs::write(&config, settings.replace("FILE", secret.to_str().unwrap())).unwrap();
    load(Some(&config), [])
}

/// A file that breaks every rule, and the problems in their order.
#[test]
fn every_broken_rule_is_reported_in_order() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let error = load(Some(&golden.join("broken_settings.toml")), []).unwrap_err();
    let expected = fs::read_to_string(golden.join("broken_settings.txt")).unwrap();
    assert_eq!(error.to_string(), expected.trim_end());
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
fn errors_contain_no_secret(#[case] settings: &str, #[case] content: &str, #[case] expected: &str) {
    let error = loaded(settings, content, 0o600).unwrap_err().to_string();
    assert!(
        error.contains(expected) && !error.contains("s3cret"),
        "{error}"
    );
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
