//! Conversion of `[celery]` into the options of the library: broker, queues, result backend and worker.

use std::sync::Arc;
use std::time::Duration;

use super::Celery;
use crate::traces;
use celery_protocol::compression::Method;
use celery_protocol::content::Accept;
use celery_worker::Product;
use celery_worker::broker::amqp;
use celery_worker::broker::redis::{self, RedisBrokerOptions};
use celery_worker::broker::{
    Broker, BrokerError, BrokerOptions, QueueSettings, Reconnect, TaskQueues,
};
use celery_worker::liveness::LivenessRegistry;
use celery_worker::results::{ResultOptions, TableName};
use celery_worker::worker::{Config, RateLimit};

impl From<&Celery> for ResultOptions {
    fn from(celery: &Celery) -> Self {
        let transport = &celery.result_backend_transport_options;
        let tls = &celery.redis_backend_use_ssl;
        let (names, schemas) = (&celery.database_table_names, &celery.database_table_schemas);

        let mut options = Self::new(celery.result_backend());
        options.persistent = celery.result_persistent;
        options.serializer = celery.result_serializer;
        options.compression = Method::of(&celery.result_compression);

        let expires = &mut options.expires;
        expires.results = celery.result_expires;
        // -1 is for "as the others".
        expires.failures = u64::try_from(celery.result_failure_expires).ok();
        expires.chords = u64::try_from(celery.result_chord_expires).ok();

        let redis = &mut options.redis;
        redis.key_prefix.clone_from(&transport.global_keyprefix);
        redis.master_name.clone_from(&transport.master_name);
        redis.chord_ordered = transport.result_chord_ordered;
        redis.tls.certificate.clone_from(&tls.ssl_cert_reqs);
        redis.tls.authorities.clone_from(&tls.ssl_ca_certs);
        redis.tls.client_certificate.clone_from(&tls.ssl_certfile);
        redis.tls.client_key.clone_from(&tls.ssl_keyfile);

        let database = &mut options.database;
        database.create_tables = celery.database_create_tables_at_setup;
        database.tasks = TableName::new(&*schemas.task, &*names.task);
        database.groups = TableName::new(&*schemas.group, &*names.group);
        options
    }
}

impl Celery {
    /// Options of a connection to the broker for `product`, under a name that its management shows.
    #[must_use]
    pub fn broker_options(&self, name: &str, product: Product) -> BrokerOptions {
        match redis::has_scheme(self.broker_url()) {
            true => BrokerOptions::Redis(Box::new(self.redis_options(name))),
            false => {
                let mut options = self.amqp_options(name);
                options.product = product;
                BrokerOptions::Amqp(options)
            }
        }
    }

    /// Creates a connection to the broker, under a name that its management shows.
    ///
    /// # Errors
    /// The broker's URL cannot be used.
    pub fn open_broker(&self, name: &str) -> Result<Arc<dyn Broker>, BrokerError> {
        let options = self.broker_options(name, Product::default());
        options.open(&LivenessRegistry::default())
    }

    /// Options of a connection to Redis as the broker.
    #[must_use]
    pub fn redis_options(&self, name: &str) -> RedisBrokerOptions {
        let mut options = RedisBrokerOptions::new(self.broker_url.clone(), name);
        options.failover = self.broker_failover_strategy;
        options.connection_timeout = Duration::from_secs(self.broker_connection_timeout);
        options.no_declare = self.no_declare;
        options.reconnect = self.reconnect();
        options.transport = self.broker_transport_options.clone();

        let tls = &mut options.tls;
        tls.authorities.clone_from(&self.broker_ssl_ca_file);
        tls.client_certificate
            .clone_from(&self.broker_ssl_cert_file);
        tls.client_key.clone_from(&self.broker_ssl_key_file);
        options
    }

    fn reconnect(&self) -> Reconnect {
        let mut reconnect = Reconnect::default();
        reconnect.retry = self.broker_connection_retry;
        reconnect.on_startup = self.broker_connection_retry_on_startup;
        reconnect.max_retries = self.broker_connection_max_retries;
        reconnect
    }

    /// Options of a connection to RabbitMQ under a name that its management shows.
    #[must_use]
    pub fn amqp_options(&self, name: &str) -> amqp::AmqpOptions {
        let mut options = amqp::AmqpOptions::new(self.broker_url.clone(), name);
        options.failover = self.broker_failover_strategy;
        options.heartbeat = self.broker_heartbeat;
        options.connection_timeout = Duration::from_secs(self.broker_connection_timeout);
        options.no_declare = self.no_declare;
        options.reconnect = self.reconnect();

        let tls = &mut options.tls;
        tls.ca_file.clone_from(&self.broker_ssl_ca_file);
        tls.cert_file.clone_from(&self.broker_ssl_cert_file);
        tls.key_file.clone_from(&self.broker_ssl_key_file);
        options
    }

    /// The declarations of the queues.
    #[must_use]
    pub fn task_queue_declarations(&self) -> TaskQueues {
        TaskQueues::new(&self.into())
    }

    /// The configuration of a worker with the node name `hostname` that consumes `queues`.
    pub(crate) fn worker_config(&self, hostname: String, queues: Vec<String>) -> Config {
        let limit = |number: f64| (number > 0.0).then(|| seconds(number));
        let mut config = Config::new(hostname, queues);
        config.task_queues = self.task_queue_declarations();
        config.default_queue.clone_from(&self.task_default_queue);
        config.chord_join_timeout = seconds(self.result_chord_join_timeout);
        config.chord_retry_interval = seconds(self.result_chord_retry_interval);
        config.concurrency = self.concurrency();
        config.prefetch_multiplier = self.worker_prefetch_multiplier;
        config.disable_prefetch = self.worker_disable_prefetch;
        config.accept = Accept::new(&self.accept_content, self.max_body_bytes);
        config.rate_limits = !self.worker_disable_rate_limits;
        config.result_extended = self.result_extended;
        config.deduplicate = self.worker_deduplicate_successful_tasks;
        config.eta_hold = self.worker_eta_hold;
        config.eta_task_limit = self.worker_eta_task_limit;
        config.soft_shutdown = seconds(self.worker_soft_shutdown_timeout);
        config.heartbeat_interval = seconds(self.worker_heartbeat_interval);
        config.task_events = self.worker_send_task_events;
        config.task_sent_events = self.task_send_sent_event;
        config.remote_control = self.worker_enable_remote_control;
        config
            .control_allowed
            .clone_from(&self.worker_remote_control_allowed);
        config.settings = self.shown();
        config.propagation = traces::propagation();

        let tasks = &mut config.tasks;
        tasks.acks_late = self.task_acks_late;
        tasks.acks_on_failure = self.task_acks_on_failure;
        tasks.acks_on_timeout = self.task_acks_on_timeout;
        tasks.ignore_result = self.task_ignore_result;
        tasks.store_errors_even_if_ignored = self.task_store_errors_even_if_ignored;
        tasks.track_started = self.task_track_started;
        tasks.time_limit = limit(self.task_time_limit);
        tasks.soft_time_limit = limit(self.task_soft_time_limit);
        tasks.rate_limit = self.task_default_rate_limit.parse::<RateLimit>().ok();
        config
    }
}

impl From<&Celery> for QueueSettings {
    fn from(celery: &Celery) -> Self {
        let mut settings = Self::default();
        settings.task_queues.clone_from(&celery.task_queues);
        settings.task_routes.clone_from(&celery.task_routes);
        settings
            .task_default_queue
            .clone_from(&celery.task_default_queue);
        settings
            .task_default_exchange
            .clone_from(&celery.task_default_exchange);
        settings.task_default_exchange_type = celery.task_default_exchange_type;
        settings
            .task_default_routing_key
            .clone_from(&celery.task_default_routing_key);
        settings.task_default_queue_type = celery.task_default_queue_type;
        settings.task_create_missing_queue_type = celery.task_create_missing_queue_type;
        settings.task_create_missing_queue_exchange_type =
            celery.task_create_missing_queue_exchange_type;
        settings.task_queue_max_priority = celery.task_queue_max_priority;
        settings.broker_native_delayed_delivery = celery.broker_native_delayed_delivery;
        settings.broker_native_delayed_delivery_queue_type =
            celery.broker_native_delayed_delivery_queue_type;
        settings
    }
}

/// Key of the setting for an option of [`AmqpOptions`] that an error of the library names.
pub(crate) fn key_of_broker_option(option: &str) -> Option<&'static str> {
    Some(match option {
        "tls.ca_file" => "celery.broker_ssl_ca_file",
        "tls.cert_file" => "celery.broker_ssl_cert_file",
        "tls.key_file" => "celery.broker_ssl_key_file",
        "reconnect.retry" => "celery.broker_connection_retry",
        "reconnect.on_startup" => "celery.broker_connection_retry_on_startup",
        "reconnect.max_retries" => "celery.broker_connection_max_retries",
        _ => return None,
    })
}

/// Converts a number of seconds that was checked before.
fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or(Duration::MAX)
}
