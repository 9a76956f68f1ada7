//! `[ops_db]`: the operations database.

use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use celery_worker_cli::settings::{Problem, SectionProblems, exposure, is_local, may_be_plain};

/// `[ops_db]`. Keys are those of the Python package, without its prefix `CCAT_OPS_DB_`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpsDb {
    /// Kind of database; decides which of the key groups below is used.
    pub database_type: DatabaseType,
    /// Path of the SQLite file.
    pub database_sqlite_database: PathBuf,
    /// Database name.
    pub database_postgresql_database: String,
    /// Login.
    pub database_postgresql_user: String,
    /// Password of the login.
    pub database_postgresql_password: SecretString,
    /// File that holds the password instead; empty for none.
    pub database_postgresql_password_file: String,
    /// Use of TLS and of certificates, libpq's `sslmode`.
    pub database_postgresql_sslmode: SslMode,
    /// PEM file of authorities for the server's certificate; empty for `PGSSLROOTCERT`, or else the
    /// public ones.
    pub database_postgresql_sslrootcert: String,
    /// PEM file of the client certificate; empty for `PGSSLCERT`, or else none.
    pub database_postgresql_sslcert: String,
    /// PEM file of the certificate's key.
    pub database_postgresql_sslkey: String,
    /// Host name, or the directory of a Unix socket.
    pub database_postgresql_host: String,
    /// TCP port.
    pub database_postgresql_port: u16,
    /// Size of the connection pool.
    pub max_connections: u32,
    /// Wait for a free connection, and for SQLite's write lock.
    #[serde(with = "humantime_serde")]
    pub acquire_timeout: Duration,
    /// Spelling of labels in a plain text column that holds no row yet.
    pub text_enum_labels: EnumLabels,
}

impl OpsDb {
    /// The problem that the password would be sent in plain text to another host, if so.
    pub(super) fn exposure(&self) -> Option<Problem> {
        let mode = match self.database_postgresql_sslmode {
            SslMode::Environment => std::env::var("PGSSLMODE").unwrap_or_default(),
            SslMode::Disable => "disable".into(),
            SslMode::Prefer => "prefer".into(),
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => return None,
        };
        let host = &self.database_postgresql_host;
        let is_exposed = self.database_type == DatabaseType::Postgresql
            && !self.database_postgresql_password.expose_secret().is_empty()
            && may_be_plain(&mode)
            && !is_local(host);
        let secure = "ops_db.database_postgresql_sslmode = \"verify-full\"";
        is_exposed.then(|| exposure("ops_db.database_postgresql_sslmode", host, secure))
    }

    /// Adds the broken rules of the section.
    pub(super) fn check(&self, problems: &mut SectionProblems<'_>) {
        problems.require(
            self.database_postgresql_port > 0,
            "database_postgresql_port",
            "must be above 0",
        );
        problems.require(
            self.database_postgresql_sslcert.is_empty()
                == self.database_postgresql_sslkey.is_empty(),
            "database_postgresql_sslkey",
            "must be given with database_postgresql_sslcert, and only with it",
        );
    }
}

/// Kind of the operations database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseType {
    /// A file.
    Sqlite,
    /// A server.
    Postgresql,
}

/// libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// The mode of the variable `PGSSLMODE`; `prefer` if it is not set.
    #[serde(rename = "")]
    Environment,
    /// No TLS.
    Disable,
    /// TLS if the server supports it; nothing is verified.
    Prefer,
    /// TLS; as `verify-ca` if authorities are given, else nothing is verified.
    Require,
    /// TLS, with a certificate of a trusted authority.
    VerifyCa,
    /// The same, and the certificate must be issued for the requested host.
    VerifyFull,
}

/// Spelling of an enum member in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnumLabels {
    /// `PENDING`: SQLAlchemy's default.
    Names,
    /// `pending`.
    Values,
}
