//! Configuration of the worker from the settings.

use std::time::Duration;

use celery_protocol::content::Accept;
use celery_worker::worker::{Config, DefaultOptions, RateLimit};

use crate::settings::Celery;
use crate::traces;

/// Converts a number of seconds that was checked before.
fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or(Duration::MAX)
}

/// Creates the configuration of a worker for `queues`.
pub(super) fn config(celery: &Celery, hostname: String, queues: Vec<String>) -> Config {
    let limit = |seconds: f64| (seconds > 0.0).then_some(seconds);
    let rate_limit = celery.task_default_rate_limit.parse::<RateLimit>().ok();
    Config {
        hostname,
        queues,
        task_queues: celery.task_queue_declarations(),
        default_queue: celery.task_default_queue.clone(),
        chord_join_timeout: seconds(celery.result_chord_join_timeout),
        chord_retry_interval: seconds(celery.result_chord_retry_interval),
        concurrency: celery.concurrency(),
        prefetch_multiplier: celery.worker_prefetch_multiplier,
        accept: Accept::new(&celery.accept_content, celery.max_body_bytes),
        tasks: DefaultOptions {
            acks_late: celery.task_acks_late,
            acks_on_failure: celery.task_acks_on_failure,
            acks_on_timeout: celery.task_acks_on_timeout,
            ignore_result: celery.task_ignore_result,
            store_errors_even_if_ignored: celery.task_store_errors_even_if_ignored,
            track_started: celery.task_track_started,
            time_limit: limit(celery.task_time_limit),
            soft_time_limit: limit(celery.task_soft_time_limit),
            rate_limit,
        },
        rate_limits: !celery.worker_disable_rate_limits,
        result_extended: celery.result_extended,
        deduplicate: celery.worker_deduplicate_successful_tasks,
        eta_hold: celery.worker_eta_hold,
        eta_task_limit: celery.worker_eta_task_limit,
        warm_shutdown: None,
        soft_shutdown: seconds(celery.worker_soft_shutdown_timeout),
        heartbeat_interval: seconds(celery.worker_heartbeat_interval),
        task_events: celery.worker_send_task_events,
        task_sent_events: false,
        remote_control: celery.worker_enable_remote_control,
        control_allowed: celery.worker_remote_control_allowed.clone(),
        settings: celery.shown(),
        gossip: true,
        propagation: traces::propagation(),
    }
}
