//! Reads and writes the sender's span in the headers of a message: W3C Trace Context
//! (<https://www.w3.org/TR/trace-context/>).
//!
//! Every producer can write arbitrary values into these headers. A text that does not have exactly the specified form
//! is ignored, also where OpenTelemetry's propagator would be more lenient: the receiver then begins a new trace.

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use serde_json::{Map, Value};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use celery_worker::broker::TracePropagation;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Length of `traceparent` in version 00, which is also the part that later versions keep.
const LENGTH: usize = 55;

/// Maximum length of a `traceparent` of a later version, which may be longer.
const MAX_LENGTH: usize = 256;

/// Maximum number of characters of `tracestate` that must be passed on. A longer one may be omitted, and is omitted
/// here.
const MAX_STATE: usize = 512;

/// Trace context in the headers `traceparent` and `tracestate`.
#[derive(Debug)]
pub(super) struct TraceContext;

impl TracePropagation for TraceContext {
    fn extract(&self, span: &Span, headers: &Map<String, Value>) -> bool {
        let sender = read(headers);
        let is_named = sender.has_active_span();
        if is_named {
            // Has no effect on a span that is not traced; such a span has no parent either.
            let _ = span.set_parent(sender);
        }
        is_named
    }

    fn inject(&self, span: &Span, headers: &mut Map<String, Value>) {
        write(&span.context(), headers);
    }
}

/// The sender's span; a context without a span if the headers name none.
fn read(headers: &Map<String, Value>) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Read(headers))
}

/// Writes the span of a context into a message's headers and replaces the existing one.
fn write(context: &Context, headers: &mut Map<String, Value>) {
    TraceContextPropagator::new().inject_context(context, &mut Write(headers));
}

struct Read<'a>(&'a Map<String, Value>);

impl Extractor for Read<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let text = self.0.get(key)?.as_str()?;
        let is_usable = match key {
            TRACEPARENT => is_parent(text),
            _ => is_state(text),
        };
        is_usable.then_some(text)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

struct Write<'a>(&'a mut Map<String, Value>);

impl Injector for Write<'_> {
    fn set(&mut self, key: &str, value: String) {
        match value.is_empty() {
            true => self.0.remove(key),
            false => self.0.insert(key.into(), value.into()),
        };
    }
}

fn is_parent(text: &str) -> bool {
    let Some((known, more)) = text.as_bytes().split_at_checked(LENGTH) else {
        return false;
    };
    let mut bytes = known.iter().enumerate();
    let has_form = bytes.all(|(at, byte)| match at {
        2 | 35 | 52 => *byte == b'-',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    });
    let is_later = !known.starts_with(b"00") && more.starts_with(b"-");
    has_form && (more.is_empty() || is_later) && text.len() <= MAX_LENGTH && text.is_ascii()
}

fn is_state(text: &str) -> bool {
    text.len() <= MAX_STATE && text.chars().all(|c| matches!(c, ' '..='~'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use opentelemetry::trace::{SpanContext, TraceFlags, TraceState};
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(fields: Value) -> Map<String, Value> {
        fields.as_object().cloned().unwrap()
    }

    /// The sender's span, if the headers name one.
    fn sender(headers: &Map<String, Value>) -> Option<SpanContext> {
        let context = super::read(headers);
        let is_named = context.has_active_span();
        is_named.then(|| context.span().span_context().clone())
    }

    fn write(span: SpanContext, headers: &mut Map<String, Value>) {
        super::write(&Context::new().with_remote_span_context(span), headers);
    }

    fn read(traceparent: impl Into<Value>) -> Option<SpanContext> {
        sender(&headers(json!({"traceparent": traceparent.into()})))
    }

    #[test]
    fn a_parent_is_read_and_written() {
        let sent = headers(json!({"traceparent": PARENT, "tracestate": "a=1,b@c=2", "task": "t"}));
        let remote = sender(&sent).unwrap();
        assert!(remote.is_sampled() && remote.is_remote());
        let mut written = headers(json!({"tracestate": "old=1", "task": "t"}));
        write(remote.clone(), &mut written);
        assert_eq!(written, sent);
        // A context without a state removes the old state, which belonged to another trace.
        write(read(PARENT).unwrap(), &mut written);
        assert_eq!(
            written,
            headers(json!({"traceparent": PARENT, "task": "t"}))
        );
    }

    #[rstest]
    // Not sampled; an unknown flag; a later version, with and without more.
    #[case("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", Some(false))]
    #[case("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-fe", Some(false))]
    #[case("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some(true))]
    #[case(
        "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what",
        Some(true)
    )]
    #[case("", None)]
    #[case("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None)]
    #[case("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", None)]
    #[case("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x", None)]
    #[case("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None)]
    #[case("00-00000000000000000000000000000000-b7ad6b7169203331-01", None)]
    #[case("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None)]
    #[case("00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None)]
    #[case("00-0af7651916cd43dd8448eb211c80319-cb7ad6b7169203331-01", None)]
    #[case(" 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None)]
    #[case("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0é", None)]
    fn forms_of_a_parent(#[case] text: &str, #[case] sampled: Option<bool>) {
        assert_eq!(read(text).map(|remote| remote.is_sampled()), sampled);
    }

    #[test]
    fn invalid_parent_headers_are_ignored() {
        assert_eq!(read(json!([PARENT])), None);
        assert_eq!(
            read(format!("cc{}-{}", &PARENT[2..], "x".repeat(MAX_LENGTH))),
            None
        );
        assert_eq!(sender(&headers(json!({"tracestate": "a=1"}))), None);
    }

    #[rstest]
    #[case("a=1", "a=1")]
    #[case("no list", "")]
    #[case("a=\u{1}", "")]
    fn unreadable_state_does_not_affect_the_parent(#[case] state: &str, #[case] kept: &str) {
        let sent = headers(json!({"traceparent": PARENT, "tracestate": state}));
        assert_eq!(sender(&sent).unwrap().trace_state().header(), kept);
    }

    #[test]
    fn a_long_state_is_left_out() {
        let state = format!("a={}", "x".repeat(MAX_STATE));
        let sent = headers(json!({"traceparent": PARENT, "tracestate": state}));
        assert_eq!(sender(&sent).unwrap().trace_state().header(), "");
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(parent in ".{0,80}", state in ".{0,80}") {
            let sent = headers(json!({"traceparent": parent, "tracestate": state}));
            if let Some(remote) = sender(&sent) {
                let mut written = Map::new();
                write(remote.clone(), &mut written);
                prop_assert_eq!(sender(&written), Some(remote));
            }
        }

        #[test]
        fn every_span_is_read_as_it_was_written(
            trace in 1u128.., span in 1u64.., sampled: bool
        ) {
            let flags = TraceFlags::default().with_sampled(sampled);
            let context = SpanContext::new(trace.into(), span.into(), flags, true, TraceState::NONE);
            let mut written = Map::new();
            write(context.clone(), &mut written);
            prop_assert_eq!(sender(&written), Some(context));
        }
    }
}
