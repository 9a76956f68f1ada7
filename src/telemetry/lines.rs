//! Writing of log lines, without secrets and without characters that a terminal would obey.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

use super::text::{visible, visible_json};

use service_connection::url::redacted;

/// Lines of JSON, with the trace that they are part of.
pub(super) struct Json<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for Json<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0
            .format_event(context, Writer::new(&mut line), event)?;
        let line = redacted(&line);
        let line = visible_json(&line);
        match (traces::current(), line.trim_end().strip_suffix('}')) {
            (Some((trace, span)), Some(open)) => {
                writeln!(
                    writer,
                    r#"{open},"trace_id":"{trace}","span_id":"{span}"}}"#
                )
            }
            _ => writer.write_str(&line),
        }
    }
}

/// Fields for people: the message, then `name=value`.
pub(super) struct HumanFields;

impl<'w> FormatFields<'w> for HumanFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut written = Written {
            writer,
            is_first: true,
            result: Ok(()),
        };
        fields.record(&mut written);
        written.result
    }
}

struct Written<'w> {
    writer: Writer<'w>,
    is_first: bool,
    result: fmt::Result,
}

impl Written<'_> {
    fn put(&mut self, name: &str, value: &str) -> fmt::Result {
        if !self.is_first {
            self.writer.write_char(' ')?;
        }
        self.is_first = false;
        let value = redacted(value);
        let value = visible(&value);
        match (name, self.writer.has_ansi_escapes()) {
            ("message", _) => self.writer.write_str(&value),
            // Italics, and a faint sign.
            (name, true) => write!(
                self.writer,
                "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"
            ),
            (name, false) => write!(self.writer, "{name}={value}"),
        }
    }
}

impl Visit for Written<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = field.name();
        // Fields that the crate `log` adds; the line contains them already.
        if self.result.is_ok() && !name.starts_with("log.") {
            self.result = self.put(name, &format!("{value:?}"));
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io;
    use std::sync::{Arc, Mutex, PoisonError};

    use tracing::Level;
    use tracing_subscriber::fmt::format;
    use tracing_subscriber::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    pub(crate) struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Kept {
        pub(crate) fn text(&self) -> String {
            let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Output of `log` in each format.
    fn written(log: impl Fn()) -> [String; 2] {
        [true, false].map(|human| {
            let kept = Kept::default();
            let to = kept.clone();
            let lines = tracing_subscriber::fmt::layer().with_writer(move || to.clone());
            let registry = tracing_subscriber::registry();
            match human {
                true => {
                    let lines = lines.with_ansi(false).fmt_fields(HumanFields);
                    tracing::subscriber::with_default(registry.with(lines), &log);
                }
                false => {
                    let json = format::format().json().flatten_event(true);
                    let lines = lines.fmt_fields(format::JsonFields::new());
                    let registry = registry.with(lines.event_format(Json(json)));
                    tracing::subscriber::with_default(registry, &log);
                }
            }
            kept.text()
        })
    }

    #[test]
    fn a_line_is_one_line_that_no_terminal_obeys() {
        let evil = "a\u{1b}]0;t\u{7}\u{9b}2J\r\nERROR forged \u{202e}x";
        let log = || {
            let error = evil.to_owned();
            let span = tracing::info_span!("request", content_type = %evil);
            let _entered = span.enter();
            tracing::event!(Level::INFO, %error, content_type = evil, list = ?[evil], n = 3, "got it");
        };
        let [human, json] = written(log);
        for line in [&human, &json] {
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            let line = line.trim_end_matches('\n');
            assert_eq!(visible(line), line);
        }
        assert!(
            human.contains("got it error=a\\u{1b}]0;t\\u{7}\\u{9b}2J\\r\\nERROR forged"),
            "{human}"
        );
        let json: serde_json::Value = serde_json::from_str(&json).unwrap_or_default();
        assert_eq!((&json["error"], &json["n"]), (&evil.into(), &3.into()));
    }

    #[test]
    fn a_line_has_no_login() {
        let log = || {
            let error = "cannot reach amqp://u:s3cret@h//;amqp://u:s3cret@g//".to_owned();
            tracing::event!(Level::INFO, %error, url = "redis://h/0?password=s3cret", ?error, "no");
        };
        for line in written(log) {
            assert!(
                line.contains("u:********@g") && !line.contains("s3cret"),
                "{line}"
            );
        }
    }
}
