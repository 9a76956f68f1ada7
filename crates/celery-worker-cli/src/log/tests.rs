//! Tests of the levels of the log, of its lines, and of its independence from the spans of traces.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, Span, SpanData, SpanProcessor};
use rstest::rstest;
use serde_json::Value;
use tracing::Subscriber;
use tracing::field::Empty;

use super::lines::tests::Kept;
use super::*;

/// Name of the program's crate.
const OWN: &str = "ccat_transfer";

/// Counts the spans that have ended, in place of a collector.
#[derive(Debug, Clone, Default)]
struct Ended(Arc<AtomicUsize>);

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}
    fn on_end(&self, _: SpanData) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }
    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Ended {
    fn tracer(&self) -> SdkTracer {
        let provider = SdkTracerProvider::builder().with_span_processor(self.clone());
        provider.build().tracer("test")
    }
}

#[rstest]
#[case("WARNING", "warn")]
#[case("CRITICAL", "error")]
#[case("FATAL", "error")]
#[case("INFO", "info")]
fn levels_by_pythons_names(#[case] python: &str, #[case] own: &str) {
    let shown = |level| filter(level, OWN).map(|targets| targets.to_string()).ok();
    assert_eq!(shown(python), shown(own));
}

#[rstest]
#[case("debug", true)]
#[case("info,ccat_transfer=debug", true)]
#[case("ccat_transfer=debug,celery_worker=info", false)]
#[case("info", false)]
fn the_worker_belongs_to_this_program(#[case] level: &str, #[case] is_shown: bool) {
    let filter = filter(level, OWN).ok();
    let shows = |target| {
        filter
            .as_ref()
            .is_some_and(|filter| filter.would_enable(target, &Level::DEBUG))
    };
    assert_eq!(shows("celery_worker::worker"), is_shown);
    assert!(!shows("sqlx"));
}

/// Emits a log event in a traced span; returns true if the span was enabled.
fn work() -> bool {
    let span = tracing::debug_span!("run", otel.kind = "consumer", celery.state = Empty);
    span.in_scope(|| tracing::event!(Level::INFO, n = 1, "in it"));
    tracing::event!(Level::WARN, "after it");
    span.record("celery.state", "SUCCESS");
    !span.is_disabled()
}

/// Lines that `work` logs, and true if its span was enabled.
fn logged(level: &str, human: Option<bool>, tracer: Option<SdkTracer>) -> (Vec<String>, bool) {
    let kept = Kept::default();
    let to = kept.clone();
    let lines = lines(BoxMakeWriter::new(move || to.clone()), human);
    let subscriber = subscriber(lines, filter(level, OWN).unwrap());
    let is_enabled = match tracer {
        None => tracing::subscriber::with_default(subscriber, work),
        Some(tracer) => {
            let subscriber = subscriber.with(traces::layer(tracer));
            tracing::subscriber::with_default(subscriber, work)
        }
    };
    (kept.text().lines().map(str::to_owned).collect(), is_enabled)
}

#[rstest]
#[case("info", 2)]
#[case("error", 0)]
#[case("off", 0)]
fn levels_of_the_log_concern_no_span(#[case] level: &str, #[case] lines: usize) {
    let ended = Ended::default();
    let (text, is_enabled) = logged(level, Some(false), Some(ended.tracer()));
    assert_eq!((text.len(), is_enabled), (lines, true), "{text:?}");
    assert_eq!(ended.0.load(Ordering::Relaxed), 1);
}

#[rstest]
#[case("info")]
#[case("trace")]
fn without_a_tracer_no_span_is_enabled(#[case] level: &str) {
    let (text, is_enabled) = logged(level, Some(false), None);
    assert_eq!((text.len(), is_enabled), (2, false), "{text:?}");
}

#[rstest]
#[case("error", LevelFilter::ERROR, LevelFilter::DEBUG)]
#[case("trace", LevelFilter::TRACE, LevelFilter::TRACE)]
fn disabled_levels_cost_nothing(
    #[case] level: &str,
    #[case] own: LevelFilter,
    #[case] traced: LevelFilter,
) {
    let subscriber = || {
        let lines = lines(BoxMakeWriter::new(io::sink), None);
        subscriber(lines, filter(level, OWN).unwrap())
    };
    let alone = subscriber();
    assert_eq!(Subscriber::max_level_hint(&alone), Some(own));
    let with_traces = subscriber().with(traces::layer(Ended::default().tracer()));
    assert_eq!(Subscriber::max_level_hint(&with_traces), Some(traced));
}

#[test]
fn lines_do_not_show_spans() {
    let ended = Ended::default();
    for tracer in [None, Some(ended.tracer())] {
        let (text, _) = logged("info", Some(false), tracer);
        assert!(text[0].ends_with(" INFO in it n=1"), "{text:?}");
    }
}

#[test]
fn lines_of_json_name_their_trace() {
    let ended = Ended::default();
    let keys = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let keys = line.as_object().unwrap().keys().cloned();
        let id = line["trace_id"].as_str().unwrap_or_default().len();
        (id, keys.collect::<Vec<_>>())
    };
    let (text, _) = logged("info", None, Some(ended.tracer()));
    let (trace, inside) = keys(&text[0]);
    assert_eq!(trace, 32);
    let own = ["timestamp", "level", "message", "n", "target"];
    assert_eq!(inside, [&own[..], &["trace_id", "span_id"]].concat());
    let (_, outside) = keys(&text[1]);
    assert_eq!(outside, ["timestamp", "level", "message", "target"]);
    let (text, _) = logged("info", None, None);
    assert_eq!(keys(&text[0]).1, own);
}
