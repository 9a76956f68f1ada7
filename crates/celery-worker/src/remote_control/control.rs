//! Requests that change settings of the running runtime.

use serde_json::{Value, json};

use super::RemoteControl;
use crate::broker::{Binding, Exchange, ExchangeKind, Subscriptions};
use crate::worker::RateLimit;
use crate::worker::effective_options::Limits;
use celery_protocol::exception::{BUILTINS, Exception};
use celery_protocol::pidbox::ControlRequest;

/// Error of a request whose queue has no name.
const NO_QUEUE: &str = "queue is not the name of a queue";

impl RemoteControl {
    pub(super) fn rate_limit(&self, request: &ControlRequest) -> Value {
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
                self.worker.rate_limits.set(task, limit);
                // Flower sends text, and in Python the text "0" is true.
                let disabled = limit.is_none() && *request.argument("rate_limit") != json!("0");
                json!({"ok": match disabled {
                    true => "rate limit disabled successfully",
                    false => "new rate limit set successfully",
                }})
            }
        }
    }

    pub(super) fn time_limit(&self, request: &ControlRequest) -> Value {
        let Some(task) = self.known_task(request) else {
            return json!({"error": "unknown task"});
        };
        let limits = Limits {
            hard: request.argument("hard").as_f64(),
            soft: request.argument("soft").as_f64(),
        };
        self.worker.time_limits.set(task, limits);
        json!({"ok": "time limits set successfully"})
    }

    fn known_task<'a>(&self, request: &'a ControlRequest) -> Option<&'a str> {
        let name = request.argument("task_name").as_str()?;
        self.worker.registry.get(name).is_some().then_some(name)
    }

    /// Makes the change; waits for the broker.
    pub(super) async fn add_consumer(&self, request: &ControlRequest) -> Result<Value, Exception> {
        let text = |name: &str| request.argument(name).as_str().filter(|s| !s.is_empty());
        let Some(name) = text("queue") else {
            return Err(Exception::value_error(NO_QUEUE));
        };
        let mut queue = self.worker.config.task_queues.queue(name);
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

    /// Makes the change; waits for the broker.
    pub(super) async fn cancel_consumer(
        &self,
        request: &ControlRequest,
    ) -> Result<Value, Exception> {
        let Some(name) = request.argument("queue").as_str() else {
            return Err(Exception::value_error(NO_QUEUE));
        };
        self.subscriptions()?.cancel_queue(name).await;
        Ok(json!({"ok": format!("no longer consuming from {name}")}))
    }

    /// Adapts the prefetch limit to a pool of `size` places.
    pub(super) fn resize(&self, size: usize) {
        tracing::info!(concurrency = size, "pool resized by remote control");
        if let Some(permits) = &self.worker.permits {
            permits.resize_to(size);
        }
        if let Some(subscriptions) = self.worker.subscriptions.get() {
            subscriptions.set_prefetch(self.worker.prefetch());
        }
    }

    fn subscriptions(&self) -> Result<&Subscriptions, Exception> {
        self.worker
            .subscriptions
            .get()
            .ok_or_else(|| Exception::new(BUILTINS, "RuntimeError", "the worker is starting"))
    }
}
