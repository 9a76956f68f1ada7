//! The span that a message comes from, as its headers tell it: W3C Trace Context
//! (<https://www.w3.org/TR/trace-context/>).
//!
//! Whoever may publish may write anything here. What is not exactly of the form counts as nothing: the
//! receiver then begins a trace of its own.

use std::str::FromStr;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use serde_json::{Map, Value};

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Length of `traceparent` in version 00, which is also the part that later versions keep.
const LENGTH: usize = 55;

/// A `traceparent` of a later version may be longer, but not for ever.
const MAX_LENGTH: usize = 256;

/// What has to be handed on of `tracestate`, in characters; a longer one may be left out, and is.
const MAX_STATE: usize = 512;

/// A span of another process.
#[derive(Debug, Clone, PartialEq)]
pub struct Remote(SpanContext);

impl Remote {
    /// The sender's span, by a message's headers.
    #[must_use]
    pub fn of(headers: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| headers.get(name).and_then(Value::as_str);
        let (trace_id, span_id, flags) = parse(text(TRACEPARENT)?)?;
        let state = text(TRACESTATE).and_then(state).unwrap_or_default();
        let context = SpanContext::new(trace_id, span_id, flags, true, state);
        context.is_valid().then_some(Self(context))
    }

    pub(super) fn context(&self) -> &SpanContext {
        &self.0
    }
}

/// Writes a span of this process into a message's headers, in place of what is there.
pub(super) fn write(span: &SpanContext, headers: &mut Map<String, Value>) {
    if !span.is_valid() {
        return;
    }
    let flags = span.trace_flags() & TraceFlags::SAMPLED;
    let parent = format!("00-{}-{}-{flags:02x}", span.trace_id(), span.span_id());
    headers.insert(TRACEPARENT.into(), parent.into());
    match span.trace_state().header() {
        none if none.is_empty() => headers.remove(TRACESTATE),
        state => headers.insert(TRACESTATE.into(), state.into()),
    };
}

fn parse(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let is_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if text.len() > MAX_LENGTH || !text.is_ascii() {
        return None;
    }
    let (known, more) = text.split_at_checked(LENGTH)?;
    let mut parts = known.split('-');
    let [version, trace, span, flags] =
        [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
    let lengths = [version.len(), trace.len(), span.len(), flags.len()];
    if lengths != [2, 32, 16, 2] || ![version, trace, span, flags].iter().all(|p| is_hex(p)) {
        return None;
    }
    match version {
        "ff" => return None,
        "00" if !more.is_empty() => return None,
        _ if !more.is_empty() && !more.starts_with('-') => return None,
        _ => {}
    }
    let sampled = u8::from_str_radix(flags, 16).ok()? & 1;
    Some((
        TraceId::from(u128::from_str_radix(trace, 16).ok()?),
        SpanId::from(u64::from_str_radix(span, 16).ok()?),
        TraceFlags::new(sampled),
    ))
}

fn state(text: &str) -> Option<TraceState> {
    let is_printable = |c: char| matches!(c, ' '..='~');
    if text.len() > MAX_STATE || !text.chars().all(is_printable) {
        return None;
    }
    TraceState::from_str(text).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(fields: Value) -> Map<String, Value> {
        fields.as_object().cloned().unwrap()
    }

    fn read(traceparent: impl Into<Value>) -> Option<Remote> {
        Remote::of(&headers(json!({"traceparent": traceparent.into()})))
    }

    #[test]
    fn a_parent_is_read_and_written() {
        let sent = headers(json!({"traceparent": PARENT, "tracestate": "a=1,b@c=2", "task": "t"}));
        let remote = Remote::of(&sent).unwrap();
        assert!(remote.0.is_sampled() && remote.0.is_remote());
        let mut written = headers(json!({"tracestate": "old=1", "task": "t"}));
        write(&remote.0, &mut written);
        assert_eq!(written, sent);
        // One without a state takes the old one away: it belonged to another trace.
        write(&read(PARENT).unwrap().0, &mut written);
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
        assert_eq!(read(text).map(|remote| remote.0.is_sampled()), sampled);
    }

    #[test]
    fn what_is_no_text_or_has_no_end_is_no_parent() {
        assert_eq!(read(json!([PARENT])), None);
        assert_eq!(
            read(format!("cc{}-{}", &PARENT[2..], "x".repeat(MAX_LENGTH))),
            None
        );
        assert_eq!(Remote::of(&headers(json!({"tracestate": "a=1"}))), None);
    }

    #[rstest]
    #[case("a=1", "a=1")]
    #[case("no list", "")]
    #[case("a=\u{1}", "")]
    fn a_state_that_cannot_be_read_costs_only_itself(#[case] state: &str, #[case] kept: &str) {
        let sent = headers(json!({"traceparent": PARENT, "tracestate": state}));
        assert_eq!(Remote::of(&sent).unwrap().0.trace_state().header(), kept);
    }

    #[test]
    fn a_long_state_is_left_out() {
        let state = format!("a={}", "x".repeat(MAX_STATE));
        let sent = headers(json!({"traceparent": PARENT, "tracestate": state}));
        assert_eq!(Remote::of(&sent).unwrap().0.trace_state().header(), "");
    }

    proptest! {
        #[test]
        fn anything_is_read_without_harm(parent in ".{0,80}", state in ".{0,80}") {
            let sent = headers(json!({"traceparent": parent, "tracestate": state}));
            if let Some(remote) = Remote::of(&sent) {
                let mut written = Map::new();
                write(&remote.0, &mut written);
                prop_assert_eq!(Remote::of(&written), Some(remote));
            }
        }

        #[test]
        fn every_span_is_read_as_it_was_written(
            trace in 1u128.., span in 1u64.., sampled: bool
        ) {
            let flags = TraceFlags::default().with_sampled(sampled);
            let context = SpanContext::new(trace.into(), span.into(), flags, true, TraceState::NONE);
            let mut written = Map::new();
            write(&context, &mut written);
            prop_assert_eq!(Remote::of(&written), Some(Remote(context)));
        }
    }
}
