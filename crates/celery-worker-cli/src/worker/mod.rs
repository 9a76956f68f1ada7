//! A worker with the flags and settings of `celery worker`, for any tasks.
//!
//! [`WorkerArguments`] are the flags. [`Process::build_worker`] builds a worker from them, from the settings and from
//! the tasks that the caller registers; [`Process::run_worker`] runs it until a signal or the remote control ends it.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use celery_worker::broker::Broker;
use celery_worker::results::{self, ResultBackend, ResultOptions};
use celery_worker::task::Registry;
use celery_worker::worker::{ActivityLog, Shutdown, Worker};
use service_connection::error_chain::chain;

use crate::error::ProcessError;
use crate::health::{HealthRegistry, Phase, Probe};
use crate::metrics::{QueueMetrics, TaskMetrics};
use crate::program::Process;
use crate::service::End;
use crate::settings::WorkerSettings;
use crate::wait_for::StartDeadline;

mod arguments;
mod flags_without_effect;

pub use arguments::WorkerArguments;

/// Time that the result of a health check of the broker or the result backend is cached.
const ANSWER_VALID_FOR: Duration = Duration::from_secs(2);

/// Parts of a worker's process that its tasks can use.
pub struct WorkerParts {
    /// The node's name.
    pub hostname: String,
    /// The settings of the process, with the flags applied.
    pub settings: Arc<WorkerSettings>,
    /// The connection to the broker.
    pub broker: Arc<dyn Broker>,
    /// Health, metrics and status of the process.
    pub health: HealthRegistry,
    /// Counters of the tasks, which also count the tasks that this process sends.
    pub tasks: TaskMetrics,
}

/// Options of a worker that neither flags nor settings contain.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Queues in addition to those of the flags.
    pub queues: Vec<String>,
    /// Time limit of a warm shutdown; `None` for no limit.
    pub warm_shutdown: Option<Duration>,
    /// Deadline until which the start waits for the broker.
    pub deadline: StartDeadline,
}

impl Process {
    /// Runs the worker that `build` returns, until a signal or the remote control ends it.
    ///
    /// # Errors
    /// The error of `build`, or of the worker.
    pub async fn run_worker<E: From<ProcessError>>(
        &self,
        arguments: &WorkerArguments,
        health: &HealthRegistry,
        build: impl AsyncFnOnce(Shutdown) -> Result<Worker, E>,
    ) -> Result<End, E> {
        let pidfile = arguments.pidfile()?;
        self.serve(health, pidfile.as_deref(), async |shutdown: Shutdown| {
            arguments.log_ignored_flags();
            let worker = tokio::select! {
                worker = build(shutdown.clone()) => worker?,
                () = shutdown.requested() => return Ok(()),
            };
            Ok(run_to_end(worker, health).await?)
        })
        .await
    }

    /// Builds a worker with the tasks that `register` returns. It consumes the queues of `options` and of the flags, or
    /// the default queue if there are none.
    ///
    /// # Errors
    /// The broker cannot be reached until the deadline, a setting cannot be used, or the error of `register`.
    pub async fn build_worker<E: From<ProcessError>>(
        &self,
        arguments: &WorkerArguments,
        health: &HealthRegistry,
        options: WorkerOptions,
        shutdown: Shutdown,
        register: impl AsyncFnOnce(WorkerParts) -> Result<Registry, E>,
    ) -> Result<Worker, E> {
        let celery = &self.settings.celery;
        let hostname = arguments.node_name()?;
        let broker = self.broker(&hostname, Some(health))?;
        options.deadline.wait_for_broker(&*broker).await?;
        let mut result_options = ResultOptions::from(celery);
        result_options.database.application_name = format!("{} results", self.program.name);
        let results = results::open(&result_options, broker.clone())
            .map_err(|e| ProcessError::Configuration(format!("celery.result_backend: {e}")))?;
        let tasks = TaskMetrics::new(self.program, &hostname).map_err(ProcessError::from)?;
        health
            .register(&tasks.of_worker())
            .map_err(ProcessError::from)?;
        let registry = register(WorkerParts {
            hostname: hostname.clone(),
            settings: self.settings.clone(),
            broker: broker.clone(),
            health: health.clone(),
            tasks: tasks.clone(),
        })
        .await?;

        let queues = selected(options.queues, arguments, &celery.task_default_queue);
        let mut config = celery.worker_config(hostname, queues);
        config.gossip = !arguments.without_gossip;
        config.state_file = arguments.statedb()?;
        config.warm_shutdown = options.warm_shutdown;
        config.product = self.program.product();
        watch_backend(health, &results);
        watch_queues(health, &broker, config.queues.clone())?;
        let worker = Worker::new(registry, broker, results, config, shutdown)
            .with_observer(Arc::new(tasks))
            .with_liveness(health.liveness().clone());
        watch_broker(health, worker.served());
        Ok(worker)
    }
}

/// Runs a worker. The process is in [`Phase::Running`] once the worker consumes its queues.
async fn run_to_end(worker: Worker, health: &HealthRegistry) -> Result<(), ProcessError> {
    let _activity = log_activity_on_usr1(worker.activity_log())?;
    let mut served = worker.served();
    // A task of the runtime, not the main thread, which would have to be woken for each message.
    let mut working = AbortOnDropHandle::new(tokio::spawn(worker.run()));
    // `map(drop)`: the output contains a read lock, and the worker would wait for it.
    let is_served = async { served.wait_for(|served| *served).await.map(drop) };
    let ended = tokio::select! {
        ended = &mut working => Some(ended),
        Ok(()) = is_served => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            health.enter(Phase::Running);
            working.await
        }
    };
    Ok(ended.map_err(|error| ProcessError::Failed(format!("the worker failed: {error}")))??)
}

/// Logs what the worker does at each USR1, until the handle is dropped.
fn log_activity_on_usr1(activity: ActivityLog) -> Result<AbortOnDropHandle<()>, ProcessError> {
    let mut usr1 = signal(SignalKind::user_defined1())
        .map_err(|e| ProcessError::Failed(format!("cannot listen to signals: {e}")))?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        while usr1.recv().await.is_some() {
            activity.request();
        }
    })))
}

/// Adds a readiness probe: the worker consumes all of its queues.
fn watch_broker(health: &HealthRegistry, served: watch::Receiver<bool>) {
    health.ready_if(Probe::new("broker", Duration::ZERO, move || {
        let is_served = *served.borrow();
        async move {
            match is_served {
                true => Ok(()),
                false => Err(
                    "not connected, or not all queues can be consumed; the log gives the reason"
                        .into(),
                ),
            }
        }
    }));
}

/// Adds a readiness probe: the result backend answers.
fn watch_backend(health: &HealthRegistry, results: &Arc<dyn ResultBackend>) {
    let results = results.clone();
    health.ready_if(Probe::new("result backend", ANSWER_VALID_FOR, move || {
        let results = results.clone();
        async move { results.answers().await.map_err(|e| chain(&e).to_string()) }
    }));
}

/// Adds the metrics of the queues.
fn watch_queues(
    health: &HealthRegistry,
    broker: &Arc<dyn Broker>,
    queues: Vec<String>,
) -> Result<(), ProcessError> {
    let depths = QueueMetrics::new()?;
    health.register(&depths.all())?;
    let (broker, queues) = (broker.clone(), Arc::new(queues));
    health.before_scrape(Probe::new("broker", ANSWER_VALID_FOR, move || {
        let (broker, queues, depths) = (broker.clone(), queues.clone(), depths.clone());
        async move {
            let found = broker.survey(&queues).await;
            let found = found.map_err(|error| chain(&error).to_string())?;
            depths.set(found.iter().map(|q| (&*q.queue, q.messages, q.consumers)));
            Ok(())
        }
    }));
    Ok(())
}

fn selected(mut queues: Vec<String>, arguments: &WorkerArguments, default: &str) -> Vec<String> {
    queues.extend(arguments.queues.iter().cloned());
    if queues.is_empty() {
        queues.push(default.to_owned());
    }
    queues.retain(|queue| !arguments.exclude_queues.contains(queue));
    queues.sort_unstable();
    queues.dedup();
    queues
}
