//! `manager`: schedules the transfers that wait.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::node::{host, node_name};
use super::signals::Signals;
use super::{CliError, Context, output};
use crate::broker::Transport;
use crate::broker::app;
use crate::manager::{Manager, ManagerError, Pass};
use crate::tasks::Producer;
use crate::telemetry::chain;
use crate::transfer::lease::Owner;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Make one pass, say what it did, and end.
    #[arg(long)]
    once: bool,

    /// Log every row.
    #[arg(short, long)]
    verbose: bool,
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
    let manager = Manager::new(repository, context.settings.clone(), owner, producer);

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

fn print(context: &Context, pass: &Pass) -> Result<(), CliError> {
    if context.json {
        return output::json(pass);
    }
    println!(
        "{} scheduled, {} refused, {} recovered from dead workers, {} wait to be tried again",
        pass.scheduled.len(),
        pass.refused.len(),
        pass.recovered.len(),
        pass.waiting
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
