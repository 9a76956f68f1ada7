//! Remote control: what `celery inspect`, `celery control` and Flower ask a worker.
//!
//! Requests are broadcast, carry no proof of who sent them, and are hostile input like any
//! message: what is no request is skipped, an unknown method is answered with an error.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::accepted::Phase;
use super::cluster::Ears;
use super::policy::{Limits, Policy};
use super::{RateLimit, Worker};
use crate::broker::{
    Binding, Exchange, ExchangeKind, Publication, Queue, Subscription, Subscriptions, Verdict,
};
use crate::telemetry::chain;
use crate::wire::event::Event;
use crate::wire::exception::{BUILTINS, Exception};
use crate::wire::message::{self, TaskMessage};
use crate::wire::pidbox::{self, Request};
use crate::wire::repr;
use crate::wire::result::{Cause, ResultMeta, State};
use crate::wire::url;

/// How long the broker may take for a reply.
pub(super) const WITHIN: Duration = Duration::from_secs(5);

/// What Celery has for debugging Python itself.
const UNSUPPORTED: [&str; 3] = ["memdump", "memsample", "objgraph"];

/// Requests by which anybody on the virtual host can keep a worker from its work. They are logged,
/// and obeyed only where the settings say so.
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

/// Answers requests until the worker stops.
pub(super) async fn serve(worker: Arc<Worker>) {
    let tag = Uuid::new_v4().simple().to_string();
    let ears = worker.config.gossip.then(Ears::new);
    let own = [Queue::control(&worker.hostname, &tag)];
    let mut consumer = worker.transport.consume(Subscription {
        purpose: "remote control",
        queues: own
            .into_iter()
            .chain(ears.iter().flat_map(Ears::queues))
            .collect(),
        prefetch: 0,
        delayed: None,
        max_body_bytes: Some(worker.config.accept.max_body_bytes),
    });
    let mut connected = consumer.connected();
    let greeting = async {
        // Ends without a connection only with the worker.
        let served = connected.wait_for(|up| *up).await.is_ok();
        if let (true, Some(ears)) = (served, &ears) {
            ears.greet(&worker).await;
        }
    };
    let mut greeting = std::pin::pin!(greeting);
    let mut greeted = false;
    loop {
        let delivery = tokio::select! {
            () = &mut greeting, if !greeted => {
                greeted = true;
                continue;
            }
            delivery = consumer.next() => match delivery {
                Some(delivery) => delivery,
                None => return,
            },
        };
        if let Some(clock) = delivery
            .message
            .headers
            .get("clock")
            .and_then(Value::as_u64)
        {
            worker.events.observe(clock);
        }
        if let Some(ears) = &ears
            && ears.hear(&worker, &delivery.exchange, &delivery.message)
        {
            delivery.settle(Verdict::Ack).await;
            continue;
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
        tracing::debug!(method = request.method, "remote control request");
        let reply = match self.obey(request).await {
            Ok(reply) => reply,
            Err(error) => json!({ "error": error.repr() }),
        };
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

    async fn obey(&self, request: &Request) -> Result<Value, Exception> {
        self.permit(request)?;
        Ok(match request.method.as_str() {
            "ping" => json!({"ok": "pong"}),
            "clock" => json!({"clock": self.events.tick()}),
            "hello" => self.hello(request),
            "active" | "dump_active" => {
                let safe = is_true(request.argument("safe"));
                self.tasks(safe, |phase| matches!(phase, Phase::Active(_)))
            }
            "reserved" | "dump_reserved" => self.tasks(false, |phase| phase == Phase::Reserved),
            "scheduled" | "dump_schedule" => self.scheduled(),
            "revoked" | "dump_revoked" => json!(self.revoked.list()),
            "registered" | "dump_tasks" => self.registered(request),
            "query_task" => self.query(request),
            "stats" => self.stats(),
            "active_queues" => self.active_queues(),
            "conf" | "dump_conf" => self.config.settings.clone(),
            "report" => json!({"ok": self.report()}),
            "revoke" | "terminate" => self.revoke(request).await?,
            "revoke_by_stamped_headers" => self.revoke_by_stamped_headers(request)?,
            "rate_limit" => self.rate_limit(request),
            "time_limit" => self.time_limit(request),
            "enable_events" => ok_if(self.events.enable_tasks(true), "enabled"),
            "disable_events" => ok_if(self.events.enable_tasks(false), "disabled"),
            "heartbeat" => {
                self.events.send(&Event::WorkerHeartbeatAsked);
                Value::Null
            }
            "add_consumer" => self.add_consumer(request).await?,
            "cancel_consumer" => self.cancel_consumer(request).await?,
            "pool_grow" => {
                self.resize(self.pool.grow(places(request)?));
                json!({"ok": "pool will grow"})
            }
            "pool_shrink" => {
                self.resize(self.pool.shrink(places(request)?));
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
            // This node answers those of others (see `cluster`) and wants none itself.
            "election" => Value::Null,
            "shutdown" => {
                self.shutdown.warm();
                Value::Null
            }
            method if UNSUPPORTED.contains(&method) => {
                return Err(Exception::new(
                    BUILTINS,
                    "NotImplementedError",
                    format!("{method} is about Python's memory, which this worker has none of"),
                ));
            }
            method => return Err(Exception::new(BUILTINS, "KeyError", method)),
        })
    }

    /// Refuses a request that the settings do not allow, and logs one that matters.
    fn permit(&self, request: &Request) -> Result<(), Exception> {
        let terminates = request.method == "revoke" && is_true(request.argument("terminate"));
        let method = match terminates {
            true => "terminate",
            false => request.method.as_str(),
        };
        if !DANGEROUS.contains(&method) {
            return Ok(());
        }
        // All that tells of the sender; it cannot be proved.
        let asked_by = request.reply_to.as_ref().map(|to| to.routing_key.as_str());
        let allowed = self
            .config
            .control_allowed
            .iter()
            .any(|name| name == method);
        tracing::warn!(
            method,
            arguments = ?request.arguments,
            asked_by,
            ticket = request.ticket,
            allowed,
            "remote control"
        );
        match allowed {
            true => Ok(()),
            false => Err(Exception::new(
                BUILTINS,
                "PermissionError",
                format!(
                    "{method} is not among celery.worker_remote_control_allowed of this worker"
                ),
            )),
        }
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

    fn tasks(&self, safe: bool, wanted: impl Fn(Phase) -> bool) -> Value {
        self.accepted
            .requests(&self.hostname, safe)
            .into_iter()
            .filter(|(phase, _)| wanted(*phase))
            .map(|(_, request)| request)
            .collect()
    }

    fn scheduled(&self) -> Value {
        self.accepted
            .requests(&self.hostname, false)
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
        let mut found: BTreeMap<String, (u8, Value)> = BTreeMap::new();
        for (phase, request) in self.accepted.requests(&self.hostname, false) {
            let Some(id) = request["id"]
                .as_str()
                .filter(|id| wanted.iter().any(|w| w == id))
            else {
                continue;
            };
            let (rank, state) = match phase {
                Phase::Active(_) => (2, "active"),
                Phase::Reserved => (1, "reserved"),
                Phase::Scheduled(_) => (0, "scheduled"),
            };
            // Different tasks may have one id; the reply has room for one of them.
            if found.get(id).is_none_or(|(shown, _)| *shown < rank) {
                found.insert(id.to_owned(), (rank, json!([state, request])));
            }
        }
        let shown = found.into_iter().map(|(id, (_, shown))| (id, shown));
        Value::Object(shown.collect())
    }

    fn registered(&self, request: &Request) -> Value {
        let builtins = is_true(request.argument("builtins"));
        let wanted: Vec<&str> = match request.argument("taskinfoitems") {
            Value::Array(items) if !items.is_empty() => {
                items.iter().filter_map(Value::as_str).collect()
            }
            _ => vec!["rate_limit"],
        };
        let names = self.registry.names();
        let shown = names
            .into_iter()
            .filter(|name| builtins || !name.starts_with("celery."))
            .map(|name| {
                let known = self.attributes(name);
                let items: Vec<String> = wanted
                    .iter()
                    .filter_map(|item| Some(format!("{item}={}", known.get(item)?)))
                    .collect();
                match items.is_empty() {
                    true => name.to_owned(),
                    false => format!("{name} [{}]", items.join(" ")),
                }
            });
        shown.collect()
    }

    /// A task's attributes that are not none, as Python would print them.
    fn attributes(&self, name: &str) -> BTreeMap<&'static str, String> {
        let mut known = BTreeMap::new();
        let Some(entry) = self.registry.get(name) else {
            return known;
        };
        let limits = self.time_limits.get(name);
        let policy = Policy::new(
            &TaskMessage::default(),
            &entry.attributes,
            limits,
            &self.config.tasks,
        );
        let python = |value: Value| repr::value(&value);
        known.insert("name", name.to_owned());
        known.insert("acks_late", python(policy.acks_late.into()));
        known.insert("track_started", python(policy.track_started.into()));
        known.insert("max_retries", policy.max_retries.to_string());
        known.insert(
            "default_retry_delay",
            policy.retry_delay.as_secs().to_string(),
        );
        let optional = [
            (
                "rate_limit",
                self.rates.get(name).map(|limit| limit.to_string()),
            ),
            (
                "time_limit",
                policy.time_limit.map(|limit| limit.to_string()),
            ),
            (
                "soft_time_limit",
                policy.soft_time_limit.map(|limit| limit.to_string()),
            ),
        ];
        known.extend(
            optional
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        known
    }

    /// `revoke`, and `terminate`, which is the same with `terminate=True`.
    async fn revoke(&self, request: &Request) -> Result<Value, Exception> {
        let ids = ids(request.argument("task_id"));
        if ids.is_empty() {
            return Err(Exception::new(BUILTINS, "KeyError", "task_id"));
        }
        let terminate = request.method == "terminate" || is_true(request.argument("terminate"));
        tracing::warn!(?ids, terminate, "tasks revoked by remote control");
        self.revoked.add(ids.iter().cloned());
        for id in &ids {
            self.store_revoked(id).await;
        }
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

    /// Stores REVOKED at once for a task that has not begun anywhere, so that whoever waits for it
    /// need not wait until its message comes.
    async fn store_revoked(&self, id: &str) {
        if self.accepted.runs(id) {
            return;
        }
        let told = async {
            let stored = self.results.get(id).await?;
            let begun = stored.is_some_and(|stored| {
                let status = stored["status"].as_str().unwrap_or_default();
                !matches!(status, "PENDING" | "RECEIVED" | "RETRY" | "REJECTED")
            });
            if begun {
                return Ok(());
            }
            let message = TaskMessage {
                id: id.to_owned(),
                ..TaskMessage::default()
            };
            let meta = ResultMeta::new(&message, State::Revoked(Cause::Revoked), Utc::now());
            self.results.store(&meta, &message).await
        };
        match tokio::time::timeout(WITHIN, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(task_id = id, error = %chain(&error), "REVOKED was not stored");
            }
            Err(_) => tracing::warn!(task_id = id, "REVOKED was not stored in time"),
        }
    }

    fn revoke_by_stamped_headers(&self, request: &Request) -> Result<Value, Exception> {
        let headers = match request.argument("headers") {
            Value::Object(headers) => headers.clone(),
            // `celery control` sends what was typed: `name=value`, …
            Value::Array(pairs) => pairs
                .iter()
                .filter_map(|pair| pair.as_str()?.split_once('='))
                .map(|(name, value)| (name.to_owned(), json!(value)))
                .collect(),
            _ => return Err(Exception::new(BUILTINS, "KeyError", "headers")),
        };
        tracing::warn!(?headers, "tasks revoked by their stamps");
        self.revoked.add_stamps(&headers);
        let shown = repr::value(&Value::Object(headers.clone()));
        if !is_true(request.argument("terminate")) {
            let text = format!("headers {shown} flagged as revoked, but not terminated");
            return Ok(json!({ "ok": text }));
        }
        let found = self
            .accepted
            .ids(|message| super::revoked::is_stamped(message, &headers));
        let stopped = found
            .into_iter()
            .filter(|id| self.accepted.terminate(id))
            .count();
        Ok(json!({"ok": match stopped {
            0 => format!("headers {shown} were not terminated"),
            _ => format!("headers {shown} revoked"),
        }}))
    }

    fn rate_limit(&self, request: &Request) -> Value {
        let limit = match request.argument("rate_limit") {
            Value::Null => None,
            Value::Number(n) if n.as_f64() == Some(0.0) => None,
            Value::String(text) if text.is_empty() || text == "0" => None,
            given => {
                let text = given
                    .as_str()
                    .map_or_else(|| given.to_string(), str::to_owned);
                match text.parse::<RateLimit>() {
                    Ok(limit) => Some(limit),
                    Err(error) => {
                        let error = Exception::new(BUILTINS, "ValueError", error).repr();
                        return json!({"error": format!("Invalid rate limit string: {error}")});
                    }
                }
            }
        };
        match self.known_task(request) {
            None => json!({"error": "unknown task"}),
            Some(task) => {
                self.rates.set(task, limit);
                // Flower sends text, and to Python "0" is as good a text as any.
                let disabled = limit.is_none() && *request.argument("rate_limit") != json!("0");
                json!({"ok": match disabled {
                    true => "rate limit disabled successfully",
                    false => "new rate limit set successfully",
                }})
            }
        }
    }

    fn time_limit(&self, request: &Request) -> Value {
        let Some(task) = self.known_task(request) else {
            return json!({"error": "unknown task"});
        };
        let limits = Limits {
            hard: request.argument("hard").as_f64(),
            soft: request.argument("soft").as_f64(),
        };
        self.time_limits.set(task, limits);
        json!({"ok": "time limits set successfully"})
    }

    fn known_task<'a>(&self, request: &'a Request) -> Option<&'a str> {
        let name = request.argument("task_name").as_str()?;
        self.registry.get(name).is_some().then_some(name)
    }

    async fn add_consumer(&self, request: &Request) -> Result<Value, Exception> {
        let text = |name: &str| request.argument(name).as_str().filter(|s| !s.is_empty());
        let Some(name) = text("queue") else {
            return Err(missing_argument("add_consumer", "queue"));
        };
        let mut queue = self.config.task_queues.queue(name);
        if let Some(exchange) = text("exchange") {
            let kind = text("exchange_type").unwrap_or("direct");
            let kind = serde_json::from_value::<ExchangeKind>(json!(kind)).map_err(|_| {
                Exception::new(BUILTINS, "ValueError", format!("no exchange type: {kind}"))
            })?;
            queue.binding = Some(Binding {
                exchange: Exchange::durable(exchange, kind),
                key: text("routing_key").unwrap_or(name).to_owned(),
            });
        }
        self.subscriptions()?.add(queue).await;
        Ok(json!({"ok": format!("add consumer {name}")}))
    }

    async fn cancel_consumer(&self, request: &Request) -> Result<Value, Exception> {
        let Some(name) = request.argument("queue").as_str() else {
            return Err(missing_argument("cancel_consumer", "queue"));
        };
        self.subscriptions()?.cancel_queue(name).await;
        Ok(json!({"ok": format!("no longer consuming from {name}")}))
    }

    /// Adapts the prefetch limit to a pool of `size` places.
    fn resize(&self, size: usize) {
        tracing::info!(concurrency = size, "pool resized by remote control");
        if let Some(subscriptions) = self.subscriptions.get() {
            subscriptions.set_prefetch(self.prefetch());
        }
    }

    fn subscriptions(&self) -> Result<&Subscriptions, Exception> {
        self.subscriptions
            .get()
            .ok_or_else(|| Exception::new(BUILTINS, "RuntimeError", "the worker is starting"))
    }

    fn active_queues(&self) -> Value {
        let queues = self.subscriptions.get().map(Subscriptions::queues);
        queues.iter().flatten().map(active_queue).collect()
    }

    fn report(&self) -> String {
        format!(
            "\nsoftware -> ccat-transfer:{}\nplatform -> system:Linux machine:{}\n\nbroker -> {}\nresults -> {}\n",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH,
            self.transport.masked_url(),
            self.config.settings["result_backend"]
                .as_str()
                .unwrap_or_default(),
        )
    }

    fn stats(&self) -> Value {
        let urls = self.transport.masked_urls();
        let broker = urls.first().and_then(|url| url::kombu(url).ok());
        let broker = broker.unwrap_or_default();
        json!({
            "total": *self.totals(),
            "pid": std::process::id(),
            "clock": self.events.tick().to_string(),
            "uptime": self.started.elapsed().as_secs(),
            "pool": {
                "implementation": "ccat_transfer:tokio",
                "max-concurrency": self.pool.size(),
                "processes": [std::process::id()],
                "max-tasks-per-child": "N/A",
                "put-guarded-by-semaphore": true,
                "timeouts": [0, 0],
                "writes": {},
            },
            "broker": {
                "hostname": broker.host,
                "userid": broker.user,
                "virtual_host": broker.path,
                "port": broker.port,
                "insist": false,
                "ssl": broker.scheme == "amqps",
                "transport": "amqp",
                "connect_timeout": self.config.settings["broker_connection_timeout"],
                "transport_options": {},
                "login_method": "PLAIN",
                "uri_prefix": null,
                "heartbeat": self.config.settings["broker_heartbeat"],
                "failover_strategy": "round-robin",
                // Those of the list, as kombu shows them; without their passwords.
                "alternates": match urls.len() {
                    0 | 1 => Vec::new(),
                    _ => urls,
                },
                "credential_provider": null,
            },
            "prefetch_count": self.prefetch(),
            "rusage": rusage(),
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

/// As Python says it of a call that lacks an argument.
fn missing_argument(function: &str, name: &str) -> Exception {
    Exception::type_error(format!(
        "{function}() missing 1 required positional argument: '{name}'"
    ))
}

/// Places that are to be added or taken away.
fn places(request: &Request) -> Result<usize, Exception> {
    match request.argument("n") {
        Value::Null => Ok(1),
        n => n
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Exception::new(BUILTINS, "ValueError", "n is no number of places")),
    }
}

/// As Python takes it: Flower asks to terminate by the number 1.
fn is_true(value: &Value) -> bool {
    !message::is_falsy(value)
}

/// One id, or a list of them; anything else is none.
pub(super) fn ids(value: &Value) -> Vec<String> {
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

fn active_queue(queue: &Queue) -> Value {
    let exchange = queue.binding.as_ref().map(|binding| &binding.exchange);
    let kind = exchange.map_or("direct", |exchange| exchange.kind.as_str());
    let argument = |name: &str| queue.arguments.get(name).cloned().unwrap_or_default();
    json!({
        "name": queue.name,
        "exchange": {
            "name": exchange.map(|exchange| &exchange.name), "type": kind, "arguments": null,
            "durable": true, "passive": false, "auto_delete": false, "delivery_mode": null,
            "no_declare": false,
        },
        "routing_key": queue.binding.as_ref().map(|binding| &binding.key),
        "queue_arguments": (!queue.arguments.is_empty()).then_some(&queue.arguments),
        "binding_arguments": null, "consumer_arguments": null, "durable": queue.durable,
        "exclusive": queue.exclusive, "auto_delete": queue.auto_delete, "no_ack": false,
        "alias": null, "bindings": [], "no_declare": null,
        "expires": argument("x-expires"), "message_ttl": argument("x-message-ttl"),
        "max_length": argument("x-max-length"),
        "max_length_bytes": argument("x-max-length-bytes"),
        "max_priority": argument("x-max-priority"),
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
