//! Upper limit for any worker: a bare loop over the messages.

use std::time::Instant;

use clap::Args;
use futures_util::stream::{StreamExt, TryStreamExt};
use lapin::BasicProperties;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions};
use lapin::types::FieldTable;
use serde_json::json;

use crate::{Outcome, broker};

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[arg(long)]
    queue: String,
    #[arg(long)]
    count: usize,
    #[arg(long)]
    prefetch: u16,
    #[arg(long)]
    concurrency: usize,
    /// Continue until a signal arrives, so that the process can be inspected.
    #[arg(long)]
    linger: bool,
}

/// Consumes messages and publishes a result for each.
///
/// # Errors
/// Errors of the broker.
pub(crate) async fn run(url: &str, arguments: &DrainArgs) -> Outcome {
    // Like the worker: one connection for consuming, one for publishing.
    let consuming = broker::connect(url).await?;
    let publishing = broker::connect(url).await?;
    let results = broker::confirming(&publishing).await?;
    let channel = consuming.create_channel().await?;
    let qos = BasicQosOptions { global: false };
    channel.basic_qos(arguments.prefetch, qos).await?;
    let deliveries = channel
        .basic_consume(
            arguments.queue.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    let began = Instant::now();
    deliveries
        .take(arguments.count)
        .err_into()
        .try_for_each_concurrent(arguments.concurrency, |delivery| {
            let results = results.clone();
            async move {
                let Some(reply_to) = delivery.properties.reply_to().clone() else {
                    return Err("a message without reply_to".into());
                };
                let id = delivery.properties.correlation_id().clone().unwrap_or_default();
                let body = json!({
                    "task_id": id.as_str(), "status": "SUCCESS", "result": 4, "traceback": null, "children": [],
                });
                let properties = BasicProperties::default()
                    .with_content_type("application/json".into())
                    .with_content_encoding("utf-8".into())
                    .with_correlation_id(id);
                results
                    .basic_publish(
                        "".into(),
                        reply_to,
                        BasicPublishOptions::default(),
                        body.to_string().as_bytes(),
                        properties,
                    )
                    .await?
                    .await?;
                delivery.ack(BasicAckOptions::default()).await?;
                Outcome::Ok(())
            }
        })
        .await?;
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({"drained": arguments.count, "seconds": seconds})
    );
    if arguments.linger {
        std::future::pending::<()>().await;
    }
    consuming.close(200, "done".into()).await?;
    publishing.close(200, "done".into()).await?;
    Ok(())
}
