//! The side port: `/livez`, `/readyz` and `/metrics` over HTTP, for monitors.
//!
//! * `/livez` says whether the process should go on living: 503 when one of its loops stands still
//!   (see [`celery_worker::liveness`]), with the loop's name and since when. A broker or database that is away
//!   is no reason to start the process anew, and a copy under way would be lost by it.
//! * `/readyz` says whether it does its work now: 503 with a line for each reason.
//! * `/metrics` is what [`crate::metrics`] counts.
//!
//! Nothing here can be changed from outside, and nothing is secret; still it listens where the
//! settings say and nowhere else. One request a connection, few connections at a time, no answer
//! that takes longer than some seconds.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Router, serve};
use chrono::Utc;
use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::metrics::{Metrics, Registered};
use crate::telemetry::text::visible;
use celery_worker::liveness::LivenessRegistry;
use listener::Bounded;

mod listener;
mod probe;

pub use probe::{Probe, WITHIN};

/// What a process shows. Filled while it starts, and after. Clones share it.
#[derive(Clone)]
pub struct Board {
    /// Its loops.
    pub pulses: LivenessRegistry,
    /// What it counts.
    pub metrics: Metrics,
    probes: Arc<Mutex<Probes>>,
    phase: watch::Sender<Phase>,
    doing: Arc<OnceLock<Describing>>,
}

/// Says what a process does just now, in a few words.
type Describing = Box<dyn Fn() -> String + Send + Sync>;

/// How far the process is. It only ever goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not yet at work.
    Starting,
    /// At work.
    Running,
    /// Told to begin anew; what runs goes on to its end.
    Restarting,
    /// Told to stop; what runs goes on to its end.
    Stopping,
}

#[derive(Debug, Default)]
struct Probes {
    ready: Vec<Arc<Probe>>,
    scraped: Vec<Arc<Probe>>,
}

/// Why there is no side port.
#[derive(Debug, thiserror::Error)]
#[error(
    "http.listen: cannot listen on {address}; see whether another process does, or choose another port"
)]
pub struct BindError {
    address: SocketAddr,
    source: std::io::Error,
}

impl Board {
    /// An empty one, for loops that may be late by `grace`.
    ///
    /// # Errors
    /// See [`Metrics::new`].
    pub fn new(grace: Duration) -> Result<Self, crate::metrics::Error> {
        Ok(Self {
            pulses: LivenessRegistry::new(grace),
            metrics: Metrics::new()?,
            probes: Arc::default(),
            phase: watch::Sender::new(Phase::Starting),
            doing: Arc::default(),
        })
    }

    /// Notes how far the process is, unless it was further already; only one that is
    /// [`Phase::Running`] can be ready.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let goes_on = phase > *now;
            if goes_on {
                *now = phase;
            }
            goes_on
        });
    }

    /// Has `doing` say what the process does just now, in a few words. The first one counts.
    pub fn describe(&self, doing: impl Fn() -> String + Send + Sync + 'static) {
        let _ = self.doing.set(Box::new(doing));
    }

    /// What the process does just now, in a few words.
    #[must_use]
    pub fn doing(&self) -> String {
        self.doing.get().map_or_else(String::new, |doing| doing())
    }

    /// How far it is, and its changes.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Shows metrics.
    ///
    /// # Errors
    /// That one of this name is shown already.
    pub fn show<'a>(
        &self,
        metrics: impl IntoIterator<Item = &'a Box<dyn Registered>>,
    ) -> Result<(), crate::metrics::Error> {
        self.metrics.add(metrics)
    }

    /// The process is ready only while the answer is `Ok`.
    pub fn ready_if(&self, probe: Probe) {
        self.probes(|probes| probes.ready.push(Arc::new(probe)));
    }

    /// Asked before the metrics are shown, to bring some of them up to date. Where that fails they
    /// are shown as they are, and `ccat_transfer_scrape_error` says so.
    pub fn ask_before_scrape(&self, probe: Probe) {
        self.metrics.scrape_error(probe.name()).set(0);
        self.probes(|probes| probes.scraped.push(Arc::new(probe)));
    }

    fn probes<T>(&self, with: impl FnOnce(&mut Probes) -> T) -> T {
        // No code panics while it holds the lock.
        with(&mut self.probes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves it until the answer is dropped.
    ///
    /// # Errors
    /// That the address cannot be had.
    pub async fn serve(&self, address: SocketAddr) -> Result<AbortOnDropHandle<()>, BindError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| BindError { address, source })?;
        let routes = Router::new()
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .layer(map_response(once))
            .with_state(self.clone());
        // With port 0 it is the system that has chosen.
        let address = listener.local_addr().unwrap_or(address);
        tracing::info!(%address, "side port open: /livez, /readyz, /metrics");
        Ok(AbortOnDropHandle::new(tokio::spawn(async move {
            // Ends only with the process.
            let _ = serve(Bounded::new(listener), routes).await;
        })))
    }
}

/// One request a connection: see [`listener`].
async fn once<B>(mut response: Response<B>) -> Response<B> {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

async fn livez(State(board): State<Board>) -> Response {
    let stopped = board.pulses.stopped();
    if stopped.is_empty() {
        return "alive\n".into_response();
    }
    let lines = stopped.iter().map(|loop_| {
        let since = Utc::now() - loop_.since;
        format!(
            "{}: stands still since {} ({} s; {} s are too long)\n",
            loop_.name,
            since.format("%Y-%m-%dT%H:%M:%SZ"),
            loop_.since.as_secs(),
            loop_.limit.as_secs(),
        )
    });
    (StatusCode::SERVICE_UNAVAILABLE, lines.collect::<String>()).into_response()
}

async fn readyz(State(board): State<Board>) -> Response {
    match *board.phase.borrow() {
        Phase::Running => {}
        Phase::Starting => return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
        Phase::Restarting => {
            return (StatusCode::SERVICE_UNAVAILABLE, "restarting\n").into_response();
        }
        Phase::Stopping => return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response(),
    }
    let probes = board.probes(|probes| probes.ready.clone());
    let answers = join_all(probes.iter().map(|probe| probe.answer())).await;
    let lines: String = probes
        .iter()
        .zip(answers)
        .filter_map(|(probe, answer)| Some((probe.name(), answer.err()?)))
        // The client may be a terminal.
        .map(|(name, error)| format!("{name}: {}\n", visible(&error)))
        .collect();
    match lines.is_empty() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
    }
}

async fn metrics(State(board): State<Board>) -> Response {
    let probes = board.probes(|probes| probes.scraped.clone());
    join_all(probes.iter().map(async |probe| {
        let answer = probe.answer().await;
        if let Err(error) = &answer {
            tracing::debug!(
                source = probe.name(),
                error,
                "metrics could not be brought up to date"
            );
        }
        let error = board.metrics.scrape_error(probe.name());
        error.set(i64::from(answer.is_err()));
    }))
    .await;
    match board.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
