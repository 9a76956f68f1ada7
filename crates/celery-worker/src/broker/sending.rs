//! The span of a message that is sent.

use std::fmt;

use super::Publication;
use traces::{Explain, KeyValue, Span, SpanKind, is_on};

/// Names that Python's instrumentation gives the same span, and those of OpenTelemetry's conventions
/// for messaging (RabbitMQ's part).
const OPERATION: &str = "apply_async";

/// A task's message on its way to the broker.
pub(crate) struct Sending(Option<Span>);

impl Sending {
    /// Begins, and tells the receiver of it in the message's headers.
    pub(crate) fn begin(publication: &mut Publication) -> Self {
        if !is_on() {
            return Self(None);
        }
        let header = |name: &str| {
            let value = publication.message.headers.get(name);
            value.and_then(|value| value.as_str()).unwrap_or_default()
        };
        let (task, id) = (header("task").to_owned(), header("id").to_owned());
        let name = format!("{OPERATION}/{task}");
        let (exchange, key) = (&publication.exchange, &publication.routing_key);
        let destination = match exchange.as_str() {
            "" => key.clone(),
            exchange => format!("{exchange}:{key}"),
        };
        let size = i64::try_from(publication.message.body.len()).unwrap_or(i64::MAX);
        let mut attributes = vec![
            KeyValue::new("celery.action", OPERATION),
            KeyValue::new("celery.task_name", task),
            KeyValue::new("messaging.message.id", id),
            KeyValue::new("messaging.destination", key.clone()),
            KeyValue::new("messaging.system", "rabbitmq"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.operation.name", OPERATION),
            KeyValue::new("messaging.destination.name", destination),
            KeyValue::new("messaging.rabbitmq.destination.routing_key", key.clone()),
            KeyValue::new("messaging.message.body.size", size),
        ];
        attributes.push(match exchange.as_str() {
            "" => KeyValue::new("messaging.destination_kind", "queue"),
            exchange => KeyValue::new("celery.exchange", exchange.to_owned()),
        });
        let span = Span::begin(SpanKind::Producer, name, None, attributes);
        if let Some(span) = &span {
            span.write(&mut publication.message.headers);
        }
        Self(span)
    }

    /// Ends when the broker has answered, or has not.
    pub(crate) fn end<E: fmt::Display>(self, answer: &Result<(), E>) {
        if let (Some(span), Err(error)) = (&self.0, answer) {
            span.fail(&Unsent(error));
        }
    }
}

/// Why a message was not sent.
struct Unsent<'a, E>(&'a E);

impl<E: fmt::Display> Explain for Unsent<'_, E> {
    /// As kombu raises it.
    fn kind(&self) -> String {
        "kombu.exceptions.OperationalError".into()
    }

    fn message(&self) -> String {
        self.0.to_string()
    }
}
