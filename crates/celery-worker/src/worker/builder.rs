//! Builder for a worker from URLs.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::{Config, Shutdown, Worker};
use crate::broker::{self, BrokerError};
use crate::observer::Observer;
use crate::results::{self, ResultError};
use crate::task::{DuplicateTask, Registry, Task};

/// Error of a worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// Two tasks have the same name.
    #[error("tasks cannot be registered")]
    Tasks(#[from] DuplicateTask),
    /// The broker's URL cannot be used, or the worker stopped reconnecting.
    #[error("the broker cannot be used")]
    Broker(#[from] BrokerError),
    /// The result backend's URL cannot be used.
    #[error("the result backend cannot be used")]
    Results(#[from] ResultError),
    /// The file for revoked ids cannot be read or written.
    #[error("the state file {} cannot be used", path.display())]
    StateFile {
        /// Path of the file.
        path: PathBuf,
        /// Reason of the system.
        source: std::io::Error,
    },
    /// Signals cannot be received.
    #[error("signals of the process cannot be received")]
    Signals(#[from] std::io::Error),
}

/// Builds a [`Worker`].
///
/// ```
/// use celery_worker::client::Client;
/// use celery_worker::prelude::*;
/// use std::time::Duration;
///
/// #[task(name = "tasks.add")]
/// async fn add(x: i64, y: i64) -> TaskResult<i64> {
///     Ok(x + y)
/// }
///
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// let (broker, results) = ("memory://builder", "memory://builder");
/// let worker = Worker::builder(broker).results(results).queue("tasks").task(add);
/// let client = Client::builder(broker).results(results).default_queue("tasks").build().await?;
/// let asking = async {
///     let sum = client.send(add::s(2, 3)).await?;
///     let sum: i64 = sum.get(Duration::from_secs(10)).await?;
///     assert_eq!(sum, 5);
///     Ok::<(), Box<dyn std::error::Error>>(())
/// };
/// let (answer, stop) = tokio::sync::oneshot::channel::<()>();
/// let (ended, asked) = tokio::join!(
///     worker.run_until(async { drop(stop.await) }),
///     async {
///         let asked = asking.await;
///         drop(answer);
///         asked
///     },
/// );
/// ended?;
/// asked
/// # })
/// # .map_err(|error: Box<dyn std::error::Error>| error)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct WorkerBuilder {
    broker_url: String,
    results: results::ResultOptions,
    config: Config,
    registry: Registry,
    observer: Option<Arc<dyn Observer>>,
    duplicate: Option<DuplicateTask>,
}

impl WorkerBuilder {
    pub(super) fn new(broker_url: String) -> Self {
        let host = nix::unistd::gethostname().unwrap_or_default();
        let node = format!("celery@{}", host.to_string_lossy());
        Self {
            broker_url,
            results: results::ResultOptions::new(""),
            config: Config::new(node, Vec::new()),
            registry: Registry::default(),
            observer: None,
            duplicate: None,
        }
    }

    /// Stores results in the backend of this URL: `rpc://`, `redis://…`, `db+postgresql://…`. Without it, results are
    /// not stored.
    #[must_use]
    pub fn results(self, url: impl Into<String>) -> Self {
        self.result_options(results::ResultOptions::new(url.into()))
    }

    /// Stores results in a backend with more settings than a URL.
    #[must_use]
    pub fn result_options(self, results: results::ResultOptions) -> Self {
        Self { results, ..self }
    }

    /// Consumes a queue, in addition to those of earlier calls. Without a call, the worker consumes the queue `celery`.
    #[must_use]
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.config.queues.push(queue.into());
        self
    }

    /// Sets the node name; `celery@` and the name of the host by default.
    #[must_use]
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.config.hostname = hostname.into();
        self
    }

    /// Sets the number of concurrent tasks; the number of processors by default.
    #[must_use]
    pub fn concurrency(mut self, tasks: usize) -> Self {
        self.config.concurrency = tasks;
        self
    }

    /// Sends the events of tasks from the start, for monitors such as Flower.
    #[must_use]
    pub fn task_events(mut self, enabled: bool) -> Self {
        self.config.task_events = enabled;
        self
    }

    /// Changes any other part of the configuration.
    #[must_use]
    pub fn configure(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Reports to an observer, for example for metrics.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Registers a task. A second task of the same name causes an error when the worker is built.
    #[must_use]
    pub fn task<T: Task>(mut self, task: T) -> Self {
        let registered = self.registry.register(task);
        self.duplicate = self.duplicate.or(registered.err());
        self
    }

    /// Builds the worker, which `shutdown` can stop. Opens no connection.
    ///
    /// # Errors
    /// [`WorkerError`]
    pub fn build(self, shutdown: Shutdown) -> Result<Worker, WorkerError> {
        if let Some(duplicate) = self.duplicate {
            return Err(duplicate.into());
        }
        let mut config = self.config;
        if config.queues.is_empty() {
            config.queues.push(config.default_queue.clone());
        }
        let broker = broker::open(&self.broker_url, &config.hostname)?;
        let results = results::open(&self.results, Arc::clone(&broker))?;
        let worker = Worker::new(self.registry, broker, results, config, shutdown);
        Ok(match self.observer {
            Some(observer) => worker.with_observer(observer),
            None => worker,
        })
    }

    /// Runs the worker until a future ends; then it finishes its running tasks.
    ///
    /// # Errors
    /// [`WorkerError`]
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> Result<(), WorkerError> {
        let shutdown = Shutdown::default();
        let worker = self.build(shutdown.clone())?;
        let running = worker.run();
        tokio::pin!(running);
        tokio::select! {
            ended = &mut running => return ended,
            () = stop => shutdown.warm(),
        }
        running.await
    }

    /// Runs the worker until SIGTERM or SIGINT; then it finishes its running tasks. A second signal, or SIGQUIT, stops them, and
    /// their messages return to the queue if they are acknowledged late.
    ///
    /// # Errors
    /// [`WorkerError`]
    pub async fn run_until_signal(self) -> Result<(), WorkerError> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut quit = signal(SignalKind::quit())?;
        let shutdown = Shutdown::default();
        let worker = self.build(shutdown.clone())?;
        let running = worker.run();
        tokio::pin!(running);
        let mut is_stopping = false;
        loop {
            let is_cold = tokio::select! {
                ended = &mut running => return ended,
                _ = terminate.recv() => is_stopping,
                _ = interrupt.recv() => is_stopping,
                _ = quit.recv() => true,
            };
            match is_cold {
                true => shutdown.cold(),
                false => shutdown.warm(),
            }
            is_stopping = true;
        }
    }
}
