//! Signatures of Python's functions for remote control: a request with other arguments has no effect and is answered
//! with the `TypeError` of CPython.

use celery_protocol::arguments::{FunctionSignature, Parameter};
use celery_protocol::exception::Exception;
use celery_protocol::pidbox::ControlRequest;
use serde_json::{Value, json};

use super::shortened;

/// The first parameter of each function, whose argument is not in the request.
const STATE: &str = "state";

/// Parameters of a function after the state.
struct Parameters {
    required: &'static [&'static str],
    optional: &'static [&'static str],
    /// True if further arguments are accepted, without effect.
    any: bool,
}

/// Checks the arguments of a request. A request of an unknown method is accepted.
///
/// # Errors
/// The `TypeError` of Python's function.
pub(super) fn check(request: &ControlRequest) -> Result<(), Exception> {
    let Some((function, parameters)) = signature(&request.method) else {
        return Ok(());
    };
    let signature = FunctionSignature {
        function: function.into(),
        parameters: parameters.list().into(),
        bound: false,
    };
    // Only the names matter; the values can be large.
    let names = request.arguments.iter().flat_map(|given| given.keys());
    let arguments = names.map(|name| (shortened(name), Value::Null)).collect();
    let (state, arguments) = (json!([null]), Value::Object(arguments));
    let bound = signature.bind(&state, &arguments);
    bound.map(drop).map_err(Exception::type_error)
}

impl Parameters {
    fn list(&self) -> Vec<Parameter> {
        let required = [STATE].iter().chain(self.required);
        let named = required.map(|name| Parameter::required(name));
        let optional = self.optional.iter().map(|name| Parameter::optional(name));
        let any = self.any.then(|| Parameter::var_kwargs("kwargs"));
        named.chain(optional).chain(any).collect()
    }
}

/// Name and parameters of the function for a method.
fn signature(method: &str) -> Option<(&'static str, Parameters)> {
    let function = |name, required, optional| {
        let parameters = Parameters {
            required,
            optional,
            any: true,
        };
        Some((name, parameters))
    };
    let strict = |name, optional| {
        let (required, any) = (&[], false);
        let parameters = Parameters {
            required,
            optional,
            any,
        };
        Some((name, parameters))
    };
    match method {
        "active" | "dump_active" => function("active", &[], &["safe"]),
        "active_queues" => strict("active_queues", &[]),
        "add_consumer" => {
            let optional = &["exchange", "exchange_type", "routing_key"];
            function("add_consumer", &["queue"], optional)
        }
        "autoscale" => strict("autoscale", &["max", "min"]),
        "cancel_consumer" => function("cancel_consumer", &["queue"], &[]),
        "clock" => function("clock", &[], &[]),
        "conf" | "dump_conf" => function("conf", &[], &["with_defaults"]),
        "disable_events" => strict("disable_events", &[]),
        "election" => function("election", &["id", "topic"], &["action"]),
        "enable_events" => strict("enable_events", &[]),
        "heartbeat" => strict("heartbeat", &[]),
        "hello" => function("hello", &["from_node"], &["revoked"]),
        "ping" => function("ping", &[], &[]),
        "pool_grow" => function("pool_grow", &[], &["n"]),
        "pool_restart" => function("pool_restart", &[], &["modules", "reload", "reloader"]),
        "pool_shrink" => function("pool_shrink", &[], &["n"]),
        "query_task" => function("query_task", &["ids"], &[]),
        "rate_limit" => function("rate_limit", &["task_name", "rate_limit"], &[]),
        "registered" | "dump_tasks" => function("registered", &[], &["taskinfoitems", "builtins"]),
        "report" => strict("report", &[]),
        "reserved" | "dump_reserved" => function("reserved", &[], &[]),
        "revoke" => function("revoke", &["task_id"], &["terminate", "signal"]),
        "revoke_by_stamped_headers" => {
            let optional = &["terminate", "signal"];
            function("revoke_by_stamped_headers", &["headers"], optional)
        }
        "revoked" | "dump_revoked" => function("revoked", &[], &[]),
        "scheduled" | "dump_schedule" => function("scheduled", &[], &[]),
        "shutdown" => function("shutdown", &[], &["msg"]),
        "stats" => function("stats", &[], &[]),
        "terminate" => function("terminate", &["signal", "task_id"], &[]),
        "time_limit" => function("time_limit", &[], &["task_name", "hard", "soft"]),
        _ => None,
    }
}
