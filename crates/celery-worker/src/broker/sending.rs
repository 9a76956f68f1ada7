//! The span of a message that is sent.

use std::fmt;

use tracing::Span;
use tracing::field::Empty;

use super::{Publication, TracePropagation};

/// Names that Python's instrumentation gives the same span, and those of OpenTelemetry's conventions
/// for messaging (RabbitMQ's part).
const OPERATION: &str = "apply_async";

/// As kombu raises it.
const UNSENT: &str = "kombu.exceptions.OperationalError";

/// A task's message on its way to the broker.
pub(crate) struct Sending(Span);

impl Sending {
    /// Begins, and names the span in the message's headers for its receiver.
    pub(crate) fn begin(publication: &mut Publication, propagation: &dyn TracePropagation) -> Self {
        let message = &publication.message;
        let header = |name: &str| {
            let value = message.headers.get(name);
            value.and_then(|value| value.as_str()).unwrap_or_default()
        };
        let (exchange, key) = (&*publication.exchange, &*publication.routing_key);
        // Evaluated only if a layer wants the span.
        let span = tracing::info_span!(
            "send",
            otel.name = format!("{OPERATION}/{}", header("task")),
            otel.kind = "producer",
            otel.status_description = Empty,
            error.type = Empty,
            celery.action = OPERATION,
            celery.task_name = header("task"),
            messaging.message.id = header("id"),
            messaging.destination = key,
            messaging.system = "rabbitmq",
            messaging.operation.type = "send",
            messaging.operation.name = OPERATION,
            messaging.destination.name = destination(exchange, key),
            messaging.rabbitmq.destination.routing_key = key,
            messaging.message.body.size = i64::try_from(message.body.len()).unwrap_or(i64::MAX),
            messaging.destination_kind = exchange.is_empty().then_some("queue"),
            celery.exchange = (!exchange.is_empty()).then_some(exchange),
        );
        if !span.is_disabled() {
            propagation.inject(&span, &mut publication.message.headers);
        }
        Self(span)
    }

    /// Ends when the broker has answered, or has not.
    pub(crate) fn end<E: fmt::Display>(self, answer: &Result<(), E>) {
        if let (false, Err(error)) = (self.0.is_disabled(), answer) {
            tracing::record_all!(
                self.0,
                error.type = UNSENT,
                otel.status_description = %error
            );
        }
    }
}

fn destination(exchange: &str, key: &str) -> String {
    match exchange {
        "" => key.to_owned(),
        exchange => format!("{exchange}:{key}"),
    }
}
