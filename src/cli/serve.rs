//! A worker with the flags and settings of `celery worker`, for any tasks.
//!
//! [`WorkerArguments`] are the flags; [`build`] makes a worker of them and of the settings, with the tasks that
//! the caller registers; [`serve`] runs it until a signal or the remote control ends it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use celery::Celery;
use clap::Args;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::node::{host, node_name, node_path};
use super::patience::{Patience, WaitFor};
use super::pidfile::PidFile;
use super::restart::{self, End};
use super::signals::Signals;
use super::supervision::supervise;
use super::{CliError, Context};
use crate::metrics::{QueueMetrics, TaskMetrics};
use crate::settings::Settings;
use crate::sideport::{Board, Phase, Probe};
use celery_protocol::content::Accept;
use celery_worker::broker::Broker;
use celery_worker::celery_crate::app;
use celery_worker::results::{self, ResultBackend};
use celery_worker::task::Registry;
use celery_worker::worker::{Config, DefaultOptions, RateLimit, Shutdown, Worker};
use service_connection::error_chain::chain;

/// How long the answers of broker and result backend hold, for monitors that ask often.
const FRESH: Duration = Duration::from_secs(2);

/// The flags of `celery worker`. Those that mean nothing for a process without child processes and
/// without Python are taken, too, and answered with one line: start scripts need not be changed.
#[derive(Debug, Args)]
pub struct WorkerArguments {
    /// Queues to listen to.
    #[arg(short = 'Q', long, value_delimiter = ',', value_name = "QUEUE")]
    pub queues: Vec<String>,

    /// Queues not to listen to.
    #[arg(short = 'X', long, value_delimiter = ',', value_name = "QUEUE")]
    pub exclude_queues: Vec<String>,

    /// Node name; %h is the host, %n its first label, %d its domain, %i is 0, %I nothing [default: celery@%h].
    #[arg(short = 'n', long, value_name = "NODE")]
    pub hostname: Option<String>,

    /// Tasks at a time; 0 or `auto` is one for each processor.
    #[arg(short = 'c', long, value_name = "N", value_parser = places)]
    pub concurrency: Option<u16>,

    /// As -c with the larger number: places cost nothing here while they are empty.
    #[arg(long, value_name = "MAX,MIN")]
    pub autoscale: Option<String>,

    /// Deliveries held per place.
    #[arg(long, value_name = "N")]
    pub prefetch_multiplier: Option<u16>,

    /// Send the events of tasks, for monitors such as Flower.
    #[arg(short = 'E', long, visible_alias = "events")]
    pub task_events: bool,

    /// Seconds between the heartbeats that monitors see.
    #[arg(long, value_name = "SECONDS")]
    pub heartbeat_interval: Option<f64>,

    /// Seconds that a task may run.
    #[arg(long, value_name = "SECONDS")]
    pub time_limit: Option<f64>,

    /// Seconds after which a task is asked to stop.
    #[arg(long, value_name = "SECONDS")]
    pub soft_time_limit: Option<f64>,

    /// Neither greet the other workers nor listen to them.
    #[arg(long)]
    pub without_gossip: bool,

    /// Declare no queues; use what is there.
    #[arg(long)]
    pub no_declare: bool,

    /// File that holds the process id while the worker runs; in it, and in that of -f, %n is the name of the node, %h its host.
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,

    #[command(flatten)]
    pub wait_for: WaitFor,

    #[command(flatten)]
    without_effect: WithoutEffect,
}

/// Flags that are taken for the sake of start scripts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Flags of `celery worker` without an effect here")]
struct WithoutEffect {
    #[arg(short = 'A', long, value_name = "APP")]
    app: Option<String>,
    #[arg(short = 'P', long, value_name = "POOL")]
    pool: Option<String>,
    #[arg(long, value_name = "METHOD")]
    pool_start_method: Option<String>,
    #[arg(short = 'O', long, value_name = "PROFILE")]
    optimization: Option<String>,
    #[arg(short = 'I', long, value_name = "MODULES")]
    include: Option<String>,
    #[arg(short = 'S', long, value_name = "FILE")]
    statedb: Option<String>,
    #[arg(long, value_name = "N")]
    max_tasks_per_child: Option<u64>,
    #[arg(long, value_name = "KIB")]
    max_memory_per_child: Option<u64>,
    #[arg(short = 'D', long)]
    detach: bool,
    #[arg(short = 'B', long)]
    beat: bool,
    #[arg(short = 's', long, value_name = "FILE")]
    schedule_filename: Option<String>,
    #[arg(long, value_name = "CLASS")]
    scheduler: Option<String>,
    #[arg(long)]
    without_mingle: bool,
    #[arg(long)]
    without_heartbeat: bool,
    #[arg(long)]
    disable_prefetch: bool,
    #[arg(long, value_name = "FILE")]
    executable: Option<String>,
    #[arg(long, value_name = "MASK")]
    umask: Option<String>,
}

impl WithoutEffect {
    /// The flags that were given.
    fn given(&self) -> Vec<&'static str> {
        [
            (self.app.is_some(), "--app"),
            (self.pool.is_some(), "--pool"),
            (self.pool_start_method.is_some(), "--pool-start-method"),
            (self.optimization.is_some(), "--optimization"),
            (self.include.is_some(), "--include"),
            (self.statedb.is_some(), "--statedb"),
            (self.max_tasks_per_child.is_some(), "--max-tasks-per-child"),
            (
                self.max_memory_per_child.is_some(),
                "--max-memory-per-child",
            ),
            (self.detach, "--detach"),
            (self.beat, "--beat"),
            (self.schedule_filename.is_some(), "--schedule-filename"),
            (self.scheduler.is_some(), "--scheduler"),
            (self.without_mingle, "--without-mingle"),
            (self.without_heartbeat, "--without-heartbeat"),
            (self.disable_prefetch, "--disable-prefetch"),
            (self.executable.is_some(), "--executable"),
            (self.umask.is_some(), "--umask"),
        ]
        .into_iter()
        .filter_map(|(given, flag)| given.then_some(flag))
        .collect()
    }
}

/// What the tasks of a worker can be made of.
pub struct Service {
    /// All settings, with the flags in them.
    pub settings: Arc<Settings>,
    /// The worker's node name.
    pub hostname: String,
    /// The app that tasks are registered with and send messages by.
    pub app: Arc<Celery>,
    /// The connection to the broker.
    pub transport: Arc<dyn Broker>,
    /// What the process shows of itself.
    pub board: Board,
    /// What is counted of tasks.
    pub tasks: TaskMetrics,
}

impl WorkerArguments {
    /// The node's name.
    ///
    /// # Errors
    /// [`CliError::Usage`].
    pub(super) fn node_name(&self) -> Result<String, CliError> {
        node_name(self.hostname.as_deref(), &host())
    }

    /// Puts the flags into the settings, where they win.
    pub(super) fn apply(&self, context: &mut Context) -> Result<(), CliError> {
        let mut settings = (*context.settings).clone();
        let celery = &mut settings.celery;
        let autoscale = self.autoscale.as_deref().map(|text| {
            text.split(',')
                .map(|n| n.trim().parse::<u16>())
                .collect::<Result<Vec<_>, _>>()
                .map(|numbers| numbers.into_iter().max())
                .map_err(|_| CliError::Usage("--autoscale: two numbers, as in 10,3".into()))
        });
        let autoscale = autoscale.transpose()?.flatten();
        if let Some(concurrency) = autoscale.or(self.concurrency) {
            celery.worker_concurrency = concurrency;
        }
        if let Some(multiplier) = self.prefetch_multiplier {
            celery.worker_prefetch_multiplier = multiplier;
        }
        celery.worker_send_task_events |= self.task_events;
        celery.no_declare |= self.no_declare;
        let numbers = [
            (self.time_limit, &mut celery.task_time_limit),
            (self.soft_time_limit, &mut celery.task_soft_time_limit),
            (
                self.heartbeat_interval,
                &mut celery.worker_heartbeat_interval,
            ),
        ];
        for (given, setting) in numbers {
            if let Some(given) = given {
                *setting = given;
            }
        }
        settings.validate()?;
        context.settings = Arc::new(settings);
        Ok(())
    }
}

fn places(text: &str) -> Result<u16, std::num::ParseIntError> {
    match text {
        "auto" => Ok(0),
        number => number.parse(),
    }
}

/// Runs the worker that `build` makes. A signal ends it at any time: also while it waits for servers.
pub(super) async fn serve(
    context: &Context,
    arguments: &WorkerArguments,
    board: &Board,
    build: impl AsyncFnOnce(Shutdown) -> Result<Worker, CliError>,
) -> Result<End, CliError> {
    let signals = Signals::listen()?;
    let _supervision = supervise(board);
    context.tell_warnings();
    let _pidfile = match &arguments.pidfile {
        None => None,
        Some(path) => {
            let path = node_path("--pidfile", path, &arguments.node_name()?)?;
            Some(PidFile::create(&path)?)
        }
    };
    let ignored = arguments.without_effect.given();
    if !ignored.is_empty() {
        tracing::warn!(flags = ?ignored, "flags of celery worker that do nothing here");
    }
    let shutdown = Shutdown::default();
    let working = async {
        let worker = tokio::select! {
            worker = build(shutdown.clone()) => worker?,
            () = shutdown.requested() => return Ok(()),
        };
        let mut served = worker.served();
        // Not on the main thread, which would have to be woken for each message.
        let mut working = AbortOnDropHandle::new(tokio::spawn(worker.run()));
        // Dropped at once: what it answers with is a lock that the worker would wait for.
        let is_served = async { served.wait_for(|served| *served).await.map(drop) };
        let ended = tokio::select! {
            ended = &mut working => Some(ended),
            Ok(()) = is_served => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                board.enter(Phase::Running);
                working.await
            }
        };
        Ok(ended.map_err(|error| CliError::Failed(format!("the worker broke: {error}")))??)
    };
    let can_restart = || restart::is_possible(context);
    let (ended, end) = signals.during(board, &shutdown, can_restart, working).await;
    ended.map(|()| end)
}

/// Makes a worker for `queues`, or for those of the flags or the default one, with the tasks that
/// `register` makes.
pub(super) async fn build<R>(
    context: &Context,
    arguments: &WorkerArguments,
    board: &Board,
    shutdown: Shutdown,
    patience: Patience,
    queues: Vec<String>,
    register: impl FnOnce(Service) -> R,
) -> Result<Worker, CliError>
where
    R: Future<Output = Result<Registry, CliError>>,
{
    let settings = &context.settings;
    let celery = &settings.celery;
    let hostname = arguments.node_name()?;
    let transport = context
        .transport(&hostname)?
        .with_liveness(board.pulses.clone());
    let transport: Arc<dyn Broker> = Arc::new(transport);
    patience.reach_broker(&*transport).await?;
    let results = results::open(&celery.into(), transport.clone())
        .map_err(|e| CliError::Configuration(format!("celery.result_backend: {e}")))?;
    let app = app::build(transport.clone(), context.producing(&hostname))
        .await
        .map_err(|e| CliError::Failed(format!("cannot make the Celery app: {e}")))?;
    let app = Arc::new(app);
    let tasks = TaskMetrics::new(&hostname)?;
    board.show(&tasks.of_worker())?;
    let registry = register(Service {
        settings: settings.clone(),
        hostname: hostname.clone(),
        app: app.clone(),
        transport: transport.clone(),
        board: board.clone(),
        tasks: tasks.clone(),
    })
    .await?;

    let queues = selected(queues, arguments, &celery.task_default_queue);
    let config = Config {
        gossip: !arguments.without_gossip,
        ..config(settings, hostname, queues)
    };
    watch_backend(board, &results);
    watch_queues(board, &transport, config.queues.clone())?;
    let worker = Worker::new(registry, transport, results, config, shutdown)
        .with_observer(Arc::new(tasks))
        .with_liveness(board.pulses.clone());
    watch_broker(board, worker.served());
    Ok(worker)
}

/// The worker is ready while the broker serves all of its queues.
fn watch_broker(board: &Board, served: watch::Receiver<bool>) {
    board.ready_if(Probe::new("broker", Duration::ZERO, move || {
        let is_served = *served.borrow();
        async move {
            match is_served {
                true => Ok(()),
                false => {
                    Err("not connected, or not all queues can be consumed; the log says why".into())
                }
            }
        }
    }));
}

/// The worker is ready while its results can be stored.
fn watch_backend(board: &Board, results: &Arc<dyn ResultBackend>) {
    let results = results.clone();
    board.ready_if(Probe::new("result backend", FRESH, move || {
        let results = results.clone();
        async move { results.answers().await.map_err(|e| chain(&e).to_string()) }
    }));
}

/// The depth of the queues is shown.
fn watch_queues(
    board: &Board,
    transport: &Arc<dyn Broker>,
    queues: Vec<String>,
) -> Result<(), CliError> {
    let depths = QueueMetrics::new()?;
    board.show(&depths.all())?;
    let (transport, queues) = (transport.clone(), Arc::new(queues));
    board.ask_before_scrape(Probe::new("broker", FRESH, move || {
        let (transport, queues, depths) = (transport.clone(), queues.clone(), depths.clone());
        async move {
            let found = transport.survey(&queues).await;
            let found = found.map_err(|error| chain(&error).to_string())?;
            depths.set(found.iter().map(|q| (&*q.queue, q.messages, q.consumers)));
            Ok(())
        }
    }));
    Ok(())
}

fn selected(mut queues: Vec<String>, arguments: &WorkerArguments, default: &str) -> Vec<String> {
    queues.extend(arguments.queues.iter().cloned());
    if queues.is_empty() {
        queues.push(default.to_owned());
    }
    queues.retain(|queue| !arguments.exclude_queues.contains(queue));
    queues.sort_unstable();
    queues.dedup();
    queues
}

/// The largest thing a float of seconds can be; checked settings never come near it.
fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or(Duration::MAX)
}

fn config(settings: &Settings, hostname: String, queues: Vec<String>) -> Config {
    let celery = &settings.celery;
    let limit = |seconds: f64| (seconds > 0.0).then_some(seconds);
    let rate_limit = celery.task_default_rate_limit.parse::<RateLimit>().ok();
    Config {
        hostname,
        queues,
        task_queues: celery.task_queue_declarations(),
        default_queue: celery.task_default_queue.clone(),
        chord_join_timeout: seconds(celery.result_chord_join_timeout),
        chord_retry_interval: seconds(celery.result_chord_retry_interval),
        concurrency: celery.concurrency(),
        prefetch_multiplier: celery.worker_prefetch_multiplier,
        accept: Accept::new(&celery.accept_content, celery.max_body_bytes),
        tasks: DefaultOptions {
            acks_late: celery.task_acks_late,
            acks_on_failure: celery.task_acks_on_failure,
            acks_on_timeout: celery.task_acks_on_timeout,
            ignore_result: celery.task_ignore_result,
            store_errors_even_if_ignored: celery.task_store_errors_even_if_ignored,
            track_started: celery.task_track_started,
            time_limit: limit(celery.task_time_limit),
            soft_time_limit: limit(celery.task_soft_time_limit),
            rate_limit,
        },
        rate_limits: !celery.worker_disable_rate_limits,
        result_extended: celery.result_extended,
        deduplicate: celery.worker_deduplicate_successful_tasks,
        eta_hold: celery.worker_eta_hold,
        eta_task_limit: celery.worker_eta_task_limit,
        warm_shutdown: Some(settings.transfer.shutdown_timeout).filter(|limit| !limit.is_zero()),
        soft_shutdown: seconds(celery.worker_soft_shutdown_timeout),
        heartbeat_interval: seconds(celery.worker_heartbeat_interval),
        task_events: celery.worker_send_task_events,
        remote_control: celery.worker_enable_remote_control,
        control_allowed: celery.worker_remote_control_allowed.clone(),
        settings: celery.shown(),
        gossip: true,
        propagation: traces::propagation(),
    }
}
