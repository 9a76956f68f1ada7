//! Follow-up tasks of a task: callbacks, chains, chords.
//!
//! [`celery_protocol::canvas`] plans the messages; this module sends them, and stores the data that chords need. The
//! broker confirms them before the task's result is stored or, after a failure, before the message is acknowledged.
//! While a broker or backend cannot be reached, the worker waits, until a shutdown ends the wait
//! ([`crate::worker::SETTLED_WITHIN`]); the message is then requeued, and the worker that runs the task again sends
//! messages with the same ids.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, Publication, Sending, TaskQueues, TracePropagation};
use crate::clock;
use crate::offload::LargeWorkLock;
use crate::product::Product;
use crate::publication::{TaskPublisher, send_event};
use crate::results::{ChordSupport, ResultBackend, ResultError};
use celery_protocol::canvas::{Call, Effect, Outgoing, Plan, ResultNode, SignatureError};
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::message::TaskMessage;
use service_connection::backoff::RetryLoop;
use service_connection::error_chain::chain;

mod callbacks;
pub(crate) mod chord;
mod ended;
mod unsent;

/// Time limit for publishing before a failure is logged.
const PUBLISH_WITHIN: Duration = Duration::from_secs(10);

/// Maximum number of attempts to publish a message that the broker refuses, e.g. because its queue is full. Python's
/// default is one attempt and three more.
const OFFERS: u32 = 4;

/// Maximum number of messages that wait for the broker's confirm.
const IN_FLIGHT: usize = 64;

/// First and longest pause between two attempts to publish a message or to store a result.
pub(crate) const STORE_PAUSES: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(3));

/// The worker is stopping: the message must be requeued.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopped;

/// Reason why the follow-up tasks were not sent.
#[derive(Debug)]
pub(crate) enum WorkflowError {
    /// The worker is stopping.
    Stopped,
    /// A signature cannot be applied.
    Signature(SignatureError),
    /// The broker refused a message.
    Refused(BrokerError),
}

impl WorkflowError {
    /// The exception of the task that fails with this error.
    pub(crate) fn exception(&self) -> Exception {
        match self {
            Self::Signature(error @ SignatureError::NoChords) => {
                Exception::new(BUILTINS, "NotImplementedError", error.to_string())
            }
            Self::Signature(error @ SignatureError::Serializer { .. }) => {
                Exception::new("kombu.exceptions", "EncodeError", error.to_string())
            }
            Self::Signature(error) => Exception::invalid_task(error.to_string()),
            Self::Refused(_) | Self::Stopped => {
                Exception::new("kombu.exceptions", "OperationalError", self.to_string())
            }
        }
    }
}

impl fmt::Display for WorkflowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the worker stops"),
            Self::Signature(error) => error.fmt(f),
            Self::Refused(error) => chain(error).fmt(f),
        }
    }
}

impl From<Stopped> for WorkflowError {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<SignatureError> for WorkflowError {
    fn from(error: SignatureError) -> Self {
        Self::Signature(error)
    }
}

/// Options for sending follow-up tasks.
#[derive(Debug, Clone)]
pub(crate) struct WorkflowOptions {
    /// Node name of the worker.
    pub(crate) hostname: Arc<str>,
    /// The program that the worker is a part of.
    pub(crate) product: Product,
    /// Queue of tasks that name none.
    pub(crate) default_queue: String,
    /// Declarations of the queues.
    pub(crate) queues: TaskQueues,
    /// True if an event `task-sent` is sent for each task.
    pub(crate) task_sent_events: bool,
    /// Maximum wait for the results of a chord's header after its parts have ended.
    pub(crate) join_timeout: Duration,
    /// Transfers a task's trace to its follow-up tasks.
    pub(crate) propagation: Arc<dyn TracePropagation>,
}

/// Sends the follow-up tasks of a worker's tasks.
pub(crate) struct Workflow {
    broker: Arc<dyn Broker>,
    results: Arc<dyn ResultBackend>,
    chords: ChordSupport,
    options: WorkflowOptions,
    /// Name of a queue that no process reads, as with a Python worker.
    reply_to: String,
    publisher: TaskPublisher,
    /// Runs the planning of large signatures one at a time.
    large_work: LargeWorkLock,
    settling_over: CancellationToken,
}

impl Workflow {
    pub(crate) fn new(
        broker: Arc<dyn Broker>,
        results: Arc<dyn ResultBackend>,
        options: WorkflowOptions,
        settling_over: CancellationToken,
    ) -> Self {
        let publisher = TaskPublisher::new(
            &options.hostname,
            options.default_queue.clone(),
            options.queues.clone(),
            options.task_sent_events,
        );
        Self {
            publisher,
            chords: results.chords(),
            reply_to: Uuid::new_v4().to_string(),
            large_work: LargeWorkLock::default(),
            broker,
            results,
            options,
            settling_over,
        }
    }

    fn call<'a>(&'a self, message: &'a TaskMessage, role: &'static str) -> Call<'a> {
        Call {
            parent_id: Some(&message.id),
            root_id: Some(message.root_id.as_deref().unwrap_or(&message.id)),
            role,
            reply_to: &self.reply_to,
            origin: self.publisher.origin(),
            now: clock::now(),
            chords: !matches!(self.chords, ChordSupport::None),
        }
    }

    /// Executes the effects of a plan. Returns the results of the sent tasks, the task's children.
    async fn carry_out(&self, plan: Plan, task_id: &str) -> Result<Vec<Value>, WorkflowError> {
        let mut children = Vec::new();
        let mut waiting = Vec::new();
        for effect in plan.effects {
            match effect {
                Effect::Send(outgoing) => waiting.push(*outgoing),
                Effect::Chord(header) => match &self.chords {
                    ChordSupport::Counted(chords) => {
                        let begin = || chords.begin(&header.group_id, header.size, &header.results);
                        self.retry_until_reachable(task_id, "a chord is not noted", begin)
                            .await?;
                    }
                    ChordSupport::Polled => {
                        children.extend(ResultNode::parse(&as_result(&header.unlock)));
                        waiting.push(header.unlock);
                    }
                    ChordSupport::None => return Err(SignatureError::NoChords.into()),
                },
                Effect::ChordGrows {
                    group_id,
                    task_id: added,
                } => {
                    let ChordSupport::Counted(chords) = &self.chords else {
                        return Err(SignatureError::NotExtensible.into());
                    };
                    let grow = || chords.grow(&group_id, &added);
                    self.retry_until_reachable(task_id, "a chord is not extended", grow)
                        .await?;
                }
            }
        }
        stream::iter(waiting)
            .map(|outgoing| self.send(outgoing, task_id))
            .buffered(IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        children.extend(plan.children);
        Ok(children.iter().map(ResultNode::to_json).collect())
    }

    async fn send(&self, outgoing: Outgoing, task_id: &str) -> Result<(), WorkflowError> {
        let mut publication = self.publisher.publication(outgoing);
        let sending = Sending::begin(&mut publication, &*self.broker, &*self.options.propagation);
        let sent = self.publish(&publication, task_id).await;
        sending.end(&sent);
        sent
    }

    /// Publishes one follow-up message of a task, and waits for the broker and its confirmation until the worker stops.
    /// A message that waits for its confirmation is not published again.
    ///
    /// # Errors
    /// [`WorkflowError::Refused`] if the broker will never accept the message, and [`WorkflowError::Stopped`].
    pub(crate) async fn publish(
        &self,
        publication: &Publication,
        task_id: &str,
    ) -> Result<(), WorkflowError> {
        let mut refusals = 0;
        let publishing = RetryLoop::new(STORE_PAUSES).run(
            || {
                self.broker
                    .publish_until_confirmed(publication, PUBLISH_WITHIN)
            },
            |error| match error {
                BrokerError::Unreachable { .. }
                | BrokerError::Timeout { .. }
                | BrokerError::Blocked { .. } => true,
                BrokerError::Refused { .. } => {
                    refusals += 1;
                    refusals < OFFERS
                }
                _ => false,
            },
            |error, retry_in_s| {
                tracing::warn!(
                    task_id,
                    routing_key = publication.routing_key,
                    error = %chain(error),
                    retry_in_s,
                    "follow-up message was not sent; retrying, the task's message stays unacknowledged"
                );
            },
        );
        let published = self.settling_over.run_until_cancelled(publishing).await;
        published.ok_or(Stopped)?.map_err(WorkflowError::Refused)?;
        if let Some(event) = self.publisher.sent_event(publication) {
            send_event(&*self.broker, &event).await;
        }
        Ok(())
    }

    /// Repeats an operation on the backend until it succeeds; `None` if its error is
    /// [hopeless](ResultError::is_hopeless).
    async fn retry_until_reachable<T, F>(
        &self,
        task_id: &str,
        what: &'static str,
        mut attempt: impl FnMut() -> F,
    ) -> Result<Option<T>, Stopped>
    where
        F: Future<Output = Result<T, ResultError>>,
    {
        let attempting = RetryLoop::new(STORE_PAUSES).run(
            // Boxed: the future of a client's call can be large, and would be part of the future of each caller up to
            // the task.
            || Box::pin(attempt()),
            |error| !error.is_hopeless(),
            |error, retry_in_s| {
                tracing::warn!(
                    task_id,
                    what,
                    error = %chain(error),
                    retry_in_s,
                    "follow-up step not done; retrying, the task's message stays unacknowledged"
                );
            },
        );
        let attempted = self.settling_over.run_until_cancelled(attempting).await;
        match attempted.ok_or(Stopped)? {
            Ok(done) => Ok(Some(done)),
            Err(error) => {
                tracing::error!(
                    task_id,
                    what,
                    error = %chain(&error),
                    "follow-up step cannot be done; a retry would not help"
                );
                Ok(None)
            }
        }
    }

    async fn pause(&self, time: Duration) -> Result<(), Stopped> {
        tokio::select! {
            () = self.settling_over.cancelled() => Err(Stopped),
            () = sleep(time) => Ok(()),
        }
    }
}

/// The result of a message, in the form of `as_tuple()`.
fn as_result(outgoing: &Outgoing) -> Value {
    serde_json::json!([[outgoing.message.headers["id"], null], null])
}
