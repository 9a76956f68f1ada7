//! Traces: sends the spans of `tracing` that are meant for OpenTelemetry to a collector, if the settings name one.
//!
//! Worker, broker and domain create ordinary spans with OpenTelemetry's field names ([`is_traced`]). A layer of the
//! subscriber turns them into spans of OpenTelemetry ([`layer`]), and message headers connect those of several
//! processes ([`propagation`]). Without a collector no layer exists, and no span is enabled: a callsite then costs one
//! atomic read.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider};
use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::registry::LookupSpan;

use celery_worker::broker::TracePropagation;
use export::{Client, Collector};
use finish::{Exceptions, SpanFinisher};
use propagation::TraceContext;

use crate::program::Program;
use crate::settings::Traces;

mod export;
mod finish;
mod propagation;

pub use opentelemetry_sdk::trace::SdkTracer;

/// Time limit for sending the last spans at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// The only provider of the process, just as the process has only one log.
static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Starts to send spans if the settings name a collector, and returns the tracer for [`layer`]. Only the first call in
/// a process has an effect.
#[must_use]
pub fn start(settings: &Traces, program: Program) -> Option<SdkTracer> {
    if !settings.is_enabled() {
        return None;
    }
    let provider = PROVIDER.get_or_init(|| {
        let processor = BatchSpanProcessor::builder(Collector::new(settings, program)).build();
        let host = nix::unistd::gethostname().unwrap_or_default();
        let service = match settings.service_name.as_str() {
            "" => program.name,
            name => name,
        };
        let attributes = [
            KeyValue::new("service.name", service.to_owned()),
            KeyValue::new("service.version", program.version),
            KeyValue::new("host.name", host.to_string_lossy().into_owned()),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ];
        SdkTracerProvider::builder()
            .with_span_processor(SpanFinisher(processor))
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                settings.ratio,
            ))))
            .with_resource(Resource::builder().with_attributes(attributes).build())
            .build()
    });
    Some(tracer(provider, program))
}

fn tracer(provider: &SdkTracerProvider, program: Program) -> SdkTracer {
    let scope = InstrumentationScope::builder(program.name)
        .with_version(program.version)
        .build();
    provider.tracer_with_scope(scope)
}

/// Returns true for the spans of traces: those that have OpenTelemetry's field for the kind. The log and its levels
/// ignore them.
pub fn is_traced(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.fields().field("otel.kind").is_some()
}

/// Layer of a subscriber that creates OpenTelemetry's spans. It ignores events, which belong to the log.
pub fn layer<S>(tracer: SdkTracer) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let spans = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false);
    // Maximum level of these spans; without the hint every `trace!` of every library would be evaluated.
    let traced = FilterFn::new(is_traced).with_max_level_hint(LevelFilter::DEBUG);
    spans.and_then(Exceptions::default()).with_filter(traced)
}

/// Trace context in the headers of messages, in the format of `opentelemetry-instrumentation-celery`.
#[must_use]
pub fn propagation() -> Arc<dyn TracePropagation> {
    Arc::new(TraceContext)
}

/// Sends an empty batch to the collector of the settings. Blocks, for `settings.timeout` at most.
///
/// # Errors
/// The reason why the collector does not accept it, without secrets.
pub fn probe(settings: &Traces, program: Program) -> Result<(), String> {
    // In protobuf, a request without spans has no bytes.
    let asked = Client::new(settings, program).post(&[]);
    asked.map(drop).map_err(|error| error.to_string())
}

/// Sends the last spans; this takes at most a few seconds. Call it when no further span begins. Blocks.
pub fn close() {
    let Some(provider) = PROVIDER.get() else {
        return;
    };
    match provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
        Ok(()) | Err(OTelSdkError::AlreadyShutdown) => {}
        Err(_) => tracing::warn!("the last traces could not be sent in time"),
    }
}

/// Ids of the current trace and span, in hexadecimal.
#[must_use]
pub fn current() -> Option<(impl fmt::Display, impl fmt::Display)> {
    Context::map_current(|context| {
        context.has_active_span().then(|| {
            let span = context.span();
            let ids = span.span_context();
            (ids.trace_id(), ids.span_id())
        })
    })
}

#[cfg(test)]
#[allow(clippy::panic, clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use opentelemetry::Value;
    use opentelemetry::trace::{SpanKind, Status, TraceId};
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
    use serde_json::json;
    use tracing::Level;
    use tracing::field::Empty;
    use tracing_subscriber::prelude::*;

    use super::*;

    /// Collects the spans that have ended, in place of a collector.
    #[derive(Debug, Clone, Default)]
    struct Ended(Arc<Mutex<Vec<SpanData>>>);

    impl SpanProcessor for Ended {
        fn on_start(&self, _: &mut Span, _: &Context) {}
        fn on_end(&self, span: SpanData) {
            let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            spans.push(span);
        }
        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }
        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }
    }

    impl Ended {
        /// A tracer that records all spans and collects them here.
        fn tracer(&self) -> SdkTracer {
            let finish = SpanFinisher(self.clone());
            tracer(
                &SdkTracerProvider::builder()
                    .with_span_processor(finish)
                    .build(),
                Program::new("test", "1"),
            )
        }

        fn take(&self) -> Vec<SpanData> {
            std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }
    }

    /// Spans that end during `work`.
    fn traced(work: impl FnOnce()) -> Vec<SpanData> {
        let ended = Ended::default();
        let registry = tracing_subscriber::registry().with(layer(ended.tracer()));
        tracing::subscriber::with_default(registry, work);
        ended.take()
    }

    fn attribute<'a>(span: &'a SpanData, key: &str) -> Option<&'a Value> {
        let mut attributes = span.attributes.iter();
        let found = attributes.find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| &attribute.value)
    }

    #[test]
    fn a_failure_is_an_error_with_an_event() {
        let spans = traced(|| {
            let span = tracing::info_span!(
                "run",
                otel.name = "run/tasks.add",
                otel.kind = "consumer",
                otel.status_description = Empty,
                error.type = Empty,
                celery.timelimit = r#"["10",""]"#,
                celery.task_name = "x".repeat(5000),
                celery.retries = 2_i64,
            );
            tracing::event!(parent: &span, Level::ERROR, "a line of the log is not an event");
            tracing::record_all!(
                span,
                error.type = "OSError",
                otel.status_description = "y".repeat(5000)
            );
        });
        let [span] = &*spans else {
            panic!("{spans:?}");
        };
        assert_eq!(span.name, "run/tasks.add");
        assert_eq!(span.span_kind, SpanKind::Consumer);
        let message = format!("{}…", "y".repeat(4096));
        assert_eq!(span.status, Status::error(message.clone()));
        let [event] = &*span.events.events else {
            panic!("{:?}", span.events);
        };
        assert_eq!(event.name, "exception");
        let expected = [
            KeyValue::new("exception.type", "OSError"),
            KeyValue::new("exception.message", message),
        ];
        assert_eq!(event.attributes, expected);
        assert_eq!(attribute(span, "error.type"), Some(&"OSError".into()));
        let list = vec!["10".into(), "".into()];
        let list = Value::Array(opentelemetry::Array::String(list));
        assert_eq!(attribute(span, "celery.timelimit"), Some(&list));
        let name = format!("{}…", "x".repeat(4096));
        assert_eq!(attribute(span, "celery.task_name"), Some(&name.into()));
        assert_eq!(attribute(span, "celery.retries"), Some(&Value::I64(2)));
        // No location in the source code and no thread.
        assert_eq!(span.attributes.len(), 4, "{:?}", span.attributes);
    }

    #[test]
    fn only_spans_with_a_kind_are_traced() {
        let spans = traced(|| {
            let _outer = tracing::info_span!("outer", otel.kind = "internal").entered();
            let _library = tracing::info_span!("library").entered();
            let _inner = tracing::info_span!("inner", otel.kind = "producer").entered();
        });
        let [inner, outer] = &*spans else {
            panic!("{spans:?}");
        };
        assert_eq!((&*inner.name, &*outer.name), ("inner", "outer"));
        assert_eq!(inner.parent_span_id, outer.span_context.span_id());
    }

    #[test]
    fn headers_connect_a_receiver_with_its_sender() {
        let mut sent = json!({"task": "t"}).as_object().cloned().unwrap();
        let headers = &mut sent;
        let spans = traced(|| {
            let propagation = propagation();
            assert!(!propagation.extract(&tracing::Span::none(), headers));
            let sender = tracing::info_span!("send", otel.kind = "producer");
            propagation.inject(&sender, headers);
            assert!(propagation.extract(&tracing::Span::none(), headers));
            drop(sender);
            let receiver = tracing::info_span!("run", otel.kind = "consumer");
            assert!(propagation.extract(&receiver, headers));
            // A span that is not traced writes nothing.
            propagation.inject(&tracing::info_span!("library"), headers);
        });
        let [sender, receiver] = &*spans else {
            panic!("{spans:?}");
        };
        let ids = &sender.span_context;
        assert_ne!(ids.trace_id(), TraceId::INVALID);
        assert_eq!(receiver.span_context.trace_id(), ids.trace_id());
        assert_eq!(receiver.parent_span_id, ids.span_id());
        let parent = format!("00-{}-{}-01", ids.trace_id(), ids.span_id());
        assert_eq!(json!(sent), json!({"task": "t", "traceparent": parent}));
    }
}
