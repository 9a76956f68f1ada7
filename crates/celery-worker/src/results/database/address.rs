//! URLs of databases as SQLAlchemy reads them.

use std::str::FromStr as _;

use sea_orm::sqlx::ConnectOptions as _;
use sea_orm::sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::super::ResultError;
use service_connection::url::{self, UrlParts, host_and_port};

/// libpq's parameters that have an effect here.
const MEANT: [&str; 11] = [
    "application_name",
    "dbname",
    "host",
    "options",
    "password",
    "port",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "user",
];

/// libpq's parameters that have no effect here.
const WITHOUT_EFFECT: [&str; 13] = [
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "prepare_threshold",
    "target_session_attrs",
    "tcp_user_timeout",
];

/// Location and login of a database, from a URL.
pub(super) enum DatabaseUrl {
    Postgres(Box<PgConnectOptions>),
    Sqlite(String),
}

impl DatabaseUrl {
    /// Parses SQLAlchemy's URLs, with any driver: `db+postgresql+psycopg2://user:password@host/db`,
    /// `db+postgresql://user@/db?host=/directory/of/a/socket`, `db+sqlite:///relative/path`,
    /// `db+sqlite:////absolute/path`.
    ///
    /// # Errors
    /// [`ResultError::Unsupported`], or [`ResultError::Url`], which does not contain the URL.
    pub(super) fn parse(url: &str) -> Result<Self, ResultError> {
        let url = url.split_once('+').map_or(url, |(_, url)| url);
        let parts = url::sqlalchemy(url).map_err(|error| wrong(error.to_string()))?;
        let dialect = parts.scheme.split('+').next().unwrap_or_default();
        match dialect {
            "postgresql" | "postgres" => postgres(&parts),
            "sqlite" => sqlite(&parts),
            _ => Err(ResultError::Unsupported(format!("db+{dialect}"))),
        }
    }

    /// Location of the database, without login, for messages.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Postgres(server) => {
                let (host, port) = (server.get_host(), server.get_port());
                let place = match server.get_socket() {
                    Some(socket) => format!("{}:{port}", socket.display()),
                    None => host_and_port(host, port),
                };
                let database = server.get_database().unwrap_or_default();
                format!("postgresql://{place}/{database}")
            }
            Self::Sqlite(path) => format!("sqlite:///{path}"),
        }
    }
}

fn wrong(what: impl Into<String>) -> ResultError {
    ResultError::Url(what.into())
}

/// Options for PostgreSQL. Parameters of the URL take precedence over its other parts, as in libpq.
fn postgres(parts: &UrlParts) -> Result<DatabaseUrl, ResultError> {
    let is_known = |(name, _): &(String, String)| {
        MEANT.contains(&&**name) || WITHOUT_EFFECT.contains(&&**name)
    };
    if !parts.query.iter().all(is_known) {
        return Err(wrong(format!(
            "it has an unknown parameter; known are {}",
            MEANT.join(", ")
        )));
    }
    let host = parts.parameter("host").or(parts.host.as_deref());
    let hosts = parts.query.iter().filter(|(name, _)| name == "host");
    if hosts.count() > 1 || host.is_some_and(|host| host.contains(',')) {
        return Err(wrong("several hosts are not supported"));
    }
    let own_port = parts.port.map(|port| port.to_string());
    let mut port = parts.parameter("port").or(own_port.as_deref());
    let mut host = host;
    // SQLAlchemy's `host:port` in the parameter `host`.
    if let Some((name, after)) = host.and_then(|host| host.split_once(':'))
        && !name.starts_with('/')
        && !after.contains(':')
    {
        (host, port) = (Some(name), Some(after));
    }
    if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
        return Err(wrong("its port is not a number from 1 to 65535"));
    }
    let is_socket = host.is_some_and(|host| host.starts_with('/'));
    let user = parts.parameter("user").or(parts.user.as_deref());
    let password = parts.parameter("password").or(parts.password.as_deref());
    let database = parts.parameter("dbname").or(match parts.path.as_str() {
        "" => None,
        path => Some(path),
    });
    let authorities = parts.parameter("sslrootcert");
    let mode = match parts.parameter("sslmode") {
        // As in libpq; sqlx would not check the server's certificate.
        Some("require") if authorities.is_some() => Some("verify-ca"),
        mode => mode,
    };
    if mode.is_some_and(|mode| mode.parse::<PgSslMode>().is_err()) {
        return Err(wrong(
            "its sslmode must be disable, allow, prefer, require, verify-ca or verify-full",
        ));
    }
    let given = [
        ("host", host),
        ("port", port),
        ("user", user),
        ("password", password),
        ("dbname", database),
        ("sslmode", mode),
        ("sslrootcert", authorities),
        ("sslcert", parts.parameter("sslcert")),
        ("sslkey", parts.parameter("sslkey")),
        ("options", parts.parameter("options")),
    ];
    let given = given
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    // The URL was checked, so no error is expected; an error of the library could quote it.
    let mut server = PgConnectOptions::from_str(&url::libpq(given))
        .map_err(|_| wrong("PostgreSQL's is postgresql://user:password@host:port/database"))?;
    if is_socket {
        // A Unix socket has no TLS; libpq ignores sslmode there, too.
        server = server.ssl_mode(PgSslMode::Disable);
    }
    if let Some(name) = parts.parameter("application_name") {
        server = server.application_name(name);
    }
    Ok(DatabaseUrl::Postgres(Box::new(
        server
            // No floating-point number is received as text, and PgBouncer rejects unknown parameters.
            .extra_float_digits(None)
            .disable_statement_logging(),
    )))
}

fn sqlite(parts: &UrlParts) -> Result<DatabaseUrl, ResultError> {
    let is_uri = parts.parameter("uri").is_some() || parts.path.starts_with("file:");
    match parts.path.as_str() {
        _ if parts.host.is_some() || parts.user.is_some() => Err(wrong(
            "SQLite's has three slashes before a relative path, four before an absolute one: db+sqlite:////path",
        )),
        "" | ":memory:" => Err(wrong(
            "SQLite's is db+sqlite:///path; a database in memory cannot be shared with other processes",
        )),
        _ if is_uri => Err(wrong("SQLite's own `file:` URIs are not supported")),
        path => Ok(DatabaseUrl::Sqlite(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("db+postgresql://u:p%40@h:7/d", "postgresql://h:7/d")]
    #[case("db+postgresql+psycopg2://u:p@h:1/d", "postgresql://h:1/d")]
    #[case(
        "db+postgresql+psycopg://u:p@h:1/d?sslmode=require",
        "postgresql://h:1/d"
    )]
    #[case("database+postgres://u@h:1/d", "postgresql://h:1/d")]
    #[case("db+postgresql://u@:5432/d?host=/dir", "postgresql:///dir:5432/d")]
    #[case(
        "db+postgresql+psycopg2://u@/d?host=/dir&port=6",
        "postgresql:///dir:6/d"
    )]
    #[case("db+postgresql://u@%2Fdir:6/d", "postgresql:///dir:6/d")]
    #[case("db+postgresql://u:p@h:1/d?port=6&host=g", "postgresql://g:6/d")]
    #[case("db+postgresql://u@/d?host=h:5", "postgresql://h:5/d")]
    #[case(
        "db+postgresql://u:p@h:1/d?dbname=e&user=v&connect_timeout=3",
        "postgresql://h:1/e"
    )]
    #[case(
        "db+postgresql://u:p@[::ffff:127.0.0.2]:1/d",
        "postgresql://[::ffff:127.0.0.2]:1/d"
    )]
    #[case("db+postgresql://u:p/#?w@h:1/d%2Fe", "postgresql://h:1/d/e")]
    #[case("db+sqlite:///results.db", "sqlite:///results.db")]
    #[case("db+sqlite+pysqlite:///a%20b.db", "sqlite:///a b.db")]
    #[case("db+sqlite:////var/results.db?timeout=5", "sqlite:////var/results.db")]
    fn urls(#[case] url: &str, #[case] place: &str) {
        let address = DatabaseUrl::parse(url);
        assert_eq!(
            address.map(|address| address.place()).ok().as_deref(),
            Some(place)
        );
    }

    #[rstest]
    #[case("db+mysql://u:secret@h/d", "db+mysql")]
    #[case("db+oracle+cx://u:secret@h/d", "db+oracle")]
    #[case("db+postgresql://u:secret@h:port/d", "its port")]
    #[case("db+postgresql://u:secret@w@h/d", "%40")]
    #[case("db+postgresql://u@h/d?secret=1", "unknown parameter")]
    #[case("db+postgresql://u@h/d?sslmode=secret", "its sslmode")]
    #[case("db+postgresql://u@h/d?port=secret", "its port")]
    #[case("db+postgresql://u:secret@/d?host=g&host=h", "several hosts")]
    #[case("db+postgresql://u:secret@/d?host=g:1,h:2", "several hosts")]
    #[case("db+sqlite://", "memory")]
    #[case("db+sqlite:///:memory:", "memory")]
    #[case("db+sqlite://secret/x.db", "four before an absolute")]
    #[case("db+sqlite:///file:secret?uri=true", "`file:`")]
    #[case("db+secret", "scheme")]
    fn wrong_urls_are_explained_without_their_password(#[case] url: &str, #[case] why: &str) {
        let error = DatabaseUrl::parse(url)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains(why), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
