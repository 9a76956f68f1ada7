//! Waits for results in a queue.

use std::time::{Duration, Instant};

use clap::Args;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::{Map, Value, json};

use crate::usage::Usage;
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
    let mut rate = Rate::new(arguments.count);
    rate.warm = arguments.warm;
    rate.patience = Duration::from_secs(arguments.patience);
    loop {
        let found = channel
            .queue_declare(
                arguments.queue.as_str().into(),
                passive,
                FieldTable::default(),
            )
            .await?
            .message_count();
        let done = match arguments.empties {
            true => arguments.count.saturating_sub(found),
            false => found,
        };
        let usage = || arguments.pid.map(usage::of).transpose();
        if let Some(figures) = rate.note(done, usage)? {
            println!("{figures}");
            connection.close(200, "done".into()).await?;
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Rate of tasks from the end of the warm-up to the last one.
pub(crate) struct Rate {
    count: u32,
    /// Share of the tasks that is warm-up.
    warm: f64,
    /// Time without progress until the measurement fails.
    patience: Duration,
    /// Number of tasks at the last progress, and its time.
    last: (u32, Instant),
    /// Number of tasks, time and usage at the end of the warm-up.
    start: Option<(u32, Instant, Option<Usage>)>,
}

impl Rate {
    pub(crate) fn new(count: u32) -> Self {
        Self {
            count,
            warm: 0.1,
            patience: Duration::from_secs(20),
            last: (0, Instant::now()),
            start: None,
        }
    }

    /// Notes the number of done tasks. Returns the figures once all are done.
    ///
    /// # Errors
    /// No progress for too long, and errors of `usage`.
    pub(crate) fn note(
        &mut self,
        done: u32,
        usage: impl Fn() -> Outcome<Option<Usage>>,
    ) -> Outcome<Option<Value>> {
        let now = Instant::now();
        if done > self.last.0 {
            self.last = (done, now);
        } else if self.last.1.elapsed() > self.patience {
            return Err(format!("{done} of {} after all patience", self.count).into());
        }
        let warm = f64::from(self.count) * self.warm;
        if f64::from(done) >= warm && self.start.is_none() {
            self.start = Some((done, now, usage()?));
        }
        let Some((before, began, used)) = self.start.filter(|_| done >= self.count) else {
            return Ok(None);
        };
        let seconds = (now - began).as_secs_f64();
        let tasks = f64::from(done - before);
        let mut figures = Map::new();
        let mut add = |name: &str, value: f64| figures.insert(name.to_owned(), json!(value));
        add("tasks", tasks);
        add("seconds", seconds);
        add("per_second", tasks / seconds);
        if let (Some(used), Some(after)) = (used, usage()?) {
            add(
                "cpu_s_per_1000",
                (after.cpu_s - used.cpu_s) / tasks * 1000.0,
            );
            add("resident_mb", after.resident_kb as f64 / 1024.0);
            add("resident_mb_when_warm", used.resident_kb as f64 / 1024.0);
            add("processes", after.processes as f64);
        }
        Ok(Some(Value::Object(figures)))
    }
}
