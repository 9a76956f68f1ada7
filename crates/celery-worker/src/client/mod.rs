//! The producing side: a client sends tasks and waits for their results.
//!
//! ```
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! use std::time::Duration;
//!
//! use celery_protocol::canvas::Signature;
//! use celery_worker::client::Client;
//! # use celery_worker::{results::memory::MemoryResults};
//! # use celery_protocol::result::State;
//! # let (broker_url, result_url) = ("memory://", "memory://");
//!
//! let client = Client::builder(broker_url).results(result_url).build().await?;
//! let sum = client.send(Signature::new("tasks.add").args((2, 3))).await?;
//! # MemoryResults::named(result_url).set(sum.id(), State::Success(5.into()));
//! let sum: i64 = sum.get(Duration::from_secs(10)).await?;
//! assert_eq!(sum, 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```
//!
//! Chains, groups and chords are signatures, too ([`celery_protocol::canvas`]): the client sends what
//! can run now, and the messages carry the rest to the workers. [`Client::send`] returns when the
//! broker has confirmed every message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::broker::{
    Broker, BrokerError, Declaration, Exchange, ExchangeKind, NoPropagation, Publication, Sending,
    TaskQueues, TracePropagation,
};
use crate::clock;
use crate::publication::{TaskPublisher, send_event};
use crate::results::{
    ChordSupport, ReadError, ResultAccess, ResultBackend, ResultError, ResultReader,
};
use celery_protocol::canvas::{
    self, Call, Effect, Outgoing, Plan, ResultNode, Signature, SignatureError,
};
use celery_protocol::message::TaskMessage;
use celery_protocol::pidbox;

mod builder;
mod result;

pub use builder::{ClientBuilder, ConnectError};
pub use result::{AsyncResult, GetError};

/// Messages that wait for the broker's confirmation at a time.
const IN_FLIGHT: usize = 64;

/// Settings of a client.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ClientOptions {
    /// Queue of signatures that name none (`task_default_queue`).
    pub default_queue: String,
    /// Declaration of queues; has to be that of the workers.
    pub queues: TaskQueues,
    /// Time limit for publishing one message, reconnecting included, and for opening a reply queue.
    pub publish_timeout: Duration,
    /// Name of the host in `origin`, the header by which monitors know the sender.
    pub hostname: String,
    /// True if a task that a task sends has the priority of its parent
    /// (`task_inherit_parent_priority`).
    pub inherit_parent_priority: bool,
    /// True if an event `task-sent` is sent for each task (`task_send_sent_event`), for monitors.
    pub task_sent_events: bool,
    /// Carries the trace of the caller to the receivers of its messages.
    pub propagation: Arc<dyn TracePropagation>,
}

impl Default for ClientOptions {
    /// Celery's defaults.
    fn default() -> Self {
        Self {
            default_queue: "celery".into(),
            queues: TaskQueues::default(),
            publish_timeout: Duration::from_secs(10),
            hostname: "localhost".into(),
            inherit_parent_priority: false,
            task_sent_events: false,
            propagation: Arc::new(NoPropagation),
        }
    }
}

/// Reason why a signature was not sent, or not all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The signature cannot be applied.
    #[error("signature cannot be applied")]
    Signature(#[from] SignatureError),
    /// There is nothing to send.
    #[error("an empty chain or group sends nothing; add a task to it")]
    Empty,
    /// The broker did not take a message. Messages of the same workflow may have been sent.
    #[error("the message was not sent")]
    Broker(#[from] BrokerError),
    /// The result backend did not note a chord, so nothing was sent.
    #[error("the chord was not noted in the result backend, and not sent")]
    Results(#[from] ResultError),
    /// The reply queue of `rpc://` was not opened, so nothing was sent.
    #[error("results cannot be received")]
    Replies(#[from] ReadError),
}

/// Treatment of a revoked task that runs already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum IfRunning {
    /// The run goes on.
    #[default]
    Continue,
    /// The run is stopped, as by `terminate=True` in Celery, with SIGTERM.
    Terminate,
}

/// Sends tasks. Cheap to clone; clones share connections and the reply queue.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Connections>,
    parent: Option<Arc<Parent>>,
}

struct Connections {
    broker: Arc<dyn Broker>,
    results: Arc<dyn ResultBackend>,
    options: ClientOptions,
    reader: OnceCell<ResultReader>,
    publisher: TaskPublisher,
    /// `reply_to` where no reply queue is used.
    oid: String,
}

/// The running task that a client belongs to.
struct Parent {
    message: Arc<TaskMessage>,
    /// Number of signatures that this run has applied.
    applied: AtomicU64,
    children: Mutex<Vec<Value>>,
}

impl Client {
    /// Creates a client of a broker and a result backend; opens no connection yet.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use celery_protocol::canvas::Signature;
    /// use celery_worker::broker::memory::MemoryBroker;
    /// use celery_worker::client::{Client, ClientOptions};
    /// use celery_worker::results::Disabled;
    ///
    /// let broker = MemoryBroker::new();
    /// let client = Client::new(broker.clone(), Disabled, ClientOptions::default());
    /// client.send(Signature::new("tasks.add").args((2, 3))).await?;
    /// assert_eq!(broker.messages("celery").len(), 1);
    /// # Ok::<(), celery_worker::client::SendError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn new(
        broker: impl Broker + 'static,
        results: impl ResultBackend + 'static,
        options: ClientOptions,
    ) -> Self {
        Self::of(Arc::new(broker), Arc::new(results), options)
    }

    /// Creates a client that shares its broker and result backend with others.
    #[must_use]
    pub fn of(
        broker: Arc<dyn Broker>,
        results: Arc<dyn ResultBackend>,
        options: ClientOptions,
    ) -> Self {
        let publisher = TaskPublisher::new(
            &options.hostname,
            options.default_queue.clone(),
            options.queues.clone(),
            options.task_sent_events,
        );
        let shared = Connections {
            broker,
            results,
            options,
            reader: OnceCell::new(),
            publisher,
            oid: Uuid::new_v4().to_string(),
        };
        Self {
            shared: Arc::new(shared),
            parent: None,
        }
    }

    /// Starts to build a client from the URL of a broker.
    pub fn builder(broker_url: impl Into<String>) -> ClientBuilder {
        ClientBuilder::new(broker_url)
    }

    /// The same client within a running task: what it sends has the task as its parent, and is listed
    /// in [`Client::children`].
    ///
    /// Ids are derived from those of the task. If its message is delivered again and the second run
    /// sends the same signatures in the same order, they have the same ids, and their results exist
    /// once. A retry, or a replacement with the same id, sends new ones.
    pub(crate) fn for_task(&self, message: Arc<TaskMessage>) -> Self {
        let parent = Parent {
            message,
            applied: AtomicU64::new(0),
            children: Mutex::default(),
        };
        Self {
            shared: self.shared.clone(),
            parent: Some(Arc::new(parent)),
        }
    }

    /// Sends a signature: a task, a chain, a group or a chord. Returns when the broker has confirmed
    /// every message. The result is that of the last task of a chain and of the body of a chord; the
    /// result of a group is the list of its tasks' results.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use celery_protocol::canvas::{Signature, chain};
    /// # use celery_worker::{broker::memory::MemoryBroker, results::Disabled};
    /// # use celery_worker::client::{Client, ClientOptions};
    /// # let broker = MemoryBroker::new();
    /// # let client = Client::new(broker.clone(), Disabled, ClientOptions::default());
    /// let result = client.send(Signature::new("tasks.fetch") | Signature::new("tasks.store")).await?;
    /// // The first step is in the queue, and carries the second one.
    /// assert_eq!(broker.messages("celery").len(), 1);
    /// assert_eq!(result.parent().unwrap().id(), broker.messages("celery")[0].headers["id"]);
    /// # Ok::<(), celery_worker::client::SendError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`SendError`]. After [`SendError::Broker`] a part of a group may have been sent.
    pub async fn send(&self, signature: impl Into<Signature>) -> Result<AsyncResult, SendError> {
        let mut signature = signature.into();
        let reply_to = self.reply_to().await?;
        let call = self.call(reply_to);
        let role = self.role();
        let role = role.as_str();
        let plan = match &self.parent {
            None => canvas::apply(signature, &Call { role, ..call })?,
            Some(parent) => {
                if self.shared.options.inherit_parent_priority
                    && !signature.options.contains_key("priority")
                    && let Some(priority) = parent.message.priority
                {
                    signature = signature.priority(priority);
                }
                canvas::apply(signature, &call.for_task(&parent.message, role))?
            }
        };
        self.carry_out(plan).await
    }

    /// Sends several signatures; none of them, if one cannot be applied.
    pub(crate) async fn send_all(&self, signatures: Vec<Signature>) -> Result<(), SendError> {
        let role = self.role();
        let call = Call {
            role: &role,
            ..self.call(self.reply_to().await?)
        };
        let plan = match &self.parent {
            None => canvas::apply_all(signatures, &call)?,
            Some(parent) => canvas::apply_all(signatures, &call.for_task(&parent.message, &role))?,
        };
        match plan.effects.is_empty() {
            true => Ok(()),
            false => self.carry_out(plan).await.map(drop),
        }
    }

    /// Replaces a running task by a signature; see [`celery_protocol::canvas::replace`]. The task has to end without a
    /// result then.
    pub(crate) async fn replace(
        &self,
        running: &TaskMessage,
        signature: Signature,
    ) -> Result<AsyncResult, SendError> {
        let call = Call {
            role: "replace",
            ..self.call(&self.shared.oid)
        };
        let plan = canvas::replace(running, signature, &call)?;
        self.carry_out(plan).await
    }

    /// Adds a task to the chord that a running task is a part of; see [`celery_protocol::canvas::add_to_chord`].
    pub(crate) async fn add_to_chord(
        &self,
        running: &TaskMessage,
        signature: Signature,
    ) -> Result<AsyncResult, SendError> {
        let role = self.role();
        let call = self.call(&self.shared.oid);
        let call = call.for_task(running, &role);
        let plan = canvas::add_to_chord(running, signature, &call)?;
        self.carry_out(plan).await
    }

    /// The result of a task by its id. With `rpc://` only the client that sent a task gets its result.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use celery_worker::{broker::memory::MemoryBroker, results::memory::MemoryResults};
    /// # use celery_worker::client::{Client, ClientOptions};
    /// # let client = Client::new(MemoryBroker::new(), MemoryResults::new(), ClientOptions::default());
    /// assert_eq!(client.result("an-id").state().await?, "PENDING");
    /// # Ok::<(), celery_worker::results::ReadError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn result(&self, task_id: impl Into<String>) -> AsyncResult {
        let node = ResultNode {
            id: task_id.into(),
            parent: None,
            members: None,
        };
        AsyncResult::new(self.clone(), node)
    }

    /// Results of the signatures that this client sent for its task, as `AsyncResult.as_tuple()`: the
    /// `children` of the task's own result.
    pub(crate) fn children(&self) -> Vec<Value> {
        let children = self.parent.as_ref().map(|parent| parent.lock().clone());
        children.unwrap_or_default()
    }

    /// Asks all workers to not run these tasks.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use celery_worker::{broker::memory::MemoryBroker, results::Disabled};
    /// # use celery_worker::client::ClientOptions;
    /// use celery_worker::client::{Client, IfRunning};
    ///
    /// # let client = Client::new(MemoryBroker::new(), Disabled, ClientOptions::default());
    /// client.revoke(&["an-id"], IfRunning::Terminate).await?;
    /// # Ok::<(), celery_worker::broker::BrokerError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The broker did not take the request.
    pub async fn revoke(
        &self,
        task_ids: &[&str],
        if_running: IfRunning,
    ) -> Result<(), BrokerError> {
        let terminate = if_running == IfRunning::Terminate;
        let arguments = json!({"task_id": task_ids, "terminate": terminate, "signal": "SIGTERM"});
        let publication = Publication {
            exchange: pidbox::EXCHANGE.into(),
            routing_key: String::new(),
            message: pidbox::broadcast("revoke", &arguments, 0),
            declare: Some(Declaration::Exchange(Exchange {
                name: pidbox::EXCHANGE.into(),
                kind: ExchangeKind::Fanout,
                durable: false,
            })),
            // Without workers there are no consumers.
            mandatory: false,
            queue_lifetime: None,
        };
        let within = self.shared.options.publish_timeout;
        self.shared.broker.publish(&publication, within).await
    }

    /// Closes the connections to the broker. Results that are stored can still be read. The client of a running task has
    /// no effect, because its connections are those of the worker.
    pub async fn close(&self) {
        if self.parent.is_none() {
            self.shared.broker.close().await;
        }
    }

    /// The part of the ids that tells this signature from all others.
    fn role(&self) -> String {
        match &self.parent {
            None => Uuid::new_v4().to_string(),
            Some(parent) => parent.occasion(),
        }
    }

    async fn reader(&self) -> Result<&ResultReader, ReadError> {
        let shared = &self.shared;
        let open = || {
            let (results, within) = (shared.results.clone(), shared.options.publish_timeout);
            ResultReader::of(results, &*shared.broker, within)
        };
        shared.reader.get_or_try_init(open).await
    }

    /// Opens the reply queue where there is to be one, before anything is sent: a reply to a queue that
    /// does not exist is dropped. Tasks do not wait for results, so within them there is none.
    async fn reply_to(&self) -> Result<&str, ReadError> {
        let reply_to = match (self.shared.results.access(), &self.parent) {
            (ResultAccess::Replies, None) => self.reader().await?.reply_to(),
            _ => None,
        };
        Ok(reply_to.unwrap_or(&self.shared.oid))
    }

    fn call<'a>(&'a self, reply_to: &'a str) -> Call<'a> {
        Call {
            parent_id: None,
            root_id: None,
            role: "",
            reply_to,
            origin: self.shared.publisher.origin(),
            now: clock::now(),
            chords: !matches!(self.shared.results.chords(), ChordSupport::None),
        }
    }

    async fn carry_out(&self, plan: Plan) -> Result<AsyncResult, SendError> {
        let result = plan.result.ok_or(SendError::Empty)?;
        let chords = self.shared.results.chords();
        let (mut children, mut waiting) = (Vec::new(), Vec::new());
        for effect in plan.effects {
            match (effect, &chords) {
                (Effect::Send(outgoing), _) => waiting.push(*outgoing),
                (Effect::Chord(header), ChordSupport::Counted(chords)) => {
                    let begin = chords.begin(&header.group_id, header.size, &header.results);
                    begin.await?;
                }
                (Effect::Chord(header), ChordSupport::Polled) => {
                    children.push(json!([[header.unlock.message.headers["id"], null], null]));
                    waiting.push(header.unlock);
                }
                (Effect::Chord(_), ChordSupport::None) => {
                    return Err(SignatureError::NoChords.into());
                }
                (Effect::ChordGrows { group_id, task_id }, ChordSupport::Counted(chords)) => {
                    chords.grow(&group_id, &task_id).await?;
                }
                (Effect::ChordGrows { .. }, _) => return Err(SignatureError::NotExtensible.into()),
            }
        }
        stream::iter(waiting)
            .map(|outgoing| self.publish(outgoing))
            .buffered(IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        if let Some(parent) = &self.parent {
            children.extend(plan.children.iter().map(ResultNode::to_json));
            parent.lock().append(&mut children);
        }
        Ok(AsyncResult::new(self.clone(), result))
    }

    async fn publish(&self, outgoing: Outgoing) -> Result<(), BrokerError> {
        let options = &self.shared.options;
        let mut publication = self.shared.publisher.publication(outgoing);
        let broker = &*self.shared.broker;
        let sending = Sending::begin(&mut publication, broker, &*options.propagation);
        let published = broker.publish(&publication, options.publish_timeout).await;
        sending.end(&published);
        if published.is_ok()
            && let Some(event) = self.shared.publisher.sent_event(&publication)
        {
            send_event(broker, &event).await;
        }
        published
    }
}

impl Parent {
    fn occasion(&self) -> String {
        let number = self.applied.fetch_add(1, Ordering::Relaxed);
        canvas::occasion(&self.message, number)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Value>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
