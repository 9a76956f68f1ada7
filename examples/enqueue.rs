//! Sends a task by name, like any producer, and waits for its result if requested.
//!
//! ```text
//! cargo run --example enqueue -- transfer_files_bbcp --id 42 --queue ccat_buffer_data_transfer --wait
//! cargo run --example enqueue -- transfer_transfer_packages --verbose
//! ```
//!
//! The broker and the result backend are those of the settings: `CELERY_BROKER_URL`,
//! `CELERY_RESULT_BACKEND`, or a file named by `CCAT_DATA_TRANSFER_CONFIG`.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ccat_transfer::settings::{self, Settings};
use ccat_transfer::tasks::{
    self, TransferFilesBbcp, TransferFilesBbcpParams, TransferTransferPackages,
    TransferTransferPackagesParams,
};
use celery::task::Signature;
use celery_worker::broker::NoPropagation;
use celery_worker::celery_crate::app::{self, Producing};
use celery_worker::results::{self, ResultReader};
use clap::{Args, Parser, Subcommand};
use serde_json::Value;
use service_connection::error_chain::chain;

/// Time limit for the broker to accept a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Send a task of the transfer stage.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Copy the package of one data transfer.
    #[command(name = "transfer_files_bbcp")]
    TransferFilesBbcp {
        /// Id of the row in `data_transfer`.
        #[arg(long)]
        id: i64,
        #[command(flatten)]
        sending: Sending,
    },
    /// Schedule the PENDING transfers.
    #[command(name = "transfer_transfer_packages")]
    TransferTransferPackages {
        /// Log every row.
        #[arg(long)]
        verbose: bool,
        #[command(flatten)]
        sending: Sending,
    },
}

#[derive(Args)]
struct Sending {
    /// Queue to send to [default: celery.task_default_queue].
    #[arg(long)]
    queue: Option<String>,
    /// Wait for the result, for this many seconds [default: 3600].
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "3600")]
    wait: Option<u64>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("enqueue: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode, Box<dyn Error>> {
    let file = std::env::var_os("CCAT_DATA_TRANSFER_CONFIG").map(PathBuf::from);
    let settings = settings::load(file.as_deref(), std::env::vars())?;
    let (Task::TransferFilesBbcp { sending, .. } | Task::TransferTransferPackages { sending, .. }) =
        &cli.task;

    let broker = settings.celery.open_broker("enqueue")?;
    let mut reader = match sending.wait {
        Some(_) => Some(ResultReader::open(&results(&settings), &broker, SEND_TIMEOUT).await?),
        None => None,
    };
    let app = app::build(
        broker.clone(),
        Producing {
            hostname: "enqueue".into(),
            default_queue: settings.celery.task_default_queue.clone(),
            names: tasks::wire_names(&settings.celery),
            queues: settings.celery.task_queue_declarations(),
            reply_to: reader
                .as_ref()
                .and_then(ResultReader::reply_to)
                .map(str::to_owned),
            within: SEND_TIMEOUT,
            propagation: Arc::new(NoPropagation),
        },
    )
    .await?;

    let queue = sending
        .queue
        .as_deref()
        .unwrap_or(&settings.celery.task_default_queue);
    let sent = match &cli.task {
        Task::TransferFilesBbcp { id, .. } => {
            let params = TransferFilesBbcpParams {
                data_transfer_id: (*id).into(),
                session: None,
            };
            let signature = Signature::<TransferFilesBbcp>::new(params);
            app.send_task(signature.with_queue(queue)).await?
        }
        Task::TransferTransferPackages { verbose, .. } => {
            let params = TransferTransferPackagesParams {
                verbose: Some(*verbose),
                session: None,
            };
            let signature = Signature::<TransferTransferPackages>::new(params);
            app.send_task(signature.with_queue(queue)).await?
        }
    };
    println!("{}", sent.task_id);

    let code = match (&mut reader, sending.wait) {
        (Some(reader), Some(seconds)) => show(
            &reader
                .wait(&sent.task_id, Duration::from_secs(seconds))
                .await?,
        ),
        _ => ExitCode::SUCCESS,
    };
    broker.close().await;
    Ok(code)
}

/// Returns the result backend. Without a setting, `--wait` uses `rpc://`, which needs only the broker.
fn results(settings: &Settings) -> results::ResultOptions {
    match settings.celery.result_backend() {
        "" => results::ResultOptions::new("rpc://"),
        _ => (&settings.celery).into(),
    }
}

fn show(meta: &Value) -> ExitCode {
    let result = &meta["result"];
    if meta["status"] == "SUCCESS" {
        println!("SUCCESS {result}");
        return ExitCode::SUCCESS;
    }
    let text = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    println!(
        "{} {}: {}",
        text(&meta["status"]),
        text(&result["exc_type"]),
        text(&result["exc_message"][0])
    );
    ExitCode::FAILURE
}
