//! Sends spans to a collector: OpenTelemetry's exporter for OTLP/HTTP with protobuf, with the HTTP client that the
//! program contains already.
//!
//! Runs on the thread of the SDK's batch processor. A batch that the collector does not accept is dropped: traces must
//! not use unlimited memory, and a transfer never waits for them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    Protocol, RetryPolicy, SpanExporter as OtlpExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use prost::Message;
use secrecy::{ExposeSecret, SecretString};
use ureq::Agent;

use crate::program::Program;
use crate::settings::Traces;

/// Minimum interval between log lines while the collector cannot be reached.
const LOG_INTERVAL: Duration = Duration::from_secs(600);

/// Maximum length of a collector's response, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// Reason why a batch was not accepted. Contains neither headers nor the query of the address: both may be secrets.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExportError {
    #[error("{0}")]
    Unreachable(String),
    #[error(
        "it answered with status {0}; check that this is its address for OTLP over HTTP, with the path \
         (http://…:4318/v1/traces)"
    )]
    Status(u16),
    #[error("it refused {spans} of them: {reason}")]
    Refused { spans: i64, reason: String },
    #[error("the exporter: {0}")]
    Unusable(String),
}

/// HTTP client for the exporter: `ureq`, with the address and the headers of the settings.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    address: SecretString,
    /// Address for log lines, without its query.
    shown: String,
    headers: Vec<(String, SecretString)>,
    /// Reason why the last request failed; the exporter's own error does not contain it.
    failure: Mutex<Option<ExportError>>,
}

impl Client {
    pub(super) fn new(settings: &Traces, program: Program) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(settings.timeout))
            .http_status_as_error(false)
            // The target of a redirection must not receive the headers.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(format!("{}/{}", program.name, program.version))
            .build();
        Self {
            agent: config.into(),
            address: settings.endpoint.clone().into(),
            shown: without_query(&settings.endpoint),
            headers: settings.header_pairs().unwrap_or_default(),
            failure: Mutex::default(),
        }
    }

    /// Posts a batch; succeeds if the collector accepted all of it. Blocks, for at most the time limit of the settings.
    pub(super) fn post(&self, batch: &[u8]) -> Result<Vec<u8>, ExportError> {
        let unreachable = |error: ureq::Error| {
            let text = error.to_string();
            ExportError::Unreachable(text.replace(self.address.expose_secret(), &self.shown))
        };
        let post = self
            .agent
            .post(self.address.expose_secret())
            .header("Content-Type", "application/x-protobuf");
        let post = self.headers.iter().fold(post, |post, (name, value)| {
            post.header(name, value.expose_secret())
        });
        let mut answer = post.send(batch).map_err(unreachable)?;
        if !answer.status().is_success() {
            return Err(ExportError::Status(answer.status().as_u16()));
        }
        let body = answer.body_mut().with_config().limit(MAX_ANSWER);
        let body = body.read_to_vec().map_err(unreachable)?;
        // A response that cannot be decoded, e.g. JSON from some collectors, counts as accepted.
        let partial = ExportTraceServiceResponse::decode(body.as_slice())
            .ok()
            .and_then(|answer| answer.partial_success);
        match partial {
            Some(partial) if partial.rejected_spans > 0 => Err(ExportError::Refused {
                spans: partial.rejected_spans,
                reason: partial.error_message.chars().take(200).collect(),
            }),
            _ => Ok(body),
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<ExportError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl HttpClient for Client {
    /// Uses only the body of the request: the exporter does not know the precedence of the settings over
    /// OpenTelemetry's variables, and adds headers from these variables.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        match self.post(request.body()) {
            Ok(body) => Ok(Response::new(body.into())),
            Err(error) => {
                let text = error.to_string();
                *self.failure() = Some(error);
                Err(text.into())
            }
        }
    }
}

/// A collector and its current outage.
#[derive(Debug)]
pub(super) struct Collector {
    client: Arc<Client>,
    exporter: Result<OtlpExporter, String>,
    outage: Mutex<Option<Outage>>,
}

/// A period in which batches were lost.
#[derive(Debug)]
struct Outage {
    logged_at: Instant,
    spans: usize,
}

impl Collector {
    pub(super) fn new(settings: &Traces, program: Program) -> Self {
        let client = Arc::new(Client::new(settings, program));
        let exporter = OtlpExporter::builder()
            .with_http()
            // The value is not used; without it the exporter would read one of OpenTelemetry's variables.
            .with_endpoint(&client.shown)
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(settings.timeout)
            // A rejected batch is dropped; the documentation of this module gives the reason.
            .with_retry_policy(RetryPolicy::disabled())
            .with_shared_http_client(client.clone())
            .build();
        Self {
            client,
            exporter: exporter.map_err(|error| error.to_string()),
            outage: Mutex::default(),
        }
    }

    async fn send(&self, batch: Vec<SpanData>) -> Result<(), ExportError> {
        let unusable = |error: &dyn fmt::Display| ExportError::Unusable(error.to_string());
        let exporter = self.exporter.as_ref().map_err(|error| unusable(error))?;
        let sent = exporter.export(batch).await;
        match self.client.failure().take() {
            Some(failure) => Err(failure),
            None => sent.map_err(|error| unusable(&error)),
        }
    }

    /// Logs the first failure, then at most one failure per `LOG_INTERVAL`, and the end of the outage.
    fn log_outcome(&self, spans: usize, sent: &Result<(), ExportError>) {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match (sent, outage.as_mut()) {
            (Ok(()), None) => {}
            (Ok(()), Some(Outage { spans, .. })) => {
                tracing::info!(
                    collector = self.client.shown,
                    spans = *spans,
                    "traces are accepted again; the spans in between are lost"
                );
                *outage = None;
            }
            (Err(_), Some(outage)) if outage.logged_at.elapsed() < LOG_INTERVAL => {
                outage.spans += spans
            }
            (Err(error), before) => {
                let spans = spans + before.map_or(0, |outage| outage.spans);
                tracing::warn!(
                    collector = self.client.shown,
                    %error,
                    spans,
                    "traces were not accepted; their spans are lost, nothing else is affected"
                );
                let logged_at = Instant::now();
                *outage = Some(Outage { logged_at, spans });
            }
        }
    }
}

impl SpanExporter for Collector {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.send(batch).await;
        self.log_outcome(spans, &sent);
        sent.map_err(|error| OTelSdkError::InternalFailure(error.to_string()))
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Ok(exporter) = &mut self.exporter {
            exporter.set_resource(resource);
        }
    }
}

/// An address without its query, in which some collectors expect their key.
fn without_query(address: &str) -> String {
    let end = address.find(['?', '#']).unwrap_or(address.len());
    address[..end].to_owned()
}
