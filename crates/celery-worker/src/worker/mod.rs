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

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::broker::{
    BrokerError, NoPropagation, Queue, Subscription, Subscriptions, TaskQueues, TracePropagation,
    Transport,
};
use crate::liveness::{self, Pulses};
use crate::observer::Observer;
use crate::task::Registry;
use celery_protocol::content::Accept;
use celery_protocol::event::{Event, Load};

mod accepted;
mod admission;
mod builtin;
mod canvas;
mod cluster;
mod control;
mod discard;
mod events;
mod execution;
mod identity;
mod intake;
mod line;
mod policy;
mod pool;
mod rate;
mod revoked;
mod room;
mod schedule;
mod settlement;
mod span;
mod stop;

pub use control::DANGEROUS;
pub use policy::TaskDefaults;
pub use rate::RateLimit;

use crate::results::ResultBackend;
use accepted::AcceptedTasks;
use canvas::Canvas;
use cluster::Namesakes;
use control::replies::Replies;
use events::Events;
use policy::TimeLimits;
use pool::Pool;
use rate::RateLimits;
use revoked::Revoked;

/// First and longest pause between two tries to store a result.
const STORE_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

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
    pub tasks: TaskDefaults,
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
            tasks: TaskDefaults::default(),
            rate_limits: true,
            heartbeat_interval: Duration::from_secs(2),
            control_allowed: DANGEROUS.map(str::to_owned).to_vec(),
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
    registry: Registry,
    transport: Arc<dyn Transport>,
    results: Arc<dyn ResultBackend>,
    canvas: Arc<Canvas>,
    config: Config,
    hostname: Arc<str>,
    shutdown: Shutdown,
    /// Cancelled when the running tasks have to stop: a cold shutdown, after its soft part.
    stopping: CancellationToken,
    pool: Pool,
    rates: RateLimits,
    time_limits: TimeLimits,
    /// The queues that are consumed, once they are.
    subscriptions: OnceLock<Subscriptions>,
    accepted: Arc<AcceptedTasks>,
    room: room::Room,
    revoked: Revoked,
    /// Line for the replies of remote control.
    replies: Replies,
    namesakes: Namesakes,
    events: Events,
    /// Tasks begun since the start, by name.
    totals: Mutex<BTreeMap<String, u64>>,
    started: Instant,
    /// Whether the broker serves all queues.
    served: watch::Sender<bool>,
    observer: Arc<dyn Observer>,
    pulses: Pulses,
}

impl Worker {
    /// A worker that answers the tasks of `registry`. [`Worker::run`] starts it.
    #[must_use]
    pub fn new(
        mut registry: Registry,
        transport: Arc<dyn Transport>,
        results: Arc<dyn ResultBackend>,
        config: Config,
        shutdown: Shutdown,
    ) -> Self {
        let hostname: Arc<str> = config.hostname.as_str().into();
        let events = Events::new(hostname.clone(), config.task_events, transport.clone());
        let stopping = CancellationToken::new();
        let options = canvas::Options {
            hostname: hostname.clone(),
            default_queue: config.default_queue.clone(),
            queues: config.task_queues.clone(),
            join_timeout: config.chord_join_timeout,
            propagation: config.propagation.clone(),
        };
        let canvas = Canvas::new(
            transport.clone(),
            results.clone(),
            options,
            stopping.clone(),
        );
        let canvas = Arc::new(canvas);
        builtin::register(
            &mut registry,
            &canvas,
            &results,
            config.chord_retry_interval,
        );
        let replies = Replies::new(hostname.clone(), transport.clone());
        Self {
            transport,
            results,
            canvas,
            hostname,
            stopping,
            pool: Pool::new(config.concurrency),
            rates: rates(&registry, &config),
            accepted: Arc::new(AcceptedTasks::new(config.eta_task_limit)),
            room: room::Room::default(),
            time_limits: TimeLimits::default(),
            subscriptions: OnceLock::new(),
            registry,
            config,
            shutdown,
            revoked: Revoked::default(),
            replies,
            namesakes: Namesakes::default(),
            events,
            totals: Mutex::default(),
            started: Instant::now(),
            served: watch::Sender::new(false),
            observer: Arc::new(()),
            pulses: Pulses::default(),
        }
    }

    /// Reports to an observer.
    #[must_use]
    pub fn with_observer(self, observer: Arc<dyn Observer>) -> Self {
        for (task, _) in self.registry.entries() {
            for queue in &self.config.queues {
                observer.expect_task(task, queue);
            }
        }
        Self { observer, ..self }
    }

    /// Gives its loops pulses there.
    #[must_use]
    pub fn with_pulses(self, pulses: Pulses) -> Self {
        Self { pulses, ..self }
    }

    /// Whether the broker serves all queues of the worker, and its changes, while it runs.
    #[must_use]
    pub fn served(&self) -> watch::Receiver<bool> {
        self.served.subscribe()
    }

    /// Runs until it is told to stop, and until everything accepted is settled.
    ///
    /// # Errors
    /// That the broker was given up, where the transport does that.
    pub async fn run(self) -> Result<(), BrokerError> {
        let worker = Arc::new(self);
        let queue = |name: &String| worker.config.task_queues.queue(name);
        let queues: Vec<Queue> = worker.config.queues.iter().map(queue).collect();
        let mut consumer = worker.transport.consume(Subscription {
            purpose: "tasks",
            delayed: worker.config.task_queues.delayed(&queues),
            queues,
            prefetch: worker.prefetch(),
            max_body_bytes: Some(worker.config.accept.max_body_bytes),
            max_waiting_body_bytes: Some(room::LIGHT),
        });
        // Nobody else sets it.
        let _ = worker.subscriptions.set(consumer.handle());
        let tasks = TaskTracker::new();
        tasks.spawn(announce(consumer.connected(), worker.clone()));
        let heart = AbortOnDropHandle::new(tokio::spawn(worker.clone().beat()));
        let control = worker
            .config
            .remote_control
            .then(|| AbortOnDropHandle::new(tokio::spawn(control::serve(worker.clone()))));

        let mut stopping = false;
        let pulse = worker.pulses.start("consumer", liveness::EVERY);
        let mut ticks = tokio::time::interval(liveness::EVERY);
        loop {
            pulse.tick();
            tokio::select! {
                _ = ticks.tick() => {}
                () = worker.shutdown.warm.cancelled(), if !stopping => {
                    stopping = true;
                    consumer.cancel();
                    tracing::info!("worker stops: no new tasks, the running ones finish");
                }
                delivery = consumer.next() => match delivery {
                    // Not begun: dropping it gives it back.
                    Some(delivery) if stopping => drop(delivery),
                    Some(delivery) => {
                        tasks.spawn(worker.clone().receive(delivery));
                    }
                    None => {
                        // The worker ends by itself or is cancelled: nothing new begins.
                        worker.shutdown.warm();
                        break;
                    }
                },
            }
        }

        pulse.rest();
        tasks.close();
        tokio::select! {
            () = tasks.wait() => {}
            () = worker.stopped_cold(&tasks) => {}
        }
        drop((heart, control));
        worker.observer.load(false, 0);
        worker.events.send(&Event::WorkerOffline(worker.load()));
        worker.replies.close().await;
        worker.events.close().await;
        worker.transport.close().await;
        match consumer.failure() {
            Some(error) => Err(error.clone()),
            None => {
                tracing::info!("worker stopped");
                Ok(())
            }
        }
    }

    /// Tells monitors that the worker is there, and that it still is.
    async fn beat(self: Arc<Self>) {
        self.events.send(&Event::WorkerOnline(self.load()));
        let every = self.config.heartbeat_interval;
        let pulse = self.pulses.start("heartbeat", every);
        let mut beats = tokio::time::interval(every);
        loop {
            beats.tick().await;
            pulse.tick();
            let load = self.load();
            self.observer.load(true, load.active);
            self.observer
                .broker_blocked(self.transport.blocked().is_some());
            self.events.send(&Event::WorkerHeartbeat(load));
        }
    }

    fn load(&self) -> Load {
        Load {
            freq: self.config.heartbeat_interval.as_secs_f64(),
            active: self.accepted.active(),
            processed: self.totals().values().sum(),
            loadavg: load_average().unwrap_or_default(),
        }
    }

    fn totals(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deliveries that each queue's consumer may hold.
    fn prefetch(&self) -> u16 {
        u16::try_from(self.pool.size())
            .unwrap_or(u16::MAX)
            .saturating_mul(self.config.prefetch_multiplier)
    }

    /// Counts a task that begins.
    fn count(&self, task: &str) {
        let mut totals = self.totals();
        match totals.get_mut(task) {
            Some(count) => *count += 1,
            None => {
                totals.insert(task.to_owned(), 1);
            }
        }
    }

    /// Waits for a cold shutdown and then, for a limited time, for the stopped tasks.
    async fn stopped_cold(&self, tasks: &TaskTracker) {
        let over = async {
            match self.config.warm_shutdown {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let unsettled = async {
            self.pool.empty().await;
            tokio::time::sleep(SETTLED_WITHIN).await;
        };
        let soft = tokio::select! {
            () = self.shutdown.cold.cancelled() => self.config.soft_shutdown,
            () = over => {
                tracing::warn!(
                    tasks = tasks.len(),
                    "the time for running tasks is over; the worker stops at once"
                );
                self.config.soft_shutdown
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
        self.stopping.cancel();
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
fn unix_seconds(time: DateTime<Utc>) -> f64 {
    time.timestamp_micros() as f64 / 1e6
}

/// Load averages of the host over 1, 5 and 15 minutes.
fn load_average() -> Option<[f64; 3]> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let mut averages = text.split(' ').map_while(|word| word.parse().ok());
    Some([averages.next()?, averages.next()?, averages.next()?])
}

/// Says when the worker is first served, and when it is again.
async fn announce(mut connected: tokio::sync::watch::Receiver<bool>, worker: Arc<Worker>) {
    let mut before = false;
    loop {
        let up = *connected.borrow_and_update();
        worker.served.send_replace(up);
        worker.observer.broker_connected(up, before);
        if up && !before {
            before = true;
            tracing::info!(
                hostname = worker.config.hostname,
                broker = worker.transport.masked_url(),
                queues = ?worker.config.queues,
                concurrency = worker.config.concurrency,
                after_ms = u64::try_from(worker.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                "worker ready"
            );
        } else if up {
            tracing::info!("connected to the broker again");
        }
        let changed = tokio::select! {
            () = worker.shutdown.warm.cancelled() => return,
            changed = connected.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}
