//! `worker`: receives transfers from queues and does them.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::serve::{self, Service};
use super::{CliError, Context, output, table};
use crate::health::Health;
use crate::manager::{Manager, keep_recovering, longest_sweep};
use crate::metrics::TransferMetrics;
use crate::notify::Notifier;
use crate::tasks::{self, DataTransferTask, Messages, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::{Repository, SiteError};
use crate::transfer::routing::queue_name;
use crate::transfer::service::TransferService;
use celery_worker::task::Registry;

#[derive(Debug, Args)]
pub(super) struct WorkerCommand {
    /// Listen to the queues of all locations of these sites, by short name.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    #[command(flatten)]
    pub(super) worker: serve::WorkerArguments,
}

pub(super) async fn run(context: &Context, arguments: WorkerCommand) -> Result<ExitCode, CliError> {
    let (board, _port) = context.board().await?;
    let mut alive = None;
    let notifier = Notifier::start(&context.settings.notifications);
    let build = async |shutdown| {
        let patience = arguments.worker.wait_for.patience();
        let repository = patience
            .reach("the database", async || context.repository().await)
            .await?;
        table::watch(&board, &repository)?;
        let queues = queues(context, &repository, &arguments.site).await?;
        let health = context.health()?;
        alive = health.service(&context.settings.health.worker_name);
        let register =
            async |service| register(service, repository, notifier.clone(), health).await;
        let worker = &arguments.worker;
        serve::build(
            context, worker, &board, shutdown, patience, queues, register,
        )
        .await
    };
    let end = serve::serve(context, &arguments.worker, &board, build).await;
    notifier.close().await;
    if let Some(alive) = alive {
        alive.end().await;
    }
    end?.conclude()
}

/// The tasks of this stage, and beside them what keeps the table in order.
async fn register(
    service: Service,
    repository: Repository,
    notifier: Notifier,
    health: Health,
) -> Result<Registry, CliError> {
    let Service {
        settings,
        hostname,
        app,
        transport,
        board,
        tasks: counted,
    } = service;
    let celery = settings.celery.clone();
    let owner = Owner::current(hostname.as_str());
    let copies = TransferMetrics::new()?;
    board.show(&copies.all())?;
    board.describe({
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
    .reconciling(Arc::new(Messages::new(transport, &celery)));
    let context = tasks::Context {
        transfers: DataTransferTask::new(transfers)
            .with_notifier(notifier)
            .with_health(health),
        manager: Arc::new(manager),
    };
    // For as long as the process lives.
    tokio::spawn(async move {
        let every = settings.transfer.lease_ttl;
        let pulse = board
            .pulses
            .start("sweeper", every + longest_sweep(&settings));
        keep_recovering(
            &repository,
            &owner,
            every,
            &CancellationToken::new(),
            &pulse,
        )
        .await;
    });
    tasks::register(&app, &celery, &context)
        .await
        .map_err(|e| CliError::Configuration(format!("celery.task_names: {e}")))
}

/// The queues of all locations of some sites.
async fn queues(
    context: &Context,
    repository: &Repository,
    sites: &[String],
) -> Result<Vec<String>, CliError> {
    let mut queues = Vec::new();
    let prefix = &context.settings.transfer.queue_prefix;
    for site in sites {
        let locations = repository
            .locations_of_site(site)
            .await
            .map_err(|error| match error {
                SiteError::Unknown { .. } => CliError::NotFound(error.to_string()),
                SiteError::Database(error) => error.into(),
            })?;
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
