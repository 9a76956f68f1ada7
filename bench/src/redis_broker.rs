//! Redis as the broker and for results: the same measurements as for RabbitMQ.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use celery_protocol::RawMessage;
use celery_protocol::virtual_message::{self, BodyEncoding};
use clap::{Args, Subcommand};
use futures_util::StreamExt;
use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands, Client, Script, cmd, pipe};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use uuid::Uuid;

use crate::latency::{Quantiles, WARM};
use crate::watch::Rate;
use crate::{Outcome, usage};

/// The scripts of the worker, so that the bare loop has the same guarantees.
const CLAIM: &str = concat!(
    include_str!("../../crates/celery-worker/src/broker/redis/scripts/body.lua"),
    include_str!("../../crates/celery-worker/src/broker/redis/scripts/claim.lua")
);
const REMOVE: &str = include_str!("../../crates/celery-worker/src/broker/redis/scripts/remove.lua");

/// Prefix of the keys of results, and of the channels that report them.
const RESULT: &str = "celery-task-meta-";

/// Limit of a body in bytes: the worker's default.
const MAX_BODY: usize = 4 << 20;

/// Number of messages of one claim, and of their bytes: as the worker's.
const CLAIM_MESSAGES: usize = 64;
const CLAIM_BYTES: usize = 1 << 20;

/// Interval between two queries of the number of keys.
const EVERY: Duration = Duration::from_millis(10);

#[derive(Debug, Subcommand)]
pub(crate) enum RedisMeasure {
    /// Empty the database, and fill a queue.
    #[command(name = "redis-fill")]
    Fill(FillArgs),
    /// Claim messages, store a result for each, and settle them.
    #[command(name = "redis-drain")]
    Drain(DrainArgs),
    /// Wait for results.
    #[command(name = "redis-watch")]
    Watch(WatchArgs),
    /// Measure from publish to result, at a steady rate.
    #[command(name = "redis-latency")]
    Latency(LatencyArgs),
    /// Count the commands that clients send.
    #[command(name = "redis-commands")]
    Commands(CommandsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct FillArgs {
    #[arg(long)]
    queue: String,
    #[arg(long)]
    count: usize,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[arg(long)]
    queue: String,
    /// Number of messages that are held at the same time.
    #[arg(long)]
    prefetch: usize,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[arg(long)]
    count: u32,
    /// Process whose usage is printed, with its descendants.
    #[arg(long)]
    pid: u32,
}

#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    #[arg(long)]
    queue: String,
    /// Tasks per second.
    #[arg(long)]
    rate: u32,
    /// Duration without the warm-up.
    #[arg(long)]
    seconds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct CommandsArgs {
    #[arg(long)]
    seconds: u32,
}

/// Runs a measurement.
///
/// # Errors
/// Errors of the server, and results that do not arrive.
pub(crate) async fn run(url: &str, measure: &RedisMeasure) -> Outcome {
    match measure {
        RedisMeasure::Fill(arguments) => fill(url, arguments).await,
        RedisMeasure::Drain(arguments) => drain(url, arguments).await,
        RedisMeasure::Watch(arguments) => watch(url, arguments).await,
        RedisMeasure::Latency(arguments) => latency(url, arguments).await,
        RedisMeasure::Commands(arguments) => commands(url, arguments).await,
    }
}

async fn connect(url: &str) -> Outcome<MultiplexedConnection> {
    let config = redis::AsyncConnectionConfig::new()
        .set_response_timeout(Some(Duration::from_secs(10)))
        .set_connection_timeout(Some(Duration::from_secs(4)));
    let client = Client::open(url)?;
    Ok(client
        .get_multiplexed_async_connection_with_config(&config)
        .await?)
}

/// Makes a message for `tasks.add(2, 2)` as a Python producer writes it: its text and the task id.
fn message(queue: &str) -> (String, String) {
    let id = Uuid::new_v4().to_string();
    let headers = json!({
        "lang": "py", "task": "tasks.add", "id": id, "root_id": id, "parent_id": null, "group": null,
        "argsrepr": "(2, 2)", "kwargsrepr": "{}", "origin": "bench", "retries": 0, "eta": null, "expires": null,
        "shadow": null, "ignore_result": false,
    });
    let body =
        json!([[2, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]);
    let mut message = RawMessage::default();
    if let Value::Object(headers) = headers {
        message.headers = headers.into_iter().collect();
    }
    message.body = body.to_string().into_bytes();
    let properties = &mut message.properties;
    properties.content_type = Some("application/json".into());
    properties.content_encoding = Some("utf-8".into());
    properties.correlation_id = Some(id.clone());
    properties.reply_to = Some(Uuid::nil().to_string());
    properties.priority = Some(0);
    properties.persistent = true;
    let text = virtual_message::encode(&message, ("", queue), BodyEncoding::Base64);
    (text, id)
}

async fn fill(url: &str, arguments: &FillArgs) -> Outcome {
    let mut connection = connect(url).await?;
    cmd("FLUSHALL").exec_async(&mut connection).await?;
    let queue = &arguments.queue;
    let texts: Vec<_> = (0..arguments.count).map(|_| message(queue).0).collect();
    for part in texts.chunks(500) {
        let _: usize = connection.lpush(queue, part).await?;
    }
    println!("{}", json!({"filled": arguments.count}));
    Ok(())
}

/// Runs until a signal ends it, as a worker does.
async fn drain(url: &str, arguments: &DrainArgs) -> Outcome {
    // Like the worker: one connection for claims, one for acknowledgements, one for results.
    let mut claims = connect(url).await?;
    let settling = connect(url).await?;
    let results = connect(url).await?;
    let claim = Script::new(CLAIM);
    let remove = Arc::new(Script::new(REMOVE));
    let room = Arc::new(Semaphore::new(arguments.prefetch));
    let mut running = JoinSet::new();
    let queue = &arguments.queue;
    loop {
        drop(room.acquire().await?);
        let free = room.available_permits().min(CLAIM_MESSAGES);
        let fields: Vec<_> = (0..free).map(|_| Uuid::new_v4().to_string()).collect();
        let mut call = claim.prepare_invoke();
        for class in ["", "\u{6}\u{16}3", "\u{6}\u{16}6", "\u{6}\u{16}9"] {
            call.key(format!("{queue}{class}"));
        }
        call.key("bench.parked").key("unacked_index").key("unacked");
        call.arg(4).arg(1).arg(free).arg(CLAIM_BYTES);
        call.arg(MAX_BODY).arg(MAX_BODY);
        call.arg(format!(", \"\", {}]", json!(queue)))
            .arg(free)
            .arg(1);
        fields.iter().for_each(|field| {
            call.arg(field);
        });
        let (_, taken): (usize, Vec<redis::Value>) = call.invoke_async(&mut claims).await?;
        if taken.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for (taken, field) in taken.chunks(3).zip(fields) {
            // The position of the queue, the text, and the size of an omitted body.
            let Some(redis::Value::BulkString(text)) = taken.get(1).cloned() else {
                return Err("a message without text".into());
            };
            let permit = room.clone().acquire_owned().await?;
            let (mut results, mut settling) = (results.clone(), settling.clone());
            let remove = remove.clone();
            running.spawn(async move {
                let _permit = permit;
                let message = virtual_message::decode(&text, usize::MAX)?.message;
                let id = message.properties.correlation_id.unwrap_or_default();
                let key = format!("{RESULT}{id}");
                let result = json!({
                    "status": "SUCCESS", "result": 4, "traceback": null, "children": [], "task_id": id,
                });
                let text = result.to_string();
                let mut store = pipe();
                store.atomic().set_ex(&key, &text, 86_400).publish(&key, &text);
                store.exec_async(&mut results).await?;
                remove
                    .key("unacked")
                    .key("unacked_index")
                    .arg(field)
                    .invoke_async::<Vec<u8>>(&mut settling)
                    .await?;
                Outcome::Ok(())
            });
        }
        while let Some(done) = running.try_join_next() {
            done??;
        }
    }
}

/// Each result is a key; the few other keys are counted before.
async fn watch(url: &str, arguments: &WatchArgs) -> Outcome {
    let mut connection = connect(url).await?;
    let mut rate = Rate::new(arguments.count);
    loop {
        let (keys, held): (u32, u32) = pipe()
            .cmd("DBSIZE")
            .hlen("unacked")
            .query_async(&mut connection)
            .await?;
        // At the end all messages have to be acknowledged as well.
        let done = match keys >= arguments.count && held > 0 {
            true => arguments.count - 1,
            false => keys.min(arguments.count),
        };
        if let Some(figures) = rate.note(done, || usage::of(arguments.pid).map(Some))? {
            println!("{figures}");
            return Ok(());
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn latency(url: &str, arguments: &LatencyArgs) -> Outcome {
    let mut connection = connect(url).await?;
    let mut results = Client::open(url)?.get_async_pubsub().await?;
    results.psubscribe(format!("{RESULT}*")).await?;
    let mut results = results.into_on_message();
    let count = (arguments.seconds + WARM.as_secs() as u32) * arguments.rate;
    let mut ticks = interval(Duration::from_secs(1) / arguments.rate);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut sent, mut taken) = (HashMap::new(), Vec::new());
    let began = Instant::now();
    let (mut published, mut received) = (0, 0);
    while received < count {
        tokio::select! {
            _ = ticks.tick(), if published < count => {
                published += 1;
                let (text, id) = message(&arguments.queue);
                sent.insert(id, Instant::now());
                let _: usize = connection.lpush(&arguments.queue, text).await?;
            }
            result = timeout(Duration::from_secs(20), results.next()) => {
                let now = Instant::now();
                let result = result.map_err(|_| "a result does not come")?.ok_or("the results ended")?;
                let id = result.get_channel_name().strip_prefix(RESULT).unwrap_or_default();
                // A worker may report a state before the result.
                let body: Value = serde_json::from_slice(result.get_payload_bytes())?;
                if body["status"] != "SUCCESS" {
                    continue;
                }
                let at = sent.remove(id).ok_or("a result of an unknown task")?;
                received += 1;
                if at - began >= WARM {
                    taken.push((now - at).as_secs_f64() * 1e3);
                }
            }
        }
    }
    println!("{}", Quantiles::of(taken));
    Ok(())
}

/// Commands that clients send, without those of scripts.
async fn commands(url: &str, arguments: &CommandsArgs) -> Outcome {
    let mut monitor = Client::open(url)?.get_async_monitor().await?;
    let mut lines = monitor.on_message::<String>();
    let mut sent = 0;
    let counting = async {
        while let Some(line) = lines.next().await {
            // `1339518083.107412 [0 127.0.0.1:60866] "keys" "*"`, and `[0 lua]` for a script.
            let client = line.split(']').next().unwrap_or_default();
            sent += u32::from(!client.ends_with(" lua"));
        }
    };
    let time = Duration::from_secs(arguments.seconds.into());
    if timeout(time, counting).await.is_ok() {
        return Err("the connection has ended".into());
    }
    let per_second = f64::from(sent) / f64::from(arguments.seconds);
    println!("{}", json!({"commands": sent, "per_second": per_second}));
    Ok(())
}
