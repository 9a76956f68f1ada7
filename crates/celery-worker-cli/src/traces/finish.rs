//! Additions to the spans of `tracing` for OpenTelemetry: events for exceptions, lists, and a limit of the length.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::{Status, TraceContextExt as _};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use tracing::dispatcher::WeakDispatch;
use tracing::field::{Field, Visit};
use tracing::span::{Id, Record};
use tracing::{Dispatch, Subscriber};
use tracing_opentelemetry::get_otel_context;
use tracing_subscriber::Layer;
use tracing_subscriber::layer;
use tracing_subscriber::registry::LookupSpan;

/// Maximum length of a text attribute, in bytes: some texts come from messages, and an exception may quote any output
/// of a program.
const MAX_TEXT: usize = 4096;

/// The only attribute that is a list of texts in Python's instrumentation; a field of `tracing` contains it as JSON.
const LIST: &str = "celery.timelimit";

/// Adds an event `exception` with type and message to each span with the field `error.type`, as Python's SDK does for
/// an exception. An event of `tracing` would also be a line of the log.
#[derive(Debug, Default)]
pub(super) struct Exceptions {
    dispatch: OnceLock<WeakDispatch>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Exceptions {
    fn on_register_dispatch(&self, dispatch: &Dispatch) {
        self.dispatch.get_or_init(|| dispatch.downgrade());
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: layer::Context<'_, S>) {
        let mut failure = FailureFields::default();
        values.record(&mut failure);
        let Some(kind) = failure.kind else {
            return;
        };
        let dispatch = self.dispatch.get().and_then(WeakDispatch::upgrade);
        if let Some(context) = dispatch.and_then(|dispatch| get_otel_context(id, &dispatch)) {
            let message = shortened(failure.message.unwrap_or_default());
            context.span().add_event(
                "exception",
                vec![
                    KeyValue::new("exception.type", kind),
                    KeyValue::new("exception.message", message),
                ],
            );
        }
    }
}

/// A failure from the fields of a span.
#[derive(Default)]
struct FailureFields {
    kind: Option<String>,
    message: Option<String>,
}

impl Visit for FailureFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "error.type" => self.kind = Some(value.to_owned()),
            "otel.status_description" => self.message = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Converts the ended spans to their final form before they enter the queue of `P`.
#[derive(Debug)]
pub(super) struct SpanFinisher<P>(pub(super) P);

impl<P: SpanProcessor> SpanProcessor for SpanFinisher<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.0.on_start(span, context);
    }

    fn on_end(&self, mut span: SpanData) {
        for attribute in &mut span.attributes {
            finish(attribute);
        }
        if let Status::Error { description } = &mut span.status
            && description.len() > MAX_TEXT
        {
            *description = shortened(description.to_string()).into();
        }
        self.0.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

fn finish(attribute: &mut KeyValue) {
    let Value::String(text) = &attribute.value else {
        return;
    };
    if attribute.key.as_str() == LIST
        && let Ok(list) = serde_json::from_str::<Vec<String>>(text.as_str())
    {
        let list = list.into_iter().map(StringValue::from).collect();
        attribute.value = Value::Array(Array::String(list));
    } else if text.as_str().len() > MAX_TEXT {
        attribute.value = shortened(text.as_str().to_owned()).into();
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    text
}
