//! Names that a file with tasks needs.

pub use celery_protocol::canvas::{Signature, chain, chord, group};
pub use celery_protocol::exception::Exception;

pub use crate::client::Client;
pub use crate::task::{
    Ignore, Registry, Reject, Retry, Task, TaskArgs, TaskContext, TaskError, TaskOptions,
    TaskResult, When,
};
pub use crate::worker::{Worker, WorkerError};
pub use celery_worker_macros::task;
