//! `parked`: elements of queues in Redis that are not messages.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{CliError, Context, output};
use celery_worker::broker::redis::{self, ParkedElement, RedisProbe};

/// Maximum number of elements that are shown.
const SHOWN: u16 = 100;

/// Maximum number of characters of an element in a table.
const WIDTH: usize = 120;

#[derive(Debug, Subcommand)]
pub(super) enum ParkedCommand {
    /// Show what was parked, the oldest first, and why. Changes nothing.
    List(QueueName),
    /// Return it to the queue, for workers that can read it.
    Requeue(QueueName),
    /// Delete it.
    Delete(QueueName),
}

/// The queue; the default queue unless it is given.
#[derive(Debug, Args)]
pub(super) struct QueueName {
    /// Name of the queue; the default is celery.task_default_queue.
    queue: Option<String>,
}

/// Runs a command.
pub(super) async fn run(context: &Context, command: ParkedCommand) -> Result<ExitCode, CliError> {
    let celery = &context.settings.celery;
    if !redis::has_scheme(celery.broker_url()) {
        return Err(CliError::configuration(
            "celery.broker_url: only Redis has parked elements; RabbitMQ has dead-letter queues",
        ));
    }
    let probe = RedisProbe::new(&celery.redis_options("parked"))?;
    let name_of = |QueueName { queue }| queue.unwrap_or_else(|| celery.task_default_queue.clone());
    match command {
        ParkedCommand::List(name) => {
            let queue = name_of(name);
            list(context, &probe.parked(&queue, SHOWN).await?)?;
        }
        ParkedCommand::Requeue(name) => {
            let queue = name_of(name);
            let count = probe.requeue_parked(&queue).await?;
            print(context, &queue, count, "returned to")?;
        }
        ParkedCommand::Delete(name) => {
            let queue = name_of(name);
            let count = probe.delete_parked(&queue).await?;
            print(context, &queue, count, "deleted from those of")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(context: &Context, elements: &[ParkedElement]) -> Result<(), CliError> {
    if context.json {
        let shown =
            |element: &ParkedElement| json!({"text": element.text, "problem": element.problem});
        return output::json(&elements.iter().map(shown).collect::<Value>());
    }
    let mut table = output::table(&["BYTES", "PROBLEM", "ELEMENT"]);
    for ParkedElement { text, problem } in elements {
        let shown: String = text.chars().take(WIDTH).collect();
        table.add_row([
            text.len().to_string(),
            problem.clone().unwrap_or_else(|| "none".into()),
            output::clean(&shown).into_owned(),
        ]);
    }
    output::print(&format!("{table}\n"))
}

fn print(context: &Context, queue: &str, count: u64, what: &str) -> Result<(), CliError> {
    match context.json {
        true => output::json(&json!({"queue": queue, "elements": count})),
        false => output::print(&format!("{count} elements were {what} {queue}\n")),
    }
}
