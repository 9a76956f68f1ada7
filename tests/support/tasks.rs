//! Tasks that have nothing to do with transfers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use celery::error::TaskError;
use celery::task::{Request, Task, TaskOptions, TaskResult};
use celery_protocol::arguments::{Parameter, Signature};
use celery_worker::worker::{Attributes, Control, Failure, WorkerTask};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Counts runs, and holds tasks that wait.
#[derive(Default)]
pub struct Probe {
    pub started: AtomicUsize,
    pub finished: AtomicUsize,
    pub failures_heard: AtomicUsize,
    pub gate: tokio::sync::Notify,
}

impl Probe {
    pub fn started(&self) -> usize {
        self.started.load(Ordering::SeqCst)
    }
    pub fn finished(&self) -> usize {
        self.finished.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Serialize, Deserialize)]
pub struct Params {
    pub what: String,
    #[serde(default)]
    pub value: Value,
}

/// `do(what, value=None)`: `echo` returns the value, `fail` fails, `panic` panics, `wait` waits for
/// the gate or for being stopped.
pub struct Do {
    request: Request<Self>,
    options: TaskOptions,
    context: Option<(Arc<Probe>, Control)>,
}

#[async_trait]
impl Task for Do {
    const NAME: &'static str = "tests.do";
    const ARGS: &'static [&'static str] = &["what", "value"];
    type Params = Params;
    type Returns = Value;

    fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
        Self {
            request,
            options,
            context: None,
        }
    }
    fn request(&self) -> &Request<Self> {
        &self.request
    }
    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, params: Params) -> TaskResult<Value> {
        let (probe, control) = self.context.as_ref().expect("prepared");
        probe.started.fetch_add(1, Ordering::SeqCst);
        let result = match params.what.as_str() {
            "echo" => Ok(params.value),
            "fail" => Err(TaskError::ExpectedError("as asked".into())),
            "panic" => panic!("as asked"),
            "wait" => tokio::select! {
                () = probe.gate.notified() => Ok(Value::from("opened")),
                () = control.cancelled.cancelled() => {
                    // Stopping takes a moment, as with a real child process.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    return Err(TaskError::UnexpectedError("stopped".into()));
                }
            },
            other => Err(TaskError::UnexpectedError(other.into())),
        };
        probe.finished.fetch_add(1, Ordering::SeqCst);
        result
    }

    async fn on_failure(&self, _error: &TaskError) {
        if let Some((probe, _)) = &self.context {
            probe.failures_heard.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl WorkerTask for Do {
    const SIGNATURE: Signature = Signature {
        function: "do",
        parameters: &[
            Parameter {
                name: "what",
                required: true,
            },
            Parameter {
                name: "value",
                required: false,
            },
        ],
        bound: false,
    };
    const ATTRIBUTES: Attributes = Attributes {
        acks_late: Some(true),
        stops_itself: true,
        ..Attributes::NONE
    };
    type Context = Arc<Probe>;

    fn prepare(mut self, context: Arc<Probe>, control: Control) -> Self {
        self.context = Some((context, control));
        self
    }

    fn judge(&self, error: &TaskError) -> Failure {
        match error {
            TaskError::UnexpectedError(text) if text == "stopped" => Failure::Interrupted,
            error => Failure::Raised(celery_protocol::exception::Exception::new(
                "builtins",
                "ValueError",
                match error {
                    TaskError::ExpectedError(text) | TaskError::UnexpectedError(text) => {
                        text.as_str()
                    }
                    _ => "?",
                },
            )),
        }
    }
}
