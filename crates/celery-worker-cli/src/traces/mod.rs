//! Traces: the spans of `tracing` that are meant for OpenTelemetry, sent to a collector where the settings name one.
//!
//! Worker, broker and domain create ordinary spans with OpenTelemetry's field names ([`is_traced`]). A layer of the
//! subscriber turns them into spans of OpenTelemetry ([`layer`]), and headers connect those of several
//! processes ([`propagation`]). Without a collector there is no layer, and no span is enabled: a callsite then costs
//! the look at one atomic.

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
use finish::{Exceptions, Finish};
use propagation::TraceContext;

use crate::program::Program;
use crate::settings::Traces;

mod export;
mod finish;
mod propagation;

pub use opentelemetry_sdk::trace::SdkTracer;

/// How long the last spans may take, when the process ends.
const FLUSHED_WITHIN: Duration = Duration::from_secs(5);

/// One for the process, as there is one log.
static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Starts to send spans, if the settings name a collector; the tracer is for the [`layer`] that makes them. Only
/// the first call in a process has an effect.
#[must_use]
pub fn start(settings: &Traces, program: Program) -> Option<SdkTracer> {
    if !settings.are_wanted() {
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
            .with_span_processor(Finish(processor))
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

/// Returns true for the spans of traces: those that name their kind in OpenTelemetry's field. They concern neither
/// the log nor its levels.
pub fn is_traced(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.fields().field("otel.kind").is_some()
}

/// Layer of a subscriber that makes OpenTelemetry's spans. Events, which are the log, are not for it.
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
    // Level of the spans; without it, every `trace!` of every library would be asked for.
    let traced = FilterFn::new(is_traced).with_max_level_hint(LevelFilter::INFO);
    spans.and_then(Exceptions::default()).with_filter(traced)
}

/// Trace context in the headers of messages, as `opentelemetry-instrumentation-celery` writes it.
#[must_use]
pub fn propagation() -> Arc<dyn TracePropagation> {
    Arc::new(TraceContext)
}

/// Asks the collector of the settings to take no spans. Blocks, for `settings.timeout` at most.
///
/// # Errors
/// Why it does not, without secrets.
pub fn probe(settings: &Traces, program: Program) -> Result<(), String> {
    // In protobuf, a request without spans is no bytes.
    let asked = Client::new(settings, program).post(&[]);
    asked.map(drop).map_err(|error| error.to_string())
}

/// Sends the last spans, for a few seconds at most; to be called when no further one begins. Blocks.
pub fn close() {
    let Some(provider) = PROVIDER.get() else {
        return;
    };
    match provider.shutdown_with_timeout(FLUSHED_WITHIN) {
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

    /// Spans that have ended, in place of a collector.
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
        /// A tracer whose spans end here, and record all.
        fn tracer(&self) -> SdkTracer {
            let finish = Finish(self.clone());
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

    /// Spans that `work` ends.
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
            tracing::event!(parent: &span, Level::ERROR, "a line of the log is no event");
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
        // Nothing of the place in the source, or of the thread.
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
            // Nothing of a span that is not traced.
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
