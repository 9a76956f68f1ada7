//! Metrics in Prometheus' text format.
//!
//! [`Metrics`] is one process's registry. The parts register what they count with it: [`tasks`] what
//! becomes of Celery's tasks, under the names that celery-exporter gives them, so that its
//! dashboards work; [`transfers`] what becomes of transfers; [`process`] the process itself. They
//! know nobody: workers, transfers and managers hold them and count. A counter is an atomic number;
//! nothing is computed before somebody asks.
//!
//! Label values never come from a message as they are: a task that is not registered counts as
//! `unknown`, classes of exceptions beyond the first 64 as `other`, and queues, sites and hosts are
//! those of the settings and the database. So nobody who may publish can make a registry grow.

use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{Encoder, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

pub mod process;
pub mod table;
pub mod tasks;
pub mod transfers;

pub use prometheus::Error;
pub use table::TableMetrics;
pub use tasks::{QueueMetrics, TaskMetrics};
pub use transfers::{Copying, ManagerMetrics, PassCounts, TransferMetrics};

/// What Prometheus takes the text for.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// The metrics of one process. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    process: Arc<process::Process>,
    scrape_error: IntGaugeVec,
}

impl Metrics {
    /// With what every process has: itself, and which build it is.
    ///
    /// # Errors
    /// None that a build has which passes its tests: that a name is no metric's, or is there twice.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let build = Opts::new(
            "ccat_transfer_build_info",
            "Constant 1, labelled with the version of the program.",
        );
        let build = IntGaugeVec::new(build, &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(build))?;
        let scrape_error = Opts::new(
            "ccat_transfer_scrape_error",
            "1 if the values of this source could not be brought up to date for this scrape, which then are old.",
        );
        let scrape_error = IntGaugeVec::new(scrape_error, &["source"])?;
        registry.register(Box::new(scrape_error.clone()))?;
        let metrics = Self {
            registry,
            process: Arc::new(process::Process::new()?),
            scrape_error,
        };
        metrics.add(&metrics.process.gauges())?;
        Ok(metrics)
    }

    /// Shows something from now on.
    ///
    /// # Errors
    /// That a metric of this name is there already.
    pub fn add<'a>(
        &self,
        collectors: impl IntoIterator<Item = &'a Box<dyn Registered>>,
    ) -> Result<(), Error> {
        for collector in collectors {
            self.registry.register(collector.collector())?;
        }
        Ok(())
    }

    /// Whether a source of values could not be asked: `ccat_transfer_scrape_error`.
    #[must_use]
    pub fn scrape_error(&self, source: &str) -> IntGauge {
        self.scrape_error.with_label_values(&[source])
    }

    /// Everything, in the text format.
    ///
    /// # Errors
    /// None: that a metric has no name, or that memory cannot be written.
    pub fn text(&self) -> Result<Vec<u8>, Error> {
        self.process.read();
        let mut text = Vec::with_capacity(16 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// A metric that can be shown. Its clones are the same metric.
pub trait Registered {
    /// A clone for the registry.
    fn collector(&self) -> Box<dyn Collector>;
}

impl<C: Collector + Clone + 'static> Registered for C {
    fn collector(&self) -> Box<dyn Collector> {
        Box::new(self.clone())
    }
}
