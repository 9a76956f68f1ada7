//! Fills a queue.

use clap::Args;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use lapin::options::BasicPublishOptions;
use serde_json::json;

use crate::{Outcome, broker};

#[derive(Debug, Args)]
pub(crate) struct FillArgs {
    #[arg(long)]
    queue: String,
    /// Queue for the results.
    #[arg(long)]
    reply_to: String,
    #[arg(long)]
    count: usize,
    #[arg(long, default_value = "tasks.add")]
    task: String,
}

/// Declares both queues and publishes the messages.
///
/// # Errors
/// Errors of the broker.
pub(crate) async fn run(url: &str, arguments: &FillArgs) -> Outcome {
    let connection = broker::connect(url).await?;
    let channel = connection.create_channel().await?;
    let queue = arguments.queue.as_str();
    broker::declare_tasks(&channel, queue).await?;
    broker::declare_replies(&channel, &arguments.reply_to).await?;
    // Without confirms, which would take more time than all other steps; a lost message shows as a missing result.
    stream::iter(0..arguments.count)
        .map(Ok)
        .try_for_each_concurrent(500, |_| async {
            let (body, properties, _) = broker::task(&arguments.task, &arguments.reply_to);
            let options = BasicPublishOptions::default();
            channel
                .basic_publish(queue.into(), queue.into(), options, &body, properties)
                .await?;
            Outcome::Ok(())
        })
        .await?;
    // A channel works in order: its answer to this proves that all messages were accepted.
    broker::declare_tasks(&channel, queue).await?;
    println!("{}", json!({"filled": arguments.count}));
    connection.close(200, "done".into()).await?;
    Ok(())
}
