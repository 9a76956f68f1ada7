//! Results of tasks that were sent.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;
use tokio::time::Instant;

use super::{Client, IfRunning};
use crate::broker::BrokerError;
use crate::results::ReadError;
use celery_protocol::canvas::ResultNode;
use celery_protocol::exception::Exception;
use celery_protocol::result::FinalState;

/// State of an unknown task; Celery's word for a task that waits, and for an unknown
/// id.
const PENDING: &str = "PENDING";

/// Reason why a task has no value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// The task raised an exception, or was revoked.
    #[error("task {task_id} failed: {}", .exception.headline())]
    Failed {
        /// The task.
        task_id: String,
        /// The Python exception.
        exception: Box<Exception>,
        /// Text of the traceback.
        traceback: Option<String>,
    },
    /// There is no result yet; the task may still run.
    #[error("task {task_id} has no result within {}", humantime::format_duration(*.waited))]
    Timeout {
        /// The task.
        task_id: String,
        /// The time limit.
        waited: Duration,
    },
    /// The task returned a value of another type.
    #[error("task {task_id} returned a value of another type than expected")]
    Type {
        /// The task, or the group.
        task_id: String,
        /// The difference.
        source: serde_json::Error,
    },
    /// The result cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Handle to the result of a task, or of a group of tasks.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// # use std::time::Duration;
/// # use celery_protocol::{canvas::Signature, exception::Exception, result::State};
/// # use celery_worker::{broker::memory::MemoryBroker, results::memory::MemoryResults};
/// # use celery_worker::client::{Client, ClientOptions, GetError};
/// # let results = MemoryResults::new();
/// # let client = Client::new(MemoryBroker::new(), results.clone(), ClientOptions::default());
/// let result = client.send(Signature::new("tasks.divide").args((1, 0))).await?;
/// # let exception = Exception::new("builtins", "ZeroDivisionError", "division by zero");
/// # results.set(result.id(), State::Failure { exception, traceback: None });
/// match result.get::<f64>(Duration::from_secs(10)).await {
///     Err(GetError::Failed { exception, .. }) => assert_eq!(exception.exc_type, "ZeroDivisionError"),
///     other => panic!("{other:?}"),
/// }
/// # Ok::<(), celery_worker::client::SendError>(())
/// # }).unwrap();
/// ```
#[derive(Clone)]
pub struct AsyncResult {
    client: Client,
    node: ResultNode,
}

impl AsyncResult {
    pub(super) fn new(client: Client, node: ResultNode) -> Self {
        Self { client, node }
    }

    /// Id of the task, or of the group.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.node.id
    }

    /// Waits for the value; of a group, for the list of its tasks' values.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use std::time::Duration;
    /// # use celery_protocol::{canvas::{Signature, group}, result::State};
    /// # use celery_worker::{broker::memory::MemoryBroker, results::memory::MemoryResults};
    /// # use celery_worker::client::{Client, ClientOptions};
    /// # let results = MemoryResults::new();
    /// # let client = Client::new(MemoryBroker::new(), results.clone(), ClientOptions::default());
    /// let squares = group((1..4).map(|x| Signature::new("tasks.square").arg(x)));
    /// let squares = client.send(squares).await?;
    /// # for (x, square) in (1..4).zip(squares.members()) {
    /// #     results.set(square.id(), State::Success((x * x).into()));
    /// # }
    /// let squares: Vec<i64> = squares.get(Duration::from_secs(10)).await?;
    /// assert_eq!(squares, [1, 4, 9]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`GetError`]; of a group, that of the first task that failed.
    pub async fn get<T: DeserializeOwned>(&self, within: Duration) -> Result<T, GetError> {
        let until = Instant::now() + within;
        let reader = self.client.reader().await?;
        let mut metas = HashMap::new();
        for task_id in self.node.task_ids() {
            let left = until.saturating_duration_since(Instant::now());
            let meta = reader
                .wait(task_id, left)
                .await
                .map_err(|error| match error {
                    ReadError::Timeout(_) => GetError::Timeout {
                        task_id: task_id.to_owned(),
                        waited: within,
                    },
                    error => error.into(),
                })?;
            metas.insert(task_id, returned(task_id, meta)?);
        }
        let mut value = |id: &str| Ok::<_, GetError>(metas.remove(id).unwrap_or_default());
        let value = self.node.collect(&mut value)?;
        serde_json::from_value(value).map_err(|source| GetError::Type {
            task_id: self.node.id.clone(),
            source,
        })
    }

    /// The state by Celery's name: `PENDING` (also for an unknown id), `STARTED`, `RETRY`, `SUCCESS`,
    /// `FAILURE`, `REVOKED` or a state of the task's own. A group has failed as soon as one of its
    /// tasks has, and is `PENDING` until all have succeeded.
    ///
    /// # Errors
    /// The result backend cannot be read.
    pub async fn state(&self) -> Result<String, ReadError> {
        let reader = self.client.reader().await?;
        let mut states = Vec::new();
        for task_id in self.node.task_ids() {
            let meta = reader.latest(task_id).await?.unwrap_or_default();
            states.push(meta["status"].as_str().unwrap_or(PENDING).to_owned());
        }
        if self.node.members.is_none() {
            return Ok(states.pop().unwrap_or_default());
        }
        let ends = states.iter().map(|state| FinalState::from_name(state));
        let failed = ends.clone().flatten().find(|state| state.has_failed());
        let end = failed.or_else(|| {
            let has_succeeded = ends.clone().all(|end| end == Some(FinalState::Success));
            has_succeeded.then_some(FinalState::Success)
        });
        Ok(end.map_or(PENDING, FinalState::name).to_owned())
    }

    /// Everything that is stored of the task: state, result, traceback, children, with
    /// `result_extended` also name and arguments. In a state before the end, `result` is what the task
    /// reported of its progress.
    ///
    /// # Errors
    /// The result backend cannot be read.
    pub async fn info(&self) -> Result<Option<Value>, ReadError> {
        self.client.reader().await?.latest(&self.node.id).await
    }

    /// Results of the tasks that this one has sent, as far as they are stored; of a group, its
    /// members.
    ///
    /// # Errors
    /// The result backend cannot be read.
    pub async fn children(&self) -> Result<Vec<Self>, ReadError> {
        if self.node.members.is_some() {
            return Ok(self.members());
        }
        let info = self.info().await?.unwrap_or_default();
        let children = info["children"].as_array();
        let nodes = children.into_iter().flatten().filter_map(ResultNode::parse);
        Ok(nodes
            .map(|node| Self::new(self.client.clone(), node))
            .collect())
    }

    /// Results of the tasks of a group; empty for a task.
    #[must_use]
    pub fn members(&self) -> Vec<Self> {
        let members = self.node.members.iter().flatten();
        let members = members.map(|node| Self::new(self.client.clone(), node.clone()));
        members.collect()
    }

    /// The result before this one: of the step before in a chain, of the header of a chord.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let parent = self.node.parent.as_deref()?;
        Some(Self::new(self.client.clone(), parent.clone()))
    }

    /// Asks all workers to not run the task, or the tasks of the group. Does not wait until that is done.
    ///
    /// # Errors
    /// The broker did not take the request.
    pub async fn revoke(&self, if_running: IfRunning) -> Result<(), BrokerError> {
        self.client.revoke(&self.node.task_ids(), if_running).await
    }

    /// Deletes the result, or the results of the group, from the backend.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// # use celery_protocol::result::State;
    /// # use celery_worker::{broker::memory::MemoryBroker, results::memory::MemoryResults};
    /// # use celery_worker::client::{Client, ClientOptions};
    /// # let results = MemoryResults::new();
    /// # let client = Client::new(MemoryBroker::new(), results.clone(), ClientOptions::default());
    /// results.set("an-id", State::Success(5.into()));
    /// let result = client.result("an-id");
    /// assert_eq!(result.state().await?, "SUCCESS");
    /// result.forget().await?;
    /// assert_eq!(result.state().await?, "PENDING");
    /// # Ok::<(), celery_worker::results::ReadError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The result backend cannot be reached.
    pub async fn forget(&self) -> Result<(), ReadError> {
        let reader = self.client.reader().await?;
        for task_id in self.node.task_ids() {
            reader.forget(task_id).await?;
        }
        Ok(())
    }
}

impl Serialize for AsyncResult {
    /// As Celery writes the result of a task that returns an `AsyncResult`: `as_tuple()`, a tree of ids.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.node.to_json().serialize(serializer)
    }
}

impl fmt::Debug for AsyncResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AsyncResult").field(&self.node).finish()
    }
}

/// The value of a final state.
fn returned(task_id: &str, mut meta: Value) -> Result<Value, GetError> {
    let result = meta["result"].take();
    if FinalState::of(&meta) == Some(FinalState::Success) {
        return Ok(result);
    }
    let exception = serde_json::from_value(result).unwrap_or_else(|_| Exception::none());
    Err(GetError::Failed {
        task_id: task_id.to_owned(),
        exception: Box::new(exception),
        traceback: meta["traceback"].as_str().map(str::to_owned),
    })
}
