//! Rules that a value's type cannot express.

use std::sync::LazyLock;
use std::time::Duration;

use regex::Regex;
use secrecy::ExposeSecret;
use url::Url;

use super::{Bbcp, Celery, Problem, Settings, Ssh, Traces};
use celery_worker::broker::amqp;
use celery_worker::results;

/// A size or rate as bbcp reads it (`bbcp -w`, `-x`).
static BBCP_SIZE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^=?[1-9]\d*[kmg]?$").ok());
static PORT_RANGE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^(\d{1,5}):(\d{1,5})$").ok());
/// Names that are safe on ssh's command line: nothing that it could take for an option.
static USER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[a-z_][a-z0-9_-]*$").ok());

/// Serializers, by name and by MIME type.
const ACCEPTABLE: [&str; 6] = [
    "json",
    "msgpack",
    "yaml",
    "application/json",
    "application/x-msgpack",
    "application/x-yaml",
];
const PICKLE: [&str; 2] = ["pickle", "application/x-python-serialize"];

/// Names of the task types, the keys of `celery.task_names`.
const TASK_TYPES: [&str; 2] = ["transfer_files_bbcp", "transfer_transfer_packages"];

/// Everything that is wrong with settings whose types are right.
pub(super) fn check(settings: &Settings) -> Vec<Problem> {
    let mut problems = Problems(Vec::new());
    let Settings {
        celery,
        transfer,
        log,
        ..
    } = settings;

    if let Err(why) = amqp::check_urls(celery.broker_url()) {
        problems.add("celery.broker_url", why);
    }
    result_backend(celery, &mut problems);
    problems.require(
        !celery.task_default_queue.is_empty(),
        "celery.task_default_queue",
        "must not be empty",
    );
    problems.require(
        celery.max_body_bytes > 0,
        "celery.max_body_bytes",
        "must be above 0",
    );
    for name in &celery.accept_content {
        problems.require(
            ACCEPTABLE.contains(&name.as_str()),
            "celery.accept_content",
            &match PICKLE.contains(&name.as_str()) {
                true => {
                    "pickle is never accepted: reading it runs code that the sender chose".into()
                }
                false => format!("`{name}` is no serializer; there are json, msgpack and yaml"),
            },
        );
    }
    problems.require(
        !celery.accept_content.is_empty(),
        "celery.accept_content",
        "must name one serializer at least",
    );
    problems.require(
        celery.broker_connection_timeout > 0,
        "celery.broker_connection_timeout",
        "must be above 0",
    );
    for (key, value) in [
        ("celery.task_time_limit", celery.task_time_limit),
        ("celery.task_soft_time_limit", celery.task_soft_time_limit),
        (
            "celery.worker_soft_shutdown_timeout",
            celery.worker_soft_shutdown_timeout,
        ),
        (
            "celery.result_chord_join_timeout",
            celery.result_chord_join_timeout,
        ),
        (
            "celery.result_chord_retry_interval",
            celery.result_chord_retry_interval,
        ),
    ] {
        problems.require(
            value >= 0.0 && Duration::try_from_secs_f64(value).is_ok(),
            key,
            "must be a number of seconds",
        );
    }
    problems.require(
        (0.1..=60.0).contains(&celery.worker_heartbeat_interval),
        "celery.worker_heartbeat_interval",
        "must be between 0.1 and 60 seconds",
    );
    problems.require(
        celery.worker_eta_hold >= Duration::from_secs(1),
        "celery.worker_eta_hold",
        "must be 1s or more",
    );
    problems.require(
        celery.broker_ssl_cert_file.is_empty() == celery.broker_ssl_key_file.is_empty(),
        "celery.broker_ssl_key_file",
        "must be given with broker_ssl_cert_file, and only with it",
    );
    for (name, queue) in &celery.task_queues {
        let texts = [
            Some(name),
            queue.exchange.as_ref(),
            queue.routing_key.as_ref(),
        ];
        problems.require(
            !name.is_empty() && texts.into_iter().flatten().all(|text| text.len() <= 255),
            &format!("celery.task_queues.{name}"),
            "names and keys must be no longer than 255 bytes, and the queue's not empty",
        );
    }
    for (task, names) in &celery.task_names {
        let key = format!("celery.task_names.{task}");
        problems.require(
            TASK_TYPES.contains(&task.as_str()),
            &key,
            "no such task; there are transfer_files_bbcp and transfer_transfer_packages",
        );
        problems.require(!names.is_empty(), &key, "needs one name at least");
    }
    for task in TASK_TYPES {
        problems.require(
            celery.task_names.contains_key(task),
            &format!("celery.task_names.{task}"),
            "must be given when task_names is",
        );
    }

    problems.require(
        settings.ops_db.database_postgresql_port > 0,
        "ops_db.database_postgresql_port",
        "must be above 0",
    );
    problems.require(
        settings.ops_db.database_postgresql_sslcert.is_empty()
            == settings.ops_db.database_postgresql_sslkey.is_empty(),
        "ops_db.database_postgresql_sslkey",
        "must be given with database_postgresql_sslcert, and only with it",
    );
    problems.require(
        (0.0..=1.0).contains(&transfer.retry_delay_jitter),
        "transfer.retry_delay_jitter",
        "must be 0 to 1",
    );
    let ttl = transfer.lease_ttl;
    problems.require(
        ttl >= transfer.lease_renew_interval * 3,
        "transfer.lease_ttl",
        "must be three times transfer.lease_renew_interval or more, so that two lost renewals do no harm",
    );
    problems.require(
        transfer.lease_renew_interval >= Duration::from_millis(100),
        "transfer.lease_renew_interval",
        "must be 100ms or more",
    );
    problems.require(
        !settings.manager.sleep_time.is_zero(),
        "manager.sleep_time",
        "must be above 0",
    );
    let webhook = settings.notifications.webhook_url.expose_secret();
    if !webhook.is_empty() {
        problems.url("notifications.webhook_url", webhook, &["https", "http"]);
    }
    problems.require(
        !settings
            .notifications
            .command
            .first()
            .is_some_and(String::is_empty),
        "notifications.command",
        "must be a program and its arguments, or empty",
    );
    problems.require(
        !settings.notifications.timeout.is_zero(),
        "notifications.timeout",
        "must be above 0",
    );
    let health = &settings.health;
    let redis = health.redis_url.expose_secret();
    if !redis.is_empty()
        && let Err(error) = results::redis_client(redis)
    {
        problems.add("health.redis_url", error.to_string());
    }
    problems.require(
        !health.interval.is_zero() && health.ttl >= health.interval * 2,
        "health.ttl",
        "must be twice health.interval or more, and that above 0",
    );
    problems.require(
        health.task_key.is_empty() || health.task_key.contains("{task_id}"),
        "health.task_key",
        "must have {task_id} in it, or be empty",
    );
    problems.require(
        settings.http.listen.is_empty() || settings.http.address().is_some(),
        "http.listen",
        "must be an IP address and a port, e.g. \"127.0.0.1:9808\" or \"[::1]:9808\", or empty",
    );
    problems.require(
        settings.http.stopped_after >= Duration::from_secs(1),
        "http.stopped_after",
        "must be 1s or more",
    );
    if let Err(e) = crate::telemetry::filter(&log.level) {
        problems.add("log.level", format!("{e}"));
    }

    traces(&settings.traces, &mut problems);
    bbcp("bbcp", &settings.bbcp, &mut problems);
    ssh("ssh", &settings.ssh, &mut problems);
    stall(
        "transfer.stall_timeout",
        transfer.stall_timeout,
        &settings.bbcp,
        &mut problems,
    );
    stall(
        "transfer.min_rate_window",
        transfer.min_rate_window,
        &settings.bbcp,
        &mut problems,
    );
    for (n, route) in settings.routes.iter().enumerate() {
        let key = format!("routes[{n}]");
        let same = |other: &&super::RouteOverride| {
            other.origin == route.origin && other.destination == route.destination
        };
        problems.require(
            settings.routes.iter().filter(same).count() == 1,
            &key,
            "the same link stands in another entry too; merge the two",
        );
        match settings.link(&route.origin, &route.destination) {
            Ok(link) => {
                bbcp(&format!("{key}.bbcp"), &link.bbcp, &mut problems);
                ssh(&format!("{key}.ssh"), &link.ssh, &mut problems);
                for (name, time) in [
                    ("stall_timeout", link.stall_timeout),
                    ("min_rate_window", link.slowness.window),
                ] {
                    stall(&format!("{key}.{name}"), time, &link.bbcp, &mut problems);
                }
            }
            Err(message) => problems.add(&key, message),
        }
    }
    problems.0
}

/// Names of what results can be compressed with.
const RESULT_COMPRESSIONS: [&str; 8] = [
    "",
    "gzip",
    "zlib",
    "bzip2",
    "bzip",
    "zstd",
    "zstandard",
    "application/zstd",
];

fn result_backend(celery: &Celery, problems: &mut Problems) {
    let key = "celery.result_backend";
    let url = celery.result_backend();
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    if let Err(why) = results::check_url(&celery.into()) {
        problems.add(key, why);
    }
    problems.require(
        RESULT_COMPRESSIONS.contains(&celery.result_compression.as_str()),
        "celery.result_compression",
        "must be gzip, bzip2 or zstd, or empty; the others are only read",
    );
    if scheme == Some("sentinel") {
        problems.require(
            !celery
                .result_backend_transport_options
                .master_name
                .is_empty(),
            "celery.result_backend_transport_options.master_name",
            "must be given for sentinel://: the name that the sentinels know the server by",
        );
    }
    for (key, seconds) in [
        (
            "celery.result_failure_expires",
            celery.result_failure_expires,
        ),
        ("celery.result_chord_expires", celery.result_chord_expires),
    ] {
        problems.require(
            seconds >= -1,
            key,
            "must be a number of seconds, 0 for ever, or -1 for as long as celery.result_expires",
        );
    }
}

impl Bbcp {
    /// What is wrong with values that came from elsewhere than a file; `key` names them.
    pub(crate) fn problems(&self, key: &str) -> Vec<Problem> {
        let mut problems = Problems(Vec::new());
        bbcp(key, self, &mut problems);
        problems.0
    }
}

fn traces(traces: &Traces, problems: &mut Problems) {
    if !traces.endpoint.is_empty() {
        problems.url("traces.endpoint", &traces.endpoint, &["http", "https"]);
        let has_login = Url::parse(&traces.endpoint)
            .is_ok_and(|url| !url.username().is_empty() || url.password().is_some());
        problems.require(
            !has_login,
            "traces.endpoint",
            "must have no login in it; use traces.headers, e.g. \"authorization=Basic%20…\"",
        );
    }
    if let Err(message) = traces.header_pairs() {
        problems.add(
            "traces.headers",
            format!("{message}; write name=value,name=value, with %20 for a blank"),
        );
    }
    problems.require(
        (0.0..=1.0).contains(&traces.ratio),
        "traces.ratio",
        "must be between 0 and 1",
    );
    problems.require(
        traces.timeout >= Duration::from_millis(100),
        "traces.timeout",
        "must be 100ms or more",
    );
}

fn bbcp(key: &str, bbcp: &Bbcp, problems: &mut Problems) {
    problems.require(
        (1..=64).contains(&bbcp.streams),
        &format!("{key}.streams"),
        "must be 1 to 64",
    );
    // With -P 1 bbcp floods its output with rates that are no numbers.
    problems.require(
        bbcp.progress_interval >= 2,
        &format!("{key}.progress_interval"),
        "must be 2 or more",
    );
    problems.require(
        bbcp.window.is_empty() || matches(&BBCP_SIZE, &bbcp.window),
        &format!("{key}.window"),
        "must be a size such as \"8m\", or empty",
    );
    problems.require(
        bbcp.max_rate.is_empty() || matches(&BBCP_SIZE, &bbcp.max_rate),
        &format!("{key}.max_rate"),
        "must be a rate such as \"100m\", or empty",
    );
    let ports = bbcp
        .port_range
        .split_once(':')
        .and_then(|(first, last)| Some((first.parse::<u16>().ok()?, last.parse::<u16>().ok()?)));
    problems.require(
        bbcp.port_range.is_empty()
            || matches(&PORT_RANGE, &bbcp.port_range)
                && ports.is_some_and(|(first, last)| first > 0 && first <= last),
        &format!("{key}.port_range"),
        "must be \"first:last\", or empty",
    );
    problems.require(
        ["", "c32c", "md5"].contains(&bbcp.in_flight_checksum.as_str()),
        &format!("{key}.in_flight_checksum"),
        "must be \"c32c\", \"md5\" or empty",
    );
    // bbcp splits the start command at blanks, without quoting.
    problems.require(
        is_word(&bbcp.remote_program.to_string_lossy()),
        &format!("{key}.remote_program"),
        "must hold no blanks and not begin with `-`",
    );
}

fn ssh(key: &str, ssh: &Ssh, problems: &mut Problems) {
    problems.require(
        ssh.user.is_empty() || matches(&USER, &ssh.user),
        &format!("{key}.user"),
        "must be a login name: small letters, digits, `_` and `-`, not beginning with `-`",
    );
    problems.require(ssh.port > 0, &format!("{key}.port"), "must be above 0");
    problems.require(
        ssh.connect_timeout >= Duration::from_secs(1),
        &format!("{key}.connect_timeout"),
        "must be 1s or more",
    );
    for (name, value) in [
        ("program", ssh.program.to_string_lossy().as_ref()),
        ("identity_file", &ssh.identity_file),
        ("known_hosts_file", &ssh.known_hosts_file),
    ] {
        problems.require(
            value.is_empty() || is_word(value),
            &format!("{key}.{name}"),
            "must hold no blanks and not begin with `-`: bbcp splits its start command at blanks",
        );
    }
    for (name, command) in [
        ("sha256_command", &ssh.sha256_command),
        ("blake3_command", &ssh.blake3_command),
        ("xxh3_command", &ssh.xxh3_command),
        ("md5_command", &ssh.md5_command),
    ] {
        let usable = |word: &String| !word.is_empty() && !word.contains(char::is_control);
        problems.require(
            command.iter().all(usable) && command.first().is_some_and(|word| is_word(word)),
            &format!("{key}.{name}"),
            "must be a program and its arguments, e.g. [\"sha256sum\"]",
        );
    }
    for option in &ssh.options {
        problems.require(
            is_word(option) && option.contains('='),
            &format!("{key}.options"),
            "each must be `Name=value` without blanks",
        );
    }
}

fn stall(key: &str, timeout: Duration, bbcp: &Bbcp, problems: &mut Problems) {
    problems.require(
        timeout >= Duration::from_secs(u64::from(bbcp.progress_interval)) * 2,
        key,
        "must be twice bbcp.progress_interval or more: between two progress lines nothing can be seen to move",
    );
}

fn matches(regex: &LazyLock<Option<Regex>>, text: &str) -> bool {
    regex.as_ref().is_some_and(|r| r.is_match(text))
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, key: &str, message: String) {
        self.0.push(Problem {
            key: key.into(),
            message,
            source: String::new(),
        });
    }

    fn require(&mut self, holds: bool, key: &str, message: &str) {
        if !holds {
            self.add(key, message.into());
        }
    }

    /// The URL itself is not shown: it may hold a password.
    fn url(&mut self, key: &str, text: &str, schemes: &[&str]) {
        let message = match Url::parse(text) {
            Ok(url) if schemes.contains(&url.scheme()) => return,
            Ok(url) => format!(
                "scheme `{}` is not supported; use {}",
                url.scheme(),
                schemes.join(", ")
            ),
            Err(e) => format!("not a URL: {e}"),
        };
        self.add(key, message);
    }
}
