//! `worker`: receives transfers from queues and does them.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::serve::{self, Service};
use super::{CliError, Context};
use crate::manager::{Manager, keep_recovering};
use crate::notify::Notifier;
use crate::tasks::{self, DataTransferTask, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::{Repository, SiteError};
use crate::transfer::routing::queue_name;
use crate::transfer::service::TransferService;
use crate::worker::Registry;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Listen to the queues of all locations of these sites, by short name.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    #[command(flatten)]
    pub(super) worker: serve::WorkerArguments,
}

pub(super) async fn run(context: &Context, arguments: Arguments) -> Result<ExitCode, CliError> {
    let repository = context.repository().await?;
    let queues = queues(context, &repository, &arguments.site).await?;
    let notifier = Notifier::start(&context.settings.notifications);
    let register = async |service| register(service, repository, notifier.clone()).await;
    let code = serve::serve(context, &arguments.worker, queues, register).await;
    notifier.close().await;
    code
}

/// The tasks of this stage, and beside them what keeps the table in order.
async fn register(
    service: Service,
    repository: Repository,
    notifier: Notifier,
) -> Result<Registry, CliError> {
    let Service {
        settings,
        hostname,
        app,
    } = service;
    let celery = settings.celery.clone();
    let owner = Owner::current(hostname.as_str());
    let transfers = TransferService::new(repository.clone(), settings.clone(), owner.clone());
    let producer = Arc::new(Producer(app.clone()));
    let manager = Manager::new(
        repository.clone(),
        settings.clone(),
        owner.clone(),
        producer,
    );
    let context = tasks::Context {
        transfers: DataTransferTask::new(transfers).with_notifier(notifier),
        manager: Arc::new(manager),
    };
    // For as long as the process lives.
    tokio::spawn(async move {
        let every = settings.transfer.lease_ttl;
        keep_recovering(&repository, &owner, every, &CancellationToken::new()).await;
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
