//! Redis URLs as Celery writes them.

use std::fs;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use redis::sentinel::SentinelClient;
use redis::{
    Client, ClientTlsConfig, ConnectionAddr, IntoConnectionInfo, ProtocolVersion,
    RedisConnectionInfo, TlsCertificates,
};
use service_connection::url::{self, UrlParts, host_and_port};

use super::SentinelLogin;
use crate::results::RedisTls;

mod sentinels;

/// Reason why a URL cannot be used, without the URL.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct RedisUrlError(String);

/// Settings beside a URL.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressOptions {
    /// TLS options for values that the URL does not set.
    pub(crate) tls: RedisTls,
    /// Name of the master that sentinels report; empty without sentinels.
    pub(crate) master_name: String,
    /// Login at the sentinels.
    pub(crate) sentinel: SentinelLogin,
}

/// A Redis server, or the sentinels that know its address.
#[derive(Debug)]
pub(crate) struct RedisUrl {
    endpoints: Vec<Endpoint>,
    /// Name of the master; the endpoints are then those of its sentinels.
    master: Option<String>,
    login: RedisConnectionInfo,
    sentinel: SentinelLogin,
    certificates: Option<Certificates>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Endpoint {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Certificates for a TLS connection.
#[derive(Debug)]
struct Certificates {
    is_verified: bool,
    files: TlsCertificates,
}

/// A client of a server or of sentinels.
pub(crate) enum Opened {
    Server(Client),
    Sentinels(SentinelClient),
}

impl RedisUrl {
    /// Parses a URL: `redis://[user:password@]host:port/db`, `rediss://…?ssl_ca_certs=…`,
    /// `redis+socket:///path?virtual_host=db`, `sentinel://host:port/db;sentinel://…`.
    ///
    /// # Errors
    /// The reason, without the URL.
    pub(crate) fn parse(url: &str, options: &AddressOptions) -> Result<Self, RedisUrlError> {
        Self::from_parts(parts(url)?, options)
    }

    /// Parses a list of URLs with `;` between them: servers, used one after another when one fails, or the
    /// sentinels of one server.
    ///
    /// # Errors
    /// The reason, without the URL.
    pub(crate) fn parse_list(
        urls: &str,
        options: &AddressOptions,
    ) -> Result<Vec<Self>, RedisUrlError> {
        let parts = parts(urls)?;
        if parts
            .first()
            .is_some_and(|first| first.scheme == "sentinel")
        {
            return Ok(vec![Self::from_parts(parts, options)?]);
        }
        let servers = parts.into_iter();
        servers
            .map(|part| Self::from_parts(vec![part], options))
            .collect()
    }

    fn from_parts(parts: Vec<UrlParts>, options: &AddressOptions) -> Result<Self, RedisUrlError> {
        // Of several URLs, the first one contains login and database.
        let Some(first) = parts.first() else {
            return Err(wrong("it is empty"));
        };
        let scheme = first.scheme.clone();
        if parts.len() > 1 && scheme != "sentinel" {
            return Err(wrong("only `sentinel://` allows several URLs"));
        }
        let login = login(first)?;
        let tls = tls(first, &options.tls)?;
        let certificates = match scheme.as_str() {
            "redis" | "rediss" | "sentinel" => certificates(&scheme, &tls)?,
            _ => None,
        };
        let master = match (scheme.as_str(), options.master_name.as_str()) {
            ("sentinel", "") => {
                return Err(wrong(
                    "`sentinel://` needs the option `master_name`, \
                     the name that the sentinels know the server by",
                ));
            }
            ("sentinel", name) => Some(name.to_owned()),
            _ => None,
        };
        let endpoints = parts
            .iter()
            .map(|part| endpoint(part, &scheme))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            endpoints,
            master,
            login,
            sentinel: options.sentinel.clone(),
            certificates,
        })
    }

    /// Number of the database.
    pub(crate) fn db(&self) -> i64 {
        self.login.db()
    }

    /// True if the server's certificate is not verified.
    pub(crate) fn is_unverified(&self) -> bool {
        self.certificates.as_ref().is_some_and(|c| !c.is_verified)
    }

    /// Uses version 3 of the protocol, in which the server sends messages without a request.
    #[must_use]
    pub(crate) fn with_resp3(mut self) -> Self {
        self.login = self.login.set_protocol(ProtocolVersion::RESP3);
        self
    }

    /// Location of the server, without login, for messages.
    pub(crate) fn place(&self) -> String {
        let scheme = match (&self.master, &self.certificates) {
            (Some(_), _) => "sentinel",
            (None, Some(_)) => "rediss",
            (None, None) => "redis",
        };
        let places: Vec<String> = self
            .endpoints
            .iter()
            .map(|endpoint| match endpoint {
                Endpoint::Tcp(host, port) => {
                    format!("{scheme}://{}", host_and_port(host, *port))
                }
                Endpoint::Unix(path) => format!("redis+socket://{}", path.display()),
            })
            .collect();
        match &self.master {
            Some(master) => format!("{} (master {master})", places.join(";")),
            None => places.join(";"),
        }
    }

    /// Location with the number of the database, as kombu shows it.
    pub(crate) fn uri(&self) -> String {
        match (&self.master, self.endpoints.first()) {
            (None, Some(Endpoint::Tcp(..))) => format!("{}/{}", self.place(), self.db()),
            _ => self.place(),
        }
    }

    /// Creates the client, without a connection.
    ///
    /// # Errors
    /// Certificates have the wrong format.
    pub(crate) fn open(&self) -> Result<Opened, RedisUrlError> {
        let opened = match &self.master {
            Some(master) => self.sentinels(master).map(Opened::Sentinels),
            None => self.server().map(Opened::Server),
        };
        opened.map_err(|e| wrong(e.to_string()))
    }

    fn server(&self) -> redis::RedisResult<Client> {
        let insecure = self.is_unverified();
        let address = match self.endpoints.first() {
            Some(Endpoint::Unix(path)) => ConnectionAddr::Unix(path.clone()),
            Some(Endpoint::Tcp(host, port)) if self.certificates.is_some() => {
                ConnectionAddr::TcpTls {
                    host: host.clone(),
                    port: *port,
                    insecure,
                    tls_params: None,
                }
            }
            Some(Endpoint::Tcp(host, port)) => ConnectionAddr::Tcp(host.clone(), *port),
            None => ConnectionAddr::Tcp("localhost".into(), REDIS_PORT),
        };
        let info = address
            .into_connection_info()?
            .set_redis_settings(self.login.clone());
        match &self.certificates {
            Some(Certificates { files, .. }) => Client::build_with_tls(info, files.clone()),
            None => Client::open(info),
        }
    }
}

/// The parts of each URL of a list.
fn parts(urls: &str) -> Result<Vec<UrlParts>, RedisUrlError> {
    let mut parts = Vec::new();
    for part in url::list(urls).map_err(|e| wrong(e.to_string()))? {
        let part = part.strip_prefix("redis+").unwrap_or(part);
        let part = url::kombu(part).map_err(|e| wrong(e.to_string()))?;
        if !SCHEMES.contains(&part.scheme.as_str()) {
            return Err(wrong(format!(
                "its scheme must be one of {}",
                SCHEMES.join(", ")
            )));
        }
        known(&part)?;
        parts.push(part);
    }
    Ok(parts)
}

const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

fn wrong(what: impl Into<String>) -> RedisUrlError {
    RedisUrlError(what.into())
}

/// Schemes, after an optional `redis+`. The last one is redis-py's.
const SCHEMES: [&str; 5] = ["redis", "rediss", "sentinel", "socket", "unix"];

/// Parameters that have an effect here.
const MEANT: [&str; 6] = ["db", "virtual_host", "host", "port", "username", "password"];

/// Parameters of redis-py's connections that have no effect here.
const WITHOUT_EFFECT: [&str; 15] = [
    "client_name",
    "decode_responses",
    "encoding",
    "encoding_errors",
    "health_check_interval",
    "max_connections",
    "protocol",
    "retry_on_error",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_read_size",
    "socket_timeout",
    "ssl_check_hostname",
    "timeout",
];

/// Rejects unknown parameters, as redis-py does. The error does not contain their names, which may be the end of a
/// password.
fn known(url: &UrlParts) -> Result<(), RedisUrlError> {
    let is_known = |name: &str| {
        MEANT.contains(&name)
            || WITHOUT_EFFECT.contains(&name)
            || [
                "ssl_cert_reqs",
                "ssl_ca_certs",
                "ssl_certfile",
                "ssl_keyfile",
            ]
            .contains(&name)
    };
    match url.query.iter().all(|(name, _)| is_known(name)) {
        true => Ok(()),
        false => Err(wrong(format!(
            "it has an unknown parameter; known are {} and those of TLS",
            MEANT.join(", ")
        ))),
    }
}

/// Endpoint of a server. Parameters of the URL take precedence over its other parts, as in Celery.
fn endpoint(url: &UrlParts, scheme: &str) -> Result<Endpoint, RedisUrlError> {
    if url.scheme != scheme {
        return Err(wrong("its parts have different schemes"));
    }
    let default_port = match scheme {
        "socket" | "unix" => {
            return match url.path.is_empty() || url.host.is_some() {
                false => Ok(Endpoint::Unix(format!("/{}", url.path).into())),
                true => Err(wrong("`redis+socket:///` needs the path of a socket")),
            };
        }
        "sentinel" => SENTINEL_PORT,
        _ => REDIS_PORT,
    };
    let host = url.parameter("host").or(url.host.as_deref());
    let port = match url.parameter("port") {
        None => url.port.unwrap_or(default_port),
        Some(port) => {
            let port = port.parse().ok().filter(|port| *port > 0);
            port.ok_or_else(|| wrong("its parameter `port` is not a number from 1 to 65535"))?
        }
    };
    Ok(Endpoint::Tcp(host.unwrap_or("localhost").to_owned(), port))
}

/// Login and database. Parameters of the URL take precedence over its other parts, as in Celery.
fn login(url: &UrlParts) -> Result<RedisConnectionInfo, RedisUrlError> {
    let is_socket = matches!(url.scheme.as_str(), "socket" | "unix");
    let path = match is_socket {
        true => url.parameter("virtual_host").unwrap_or_default(),
        false => &url.path,
    };
    let db = url.parameter("db").unwrap_or(path).trim_matches('/');
    let mut login = RedisConnectionInfo::default();
    if !db.is_empty() {
        let number = db.parse::<u32>().map_err(|_| {
            wrong("its path, or its parameter `db`, has to be the number of a database, such as /0")
        })?;
        login = login.set_db(number.into());
    }
    let parameter = |name, other| url.parameter(name).or(url.parameter(other));
    if let Some(user) = parameter("username", "user").or(url.user.as_deref()) {
        login = login.set_username(user);
    }
    if let Some(password) = parameter("password", "pass").or(url.password.as_deref()) {
        login = login.set_password(password);
    }
    Ok(login)
}

/// TLS options: those of the URL take precedence over the settings.
fn tls(url: &UrlParts, settings: &RedisTls) -> Result<RedisTls, RedisUrlError> {
    let mut tls = settings.clone();
    for (key, value) in &url.query {
        let field = match key.as_str() {
            "ssl_cert_reqs" => &mut tls.certificate,
            "ssl_ca_certs" => &mut tls.authorities,
            "ssl_certfile" => &mut tls.client_certificate,
            "ssl_keyfile" => &mut tls.client_key,
            "ssl_check_hostname" if value.eq_ignore_ascii_case("false") => {
                return Err(wrong(
                    "ssl_check_hostname=false is not supported; use a certificate for this host name",
                ));
            }
            _ => continue,
        };
        if url.scheme != "rediss" {
            return Err(wrong(format!("`{key}` is for `rediss://`")));
        }
        // Celery's users often encode these values twice, e.g. by `urlencode` of a quoted value.
        *field = decoded(value)?;
    }
    Ok(tls)
}

/// Certificates for `rediss://`, and for other schemes if the settings contain TLS options.
fn certificates(scheme: &str, tls: &RedisTls) -> Result<Option<Certificates>, RedisUrlError> {
    let RedisTls {
        certificate,
        authorities,
        client_certificate,
        client_key,
    } = tls;
    let is_wanted = [certificate, authorities, client_certificate, client_key]
        .iter()
        .any(|text| !text.is_empty());
    if scheme != "rediss" && !is_wanted {
        return Ok(None);
    }
    let is_verified = match certificate.as_str() {
        // A server always presents its certificate, so `optional` has the same effect.
        "" | "required" | "CERT_REQUIRED" | "optional" | "CERT_OPTIONAL" => true,
        "none" | "CERT_NONE" => false,
        _ => return Err(wrong("ssl_cert_reqs must be `required` or `none`")),
    };
    let read =
        |path: &str| fs::read(path).map_err(|e| wrong(format!("the certificate file {path}: {e}")));
    let client_tls = match (client_certificate.as_str(), client_key.as_str()) {
        ("", "") => None,
        ("", _) | (_, "") => {
            return Err(wrong("ssl_certfile and ssl_keyfile must be given together"));
        }
        (certificate, key) => Some(ClientTlsConfig {
            client_cert: read(certificate)?,
            client_key: read(key)?,
        }),
    };
    let root_cert = match authorities.as_str() {
        "" => None,
        path => Some(read(path)?),
    };
    Ok(Some(Certificates {
        is_verified,
        files: TlsCertificates {
            client_tls,
            root_cert,
        },
    }))
}

fn decoded(text: &str) -> Result<String, RedisUrlError> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded
        .map_err(|_| wrong("its percent-encoded bytes are not UTF-8"))?
        .into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    fn parse(url: &str) -> Result<RedisUrl, String> {
        let options = AddressOptions {
            master_name: "mymaster".into(),
            ..AddressOptions::default()
        };
        RedisUrl::parse(url, &options).map_err(|e| e.to_string())
    }

    #[rstest]
    #[case("redis://", "redis://localhost:6379", 0, None, None)]
    #[case("redis://h", "redis://h:6379", 0, None, None)]
    #[case("redis://h:1/", "redis://h:1", 0, None, None)]
    #[case("redis://:secret@h:1/3", "redis://h:1", 3, None, Some("secret"))]
    #[case("redis://u:s%40%2Ft@h:1//3", "redis://h:1", 3, Some("u"), Some("s@/t"))]
    #[case("redis://[::1]:7/2", "redis://[::1]:7", 2, None, None)]
    #[case(
        "redis://[::ffff:127.0.0.2]/2",
        "redis://[::ffff:127.0.0.2]:6379",
        2,
        None,
        None
    )]
    #[case("redis://h/0?db=8", "redis://h:6379", 8, None, None)]
    #[case("redis://h/3?db=", "redis://h:6379", 3, None, None)]
    #[case("redis://h/3?virtual_host=5", "redis://h:6379", 3, None, None)]
    #[case("redis://h/0?db=1&db=2", "redis://h:6379", 2, None, None)]
    #[case(
        "redis://u:p@h/0?password=q&username=x",
        "redis://h:6379",
        0,
        Some("x"),
        Some("q")
    )]
    #[case("redis://h/0?host=g&port=7", "redis://g:7", 0, None, None)]
    #[case("redis://h/0?socket_timeout=3", "redis://h:6379", 0, None, None)]
    #[case("redis://u:@H/0/", "redis://h:6379", 0, Some("u"), None)]
    #[case(
        "redis+unix://:p@/r.sock?db=4",
        "redis+socket:///r.sock",
        4,
        None,
        Some("p")
    )]
    #[case("rediss://:p@h:1/3", "rediss://h:1", 3, None, Some("p"))]
    #[case("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h:6379", 0, None, None)]
    #[case(
        "redis+socket:///run/r.sock",
        "redis+socket:///run/r.sock",
        0,
        None,
        None
    )]
    #[case(
        "socket:///r.sock?virtual_host=4",
        "redis+socket:///r.sock",
        4,
        None,
        None
    )]
    #[case(
        "sentinel://u:p@a/5;sentinel://b:7/5",
        "sentinel://a:26379;sentinel://b:7 (master mymaster)",
        5,
        Some("u"),
        Some("p")
    )]
    fn urls(
        #[case] url: &str,
        #[case] place: &str,
        #[case] db: i64,
        #[case] user: Option<&str>,
        #[case] password: Option<&str>,
    ) {
        let address = parse(url).unwrap();
        assert_eq!(address.place(), place);
        assert_eq!(address.login.db(), db);
        assert_eq!(address.login.username(), user);
        assert_eq!(address.login.password(), password);
        assert!(address.open().is_ok());
    }

    #[rstest]
    #[case("redis://:secret@h/x", "number of a database")]
    #[case("redis://h/0?db=secret", "number of a database")]
    #[case("redis://h/0?port=secret", "`port`")]
    #[case("redis://h/0?secret=1", "unknown parameter")]
    #[case("secret://h/0", "its scheme")]
    #[case("redis://:a/secret@h/0", "%2F")]
    #[case("redis://:1#secret@h/0", "%23")]
    #[case("redis+socket://secret/r.sock", "socket")]
    #[case("redis://:secret@h/-1", "number of a database")]
    #[case("redis://:secret@h:port/0", "port")]
    #[case("redis://:secret@h;redis://g", "sentinel")]
    #[case("sentinel://:secret@h;redis://g", "schemes")]
    #[case("redis://:secret@h?ssl_cert_reqs=none", "rediss")]
    #[case("rediss://:secret@h?ssl_cert_reqs=maybe", "ssl_cert_reqs")]
    #[case("rediss://:secret@h?ssl_ca_certs=/no/such.pem", "/no/such.pem")]
    #[case("rediss://:secret@h?ssl_keyfile=/k", "ssl_certfile")]
    #[case("rediss://:secret@h?ssl_check_hostname=False", "ssl_check_hostname")]
    #[case("socket://", "socket")]
    #[case("redis://:%ffsecret@h", "UTF-8")]
    fn wrong_urls_are_explained_without_their_password(#[case] url: &str, #[case] why: &str) {
        let error = parse(url).unwrap_err();
        assert!(error.contains(why), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn sentinels_need_a_name_to_ask_for() {
        let error = RedisUrl::parse("sentinel://h", &AddressOptions::default()).unwrap_err();
        assert!(error.to_string().contains("master_name"));
    }

    #[rstest]
    #[case("redis://a", &["redis://a:6379"])]
    #[case("redis://a/1;rediss://b/2", &["redis://a:6379", "rediss://b:6379"])]
    #[case("sentinel://a/1;sentinel://b", &["sentinel://a:26379;sentinel://b:26379 (master mymaster)"])]
    fn lists_of_servers_and_of_sentinels(#[case] urls: &str, #[case] places: &[&str]) {
        let options = AddressOptions {
            master_name: "mymaster".into(),
            ..AddressOptions::default()
        };
        let servers = RedisUrl::parse_list(urls, &options).unwrap();
        let found: Vec<_> = servers.iter().map(RedisUrl::place).collect();
        assert_eq!(found, places);
    }
}
