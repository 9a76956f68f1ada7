//! What a result backend is told.

use secrecy::SecretString;

use celery_protocol::compression::Method;

/// Where results go, and how they are kept there.
#[derive(Debug, Clone)]
pub struct ResultOptions {
    /// Celery's `result_backend`; empty for no results. A secret, since it may hold a password.
    pub url: SecretString,
    /// How long they are kept.
    pub expires: Expires,
    /// Whether `rpc://` results survive a restart of the broker.
    pub persistent: bool,
    /// How results are compressed, in Redis; `None` for not.
    pub compression: Option<Method>,
    /// What concerns Redis only.
    pub redis: RedisOptions,
    /// What concerns databases only.
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
            compression: None,
            redis: RedisOptions::default(),
            database: DatabaseOptions::default(),
        }
    }
}

/// How long results are kept, in seconds; 0 is for ever.
#[derive(Debug, Clone, Copy)]
pub struct Expires {
    /// Any result.
    pub results: u64,
    /// That of a task that failed, where it differs. Redis only.
    pub failures: Option<u64>,
    /// What is noted of the parts of a chord, where it differs.
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

/// What concerns Redis only.
#[derive(Debug, Clone)]
pub struct RedisOptions {
    /// Stands in front of every key (`global_keyprefix`); empty for none.
    pub key_prefix: String,
    /// Name of the master that sentinels are asked for; empty where there are no sentinels.
    pub master_name: String,
    /// Whether the parts of a chord are kept in the order of its header.
    pub chord_ordered: bool,
    /// TLS, as far as the URL does not say.
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

/// How the server is made sure of, and how we are: files in PEM format.
#[derive(Debug, Clone, Default)]
pub struct RedisTls {
    /// `ssl_cert_reqs`: `required` or `none`, also as Python spells them; empty for `required`.
    pub certificate: String,
    /// `ssl_ca_certs`; empty for the public authorities.
    pub authorities: String,
    /// `ssl_certfile`; empty for none.
    pub client_certificate: String,
    /// `ssl_keyfile`; empty for none.
    pub client_key: String,
}

/// What concerns databases only.
#[derive(Debug, Clone)]
pub struct DatabaseOptions {
    /// Whether tables are made where they are missing. None is ever altered.
    pub create_tables: bool,
    /// Table of the results.
    pub tasks: TableName,
    /// Table of the groups that clients saved.
    pub groups: TableName,
}

impl Default for DatabaseOptions {
    fn default() -> Self {
        Self {
            create_tables: true,
            tasks: TableName::default(),
            groups: TableName::default(),
        }
    }
}

/// A table, as far as it has not Celery's own name.
#[derive(Debug, Clone, Default)]
pub struct TableName {
    /// Its schema; empty for the one that the session is in.
    pub schema: String,
    /// Its name; empty for Celery's.
    pub name: String,
}
