//! Health of the process, its metrics and its status, and the HTTP server that shows them to monitors.
//!
//! * `/livez` answers 503 while one of the loops of the process is stopped (see [`celery_worker::liveness`]), with the
//!   loop's name and the time. A broker or database that cannot be reached is no reason to restart the process, which
//!   would abort the running tasks.
//! * `/readyz` answers 503 with a line for each reason while the process cannot do its work.
//! * `/metrics` has the metrics of [`crate::metrics`].
//!
//! The server is read-only and contains no secrets. It listens only where the settings say, answers one request per
//! connection, and limits the number of connections and the time of an answer.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Router, serve};
use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::clock;
use crate::metrics::{Metrics, Registered};
use crate::program::Program;
use crate::text::visible;
use celery_worker::liveness::LivenessRegistry;
use listener::LimitedListener;

mod listener;
mod probe;

pub use probe::{PROBE_TIMEOUT, Probe};

/// Health, metrics and status of a process. Clones share them.
#[derive(Clone)]
pub struct HealthRegistry {
    liveness: LivenessRegistry,
    metrics: Metrics,
    probes: Arc<Mutex<Probes>>,
    phase: watch::Sender<Phase>,
    status: Arc<OnceLock<Status>>,
}

/// Describes the current work of a process in a few words.
type Status = Box<dyn Fn() -> String + Send + Sync>;

/// Phase of a process. Phases follow each other in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connects to its servers.
    Starting,
    /// Does its work.
    Running,
    /// Finishes the running work, and then restarts.
    Restarting,
    /// Finishes the running work, and then ends.
    Stopping,
}

#[derive(Debug, Default)]
struct Probes {
    ready: Vec<Arc<Probe>>,
    scraped: Vec<Arc<Probe>>,
}

/// The HTTP server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error(
    "http.listen: cannot listen on {address}; stop the other process that does, or choose another port"
)]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

/// The running HTTP server. Dropping it ends the server.
#[derive(Debug)]
#[must_use = "the server ends when this value is dropped"]
pub struct HealthServer {
    _task: Option<AbortOnDropHandle<()>>,
}

impl HealthServer {
    /// No server, for settings without an address.
    pub const OFF: Self = Self { _task: None };
}

impl HealthRegistry {
    /// Creates an empty registry. A loop counts as stopped when it is late by `grace`.
    ///
    /// # Errors
    /// See [`Metrics::new`].
    pub fn new(program: Program, grace: Duration) -> Result<Self, crate::metrics::Error> {
        Ok(Self {
            liveness: LivenessRegistry::new(grace),
            metrics: Metrics::new(program)?,
            probes: Arc::default(),
            phase: watch::Sender::new(Phase::Starting),
            status: Arc::default(),
        })
    }

    /// The loops of the process.
    #[must_use]
    pub fn liveness(&self) -> &LivenessRegistry {
        &self.liveness
    }

    /// Enters a phase, unless the process is in a later one. Only a process that is [`Phase::Running`] is ready.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let is_later = phase > *now;
            if is_later {
                *now = phase;
            }
            is_later
        });
    }

    /// Sets the function that describes the current work in a few words. Only the first call has an effect.
    pub fn describe(&self, status: impl Fn() -> String + Send + Sync + 'static) {
        let _ = self.status.set(Box::new(status));
    }

    /// A description of the current work in a few words; empty without [`describe`](Self::describe).
    #[must_use]
    pub fn status(&self) -> String {
        self.status
            .get()
            .map_or_else(String::new, |status| status())
    }

    /// The phase, and its changes.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Registers metrics.
    ///
    /// # Errors
    /// A metric of this name is registered already.
    pub fn register<'a>(
        &self,
        metrics: impl IntoIterator<Item = &'a Box<dyn Registered>>,
    ) -> Result<(), crate::metrics::Error> {
        self.metrics.add(metrics)
    }

    /// Adds a condition for readiness: the process is ready while the probe answers `Ok`.
    pub fn ready_if(&self, probe: Probe) {
        self.probes(|probes| probes.ready.push(Arc::new(probe)));
    }

    /// Adds a probe that runs before each scrape and updates metrics. While it fails, the metrics keep their values,
    /// and `<program>_scrape_error` is 1.
    pub fn before_scrape(&self, probe: Probe) {
        self.metrics.scrape_error(probe.name()).set(0);
        self.probes(|probes| probes.scraped.push(Arc::new(probe)));
    }

    fn probes<T>(&self, with: impl FnOnce(&mut Probes) -> T) -> T {
        // No code panics while it holds the lock.
        with(&mut self.probes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves the registry over HTTP until the returned value is dropped.
    ///
    /// # Errors
    /// The server cannot listen on the address.
    pub async fn serve(&self, address: SocketAddr) -> Result<HealthServer, BindError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| BindError { address, source })?;
        let routes = Router::new()
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .layer(map_response(once))
            .with_state(self.clone());
        // With port 0, the operating system chooses the port.
        let address = listener.local_addr().unwrap_or(address);
        tracing::info!(%address, "HTTP port open: /livez, /readyz, /metrics");
        let task = tokio::spawn(async move {
            // Ends only with the process.
            let _ = serve(LimitedListener::new(listener), routes).await;
        });
        Ok(HealthServer {
            _task: Some(AbortOnDropHandle::new(task)),
        })
    }
}

/// Closes the connection after the response; [`listener`] gives the reason.
async fn once<B>(mut response: Response<B>) -> Response<B> {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

async fn livez(State(health): State<HealthRegistry>) -> Response {
    let stopped = health.liveness.stopped();
    if stopped.is_empty() {
        return "alive\n".into_response();
    }
    let lines = stopped.iter().map(|loop_| {
        let since = clock::now() - loop_.since;
        format!(
            "{}: no progress since {} ({} s; the limit is {} s)\n",
            loop_.name,
            since.format("%Y-%m-%dT%H:%M:%SZ"),
            loop_.since.as_secs(),
            loop_.limit.as_secs(),
        )
    });
    (StatusCode::SERVICE_UNAVAILABLE, lines.collect::<String>()).into_response()
}

async fn readyz(State(health): State<HealthRegistry>) -> Response {
    match *health.phase.borrow() {
        Phase::Running => {}
        Phase::Starting => return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
        Phase::Restarting => {
            return (StatusCode::SERVICE_UNAVAILABLE, "restarting\n").into_response();
        }
        Phase::Stopping => return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response(),
    }
    let probes = health.probes(|probes| probes.ready.clone());
    let answers = join_all(probes.iter().map(|probe| probe.answer())).await;
    let lines: String = probes
        .iter()
        .zip(answers)
        .filter_map(|(probe, answer)| Some((probe.name(), answer.err()?)))
        // The text may be printed on a terminal.
        .map(|(name, error)| format!("{name}: {}\n", visible(&error)))
        .collect();
    match lines.is_empty() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
    }
}

async fn metrics(State(health): State<HealthRegistry>) -> Response {
    let probes = health.probes(|probes| probes.scraped.clone());
    join_all(probes.iter().map(async |probe| {
        let answer = probe.answer().await;
        if let Err(error) = &answer {
            tracing::debug!(source = probe.name(), error, "metrics could not be updated");
        }
        let error = health.metrics.scrape_error(probe.name());
        error.set(i64::from(answer.is_err()));
    }))
    .await;
    match health.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
