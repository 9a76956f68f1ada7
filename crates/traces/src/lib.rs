//! Traces: spans by OpenTelemetry, sent to a collector where the settings name one.
//!
//! One tracer for the process, as there is one log. Without a collector there is none, and everything
//! here is the look at one static that says so. A span is handed on by the ambient context of the
//! task that is polled ([`Span::around`], [`step`]), as logs have theirs, so that what is in between
//! need not know of it.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use opentelemetry::trace::{
    FutureExt as _, SpanBuilder, SpanRef, Status, TraceContextExt as _, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider};
use serde_json::{Map, Value};

use export::Collector;

mod export;
mod remote;
mod settings;

pub use opentelemetry::KeyValue;
pub use opentelemetry::trace::SpanKind;
pub use remote::Remote;
pub use settings::Traces;

/// How long the last spans may take, when the process ends.
const FLUSHED_WITHIN: Duration = Duration::from_secs(5);

/// Longest text of an attribute, in bytes: some come from messages, and an exception may quote whatever
/// a program has printed.
const MAX_TEXT: usize = 4096;

static TRACING: OnceLock<Tracing> = OnceLock::new();

struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// Starts to trace, if the settings name a collector. Only the first call in a process has an effect.
pub fn start(settings: &Traces) {
    if !settings.are_wanted() {
        return;
    }
    TRACING.get_or_init(|| {
        let processor = BatchSpanProcessor::builder(Collector::new(settings)).build();
        let host = nix::unistd::gethostname().unwrap_or_default();
        let mut attributes = vec![
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", host.to_string_lossy().into_owned()),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ];
        attributes.extend(
            (!settings.service_name.is_empty())
                .then(|| KeyValue::new("service.name", settings.service_name.clone())),
        );
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                settings.ratio,
            ))))
            .with_resource(Resource::builder().with_attributes(attributes).build())
            .build();
        let scope = InstrumentationScope::builder("ccat-transfer")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        Tracing {
            tracer: provider.tracer_with_scope(scope),
            provider,
        }
    });
}

/// Asks the collector of the settings to take no spans. Blocks, for `settings.timeout` at most.
///
/// # Errors
/// Why it does not, without secrets.
pub fn probe(settings: &Traces) -> Result<(), String> {
    let asked = Collector::new(settings).post(Vec::new());
    asked.map_err(|error| error.to_string())
}

/// Sends the last spans, for a few seconds at most; to be called when no further one begins. Blocks.
pub fn close() {
    let Some(tracing) = TRACING.get() else {
        return;
    };
    match tracing.provider.shutdown_with_timeout(FLUSHED_WITHIN) {
        Ok(()) | Err(OTelSdkError::AlreadyShutdown) => {}
        Err(_) => tracing::warn!("the last traces could not be sent in time"),
    }
}

/// Whether anything is traced.
#[must_use]
pub fn is_on() -> bool {
    TRACING.get().is_some()
}

/// A span that is under way. It ends when it is dropped.
#[derive(Debug)]
pub struct Span(Context);

impl Span {
    /// Begins a span beneath `parent`; without one beneath the span of whoever calls, or, where there
    /// is none, as the first of a trace. None where nothing is traced.
    #[must_use]
    pub fn begin(
        kind: SpanKind,
        name: impl Into<Cow<'static, str>>,
        parent: Option<&Remote>,
        attributes: Vec<KeyValue>,
    ) -> Option<Self> {
        let Tracing { tracer, .. } = TRACING.get()?;
        let around = Context::current();
        let above = match parent {
            Some(remote) => around.with_remote_span_context(remote.context().clone()),
            None => around.clone(),
        };
        let builder = SpanBuilder::from_name(name)
            .with_kind(kind)
            .with_attributes(attributes.into_iter().map(bounded));
        Some(Self(
            around.with_span(tracer.build_with_context(builder, &above)),
        ))
    }

    /// Polls `work` with this span as the current one.
    pub async fn around<F: Future>(&self, work: Pin<&mut F>) -> F::Output {
        work.with_context(self.0.clone()).await
    }

    /// Tells a message's receiver of this span.
    pub fn write(&self, headers: &mut Map<String, Value>) {
        remote::write(self.0.span().span_context(), headers);
    }

    /// Notes why what the span stands for has failed.
    pub fn fail(&self, error: &impl Explain) {
        fail(&self.0.span(), error);
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // By word: what was spawned beneath it may hold its context for longer.
        self.0.span().end();
    }
}

/// A failure, as a span shows it.
pub trait Explain {
    /// Its stable name.
    fn kind(&self) -> String;
    /// What happened, without secrets.
    fn message(&self) -> String;
}

/// Does a step of something in a span of its own beneath the current one, if there is one.
pub fn step<T, E: Explain>(
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    let span = is_in_span()
        .then(|| Span::begin(SpanKind::Internal, name, None, Vec::new()))
        .flatten();
    let context = span.as_ref().map(|span| span.0.clone()).unwrap_or_default();
    // Composed rather than awaited in a function of its own, which would have room for `work` twice; and in a
    // place of its own, so that whoever takes steps has no room for each of them.
    Box::pin(work)
        .inspect(move |done| {
            if let (Some(span), Err(error)) = (&span, done) {
                span.fail(error);
            }
            drop(span);
        })
        .with_context(context)
}

/// `work`, that is to be spawned, with the current span as its own.
#[must_use]
pub fn carried<T: 'static>(work: BoxFuture<'static, T>) -> BoxFuture<'static, T> {
    match is_in_span() {
        true => work.with_current_context().boxed(),
        false => work,
    }
}

/// Notes something about the current span, if it is one that is recorded.
pub fn note(attributes: impl FnOnce() -> Vec<KeyValue>) {
    with_current(|span| span.set_attributes(attributes().into_iter().map(bounded)));
}

/// Notes why what the current span stands for has failed.
pub fn note_failure(error: &impl Explain) {
    with_current(|span| fail(span, error));
}

/// Tells a message's receiver of the current span, if there is one.
pub fn write_current(headers: &mut Map<String, Value>) {
    if is_in_span() {
        Context::map_current(|context| remote::write(context.span().span_context(), headers));
    }
}

/// Ids of the current trace and span, in hexadecimal.
#[must_use]
pub fn current() -> Option<(impl fmt::Display, impl fmt::Display)> {
    TRACING.get()?;
    Context::map_current(|context| {
        context.has_active_span().then(|| {
            let span = context.span();
            (
                span.span_context().trace_id(),
                span.span_context().span_id(),
            )
        })
    })
}

fn is_in_span() -> bool {
    is_on() && Context::map_current(|context| context.has_active_span())
}

fn with_current(tell: impl FnOnce(&SpanRef<'_>)) {
    if is_on() {
        Context::map_current(|context| {
            let span = context.span();
            if span.is_recording() {
                tell(&span);
            }
        });
    }
}

/// As Python's SDK notes an exception: an event with its type and message, and the span's status.
fn fail(span: &SpanRef<'_>, error: &impl Explain) {
    if !span.is_recording() {
        return;
    }
    let (kind, message) = (error.kind(), shortened(error.message()));
    span.add_event(
        "exception",
        vec![
            KeyValue::new("exception.type", kind.clone()),
            KeyValue::new("exception.message", message.clone()),
        ],
    );
    span.set_attribute(KeyValue::new("error.type", kind));
    span.set_status(Status::error(message));
}

fn bounded(mut attribute: KeyValue) -> KeyValue {
    if let opentelemetry::Value::String(text) = &attribute.value
        && text.as_str().len() > MAX_TEXT
    {
        attribute.value = shortened(text.as_str().to_owned()).into();
    }
    attribute
}

fn shortened(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    text
}
