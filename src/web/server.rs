//! Common parts of all responses: token, methods, headers, and the form of errors.

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use secrecy::{ExposeSecret as _, SecretString};
use subtle::ConstantTimeEq as _;

use super::Web;
use super::error::{ErrorText, WebError};
use super::model::ErrorMessage;
use celery_worker_cli::settings::MIN_TOKEN_LENGTH;

/// Maximum length of a token's file in bytes; the path may wrongly name a file without an end.
const MAX_TOKEN_FILE: u64 = 4096;

/// Permission bits of all users but the owner.
const OTHERS: u32 = 0o077;

/// Headers of every response. Nothing is loaded from other servers, and no script or style is part of a page: a file name
/// that contains one has no effect.
const HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; \
         base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

/// The word that every request must contain.
#[derive(Debug, Clone)]
pub struct Token(SecretString);

/// The token cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token from {}", .path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Other users can read the file.
    #[error("{} can be read by others (mode {mode:03o}); `chmod 600` it", .path.display())]
    Exposed {
        /// Path of the file.
        path: PathBuf,
        /// Permission bits of the file.
        mode: u32,
    },
    /// The token is too short, or has characters that a header cannot contain.
    #[error(
        "a token has {MIN_TOKEN_LENGTH} characters or more, without blanks; e.g. the output of `openssl rand -hex 32`"
    )]
    Invalid,
}

impl Token {
    /// Creates a token.
    ///
    /// # Errors
    /// [`TokenError::Invalid`].
    pub fn new(token: SecretString) -> Result<Self, TokenError> {
        let text = token.expose_secret();
        let is_valid = text.len() >= MIN_TOKEN_LENGTH && text.bytes().all(|b| b.is_ascii_graphic());
        match is_valid {
            true => Ok(Self(token)),
            false => Err(TokenError::Invalid),
        }
    }

    /// Reads a token from a file that only its owner can read. A line break at its end is not part of the token.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::Read {
            path: path.to_owned(),
            source,
        };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & OTHERS != 0 {
            return Err(TokenError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = String::new();
        file.take(MAX_TOKEN_FILE)
            .read_to_string(&mut text)
            .map_err(failed)?;
        Self::new(text.trim_end_matches(['\r', '\n']).into())
    }

    /// Returns true if a request contains the token.
    fn is_in(&self, request: &Request) -> bool {
        let given = request
            .headers()
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        given.is_some_and(|given| {
            given
                .as_bytes()
                .ct_eq(self.0.expose_secret().as_bytes())
                .into()
        })
    }
}

/// Path below which a reverse proxy serves the pages: empty, or with `/` at its beginning and not at its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BasePath(String);

/// Error for a text that is not a [`BasePath`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a path such as /status: it begins with `/`, and its parts have letters, digits and -._~"
)]
pub struct InvalidBasePath(String);

impl BasePath {
    /// The path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true if the pages are at the root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns a path of a request without the base path.
    fn strip<'a>(&self, path: &'a str) -> &'a str {
        match path.strip_prefix(&self.0) {
            Some(rest) if rest.starts_with('/') => rest,
            _ => path,
        }
    }
}

impl fmt::Display for BasePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BasePath {
    type Err = InvalidBasePath;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.trim_end_matches('/');
        let is_part = |part: &str| {
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            !part.is_empty() && !part.bytes().all(|b| b == b'.') && part.bytes().all(is_allowed)
        };
        let is_path = match path.strip_prefix('/') {
            Some(parts) => parts.split('/').all(is_part),
            None => path.is_empty(),
        };
        match is_path {
            true => Ok(Self(path.to_owned())),
            false => Err(InvalidBasePath(text.to_owned())),
        }
    }
}

/// Adds the token, the limit to GET and HEAD, the headers and the form of errors to the routes.
pub(super) fn secured(routes: Router<Arc<Web>>, web: Arc<Web>) -> Router {
    routes
        .fallback(missing)
        .layer(middleware::from_fn_with_state(web.clone(), check))
        .layer(middleware::from_fn_with_state(web.clone(), finish))
        .with_state(web)
}

/// Answers requests of paths that do not exist.
async fn missing(State(web): State<Arc<Web>>, uri: Uri) -> Response {
    let base = web.base_path();
    if !base.is_empty() && uri.path() == base.as_str() {
        return Redirect::permanent(&format!("{base}/")).into_response();
    }
    let path: String = uri.path().chars().take(200).collect();
    WebError::NotFound(format!("there is no page {path}")).into_response()
}

/// Refuses requests that could change something, and those without the token.
async fn check(State(web): State<Arc<Web>>, request: Request, next: Next) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return WebError::MethodNotAllowed.into_response();
    }
    match &web.token {
        Some(token) if !token.is_in(&request) => WebError::Unauthorized.into_response(),
        _ => next.run(request).await,
    }
}

/// Writes the body of an error, and the headers that every response has.
async fn finish(State(web): State<Arc<Web>>, request: Request, next: Next) -> Response {
    let is_api = web
        .base_path()
        .strip(request.uri().path())
        .starts_with("/api/");
    let is_head = *request.method() == Method::HEAD;
    let mut response = next.run(request).await;
    let status = response.status();
    // A page that shows the error itself, such as the search, is complete.
    let is_page = response.headers().contains_key(header::CONTENT_TYPE);
    if (status.is_client_error() || status.is_server_error()) && !is_page {
        let text = match response.extensions_mut().remove::<ErrorText>() {
            Some(ErrorText(text)) => text,
            None => status
                .canonical_reason()
                .unwrap_or("the request failed")
                .to_lowercase(),
        };
        let mut body = match is_api {
            true => super::api::json(&ErrorMessage { error: text }),
            false => super::pages::error(web.base_path().as_str(), status, &text),
        };
        *body.status_mut() = status;
        if is_head {
            *body.body_mut() = axum::body::Body::empty();
        }
        response = body;
    }
    let headers = response.headers_mut();
    if status == axum::http::StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if status == axum::http::StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("", Some(""))]
    #[case("/", Some(""))]
    #[case("/status", Some("/status"))]
    #[case("/ccat/status/", Some("/ccat/status"))]
    #[case("status", None)]
    #[case("//status", None)]
    #[case("/a/../b", None)]
    #[case("/{id}", None)]
    #[case("/a b", None)]
    fn base_paths(#[case] text: &str, #[case] expected: Option<&str>) {
        let path = text.parse::<BasePath>().ok();
        assert_eq!(path.as_ref().map(BasePath::as_str), expected);
    }

    #[test]
    fn only_whole_parts_are_stripped() {
        let base: BasePath = "/status".parse().unwrap();
        assert_eq!(base.strip("/status/api/v1"), "/api/v1");
        assert_eq!(base.strip("/statusapi/v1"), "/statusapi/v1");
        assert_eq!(base.strip("/api/v1"), "/api/v1");
    }

    #[test]
    fn token_must_be_long_and_private() {
        assert!(Token::new("short".into()).is_err());
        assert!(Token::new("with a blank in the middle".into()).is_err());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o640);
        assert!(matches!(
            Token::read(&path),
            Err(TokenError::Exposed { .. })
        ));
        mode(0o600);
        let token = Token::read(&path).unwrap();
        let with = |value: &str| {
            let request = Request::builder().header(header::AUTHORIZATION, value);
            token.is_in(&request.body(axum::body::Body::empty()).unwrap())
        };
        assert!(with("Bearer 0123456789abcdef"));
        assert!(with("bearer 0123456789abcdef"));
        assert!(!with("Bearer 0123456789abcdeF"));
        assert!(!with("Bearer 0123456789abcdef0"));
        assert!(!with("0123456789abcdef"));
    }
}
