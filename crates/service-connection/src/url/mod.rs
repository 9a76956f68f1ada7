//! URLs of brokers and result backends, read as kombu and SQLAlchemy read them.
//!
//! A component has the same meaning as there, or the URL is refused: no connection or login goes to a server
//! that the URL does not name. Errors never quote the URL, since any part of it may be a password.

use std::fmt;
use std::net::Ipv6Addr;

use percent_encoding::percent_decode_str;

mod mask;

pub use mask::{MASK, masked, redacted, with_password};

/// Reason why a URL cannot be used. Never shows any part of the URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// The URL has no `scheme://`.
    #[error("it has no scheme, such as amqp:// or redis://")]
    NoScheme,
    /// Characters that are not allowed in a URL.
    #[error("it contains control characters, or blanks at its ends")]
    Control,
    /// A reserved character may have cut off the login, and its rest would be taken for another part.
    #[error(
        "it has a `#`, or an `@` behind the host. In user and password, `#` has to be percent-encoded as %23, `/` as %2F, \
         `?` as %3F, `@` as %40, `:` as %3A, `;` as %3B and `%` as %25; behind the host, `#` and `@` have to be, too"
    )]
    Reserved,
    /// Several ports, or an invalid one.
    #[error(
        "its port is not a number from 1 to 65535. In a password, `/` has to be percent-encoded as %2F, `?` as %3F, `#` as \
         %23 and `;` as %3B; an IPv6 address has to be in brackets"
    )]
    Port,
    /// The text in brackets is not an IPv6 address.
    #[error("the text in brackets is not an IPv6 address")]
    Ipv6,
    /// The host is not a name.
    #[error(
        "its host is neither a name nor an address; a name with other letters has to be written in ASCII (xn--…)"
    )]
    Host,
    /// Percent-encoded bytes that are not UTF-8.
    #[error("its percent-encoded bytes are not UTF-8")]
    Utf8,
    /// A list with an empty part.
    #[error(
        "one of its URLs, which `;` separates, is empty; a `;` in a password has to be percent-encoded as %3B"
    )]
    Empty,
}

/// The parts of a URL, percent-decoded.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct UrlParts {
    /// Scheme, in lower case.
    pub scheme: String,
    /// User; none where it is empty.
    pub user: Option<String>,
    /// Password; none where it is empty.
    pub password: Option<String>,
    /// Host in lower case, an IPv6 address without brackets; none where it is empty.
    pub host: Option<String>,
    /// Port.
    pub port: Option<u16>,
    /// Path without its first slash.
    pub path: String,
    /// Parameters that have a value, in their order.
    pub query: Vec<(String, String)>,
}

impl fmt::Debug for UrlParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Parameters can be secrets, too.
        f.debug_struct("UrlParts")
            .field("scheme", &self.scheme)
            .field("host", &self.host)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl UrlParts {
    /// A parameter's value; the last one counts.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let mut values = self.query.iter().rev();
        values.find_map(|(key, value)| (key == name).then_some(value.as_str()))
    }
}

/// The parts of a URL, not decoded yet.
#[derive(Clone, Copy)]
struct Raw<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    password: Option<&'a str>,
    /// Host and port.
    place: &'a str,
    /// Path with its first slash.
    path: &'a str,
    query: Option<&'a str>,
}

/// The URLs of a list, as kombu separates them: at every `;`.
///
/// # Errors
/// [`UrlError::Empty`].
pub fn list(urls: &str) -> Result<Vec<&str>, UrlError> {
    let parts: Vec<_> = urls.split(';').collect();
    match parts.len() > 1 && parts.iter().any(|part| part.trim().is_empty()) {
        true => Err(UrlError::Empty),
        false => Ok(parts),
    }
}

/// Reads a URL as kombu does (`kombu.utils.url.url_to_parts`).
///
/// # Errors
/// [`UrlError`], also for some URLs that kombu accepts: with a fragment, with an `@` behind the host, with port 0,
/// with a host that is not ASCII.
pub fn kombu(url: &str) -> Result<UrlParts, UrlError> {
    let raw = cut_kombu(url)?;
    let (host, port) = place(raw.place)?;
    parts(&raw, host, port)
}

fn cut_kombu(url: &str) -> Result<Raw<'_>, UrlError> {
    let (scheme, rest) = scheme(url)?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    // kombu accepts both. With either of them, the end of a password would become a path.
    if rest.contains(['#', '@']) {
        return Err(UrlError::Reserved);
    }
    let (login, place) = match authority.rsplit_once('@') {
        Some((login, place)) => (Some(login), place),
        None => (None, authority),
    };
    let (user, password) = match login.map(|login| login.split_once(':')) {
        Some(Some((user, password))) => (Some(user), Some(password)),
        Some(None) => (login, None),
        None => (None, None),
    };
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    Ok(Raw {
        scheme,
        user,
        password,
        place,
        path,
        query,
    })
}

/// Reads a database's URL as SQLAlchemy does (`sqlalchemy.engine.url`), without Celery's `db+` before it.
/// A host that begins with a slash, or with `%2F`, is the directory of a Unix socket.
///
/// # Errors
/// [`UrlError`], also for some URLs that SQLAlchemy accepts but its driver cannot connect with.
pub fn sqlalchemy(url: &str) -> Result<UrlParts, UrlError> {
    let raw = cut_sqlalchemy(url)?;
    let is_directory = raw
        .place
        .get(..3)
        .is_some_and(|head| head.eq_ignore_ascii_case("%2f"));
    let (host, port) = match is_directory {
        false => place(raw.place)?,
        true => {
            let (directory, after) = raw.place.split_once(':').unwrap_or((raw.place, ""));
            (Some(decoded(directory)?), port(after)?)
        }
    };
    parts(&raw, host, port)
}

fn cut_sqlalchemy(url: &str) -> Result<Raw<'_>, UrlError> {
    let (scheme, rest) = scheme(url)?;
    let head = rest.find([':', '/']).unwrap_or(rest.len());
    let (run, after) = rest.split_at(head);
    let password = after
        .strip_prefix(':')
        .and_then(|after| after.split_once('@'));
    let (user, password, rest) = match (password, run.rsplit_once('@')) {
        // SQLAlchemy takes the first `@` for the end of the user, and the port for the password.
        (Some(_), Some(_)) => return Err(UrlError::Reserved),
        (Some((password, rest)), None) => (Some(run), Some(password), rest),
        (None, Some((user, _))) => (Some(user), None, rest.get(user.len() + 1..).unwrap_or("")),
        (None, None) => (None, None, rest),
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (place, rest) = rest.split_at(end);
    if place.contains(['@', '#']) {
        return Err(UrlError::Reserved);
    }
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (rest, None),
    };
    // A path of SQLite has no login before it, and may contain any character.
    if user.is_some() && (path.contains('@') || query.is_some_and(|query| query.contains('@'))) {
        return Err(UrlError::Reserved);
    }
    Ok(Raw {
        scheme,
        user,
        password,
        place,
        path,
        query,
    })
}

/// Scheme, and the text after it.
fn scheme(url: &str) -> Result<(&str, &str), UrlError> {
    if url.contains(char::is_control) || url.trim() != url {
        return Err(UrlError::Control);
    }
    let (scheme, rest) = url.split_once("://").ok_or(UrlError::NoScheme)?;
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c));
    match is_scheme {
        true => Ok((scheme, rest)),
        false => Err(UrlError::NoScheme),
    }
}

fn parts(raw: &Raw<'_>, host: Option<String>, port: Option<u16>) -> Result<UrlParts, UrlError> {
    let some = |text: Option<&str>| match text {
        None | Some("") => Ok(None),
        Some(text) => decoded(text).map(Some),
    };
    let query = raw.query.unwrap_or_default();
    // The standard conversion would replace bytes that are not UTF-8.
    decoded(query)?;
    Ok(UrlParts {
        scheme: raw.scheme.to_ascii_lowercase(),
        user: some(raw.user)?,
        password: some(raw.password)?,
        host,
        port,
        path: decoded(raw.path.strip_prefix('/').unwrap_or(raw.path))?,
        query: url::form_urlencoded::parse(query.as_bytes())
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.into_owned(), value.into_owned()))
            .collect(),
    })
}

/// Host and port.
fn place(place: &str) -> Result<(Option<String>, Option<u16>), UrlError> {
    if let Some(bracketed) = place.strip_prefix('[') {
        let (address, after) = bracketed.split_once(']').ok_or(UrlError::Ipv6)?;
        let after = match after.strip_prefix(':') {
            Some(after) => after,
            None if after.is_empty() => "",
            None => return Err(UrlError::Ipv6),
        };
        return Ok((Some(ipv6(address)?), port(after)?));
    }
    let (host, after) = place.split_once(':').unwrap_or((place, ""));
    let port = port(after)?;
    let host = decoded(host)?.to_ascii_lowercase();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
    match host.as_str() {
        "" => Ok((None, port)),
        name if name.chars().all(is_name) => Ok((Some(host), port)),
        _ => Err(UrlError::Host),
    }
}

/// An IPv6 address with its zone (RFC 6874, also with a `%` that is not encoded).
fn ipv6(text: &str) -> Result<String, UrlError> {
    let (address, zone) = text.split_once('%').unwrap_or((text, ""));
    let zone = zone.strip_prefix("25").unwrap_or(zone);
    let is_zone = |c: char| c.is_ascii_alphanumeric() || "-._~".contains(c);
    if address.parse::<Ipv6Addr>().is_err()
        || !zone.chars().all(is_zone)
        || (text.contains('%') && zone.is_empty())
    {
        return Err(UrlError::Ipv6);
    }
    let address = address.to_ascii_lowercase();
    Ok(match zone {
        "" => address,
        zone => format!("{address}%{zone}"),
    })
}

fn port(text: &str) -> Result<Option<u16>, UrlError> {
    if text.is_empty() {
        return Ok(None);
    }
    let is_number = text.chars().all(|c| c.is_ascii_digit());
    let port = text.parse().ok().filter(|port| is_number && *port > 0);
    port.map(Some).ok_or(UrlError::Port)
}

/// Decodes percent-encoded text; a `%` without two hexadecimal digits stays, as in Python.
fn decoded(text: &str) -> Result<String, UrlError> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.map_err(|_| UrlError::Utf8)?.into_owned())
}

/// A URL of PostgreSQL with all parts as parameters, which libpq accepts, too. It cannot be
/// misread.
#[must_use]
pub fn libpq<'a>(parameters: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::from("postgresql:///?"));
    query.extend_pairs(parameters);
    query.finish()
}

/// Host and port as a URL has them: an IPv6 address in brackets.
#[must_use]
pub fn host_and_port(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests;
