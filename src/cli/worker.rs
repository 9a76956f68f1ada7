//! `worker`: receives transfers from queues and runs them.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{CliError, Context, output, table};
use crate::heartbeats::Heartbeats;
use crate::manager::{Manager, max_sweep_duration, sweep_loop};
use crate::metrics::TransferMetrics;
use crate::notify::Notifier;
use crate::signs_of_life::SignsOfLife;
use crate::tasks::{self, DataTransferTask, Messages, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::{ProgramKind, Repository};
use crate::transfer::routing::queue_name;
use crate::transfer::service::TransferService;
use celery_worker::celery_crate::app;
use celery_worker::task::Registry;
use celery_worker_cli::{WorkerArguments, WorkerOptions, WorkerParts};

#[derive(Debug, Args)]
pub(super) struct WorkerCommand {
    /// Listen to the queues of all locations of these sites, by short name.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    #[command(flatten)]
    pub(super) worker: WorkerArguments,
}

pub(super) async fn run(
    context: &Context,
    arguments: &WorkerCommand,
) -> Result<ExitCode, CliError> {
    let process = &context.process;
    let worker = &arguments.worker;
    let (health, _server) = super::web::side_port(context).await?;
    let (mut alive, mut signs) = (None, None);
    let notifier = Notifier::start(&context.settings.notifications);
    let build = async |shutdown| {
        let deadline = worker.wait_for.deadline();
        let repository = deadline
            .retry_until_reachable("the database", async || context.repository().await)
            .await?;
        table::watch(&health, &repository)?;
        let shutdown_timeout = context.settings.transfer.shutdown_timeout;
        let options = WorkerOptions {
            queues: queues(context, &repository, &arguments.site).await?,
            warm_shutdown: Some(shutdown_timeout).filter(|limit| !limit.is_zero()),
            deadline,
        };
        let heartbeats = context.heartbeats()?;
        alive = heartbeats.service(&context.settings.health.worker_name);
        let owner = Owner::current(worker.node_name()?);
        signs = SignsOfLife::start(&repository, owner, ProgramKind::Worker);
        let register =
            async |parts| register(context, parts, repository, notifier.clone(), heartbeats).await;
        process
            .build_worker(worker, &health, options, shutdown, register)
            .await
    };
    let end = process.run_worker(worker, &health, build).await;
    notifier.close().await;
    if let Some(alive) = alive {
        alive.end().await;
    }
    if let Some(signs) = signs {
        signs.end().await;
    }
    Ok(end?.conclude(process)?)
}

/// Registers the tasks, and starts the regular sweep of expired leases.
async fn register(
    context: &Context,
    parts: WorkerParts,
    repository: Repository,
    notifier: Notifier,
    heartbeats: Heartbeats,
) -> Result<Registry, CliError> {
    let WorkerParts {
        hostname,
        settings: _,
        broker,
        health,
        tasks: counted,
    } = parts;
    let settings = context.settings.clone();
    let celery = settings.celery.clone();
    let app = app::build(broker.clone(), context.producing(&hostname))
        .await
        .map_err(|e| CliError::failed(format!("cannot make the Celery app: {e}")))?;
    let app = Arc::new(app);
    let owner = Owner::current(hostname.as_str());
    let copies = TransferMetrics::new()?;
    health.register(&copies.all())?;
    health.describe({
        let copies = copies.clone();
        move || {
            let (running, bytes_per_s) = copies.running();
            let rate = output::rate(i64::try_from(bytes_per_s).unwrap_or(i64::MAX));
            match running {
                0 => "no copy runs".to_owned(),
                1 => format!("1 copy runs, {rate}"),
                n => format!("{n} copies run, {rate}"),
            }
        }
    });
    let transfers = TransferService::new(repository.clone(), settings.clone(), owner.clone())
        .with_metrics(copies);
    let producer = Arc::new(Producer::new(app.clone(), &celery).with_metrics(counted));
    let manager = Manager::new(
        repository.clone(),
        settings.clone(),
        owner.clone(),
        producer,
    )
    .reconciling(Arc::new(Messages::new(broker, &celery)));
    let context = tasks::TaskServices {
        transfers: DataTransferTask::new(transfers)
            .with_notifier(notifier)
            .with_heartbeats(heartbeats),
        manager: Arc::new(manager),
    };
    // Runs until the process ends.
    tokio::spawn(async move {
        let every = settings.transfer.lease_ttl;
        let liveness = health
            .liveness()
            .start("sweeper", every + max_sweep_duration(&settings));
        sweep_loop(
            &repository,
            &owner,
            every,
            &CancellationToken::new(),
            &liveness,
        )
        .await;
    });
    tasks::register(&app, &celery, &context)
        .await
        .map_err(|e| CliError::configuration(format!("celery.task_names: {e}")))
}

/// Returns the queues of all locations of some sites.
async fn queues(
    context: &Context,
    repository: &Repository,
    sites: &[String],
) -> Result<Vec<String>, CliError> {
    let mut queues = Vec::new();
    let prefix = &context.settings.transfer.queue_prefix;
    for site in sites {
        let locations = repository.locations_of_site(site).await?;
        if locations.is_empty() {
            return Err(CliError::NotFound(format!(
                "site `{site}` has no locations"
            )));
        }
        queues.extend(
            locations
                .iter()
                .map(|location| queue_name(prefix, site, location)),
        );
    }
    Ok(queues)
}
