//! The HTTP server of the process: health checks, metrics, and pages that the program adds.
//!
//! It answers one request per connection, and limits the number of connections and the time without an answer, so that a
//! port scanner or a client that does not read does no harm. An answer may last: a stream of events lives as long as
//! something is sent at least every ten seconds.

use std::net::SocketAddr;

use axum::http::{HeaderValue, Response, header};
use axum::middleware::map_response;
use axum::{Router, serve};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

mod listener;

use listener::LimitedListener;

/// Maximum number of connections of a server for monitors.
pub(crate) const MONITORS: usize = 16;

/// Maximum number of connections of a server for people, each of whom may have a stream of events.
pub(crate) const PEOPLE: usize = 512;

/// The HTTP server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error(
    "{setting}: cannot listen on {address}; stop the other process that does, or choose another port"
)]
pub struct BindError {
    setting: &'static str,
    address: SocketAddr,
    source: std::io::Error,
}

/// A running HTTP server. Dropping it ends the server.
#[derive(Debug)]
#[must_use = "the server ends when this value is dropped"]
pub struct HttpServer {
    running: Option<(SocketAddr, AbortOnDropHandle<()>)>,
}

impl HttpServer {
    /// No server, for settings without an address.
    pub const OFF: Self = Self { running: None };

    /// Serves pages for people. `setting` is the name of the flag or setting that contains the address, for errors.
    ///
    /// # Errors
    /// The server cannot listen on the address.
    pub async fn start(
        setting: &'static str,
        address: SocketAddr,
        pages: Router,
    ) -> Result<Self, BindError> {
        Self::listen(setting, address, pages, PEOPLE).await
    }

    pub(crate) async fn listen(
        setting: &'static str,
        address: SocketAddr,
        routes: Router,
        connections: usize,
    ) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| BindError {
                setting,
                address,
                source,
            })?;
        // With port 0, the operating system chooses the port.
        let address = listener.local_addr().unwrap_or(address);
        let routes = routes.layer(map_response(once));
        let task = tokio::spawn(async move {
            // Ends only with the process.
            let _ = serve(LimitedListener::new(listener, connections), routes).await;
        });
        Ok(Self {
            running: Some((address, AbortOnDropHandle::new(task))),
        })
    }

    /// The address on which the server listens; `None` without a server.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.running.as_ref().map(|(address, _)| *address)
    }
}

/// Closes the connection after the response: each connection has a time limit.
async fn once<B>(mut response: Response<B>) -> Response<B> {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}
