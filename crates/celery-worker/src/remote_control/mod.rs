//! Remote control: requests of `celery inspect`, `celery control` and Flower to a runtime.
//!
//! Requests are broadcast, carry no proof of their sender, and are hostile input like any message. A message
//! that is not a request is skipped, an unknown method is answered with an error, and everything that is kept,
//! logged or answered is bounded in bytes.
//!
//! The loop waits only for the next request. Replies, results to store and changes of the consumed queues have
//! their own queues, so `ping` and `shutdown` take effect at once while a server is unreachable.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::broker::{Queue, Subscription};
use crate::worker::bounded_queue::{BoundedQueue, Queued};
use crate::worker::in_flight::Phase;
use crate::worker::runtime::Runtime;
use celery_protocol::event::{Event, Load};
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::message;
use celery_protocol::pidbox::ControlRequest;
use gossip::{ClusterQueues, Namesakes};
pub(crate) use order::RequestOrder;
use replies::Replies;
use revoke::Revocations;

mod control;
mod gossip;
mod inspect;
mod order;
mod replies;
mod revoke;
mod signatures;

/// Time limit for an answer of the broker.
const WITHIN: Duration = Duration::from_secs(5);

/// Largest request, in bytes: large enough for all ids that are remembered.
const MAX_BODY: usize = 4 << 20;

/// Maximum number of requests of each queue that are held at a time.
const PREFETCH: u16 = 16;

/// Maximum number of changes of the consumed queues that wait for the broker, and their bytes.
const CHANGES: (usize, usize) = (64, 1 << 20);

/// Longest text of a request that is logged or repeated, in characters.
const MAX_SHOWN: usize = 1024;

/// Frequency in seconds that a requested heartbeat states, as Python's does.
const ASKED_FREQ: f64 = 5.0;

/// Celery's methods for debugging Python itself.
const UNSUPPORTED: [&str; 3] = ["memdump", "memsample", "objgraph"];

/// Requests by which any client of the virtual host can keep a worker from its work. They are logged,
/// and obeyed only if the settings allow it.
pub const DANGEROUS: [&str; 9] = [
    "add_consumer",
    "autoscale",
    "cancel_consumer",
    "pool_grow",
    "pool_shrink",
    "rate_limit",
    "shutdown",
    "terminate",
    "time_limit",
];

/// Remote control of one worker.
pub(crate) struct RemoteControl {
    worker: Arc<Runtime>,
    replies: Replies,
    namesakes: Namesakes,
    /// Mingle and gossip, unless they are disabled.
    cluster: Option<ClusterQueues>,
    /// Cancelled once the other nodes have answered the greeting.
    mingled: CancellationToken,
    /// Requests that wait for the result backend.
    revocations: Revocations,
    /// Requests that wait for the broker.
    changes: BoundedQueue<ControlRequest>,
}

/// A running remote control. Dropping it ends it.
pub(crate) struct RunningControl {
    control: Arc<RemoteControl>,
    tasks: [AbortOnDropHandle<()>; 3],
}

impl RunningControl {
    /// A token that is cancelled once this node knows what the others have revoked.
    pub(crate) fn mingled(&self) -> CancellationToken {
        self.control.mingled.clone()
    }

    /// Takes no further requests, and sends the waiting replies within a time limit.
    pub(crate) async fn close(self) {
        drop(self.tasks);
        self.control.replies.close().await;
    }
}

/// Starts to execute requests. They are answered once `consuming` is true.
pub(crate) fn start(worker: Arc<Runtime>, consuming: watch::Receiver<bool>) -> RunningControl {
    let (revocations, revoked) = revoke::line();
    let (changes, changing) = BoundedQueue::new(CHANGES.0, CHANGES.1);
    let control = Arc::new(RemoteControl {
        replies: Replies::new(worker.hostname.clone(), worker.broker.clone(), consuming),
        namesakes: Namesakes::default(),
        cluster: worker.config.gossip.then(ClusterQueues::new),
        mingled: CancellationToken::new(),
        revocations,
        changes,
        worker,
    });
    let tasks = [
        tokio::spawn(serve(control.clone())),
        tokio::spawn(revoke::store(control.clone(), revoked)),
        tokio::spawn(change(control.clone(), changing)),
    ]
    .map(AbortOnDropHandle::new);
    RunningControl { control, tasks }
}

/// Answers requests until the worker stops.
async fn serve(control: Arc<RemoteControl>) {
    let (worker, cluster) = (&control.worker, &control.cluster);
    let tag = Uuid::new_v4().simple().to_string();
    let requests = Queue::control(&worker.hostname, &tag);
    let order = &worker.request_order;
    let markers = order.publish(&*worker.broker, &requests.name);
    let mut markers = std::pin::pin!(markers);
    let own = [requests.clone()];
    let mut consumer = worker.broker.consume(Subscription {
        purpose: "remote control",
        queues: own
            .into_iter()
            .chain(order.queue(&*worker.broker))
            .chain(cluster.iter().flat_map(ClusterQueues::queues))
            .collect(),
        prefetch: PREFETCH,
        delayed: None,
        max_body_bytes: Some(worker.config.accept.max_body_bytes.min(MAX_BODY)),
        max_waiting_body_bytes: None,
        permits: None,
    });
    let mut connected = consumer.connected();
    let greeting = async {
        // Without a connection this ends only with the worker.
        let served = connected.wait_for(|up| *up).await.is_ok();
        if let (true, Some(cluster)) = (served, cluster) {
            cluster.greet(&control).await;
            cluster.answers().await;
        }
        control.mingled.cancel();
    };
    let mut greeting = std::pin::pin!(greeting);
    let mut greeted = false;
    let mut receiving = consumer.connected();
    loop {
        let delivery = tokio::select! {
            never = &mut markers => match never {},
            Ok(()) = receiving.changed() => {
                order.set_receiving(*receiving.borrow_and_update());
                continue;
            }
            () = &mut greeting, if !greeted => {
                greeted = true;
                continue;
            }
            delivery = consumer.next() => match delivery {
                Some(delivery) => delivery,
                None => return,
            },
        };
        if order.take(&delivery.message) {
            delivery.acknowledge();
            continue;
        }
        let clock = delivery.message.headers.get("clock");
        if let Some(clock) = clock.and_then(Value::as_u64) {
            worker.events.observe(clock);
        }
        let (exchange, message) = (&delivery.exchange, &delivery.message);
        let is_gossip = cluster
            .as_ref()
            .is_some_and(|cluster| cluster.receive(&control, exchange, message));
        if !is_gossip {
            match ControlRequest::decode(message) {
                None => tracing::warn!(
                    body_bytes = message.body.len(),
                    damage = ?delivery.damage,
                    "skipped a remote control message that is not a request"
                ),
                Some(request) if request.addresses(&worker.hostname) => {
                    control.answer(request, message.body.len());
                }
                Some(_) => {}
            }
        }
        delivery.acknowledge();
    }
}

/// Makes the changes that wait for the broker, one after the other.
async fn change(control: Arc<RemoteControl>, mut line: mpsc::Receiver<Queued<ControlRequest>>) {
    while let Some(Queued { item: request, .. }) = line.recv().await {
        let changing = async {
            match request.method.as_str() {
                "add_consumer" => control.add_consumer(&request).await,
                _ => control.cancel_consumer(&request).await,
            }
        };
        let changed = timeout(WITHIN, changing).await.unwrap_or_else(|_| {
            let text = "the broker has not answered in time; the change will be made when it does";
            Err(Exception::new(BUILTINS, "TimeoutError", text))
        });
        control.reply(&request, changed);
    }
}

impl RemoteControl {
    /// Handles a request of `bytes` bytes, or queues it, and sends the reply.
    fn answer(&self, request: ControlRequest, bytes: usize) {
        tracing::debug!(
            method = shortened(&request.method),
            "remote control request"
        );
        let checked = self
            .permit(&request)
            .and_then(|()| signatures::check(&request));
        let done = checked.and_then(|()| {
            if !matches!(request.method.as_str(), "add_consumer" | "cancel_consumer") {
                return self.execute(&request).map(Some);
            }
            match self.changes.put(request.clone(), bytes) {
                true => Ok(None),
                false => Err(Exception::new(
                    BUILTINS,
                    "RuntimeError",
                    "too many changes wait for the broker; try again",
                )),
            }
        });
        match done {
            Ok(None) => {}
            Ok(Some(reply)) => self.reply(&request, Ok(reply)),
            Err(error) => self.reply(&request, Err(error)),
        }
    }

    fn reply(&self, request: &ControlRequest, done: Result<Value, Exception>) {
        // Python's worker is ending when it could answer.
        if request.method != "shutdown" {
            let reply = done.unwrap_or_else(|error| json!({ "error": error.repr() }));
            self.replies
                .send(request, &reply, self.worker.events.tick());
        }
    }

    fn execute(&self, request: &ControlRequest) -> Result<Value, Exception> {
        Ok(match request.method.as_str() {
            "ping" => json!({"ok": "pong"}),
            "clock" => json!({"clock": self.worker.events.tick()}),
            "hello" => self.hello(request),
            "active" | "dump_active" => {
                let safe = is_true(request.argument("safe"));
                self.tasks(safe, |phase| matches!(phase, Phase::Active(_)))
            }
            "reserved" | "dump_reserved" => self.tasks(false, |phase| phase == Phase::Reserved),
            "scheduled" | "dump_schedule" => self.scheduled(),
            "revoked" | "dump_revoked" => json!(self.worker.revoked.list()),
            "registered" | "dump_tasks" => self.registered(request),
            "query_task" => self.query(request),
            "stats" => self.stats(),
            "active_queues" => self.active_queues(),
            "conf" | "dump_conf" => self.conf(),
            "report" => json!({"ok": self.report()}),
            "revoke" | "terminate" => self.revoke(request)?,
            "revoke_by_stamped_headers" => self.revoke_by_stamped_headers(request)?,
            "rate_limit" => self.rate_limit(request),
            "time_limit" => self.time_limit(request),
            "enable_events" => ok_if(self.worker.events.enable_tasks(true), "enabled"),
            "disable_events" => ok_if(self.worker.events.enable_tasks(false), "disabled"),
            "heartbeat" => {
                let load = Load {
                    freq: ASKED_FREQ,
                    ..self.worker.load()
                };
                self.worker.events.send(&Event::WorkerHeartbeat(load));
                Value::Null
            }
            "pool_grow" => {
                self.resize(self.worker.slots.grow(places(request)?));
                json!({"ok": "pool will grow"})
            }
            "pool_shrink" => {
                let fewer = places(request)?;
                if fewer >= self.worker.slots.size() {
                    let text = "Can't shrink pool. All processes busy!";
                    return Err(Exception::value_error(text));
                }
                self.resize(self.worker.slots.shrink(fewer));
                json!({"ok": "pool will shrink"})
            }
            "autoscale" => {
                return Err(Exception::new(
                    BUILTINS,
                    "ValueError",
                    "Autoscale not enabled",
                ));
            }
            "pool_restart" => {
                return Err(Exception::new(
                    BUILTINS,
                    "ValueError",
                    "Pool restarts not enabled",
                ));
            }
            // This node answers greetings of others (see [`gossip`]) and does not need this method itself.
            "election" => Value::Null,
            "shutdown" => {
                self.worker.shutdown.warm();
                Value::Null
            }
            method if UNSUPPORTED.contains(&method) => {
                return Err(Exception::new(
                    BUILTINS,
                    "NotImplementedError",
                    format!(
                        "{method} inspects the memory of Python, which this worker does not use"
                    ),
                ));
            }
            method => return Err(Exception::new(BUILTINS, "KeyError", shortened(method))),
        })
    }

    /// Refuses a request that the settings do not allow, and logs one that matters.
    fn permit(&self, request: &ControlRequest) -> Result<(), Exception> {
        let terminates = request.method == "revoke" && is_true(request.argument("terminate"));
        let method = match terminates {
            true => "terminate",
            false => request.method.as_str(),
        };
        if !DANGEROUS.contains(&method) {
            return Ok(());
        }
        // The only information about the sender; it cannot be proved.
        let asked_by = request.reply_to.as_ref().map(|to| to.routing_key.as_str());
        let allowed = self
            .worker
            .config
            .control_allowed
            .iter()
            .any(|name| name == method);
        tracing::warn!(
            method,
            arguments = request.arguments.as_ref().map(shown),
            asked_by = asked_by.map(shortened),
            ticket = request.ticket.as_deref().map(shortened),
            allowed,
            "remote control"
        );
        match allowed {
            true => Ok(()),
            false => Err(Exception::new(
                BUILTINS,
                "PermissionError",
                format!("{method} is not among the requests that this worker allows"),
            )),
        }
    }
}

fn ok_if(changed: bool, what: &str) -> Value {
    let already = if changed { "" } else { "already " };
    json!({"ok": format!("task events {already}{what}")})
}

/// Number of places to add or remove.
fn places(request: &ControlRequest) -> Result<usize, Exception> {
    match request.argument("n") {
        Value::Null => Ok(1),
        n => n
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Exception::new(BUILTINS, "ValueError", "n is not a number of places")),
    }
}

/// Truth value as in Python: Flower sends the number 1 for `terminate`.
fn is_true(value: &Value) -> bool {
    !message::is_falsy(value)
}

/// One id, or a list of them; anything else is none.
fn ids(value: &Value) -> Vec<String> {
    match value {
        Value::String(id) => vec![id.clone()],
        Value::Array(ids) => ids
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => Vec::new(),
    }
}

/// A text cut to the length that is shown.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn shown(arguments: &serde_json::Map<String, Value>) -> String {
    shortened(&format!("{arguments:?}"))
}
