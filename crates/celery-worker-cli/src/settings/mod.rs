//! Settings of the worker's process, one file for each section, and the loading of the settings of a program.
//!
//! A program without settings of its own loads [`WorkerSettings`] from [`WorkerSettings::source`]. One with further
//! sections has a type of its own that implements [`Settings`], and a [`Source`] with the defaults of all its
//! sections; those of this crate are in [`DEFAULTS`].

use std::borrow::Cow;

use serde::Deserialize;

mod celery;
mod exposure;
mod http;
mod library_options;
mod load;
mod log;
mod problem;
mod secrets;
mod traces;
mod unsupported;

pub use self::celery::{Celery, RedisTls, ResultTables, ResultTransport};
pub use self::http::{Http, MIN_TOKEN_LENGTH};
pub use self::log::{Log, LogFormat};
pub use self::traces::Traces;
pub use celery_worker::broker::{DelayedDelivery, ExchangeKind, QueueType, TaskQueue, TaskRoute};
pub use celery_worker::results::Serializer;
pub use exposure::{exposed_urls, exposure, is_local, may_be_plain};
pub(crate) use library_options::key_of_broker_option;
pub use load::Source;
pub use problem::{Problem, Problems, SectionProblems, SettingsError};
pub use secrets::Secret;

/// Defaults of the sections of this crate in TOML, with the documentation of every key.
pub const DEFAULTS: &str = include_str!("defaults.toml");

/// Settings of a program: a type with a field for each section.
pub trait Settings: serde::de::DeserializeOwned {
    /// Adds a problem for each violated rule of the sections.
    fn check(&self, problems: &mut Problems);

    /// Returns a warning for each password that would be sent in plain text.
    fn exposures(&self) -> Vec<Problem>;
}

/// The sections of the worker's process.
#[derive(Debug, Clone, Deserialize)]
pub struct WorkerSettings {
    /// `[celery]`: broker, results, queues and worker.
    pub celery: Celery,
    /// `[http]`: health checks and metrics over HTTP.
    pub http: Http,
    /// `[log]`: the log.
    pub log: Log,
    /// `[traces]`: export of OpenTelemetry's spans.
    pub traces: Traces,
    /// Risks that the start of a service logs, such as a file with a secret that every user may read.
    #[serde(skip)]
    pub warnings: Vec<Problem>,
}

impl WorkerSettings {
    /// The source of a program without further sections. `prefix` is the prefix of its environment variables: with
    /// `WORKER_`, `WORKER_CELERY__WORKER_CONCURRENCY` sets `celery.worker_concurrency`.
    #[must_use]
    pub fn source(prefix: impl Into<Cow<'static, str>>) -> Source {
        Source {
            defaults: DEFAULTS,
            prefix: prefix.into(),
            section_prefixes: &[],
            whole: &[],
            secrets: &[],
        }
    }
}

impl Settings for WorkerSettings {
    fn check(&self, problems: &mut Problems) {
        self.celery.check(&mut problems.section("celery"));
        self.http.check(&mut problems.section("http"));
        self.log.check(&mut problems.section("log"));
        self.traces.check(&mut problems.section("traces"));
    }

    fn exposures(&self) -> Vec<Problem> {
        let mut found = self.celery.exposures();
        found.extend(self.traces.exposure());
        found
    }
}
