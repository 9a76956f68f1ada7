//! Passwords that would be sent in plain text.

use std::net::IpAddr;

use ::url::Url;
use secrecy::ExposeSecret;

use super::{Celery, Problem, Traces};
use celery_worker::broker::amqp::SCHEMES;
use celery_worker::broker::redis::has_scheme;
use service_connection::url::{self, UrlParts};

impl Celery {
    /// Passwords of the broker and the result backend that would be sent in plain text to another host.
    #[must_use]
    pub fn exposures(&self) -> Vec<Problem> {
        let tls = &self.redis_backend_use_ssl;
        let redis_has_tls = [
            &tls.ssl_cert_reqs,
            &tls.ssl_ca_certs,
            &tls.ssl_certfile,
            &tls.ssl_keyfile,
        ]
        .iter()
        .any(|text| !text.is_empty());
        let is_database = self.result_backend().starts_with("db+");
        let broker_has_tls = has_scheme(self.broker_url()) && !self.broker_ssl_ca_file.is_empty();
        let mut found: Vec<_> = match broker_has_tls {
            true => Vec::new(),
            false => exposed_urls("celery.broker_url", self.broker_url())
                .into_iter()
                .collect(),
        };
        if is_database || !redis_has_tls {
            found.extend(exposed_urls("celery.result_backend", self.result_backend()));
        }
        found
    }
}

impl Traces {
    /// The headers, if they would be sent in plain text to another host.
    #[must_use]
    pub fn exposure(&self) -> Option<Problem> {
        let url = Url::parse(&self.endpoint).ok()?;
        let host = url.host_str()?;
        let is_exposed =
            url.scheme() == "http" && !self.headers.expose_secret().is_empty() && !is_local(host);
        is_exposed.then(|| Problem {
            key: "traces.headers".into(),
            message: format!(
                "they go to {host} in plain text, readable on the network; use https://"
            ),
            source: String::new(),
        })
    }
}

/// A warning if the password of one of the URLs, with `;` between them, would be sent in plain text to another host.
#[must_use]
pub fn exposed_urls(key: &str, urls: &str) -> Option<Problem> {
    let url = parsed(urls).into_iter().find(is_exposed)?;
    let secure = match url.scheme.as_str() {
        scheme if SCHEMES.contains(&scheme) => "amqps://",
        "redis" | "redis+redis" => "rediss://",
        "sentinel" => "[celery.redis_backend_use_ssl]",
        _ => "?sslmode=verify-full",
    };
    Some(exposure(key, host_of(&url), secure))
}

/// The warning that a password is sent in plain text to `host`; `secure` is the setting that prevents it.
#[must_use]
pub fn exposure(key: &str, host: &str, secure: &str) -> Problem {
    Problem {
        key: key.into(),
        message: format!(
            "the password goes to {host} in plain text, readable on the network; use {secure}"
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

/// Returns true if libpq's `sslmode` accepts a server without TLS.
#[must_use]
pub fn may_be_plain(mode: &str) -> bool {
    matches!(mode, "" | "disable" | "allow" | "prefer")
}

/// Returns true for names and addresses of this host, and for the path of a Unix socket.
#[must_use]
pub fn is_local(host: &str) -> bool {
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
