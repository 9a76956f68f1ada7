//! Logging, and how errors are shown.

use std::backtrace::{Backtrace, BacktraceStatus};

use std::io::{self, IsTerminal};
use std::path::Path;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{ParseError, Targets, filter_fn};
use tracing_subscriber::fmt::format;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::prelude::*;

use self::file::LogFile;
use self::lines::{HumanFields, Json};
use self::text::visible_lines;
use crate::settings::{Log, LogFormat};
use service_connection::url::redacted;

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
/// valid, wins over the settings. Only the first call in a process has an effect.
///
/// # Errors
/// That the file cannot be written.
pub fn init(log: &Log, file: Option<&Path>) -> io::Result<()> {
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
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let registry = tracing_subscriber::registry()
        .with(filter)
        .with(filter_fn(tells_no_secret));
    // An error means that there is a subscriber already, which then stays.
    let _ = if human {
        let colour = on_terminal && std::env::var_os("NO_COLOR").is_none();
        let lines = lines.with_target(false).with_ansi(colour);
        registry.with(lines.fmt_fields(HumanFields)).try_init()
    } else {
        let json = format::format().json().flatten_event(true);
        let lines = lines.fmt_fields(format::JsonFields::new());
        registry.with(lines.event_format(Json(json))).try_init()
    };
    Ok(())
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
mod tests {
    use tracing::Level;

    use super::filter;
    use rstest::rstest;

    #[rstest]
    #[case("WARNING", "warn")]
    #[case("CRITICAL", "error")]
    #[case("FATAL", "error")]
    #[case("INFO", "info")]
    fn levels_by_pythons_names(#[case] python: &str, #[case] own: &str) {
        let shown = |level| filter(level).map(|targets| targets.to_string()).ok();
        assert_eq!(shown(python), shown(own));
    }

    #[rstest]
    #[case("debug", true)]
    #[case("info,ccat_transfer=debug", true)]
    #[case("ccat_transfer=debug,celery_worker=info", false)]
    #[case("info", false)]
    fn the_worker_belongs_to_this_program(#[case] level: &str, #[case] is_shown: bool) {
        let filter = filter(level).ok();
        let shows = |target| {
            filter
                .as_ref()
                .is_some_and(|filter| filter.would_enable(target, &Level::DEBUG))
        };
        assert_eq!(shows("celery_worker::worker"), is_shown);
        assert!(!shows("sqlx"));
    }
}
