//! Errors of requests. The server writes them as JSON below `/api/`, otherwise as a page.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::model::Unreachable;
use crate::display;

/// A request that cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WebError {
    /// A parameter has a value that it cannot have.
    #[error("{0}")]
    BadRequest(String),
    /// The page or the transfer does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The request does not contain the token.
    #[error("this page needs a token: send the header `Authorization: Bearer TOKEN`")]
    Unauthorized,
    /// The request would change something.
    #[error("this page only reads: the methods are GET and HEAD")]
    MethodNotAllowed,
    /// The database cannot be read, and the data are not known from before.
    #[error("the database cannot be read since {}: {}", display::second(.0.since), .0.error)]
    Unavailable(Unreachable),
}

impl WebError {
    /// Status of the response.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<Unreachable> for WebError {
    fn from(unreachable: Unreachable) -> Self {
        Self::Unavailable(unreachable)
    }
}

/// Text of an error, for the server, which writes the body.
#[derive(Debug, Clone)]
pub(super) struct ErrorText(pub(super) String);

impl IntoResponse for WebError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response
            .extensions_mut()
            .insert(ErrorText(self.to_string()));
        response
    }
}
