//! Spans of the steps of an attempt, below the span of the caller.

use futures_util::FutureExt as _;
use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt as _;
use tracing::field::Empty;
use tracing::{Instrument as _, Span};

pub(crate) use opentelemetry::KeyValue;

/// A failure, as shown in a span.
pub(crate) trait Explain {
    /// Stable name of the failure.
    fn kind(&self) -> String;
    /// Error message without secrets.
    fn message(&self) -> String;
}

/// Runs a step in its own span below the current span. Without a current span, no span is created.
pub(crate) fn step<T, E: Explain>(
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    let span = match Span::current().is_disabled() {
        true => Span::none(),
        false => tracing::debug_span!(
            "step",
            otel.name = name,
            otel.kind = "internal",
            otel.status_description = Empty,
            error.type = Empty,
        ),
    };
    let noted = span.clone();
    // Composed instead of awaited in an async function, whose future would contain `work` twice; and boxed, so that the
    // caller's future does not contain the future of each step.
    Box::pin(work)
        .inspect(move |done| {
            if let (false, Err(error)) = (noted.is_disabled(), done) {
                tracing::record_all!(
                    noted,
                    error.type = error.kind(),
                    otel.status_description = error.message()
                );
            }
        })
        .instrument(span)
}

/// Adds attributes to the innermost traced span, which need not be the current one: a task's code runs in a span for its
/// log lines. They are not span fields, because the code that creates the span would have to declare them, and it does
/// not know about transfers.
pub(crate) fn set_attributes(attributes: impl FnOnce() -> Vec<KeyValue>) {
    let context = Context::current();
    if context.has_active_span() {
        for attribute in attributes() {
            context.span().set_attribute(attribute);
        }
    }
}
