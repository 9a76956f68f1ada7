//! Sends spans to a collector: OTLP/HTTP with protobuf, posted by the HTTP client that is here anyway.
//!
//! Runs on the thread of the SDK's batch processor. A batch that the collector does not take is
//! dropped: traces are worth no memory without end, and a transfer never waits for them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use prost::Message;
use secrecy::{ExposeSecret, SecretString};
use ureq::Agent;

use crate::Traces;

/// A collector that stays away is told of so often.
const TELL_EVERY: Duration = Duration::from_secs(600);

/// No answer of a collector is longer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// Why a batch was not taken. Holds neither headers nor the query of the address: both may be secrets.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExportError {
    #[error("{0}")]
    Unreachable(String),
    #[error(
        "it answered with status {0}; is this its address for OTLP over HTTP, with the path (http://…:4318/v1/traces)?"
    )]
    Status(u16),
    #[error("it refused {spans} of them: {reason}")]
    Refused { spans: i64, reason: String },
}

/// A collector, and how it has been lately.
#[derive(Debug)]
pub(super) struct Collector {
    agent: Agent,
    address: SecretString,
    /// The address for people.
    shown: String,
    headers: Vec<(String, SecretString)>,
    resource: ResourceAttributesWithSchema,
    outage: Mutex<Option<Outage>>,
}

/// A time in which batches were lost.
#[derive(Debug)]
struct Outage {
    told: Instant,
    spans: usize,
}

impl Collector {
    pub(super) fn new(settings: &Traces) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(settings.timeout))
            .http_status_as_error(false)
            // Whoever is redirected to must not get the headers.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("ccat-transfer/", env!("CARGO_PKG_VERSION")))
            .build();
        Self {
            agent: config.into(),
            address: settings.endpoint.clone().into(),
            shown: without_query(&settings.endpoint),
            headers: settings.header_pairs().unwrap_or_default(),
            resource: ResourceAttributesWithSchema::default(),
            outage: Mutex::default(),
        }
    }

    /// Posts a batch; done when the collector has taken all of it.
    pub(super) fn post(&self, batch: Vec<SpanData>) -> Result<(), ExportError> {
        let request = ExportTraceServiceRequest {
            resource_spans: group_spans_by_resource_and_scope(batch, &self.resource),
        };
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
        let mut answer = post
            .send(request.encode_to_vec().as_slice())
            .map_err(unreachable)?;
        if !answer.status().is_success() {
            return Err(ExportError::Status(answer.status().as_u16()));
        }
        let body = answer.body_mut().with_config().limit(MAX_ANSWER);
        let body = body.read_to_vec().map_err(unreachable)?;
        // One that cannot be read, as of a collector that answers in JSON, says that it has them.
        let partial = ExportTraceServiceResponse::decode(body.as_slice())
            .ok()
            .and_then(|answer| answer.partial_success);
        match partial {
            Some(partial) if partial.rejected_spans > 0 => Err(ExportError::Refused {
                spans: partial.rejected_spans,
                reason: partial.error_message.chars().take(200).collect(),
            }),
            _ => Ok(()),
        }
    }

    /// Tells of the first failure, then every so often, and of its end.
    fn tell(&self, spans: usize, sent: &Result<(), ExportError>) {
        let mut outage = self.outage.lock().unwrap_or_else(PoisonError::into_inner);
        match (sent, outage.as_mut()) {
            (Ok(()), None) => {}
            (Ok(()), Some(Outage { spans, .. })) => {
                tracing::info!(
                    collector = self.shown,
                    spans = *spans,
                    "traces arrive again; the spans since they did not are lost"
                );
                *outage = None;
            }
            (Err(_), Some(outage)) if outage.told.elapsed() < TELL_EVERY => outage.spans += spans,
            (Err(error), before) => {
                let spans = spans + before.map_or(0, |outage| outage.spans);
                tracing::warn!(
                    collector = self.shown,
                    %error,
                    spans,
                    "traces do not arrive; their spans are lost, and nothing else"
                );
                let told = Instant::now();
                *outage = Some(Outage { told, spans });
            }
        }
    }
}

impl SpanExporter for Collector {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.post(batch);
        self.tell(spans, &sent);
        sent.map_err(|error| OTelSdkError::InternalFailure(error.to_string()))
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.resource = resource.into();
    }
}

/// An address up to its query, in which some collectors take their key.
fn without_query(address: &str) -> String {
    let end = address.find(['?', '#']).unwrap_or(address.len());
    address[..end].to_owned()
}
