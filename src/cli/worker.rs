//! `worker`: receives transfers from queues and does them.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::node::{host, node_name};
use super::signals::Signals;
use super::{CliError, Context};
use crate::broker::Transport;
use crate::broker::app;
use crate::manager::{Manager, keep_recovering};
use crate::notify::Notifier;
use crate::tasks::{self, DataTransferTask, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::{Repository, SiteError};
use crate::transfer::routing::queue_name;
use crate::transfer::service::TransferService;
use crate::worker::{Config, Shutdown, Worker, results};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Queues to listen to.
    #[arg(short = 'Q', long, value_delimiter = ',', value_name = "QUEUE")]
    queues: Vec<String>,

    /// Listen to the queues of all locations of these sites, by short name.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    /// Node name; %h is the host, %n its first label, %d its domain [default: celery@%h].
    #[arg(short = 'n', long, value_name = "NODE")]
    hostname: Option<String>,

    /// Transfers at a time; 0 is one for each processor.
    #[arg(short = 'c', long, value_name = "N")]
    concurrency: Option<u16>,

    /// Send the events of tasks, for monitors such as Flower.
    #[arg(short = 'E', long)]
    task_events: bool,
}

pub(super) async fn run(context: &Context, arguments: Arguments) -> Result<ExitCode, CliError> {
    let signals = Signals::listen()?;
    let mut settings = (*context.settings).clone();
    if let Some(concurrency) = arguments.concurrency {
        settings.celery.worker_concurrency = concurrency;
    }
    let settings = Arc::new(settings);
    let celery = &settings.celery;
    let hostname = node_name(arguments.hostname.as_deref(), &host());
    let concurrency = celery.concurrency();

    let repository = context.repository().await?;
    let queues = queues(context, &repository, &arguments).await?;
    let owner = Owner::current(hostname.as_str());
    let transport: Arc<dyn Transport> = Arc::new(context.transport(&hostname)?);
    let results = results::open(
        celery.result_backend(),
        celery.result_expires,
        transport.clone(),
    )
    .map_err(|e| CliError::Configuration(format!("celery.result_backend: {e}")))?;
    let app = app::build(transport.clone(), context.producing(&hostname))
        .await
        .map_err(|e| CliError::Failed(format!("cannot make the Celery app: {e}")))?;
    let app = Arc::new(app);

    let service = TransferService::new(repository.clone(), settings.clone(), owner.clone());
    let notifier = Notifier::start(&settings.notifications);
    let producer = Arc::new(Producer(app.clone()));
    let manager = Manager::new(
        repository.clone(),
        settings.clone(),
        owner.clone(),
        producer,
    );
    let context = tasks::Context {
        transfers: DataTransferTask::new(service).with_notifier(notifier.clone()),
        manager: Arc::new(manager),
    };
    let registry = tasks::register(&app, celery, &context)
        .await
        .map_err(|e| CliError::Configuration(format!("celery.task_names: {e}")))?;

    let config = Config {
        hostname,
        queues,
        concurrency,
        prefetch: u16::try_from(concurrency)
            .unwrap_or(u16::MAX)
            .saturating_mul(celery.worker_prefetch_multiplier),
        max_body_bytes: celery.max_body_bytes,
        track_started: celery.task_track_started,
        task_events: arguments.task_events || celery.worker_send_task_events,
        remote_control: celery.worker_enable_remote_control,
    };
    let shutdown = Shutdown::default();
    let worker = Worker::new(app, registry, transport, results, config, shutdown.clone());
    let sweeping = sweep(repository, owner, settings.transfer.lease_ttl);
    let code = signals.during(&shutdown, worker.run()).await;
    drop(sweeping);
    notifier.close().await;
    Ok(code)
}

/// The queues that were asked for, or the default one.
async fn queues(
    context: &Context,
    repository: &Repository,
    arguments: &Arguments,
) -> Result<Vec<String>, CliError> {
    let mut queues = arguments.queues.clone();
    let prefix = &context.settings.transfer.queue_prefix;
    for site in &arguments.site {
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
    if queues.is_empty() {
        queues.push(context.settings.celery.task_default_queue.clone());
    }
    queues.sort_unstable();
    queues.dedup();
    Ok(queues)
}

/// Takes up what dead workers left, at once and then regularly.
fn sweep(
    repository: Repository,
    owner: Owner,
    every: std::time::Duration,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        keep_recovering(&repository, &owner, every, &CancellationToken::new()).await;
    }))
}
