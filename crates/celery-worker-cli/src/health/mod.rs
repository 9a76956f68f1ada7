//! Health of the process, its metrics and its status, and the HTTP server that shows them to monitors.
//!
//! * `/livez` answers 503 while one of the loops of the process is stopped (see [`celery_worker::liveness`]), with the
//!   loop's name and the time. A broker or database that cannot be reached is no reason to restart the process, which
//!   would abort the running tasks.
//! * `/readyz` answers 503 with a line for each reason while the process cannot do its work.
//! * `/metrics` has the metrics of [`crate::metrics`].
//!
//! The server is read-only and contains no secrets. It listens only where the settings say; see [`crate::http`].

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::future::join_all;
use tokio::sync::watch;

use crate::clock;
use crate::http::{BindError, HttpServer, MONITORS, PEOPLE};
use crate::metrics::{Metrics, Registered};
use crate::program::Program;
use crate::text::visible;
use celery_worker::liveness::LivenessRegistry;

mod probe;

pub use probe::{PROBE_TIMEOUT, Probe};

/// Setting with the address of the server.
const LISTEN: &str = "http.listen";

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
    pub async fn serve(&self, address: SocketAddr) -> Result<HttpServer, BindError> {
        let server = HttpServer::listen(LISTEN, address, self.routes(), MONITORS).await?;
        tracing::info!(
            address = server.address().map(tracing::field::display),
            "HTTP port open: /livez, /readyz, /metrics"
        );
        Ok(server)
    }

    /// Serves the registry and pages for people, whose routes are none of `/livez`, `/readyz` and `/metrics`.
    ///
    /// # Errors
    /// The server cannot listen on the address.
    pub async fn serve_with(
        &self,
        address: SocketAddr,
        pages: Router,
    ) -> Result<HttpServer, BindError> {
        let routes = self.routes().merge(pages);
        let server = HttpServer::listen(LISTEN, address, routes, PEOPLE).await?;
        tracing::info!(
            address = server.address().map(tracing::field::display),
            "HTTP port open: /livez, /readyz, /metrics, and the pages of the program"
        );
        Ok(server)
    }

    fn routes(&self) -> Router {
        Router::new()
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }
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
