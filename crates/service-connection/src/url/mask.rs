//! URLs and texts without the secrets in them.

use std::borrow::Cow;
use std::ops::Range;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Raw, cut_kombu, cut_sqlalchemy, kombu, list, sqlalchemy};

/// Replacement for a secret, the same as in Celery.
pub const MASK: &str = "********";

/// Characters of a user name that need no encoding (RFC 3986, "unreserved").
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Parameters that are shown. The value of any other parameter could be a secret. So could its name, if the URL
/// was not meant to have parameters.
const SHOWN: [&str; 29] = [
    "application_name",
    "auth_mechanism",
    "channel_max",
    "connect_timeout",
    "connection_timeout",
    "db",
    "dbname",
    "frame_max",
    "health_check_interval",
    "heartbeat",
    "host",
    "hostaddr",
    "login_method",
    "port",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
    "sslcert",
    "sslmode",
    "sslrootcert",
    "timeout",
    "user",
    "username",
    "virtual_host",
];

/// Parameters whose name is shown and whose value is never shown.
const HIDDEN: [&str; 5] = ["pass", "passfile", "password", "sslkey", "sslpassword"];

/// Words that are not URLs and that Celery accepts as a backend.
const WORDS: [&str; 3] = ["", "rpc", "disabled"];

/// Schemes that a setting can have. A URL with another scheme is not shown at all: the end of a password may
/// look like a URL, too.
const SCHEMES: [&str; 12] = [
    "amqp",
    "amqps",
    "librabbitmq",
    "pyamqp",
    "redis",
    "redis+socket",
    "redis+unix",
    "rediss",
    "rpc",
    "sentinel",
    "socket",
    "unix",
];

/// Splits a URL into Celery's prefix and SQLAlchemy's URL, if it has that form.
fn database(url: &str) -> Option<(&str, &str)> {
    let (prefix, rest) = url.split_at(url.find('+')? + 1);
    matches!(prefix, "db+" | "database+" | "sqla+" | "sqlalchemy+").then_some((prefix, rest))
}

/// Prefix of a URL that is not part of its scheme, and the parts of the URL.
fn cut(url: &str) -> Option<(&str, Raw<'_>)> {
    match database(url) {
        Some((prefix, rest)) => {
            sqlalchemy(rest).ok()?;
            Some((prefix, cut_sqlalchemy(rest).ok()?))
        }
        None => {
            let parts = kombu(url).ok()?;
            let raw = cut_kombu(url).ok()?;
            SCHEMES
                .contains(&parts.scheme.as_str())
                .then_some(("", raw))
        }
    }
}

/// The URLs of a list. The URL of a database is never a list.
fn split(urls: &str) -> Option<Vec<&str>> {
    match database(urls) {
        Some(_) => Some(vec![urls]),
        None => list(urls).ok(),
    }
}

/// One URL, or several separated by `;`, without passwords. A text that is not a URL is not shown at all.
#[must_use]
pub fn masked(urls: &str) -> String {
    if WORDS.contains(&urls) {
        return urls.to_owned();
    }
    let shown = split(urls).and_then(|urls| {
        let shown = urls.into_iter().map(|url| cut(url).map(show));
        shown.collect::<Option<Vec<_>>>()
    });
    shown.map_or_else(|| MASK.to_owned(), |shown| shown.join(";"))
}

fn show((prefix, raw): (&str, Raw<'_>)) -> String {
    let mut text = format!("{prefix}{}://", raw.scheme);
    text.push_str(raw.user.unwrap_or_default());
    match raw.password {
        None | Some("") => {}
        Some(_) => {
            text.push(':');
            text.push_str(MASK);
        }
    }
    if raw.user.is_some() {
        text.push('@');
    }
    text.push_str(raw.place);
    text.push_str(raw.path);
    let pairs = raw.query.unwrap_or_default().split('&');
    for (n, pair) in pairs.filter(|pair| !pair.is_empty()).enumerate() {
        text.push(if n == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((name, _)) if SHOWN.contains(&name) => text.push_str(pair),
            Some((name, _)) if HIDDEN.contains(&name) => {
                text.push_str(name);
                text.push('=');
                text.push_str(MASK);
            }
            _ => text.push_str(MASK),
        }
    }
    text
}

/// URLs with this password added if they have none: to the first URL of sentinels, which holds their login, and to
/// each URL of brokers. Returns none if the URL has no server to log in to.
#[must_use]
pub fn with_password(urls: &str, password: &str) -> Option<String> {
    let encoded = utf8_percent_encode(password, RESERVED).to_string();
    let filled = split(urls)?
        .into_iter()
        .enumerate()
        .map(|(n, url)| {
            let (prefix, raw) = cut(url)?;
            let scheme = raw.scheme.to_ascii_lowercase();
            if scheme == "rpc" || scheme.starts_with("sqlite") {
                return None;
            }
            let is_first = n == 0 || !scheme.starts_with("sentinel");
            if !is_first || raw.password.is_some_and(|password| !password.is_empty()) {
                return Some(url.to_owned());
            }
            let query = raw
                .query
                .map_or_else(String::new, |query| format!("?{query}"));
            let (user, place, path) = (raw.user.unwrap_or_default(), raw.place, raw.path);
            Some(format!(
                "{prefix}{}://{user}:{encoded}@{place}{path}{query}",
                raw.scheme
            ))
        })
        .collect::<Option<Vec<_>>>()?;
    Some(filled.join(";"))
}

/// A text, such as an error of a library, in which logins and secret parameters of URLs are masked.
#[must_use]
pub fn redacted(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return text.into();
    }
    let mut secrets: Vec<Range<usize>> = Vec::new();
    let mut from = 0;
    while let Some(at) = text.get(from..).and_then(|rest| rest.find("://")) {
        let start = from + at + 3;
        // A password that was not encoded may contain any character that does not end a word.
        let ends = |c: char| c.is_whitespace() || matches!(c, '"' | '`' | '<' | '>');
        let rest = text.get(start..).unwrap_or_default();
        let word = rest.find(ends).map_or(rest, |end| &rest[..end]);
        secrets.extend(login(word).map(|range| range.start + start..range.end + start));
        let values = parameters(word).into_iter();
        secrets.extend(values.map(|range| range.start + start..range.end + start));
        from = start + word.len();
    }
    if secrets.is_empty() {
        return text.into();
    }
    secrets.sort_by_key(|range| range.start);
    let mut shown = String::with_capacity(text.len());
    let mut at = 0;
    for secret in secrets {
        if secret.start >= at {
            shown.push_str(&text[at..secret.start]);
            shown.push_str(MASK);
        }
        at = at.max(secret.end);
    }
    shown.push_str(&text[at..]);
    shown.into()
}

/// Position of the password in the text after `://`: from the first colon to the last `@`.
fn login(word: &str) -> Option<Range<usize>> {
    let end = word.rfind('@')?;
    let start = word.find(':')? + 1;
    (start < end).then_some(start..end)
}

/// Positions of the values of secret parameters. A name begins behind a `?` or `&`, a value ends before a `&`. Every
/// byte is read a fixed number of times: the text may be long, and be made of question marks.
fn parameters(word: &str) -> Vec<Range<usize>> {
    let mut secrets = Vec::new();
    let mut start = 0;
    for (n, part) in word.split('&').enumerate() {
        secrets.extend(secret(part, n > 0).map(|at| start + at..start + part.len()));
        start += part.len() + 1;
    }
    secrets
}

/// Position of the first value in `name?name=value?name=value` that is secret; it goes to the end.
fn secret(part: &str, mut begins_name: bool) -> Option<usize> {
    let mut start = 0;
    let (pairs, _) = part.rsplit_once('=')?;
    for piece in pairs.split('=') {
        let end = start + piece.len() + 1;
        let names = match begins_name {
            true => Some(piece),
            false => piece.split_once('?').map(|(_, names)| names),
        };
        if names.is_some_and(is_secret) && end < part.len() {
            return Some(end);
        }
        begins_name = false;
        start = end;
    }
    None
}

/// Returns true if a parameter is secret by one of its names, which `?` separates.
fn is_secret(names: &str) -> bool {
    let names = names.to_ascii_lowercase();
    names.split('?').any(|name| HIDDEN.contains(&name))
        || ["passw", "secret", "token", "sentinel_kwargs", "api_key"]
            .iter()
            .any(|part| names.contains(part))
}
