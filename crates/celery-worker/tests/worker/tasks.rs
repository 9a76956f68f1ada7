//! Tasks without transfers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use celery::error::TaskError as CrateError;
use celery::task::{Request, Task, TaskOptions, TaskResult as CrateResult};
use celery_protocol::exception::Exception;
use celery_worker::celery_crate::CeleryTask;
use celery_worker::task::{
    FunctionSignature, Parameter, TaskContext, TaskError, TaskOptions as WorkerOptions,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Counts runs, and blocks tasks that wait.
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

/// `do(what, value=None)`: `echo` returns the value, `fail` fails, `panic` panics, `wait` waits until it is released or
/// stopped.
pub struct Do {
    request: Request<Self>,
    options: TaskOptions,
}

impl Do {
    pub fn registration(probe: &Arc<Probe>) -> CeleryTask<Self> {
        CeleryTask::new()
            .signature(FunctionSignature {
                function: "do".into(),
                parameters: vec![Parameter::required("what"), Parameter::optional("value")].into(),
                bound: false,
            })
            .options(WorkerOptions::DEFAULT.acks_late(true).cooperative(true))
            .state(probe.clone())
    }
}

#[async_trait]
impl Task for Do {
    const NAME: &'static str = "tests.do";
    const ARGS: &'static [&'static str] = &["what", "value"];
    type Params = Params;
    type Returns = Value;

    fn from_request(request: Request<Self>, options: TaskOptions) -> Self {
        Self { request, options }
    }
    fn request(&self) -> &Request<Self> {
        &self.request
    }
    fn options(&self) -> &TaskOptions {
        &self.options
    }

    async fn run(&self, params: Params) -> CrateResult<Value> {
        let cx = TaskContext::current().expect("in a worker");
        let probe = cx.state::<Probe>().expect("registered with it");
        let value_error = |text: &str| cx.raise(Exception::value_error(text));
        probe.started.fetch_add(1, Ordering::SeqCst);
        let result = match params.what.as_str() {
            "echo" => Ok(params.value),
            "fail" => Err(value_error("as asked")),
            "panic" => panic!("as asked"),
            "wait" => tokio::select! {
                () = probe.gate.notified() => Ok(Value::from("opened")),
                () = cx.cancelled().cancelled() => {
                    // Stopping takes a moment, as with a real child process.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    return Err(cx.raise(TaskError::Stopped));
                }
            },
            other => Err(value_error(other)),
        };
        probe.finished.fetch_add(1, Ordering::SeqCst);
        result
    }

    async fn on_failure(&self, _error: &CrateError) {
        let probe = TaskContext::current().and_then(|cx| cx.state::<Probe>());
        probe
            .expect("registered with it")
            .failures_heard
            .fetch_add(1, Ordering::SeqCst);
    }
}
