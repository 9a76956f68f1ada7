//! Remote control: what `celery inspect`, `celery control` and Flower ask a worker.
//!
//! Requests are broadcast, carry no proof of who sent them, and are hostile input like any
//! message: what is no request is skipped, an unknown method is answered with an error.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde_json::{Map, Value, json};
use url::Url;
use uuid::Uuid;

use super::Worker;
use super::accepted::Phase;
use crate::broker::{Publication, Queue, Subscription, Verdict};
use crate::telemetry::chain;
use crate::wire::event::Event;
use crate::wire::exception::{BUILTINS, Exception};
use crate::wire::pidbox::{self, Request};

/// How long the broker may take for a reply.
const WITHIN: Duration = Duration::from_secs(5);

/// What Celery has and this worker cannot do (yet).
const UNSUPPORTED: [&str; 12] = [
    "add_consumer",
    "autoscale",
    "cancel_consumer",
    "election",
    "memdump",
    "memsample",
    "pool_grow",
    "pool_restart",
    "pool_shrink",
    "rate_limit",
    "revoke_by_stamped_headers",
    "time_limit",
];

/// Answers requests until the worker stops.
pub(super) async fn serve(worker: Arc<Worker>) {
    let tag = Uuid::new_v4().simple().to_string();
    let mut consumer = worker.transport.consume(Subscription {
        purpose: "remote control",
        small: true,
        queues: vec![Queue::control(&worker.hostname, &tag)],
        prefetch: 0,
        delayed: None,
    });
    while let Some(delivery) = consumer.next().await {
        if let Some(clock) = delivery
            .message
            .headers
            .get("clock")
            .and_then(Value::as_u64)
        {
            worker.events.observe(clock);
        }
        let request = Request::decode(&delivery.message);
        delivery.settle(Verdict::Ack).await;
        let Some(request) = request else {
            tracing::warn!("skipped a message to the remote control that is no request");
            continue;
        };
        if request.addresses(&worker.hostname) {
            worker.answer(&request).await;
        }
    }
}

impl Worker {
    async fn answer(&self, request: &Request) {
        tracing::debug!(method = request.method, "remote control");
        let reply = self
            .obey(request)
            .unwrap_or_else(|error| json!({ "error": error.repr() }));
        let (Some(reply_to), true) = (&request.reply_to, is_answered(&request.method)) else {
            return;
        };
        let ticket = request.ticket.as_deref();
        let publication = Publication {
            exchange: reply_to.exchange.clone(),
            routing_key: reply_to.routing_key.clone(),
            message: pidbox::reply(&self.hostname, ticket, self.events.tick(), &reply),
            declare: None,
            mandatory: false,
        };
        if let Err(error) = self.transport.publish(&publication, WITHIN).await {
            tracing::warn!(method = request.method, error = %chain(&error), "reply was not sent");
        }
    }

    fn obey(&self, request: &Request) -> Result<Value, Exception> {
        Ok(match request.method.as_str() {
            "ping" => json!({"ok": "pong"}),
            "clock" => json!({"clock": self.events.tick()}),
            "hello" => self.hello(request),
            "active" | "dump_active" => self.tasks(|phase| matches!(phase, Phase::Active(_))),
            "reserved" | "dump_reserved" => self.tasks(|phase| phase == Phase::Reserved),
            "scheduled" | "dump_schedule" => self.scheduled(),
            "revoked" | "dump_revoked" => json!(self.revoked.list()),
            "registered" | "dump_tasks" => json!(self.registry.names()),
            "query_task" => self.query(request),
            "stats" => self.stats(),
            "active_queues" => self
                .config
                .queues
                .iter()
                .map(|name| active_queue(name))
                .collect(),
            "conf" | "dump_conf" => self.conf(),
            "report" => json!({"ok": format!(
                "software -> ccat-transfer:{}\nplatform -> system:Linux\n\nbroker -> {}\n",
                env!("CARGO_PKG_VERSION"),
                self.transport.masked_url(),
            )}),
            "revoke" | "terminate" => self.revoke(request)?,
            "enable_events" => ok_if(self.events.enable_tasks(true), "enabled"),
            "disable_events" => ok_if(self.events.enable_tasks(false), "disabled"),
            "heartbeat" => {
                self.events.send(&Event::WorkerHeartbeat(self.load()));
                Value::Null
            }
            "shutdown" => {
                tracing::warn!("shutdown by remote control");
                self.shutdown.warm();
                Value::Null
            }
            method if UNSUPPORTED.contains(&method) => {
                return Err(unsupported(method));
            }
            method => return Err(Exception::new(BUILTINS, "KeyError", method)),
        })
    }

    /// A new node's greeting: it learns what is revoked here, and we what is there.
    fn hello(&self, request: &Request) -> Value {
        if *request.argument("from_node") == *self.hostname {
            return Value::Null;
        }
        let known = self.revoked.list();
        self.revoked.add(ids(request.argument("revoked")));
        json!({"revoked": known, "clock": self.events.tick()})
    }

    fn tasks(&self, wanted: impl Fn(Phase) -> bool) -> Value {
        self.accepted
            .requests(&self.hostname)
            .into_iter()
            .filter(|(phase, _)| wanted(*phase))
            .map(|(_, request)| request)
            .collect()
    }

    fn scheduled(&self) -> Value {
        self.accepted
            .requests(&self.hostname)
            .into_iter()
            .filter_map(|(phase, request)| match phase {
                Phase::Scheduled(eta) => Some(json!({
                    "eta": crate::wire::isoformat(eta),
                    "priority": 6,
                    "request": request,
                })),
                Phase::Reserved | Phase::Active(_) => None,
            })
            .collect()
    }

    fn query(&self, request: &Request) -> Value {
        let wanted = ids(request.argument("ids"));
        let found = self
            .accepted
            .requests(&self.hostname)
            .into_iter()
            .filter_map(|(phase, request)| {
                let id = request["id"].as_str()?.to_owned();
                let state = match phase {
                    Phase::Active(_) => "active",
                    Phase::Reserved => "reserved",
                    Phase::Scheduled(_) => "scheduled",
                };
                wanted.contains(&id).then(|| (id, json!([state, request])))
            });
        Value::Object(found.collect())
    }

    /// `revoke`, and `terminate`, which is the same with `terminate=True`.
    fn revoke(&self, request: &Request) -> Result<Value, Exception> {
        let ids = ids(request.argument("task_id"));
        if ids.is_empty() {
            return Err(Exception::new(BUILTINS, "KeyError", "task_id"));
        }
        let terminate =
            request.method == "terminate" || *request.argument("terminate") == Value::Bool(true);
        tracing::warn!(?ids, terminate, "tasks revoked by remote control");
        self.revoked.add(ids.iter().cloned());
        if terminate {
            let stopped: Vec<String> = ids
                .into_iter()
                .filter(|id| self.accepted.terminate(id))
                .collect();
            return Ok(match stopped.as_slice() {
                [] => json!({"ok": "terminate: tasks unknown"}),
                ids => json!({"ok": format!("terminate: {}", ids.join(", "))}),
            });
        }
        let shown: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
        Ok(json!({"ok": format!("tasks {{{}}} flagged as revoked", shown.join(", "))}))
    }

    fn stats(&self) -> Value {
        let broker = Url::parse(&self.transport.masked_url()).ok();
        let broker = broker.as_ref();
        json!({
            "total": *self.totals(),
            "pid": std::process::id(),
            "clock": self.events.tick().to_string(),
            "uptime": self.started.elapsed().as_secs(),
            "pool": {
                "implementation": "ccat_transfer:tokio",
                "max-concurrency": self.config.concurrency,
                "processes": [std::process::id()],
                "max-tasks-per-child": "N/A",
                "put-guarded-by-semaphore": true,
                "timeouts": [0, 0],
                "writes": {},
            },
            "broker": {
                "hostname": broker.and_then(Url::host_str),
                "userid": broker.map(Url::username),
                "virtual_host": broker.and_then(|url| url.path().strip_prefix('/')),
                "port": broker.and_then(Url::port),
                "insist": false,
                "ssl": broker.is_some_and(|url| url.scheme() == "amqps"),
                "transport": "amqp",
                "connect_timeout": 4,
                "transport_options": {},
                "login_method": "PLAIN",
                "uri_prefix": null,
                "heartbeat": null,
                "failover_strategy": "round-robin",
                "alternates": [],
                "credential_provider": null,
            },
            "prefetch_count": self.config.prefetch,
            "rusage": rusage(),
        })
    }

    fn conf(&self) -> Value {
        json!({
            "broker_url": self.transport.masked_url(),
            "accept_content": ["json"],
            "task_acks_late": true,
            "task_track_started": self.config.track_started,
            "worker_concurrency": self.config.concurrency,
        })
    }
}

/// Python answers all but these.
fn is_answered(method: &str) -> bool {
    !matches!(method, "shutdown" | "heartbeat" | "election")
}

fn ok_if(changed: bool, what: &str) -> Value {
    let already = if changed { "" } else { "already " };
    json!({"ok": format!("task events {already}{what}")})
}

fn unsupported(what: &str) -> Exception {
    Exception::new(
        BUILTINS,
        "NotImplementedError",
        format!("{what} is not supported by ccat-transfer"),
    )
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

fn active_queue(name: &str) -> Value {
    let exchange = json!({
        "name": name, "type": "direct", "arguments": null, "durable": true, "passive": false,
        "auto_delete": false, "delivery_mode": null, "no_declare": false,
    });
    json!({
        "name": name, "exchange": exchange, "routing_key": name, "queue_arguments": null,
        "binding_arguments": null, "consumer_arguments": null, "durable": true,
        "exclusive": false, "auto_delete": false, "no_ack": false, "alias": null,
        "bindings": [], "no_declare": null, "expires": null, "message_ttl": null,
        "max_length": null, "max_length_bytes": null, "max_priority": null,
    })
}

fn rusage() -> Value {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return Value::Object(Map::new());
    };
    json!({
        "utime": seconds(usage.user_time()),
        "stime": seconds(usage.system_time()),
        "maxrss": usage.max_rss(),
        "minflt": usage.minor_page_faults(),
        "majflt": usage.major_page_faults(),
        "inblock": usage.block_reads(),
        "oublock": usage.block_writes(),
        "nvcsw": usage.voluntary_context_switches(),
        "nivcsw": usage.involuntary_context_switches(),
        // Linux does not keep these.
        "ixrss": 0, "idrss": 0, "isrss": 0, "nswap": 0, "msgsnd": 0, "msgrcv": 0, "nsignals": 0,
    })
}

fn seconds(time: TimeVal) -> f64 {
    Duration::new(
        u64::try_from(time.tv_sec()).unwrap_or(0),
        u32::try_from(time.tv_usec() * 1000).unwrap_or(0),
    )
    .as_secs_f64()
}
