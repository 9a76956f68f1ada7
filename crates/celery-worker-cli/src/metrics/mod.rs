//! Metrics in Prometheus' text format.
//!
//! [`Metrics`] is the registry of a process. Parts of the program create their metrics, register them here and update
//! them. [`tasks`] has the metrics of Celery's tasks, under the names of celery-exporter, so that its dashboards work,
//! and [`process`] has those of the process itself. A counter is an atomic number; nothing else is computed before a
//! scrape.
//!
//! Values of labels never come unchecked from a message: a task that is not registered counts as `unknown`, classes of
//! exceptions beyond the first 64 count as `other`, and queues are those of the settings. A sender of messages can
//! therefore not make a registry grow.

use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{Encoder, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::program::Program;

mod process;
mod tasks;

pub use prometheus::Error;
pub use tasks::{QueueMetrics, TaskMetrics};

/// Media type of the text format.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The metrics of one process. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    process: Arc<process::ProcessMetrics>,
    scrape_error: IntGaugeVec,
}

impl Metrics {
    /// Creates a registry with the metrics of the process, and with `<program>_build_info` and
    /// `<program>_scrape_error`.
    ///
    /// # Errors
    /// The program's name cannot be part of the name of a metric.
    pub fn new(program: Program) -> Result<Self, Error> {
        let registry = Registry::new();
        let name = program.identifier();
        let build = Opts::new(
            format!("{name}_build_info"),
            "Constant 1, labelled with the version of the program.",
        );
        let build = IntGaugeVec::new(build, &["version"])?;
        build.with_label_values(&[program.version]).set(1);
        registry.register(Box::new(build))?;
        let scrape_error = Opts::new(
            format!("{name}_scrape_error"),
            "1 if the values of this source could not be updated for this scrape and are old.",
        );
        let scrape_error = IntGaugeVec::new(scrape_error, &["source"])?;
        registry.register(Box::new(scrape_error.clone()))?;
        let metrics = Self {
            registry,
            process: Arc::new(process::ProcessMetrics::new()?),
            scrape_error,
        };
        metrics.add(&metrics.process.gauges())?;
        Ok(metrics)
    }

    /// Registers metrics.
    ///
    /// # Errors
    /// A metric of this name is registered already.
    pub fn add<'a>(
        &self,
        collectors: impl IntoIterator<Item = &'a Box<dyn Registered>>,
    ) -> Result<(), Error> {
        for collector in collectors {
            self.registry.register(collector.collector())?;
        }
        Ok(())
    }

    /// The gauge that is 1 while a source of values cannot be read: `<program>_scrape_error`.
    #[must_use]
    pub fn scrape_error(&self, source: &str) -> IntGauge {
        self.scrape_error.with_label_values(&[source])
    }

    /// All metrics in the text format.
    ///
    /// # Errors
    /// A metric cannot be formatted. A test of the metric would show this.
    pub fn text(&self) -> Result<Vec<u8>, Error> {
        self.process.read();
        let mut text = Vec::with_capacity(16 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// A metric that can be registered. Its clones are the same metric.
pub trait Registered {
    /// Returns a clone for the registry.
    fn collector(&self) -> Box<dyn Collector>;
}

impl<C: Collector + Clone + 'static> Registered for C {
    fn collector(&self) -> Box<dyn Collector> {
        Box::new(self.clone())
    }
}
