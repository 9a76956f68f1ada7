//! The span of an attempt at a task: from the moment that it begins until what follows it is done.
//!
//! Its name and its `celery.` attributes are those that `opentelemetry-instrumentation-celery` gives a
//! Python worker's, so that traces of both look alike; the others are OpenTelemetry's conventions for
//! messaging, which that package does not know yet.

use serde_json::json;
use tracing::Span;
use tracing::field::Empty;

use super::in_flight::Request;
use crate::broker::{Disposition, TracePropagation};
use celery_protocol::exception::Exception;
use celery_protocol::isoformat;
use celery_protocol::message::{Protocol, TaskMessage};
use celery_protocol::repr;
use celery_protocol::result::State;

const OPERATION: &str = "run";

/// Makes the span that the message came from the parent of `span`; false if it came from none. With protocol 1
/// its id may stand in the body.
pub(super) fn adopt(span: &Span, request: &Request, propagation: &dyn TracePropagation) -> bool {
    let message = &request.message;
    propagation.extract(span, &request.raw.headers)
        || match message.protocol {
            Protocol::One => propagation.extract(span, &message.headers),
            Protocol::Two => false,
        }
}

/// Begins the span of an attempt; a disabled one, without cost, if nothing is traced.
pub(super) fn begin(request: &Request, hostname: &str, propagation: &dyn TracePropagation) -> Span {
    let message = &request.message;
    let key = &*request.routing_key;
    // Evaluated only if a layer wants the span.
    let span = tracing::info_span!(
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
        messaging.system = "rabbitmq",
        messaging.operation.type = "process",
        messaging.operation.name = OPERATION,
        messaging.destination.name = destination(request),
        messaging.rabbitmq.destination.routing_key = key,
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

/// The span of the task's own code, for its log lines: they carry the id and the name of the task, as with
/// Celery's task logger. Its level lets it through wherever any line is logged.
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

/// Both limits as a list of texts, in JSON: fields of `tracing` hold no lists.
fn time_limit(message: &TaskMessage) -> Option<String> {
    let (limit, soft) = message.time_limit;
    if limit.is_none() && soft.is_none() {
        return None;
    }
    let text = |seconds: Option<f64>| seconds.map(|s| s.to_string()).unwrap_or_default();
    Some(json!([text(limit), text(soft)]).to_string())
}

/// Notes the state that an attempt has come to.
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

/// Notes why an attempt is followed by another one.
pub(super) fn note_retry(reason: &Exception) {
    let span = Span::current();
    if !span.is_disabled() {
        span.record("celery.retry.reason", reason.text());
    }
}

/// Notes what becomes of the message.
pub(super) fn note_disposition(disposition: Disposition) {
    let word = match disposition {
        Disposition::Ack => "ack",
        Disposition::Reject => "reject",
        Disposition::Requeue => "requeue",
    };
    Span::current().record("ccat.message", word);
}
