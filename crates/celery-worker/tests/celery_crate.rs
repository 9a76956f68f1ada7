//! A function with the `celery` crate's own macro in this crate's worker.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    non_local_definitions,
    reason = "the macro of the celery crate makes them"
)]

use std::sync::Arc;
use std::time::Duration;

use celery::error::TaskError;
use celery::task::TaskResult;
use celery_protocol::canvas::Signature;
use celery_protocol::exception::Exception;
use celery_worker::broker::{self, NoPropagation, TaskQueues};
use celery_worker::celery_crate::{CeleryTask, app};
use celery_worker::client::{Client, GetError};
use celery_worker::results::{self, ResultOptions};
use celery_worker::task::{Registry, TaskContext};
use celery_worker::worker::{Config, Shutdown, Worker};

const URL: &str = "memory://celery-crate";
const LIMIT: Duration = Duration::from_secs(20);

#[celery::task]
async fn divide(x: i64, y: i64) -> TaskResult<i64> {
    let cx = TaskContext::current().ok_or(TaskError::ExpectedError("no worker".into()))?;
    let division = x.checked_div(y);
    division.ok_or_else(|| cx.raise(Exception::builtin("ZeroDivisionError", "division by zero")))
}

#[tokio::test]
async fn a_function_of_the_celery_crate_runs_in_the_worker() {
    let broker = broker::open(URL, "worker").unwrap();
    let producing = app::Producing {
        hostname: "celery@test".into(),
        default_queue: "celery".into(),
        names: Default::default(),
        queues: TaskQueues::default(),
        reply_to: None,
        within: Duration::from_secs(1),
        propagation: Arc::new(NoPropagation),
    };
    let app = Arc::new(app::build(broker.clone(), producing).await.unwrap());
    let mut registry = Registry::default();
    registry
        .register_celery(&app, CeleryTask::<divide>::new())
        .await
        .unwrap();
    let results = results::open(&ResultOptions::new(URL), broker.clone()).unwrap();
    let config = Config::new("celery@test", vec!["celery".into()]);
    let shutdown = Shutdown::default();
    let worker = Worker::new(registry, broker, results, config, shutdown.clone());
    let running = tokio::spawn(worker.run());

    let client = Client::builder(URL).results(URL).build().await.unwrap();
    let call = async |args: Vec<i64>| {
        let signature = args
            .into_iter()
            .fold(Signature::new("divide"), Signature::arg);
        let sent = client.send(signature).await.unwrap();
        match sent.get::<i64>(LIMIT).await {
            Err(GetError::Failed { exception, .. }) => Err(exception.headline()),
            other => Ok(other.unwrap()),
        }
    };
    assert_eq!(call(vec![42, 6]).await, Ok(7));
    assert_eq!(
        call(vec![42, 0]).await,
        Err("ZeroDivisionError: division by zero".to_owned())
    );
    assert_eq!(
        call(vec![42]).await,
        Err("TypeError: divide() missing 1 required positional argument: 'y'".to_owned())
    );
    assert_eq!(
        call(vec![]).await,
        Err("TypeError: divide() missing 1 required positional argument: 'x'".to_owned())
    );
    shutdown.warm();
    running.await.unwrap().unwrap();
}
