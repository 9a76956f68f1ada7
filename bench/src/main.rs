//! Measurements for `scripts/bench.sh`, and the programs to compare with.
//!
//! * `fill` puts task messages, as Celery writes them, into a queue.
//! * `drain` is the upper limit: a bare lapin loop that only consumes, publishes one small result and acknowledges,
//!   each confirmed.
//! * `watch` waits for a number of results in a reply queue, and prints the rate and the processor time of the
//!   processes that produced them.
//! * `latency` sends tasks at a steady rate and measures from publish to result.
//! * `redis-fill`, `redis-drain`, `redis-watch` and `redis-latency` do the same with Redis as the broker and for results;
//!   `redis-commands` counts the commands of an idle worker.
//! * `manager` measures passes of the manager, beside bare SQL and bare confirmed publishes.
//! * `worker` is our worker with one task; its flags are those of `ccat-transfer worker`. It is a command and not a
//!   program, since every program with the worker takes minutes to link.
//!
//! Every figure is printed as one JSON object on a line.

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use drain::DrainArgs;
use fill::FillArgs;
use latency::LatencyArgs;
use manager::ManagerArgs;
use redis_broker::RedisMeasure;
use watch::WatchArgs;

mod broker;
mod drain;
mod fill;
mod latency;
mod manager;
mod redis_broker;
mod usage;
mod watch;
mod worker;

/// Result of a measurement.
type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

/// Measures Celery workers.
#[derive(Debug, Parser)]
struct Cli {
    /// Broker, as an AMQP URI, or as the URL of Redis for the commands that begin with `redis-`.
    #[arg(long, global = true, default_value = "amqp://127.0.0.1")]
    broker: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Measure(Measure),
    #[command(flatten)]
    Redis(RedisMeasure),
    /// Run our worker with one task; the flags are those of `ccat-transfer worker`.
    #[command(disable_help_flag = true)]
    Worker {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<OsString>,
    },
}

#[derive(Debug, Subcommand)]
enum Measure {
    /// Put task messages into a queue.
    Fill(FillArgs),
    /// Consume task messages by a bare loop.
    Drain(DrainArgs),
    /// Wait for results in a queue.
    Watch(WatchArgs),
    /// Send tasks at a steady rate and time their results.
    Latency(LatencyArgs),
    /// Time passes of the manager.
    Manager(ManagerArgs),
}

fn main() -> ExitCode {
    let Cli { broker, command } = Cli::parse();
    match command {
        Command::Measure(measure) => exit_code(run(&broker, &measure)),
        Command::Redis(measure) => exit_code(run_on_redis(&broker, &measure)),
        Command::Worker { flags } => {
            let name = OsString::from("ccat-bench worker");
            worker::program().run(std::iter::once(name).chain(flags), worker::tasks)
        }
    }
}

fn exit_code(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run_on_redis(url: &str, measure: &RedisMeasure) -> Outcome {
    redis_broker::run(url, measure).await
}

#[tokio::main]
async fn run(broker: &str, measure: &Measure) -> Outcome {
    match measure {
        Measure::Fill(arguments) => fill::run(broker, arguments).await,
        Measure::Drain(arguments) => drain::run(broker, arguments).await,
        Measure::Watch(arguments) => watch::run(broker, arguments).await,
        Measure::Latency(arguments) => latency::run(broker, arguments).await,
        Measure::Manager(arguments) => manager::run(broker, arguments).await,
    }
}
