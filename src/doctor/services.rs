//! Checks of the services for results, heartbeats and traces.

use std::sync::Arc;

use secrecy::ExposeSecret as _;
use uuid::Uuid;

use super::{Check, Doctor, Finding, Outcome};
use crate::PROGRAM;
use crate::heartbeats::{HeartbeatWriter as _, RedisKeys};
use celery_worker_cli::traces;
use service_connection::error_chain::chain;

use celery_worker::results::{self, ResultBackend, ResultError};

impl Doctor {
    pub(super) async fn check_services(&self) -> Vec<Finding> {
        let (results, health, traces) = tokio::join!(
            self.check(Check::Results, "", self.check_results()),
            self.check_health(),
            self.check_traces(),
        );
        [results, health, traces].into_iter().flatten().collect()
    }

    async fn check_results(&self) -> Outcome {
        let backend = match self.result_backend() {
            Ok(backend) => backend,
            Err(error) => return Outcome::red(error, "correct celery.result_backend"),
        };
        match backend.probe().await {
            Ok(found) => Outcome::green(found),
            Err(error) => {
                let advice = match &error {
                    ResultError::Unreachable { .. } => {
                        "start it, or correct celery.result_backend (host, port, password); until then results wait, and \
                         messages stay unacknowledged"
                    }
                    _ => "grant its user reading and writing, or correct celery.result_backend",
                };
                Outcome::red(chain(&error).to_string(), advice)
            }
        }
    }

    fn result_backend(&self) -> Result<Arc<dyn ResultBackend>, String> {
        let celery = &self.settings.celery;
        let broker = celery
            .open_broker(&self.host)
            .map_err(|error| chain(&error).to_string())?;
        results::open(&celery.into(), broker).map_err(|error| chain(&error).to_string())
    }

    async fn check_health(&self) -> Option<Finding> {
        let health = &self.settings.health;
        if health.redis_url.expose_secret().is_empty() {
            return None;
        }
        let work = async {
            let key = format!(
                "health:{}:doctor-{}",
                health.service_type,
                Uuid::new_v4().simple()
            );
            let written = async {
                let keys = RedisKeys::new(health.redis_url.expose_secret(), health.ttl)?;
                keys.beat(&key).await?;
                keys.end(&key).await
            };
            match written.await {
                Ok(()) => Outcome::green("a key was written and deleted"),
                Err(error) => Outcome::red(
                    format!("no key can be written: {error}"),
                    "start this Redis or correct health.redis_url; without it, monitors report the services \
                     as dead",
                ),
            }
        };
        self.check(Check::Health, "", work).await
    }

    async fn check_traces(&self) -> Option<Finding> {
        let mut traces = self.settings.traces.clone();
        if !traces.is_enabled() {
            return None;
        }
        // Shorter than the limit of the check, so that the probe's own error is reported.
        traces.timeout = traces.timeout.min(self.options.limit / 2);
        let work = async {
            let asked = tokio::task::spawn_blocking(move || traces::probe(&traces, PROGRAM)).await;
            match asked.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(()) => Outcome::green("the collector accepts traces"),
                Err(error) => Outcome::yellow(
                    format!("the collector does not accept traces: {error}"),
                    "start it, or correct traces.endpoint or traces.headers; without it only the traces are lost",
                ),
            }
        };
        self.check(Check::Traces, "", work).await
    }
}
