//! Spans of the steps of an attempt, beneath the span of whatever makes the attempt.

use futures_util::FutureExt as _;
use tracing::field::Empty;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

pub(crate) use opentelemetry::KeyValue;

/// A failure, as a span shows it.
pub(crate) trait Explain {
    /// Its stable name.
    fn kind(&self) -> String;
    /// What happened, without secrets.
    fn message(&self) -> String;
}

/// Does a step of something in a span of its own beneath the current one, if there is one.
pub(crate) fn step<T, E: Explain>(
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    let span = match Span::current().is_disabled() {
        true => Span::none(),
        false => tracing::info_span!(
            "step",
            otel.name = name,
            otel.kind = "internal",
            otel.status_description = Empty,
            error.type = Empty,
        ),
    };
    let noted = span.clone();
    // Composed rather than awaited in a function of its own, which would have room for `work` twice; and in a
    // place of its own, so that whoever takes steps has no room for each of them.
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

/// Notes something about the current span, if it is traced. A field would have to be known to whatever began the
/// span, which knows nothing of transfers.
pub(crate) fn note(attributes: impl FnOnce() -> Vec<KeyValue>) {
    let span = Span::current();
    if !span.is_disabled() {
        for KeyValue { key, value, .. } in attributes() {
            span.set_attribute(key, value);
        }
    }
}
