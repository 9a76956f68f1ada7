//! Options of a result backend.

use secrecy::SecretString;

use celery_protocol::compression::Method;
use celery_protocol::content::Serializer;

/// URL of the result backend, and the way it stores results.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ResultOptions {
    /// Celery's `result_backend`; empty for no results. A secret, since it may contain a password.
    pub url: SecretString,
    /// Time that results are kept.
    pub expires: Expires,
    /// True if `rpc://` results survive a restart of the broker.
    pub persistent: bool,
    /// Serializer of results (`result_serializer`), by which stored results are read, too.
    pub serializer: Serializer,
    /// Compression of results in Redis; `None` for no compression.
    pub compression: Option<Method>,
    /// Options of Redis.
    pub redis: RedisOptions,
    /// Options of databases.
    pub database: DatabaseOptions,
}

impl ResultOptions {
    /// Celery's defaults for the backend at `url`.
    #[must_use]
    pub fn new(url: impl Into<SecretString>) -> Self {
        Self {
            url: url.into(),
            expires: Expires::default(),
            persistent: false,
            serializer: Serializer::default(),
            compression: None,
            redis: RedisOptions::default(),
            database: DatabaseOptions::default(),
        }
    }
}

/// Times that results are kept, in seconds; 0 for no limit.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Expires {
    /// Time for any result.
    pub results: u64,
    /// Time for the result of a failed task, if it differs. Only for Redis.
    pub failures: Option<u64>,
    /// Time for the records of the parts of a chord, if it differs.
    pub chords: Option<u64>,
}

impl Default for Expires {
    fn default() -> Self {
        Self {
            results: 86_400,
            failures: None,
            chords: None,
        }
    }
}

/// Options of Redis.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RedisOptions {
    /// Prefix of every key (`global_keyprefix`); empty for none.
    pub key_prefix: String,
    /// Name of the master that sentinels report; empty without sentinels.
    pub master_name: String,
    /// True if the parts of a chord are kept in the order of its header.
    pub chord_ordered: bool,
    /// TLS options for values that the URL does not set.
    pub tls: RedisTls,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            key_prefix: String::new(),
            master_name: String::new(),
            chord_ordered: true,
            tls: RedisTls::default(),
        }
    }
}

/// Verification of the server's certificate, and the client certificate: files in PEM format.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RedisTls {
    /// `ssl_cert_reqs`: `required` or `none`, or Python's names for them; empty for `required`.
    pub certificate: String,
    /// `ssl_ca_certs`; empty for the public certificate authorities.
    pub authorities: String,
    /// `ssl_certfile`; empty for none.
    pub client_certificate: String,
    /// `ssl_keyfile`; empty for none.
    pub client_key: String,
}

/// Options of databases.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DatabaseOptions {
    /// Name of the connections in PostgreSQL, unless the URL has `application_name`.
    pub application_name: String,
    /// True if missing tables are created. An existing table is never altered.
    pub create_tables: bool,
    /// Table of the results.
    pub tasks: TableName,
    /// Table of the saved groups of clients.
    pub groups: TableName,
}

impl Default for DatabaseOptions {
    fn default() -> Self {
        Self {
            application_name: "celery results".into(),
            create_tables: true,
            tasks: TableName::default(),
            groups: TableName::default(),
        }
    }
}

/// Name of a table, if it differs from Celery's.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TableName {
    /// Schema; empty for the current schema of the session.
    pub schema: String,
    /// Name; empty for Celery's.
    pub name: String,
}

impl TableName {
    /// A table in a schema; each may be empty.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            schema: schema.into(),
            name: name.into(),
        }
    }
}
