//! Logging, and how errors are shown.

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
use self::text::visible_lines;
use crate::settings::{Log, LogFormat};
use service_connection::url::redacted;
use traces::SdkTracer;

mod file;
mod lines;
pub mod text;

/// The crates of this program.
const OWN_CRATES: [&str; 5] = [
    env!("CARGO_CRATE_NAME"),
    "celery_protocol",
    "celery_worker",
    "service_connection",
    "traces",
];

/// What a log setting lets through. A bare level is meant for this program; of the libraries
/// only warnings are wanted, unless a full filter names them, and of lapin nothing: every error of
/// its that matters is reported by `broker::amqp`, with what to make of it.
///
/// # Errors
/// That the text is neither a level nor a filter.
pub fn filter(level: &str) -> Result<Targets, ParseError> {
    let name = match level.to_lowercase() {
        // Python's names, as start scripts have them; to a filter they would be modules.
        name if name == "warning" => "warn".to_owned(),
        name if matches!(&*name, "critical" | "fatal") => "error".to_owned(),
        name => name,
    };
    match name.parse::<LevelFilter>() {
        Ok(own) => Ok(Targets::new()
            .with_default(own.min(LevelFilter::WARN))
            .with_target("lapin", LevelFilter::OFF)
            .with_targets(OWN_CRATES.map(|name| (name, own)))),
        Err(_) => level.parse().map(with_own_crates),
    }
}

/// Extends a filter for this program to the crates that it is made of, where the filter does not name them.
fn with_own_crates(filter: Targets) -> Targets {
    let level_of = |name| {
        let mut named = filter.iter().filter(|(target, _)| *target == name);
        named.next().map(|(_, level)| level)
    };
    let Some(own) = level_of(env!("CARGO_CRATE_NAME")) else {
        return filter;
    };
    let unnamed = OWN_CRATES
        .into_iter()
        .filter(|name| level_of(name).is_none());
    let unnamed: Vec<_> = unnamed.map(|name| (name, own)).collect();
    filter.with_targets(unnamed)
}

/// Libraries that tell secrets at these levels: lapin the frames with the login, ureq the addresses of
/// webhooks. No filter lets that through.
fn tells_no_secret(metadata: &Metadata<'_>) -> bool {
    let of = |library: &str| metadata.target().starts_with(library);
    let level = *metadata.level();
    !(level >= Level::TRACE && (of("lapin") || of("amq_protocol"))
        || level >= Level::DEBUG && of("ureq"))
}

/// Starts logging to standard error, or to the end of `file`. `RUST_LOG`, where it is set and
/// valid, wins over the settings. The spans of traces go to `tracer`, whatever the log lets through. Only the first
/// call in a process has an effect.
///
/// # Errors
/// That the file cannot be written.
pub fn init(log: &Log, file: Option<&Path>, tracer: Option<SdkTracer>) -> io::Result<()> {
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|text| !text.is_empty())
        .and_then(|text| filter(&text).ok())
        .or_else(|| filter(&log.level).ok())
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
    // An error means that there is a subscriber already, which then stays.
    let _ = match tracer {
        None => subscriber(lines, filter).try_init(),
        Some(tracer) => subscriber(lines, filter)
            .with(traces::layer(tracer))
            .try_init(),
    };
    Ok(())
}

/// Log lines for people, with or without colour, or else in JSON.
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

/// Log lines that the filter lets through. It is the filter of this layer alone, so that it does not switch spans off;
/// and these, which are for traces, are not to be part of lines.
fn subscriber(
    lines: Box<dyn Layer<Registry> + Send + Sync>,
    filter: Targets,
) -> Layered<impl Layer<Registry>, Registry> {
    let is_logged =
        |metadata: &Metadata<'_>| tells_no_secret(metadata) && !traces::is_traced(metadata);
    // A filter without a hint would take away that of the other one, and every `trace!` would be asked for.
    let filter = filter.and(filter_fn(is_logged).with_max_level_hint(LevelFilter::TRACE));
    tracing_subscriber::registry().with(lines.with_filter(filter))
}

/// Writes the message of a panic to standard error as the standard library does, but without secrets and control
/// characters: a library may panic with text from elsewhere in its message.
pub fn watch_panics() {
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
