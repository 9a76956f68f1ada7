//! Tasks and apps of the [`celery`] crate.
//!
//! A type that implements [`celery::task::Task`], for example a function with `#[celery::task]`, runs in this crate's
//! worker: see [`CeleryTask`]. The trait supports neither typed exceptions nor cancellation nor state; the task finds
//! them in [`TaskContext::current`]. [`app`] creates a [`celery::Celery`] that publishes through any
//! [`Broker`](crate::broker::Broker).

pub mod app;
mod params;

use std::any::Any;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use celery::Celery;
use celery::error::{CeleryError, TaskError as CrateError};
use celery::protocol::{MessageHeaders, MessageProperties};
use celery::task::{Request, Task as CrateTask, TaskOptions as CrateOptions};
use celery_protocol::arguments::{FunctionSignature, Parameter};
use celery_protocol::exception::Exception;
use celery_protocol::message::TaskMessage;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Serialize;
use service_connection::error_chain::panic_text;

use self::params::ParamsError;
use crate::task::{
    Arguments, Autoretry, Discarded, DuplicateTask, Failure, Outcome, RaisedSlot, RegisteredTask,
    Registry, Retry, Run, TaskContext, TaskError, TaskOptions, When, arguments, returned_value,
    unless_stopped,
};

type DiscardHook = Arc<dyn Fn(Arc<TaskMessage>, Discarded) -> BoxFuture<'static, ()> + Send + Sync>;

/// Registration of a type of the `celery` crate.
///
/// Without [`CeleryTask::signature`] every parameter counts as required, unless its type accepts a missing value.
pub struct CeleryTask<T> {
    names: Vec<String>,
    signature: Option<FunctionSignature>,
    options: TaskOptions,
    state: Option<Arc<dyn Any + Send + Sync>>,
    discard: DiscardHook,
    task: PhantomData<fn() -> T>,
}

impl<T: CrateTask<Returns: Serialize> + 'static> Default for CeleryTask<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: CrateTask<Returns: Serialize> + 'static> CeleryTask<T> {
    /// Creates a registration under the type's own name.
    #[must_use]
    pub fn new() -> Self {
        Self {
            names: vec![T::NAME.to_owned()],
            signature: None,
            options: TaskOptions::DEFAULT,
            state: None,
            discard: Arc::new(|_, _| async {}.boxed()),
            task: PhantomData,
        }
    }

    /// Sets other names for the task.
    #[must_use]
    pub fn names(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.names = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the signature of the Python function with this name, for CPython's texts of `TypeError`.
    #[must_use]
    pub fn signature(mut self, signature: FunctionSignature) -> Self {
        self.signature = Some(signature);
        self
    }

    /// Sets options; an option that is `None` is taken from the type's `DEFAULTS`.
    #[must_use]
    pub fn options(mut self, options: TaskOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets the value of [`TaskContext::state`].
    #[must_use]
    pub fn state<S: Send + Sync + 'static>(mut self, state: Arc<S>) -> Self {
        self.state = Some(state);
        self
    }

    /// Sets the action for a message that is settled without a run, see [`Task::discard`](crate::task::Task::discard).
    #[must_use]
    pub fn on_discard<F>(
        mut self,
        hook: impl Fn(Arc<TaskMessage>, Discarded) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.discard = Arc::new(move |message, reason| hook(message, reason).boxed());
        self
    }
}

/// Error of the registration of a type of the `celery` crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// The worker has a task of this name already.
    #[error(transparent)]
    Duplicate(#[from] DuplicateTask),
    /// The app of the `celery` crate rejects the type.
    #[error("the celery crate's app does not accept the task")]
    App(#[from] CeleryError),
}

impl Registry {
    /// Registers a type of the `celery` crate, in this worker and with the crate's app, whose options apply to it.
    ///
    /// # Errors
    /// [`RegistrationError`]
    pub async fn register_celery<T: CrateTask<Returns: Serialize> + 'static>(
        &mut self,
        app: &Arc<Celery>,
        task: CeleryTask<T>,
    ) -> Result<(), RegistrationError> {
        app.register_task::<T>().await?;
        let options = completed(task.options, &T::DEFAULTS);
        let signature = task.signature.unwrap_or_else(inferred::<T>);
        let function = signature.function.clone();
        let parameters = signature.parameters.clone();
        let adapter = Arc::new(Adapter {
            app: app.clone(),
            signature,
            cooperative: options.cooperative,
            state: task.state,
        });
        let run: Run = Arc::new(move |cx| run::<T>(adapter.clone(), cx).boxed());
        let registered = RegisteredTask {
            function,
            parameters,
            autoretry: Autoretry::new(&options),
            options,
            run,
            discard: task.discard,
        };
        Ok(self.enter(task.names, &registered)?)
    }
}

impl TaskContext {
    /// Keeps the failure of a task of the `celery` crate for the worker, and returns an error of that crate for the task
    /// to return: `return Err(cx.raise(Exception::value_error("empty")))`. The first failure of a run is kept, so that
    /// `on_failure` can give a class to those that have none.
    pub fn raise(&self, error: impl Into<TaskError>) -> CrateError {
        let error = error.into();
        let text = match &error {
            TaskError::Raised(exception) => exception.text(),
            other => format!("{other:?}"),
        };
        if let Some(slot) = &self.raised {
            slot.lock().get_or_insert(error);
        }
        CrateError::UnexpectedError(text)
    }
}

struct Adapter {
    app: Arc<Celery>,
    signature: FunctionSignature,
    cooperative: bool,
    state: Option<Arc<dyn Any + Send + Sync>>,
}

async fn run<T: CrateTask<Returns: Serialize> + 'static>(
    adapter: Arc<Adapter>,
    cx: TaskContext,
) -> Outcome {
    let message = cx.request().clone();
    let mut missing = None;
    let convert = |bound: Arguments<'_>| {
        params::from_named::<T::Params>(bound.into_named()).map_err(|error| match error {
            ParamsError::Missing(name) => {
                missing = Some(name);
                serde::de::Error::missing_field(name)
            }
            ParamsError::Type(error) => error,
        })
    };
    let params = match arguments(&adapter.signature, &message, convert) {
        Ok(params) => params,
        Err(exception) => {
            // CPython's text, for a required parameter that the inferred signature lists as optional.
            let exception = missing.map_or(exception, |name| {
                Exception::type_error(adapter.signature.missing(&[name], "positional"))
            });
            return Err(Failure::WrongArguments(exception));
        }
    };
    let stop = (!adapter.cooperative).then(|| cx.cancelled().clone());
    let raised = RaisedSlot::default();
    let cx = TaskContext {
        state: adapter.state.clone(),
        raised: Some(raised.clone()),
        ..cx
    };
    let options = merged(T::DEFAULTS, &adapter.app.task_options);
    let request = Request::new(adapter.app.clone(), crate_message(&message), params.clone());
    let task = T::from_request(request, options);

    let run = cx.clone().scope(task.run(params));
    let running = AssertUnwindSafe(run).catch_unwind();
    let Some(result) = unless_stopped(stop, running).await else {
        return Err(TaskError::Stopped.into());
    };
    // A panic is a failure like any other, and calls the task's `on_failure`, too.
    let result = result.unwrap_or_else(|panic| {
        let text = format!("task panicked: {}", panic_text(&*panic));
        Err(CrateError::UnexpectedError(text))
    });
    match result {
        Ok(returned) => {
            task.on_success(&returned).await;
            Ok(returned_value(&returned)?)
        }
        Err(error) => {
            cx.scope(task.on_failure(&error)).await;
            let kept = raised.lock().take();
            Err(kept.unwrap_or_else(|| failure(&error)).into())
        }
    }
}

/// The failure for an error of the crate that was not passed to [`TaskContext::raise`].
fn failure(error: &CrateError) -> TaskError {
    match error {
        CrateError::Retry(eta) => TaskError::Retry(Box::new(Retry {
            when: eta.map(When::At),
            ..Retry::default()
        })),
        CrateError::ExpectedError(text) | CrateError::UnexpectedError(text) => {
            TaskError::Raised(Exception::runtime_error(text))
        }
        other => TaskError::Raised(Exception::runtime_error(other.to_string())),
    }
}

/// A signature from the parameter names of the crate's trait.
fn inferred<T: CrateTask>() -> FunctionSignature {
    // Only the type's `Deserialize` implementation knows which parameters may be missing.
    let parameters = T::ARGS.iter().map(|name| Parameter::optional(name));
    FunctionSignature {
        function: Cow::Borrowed(T::NAME.rsplit('.').next().unwrap_or(T::NAME)),
        parameters: parameters.collect(),
        bound: false,
    }
}

/// Options, completed by those of the crate.
fn completed(options: TaskOptions, crates: &CrateOptions) -> TaskOptions {
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    TaskOptions {
        acks_late: options.acks_late.or(crates.acks_late),
        time_limit: options.time_limit.or(crates.hard_time_limit.map(seconds)),
        soft_time_limit: options.soft_time_limit.or(crates.time_limit.map(seconds)),
        max_retries: options.max_retries.or(crates.max_retries),
        default_retry_delay: options
            .default_retry_delay
            .or(crates.min_retry_delay.map(seconds)),
        ..options
    }
}

/// A task's own options, completed by the app's.
fn merged(own: CrateOptions, app: &CrateOptions) -> CrateOptions {
    CrateOptions {
        time_limit: own.time_limit.or(app.time_limit),
        hard_time_limit: own.hard_time_limit.or(app.hard_time_limit),
        max_retries: own.max_retries.or(app.max_retries),
        min_retry_delay: own.min_retry_delay.or(app.min_retry_delay),
        max_retry_delay: own.max_retry_delay.or(app.max_retry_delay),
        retry_for_unexpected: own.retry_for_unexpected.or(app.retry_for_unexpected),
        acks_late: own.acks_late.or(app.acks_late),
        content_type: own.content_type.or(app.content_type),
    }
}

/// The message in the crate's own type, which [`Request::new`] reads. It contains no body, because the arguments are
/// bound already.
fn crate_message(message: &TaskMessage) -> celery::protocol::Message {
    celery::protocol::Message {
        properties: MessageProperties {
            correlation_id: message.correlation_id.clone(),
            content_type: celery_protocol::message::JSON.into(),
            content_encoding: "utf-8".into(),
            reply_to: message.reply_to.clone(),
        },
        headers: MessageHeaders {
            id: message.id.clone(),
            task: message.task.clone(),
            lang: None,
            root_id: message.root_id.clone(),
            parent_id: message.parent_id.clone(),
            group: message.group.clone(),
            meth: None,
            shadow: message.shadow.clone(),
            eta: message.eta,
            expires: message.expires,
            retries: Some(message.retries),
            timelimit: (
                whole_seconds(message.time_limit.0),
                whole_seconds(message.time_limit.1),
            ),
            argsrepr: message.argsrepr.clone(),
            kwargsrepr: message.kwargsrepr.clone(),
            origin: message.origin.clone(),
        },
        raw_body: Vec::new(),
    }
}

/// The crate's time limits are whole seconds; a fraction is rounded up.
fn whole_seconds(limit: Option<f64>) -> Option<u32> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "casts saturate"
    )]
    limit.map(|seconds| seconds.ceil() as u32)
}
