//! Trace context in the headers of messages, from the sender to the receiver.

use std::fmt;

use serde_json::{Map, Value};
use tracing::Span;

/// Transfers a span in a message's headers; the implementation chooses the format. The default of every method does
/// nothing: messages then belong to no trace.
///
/// The worker creates ordinary `tracing` spans with OpenTelemetry's field names (`otel.name`, `otel.kind`,
/// `error.type`, `otel.status_description`). A layer of the process turns them into spans of a trace, and an
/// implementation of this trait, which knows that layer, connects them across processes.
pub trait TracePropagation: fmt::Debug + Send + Sync {
    /// Makes the span in the headers the parent of `span`. Returns true if the headers contain one. A span that is
    /// disabled stays unchanged.
    fn extract(&self, _span: &Span, _headers: &Map<String, Value>) -> bool {
        false
    }

    /// Writes `span` into the headers and replaces an existing one. Has no effect if the span is disabled.
    fn inject(&self, _span: &Span, _headers: &mut Map<String, Value>) {}
}

/// No propagation: messages belong to no trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPropagation;

impl TracePropagation for NoPropagation {}
