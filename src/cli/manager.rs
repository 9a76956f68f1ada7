//! `manager`: schedules the transfers that wait.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use celery::Celery;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::links::require_site;
use super::node::{host, node_name};
use super::patience::WaitFor;
use super::restart;
use super::signals::Signals;
use super::supervision::supervise;
use super::{CliError, Context, output, table};
use crate::manager::{Manager, ManagerError, Pass};
use crate::metrics::{ManagerMetrics, TaskMetrics};
use crate::settings::Settings;
use crate::sideport::{Board, Phase, Probe};
use crate::tasks::{Messages, Producer};
use crate::transfer::lease::Owner;
use crate::transfer::repository::Repository;
use celery_worker::broker::Broker;
use celery_worker::celery_crate::app;
use celery_worker::liveness::LivenessRegistry;
use celery_worker::worker::Shutdown;
use service_connection::error_chain::chain;

/// How long it holds that the broker answers.
const FRESH: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ManagerArguments {
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

    #[command(flatten)]
    wait_for: WaitFor,
}

pub(super) async fn run(
    context: &Context,
    arguments: &ManagerArguments,
) -> Result<ExitCode, CliError> {
    context.tell_warnings();
    match arguments.once {
        true => once(context, arguments).await,
        false => service(context, arguments).await,
    }
}

async fn once(context: &Context, arguments: &ManagerArguments) -> Result<ExitCode, CliError> {
    let parts = Parts::connect(context, arguments, LivenessRegistry::default()).await?;
    let manager = parts.manager(None);
    let pass = manager.transfer_transfer_packages(arguments.verbose).await;
    parts.transport.close().await;
    match pass {
        Ok(pass) => print(context, &pass)?,
        Err(ManagerError::Database(error)) => return Err(error.into()),
        Err(error @ ManagerError::Broker(_)) => {
            return Err(CliError::Unreachable(chain(&error).to_string()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn service(context: &Context, arguments: &ManagerArguments) -> Result<ExitCode, CliError> {
    let signals = Signals::listen()?;
    let (board, _port) = context.board().await?;
    let _supervision = supervise(&board);
    let shutdown = Shutdown::default();
    let working = async {
        // Signals count while it waits for servers, too.
        let parts = tokio::select! {
            parts = Parts::connect(context, arguments, board.pulses.clone()) => parts?,
            () = shutdown.requested() => return Ok(()),
        };
        work(context, &board, &parts, &shutdown).await
    };
    let can_restart = || restart::is_possible(context);
    let (ended, end) = signals
        .during(&board, &shutdown, can_restart, working)
        .await;
    ended?;
    end.conclude()
}

/// Makes passes until it is to stop.
async fn work(
    context: &Context,
    board: &Board,
    parts: &Parts,
    shutdown: &Shutdown,
) -> Result<(), CliError> {
    let (passes, sent) = (ManagerMetrics::new()?, TaskMetrics::new(&parts.name)?);
    board.show(&passes.all())?;
    board.show(&sent.of_producer())?;
    table::watch(board, &parts.repository)?;
    watch_broker(board, &parts.transport);
    board.describe({
        let passes = passes.clone();
        move || match passes.scheduled() {
            1 => "1 transfer scheduled since the start".to_owned(),
            n => format!("{n} transfers scheduled since the start"),
        }
    });
    let longest = Manager::longest_round(&context.settings);
    let manager = parts
        .manager(Some(sent))
        .watched(board.pulses.start("manager", longest), passes);

    let alive = context
        .health()?
        .service(&context.settings.health.manager_name);
    board.enter(Phase::Running);
    let stop = CancellationToken::new();
    tokio::join!(manager.transfer_manager_service(&stop), async {
        shutdown.requested().await;
        stop.cancel();
    });
    if let Some(alive) = alive {
        alive.end().await;
    }
    parts.transport.close().await;
    Ok(())
}

/// What a manager is made of.
struct Parts {
    name: String,
    settings: Arc<Settings>,
    repository: Repository,
    transport: Arc<dyn Broker>,
    app: Arc<Celery>,
}

impl Parts {
    async fn connect(
        context: &Context,
        arguments: &ManagerArguments,
        pulses: LivenessRegistry,
    ) -> Result<Self, CliError> {
        let name = node_name(Some("transfer_manager"), &host())?;
        let patience = arguments.wait_for.patience();
        let repository = patience
            .reach("the database", async || context.repository().await)
            .await?;
        let settings = settings(context, &repository, arguments).await?;
        let transport = context.transport(&name)?.with_liveness(pulses);
        let transport: Arc<dyn Broker> = Arc::new(transport);
        patience.reach_broker(&*transport).await?;
        let app = app::build(transport.clone(), context.producing(&name))
            .await
            .map_err(|e| CliError::Failed(format!("cannot make the Celery app: {e}")))?;
        Ok(Self {
            name,
            settings,
            repository,
            transport,
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
            self.transport.clone(),
            &self.settings.celery,
        )))
    }
}

/// The manager is ready while the broker answers.
fn watch_broker(board: &Board, transport: &Arc<dyn Broker>) {
    let transport = transport.clone();
    board.ready_if(Probe::new("broker", FRESH, move || {
        let transport = transport.clone();
        async move {
            let answered = transport.survey(&[]).await;
            answered
                .map(drop)
                .map_err(|error| chain(&error).to_string())
        }
    }));
}

/// The settings, with the sites of the command line.
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
