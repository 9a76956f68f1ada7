//! Passwords that would travel in plain text.

use std::net::IpAddr;

use ::url::Url;
use secrecy::ExposeSecret;

use super::{DatabaseType, Problem, Settings, SslMode};
use celery_worker::broker::amqp::SCHEMES;
use service_connection::url::{self, UrlParts};

/// One warning for each service on another host that gets a password without TLS.
pub(super) fn exposures(settings: &Settings) -> Vec<Problem> {
    let mut found = Vec::new();
    let celery = &settings.celery;
    let tls = &celery.redis_backend_use_ssl;
    let redis_has_tls = [
        &tls.ssl_cert_reqs,
        &tls.ssl_ca_certs,
        &tls.ssl_certfile,
        &tls.ssl_keyfile,
    ]
    .iter()
    .any(|text| !text.is_empty());
    let is_database = celery.result_backend().starts_with("db+");
    for (key, urls) in [
        ("celery.broker_url", celery.broker_url()),
        (
            "celery.result_backend",
            match redis_has_tls && !is_database {
                true => "",
                false => celery.result_backend(),
            },
        ),
        (
            "health.redis_url",
            settings.health.redis_url.expose_secret(),
        ),
    ] {
        let exposed = parsed(urls).into_iter().find(is_exposed);
        if let Some(url) = exposed {
            let secure = match url.scheme.as_str() {
                scheme if SCHEMES.contains(&scheme) => "amqps://",
                "redis" | "redis+redis" => "rediss://",
                "sentinel" => "[celery.redis_backend_use_ssl]",
                _ => "?sslmode=verify-full",
            };
            found.push(warning(key, host_of(&url), secure));
        }
    }
    let traces = &settings.traces;
    if let Ok(url) = Url::parse(&traces.endpoint)
        && url.scheme() == "http"
        && !traces.headers.expose_secret().is_empty()
        && let Some(host) = url.host_str().filter(|host| !is_local(host))
    {
        found.push(Problem {
            key: "traces.headers".into(),
            message: format!(
                "they go to {host} in plain text, for everybody on the way to read; use https://"
            ),
            source: String::new(),
        });
    }
    let database = &settings.ops_db;
    let mode = match database.database_postgresql_sslmode {
        SslMode::Environment => std::env::var("PGSSLMODE").unwrap_or_default(),
        SslMode::Disable => "disable".into(),
        SslMode::Prefer => "prefer".into(),
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => return found,
    };
    let host = &database.database_postgresql_host;
    if database.database_type == DatabaseType::Postgresql
        && !database
            .database_postgresql_password
            .expose_secret()
            .is_empty()
        && may_be_plain(&mode)
        && !is_local(host)
    {
        let secure = "ops_db.database_postgresql_sslmode = \"verify-full\"";
        found.push(warning("ops_db.database_postgresql_sslmode", host, secure));
    }
    found
}

fn warning(key: &str, host: &str, secure: &str) -> Problem {
    Problem {
        key: key.into(),
        message: format!(
            "the password goes to {host} in plain text, for everybody on the way to read; use {secure}"
        ),
        source: String::new(),
    }
}

/// The parts of one URL or of several.
fn parsed(urls: &str) -> Vec<UrlParts> {
    let database = ["db+", "database+"];
    match database.iter().find_map(|prefix| urls.strip_prefix(prefix)) {
        Some(url) => url::sqlalchemy(url).into_iter().collect(),
        None => {
            let urls = urls.split(';').filter_map(|url| url::kombu(url).ok());
            urls.collect()
        }
    }
}

/// The host, which may be a parameter in the URL of a database.
fn host_of(url: &UrlParts) -> &str {
    let host = url.parameter("host").or(url.host.as_deref());
    host.unwrap_or_default()
}

fn is_exposed(url: &UrlParts) -> bool {
    let plain = match url.scheme.as_str() {
        "amqps" => false,
        "redis" | "redis+redis" | "sentinel" => true,
        scheme if SCHEMES.contains(&scheme) => true,
        scheme if scheme.starts_with("postgres") => {
            may_be_plain(url.parameter("sslmode").unwrap_or_default())
        }
        _ => false,
    };
    let has_password = url.password.is_some() || url.parameter("password").is_some();
    plain && has_password && !is_local(host_of(url))
}

/// Whether libpq's `sslmode` lets a server do without TLS.
fn may_be_plain(mode: &str) -> bool {
    matches!(mode, "" | "disable" | "allow" | "prefer")
}

/// Whether what is sent to a host stays on this one; a path is a Unix socket's.
fn is_local(host: &str) -> bool {
    let bare = host.trim_matches(['[', ']']);
    let bare = bare.split('%').next().unwrap_or(bare);
    host.is_empty()
        || host.starts_with('/')
        || host.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("amqp://u:p@far//", true)]
    #[case("amqp://u@far//", false)]
    #[case("amqps://u:p@far//", false)]
    #[case("amqp://u:p@127.0.0.1:5672//", false)]
    #[case("amqp://u:p@[::1]//", false)]
    #[case("amqp://u:p@localhost//", false)]
    #[case("redis://:p@10.0.0.1/0", true)]
    #[case("rediss://:p@10.0.0.1/0", false)]
    #[case("db+postgresql+psycopg2://u:p@far/d", true)]
    #[case("db+postgresql://u:p@far/d?sslmode=require", false)]
    #[case("db+sqlite:///x", false)]
    #[case("pyamqp://u:p@far//", true)]
    #[case("amqp://u@near//;amqp://u:p@far//", true)]
    #[case("amqp://u:p@[::ffff:127.0.0.1]//", false)]
    #[case("db+postgresql://u:p@/d?host=/run", false)]
    #[case("db+postgresql://u@/d?host=far&password=p", true)]
    fn plain_text_to_another_host(#[case] url: &str, #[case] exposed: bool) {
        assert_eq!(parsed(url).iter().any(is_exposed), exposed);
    }
}
