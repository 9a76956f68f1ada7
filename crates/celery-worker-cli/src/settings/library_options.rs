//! Conversion of `[celery]` into the options of the library: broker, queues, result backend and worker.

use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;

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
use celery_worker::results::{
    DatabaseOptions, Expires, RedisOptions, RedisTls, ResultOptions, TableName,
};
use celery_worker::worker::{Config, DefaultOptions, RateLimit};

impl From<&Celery> for ResultOptions {
    fn from(celery: &Celery) -> Self {
        let transport = &celery.result_backend_transport_options;
        let tls = &celery.redis_backend_use_ssl;
        let (names, schemas) = (&celery.database_table_names, &celery.database_table_schemas);
        let table = |schema: &str, name: &str| TableName {
            schema: schema.to_owned(),
            name: name.to_owned(),
        };
        Self {
            url: SecretString::from(celery.result_backend()),
            expires: Expires {
                results: celery.result_expires,
                // -1 is for "as the others".
                failures: u64::try_from(celery.result_failure_expires).ok(),
                chords: u64::try_from(celery.result_chord_expires).ok(),
            },
            persistent: celery.result_persistent,
            compression: Method::of(&celery.result_compression),
            redis: RedisOptions {
                key_prefix: transport.global_keyprefix.clone(),
                master_name: transport.master_name.clone(),
                chord_ordered: transport.result_chord_ordered,
                tls: RedisTls {
                    certificate: tls.ssl_cert_reqs.clone(),
                    authorities: tls.ssl_ca_certs.clone(),
                    client_certificate: tls.ssl_certfile.clone(),
                    client_key: tls.ssl_keyfile.clone(),
                },
            },
            database: DatabaseOptions {
                application_name: DatabaseOptions::default().application_name,
                create_tables: celery.database_create_tables_at_setup,
                tasks: table(&schemas.task, &names.task),
                groups: table(&schemas.group, &names.group),
            },
        }
    }
}

impl Celery {
    /// Options of a connection to the broker for `product`, under a name that its management shows.
    #[must_use]
    pub fn broker_options(&self, name: &str, product: Product) -> BrokerOptions {
        match redis::has_scheme(self.broker_url()) {
            true => BrokerOptions::Redis(Box::new(self.redis_options(name))),
            false => BrokerOptions::Amqp(amqp::AmqpOptions {
                product,
                ..self.amqp_options(name)
            }),
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
        RedisBrokerOptions {
            url: self.broker_url.clone(),
            name: name.to_owned(),
            connection_timeout: Duration::from_secs(self.broker_connection_timeout),
            tls: RedisTls {
                authorities: self.broker_ssl_ca_file.clone(),
                client_certificate: self.broker_ssl_cert_file.clone(),
                client_key: self.broker_ssl_key_file.clone(),
                ..RedisTls::default()
            },
            no_declare: self.no_declare,
            reconnect: self.reconnect(),
            transport: self.broker_transport_options.clone(),
        }
    }

    fn reconnect(&self) -> Reconnect {
        Reconnect {
            retry: self.broker_connection_retry,
            on_startup: self.broker_connection_retry_on_startup,
            max_retries: self.broker_connection_max_retries,
        }
    }

    /// Options of a connection to RabbitMQ under a name that its management shows.
    #[must_use]
    pub fn amqp_options(&self, name: &str) -> amqp::AmqpOptions {
        amqp::AmqpOptions {
            product: Product::default(),
            url: self.broker_url.clone(),
            name: name.to_owned(),
            heartbeat: self.broker_heartbeat,
            connection_timeout: Duration::from_secs(self.broker_connection_timeout),
            tls: amqp::AmqpTls {
                ca_file: self.broker_ssl_ca_file.clone(),
                cert_file: self.broker_ssl_cert_file.clone(),
                key_file: self.broker_ssl_key_file.clone(),
            },
            no_declare: self.no_declare,
            reconnect: self.reconnect(),
        }
    }

    /// The declarations of the queues.
    #[must_use]
    pub fn task_queue_declarations(&self) -> TaskQueues {
        TaskQueues::new(&self.into())
    }

    /// The configuration of a worker with the node name `hostname` that consumes `queues`.
    pub(crate) fn worker_config(&self, hostname: String, queues: Vec<String>) -> Config {
        let limit = |seconds: f64| (seconds > 0.0).then_some(seconds);
        let rate_limit = self.task_default_rate_limit.parse::<RateLimit>().ok();
        Config {
            hostname,
            product: Product::default(),
            queues,
            task_queues: self.task_queue_declarations(),
            default_queue: self.task_default_queue.clone(),
            chord_join_timeout: seconds(self.result_chord_join_timeout),
            chord_retry_interval: seconds(self.result_chord_retry_interval),
            concurrency: self.concurrency(),
            prefetch_multiplier: self.worker_prefetch_multiplier,
            accept: Accept::new(&self.accept_content, self.max_body_bytes),
            tasks: DefaultOptions {
                acks_late: self.task_acks_late,
                acks_on_failure: self.task_acks_on_failure,
                acks_on_timeout: self.task_acks_on_timeout,
                ignore_result: self.task_ignore_result,
                store_errors_even_if_ignored: self.task_store_errors_even_if_ignored,
                track_started: self.task_track_started,
                time_limit: limit(self.task_time_limit),
                soft_time_limit: limit(self.task_soft_time_limit),
                rate_limit,
            },
            rate_limits: !self.worker_disable_rate_limits,
            result_extended: self.result_extended,
            deduplicate: self.worker_deduplicate_successful_tasks,
            eta_hold: self.worker_eta_hold,
            eta_task_limit: self.worker_eta_task_limit,
            warm_shutdown: None,
            soft_shutdown: seconds(self.worker_soft_shutdown_timeout),
            heartbeat_interval: seconds(self.worker_heartbeat_interval),
            task_events: self.worker_send_task_events,
            task_sent_events: self.task_send_sent_event,
            remote_control: self.worker_enable_remote_control,
            control_allowed: self.worker_remote_control_allowed.clone(),
            settings: self.shown(),
            gossip: true,
            propagation: traces::propagation(),
        }
    }
}

impl From<&Celery> for QueueSettings {
    fn from(celery: &Celery) -> Self {
        Self {
            task_queues: celery.task_queues.clone(),
            task_default_queue: celery.task_default_queue.clone(),
            task_default_exchange: celery.task_default_exchange.clone(),
            task_default_exchange_type: celery.task_default_exchange_type,
            task_default_routing_key: celery.task_default_routing_key.clone(),
            task_default_queue_type: celery.task_default_queue_type,
            task_create_missing_queue_type: celery.task_create_missing_queue_type,
            task_create_missing_queue_exchange_type: celery.task_create_missing_queue_exchange_type,
            task_queue_max_priority: celery.task_queue_max_priority,
            broker_native_delayed_delivery: celery.broker_native_delayed_delivery,
            broker_native_delayed_delivery_queue_type: celery
                .broker_native_delayed_delivery_queue_type,
        }
    }
}

/// Converts a number of seconds that was checked before.
fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or(Duration::MAX)
}
