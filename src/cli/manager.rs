//! `manager`: schedules the PENDING transfers.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use celery::Celery;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::links::require_site;
use super::{CliError, Context, output, table};
use crate::PROGRAM;
use crate::manager::{Manager, ManagerError, Pass};
use crate::metrics::ManagerMetrics;
use crate::settings::Settings;
use crate::signs_of_life::SignsOfLife;
use crate::tasks::{Messages, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::{ProgramKind, Repository};
use celery_worker::broker::Broker;
use celery_worker::celery_crate::app;
use celery_worker::worker::Shutdown;
use celery_worker_cli::WaitFor;
use celery_worker_cli::health::{HealthRegistry, Phase, Probe};
use celery_worker_cli::metrics::TaskMetrics;
use celery_worker_cli::node::{host, node_name};
use service_connection::error_chain::chain;

/// Validity of a positive answer of the broker in the readiness check.
const ANSWER_VALID_FOR: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ManagerArguments {
    /// Make one pass, print its result, and end.
    #[arg(long)]
    once: bool,

    /// Log every row.
    #[arg(short, long)]
    verbose: bool,

    /// Schedule only transfers whose origin is at one of these sites, by short name; without it, those of
    /// manager.sites.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    #[command(flatten)]
    wait_for: WaitFor,
}

pub(super) async fn run(
    context: &Context,
    arguments: &ManagerArguments,
) -> Result<ExitCode, CliError> {
    match arguments.once {
        true => once(context, arguments).await,
        false => service(context, arguments).await,
    }
}

async fn once(context: &Context, arguments: &ManagerArguments) -> Result<ExitCode, CliError> {
    context.process.log_warnings();
    let parts = ManagerParts::connect(context, arguments, None).await?;
    let manager = parts.manager(None);
    let pass = manager.run_pass(arguments.verbose).await;
    parts.broker.close().await;
    match pass {
        Ok(pass) => print(context, &pass)?,
        Err(ManagerError::Database(error)) => return Err(error.into()),
        Err(error @ ManagerError::Broker(_)) => {
            return Err(CliError::unreachable(chain(&error).to_string()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn service(context: &Context, arguments: &ManagerArguments) -> Result<ExitCode, CliError> {
    let process = &context.process;
    let (health, _server) = super::web::side_port(context).await?;
    let end = process
        .serve(&health, None, async |shutdown: Shutdown| {
            let parts = tokio::select! {
                parts = ManagerParts::connect(context, arguments, Some(&health)) => parts?,
                () = shutdown.requested() => return Ok(()),
            };
            work(context, &health, &parts, &shutdown).await
        })
        .await?;
    Ok(end.conclude(process)?)
}

/// Makes passes until the process has to stop.
async fn work(
    context: &Context,
    health: &HealthRegistry,
    parts: &ManagerParts,
    shutdown: &Shutdown,
) -> Result<(), CliError> {
    let (passes, sent) = (
        ManagerMetrics::new()?,
        TaskMetrics::new(PROGRAM, &parts.name)?,
    );
    health.register(&passes.all())?;
    health.register(&sent.of_producer())?;
    table::watch(health, &parts.repository)?;
    watch_broker(health, &parts.broker);
    health.describe({
        let passes = passes.clone();
        move || match passes.scheduled() {
            1 => "1 transfer scheduled since the start".to_owned(),
            n => format!("{n} transfers scheduled since the start"),
        }
    });
    let longest = Manager::max_tick_interval(&context.settings);
    let manager = parts
        .manager(Some(sent))
        .with_monitoring(health.liveness().start("manager", longest), passes);

    let alive = context
        .heartbeats()?
        .service(&context.settings.health.manager_name);
    let signs = SignsOfLife::start(
        &parts.repository,
        Owner::current(parts.name.as_str()),
        ProgramKind::Manager,
    );
    health.enter(Phase::Running);
    let stop = CancellationToken::new();
    tokio::join!(manager.transfer_manager_service(&stop), async {
        shutdown.requested().await;
        stop.cancel();
    });
    if let Some(alive) = alive {
        alive.end().await;
    }
    if let Some(signs) = signs {
        signs.end().await;
    }
    parts.broker.close().await;
    Ok(())
}

/// Components of a manager.
struct ManagerParts {
    name: String,
    settings: Arc<Settings>,
    repository: Repository,
    broker: Arc<dyn Broker>,
    app: Arc<Celery>,
}

impl ManagerParts {
    async fn connect(
        context: &Context,
        arguments: &ManagerArguments,
        health: Option<&HealthRegistry>,
    ) -> Result<Self, CliError> {
        let name = node_name(Some("transfer_manager"), &host())?;
        let deadline = arguments.wait_for.deadline();
        let repository = deadline
            .retry_until_reachable("the database", async || context.repository().await)
            .await?;
        let settings = settings(context, &repository, arguments).await?;
        let broker = context.process.broker(&name, health)?;
        deadline.wait_for_broker(&*broker).await?;
        let app = app::build(broker.clone(), context.producing(&name))
            .await
            .map_err(|e| CliError::failed(format!("cannot make the Celery app: {e}")))?;
        Ok(Self {
            name,
            settings,
            repository,
            broker,
            app: Arc::new(app),
        })
    }

    fn manager(&self, sent: Option<TaskMetrics>) -> Manager {
        let producer = Producer::new(self.app.clone(), &self.settings.celery);
        let producer = match sent {
            Some(sent) => producer.with_metrics(sent),
            None => producer,
        };
        Manager::new(
            self.repository.clone(),
            self.settings.clone(),
            Owner::current(self.name.as_str()),
            Arc::new(producer),
        )
        .reconciling(Arc::new(Messages::new(
            self.broker.clone(),
            &self.settings.celery,
        )))
    }
}

/// Registers a readiness check: the manager is ready while the broker answers.
fn watch_broker(health: &HealthRegistry, broker: &Arc<dyn Broker>) {
    let broker = broker.clone();
    health.ready_if(Probe::new("broker", ANSWER_VALID_FOR, move || {
        let broker = broker.clone();
        async move {
            let answered = broker.survey(&[]).await;
            answered
                .map(drop)
                .map_err(|error| chain(&error).to_string())
        }
    }));
}

/// Returns the settings, with the sites of the command line.
async fn settings(
    context: &Context,
    repository: &Repository,
    arguments: &ManagerArguments,
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
        "{} scheduled, {} refused, {} recovered from dead workers, {} sent again, {} wait to be tried again, {} wait for their link",
        pass.scheduled.len(),
        pass.refused.len(),
        pass.recovered.len(),
        pass.resent.len(),
        pass.waiting,
        pass.held_back
    );
    for assignment in &pass.scheduled {
        let queue = output::clean(&assignment.queue);
        println!("  {} → {queue}", assignment.data_transfer_id);
    }
    for refusal in &pass.refused {
        println!(
            "  {} stays pending: {}",
            refusal.data_transfer_id,
            output::clean(&refusal.reason.to_string())
        );
    }
    Ok(())
}
