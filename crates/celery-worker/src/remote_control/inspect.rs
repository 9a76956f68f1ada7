//! Requests that only read.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde_json::{Map, Value, json};

use super::{RemoteControl, ids, is_true};
use crate::broker::{Queue, Subscriptions};
use crate::worker::effective_options::EffectiveOptions;
use crate::worker::in_flight::Phase;
use celery_protocol::event::CELERY_VERSION;
use celery_protocol::message::TaskMessage;
use celery_protocol::pidbox::ControlRequest;
use celery_protocol::repr;
use service_connection::url;

/// Maximum number of attributes of tasks in a reply; there are fewer.
const MOST_ITEMS: usize = 32;

impl RemoteControl {
    pub(super) fn tasks(&self, safe: bool, wanted: impl Fn(Phase) -> bool) -> Value {
        let requests = self
            .worker
            .in_flight
            .requests(&self.worker.hostname, safe, |phase, _| wanted(phase));
        requests.into_iter().map(|(_, request)| request).collect()
    }

    pub(super) fn scheduled(&self) -> Value {
        let is_scheduled = |phase, _: &TaskMessage| matches!(phase, Phase::Scheduled(_));
        self.worker
            .in_flight
            .requests(&self.worker.hostname, false, is_scheduled)
            .into_iter()
            .filter_map(|(phase, request)| match phase {
                Phase::Scheduled(eta) => Some(json!({
                    "eta": celery_protocol::isoformat(eta),
                    "priority": 6,
                    "request": request,
                })),
                Phase::Reserved | Phase::Active(_) => None,
            })
            .collect()
    }

    pub(super) fn query(&self, request: &ControlRequest) -> Value {
        let wanted: HashSet<String> = ids(request.argument("ids")).into_iter().collect();
        let is_wanted = |_, message: &TaskMessage| wanted.contains(&message.id);
        let requests = self
            .worker
            .in_flight
            .requests(&self.worker.hostname, false, is_wanted);
        let mut found: BTreeMap<String, (u8, Value)> = BTreeMap::new();
        for (phase, request) in requests {
            let Some(id) = request["id"].as_str() else {
                continue;
            };
            let (rank, state) = match phase {
                Phase::Active(_) => (2, "active"),
                Phase::Reserved => (1, "reserved"),
                Phase::Scheduled(_) => (0, "scheduled"),
            };
            // Different tasks may have the same id; the reply shows one of them.
            if found.get(id).is_none_or(|(shown, _)| *shown < rank) {
                found.insert(id.to_owned(), (rank, json!([state, request])));
            }
        }
        let shown = found.into_iter().map(|(id, (_, shown))| (id, shown));
        Value::Object(shown.collect())
    }

    pub(super) fn registered(&self, request: &ControlRequest) -> Value {
        let builtins = is_true(request.argument("builtins"));
        let wanted: Vec<&str> = match request.argument("taskinfoitems") {
            Value::Array(items) if !items.is_empty() => {
                let items = items.iter().filter_map(Value::as_str);
                items.take(MOST_ITEMS).collect()
            }
            _ => vec!["rate_limit"],
        };
        let names = self.worker.registry.names();
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

    /// Attributes of a task that are not none, as Python would print them.
    fn attributes(&self, name: &str) -> BTreeMap<&'static str, String> {
        let mut known = BTreeMap::new();
        let Some(entry) = self.worker.registry.get(name) else {
            return known;
        };
        let limits = self.worker.time_limits.get(name);
        let options = EffectiveOptions::new(
            &TaskMessage::default(),
            &entry.options,
            limits,
            &self.worker.config.tasks,
        );
        let python = |value: Value| repr::value(&value);
        known.insert("name", name.to_owned());
        known.insert("acks_late", python(options.acks_late.into()));
        known.insert("track_started", python(options.track_started.into()));
        known.insert("ignore_result", python(options.ignore_result.into()));
        known.insert("max_retries", options.max_retries.to_string());
        known.insert(
            "default_retry_delay",
            options.retry_delay.as_secs().to_string(),
        );
        let optional = [
            (
                "rate_limit",
                self.worker
                    .rate_limits
                    .get(name)
                    .map(|limit| limit.to_string()),
            ),
            (
                "time_limit",
                options.time_limit.map(|limit| limit.to_string()),
            ),
            (
                "soft_time_limit",
                options.soft_time_limit.map(|limit| limit.to_string()),
            ),
        ];
        known.extend(
            optional
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        known
    }

    pub(super) fn active_queues(&self) -> Value {
        let queues = self.worker.subscriptions.get().map(Subscriptions::queues);
        queues.iter().flatten().map(active_queue).collect()
    }

    /// The settings, with those of Celery that monitors expect and that have one value here.
    pub(super) fn conf(&self) -> Value {
        let mut conf = self.worker.config.settings.clone();
        if let Value::Object(conf) = &mut conf {
            for (name, value) in [
                ("deprecated_settings", Value::Null),
                ("enable_utc", json!(true)),
                ("include", json!([])),
                ("timezone", Value::Null),
                ("worker_hijack_root_logger", json!(true)),
                ("worker_log_color", Value::Null),
            ] {
                conf.entry(name).or_insert(value);
            }
        }
        conf
    }

    pub(super) fn report(&self) -> String {
        format!(
            "\nsoftware -> celery:{CELERY_VERSION} {}:{}\nplatform -> system:Linux machine:{}\n\nbroker -> {}\nresults -> {}\n",
            self.worker.config.product.name,
            self.worker.config.product.version,
            std::env::consts::ARCH,
            self.worker.broker.masked_url(),
            self.worker.config.settings["result_backend"]
                .as_str()
                .unwrap_or_default(),
        )
    }

    pub(super) fn stats(&self) -> Value {
        let urls = self.worker.broker.masked_urls();
        let settings = &self.worker.config.settings;
        let broker = urls.first().and_then(|url| url::kombu(url).ok());
        let broker = broker.unwrap_or_default();
        let transport = self.worker.broker.transport();
        json!({
            "total": *self.worker.totals(),
            "pid": std::process::id(),
            "clock": self.worker.events.tick().to_string(),
            "uptime": self.worker.started.elapsed().as_secs(),
            "pool": {
                "implementation": format!("{}:tokio", self.worker.config.product.name.replace('-', "_")),
                "max-concurrency": self.worker.slots.size(),
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
                "ssl": matches!(&*broker.scheme, "amqps" | "rediss"),
                "transport": match &*broker.scheme {
                    scheme @ ("rediss" | "sentinel") => scheme,
                    _ => transport,
                },
                "connect_timeout": settings["broker_connection_timeout"],
                "transport_options": {},
                "login_method": (transport == "amqp").then_some("PLAIN"),
                "uri_prefix": null,
                "heartbeat": settings["broker_heartbeat"],
                "failover_strategy": settings["broker_failover_strategy"].as_str().unwrap_or("round-robin"),
                // The brokers of the list in kombu's form, without their passwords.
                "alternates": match urls.len() {
                    0 | 1 => Vec::new(),
                    _ => urls,
                },
                "credential_provider": null,
            },
            "prefetch_count": self.worker.prefetch(),
            "rusage": rusage(),
        })
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
        // Linux does not provide these.
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
