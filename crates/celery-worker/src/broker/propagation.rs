//! The trace that a message belongs to, as its headers carry it from the sender to the receiver.

use std::fmt;

use serde_json::{Map, Value};
use tracing::Span;

/// Carries a span over a message's headers, in a format of the implementation's choice. The default of every method
/// does nothing: messages then belong to no trace.
///
/// The worker creates ordinary `tracing` spans with OpenTelemetry's field names (`otel.name`, `otel.kind`,
/// `error.type`, `otel.status_description`). A layer of the process turns them into spans of a trace, and an
/// implementation of this trait, which knows that layer, connects them across processes.
pub trait TracePropagation: fmt::Debug + Send + Sync {
    /// Makes the span that the headers name the parent of `span`, and returns whether they name one. A span that
    /// is disabled stays as it is.
    fn extract(&self, _span: &Span, _headers: &Map<String, Value>) -> bool {
        false
    }

    /// Writes `span` into the headers in place of what is there. Without effect if it is disabled.
    fn inject(&self, _span: &Span, _headers: &mut Map<String, Value>) {}
}

/// Messages belong to no trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPropagation;

impl TracePropagation for NoPropagation {}
