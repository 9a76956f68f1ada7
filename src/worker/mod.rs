//! The worker: receive, decide, run, settle.
//!
//! Knows Celery and nothing of transfers. The order of effects is that of Celery with late
//! acknowledgement: STARTED, the run, its result stored, and only then the message acknowledged.
//! A message is therefore never lost; it can be delivered twice, and tasks have to stand that.
//!
//! Every accepted message has an entry under its task id until it is settled. A delivery whose
//! task is accepted here already (the broker gave it again after a lost connection, or a producer
//! sent it twice) joins that entry instead of running beside it, and is settled with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use celery::Celery;
use chrono::{DateTime, Utc};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::broker::{Delivery, Queue, Subscription, Transport, Verdict};
use crate::faults::fault_point;
use crate::pauses::Pauses;
use crate::telemetry::{chain, panic_text};
use crate::wire::event::{Event, HEARTBEAT_SECONDS, Load};
use crate::wire::exception::{BUILTINS, Exception};
use crate::wire::message::{self, Fate, Reason, Refused, TaskMessage};
use crate::wire::repr;
use crate::wire::result::{Cause, ResultMeta, State};

mod accepted;
mod control;
mod events;
pub mod results;
mod revoked;
mod task;

pub use task::{Control, Failure, Outcome, Registry, WorkerTask};

use accepted::{AcceptedTasks, Phase, Stop};
use events::Events;
use results::ResultBackend;
use revoked::Revoked;
use task::Invocation;

/// How long STARTED may hold up a task.
const STARTED_WITHIN: Duration = Duration::from_secs(5);

/// First and longest pause between two tries to store a result.
const STORE_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(15));

/// How long stopped tasks may take to put things in order.
const COLD_WITHIN: Duration = Duration::from_secs(30);

/// What a worker is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Node name, e.g. `celery@host`.
    pub hostname: String,
    /// Names of the queues.
    pub queues: Vec<String>,
    /// Tasks that run at once.
    pub concurrency: usize,
    /// Unsettled deliveries for each queue; 0 is no limit.
    pub prefetch: u16,
    /// Largest accepted body, in bytes.
    pub max_body_bytes: usize,
    /// Whether STARTED is stored.
    pub track_started: bool,
    /// Whether the events of tasks are sent from the start.
    pub task_events: bool,
    /// Whether remote control is answered.
    pub remote_control: bool,
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

    /// The running ones are stopped, too, and their messages given back.
    pub fn cold(&self) {
        self.warm.cancel();
        self.cold.cancel();
    }
}

/// A Celery worker.
pub struct Worker {
    app: Arc<Celery>,
    registry: Registry,
    transport: Arc<dyn Transport>,
    results: Arc<dyn ResultBackend>,
    config: Config,
    hostname: Arc<str>,
    shutdown: Shutdown,
    slots: Arc<Semaphore>,
    accepted: AcceptedTasks,
    revoked: Revoked,
    events: Events,
    /// Tasks begun since the start, by name.
    totals: Mutex<BTreeMap<String, u64>>,
    started: Instant,
}

impl Worker {
    /// A worker that answers the tasks of `registry`. [`Worker::run`] starts it.
    #[must_use]
    pub fn new(
        app: Arc<Celery>,
        registry: Registry,
        transport: Arc<dyn Transport>,
        results: Arc<dyn ResultBackend>,
        config: Config,
        shutdown: Shutdown,
    ) -> Self {
        let hostname: Arc<str> = config.hostname.as_str().into();
        let events = Events::new(hostname.clone(), config.task_events, transport.clone());
        Self {
            app,
            registry,
            transport,
            results,
            hostname,
            slots: Arc::new(Semaphore::new(config.concurrency)),
            config,
            shutdown,
            accepted: AcceptedTasks::default(),
            revoked: Revoked::default(),
            events,
            totals: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Runs until it is told to stop, and until everything accepted is settled.
    pub async fn run(self) {
        let worker = Arc::new(self);
        let mut consumer = worker.transport.consume(Subscription {
            purpose: "tasks",
            small: false,
            queues: worker.config.queues.iter().map(Queue::tasks).collect(),
            prefetch: worker.config.prefetch,
        });
        let tasks = TaskTracker::new();
        tasks.spawn(announce(consumer.connected(), worker.clone()));
        let heart = AbortOnDropHandle::new(tokio::spawn(worker.clone().beat()));
        let control = worker
            .config
            .remote_control
            .then(|| AbortOnDropHandle::new(tokio::spawn(control::serve(worker.clone()))));

        let mut stopping = false;
        loop {
            tokio::select! {
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
                    None => break,
                },
            }
        }

        tasks.close();
        tokio::select! {
            () = tasks.wait() => {}
            () = worker.stopped_cold(&tasks) => {}
        }
        drop((heart, control));
        worker.events.send(&Event::WorkerOffline(worker.load()));
        worker.events.close().await;
        worker.transport.close().await;
        tracing::info!("worker stopped");
    }

    /// Tells monitors that the worker is there, and that it still is.
    async fn beat(self: Arc<Self>) {
        self.events.send(&Event::WorkerOnline(self.load()));
        let mut beats = tokio::time::interval(Duration::from_secs_f64(HEARTBEAT_SECONDS));
        loop {
            beats.tick().await;
            self.events.send(&Event::WorkerHeartbeat(self.load()));
        }
    }

    fn load(&self) -> Load {
        Load {
            active: self.accepted.active(),
            processed: self.totals().values().sum(),
            loadavg: load_average().unwrap_or_default(),
        }
    }

    fn totals(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a cold shutdown and then, for a limited time, for the stopped tasks.
    async fn stopped_cold(&self, tasks: &TaskTracker) {
        self.shutdown.cold.cancelled().await;
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

    /// One delivery, from receipt to settlement.
    async fn receive(self: Arc<Self>, delivery: Delivery) {
        let message = match message::decode(&delivery.message, self.config.max_body_bytes) {
            Ok(message) => message,
            Err(refused) => return self.refuse(delivery, refused).await,
        };
        if self.registry.get(&message.task).is_none() {
            return self.not_registered(delivery, message).await;
        }
        let redelivered = delivery.redelivered;
        tracing::info!(
            task = message.task,
            task_id = message.id,
            args = message.argsrepr.as_deref().map(repr::shorten),
            kwargs = message.kwargsrepr.as_deref().map(repr::shorten),
            redelivered,
            "task received"
        );
        let extras: Vec<&str> = message.extras().collect();
        if !extras.is_empty() {
            tracing::warn!(
                task_id = message.id,
                ?extras,
                "the message asks for what this worker cannot do; the task runs without it"
            );
        }
        let message = Arc::new(message);
        let stop = Stop {
            now: self.shutdown.cold.child_token(),
            for_good: CancellationToken::new(),
        };
        if !self.accepted.accept(&message, delivery, &stop) {
            return tracing::info!(
                task_id = message.id,
                "task runs here already; the new delivery joins it"
            );
        }
        fault_point!(TaskAccepted);
        // Not of one that joined: monitors would take a running task for a waiting one.
        self.events.send(&Event::TaskReceived(&message));
        let verdict = self.process(&message, redelivered, stop).await;
        for delivery in self.accepted.release(&message.id) {
            delivery.settle(verdict).await;
        }
        fault_point!(Acknowledged);
    }

    /// Waits for the task's time and for a slot, runs it and stores its result.
    async fn process(&self, message: &Arc<TaskMessage>, redelivered: bool, stop: Stop) -> Verdict {
        let stopped = self.shutdown.warm.cancelled();
        let begun = async {
            wait_until(message.eta).await;
            self.accepted.enter(&message.id, Phase::Reserved);
            self.slots.acquire().await
        };
        let slot = tokio::select! {
            biased;
            () = stopped => return Verdict::Requeue,
            slot = begun => slot,
        };
        // Only now, since the task may have waited for long.
        let Ok(slot) = slot else {
            return Verdict::Requeue;
        };
        if let Some(state) = self.unwanted(message) {
            return self.conclude(message, state, Duration::ZERO).await;
        }

        self.accepted.enter(&message.id, Phase::Active(Utc::now()));
        *self.totals().entry(message.task.clone()).or_default() += 1;
        self.events.send(&Event::TaskStarted(&message.id));
        let started = Instant::now();
        let outcome = self.execute(message, redelivered, &stop).await;
        drop(slot);
        let runtime = started.elapsed();
        let runtime_s = runtime.as_secs_f64();
        let state = match outcome {
            Outcome::Returned(value) => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s,
                    "task succeeded"
                );
                State::Success(value)
            }
            Outcome::Failed(Failure::Raised(exception)) => {
                tracing::error!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s,
                    exception = exception.headline(),
                    "task failed"
                );
                self.failure(message, exception)
            }
            Outcome::Failed(Failure::Interrupted) if stop.for_good.is_cancelled() => {
                tracing::warn!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s,
                    "task was terminated"
                );
                State::Revoked(Cause::Terminated)
            }
            Outcome::Failed(Failure::Interrupted) => {
                tracing::warn!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s,
                    "task was interrupted; its message goes back to the queue"
                );
                return Verdict::Requeue;
            }
            Outcome::Failed(Failure::Ignored) => {
                tracing::info!(
                    task = message.task,
                    task_id = message.id,
                    runtime_s,
                    "task ignored"
                );
                return Verdict::Ack;
            }
        };
        self.conclude(message, state, runtime).await
    }

    /// Why a task must not begin any more, if so.
    fn unwanted(&self, message: &TaskMessage) -> Option<State> {
        let expired = message.expires.is_some_and(|expires| expires <= Utc::now());
        let cause = match expired {
            true => Cause::Expired,
            false if self.revoked.contains(&message.id) => Cause::Revoked,
            false => return None,
        };
        tracing::info!(task_id = message.id, ?cause, "task does not run");
        Some(State::Revoked(cause))
    }

    async fn execute(&self, message: &Arc<TaskMessage>, redelivered: bool, stop: &Stop) -> Outcome {
        let Some(entry) = self.registry.get(&message.task) else {
            return Outcome::Failed(Failure::Raised(Exception::not_registered(&message.task)));
        };
        if self.config.track_started && message.ignore_result != Some(true) {
            self.store_started(message).await;
        }
        let run = (entry.run)(Invocation {
            app: self.app.clone(),
            message: message.clone(),
            control: Control {
                hostname: self.hostname.clone(),
                cancelled: stop.now.clone(),
                terminated: stop.for_good.clone(),
                redelivered,
            },
        });
        // A panic outside the task's own body, e.g. in its `on_failure`.
        tokio::spawn(run).await.unwrap_or_else(|error| {
            let text = match error.try_into_panic() {
                Ok(panic) => format!("task panicked: {}", panic_text(&*panic)),
                Err(error) => error.to_string(),
            };
            Outcome::Failed(Failure::Raised(Exception::new(
                BUILTINS,
                "RuntimeError",
                text,
            )))
        })
    }

    /// STARTED is news, not truth: when it cannot be stored the task runs all the same.
    async fn store_started(&self, message: &TaskMessage) {
        let state = State::Started {
            pid: std::process::id(),
            hostname: self.hostname.to_string(),
        };
        let meta = ResultMeta::new(message, state, Utc::now());
        let stored = tokio::time::timeout(STARTED_WITHIN, self.results.store(&meta, message)).await;
        match stored {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(task_id = message.id, error = %chain(&error), "STARTED was not stored");
            }
            Err(_) => tracing::warn!(task_id = message.id, "STARTED was not stored in time"),
        }
    }

    fn failure(&self, message: &TaskMessage, exception: Exception) -> State {
        let function = self
            .registry
            .get(&message.task)
            .map_or(message.task.as_str(), |entry| entry.function);
        let place = format!("ccat-transfer on {}, in {function}", self.hostname);
        State::Failure {
            traceback: Some(exception.traceback(&place)),
            exception,
        }
    }

    /// Stores a final state, where one is wanted, and then tells monitors.
    async fn conclude(&self, message: &TaskMessage, state: State, runtime: Duration) -> Verdict {
        let meta = ResultMeta::new(message, state, Utc::now());
        let verdict = match message.ignore_result {
            Some(true) => Verdict::Ack,
            _ => self.store(message, &meta).await,
        };
        let event = Event::of_end(&message.id, &meta.state, runtime.as_secs_f64());
        if let (Verdict::Ack, Some(event)) = (verdict, event) {
            self.events.send(&event);
        }
        verdict
    }

    /// Stores a final state, for as long as it takes: until then the message is not acknowledged.
    /// Only a cold shutdown ends the wait; the message then goes back, and the task, run again,
    /// finds its work done.
    async fn store(&self, message: &TaskMessage, meta: &ResultMeta) -> Verdict {
        let mut pauses = Pauses::new(STORE_PAUSES.0, STORE_PAUSES.1);
        loop {
            let stored = fault_point!(ResultStored, self.results.store(meta, message).await);
            let Err(error) = stored else {
                return Verdict::Ack;
            };
            let pause = pauses.next_pause();
            tracing::warn!(
                task_id = message.id,
                error = %chain(&error),
                retry_in = %humantime::format_duration(pause),
                "result was not stored; the message stays unacknowledged until it is"
            );
            tokio::select! {
                () = self.shutdown.cold.cancelled() => return Verdict::Requeue,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// A message for a task that this worker does not have.
    async fn not_registered(&self, delivery: Delivery, message: TaskMessage) {
        tracing::error!(
            task = message.task,
            task_id = message.id,
            known = ?self.registry.names(),
            "message for a task that is not registered; it is rejected"
        );
        let exception = Exception::not_registered(&message.task);
        let verdict = match self
            .conclude(
                &message,
                State::Failure {
                    exception,
                    traceback: None,
                },
                Duration::ZERO,
            )
            .await
        {
            Verdict::Requeue => Verdict::Requeue,
            _ => Verdict::Reject,
        };
        delivery.settle(verdict).await;
    }

    /// A message that is no task.
    async fn refuse(&self, delivery: Delivery, refused: Refused) {
        let Refused {
            reason,
            task,
            id,
            reply_to,
        } = refused;
        let known = task
            .as_deref()
            .is_none_or(|task| self.registry.get(task).is_some());
        let message = id.map(|id| TaskMessage {
            correlation_id: delivery
                .message
                .properties
                .correlation_id
                .clone()
                .unwrap_or(id.clone()),
            id,
            task: task.clone().unwrap_or_default(),
            reply_to: reply_to.filter(|queue| !queue.is_empty()),
            ..TaskMessage::default()
        });
        match message {
            Some(message) if !known => self.not_registered(delivery, message).await,
            message => {
                tracing::error!(
                    task,
                    task_id = message.as_ref().map(|m| &m.id),
                    routing_key = delivery.routing_key,
                    body_bytes = delivery.message.body.len(),
                    reason = %reason,
                    fate = ?reason.fate(),
                    "message is no task"
                );
                if let (Reason::Malformed(text), Some(message)) = (&reason, message) {
                    let exception = Exception::invalid_task(*text);
                    self.conclude(
                        &message,
                        State::Failure {
                            exception,
                            traceback: None,
                        },
                        Duration::ZERO,
                    )
                    .await;
                }
                let verdict = match reason.fate() {
                    Fate::Ack => Verdict::Ack,
                    Fate::Reject => Verdict::Reject,
                };
                delivery.settle(verdict).await;
            }
        }
    }
}

async fn wait_until(eta: Option<DateTime<Utc>>) {
    if let Some(wait) = eta.and_then(|eta| (eta - Utc::now()).to_std().ok()) {
        tokio::time::sleep(wait).await;
    }
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
