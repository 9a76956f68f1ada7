//! The span for publishing a task's message.

use std::fmt;

use tracing::Span;
use tracing::field::Empty;

use super::{Broker, Publication, TracePropagation};

/// Name of the operation in Python's instrumentation. The other names are from OpenTelemetry's conventions for
/// messaging, with those for RabbitMQ if it is the broker.
const OPERATION: &str = "apply_async";

/// Exception class that kombu raises if publishing fails.
const UNSENT: &str = "kombu.exceptions.OperationalError";

/// RabbitMQ's value of `messaging.system`.
pub(crate) const RABBITMQ: &str = "rabbitmq";

/// Value of `messaging.system` for a broker.
pub(crate) fn messaging_system(broker: &dyn Broker) -> &'static str {
    match broker.transport() {
        "amqp" => RABBITMQ,
        other => other,
    }
}

/// Span of a task's message from publishing to the broker's confirmation.
pub(crate) struct Sending(Span);

impl Sending {
    /// Starts the span, and writes it into the message's headers for the receiver.
    pub(crate) fn begin(
        publication: &mut Publication,
        broker: &dyn Broker,
        propagation: &dyn TracePropagation,
    ) -> Self {
        let message = &publication.message;
        let header = |name: &str| {
            let value = message.headers.get(name);
            value.and_then(|value| value.as_str()).unwrap_or_default()
        };
        let system = messaging_system(broker);
        let (exchange, key) = (&*publication.exchange, &*publication.routing_key);
        // Evaluated only if a layer wants the span.
        let span = tracing::debug_span!(
            "send",
            otel.name = format!("{OPERATION}/{}", header("task")),
            otel.kind = "producer",
            otel.status_description = Empty,
            error.type = Empty,
            celery.action = OPERATION,
            celery.task_name = header("task"),
            messaging.message.id = header("id"),
            messaging.destination = key,
            messaging.system = system,
            messaging.operation.type = "send",
            messaging.operation.name = OPERATION,
            messaging.destination.name = destination(exchange, key),
            messaging.rabbitmq.destination.routing_key = (system == RABBITMQ).then_some(key),
            messaging.message.body.size = i64::try_from(message.body.len()).unwrap_or(i64::MAX),
            messaging.destination_kind = exchange.is_empty().then_some("queue"),
            celery.exchange = (!exchange.is_empty()).then_some(exchange),
        );
        if !span.is_disabled() {
            propagation.inject(&span, &mut publication.message.headers);
        }
        Self(span)
    }

    /// Ends the span with the broker's answer or an error.
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
