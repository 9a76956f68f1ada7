//! The worker: receives, schedules, runs and settles tasks.
//!
//! It implements Celery and does not depend on transfers. With late acknowledgement, a message is acknowledged after
//! the run, once its result is stored: it is never lost, but can be delivered twice, and the task must tolerate that.
//! With early acknowledgement, Celery's default, it is acknowledged before the run, and lost if the worker dies.
//!
//! Every accepted message has an entry until it is settled. A delivery of a message that was accepted before (the
//! broker redelivered it after a lost connection, or a producer sent it twice) joins that entry instead of running
//! concurrently, and is settled with it. Once the run has returned, the caller may know the result: a message that is
//! then sent again, and not redelivered, is another task. The identity of a message is a digest of everything that determines what
//! is executed and where the outcome is sent; a task id alone is not enough, so different tasks with one id run
//! concurrently.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::broker::{Broker, NoPropagation, Queue, Subscription, TaskQueues, TracePropagation};
use crate::client::{Client, ClientOptions};
use crate::liveness::{self, LivenessRegistry};
use crate::observer::{BrokerConnection, Observer};
use crate::product::Product;
use crate::remote_control::{self, RunningControl};
use crate::task::Registry;
use crate::workflow::{Workflow, WorkflowOptions};
use celery_protocol::content::Accept;
use celery_protocol::event::Event;

mod acceptance;
mod activity;
mod admission;
pub(crate) mod bounded_queue;
mod builder;
mod builtin;
mod cancellation;
mod canvas_tasks;
mod conclusion;
pub(crate) mod effective_options;
mod eta_hold;
pub(crate) mod events;
mod execution;
mod identity;
pub(crate) mod in_flight;
mod intake;
mod memory;
mod postponement;
mod processing;
pub(crate) mod rate_limit;
mod refusal;
mod republication;
mod request;
pub(crate) mod revocation;
pub(crate) mod runtime;
mod schedule;
mod skip;
mod skip_reason;
pub(crate) mod slots;
mod span;
mod state_file;
mod stored_state;
#[cfg(test)]
mod test_support;

pub use crate::task::RateLimit;
pub use activity::ActivityLog;
pub use builder::{WorkerBuilder, WorkerError};
pub use effective_options::DefaultOptions;
pub(crate) use request::Request;

use crate::results::ResultBackend;
use effective_options::TimeLimits;
use events::Events;
use in_flight::InFlight;
use rate_limit::RateLimits;
use revocation::Revoked;
use runtime::Runtime;
use slots::Slots;
use state_file::StateKeeper;

/// Time limit for storing results and sending follow-up tasks after the last running task of a worker that
/// shuts down, while the result backend or the broker is unreachable.
pub const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// Time that a task has for cleaning up after its time limit, or at a cold shutdown.
const CLEANUP_WITHIN: Duration = Duration::from_secs(30);

/// Maximum wait of the first task for the other nodes' revoked ids, where remote control has no connection.
const MINGLED_WITHIN: Duration = Duration::from_secs(2);

/// Configuration of a worker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Node name, e.g. `celery@host`.
    pub hostname: String,
    /// The program that the worker is a part of.
    pub product: Product,
    /// Names of the queues.
    pub queues: Vec<String>,
    /// Declarations of the queues.
    pub task_queues: TaskQueues,
    /// Queue of follow-up tasks that name none.
    pub default_queue: String,
    /// Maximum wait for the results of a chord's header after its parts have ended.
    pub chord_join_timeout: Duration,
    /// Interval at which a chord is polled if the result backend does not count its parts.
    pub chord_retry_interval: Duration,
    /// Number of concurrent tasks.
    pub concurrency: usize,
    /// Unsettled deliveries of each queue per concurrent task; 0 for no limit.
    pub prefetch_multiplier: u16,
    /// True if a message is taken only while a slot is free. Only Redis as the broker can do this.
    pub disable_prefetch: bool,
    /// Accepted message bodies.
    pub accept: Accept,
    /// Default options of tasks.
    pub tasks: DefaultOptions,
    /// True if rate limits are enforced.
    pub rate_limits: bool,
    /// Time between two heartbeats.
    pub heartbeat_interval: Duration,
    /// Names of the allowed requests of the remote control that change the worker.
    pub control_allowed: Vec<String>,
    /// Settings that `celery inspect conf` shows.
    pub settings: Value,
    /// True if results contain the task's name, its arguments and the worker.
    pub result_extended: bool,
    /// True if a redelivered task does not run again after it has succeeded.
    pub deduplicate: bool,
    /// Time that a message is held while it waits for its eta, before it is published again. Must be shorter than the
    /// broker's `consumer_timeout`.
    pub eta_hold: Duration,
    /// Maximum number of messages that wait for their eta beyond the prefetch limit.
    pub eta_task_limit: usize,
    /// Time limit for running tasks after a warm shutdown was requested, before it becomes a cold one; none for no
    /// limit.
    pub warm_shutdown: Option<Duration>,
    /// Time limit for running tasks after a cold shutdown was requested.
    pub soft_shutdown: Duration,
    /// True if the events of tasks are sent from the start.
    pub task_events: bool,
    /// True if an event `task-sent` is sent for each task that the worker or one of its tasks sends
    /// (`task_send_sent_event`).
    pub task_sent_events: bool,
    /// True if remote control is answered.
    pub remote_control: bool,
    /// True if the worker also subscribes to the other workers, for mingle and gossip; needs remote control.
    pub gossip: bool,
    /// File in which revoked ids survive a restart (`--statedb`); not that of a Python worker.
    pub state_file: Option<PathBuf>,
    /// Connects the spans of attempts with those of the tasks' senders.
    pub propagation: Arc<dyn TracePropagation>,
}

impl Config {
    /// Celery's defaults, for a node and its queues.
    #[must_use]
    pub fn new(hostname: impl Into<String>, queues: Vec<String>) -> Self {
        Self {
            hostname: hostname.into(),
            product: Product::default(),
            queues,
            task_queues: TaskQueues::default(),
            default_queue: "celery".into(),
            chord_join_timeout: Duration::from_secs(3),
            chord_retry_interval: Duration::from_secs(1),
            concurrency: std::thread::available_parallelism().map_or(1, usize::from),
            prefetch_multiplier: 4,
            disable_prefetch: false,
            accept: Accept::json(4 << 20),
            tasks: DefaultOptions::default(),
            rate_limits: true,
            heartbeat_interval: Duration::from_secs(2),
            control_allowed: remote_control::DANGEROUS.map(str::to_owned).to_vec(),
            settings: Value::Object(Default::default()),
            result_extended: false,
            deduplicate: false,
            eta_hold: Duration::from_secs(600),
            eta_task_limit: 10_000,
            warm_shutdown: None,
            soft_shutdown: Duration::ZERO,
            task_events: false,
            task_sent_events: false,
            remote_control: true,
            gossip: true,
            state_file: None,
            propagation: Arc::new(NoPropagation),
        }
    }
}

/// Handle to request the shutdown of a worker.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    warm: CancellationToken,
    cold: CancellationToken,
}

impl Shutdown {
    /// Requests a warm shutdown: no new tasks start, the running ones finish.
    pub fn warm(&self) {
        self.warm.cancel();
    }

    /// Waits until a shutdown is requested.
    pub async fn requested(&self) {
        self.warm.cancelled().await;
    }

    /// Requests a cold shutdown: the running tasks are cancelled, too, and their messages requeued.
    pub fn cold(&self) {
        self.warm.cancel();
        self.cold.cancel();
    }
}

/// A Celery worker.
pub struct Worker {
    runtime: Runtime,
    /// True while the broker serves all queues.
    served: watch::Sender<bool>,
    liveness: LivenessRegistry,
}

impl Worker {
    /// Creates a worker for the tasks of `registry`. [`Worker::run`] starts it.
    #[must_use]
    pub fn new(
        mut registry: Registry,
        broker: Arc<dyn Broker>,
        results: Arc<dyn ResultBackend>,
        config: Config,
        shutdown: Shutdown,
    ) -> Self {
        let hostname: Arc<str> = config.hostname.as_str().into();
        let events = Events::new(hostname.clone(), config.task_events, broker.clone());
        let stopping = CancellationToken::new();
        let options = WorkflowOptions {
            hostname: hostname.clone(),
            product: config.product,
            default_queue: config.default_queue.clone(),
            queues: config.task_queues.clone(),
            task_sent_events: config.task_sent_events,
            join_timeout: config.chord_join_timeout,
            propagation: config.propagation.clone(),
        };
        let settling_over = CancellationToken::new();
        let workflow = Workflow::new(
            broker.clone(),
            results.clone(),
            options,
            settling_over.clone(),
        );
        let workflow = Arc::new(workflow);
        builtin::register(
            &mut registry,
            &workflow,
            &results,
            config.chord_retry_interval,
        );
        let client = Client::of(
            broker.clone(),
            results.clone(),
            ClientOptions {
                hostname: config.hostname.clone(),
                default_queue: config.default_queue.clone(),
                queues: config.task_queues.clone(),
                propagation: config.propagation.clone(),
                task_sent_events: config.task_sent_events,
                ..ClientOptions::default()
            },
        );
        let has_permits = config.disable_prefetch && broker.transport() == "redis";
        let permits = has_permits.then(|| Slots::new(config.concurrency));
        let runtime = Runtime {
            client,
            broker,
            results,
            workflow,
            hostname,
            stopping,
            settling_over,
            slots: Slots::new(config.concurrency),
            permits,
            rate_limits: rates(&registry, &config),
            in_flight: Arc::new(InFlight::new(config.eta_task_limit)),
            memory: memory::MemoryBudget::default(),
            time_limits: TimeLimits::default(),
            subscriptions: OnceLock::new(),
            registry: Arc::new(registry),
            config,
            shutdown,
            revoked: Revoked::default(),
            request_order: remote_control::RequestOrder::default(),
            events,
            totals: Mutex::default(),
            started: Instant::now(),
            observer: Arc::new(()),
            activity_log: ActivityLog::default(),
        };
        Self {
            runtime,
            served: watch::Sender::new(false),
            liveness: LivenessRegistry::default(),
        }
    }

    /// Creates a builder for a worker with the broker of this URL.
    pub fn builder(broker_url: impl Into<String>) -> WorkerBuilder {
        WorkerBuilder::new(broker_url.into())
    }

    /// Sets the observer.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        for (task, _) in self.runtime.registry.tasks() {
            for queue in &self.runtime.config.queues {
                observer.expect_task(task, queue);
            }
        }
        self.runtime.observer = observer;
        self
    }

    /// A handle that asks the worker to log what it does.
    #[must_use]
    pub fn activity_log(&self) -> ActivityLog {
        self.runtime.activity_log.clone()
    }

    /// Sets the registry for the worker's loops.
    #[must_use]
    pub fn with_liveness(self, liveness: LivenessRegistry) -> Self {
        Self { liveness, ..self }
    }

    /// True while the broker serves all queues of the running worker, and its changes.
    #[must_use]
    pub fn served(&self) -> watch::Receiver<bool> {
        self.served.subscribe()
    }

    /// Runs until a shutdown is requested and all accepted messages are settled.
    ///
    /// # Errors
    /// [`WorkerError::Broker`] if the broker client has stopped reconnecting, [`WorkerError::StateFile`] at the start.
    pub async fn run(self) -> Result<(), WorkerError> {
        let Self {
            runtime,
            served,
            liveness,
        } = self;
        let runtime = Arc::new(runtime);
        if runtime.config.disable_prefetch && runtime.permits.is_none() {
            tracing::warn!(
                broker = runtime.broker.transport(),
                "only Redis as the broker allows a worker without prefetch; the broker sends messages ahead"
            );
        }
        let keeper = match runtime.config.state_file.as_deref() {
            Some(path) => {
                let started = StateKeeper::start(path, runtime.clone()).await;
                let path = path.to_owned();
                Some(started.map_err(|source| WorkerError::StateFile { path, source })?)
            }
            None => None,
        };
        let queue = |name: &String| runtime.config.task_queues.queue(name);
        let queues: Vec<Queue> = runtime.config.queues.iter().map(queue).collect();
        let mut consumer = runtime.broker.consume(Subscription {
            purpose: "tasks",
            delayed: runtime.config.task_queues.delayed(&queues),
            queues,
            prefetch: runtime.prefetch(),
            max_body_bytes: Some(runtime.config.accept.max_body_bytes),
            max_waiting_body_bytes: Some(memory::LIGHT),
            permits: runtime.permits.as_ref().map(Slots::permits),
        });
        // This is the only place that sets it.
        let _ = runtime.subscriptions.set(consumer.handle());
        let tasks = TaskTracker::new();
        tasks.spawn(announce(
            consumer.connected(),
            served.clone(),
            runtime.clone(),
        ));
        let heart = AbortOnDropHandle::new(tokio::spawn(beat(runtime.clone(), liveness.clone())));
        let control = runtime
            .config
            .remote_control
            .then(|| remote_control::start(runtime.clone(), consumer.connected()));

        // A task that another node knows as revoked must not run: the first delivery waits until this node has asked.
        let mingled = control.as_ref().map(RunningControl::mingled);
        let mingle = async {
            if let Some(mingled) = mingled {
                let _ = tokio::time::timeout(MINGLED_WITHIN, mingled.cancelled()).await;
            }
        };
        let mut mingle = std::pin::pin!(mingle);
        let mut has_mingled = false;
        let mut first = None;

        let mut stopping = false;
        let own_liveness = liveness.start("consumer", liveness::EVERY);
        let mut ticks = tokio::time::interval(liveness::EVERY);
        loop {
            own_liveness.tick();
            tokio::select! {
                _ = ticks.tick() => {}
                () = runtime.activity_log.requested() => activity::log(&runtime),
                () = runtime.shutdown.warm.cancelled(), if !stopping => {
                    stopping = true;
                    first = None;
                    consumer.cancel();
                    tracing::info!("worker stops: no new tasks, the running ones finish");
                }
                () = &mut mingle, if first.is_some() => {
                    has_mingled = true;
                    if let Some(delivery) = first.take() {
                        tasks.spawn(runtime.clone().receive(delivery));
                    }
                }
                delivery = consumer.next(), if first.is_none() => match delivery {
                    // The task has not started: dropping the delivery requeues it.
                    Some(delivery) if stopping => drop(delivery),
                    Some(delivery) if !has_mingled => first = Some(delivery),
                    Some(delivery) => {
                        tasks.spawn(runtime.clone().receive(delivery));
                    }
                    None => {
                        // The worker ends by itself or is cancelled: no new task starts.
                        runtime.shutdown.warm();
                        break;
                    }
                },
            }
        }

        own_liveness.retire();
        tasks.close();
        tokio::select! {
            () = tasks.wait() => {}
            () = stopped_cold(&runtime, &tasks) => {}
        }
        drop(heart);
        runtime.observer.worker_stopped();
        runtime.events.send(&Event::WorkerOffline(runtime.load()));
        if let Some(control) = control {
            control.close().await;
        }
        if let Some(keeper) = keeper {
            keeper.close().await;
        }
        runtime.events.close().await;
        runtime.broker.close().await;
        match consumer.failure() {
            Some(error) => Err(error.clone().into()),
            None => {
                tracing::info!("worker stopped");
                Ok(())
            }
        }
    }
}

/// Sends the events that the worker is online, and its heartbeats.
async fn beat(runtime: Arc<Runtime>, liveness: LivenessRegistry) {
    runtime.events.send(&Event::WorkerOnline(runtime.load()));
    let every = runtime.config.heartbeat_interval;
    let own_liveness = liveness.start("heartbeat", every);
    let mut beats = tokio::time::interval(every);
    loop {
        beats.tick().await;
        own_liveness.tick();
        let load = runtime.load();
        runtime.observer.load(load.active);
        runtime
            .observer
            .broker_blocked(runtime.broker.blocked().is_some());
        runtime.events.send(&Event::WorkerHeartbeat(load));
    }
}

/// Waits for a cold shutdown, and then for a limited time for the cancelled tasks.
async fn stopped_cold(runtime: &Runtime, tasks: &TaskTracker) {
    let over = async {
        match runtime.config.warm_shutdown {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let unsettled = async {
        runtime.slots.empty().await;
        tokio::time::sleep(SETTLED_WITHIN).await;
    };
    let soft = tokio::select! {
        () = runtime.shutdown.cold.cancelled() => Some(runtime.config.soft_shutdown),
        () = over => {
            tracing::warn!(
                tasks = tasks.len(),
                "the time for running tasks is over; the worker stops at once"
            );
            Some(runtime.config.soft_shutdown)
        }
        () = unsettled => {
            tracing::warn!(
                tasks = tasks.len(),
                waited_s = SETTLED_WITHIN.as_secs(),
                "tasks have ended, but their results or follow-up tasks wait for a server; their messages return \
                 to the queue"
            );
            None
        }
    };
    if let Some(soft) = soft {
        stop_tasks(runtime, tasks, soft).await;
    }
    runtime.stopping.cancel();
    runtime.settling_over.cancel();
    if tokio::time::timeout(SETTLED_WITHIN, tasks.wait())
        .await
        .is_err()
    {
        tracing::error!(
            tasks = tasks.len(),
            "tasks did not stop in time; their messages return to the queue"
        );
    }
}

/// Stops the running tasks, and waits for a limited time until they have ended and their results are stored. They have
/// the time `soft` to end by themselves.
async fn stop_tasks(runtime: &Runtime, tasks: &TaskTracker, soft: Duration) {
    if !soft.is_zero() && !tasks.is_empty() {
        tracing::warn!(
            tasks = tasks.len(),
            wait_s = soft.as_secs_f64(),
            "worker waits for its running tasks before it stops them"
        );
        // The remaining tasks are cancelled in both cases.
        let _ = tokio::time::timeout(soft, tasks.wait()).await;
    }
    runtime.stopping.cancel();
    tracing::warn!(tasks = tasks.len(), "worker stops its running tasks");
    let over = async {
        // A task that does not end within this time is dropped.
        let dropped_within = CLEANUP_WITHIN + SETTLED_WITHIN;
        let _ = tokio::time::timeout(dropped_within, runtime.slots.empty()).await;
        tokio::time::sleep(SETTLED_WITHIN).await;
    };
    tokio::select! {
        () = tasks.wait() => {}
        () = over => {}
    }
}

/// The initial rate limits of the tasks.
fn rates(registry: &Registry, config: &Config) -> RateLimits {
    let rates = RateLimits::default();
    if config.rate_limits {
        for (name, task) in registry.tasks() {
            let limit = task.options.rate_limit.or(config.tasks.rate_limit);
            if limit.is_some() {
                rates.set(name, limit);
            }
        }
    }
    rates
}

/// Reports each change of the connection to the broker: to `served`, to the observer and to the log.
async fn announce(
    mut connected: watch::Receiver<bool>,
    served: watch::Sender<bool>,
    runtime: Arc<Runtime>,
) {
    let mut before = false;
    loop {
        let up = *connected.borrow_and_update();
        served.send_replace(up);
        runtime.observer.broker_connection(match (up, before) {
            (false, _) => BrokerConnection::Lost,
            (true, false) => BrokerConnection::Connected,
            (true, true) => BrokerConnection::Reconnected,
        });
        if up && !before {
            before = true;
            tracing::info!(
                hostname = runtime.config.hostname,
                broker = runtime.broker.masked_url(),
                queues = ?runtime.config.queues,
                concurrency = runtime.config.concurrency,
                after_ms = u64::try_from(runtime.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "worker ready"
            );
        } else if up {
            tracing::info!("connected to the broker again");
        }
        let changed = tokio::select! {
            () = runtime.shutdown.warm.cancelled() => return,
            changed = connected.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}
