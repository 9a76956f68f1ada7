//! `manager`: schedules the transfers that wait.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::links::require_site;
use super::node::{host, node_name};
use super::signals::Signals;
use super::{CliError, Context, output};
use crate::broker::Transport;
use crate::broker::app;
use crate::manager::{Manager, ManagerError, Pass};
use crate::settings::Settings;
use crate::tasks::Producer;
use crate::telemetry::chain;
use crate::transfer::lease::Owner;
use crate::transfer::repository::Repository;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Make one pass, say what it did, and end.
    #[arg(long)]
    once: bool,

    /// Log every row.
    #[arg(short, long)]
    verbose: bool,

    /// Schedule only transfers whose origin is at one of these sites, by short name; else those of
    /// manager.sites.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    context.tell_warnings();
    let name = node_name(Some("transfer_manager"), &host());
    let repository = context.repository().await?;
    let transport: Arc<dyn Transport> = Arc::new(context.transport(&name)?);
    let app = app::build(transport.clone(), context.producing(&name))
        .await
        .map_err(|e| CliError::Failed(format!("cannot make the Celery app: {e}")))?;
    let producer = Arc::new(Producer(Arc::new(app)));
    let owner = Owner::current(name.as_str());
    let settings = settings(context, &repository, arguments).await?;
    let manager = Manager::new(repository, settings, owner, producer);

    let outcome = if arguments.once {
        manager
            .transfer_transfer_packages(arguments.verbose)
            .await
            .map(Some)
    } else {
        let alive = context
            .health()?
            .service(&context.settings.health.manager_name);
        let stop = CancellationToken::new();
        tokio::join!(manager.transfer_manager_service(&stop), async {
            signals.any().await;
            stop.cancel();
        });
        if let Some(alive) = alive {
            alive.end().await;
        }
        Ok(None)
    };
    transport.close().await;
    match outcome {
        Ok(Some(pass)) => print(context, &pass)?,
        Ok(None) => {}
        Err(ManagerError::Database(error)) => return Err(error.into()),
        Err(error @ ManagerError::Broker(_)) => {
            return Err(CliError::Unreachable(chain(&error).to_string()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The settings, with the sites of the command line.
async fn settings(
    context: &Context,
    repository: &Repository,
    arguments: &Arguments,
) -> Result<Arc<Settings>, CliError> {
    let mut settings = Settings::clone(&context.settings);
    if !arguments.site.is_empty() {
        settings.manager.sites.clone_from(&arguments.site);
    }
    if !settings.manager.sites.is_empty() {
        let sites = repository.site_names().await?;
        for site in &settings.manager.sites {
            require_site(site, &sites)?;
        }
    }
    Ok(Arc::new(settings))
}

fn print(context: &Context, pass: &Pass) -> Result<(), CliError> {
    if context.json {
        return output::json(pass);
    }
    println!(
        "{} scheduled, {} refused, {} recovered from dead workers, {} wait to be tried again, {} wait for their link",
        pass.scheduled.len(),
        pass.refused.len(),
        pass.recovered.len(),
        pass.waiting,
        pass.held_back
    );
    for assignment in &pass.scheduled {
        println!("  {} → {}", assignment.data_transfer_id, assignment.queue);
    }
    for refusal in &pass.refused {
        println!(
            "  {} stays pending: {}",
            refusal.data_transfer_id, refusal.reason
        );
    }
    Ok(())
}
