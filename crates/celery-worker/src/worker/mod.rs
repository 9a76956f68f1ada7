//! The worker: receive, decide, run, settle.
//!
//! Knows Celery and nothing of transfers. The order of effects is that of Celery with late
//! acknowledgement: STARTED, the run, its result stored, and only then the message acknowledged.
//! A message is therefore never lost; it can be delivered twice, and tasks have to stand that.
//!
//! Every accepted message has an entry until it is settled. A delivery of a message that is accepted
//! here already (the broker gave it again after a lost connection, or a producer sent it twice) joins
//! that entry instead of running beside it, and is settled with it. Which messages are the same says
//! [`identity`]; a task id alone does not, so different tasks with one id run beside each other.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::broker::{
    Broker, BrokerError, NoPropagation, Queue, Subscription, TaskQueues, TracePropagation,
};
use crate::client::{Client, ClientOptions};
use crate::liveness::{self, LivenessRegistry};
use crate::observer::Observer;
use crate::remote_control;
use crate::task::Registry;
use crate::workflow::{Workflow, WorkflowOptions};
use celery_protocol::content::Accept;
use celery_protocol::event::Event;

mod admission;
pub(crate) mod bounded_queue;
mod builder;
mod builtin;
mod cancellation;
mod discard;
pub(crate) mod effective_options;
pub(crate) mod events;
mod execution;
mod identity;
pub(crate) mod in_flight;
mod intake;
mod memory;
pub(crate) mod rate_limit;
pub(crate) mod revocation;
pub(crate) mod runtime;
mod schedule;
mod settlement;
pub(crate) mod slots;
mod span;

pub use builder::{WorkerBuilder, WorkerError};
pub use effective_options::DefaultOptions;
pub use rate_limit::RateLimit;

use crate::results::ResultBackend;
use effective_options::TimeLimits;
use events::Events;
use in_flight::InFlight;
use rate_limit::RateLimits;
use revocation::Revoked;
use runtime::Runtime;
use slots::Slots;

/// First and longest pause between two tries to store a result.
pub(crate) const STORE_PAUSES: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(3));

/// Time limit for storing results and sending follow-up tasks after the last running task of a worker that
/// shuts down, while the result backend or the broker is away.
pub const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// How long stopped tasks may take to put things in order.
const COLD_WITHIN: Duration = Duration::from_secs(30);

/// What a worker is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Node name, e.g. `celery@host`.
    pub hostname: String,
    /// Names of the queues.
    pub queues: Vec<String>,
    /// How queues are declared.
    pub task_queues: TaskQueues,
    /// Queue of the tasks that follow others and name none.
    pub default_queue: String,
    /// How long the results of a chord's header may be on their way when its parts have returned.
    pub chord_join_timeout: Duration,
    /// How often a chord is looked at, where the result backend does not count.
    pub chord_retry_interval: Duration,
    /// Tasks that run at once.
    pub concurrency: usize,
    /// Unsettled deliveries for each queue and for each task that can run; 0 is no limit.
    pub prefetch_multiplier: u16,
    /// What is accepted as a message body.
    pub accept: Accept,
    /// What holds for tasks that say nothing else.
    pub tasks: DefaultOptions,
    /// Whether rate limits are obeyed.
    pub rate_limits: bool,
    /// Time between two heartbeats.
    pub heartbeat_interval: Duration,
    /// Requests of the remote control that change what the worker does, as far as they are obeyed.
    pub control_allowed: Vec<String>,
    /// What `celery inspect conf` shows.
    pub settings: Value,
    /// Whether results name the task, its arguments and the worker.
    pub result_extended: bool,
    /// Whether a task that is delivered again is not run if it has succeeded before.
    pub deduplicate: bool,
    /// How long a message that waits for its time is held before it is published anew. Has to be
    /// shorter than the broker's `consumer_timeout`.
    pub eta_hold: Duration,
    /// Messages that may wait for their time beyond the prefetch limit.
    pub eta_task_limit: usize,
    /// How long running tasks may go on after a warm shutdown was asked for, before it turns cold; none
    /// for as long as they take.
    pub warm_shutdown: Option<Duration>,
    /// How long running tasks may go on after a cold shutdown was asked for.
    pub soft_shutdown: Duration,
    /// Whether the events of tasks are sent from the start.
    pub task_events: bool,
    /// Whether remote control is answered.
    pub remote_control: bool,
    /// Whether, with remote control, the other workers are heard as well: mingle and gossip.
    pub gossip: bool,
    /// Connects the spans of attempts with those of the tasks' senders.
    pub propagation: Arc<dyn TracePropagation>,
}

impl Config {
    /// Celery's defaults, for a node and its queues.
    #[must_use]
    pub fn new(hostname: impl Into<String>, queues: Vec<String>) -> Self {
        Self {
            hostname: hostname.into(),
            queues,
            task_queues: TaskQueues::default(),
            default_queue: "celery".into(),
            chord_join_timeout: Duration::from_secs(3),
            chord_retry_interval: Duration::from_secs(1),
            concurrency: std::thread::available_parallelism().map_or(1, usize::from),
            prefetch_multiplier: 4,
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
            remote_control: true,
            gossip: true,
            propagation: Arc::new(NoPropagation),
        }
    }
}

/// How a worker is asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    warm: CancellationToken,
    cold: CancellationToken,
}

impl Shutdown {
    /// No new tasks; the running ones finish.
    pub fn warm(&self) {
        self.warm.cancel();
    }

    /// Waits until somebody asks for either.
    pub async fn requested(&self) {
        self.warm.cancelled().await;
    }

    /// The running ones are stopped, too, and their messages given back.
    pub fn cold(&self) {
        self.warm.cancel();
        self.cold.cancel();
    }
}

/// A Celery worker.
pub struct Worker {
    runtime: Runtime,
    /// Whether the broker serves all queues.
    served: watch::Sender<bool>,
    liveness: LivenessRegistry,
}

impl Worker {
    /// A worker that answers the tasks of `registry`. [`Worker::run`] starts it.
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
            default_queue: config.default_queue.clone(),
            queues: config.task_queues.clone(),
            join_timeout: config.chord_join_timeout,
            propagation: config.propagation.clone(),
        };
        let workflow = Workflow::new(broker.clone(), results.clone(), options, stopping.clone());
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
                ..ClientOptions::default()
            },
        );
        let runtime = Runtime {
            client,
            broker,
            results,
            workflow,
            hostname,
            stopping,
            slots: Slots::new(config.concurrency),
            rate_limits: rates(&registry, &config),
            in_flight: Arc::new(InFlight::new(config.eta_task_limit)),
            memory: memory::MemoryBudget::default(),
            time_limits: TimeLimits::default(),
            subscriptions: OnceLock::new(),
            registry,
            config,
            shutdown,
            revoked: Revoked::default(),
            events,
            totals: Mutex::default(),
            started: Instant::now(),
            observer: Arc::new(()),
        };
        Self {
            runtime,
            served: watch::Sender::new(false),
            liveness: LivenessRegistry::default(),
        }
    }

    /// Starts to build a worker of the broker of this URL.
    pub fn builder(broker_url: impl Into<String>) -> WorkerBuilder {
        WorkerBuilder::new(broker_url.into())
    }

    /// Reports to an observer.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        for (task, _) in self.runtime.registry.entries() {
            for queue in &self.runtime.config.queues {
                observer.expect_task(task, queue);
            }
        }
        self.runtime.observer = observer;
        self
    }

    /// Registers its loops there.
    #[must_use]
    pub fn with_liveness(self, liveness: LivenessRegistry) -> Self {
        Self { liveness, ..self }
    }

    /// Whether the broker serves all queues of the worker, and its changes, while it runs.
    #[must_use]
    pub fn served(&self) -> watch::Receiver<bool> {
        self.served.subscribe()
    }

    /// Runs until it is told to stop, and until everything accepted is settled.
    ///
    /// # Errors
    /// Resolves once the broker was given up, where the broker does that.
    pub async fn run(self) -> Result<(), BrokerError> {
        let Self {
            runtime,
            served,
            liveness,
        } = self;
        let runtime = Arc::new(runtime);
        let queue = |name: &String| runtime.config.task_queues.queue(name);
        let queues: Vec<Queue> = runtime.config.queues.iter().map(queue).collect();
        let mut consumer = runtime.broker.consume(Subscription {
            purpose: "tasks",
            delayed: runtime.config.task_queues.delayed(&queues),
            queues,
            prefetch: runtime.prefetch(),
            max_body_bytes: Some(runtime.config.accept.max_body_bytes),
            max_waiting_body_bytes: Some(memory::LIGHT),
        });
        // Nobody else sets it.
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
            .then(|| remote_control::start(runtime.clone()));

        let mut stopping = false;
        let own_liveness = liveness.start("consumer", liveness::EVERY);
        let mut ticks = tokio::time::interval(liveness::EVERY);
        loop {
            own_liveness.tick();
            tokio::select! {
                _ = ticks.tick() => {}
                () = runtime.shutdown.warm.cancelled(), if !stopping => {
                    stopping = true;
                    consumer.cancel();
                    tracing::info!("worker stops: no new tasks, the running ones finish");
                }
                delivery = consumer.next() => match delivery {
                    // Not begun: dropping it gives it back.
                    Some(delivery) if stopping => drop(delivery),
                    Some(delivery) => {
                        tasks.spawn(runtime.clone().receive(delivery));
                    }
                    None => {
                        // The worker ends by itself or is cancelled: nothing new begins.
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
        runtime.observer.load(false, 0);
        runtime.events.send(&Event::WorkerOffline(runtime.load()));
        if let Some(control) = control {
            control.close().await;
        }
        runtime.events.close().await;
        runtime.broker.close().await;
        match consumer.failure() {
            Some(error) => Err(error.clone()),
            None => {
                tracing::info!("worker stopped");
                Ok(())
            }
        }
    }
}

/// Tells monitors that the worker is there, and that it still is.
async fn beat(runtime: Arc<Runtime>, liveness: LivenessRegistry) {
    runtime.events.send(&Event::WorkerOnline(runtime.load()));
    let every = runtime.config.heartbeat_interval;
    let own_liveness = liveness.start("heartbeat", every);
    let mut beats = tokio::time::interval(every);
    loop {
        beats.tick().await;
        own_liveness.tick();
        let load = runtime.load();
        runtime.observer.load(true, load.active);
        runtime
            .observer
            .broker_blocked(runtime.broker.blocked().is_some());
        runtime.events.send(&Event::WorkerHeartbeat(load));
    }
}

/// Waits for a cold shutdown and then, for a limited time, for the stopped tasks.
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
        () = runtime.shutdown.cold.cancelled() => runtime.config.soft_shutdown,
        () = over => {
            tracing::warn!(
                tasks = tasks.len(),
                "the time for running tasks is over; the worker stops at once"
            );
            runtime.config.soft_shutdown
        }
        () = unsettled => {
            tracing::warn!(
                tasks = tasks.len(),
                waited_s = SETTLED_WITHIN.as_secs(),
                "tasks have ended, but their results or follow-up tasks wait for a server; their messages go back to the queue"
            );
            Duration::ZERO
        }
    };
    if !soft.is_zero() && !tasks.is_empty() {
        tracing::warn!(
            tasks = tasks.len(),
            wait_s = soft.as_secs_f64(),
            "worker waits for its running tasks before it stops them"
        );
        // Either way the rest is stopped.
        let _ = tokio::time::timeout(soft, tasks.wait()).await;
    }
    runtime.stopping.cancel();
    tracing::warn!(tasks = tasks.len(), "worker stops its running tasks");
    if tokio::time::timeout(COLD_WITHIN, tasks.wait())
        .await
        .is_err()
    {
        tracing::error!(
            tasks = tasks.len(),
            "tasks did not stop in time; their messages return to the queue"
        );
    }
}

/// The rate limits that tasks begin with.
fn rates(registry: &Registry, config: &Config) -> RateLimits {
    let rates = RateLimits::default();
    if config.rate_limits {
        for (name, entry) in registry.entries() {
            let limit = entry.options.rate_limit.or(config.tasks.rate_limit);
            if limit.is_some() {
                rates.set(name, limit);
            }
        }
    }
    rates
}

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_micros() as f64 / 1e6
}

/// Says when the worker is first served, and when it is again.
async fn announce(
    mut connected: watch::Receiver<bool>,
    served: watch::Sender<bool>,
    runtime: Arc<Runtime>,
) {
    let mut before = false;
    loop {
        let up = *connected.borrow_and_update();
        served.send_replace(up);
        runtime.observer.broker_connected(up, before);
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
