//! Addresses of brokers, in kombu's format.

use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::broker::BrokerError;
use service_connection::url::{self, UrlParts, host_and_port};

/// Schemes of AMQP, including those of kombu's clients for it.
pub const SCHEMES: [&str; 4] = ["amqp", "amqps", "pyamqp", "librabbitmq"];

/// Characters that kombu encodes in a user's name.
const IN_NAME: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Characters that would end a path.
const IN_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'#')
    .add(b'%')
    .add(b';')
    .add(b'?')
    .add(b'@');

/// Address of one broker.
#[derive(Clone)]
pub(super) struct BrokerAddress {
    pub(super) uri: AMQPUri,
    /// URL with the password as `**`, in the form that kombu shows.
    pub(super) masked: String,
}

impl BrokerAddress {
    fn parse(url: &str, heartbeat: u16) -> Result<Self, String> {
        let parts = url::kombu(url).map_err(|error| error.to_string())?;
        let scheme = match parts.scheme.as_str() {
            "amqps" => AMQPScheme::AMQPS,
            scheme if SCHEMES.contains(&scheme) => AMQPScheme::AMQP,
            _ => {
                return Err(format!("its scheme must be one of {}", SCHEMES.join(", ")));
            }
        };
        let query = query(&parts, heartbeat)?;
        // kombu's defaults, also for empty parts. AMQP's own virtual host "" has no URL.
        let default = |part: Option<String>, default: &str| part.unwrap_or_else(|| default.into());
        let uri = AMQPUri {
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo {
                    username: default(parts.user, "guest"),
                    password: default(parts.password, "guest"),
                },
                host: default(parts.host, "localhost"),
                port: parts.port.unwrap_or_else(|| scheme.default_port()),
            },
            scheme,
            vhost: match parts.path.as_str() {
                "" => "/".into(),
                _ => parts.path,
            },
            query,
        };
        Ok(Self {
            masked: mask(&uri),
            uri,
        })
    }
}

/// Options in the parameters of a URL.
fn query(parts: &UrlParts, heartbeat: u16) -> Result<AMQPQueryString, String> {
    const KNOWN: &str =
        "heartbeat, frame_max, channel_max, connection_timeout (in ms) and auth_mechanism";
    fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<Option<T>, String> {
        let number = value.parse().map(Some);
        number.map_err(|_| format!("its parameter {name} is not a whole number, or is too large"))
    }
    let mut query = AMQPQueryString {
        heartbeat: Some(heartbeat),
        ..AMQPQueryString::default()
    };
    for (name, value) in &parts.query {
        match name.as_str() {
            "heartbeat" => query.heartbeat = number(name, value)?,
            "frame_max" => query.frame_max = number(name, value)?,
            "channel_max" => query.channel_max = number(name, value)?,
            "connection_timeout" => query.connection_timeout = number(name, value)?,
            "auth_mechanism" | "login_method" => {
                let mechanism = value.parse();
                query.auth_mechanism = Some(mechanism.map_err(|_: String| {
                    "its auth_mechanism must be plain, amqplain or external".to_owned()
                })?);
            }
            name if name.starts_with("ssl") => {
                return Err(
                    "certificates do not belong in the URL; they have options of their own (ca_file, cert_file, key_file)"
                        .into(),
                );
            }
            // As in kombu. The error does not contain the name, which may be the end of a password.
            _ => return Err(format!("it has an unknown parameter; known are {KNOWN}")),
        }
    }
    Ok(query)
}

fn mask(uri: &AMQPUri) -> String {
    let AMQPAuthority {
        userinfo,
        host,
        port,
    } = &uri.authority;
    format!(
        "{}://{}:**@{}/{}",
        uri.scheme,
        utf8_percent_encode(&userinfo.username, IN_NAME),
        host_and_port(host, *port),
        utf8_percent_encode(&uri.vhost, IN_PATH)
    )
}

/// Parses a URL, or several separated by `;`.
///
/// # Errors
/// [`BrokerError::Url`], without the URL.
pub(super) fn parse_list(urls: &str, heartbeat: u16) -> Result<Vec<BrokerAddress>, BrokerError> {
    let list = url::list(urls).map_err(|error| BrokerError::Url(error.to_string()))?;
    let several = list.len() > 1;
    let all = list.iter().enumerate().map(|(n, url)| {
        BrokerAddress::parse(url, heartbeat).map_err(|error| {
            BrokerError::Url(match several {
                true => format!("of its {} URLs, number {}: {error}", list.len(), n + 1),
                false => error,
            })
        })
    });
    all.collect()
}

/// Checks a setting for use as the URL of one broker or of several.
///
/// # Errors
/// An explanation that does not contain the URL.
pub fn check(urls: &str) -> Result<(), String> {
    match parse_list(urls, 0) {
        Ok(_) => Ok(()),
        Err(BrokerError::Url(why)) => Err(why),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("amqp://u:secret@h:1//", "/", "amqp://u:**@h:1//")]
    #[case("amqp://u:secret@h/", "/", "amqp://u:**@h:5672//")]
    #[case("amqp://u:secret@h", "/", "amqp://u:**@h:5672//")]
    #[case("amqp://u:secret@h/%2Fccat", "/ccat", "amqp://u:**@h:5672//ccat")]
    #[case("amqps://u:secret@h/ccat", "ccat", "amqps://u:**@h:5671/ccat")]
    #[case("pyamqp://u:secret@h/ccat", "ccat", "amqp://u:**@h:5672/ccat")]
    #[case("librabbitmq://u:secret@h/ccat", "ccat", "amqp://u:**@h:5672/ccat")]
    #[case(
        "amqp://u:secret@[::ffff:127.0.0.2]/v",
        "v",
        "amqp://u:**@[::ffff:127.0.0.2]:5672/v"
    )]
    #[case("amqp://:secret@/v", "v", "amqp://guest:**@localhost:5672/v")]
    #[case("amqp://u%40x:secret@H", "/", "amqp://u%40x:**@h:5672//")]
    fn urls_are_read_as_kombu_reads_them(
        #[case] url: &str,
        #[case] vhost: &str,
        #[case] masked: &str,
    ) {
        let addresses = parse_list(url, 60).unwrap();
        let address = addresses.first();
        let shown = address.map(|a| (a.uri.vhost.as_str(), a.masked.as_str()));
        assert_eq!(shown, Some((vhost, masked)));
    }

    #[test]
    fn hosts_are_those_of_the_url() {
        for (url, host) in [
            ("amqp://u:p@[::ffff:127.0.0.2]:5672/v", "::ffff:127.0.0.2"),
            ("amqp://[::1]", "::1"),
            ("amqp://[fe80::1%25eth0]/v", "fe80::1%eth0"),
            ("amqp://127.0.0.2/", "127.0.0.2"),
            ("amqp:///v", "localhost"),
        ] {
            let addresses = parse_list(url, 60).unwrap();
            let address = addresses.first();
            let named = address.map(|a| a.uri.authority.host.as_str());
            assert_eq!(named, Some(host), "{url}");
        }
    }

    #[rstest]
    #[case("redis://h", "its scheme")]
    #[case("s3cret", "no scheme")]
    #[case("amqp://u:s3cret@h:port//", "its port")]
    #[case("amqp://u:s3cret#x@h//", "%23")]
    #[case(
        "amqp://a:s3cret@h//;amqp://b:s3cret@g:x//",
        "of its 2 URLs, number 2: its port"
    )]
    #[case("amqp://a:s3cret@h//;", "is empty")]
    #[case("amqp://h//?s3cret=1", "unknown parameter")]
    #[case("amqp://h//?heartbeat=s3cret", "heartbeat is not a whole number")]
    #[case("amqp://h//?auth_mechanism=s3cret", "auth_mechanism")]
    #[case("amqp://h//?ssl_keyfile=s3cret", "ca_file")]
    fn other_urls_are_refused(#[case] url: &str, #[case] why: &str) {
        let error = check(url).err().unwrap_or_default();
        assert!(error.contains(why) && !error.contains("s3cret"), "{error}");
    }
}
