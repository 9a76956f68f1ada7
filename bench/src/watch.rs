//! Waits for results in a queue.

use std::time::{Duration, Instant};

use clap::Args;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::{Map, Value, json};

use crate::{Outcome, broker, usage};

/// Interval between two queries of the queue.
const EVERY: Duration = Duration::from_millis(10);

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Observed queue.
    #[arg(long)]
    queue: String,
    /// Wait until the queue is empty instead of full.
    #[arg(long)]
    empties: bool,
    #[arg(long)]
    count: u32,
    /// Share of the tasks that is warm-up.
    #[arg(long, default_value_t = 0.1)]
    warm: f64,
    /// Process whose usage is printed, with its descendants.
    #[arg(long)]
    pid: Option<u32>,
    /// Seconds without progress until the command fails.
    #[arg(long, default_value_t = 20)]
    patience: u64,
}

/// Waits for the results and prints rate and usage.
///
/// # Errors
/// No progress in time, and errors of the broker.
pub(crate) async fn run(url: &str, arguments: &WatchArgs) -> Outcome {
    let connection = broker::connect(url).await?;
    let channel = connection.create_channel().await?;
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let warm = f64::from(arguments.count) * arguments.warm;
    let mut last = (0, Instant::now());
    let mut start = None;
    loop {
        let found = channel
            .queue_declare(
                arguments.queue.as_str().into(),
                passive,
                FieldTable::default(),
            )
            .await?
            .message_count();
        let now = Instant::now();
        let done = match arguments.empties {
            true => arguments.count.saturating_sub(found),
            false => found,
        };
        if done > last.0 {
            last = (done, now);
        } else if last.1.elapsed() > Duration::from_secs(arguments.patience) {
            return Err(format!("{done} of {} after all patience", arguments.count).into());
        }
        let usage = || arguments.pid.map(usage::of).transpose();
        if f64::from(done) >= warm && start.is_none() {
            start = Some((done, now, usage()?));
        }
        if let Some((before, began, used)) = start
            && done >= arguments.count
        {
            let after = usage()?;
            let seconds = (now - began).as_secs_f64();
            let tasks = f64::from(done - before);
            let mut figures = Map::new();
            let mut add = |name: &str, value: f64| figures.insert(name.to_owned(), json!(value));
            add("tasks", tasks);
            add("seconds", seconds);
            add("per_second", tasks / seconds);
            if let (Some(used), Some(after)) = (used, after) {
                add(
                    "cpu_s_per_1000",
                    (after.cpu_s - used.cpu_s) / tasks * 1000.0,
                );
                add("resident_mb", after.resident_kb as f64 / 1024.0);
                add("resident_mb_when_warm", used.resident_kb as f64 / 1024.0);
                add("processes", after.processes as f64);
            }
            println!("{}", Value::Object(figures));
            connection.close(200, "done".into()).await?;
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}
