//! What `scripts/bench.sh` compares the worker with, and what measures both.
//!
//! * `fill` puts task messages, as Celery writes them, into a queue.
//! * `drain` is the limit: a bare lapin loop that consumes, publishes one small result and acknowledges,
//!   each confirmed, and does nothing else.
//! * `watch` waits until so many results lie in a reply queue, and tells when, and what processor time the
//!   processes that made them have used.
//! * `latency` sends tasks at a steady rate and measures from publish to result.
//!
//! Every figure is printed as one JSON object on a line.

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod broker;
mod drain;
mod fill;
mod latency;
mod usage;
mod watch;

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// Measures Celery workers.
#[derive(Debug, Parser)]
struct Cli {
    /// Broker, as an AMQP URI.
    #[arg(long, global = true, default_value = "amqp://127.0.0.1")]
    broker: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put task messages into a queue.
    Fill(fill::Arguments),
    /// Consume them by a bare loop, until so many are done.
    Drain(drain::Arguments),
    /// Wait for results in a queue.
    Watch(watch::Arguments),
    /// Send tasks at a steady rate and time their results.
    Latency(latency::Arguments),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { broker, command } = Cli::parse();
    let outcome = match command {
        Command::Fill(arguments) => fill::run(&broker, &arguments).await,
        Command::Drain(arguments) => drain::run(&broker, &arguments).await,
        Command::Watch(arguments) => watch::run(&broker, &arguments).await,
        Command::Latency(arguments) => latency::run(&broker, &arguments).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
