//! Time from publish to result, at a steady rate.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{Outcome, broker};

/// Duration of the warm-up, whose results are ignored.
pub(crate) const WARM: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    #[arg(long)]
    queue: String,
    #[arg(long)]
    reply_to: String,
    /// Tasks per second.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Duration without the warm-up.
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    #[arg(long, default_value = "tasks.add")]
    task: String,
}

/// Sends tasks, waits for their results and prints quantiles.
///
/// # Errors
/// A missing or unknown result, and errors of the broker.
pub(crate) async fn run(url: &str, arguments: &LatencyArgs) -> Outcome {
    let connection = broker::connect(url).await?;
    let channel = broker::confirming(&connection).await?;
    broker::declare_tasks(&channel, &arguments.queue).await?;
    broker::declare_replies(&channel, &arguments.reply_to).await?;
    let mut results = channel
        .basic_consume(
            arguments.reply_to.as_str().into(),
            "".into(),
            BasicConsumeOptions {
                no_ack: true,
                ..BasicConsumeOptions::default()
            },
            FieldTable::default(),
        )
        .await?;
    let sent = Arc::new(Mutex::new(HashMap::new()));
    let count = (arguments.seconds + WARM.as_secs() as u32) * arguments.rate;
    let began = Instant::now();
    let sending = {
        let (sent, channel) = (sent.clone(), channel.clone());
        let (queue, reply_to, task) = (
            arguments.queue.clone(),
            arguments.reply_to.clone(),
            arguments.task.clone(),
        );
        let mut ticks = interval(Duration::from_secs(1) / arguments.rate);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        tokio::spawn(async move {
            for _ in 0..count {
                ticks.tick().await;
                let (body, properties, id) = broker::task(&task, &reply_to);
                sent.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(id, Instant::now());
                let options = BasicPublishOptions::default();
                // The confirmation is not measured.
                channel
                    .basic_publish(
                        queue.as_str().into(),
                        queue.as_str().into(),
                        options,
                        &body,
                        properties,
                    )
                    .await?;
            }
            Outcome::Ok(())
        })
    };
    let mut taken = Vec::new();
    for _ in 0..count {
        let result = timeout(Duration::from_secs(20), results.next())
            .await
            .map_err(|_| "a result does not come")?
            .ok_or("the results ended")??;
        let now = Instant::now();
        let id = result
            .properties
            .correlation_id()
            .clone()
            .unwrap_or_default();
        let at = sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id.as_str())
            .ok_or("a result of an unknown task")?;
        if at - began >= WARM {
            taken.push((now - at).as_secs_f64() * 1e3);
        }
    }
    sending.await??;
    println!("{}", Quantiles::of(taken));
    connection.close(200, "done".into()).await?;
    Ok(())
}

/// Quantiles of measured times.
pub(crate) struct Quantiles(Vec<f64>);

impl Quantiles {
    /// The quantiles of times in milliseconds.
    pub(crate) fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    fn at(&self, share: f64) -> f64 {
        let index = (self.0.len() as f64 * share).ceil() as usize;
        let index = index.clamp(1, self.0.len().max(1)) - 1;
        self.0.get(index).copied().unwrap_or(f64::NAN)
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = json!({
            "tasks": self.0.len(), "median_ms": self.at(0.5), "p99_ms": self.at(0.99), "max_ms": self.at(1.0),
        });
        write!(f, "{figures}")
    }
}
