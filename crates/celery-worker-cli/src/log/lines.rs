//! Formatting of log lines, without secrets and without control characters of a terminal.

use std::fmt::{self, Write as _};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::text::{visible, visible_json};
use crate::traces;
use service_connection::url::redacted;

/// Keys of a line that a field of a span must not replace.
const KEYS: [&str; 4] = ["timestamp", "level", "target", "message"];

/// Formatter for lines of JSON, with the fields of the surrounding spans and the ids of the current trace.
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
        if let (Some(fields), Some(open)) = (
            span_fields(context, event),
            line.trim_end().strip_suffix('}').map(str::len),
        ) {
            line.truncate(open);
            for (name, value) in fields {
                write!(line, ",{}:{value}", Value::from(name))?;
            }
            line.push_str("}\n");
        }
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

/// Fields of the spans around an event, except for names that the event itself has; an inner span takes precedence over
/// an outer one. `None` outside of all spans.
fn span_fields<S, N>(
    context: &FmtContext<'_, S, N>,
    event: &Event<'_>,
) -> Option<Map<String, Value>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let own = event.metadata().fields();
    let mut fields = Map::new();
    for span in context.event_scope()?.from_root() {
        let extensions = span.extensions();
        let formatted = extensions.get::<FormattedFields<N>>();
        let formatted = formatted.and_then(|fields| serde_json::from_str(fields).ok());
        let formatted: Map<String, Value> = formatted.unwrap_or_default();
        fields.extend(
            formatted
                .into_iter()
                .filter(|(name, _)| own.field(name).is_none() && !KEYS.contains(&name.as_str())),
        );
    }
    Some(fields)
}

/// Formatter of fields for human readers: the message, then `name=value`.
pub(super) struct HumanFields;

impl<'w> FormatFields<'w> for HumanFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        let mut written = FieldWriter {
            writer,
            is_first: true,
            result: Ok(()),
        };
        fields.record(&mut written);
        written.result
    }
}

struct FieldWriter<'w> {
    writer: Writer<'w>,
    is_first: bool,
    result: fmt::Result,
}

impl FieldWriter<'_> {
    fn put(&mut self, name: &str, value: &str) -> fmt::Result {
        if !self.is_first {
            self.writer.write_char(' ')?;
        }
        self.is_first = false;
        let value = redacted(value);
        let value = visible(&value);
        match (name, self.writer.has_ansi_escapes()) {
            ("message", _) => self.writer.write_str(&value),
            // The name in italics, the `=` dimmed.
            (name, true) => write!(
                self.writer,
                "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"
            ),
            (name, false) => write!(self.writer, "{name}={value}"),
        }
    }
}

impl Visit for FieldWriter<'_> {
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
                    let json = json.with_current_span(false).with_span_list(false);
                    let lines = lines.fmt_fields(format::JsonFields::new());
                    let registry = registry.with(lines.event_format(Json(json)));
                    tracing::subscriber::with_default(registry, &log);
                }
            }
            kept.text()
        })
    }

    #[test]
    fn line_has_no_control_characters() {
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
    fn a_line_within_a_task_has_its_id_and_name() {
        let log = || {
            let _task = tracing::error_span!("task", task = "t.add", task_id = "i1").entered();
            let _inner = tracing::info_span!("inner", file = "a\u{1b}", message = "no").entered();
            tracing::event!(Level::INFO, n = 3, task = "other", "added");
        };
        let [human, json] = written(log);
        assert!(
            human.contains(r#"task{task="t.add" task_id="i1"}:"#) && human.contains("added n=3"),
            "{human}"
        );
        let fields: Value = serde_json::from_str(&json).unwrap_or_default();
        assert_eq!(fields["task_id"], "i1", "{json}");
        assert_eq!(
            (&fields["task"], &fields["message"]),
            (&"other".into(), &"added".into())
        );
        assert_eq!(fields["file"], "a\u{1b}");
        assert_eq!(json.matches("\"task\"").count(), 1, "{json}");
    }

    #[test]
    fn line_contains_no_password() {
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
