//! The worker: receive, decide, run, settle.
//!
//! Knows Celery and nothing of transfers. The order of effects is that of Celery with late
//! acknowledgement: STARTED, the run, its result stored, and only then the message acknowledged.
//! A message is therefore never lost; it can be delivered twice, and tasks have to stand that.
//!
//! Every accepted message has an entry under its task id until it is settled. A delivery whose
//! task is accepted here already (the broker gave it again after a lost connection, or a producer
//! sent it twice) joins that entry instead of running beside it, and is settled with it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use celery::Celery;
use chrono::{DateTime, Utc};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::broker::{Delivery, Queue, Subscription, Transport, Verdict};
use crate::pauses::Pauses;
use crate::telemetry::{chain, panic_text};
use crate::wire::exception::{BUILTINS, Exception};
use crate::wire::message::{self, Fate, Reason, Refused, TaskMessage};
use crate::wire::repr;
use crate::wire::result::{ResultMeta, State};

pub mod results;
mod task;

pub use task::{Control, Failure, Outcome, Registry, WorkerTask};

use results::ResultBackend;
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
    accepted: Mutex<HashMap<String, Vec<Delivery>>>,
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
        Self {
            app,
            registry,
            transport,
            results,
            hostname: config.hostname.as_str().into(),
            slots: Arc::new(Semaphore::new(config.concurrency)),
            config,
            shutdown,
            accepted: Mutex::default(),
        }
    }

    /// Runs until it is told to stop, and until everything accepted is settled.
    pub async fn run(self) {
        let started = Instant::now();
        let worker = Arc::new(self);
        let mut consumer = worker.transport.consume(Subscription {
            queues: worker.config.queues.iter().map(Queue::tasks).collect(),
            prefetch: worker.config.prefetch,
        });
        let tasks = TaskTracker::new();
        tasks.spawn(announce(consumer.connected(), worker.clone(), started));

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
        worker.transport.close().await;
        tracing::info!("worker stopped");
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
        if !self.accept(&message.id, delivery) {
            return;
        }
        let message = Arc::new(message);
        let verdict = self.process(&message, redelivered).await;
        for delivery in self.release(&message.id) {
            delivery.settle(verdict).await;
        }
    }

    /// Enters a delivery under its task's id; false if it joined one that is there already.
    fn accept(&self, id: &str, delivery: Delivery) -> bool {
        match self.accepted().entry(id.to_owned()) {
            MapEntry::Vacant(entry) => {
                entry.insert(vec![delivery]);
                true
            }
            MapEntry::Occupied(mut entry) => {
                tracing::info!(
                    task_id = id,
                    "task runs here already; the new delivery joins it"
                );
                // Those of a lost connection need no settling any more.
                entry.get_mut().retain(|earlier| !earlier.is_void());
                entry.get_mut().push(delivery);
                false
            }
        }
    }

    fn release(&self, id: &str) -> Vec<Delivery> {
        self.accepted().remove(id).unwrap_or_default()
    }

    fn accepted(&self) -> MutexGuard<'_, HashMap<String, Vec<Delivery>>> {
        // No code panics while it holds the lock, and the map would still be whole.
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the task's time and for a slot, runs it and stores its result.
    async fn process(&self, message: &Arc<TaskMessage>, redelivered: bool) -> Verdict {
        let stopped = self.shutdown.warm.cancelled();
        let begun = async {
            wait_until(message.eta).await;
            self.slots.acquire().await
        };
        let slot = tokio::select! {
            biased;
            () = stopped => return Verdict::Requeue,
            slot = begun => slot,
        };
        // Before it is checked whether the task has expired: it may have waited for long.
        let Ok(slot) = slot else {
            return Verdict::Requeue;
        };
        if message.expires.is_some_and(|expires| expires <= Utc::now()) {
            tracing::info!(task_id = message.id, expires = ?message.expires, "task has expired");
            return self
                .conclude(message, State::Revoked(Exception::revoked("expired")))
                .await;
        }

        let started = Instant::now();
        let outcome = self.execute(message, redelivered).await;
        drop(slot);
        let runtime_s = started.elapsed().as_secs_f64();
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
        self.conclude(message, state).await
    }

    async fn execute(&self, message: &Arc<TaskMessage>, redelivered: bool) -> Outcome {
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
                cancelled: self.shutdown.cold.child_token(),
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

    /// Stores a final state, for as long as it takes: until then the message is not acknowledged.
    /// Only a cold shutdown ends the wait; the message then goes back, and the task, run again,
    /// finds its work done.
    async fn conclude(&self, message: &TaskMessage, state: State) -> Verdict {
        if message.ignore_result == Some(true) {
            return Verdict::Ack;
        }
        let meta = ResultMeta::new(message, state, Utc::now());
        let mut pauses = Pauses::new(STORE_PAUSES.0, STORE_PAUSES.1);
        loop {
            let Err(error) = self.results.store(&meta, message).await else {
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

/// Says when the worker is first served, and when it is again.
async fn announce(
    mut connected: tokio::sync::watch::Receiver<bool>,
    worker: Arc<Worker>,
    started: Instant,
) {
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
                after_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
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
