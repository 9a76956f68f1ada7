//! Options of Celery without a counterpart here, each with the reason: a site that copies its settings learns what to do.

/// Prefix of the keys of the table below.
const TRANSPORT: &str = "celery.broker_transport_options.";

const ALWAYS_CHECKED: &str = "connections are checked every few seconds; remove it";
const OWN_RETRIES: &str =
    "commands are repeated where this loses and duplicates no message; remove it";
const ALWAYS_CONFIRMED: &str = "a message is published until the broker confirms it; remove it";

const TIMES: &str =
    "times are written in UTC, with their offset, and read with any offset; remove it";
const ALWAYS_JSON: &str = "json is written, which every receiver can read; remove it";

/// Settings.
const SETTINGS: [(&str, &str); 5] = [
    ("celery.enable_utc", TIMES),
    ("celery.event_serializer", ALWAYS_JSON),
    (
        "celery.result_accept_content",
        "results are read by celery.result_serializer; remove it",
    ),
    ("celery.task_serializer", ALWAYS_JSON),
    ("celery.timezone", TIMES),
];

/// kombu's options of transports, without the prefix of their keys.
const REASONS: [(&str, &str); 20] = [
    (
        "ack_emulation",
        "without it, messages of a worker that dies would be lost; remove it",
    ),
    (
        "client_properties",
        "the connection has its name and version; remove it",
    ),
    ("confirm_publish", ALWAYS_CONFIRMED),
    ("connection_class", "it names a Python class; remove it"),
    (
        "credential_provider",
        "it names a Python object; write user and password into broker_url or a file",
    ),
    (
        "deadletter_queue",
        "a message that no queue accepts is an error of its publication; remove it",
    ),
    ("interval_max", OWN_RETRIES),
    ("interval_start", OWN_RETRIES),
    ("interval_step", OWN_RETRIES),
    (
        "login_method",
        "write ?auth_mechanism=external into broker_url",
    ),
    (
        "max_connections",
        "a worker has four connections; remove it",
    ),
    ("max_retries", OWN_RETRIES),
    (
        "min_other_sentinels",
        "the first sentinel that knows a living master is believed; remove it",
    ),
    (
        "polling_interval",
        "the server reports new messages, and is not polled; remove it",
    ),
    ("read_timeout", ALWAYS_CHECKED),
    (
        "reauth_check_interval",
        "the login does not change while a connection is open; remove it",
    ),
    ("retry_on_timeout", OWN_RETRIES),
    (
        "sentinel_fanout_compat",
        "kombu before 5.4 used other channels with Sentinel; update these programs",
    ),
    ("socket_keepalive", ALWAYS_CHECKED),
    ("socket_keepalive_options", ALWAYS_CHECKED),
];

/// The reason why an option of Celery is not supported; none for a key that Celery does not have either.
pub(super) fn reason(key: &str) -> Option<&'static str> {
    let found = |reasons: &[(&str, &'static str)], key: &str| {
        let known = reasons.iter().find(|(known, _)| *known == key);
        known.map(|(_, reason)| *reason)
    };
    match key.strip_prefix(TRANSPORT) {
        // Options that are tables are reported by the key of their first value.
        Some(name) => found(&REASONS, name.split('.').next().unwrap_or(name)),
        None => found(&SETTINGS, key),
    }
}
