//! Counters of the events of Celery's tasks, under celery-exporter's names and labels.
//!
//! celery-exporter counts the events that workers send. This module counts the same events where they occur, even if
//! the worker sends no events: a dashboard made for the exporter shows the same numbers, and no event is lost between
//! worker and exporter.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    Error, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};

use super::Registered;
use crate::program::Program;
use celery_protocol::event::Event;
use celery_worker::observer::{BrokerConnection, Observer};

/// Upper bounds of the buckets in seconds: the usual ones of Prometheus' clients, and further ones up to half a day,
/// because a task may copy for hours.
const RUNTIMES: [f64; 19] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0,
    3600.0, 10_800.0, 21_600.0, 43_200.0,
];

/// Label for names of tasks that the worker does not have: a sender of messages can invent such names.
const UNKNOWN: &str = "unknown";

/// Label for classes of exceptions beyond [`MAX_EXCEPTION_CLASSES`], and for names that are not valid.
const OTHER: &str = "other";

/// Maximum number of classes of exceptions with a counter of their own; the first ones get it. Tasks raise fewer by
/// themselves, but a task may pass on a class name that comes from its caller or from a server.
const MAX_EXCEPTION_CLASSES: usize = 64;

/// Maximum length of the name of a class that has a counter, in bytes.
const MAX_CLASS_CHARS: usize = 128;

/// Counters for the tasks of one worker.
#[derive(Debug, Clone)]
pub struct TaskMetrics {
    /// Host of the node, i.e. the part behind the `@`, as in the exporter.
    hostname: String,
    received: IntCounterVec,
    started: IntCounterVec,
    succeeded: IntCounterVec,
    failed: IntCounterVec,
    classes: ExceptionClasses,
    retried: IntCounterVec,
    rejected: IntCounterVec,
    revoked: IntCounterVec,
    sent: IntCounterVec,
    runtime: HistogramVec,
    up: IntGaugeVec,
    active: IntGaugeVec,
    connected: IntGauge,
    blocked: IntGauge,
    reconnects: IntCounter,
}

impl TaskMetrics {
    /// Creates the counters for the worker or producer `node`, e.g. `celery@host`. The names of the broker's metrics begin
    /// with the identifier of `program`; all others are those of celery-exporter.
    ///
    /// # Errors
    /// See [`super::Metrics::new`].
    pub fn new(program: Program, node: &str) -> Result<Self, Error> {
        let program = program.identifier();
        let counter = |name: &str, help: &str| {
            IntCounterVec::new(Opts::new(name, help), &["name", "hostname", "queue_name"])
        };
        let gauge = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["hostname"]);
        Ok(Self {
            hostname: node.rsplit('@').next().unwrap_or(node).to_owned(),
            received: counter(
                "celery_task_received_total",
                "Tasks that the worker has received.",
            )?,
            started: counter("celery_task_started_total", "Tasks that have begun.")?,
            succeeded: counter("celery_task_succeeded_total", "Tasks that have succeeded.")?,
            failed: IntCounterVec::new(
                Opts::new(
                    "celery_task_failed_total",
                    "Tasks that have failed, by the class of the exception.",
                ),
                &["name", "hostname", "exception", "queue_name"],
            )?,
            classes: ExceptionClasses::default(),
            retried: counter(
                "celery_task_retried_total",
                "Tasks that have failed and will run again.",
            )?,
            rejected: counter(
                "celery_task_rejected_total",
                "Tasks that have refused their message.",
            )?,
            revoked: counter(
                "celery_task_revoked_total",
                "Tasks that were revoked, terminated, or too late.",
            )?,
            sent: counter(
                "celery_task_sent_total",
                "Tasks that this process has sent to a queue.",
            )?,
            runtime: HistogramVec::new(
                HistogramOpts::new(
                    "celery_task_runtime",
                    "Run time of tasks that have succeeded, in seconds.",
                )
                .buckets(RUNTIMES.to_vec()),
                &["name", "hostname", "queue_name"],
            )?,
            up: gauge("celery_worker_up", "1 if the worker runs.")?,
            active: gauge(
                "celery_worker_tasks_active",
                "Tasks that run, as of the last heartbeat.",
            )?,
            connected: IntGauge::new(
                format!("{program}_broker_connected"),
                "1 if all queues of the worker are consumed.",
            )?,
            blocked: IntGauge::new(
                format!("{program}_broker_blocked"),
                "1 if the broker is short of memory or disk space and accepts no messages from the worker, \
                 as of the last heartbeat.",
            )?,
            reconnects: IntCounter::new(
                format!("{program}_broker_reconnects_total"),
                "Number of times that all queues were consumed again after an interruption.",
            )?,
        })
    }

    /// Metrics that a worker exports.
    #[must_use]
    pub fn of_worker(&self) -> Vec<Box<dyn Registered>> {
        let mut all: Vec<Box<dyn Registered>> = [
            &self.received,
            &self.started,
            &self.succeeded,
            &self.failed,
            &self.retried,
            &self.rejected,
            &self.revoked,
        ]
        .map(|counter| Box::new(counter.clone()) as Box<dyn Registered>)
        .into();
        all.push(Box::new(self.runtime.clone()));
        all.push(Box::new(self.up.clone()));
        all.push(Box::new(self.active.clone()));
        all.push(Box::new(self.connected.clone()));
        all.push(Box::new(self.blocked.clone()));
        all.push(Box::new(self.reconnects.clone()));
        all.extend(self.of_producer());
        all
    }

    /// Metrics that a process exports which only sends tasks.
    #[must_use]
    pub fn of_producer(&self) -> Vec<Box<dyn Registered>> {
        vec![Box::new(self.sent.clone())]
    }

    /// Counts a task that was sent.
    pub fn sent(&self, task: &str, queue: &str) {
        self.sent
            .with_label_values(&[task, &self.hostname, queue])
            .inc();
    }
}

impl Observer for TaskMetrics {
    /// Creates the counters of a task with the value 0, so that its first event is an increase.
    fn expect_task(&self, task: &str, queue: &str) {
        let labels = [task, &self.hostname, queue];
        for counter in [
            &self.received,
            &self.started,
            &self.succeeded,
            &self.retried,
            &self.rejected,
            &self.revoked,
        ] {
            counter.with_label_values(&labels);
        }
        self.failed
            .with_label_values(&[task, &self.hostname, "", queue]);
        self.runtime.with_label_values(&labels);
    }

    fn task_event(&self, task: Option<&str>, queue: &str, event: &Event<'_>) {
        let task = task.unwrap_or(UNKNOWN);
        let labels = [task, &self.hostname, queue];
        match event {
            Event::TaskReceived(_) => self.received.with_label_values(&labels).inc(),
            Event::TaskStarted(_) => self.started.with_label_values(&labels).inc(),
            Event::TaskSucceeded { runtime, .. } => {
                self.succeeded.with_label_values(&labels).inc();
                self.runtime.with_label_values(&labels).observe(*runtime);
            }
            Event::TaskFailed { exception, .. } => {
                let class = self.classes.label(&exception.exc_type);
                self.failed
                    .with_label_values(&[task, &self.hostname, class, queue])
                    .inc();
            }
            Event::TaskRetried { .. } => self.retried.with_label_values(&labels).inc(),
            Event::TaskRejected { .. } => self.rejected.with_label_values(&labels).inc(),
            Event::TaskRevoked { .. } => self.revoked.with_label_values(&labels).inc(),
            Event::Progress { .. }
            | Event::WorkerOnline(_)
            | Event::WorkerHeartbeat(_)
            | Event::WorkerOffline(_)
            | Event::WorkerElectAck(_) => {}
        }
    }

    fn load(&self, active: usize) {
        let labels = [self.hostname.as_str()];
        self.up.with_label_values(&labels).set(1);
        self.active.with_label_values(&labels).set(to_i64(active));
    }

    fn worker_stopped(&self) {
        let labels = [self.hostname.as_str()];
        self.up.with_label_values(&labels).set(0);
        self.active.with_label_values(&labels).set(0);
    }

    fn broker_blocked(&self, blocked: bool) {
        self.blocked.set(i64::from(blocked));
    }

    fn broker_connection(&self, connection: BrokerConnection) {
        let is_lost = connection == BrokerConnection::Lost;
        self.connected.set(i64::from(!is_lost));
        if connection == BrokerConnection::Reconnected {
            self.reconnects.inc();
        }
    }
}

/// Classes of exceptions that have a counter of their own. Clones share them.
#[derive(Debug, Clone, Default)]
struct ExceptionClasses(Arc<Mutex<BTreeSet<String>>>);

impl ExceptionClasses {
    /// Label that a class is counted under.
    fn label<'c>(&self, class: &'c str) -> &'c str {
        // No code panics while it holds the lock.
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.contains(class) {
            return class;
        }
        if class.len() > MAX_CLASS_CHARS || seen.len() >= MAX_EXCEPTION_CLASSES {
            return OTHER;
        }
        seen.insert(class.to_owned());
        class
    }
}

/// Gauges of the queues: their messages and their consumers.
#[derive(Debug, Clone)]
pub struct QueueMetrics {
    length: IntGaugeVec,
    consumers: IntGaugeVec,
}

impl QueueMetrics {
    /// Creates the gauges, without queues.
    ///
    /// # Errors
    /// See [`super::Metrics::new`].
    pub fn new() -> Result<Self, Error> {
        let gauge =
            |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["queue_name"]);
        Ok(Self {
            length: gauge(
                "celery_queue_length",
                "Messages that wait in a queue of this worker, without those that workers hold.",
            )?,
            // promtool warns about the name, but it is the exporter's.
            consumers: gauge(
                "celery_active_consumer_count",
                "Consumers of a queue of this worker.",
            )?,
        })
    }

    /// All gauges of the queues.
    #[must_use]
    pub fn all(&self) -> [Box<dyn Registered>; 2] {
        [
            Box::new(self.length.clone()),
            Box::new(self.consumers.clone()),
        ]
    }

    /// Replaces all queues by these: name, number of messages, number of consumers if the broker knows it.
    pub fn set<'a>(&self, queues: impl IntoIterator<Item = (&'a str, u32, Option<u32>)>) {
        self.length.reset();
        self.consumers.reset();
        for (name, messages, consumers) in queues {
            self.length
                .with_label_values(&[name])
                .set(i64::from(messages));
            if let Some(consumers) = consumers {
                self.consumers
                    .with_label_values(&[name])
                    .set(i64::from(consumers));
            }
        }
    }
}

fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use celery_protocol::exception::{BUILTINS, Exception};

    #[test]
    fn tasks_are_counted_by_the_exporters_names() -> Result<(), Error> {
        let (metrics, tasks) = (
            Metrics::new(Program::new("test", "1"))?,
            TaskMetrics::new(Program::new("test", "1"), "name@host")?,
        );
        metrics.add(&tasks.of_worker())?;
        tasks.expect_task("t", "q");
        tasks.task_event(Some("t"), "q", &Event::TaskStarted("id"));
        let exception = Exception::new(BUILTINS, "KeyError", "x");
        let failed = Event::TaskFailed {
            id: "id",
            exception: &exception,
            traceback: None,
        };
        tasks.task_event(Some("t"), "q", &failed);
        tasks.load(3);
        tasks.broker_connection(BrokerConnection::Connected);
        let text = String::from_utf8_lossy(&metrics.text()?).into_owned();
        for line in [
            r#"celery_task_started_total{hostname="host",name="t",queue_name="q"} 1"#,
            r#"celery_task_succeeded_total{hostname="host",name="t",queue_name="q"} 0"#,
            r#"celery_task_failed_total{exception="KeyError",hostname="host",name="t",queue_name="q"} 1"#,
            r#"celery_task_runtime_count{hostname="host",name="t",queue_name="q"} 0"#,
            r#"celery_worker_up{hostname="host"} 1"#,
            r#"celery_worker_tasks_active{hostname="host"} 3"#,
            "test_broker_connected 1",
            "test_broker_reconnects_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        Ok(())
    }

    #[test]
    fn number_of_exception_classes_is_limited() -> Result<(), Error> {
        let (metrics, tasks) = (
            Metrics::new(Program::new("test", "1"))?,
            TaskMetrics::new(Program::new("test", "1"), "name@host")?,
        );
        metrics.add(&tasks.of_worker())?;
        let fail = |class: &str| {
            let exception = Exception::new(BUILTINS, class, "x");
            let failed = Event::TaskFailed {
                id: "id",
                exception: &exception,
                traceback: None,
            };
            // Clones share the set of known classes.
            tasks.clone().task_event(Some("t"), "q", &failed);
        };
        fail(&"x".repeat(MAX_CLASS_CHARS + 1));
        for number in 0..MAX_EXCEPTION_CLASSES + 5 {
            fail(&format!("Error{number}"));
        }
        fail("Error0");
        let text = String::from_utf8_lossy(&metrics.text()?).into_owned();
        let failed: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("celery_task_failed_total{"))
            .collect();
        assert_eq!(failed.len(), MAX_EXCEPTION_CLASSES + 1, "{text}");
        let counts = |class: &str, count: &str| {
            let line = failed
                .iter()
                .find(|l| l.contains(&format!("{{exception=\"{class}\"")));
            line.is_some_and(|line| line.ends_with(count))
        };
        assert!(
            counts("Error0", " 2") && counts("Error63", " 1") && counts(OTHER, " 6"),
            "{text}"
        );
        Ok(())
    }
}
