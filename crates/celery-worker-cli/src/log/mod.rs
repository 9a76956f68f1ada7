//! The log: its filter, its formats, and the output of panics.

use std::backtrace::{Backtrace, BacktraceStatus};

use std::io::{self, IsTerminal};
use std::path::Path;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, ParseError, Targets, filter_fn};
use tracing_subscriber::fmt::format;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::Layered;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Layer, Registry};

use self::file::LogFile;
use self::lines::{HumanFields, Json};
use crate::settings::{Log, LogFormat};
use crate::text::visible_lines;
use crate::traces::{self, SdkTracer};
use service_connection::url::redacted;

mod file;
mod lines;

/// Crates that belong to the program beside its own.
const WORKER_CRATES: [&str; 4] = [
    "celery_protocol",
    "celery_worker",
    env!("CARGO_CRATE_NAME"),
    "service_connection",
];

/// Parses a filter: a level or a list of `target=level`. A bare level applies to the program, whose crate has the name
/// `own`, and to the worker's crates. Other libraries then log only warnings, and lapin nothing, because the worker
/// reports each of its errors together with the consequence.
///
/// # Errors
/// The text is neither a level nor a filter.
pub fn filter(level: &str, own: &str) -> Result<Targets, ParseError> {
    let name = match level.to_lowercase() {
        // Python's names of levels, which start scripts use; in a filter they would be names of modules.
        name if name == "warning" => "warn".to_owned(),
        name if matches!(&*name, "critical" | "fatal") => "error".to_owned(),
        name => name,
    };
    match name.parse::<LevelFilter>() {
        Ok(level) => Ok(Targets::new()
            .with_default(level.min(LevelFilter::WARN))
            .with_target("lapin", LevelFilter::OFF)
            .with_target(own, level)
            .with_targets(WORKER_CRATES.map(|name| (name, level)))),
        Err(_) => level.parse().map(|filter| with_worker_crates(filter, own)),
    }
}

/// Extends a filter for the crate `own` to the worker's crates, except for those that the filter names itself.
fn with_worker_crates(filter: Targets, own: &str) -> Targets {
    let level_of = |name| {
        let mut named = filter.iter().filter(|(target, _)| *target == name);
        named.next().map(|(_, level)| level)
    };
    let Some(level) = level_of(own) else {
        return filter;
    };
    let unnamed = WORKER_CRATES
        .into_iter()
        .filter(|name| level_of(name).is_none());
    let unnamed: Vec<_> = unnamed.map(|name| (name, level)).collect();
    filter.with_targets(unnamed)
}

/// Returns false for events of libraries that may contain secrets: lapin logs frames with the login, ureq addresses of
/// webhooks. No filter lets these through.
fn has_no_secret(metadata: &Metadata<'_>) -> bool {
    let of = |library: &str| metadata.target().starts_with(library);
    let level = *metadata.level();
    !(level >= Level::TRACE && (of("lapin") || of("amq_protocol"))
        || level >= Level::DEBUG && of("ureq"))
}

/// Starts the log of the program whose crate has the name `own`, on standard error or at the end of `file`. A valid
/// `RUST_LOG` takes precedence over the settings. The spans of traces go to `tracer`, independently of the log's
/// filter. Only the first call in a process has an effect.
///
/// # Errors
/// The file cannot be opened.
pub fn init(
    log: &Log,
    own: &str,
    file: Option<&Path>,
    tracer: Option<SdkTracer>,
) -> io::Result<()> {
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|text| !text.is_empty())
        .and_then(|text| filter(&text, own).ok())
        .or_else(|| filter(&log.level, own).ok())
        .unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let on_terminal = file.is_none() && io::stderr().is_terminal();
    let human = match log.format {
        LogFormat::Human => true,
        LogFormat::Json => false,
        LogFormat::Auto => on_terminal,
    };
    let writer = match file {
        None => BoxMakeWriter::new(io::stderr),
        Some(path) => BoxMakeWriter::new(LogFile::open(path)?),
    };
    let colour = on_terminal && std::env::var_os("NO_COLOR").is_none();
    let lines = lines(writer, human.then_some(colour));
    // An error means that a subscriber is installed already; it stays.
    let _ = match tracer {
        None => subscriber(lines, filter).try_init(),
        Some(tracer) => subscriber(lines, filter)
            .with(traces::layer(tracer))
            .try_init(),
    };
    Ok(())
}

/// Layer that writes log lines: for human readers, with or without colour, or in JSON.
fn lines(writer: BoxMakeWriter, human: Option<bool>) -> Box<dyn Layer<Registry> + Send + Sync> {
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    match human {
        Some(colour) => {
            let lines = lines.with_target(false).with_ansi(colour);
            lines.fmt_fields(HumanFields).boxed()
        }
        None => {
            let json = format::format()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false);
            let lines = lines.fmt_fields(format::JsonFields::new());
            lines.event_format(Json(json)).boxed()
        }
    }
}

/// Subscriber whose log lines pass the filter. The filter belongs to the layer of the log alone, so that it does not
/// disable the spans of traces, and these spans do not appear in lines.
fn subscriber(
    lines: Box<dyn Layer<Registry> + Send + Sync>,
    filter: Targets,
) -> Layered<impl Layer<Registry>, Registry> {
    let is_logged =
        |metadata: &Metadata<'_>| has_no_secret(metadata) && !traces::is_traced(metadata);
    // A filter without a level hint would remove the hint of the other filter, and every `trace!` would be evaluated.
    let filter = filter.and(filter_fn(is_logged).with_max_level_hint(LevelFilter::TRACE));
    tracing_subscriber::registry().with(lines.with_filter(filter))
}

/// Installs a hook that writes the message of a panic to standard error as the standard library does, but without
/// secrets and control characters: the panic of a library may quote text from outside.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("<unnamed>");
        let text = format!("thread '{name}' {panic}");
        eprintln!("{}", visible_lines(&redacted(&text)));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            eprintln!("{backtrace}");
        }
    }));
}

#[cfg(test)]
mod tests;
