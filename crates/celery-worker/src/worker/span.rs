//! The span of an attempt at a task: from its start until its follow-up tasks and its result are stored.
//!
//! Its name and its `celery.` attributes are those of `opentelemetry-instrumentation-celery` for a Python worker, so
//! that traces of both look alike; the other attributes are OpenTelemetry's conventions for messaging, which that
//! package does not use yet. Its level is DEBUG, so that a subscriber that shows spans at each line does not show it.

use serde_json::json;
use tracing::Span;
use tracing::field::Empty;

use super::request::Request;
use crate::broker::{Broker, Disposition, RABBITMQ, TracePropagation, messaging_system};
use celery_protocol::Headers;
use celery_protocol::exception::Exception;
use celery_protocol::isoformat;
use celery_protocol::message::{Protocol, TaskMessage};
use celery_protocol::repr;
use celery_protocol::result::State;

const OPERATION: &str = "run";

/// Makes the sender's span the parent of `span`; returns false if the message contains none. With protocol 1 the
/// sender's span may be in the body.
fn adopt(span: &Span, request: &Request, propagation: &dyn TracePropagation) -> bool {
    let message = &request.message;
    propagation.extract(span, &request.raw.headers)
        || match message.protocol {
            Protocol::One => propagation.extract(span, &message.headers),
            Protocol::Two => false,
        }
}

/// Writes the headers of a message for the next run of a task. All runs are children of the producer's span; if the
/// producer is not in a trace, they are children of the first run.
pub(super) fn keep_trace(
    request: &Request,
    headers: &mut Headers,
    propagation: &dyn TracePropagation,
) {
    let has_producers_span = adopt(&Span::none(), request, propagation);
    if !has_producers_span {
        propagation.inject(&Span::current(), headers);
    }
}

/// Creates the span of an attempt; a disabled one, without cost, if nothing is traced.
pub(super) fn begin(
    request: &Request,
    hostname: &str,
    broker: &dyn Broker,
    propagation: &dyn TracePropagation,
) -> Span {
    let message = &request.message;
    let key = &*request.routing_key;
    let system = messaging_system(broker);
    // Evaluated only if a layer wants the span.
    let span = tracing::debug_span!(
        "run",
        otel.name = format!("{OPERATION}/{}", message.task),
        otel.kind = "consumer",
        otel.status_description = Empty,
        error.type = Empty,
        celery.action = OPERATION,
        celery.task_name = message.task,
        celery.hostname = hostname,
        celery.delivery_info = delivery_info(request),
        messaging.message.id = message.id,
        messaging.conversation_id = message.correlation_id,
        messaging.destination = key,
        messaging.system = system,
        messaging.operation.type = "process",
        messaging.operation.name = OPERATION,
        messaging.destination.name = destination(request),
        messaging.rabbitmq.destination.routing_key = (system == RABBITMQ).then_some(key),
        messaging.message.conversation_id = message.correlation_id,
        messaging.message.body.size = i64::try_from(request.raw.body.len()).unwrap_or(i64::MAX),
        celery.reply_to = message.reply_to,
        celery.eta = message.eta.map(isoformat),
        celery.expires = message.expires.map(isoformat),
        celery.retries = (message.retries > 0).then_some(i64::from(message.retries)),
        celery.timelimit = time_limit(message),
        celery.state = Empty,
        celery.retry.reason = Empty,
        celery.revoked.reason = Empty,
        ccat.message = Empty,
    );
    if !span.is_disabled() {
        adopt(&span, request, propagation);
    }
    span
}

/// The span of the task's own code, for its log lines: they contain the id and the name of the task, as with Celery's
/// task logger. Its level is enabled whenever any line is logged.
pub(super) fn of_task(message: &TaskMessage) -> Span {
    tracing::error_span!("task", task = message.task, task_id = message.id)
}

fn delivery_info(request: &Request) -> String {
    repr::value(&json!({
        "exchange": request.exchange,
        "routing_key": request.routing_key,
        "priority": request.message.priority,
        "redelivered": request.redelivered,
    }))
}

fn destination(request: &Request) -> String {
    let Request {
        exchange,
        routing_key,
        queue,
        ..
    } = request;
    match exchange.as_str() {
        "" => queue.clone(),
        exchange => format!("{exchange}:{routing_key}:{queue}"),
    }
}

/// Both limits as a list of texts, in JSON: fields of `tracing` cannot be lists.
fn time_limit(message: &TaskMessage) -> Option<String> {
    let (limit, soft) = message.time_limit;
    if limit.is_none() && soft.is_none() {
        return None;
    }
    let text = |seconds: Option<f64>| seconds.map(|s| s.to_string()).unwrap_or_default();
    Some(json!([text(limit), text(soft)]).to_string())
}

/// Records the state of an attempt in its span.
pub(super) fn note_state(state: &State) {
    let span = Span::current();
    if span.is_disabled() {
        return;
    }
    span.record("celery.state", state.name());
    match state {
        State::Failure { exception, .. } | State::Retry { exception, .. } => {
            tracing::record_all!(
                span,
                error.type = exception.class(),
                otel.status_description = exception.text()
            );
        }
        State::Revoked(cause) => {
            span.record("celery.revoked.reason", cause.as_str());
        }
        State::Started { .. } | State::Custom { .. } | State::Success(_) => {}
    }
}

/// Records in the span why another attempt follows.
pub(super) fn note_retry(reason: &Exception) {
    let span = Span::current();
    if !span.is_disabled() {
        span.record("celery.retry.reason", reason.text());
    }
}

/// Records the disposition of the message in the span.
pub(super) fn note_disposition(disposition: Disposition) {
    let word = match disposition {
        Disposition::Ack => "ack",
        Disposition::Reject => "reject",
        Disposition::Requeue => "requeue",
    };
    Span::current().record("ccat.message", word);
}
