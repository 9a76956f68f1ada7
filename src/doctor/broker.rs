//! Checks of the broker: connection, permissions of the user, and queues.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Check, Doctor, Finding, Outcome, Verdict};
use celery_worker::broker::BrokerError;
use celery_worker::broker::amqp::{
    Comparison, ConnectFailure, ConnectStage, Greeting, Permissions, Probe,
};
use celery_worker::broker::redis;
use celery_worker::broker::topology::Queue;
use service_connection::error_chain::chain;

/// Default of RabbitMQ's `consumer_timeout` from each version on (major, minor, patch); source: its change log.
const CONSUMER_TIMEOUTS: [((u32, u32, u32), Duration); 2] = [
    ((3, 8, 17), Duration::from_secs(30 * 60)),
    ((3, 8, 15), Duration::from_secs(15 * 60)),
];

/// Judges the brokers of a list by the outcome of each. A broker that cannot be used is only a warning if another one
/// replaces it.
pub(super) fn judge_all(brokers: Vec<(String, Outcome)>) -> Outcome {
    let several = brokers.len() > 1;
    let is_red = |outcome: &Outcome| outcome.verdict == Verdict::Red;
    let has_good = brokers.iter().any(|(_, outcome)| !is_red(outcome));
    let texts = brokers
        .iter()
        .map(|(url, outcome)| match several && is_red(outcome) {
            true => format!("{url}: {}", outcome.found),
            false => outcome.found.clone(),
        });
    let found = texts.collect::<Vec<_>>().join("; ");
    let worst = brokers
        .into_iter()
        .max_by_key(|(_, outcome)| (is_red(outcome), outcome.verdict == Verdict::Yellow));
    match worst {
        None => Outcome::green(found),
        Some((_, outcome)) => Outcome {
            verdict: match outcome.verdict {
                Verdict::Red if has_good => Verdict::Yellow,
                verdict => verdict,
            },
            found,
            ..outcome
        },
    }
}

impl Doctor {
    /// Checks the broker. `known` receives the names of the locations' queues after they were read from the database.
    pub(super) async fn check_broker(&self, known: oneshot::Receiver<Vec<String>>) -> Vec<Finding> {
        let celery = &self.settings.celery;
        if redis::has_scheme(celery.broker_url()) {
            return self.check_redis_broker(known).await;
        }
        let options = celery.amqp_options(&format!("ccat-transfer@{}", self.host));
        let mut probe = None;
        let connecting = async {
            let brokers = match Probe::brokers(&options) {
                Ok(brokers) => brokers,
                Err(obstacle) => return explain(&obstacle),
            };
            let mut logins = Vec::new();
            for (url, options) in brokers {
                let login = match Probe::connect(&options).await {
                    Ok(connected) => {
                        let server = match connected.greeting() {
                            Some(Greeting { product, version }) => {
                                format!(" ({product} {version})")
                            }
                            None => String::new(),
                        };
                        match probe {
                            None => probe = Some(connected),
                            Some(_) => connected.close().await,
                        }
                        Outcome::green(format!("login to {url} succeeded{server}"))
                    }
                    Err(obstacle) => explain(&obstacle),
                };
                logins.push((url, login));
            }
            judge_all(logins)
        };
        let mut findings = match self.options.skip.contains(&Check::Broker) {
            // The operator does not want a connection to the broker.
            true => return Vec::new(),
            false => Vec::from_iter(self.check(Check::Broker, "", connecting).await),
        };
        let Some(probe) = probe else {
            let why = "the login to the broker failed";
            for check in [Check::Permissions, Check::Queues, Check::ConsumerTimeout] {
                findings.extend(self.skipped(check, "", why));
            }
            return findings;
        };
        let permissions = self.check_permissions(&probe);
        findings.extend(self.check(Check::Permissions, "", permissions).await);
        let names = self.queues(known.await.unwrap_or_default());
        let queues = celery.task_queue_declarations();
        for name in names {
            let work = self.check_queue(&probe, queues.queue(&name));
            findings.extend(self.check(Check::Queues, name, work).await);
        }
        let held = async { self.check_consumer_timeout(probe.greeting()) };
        findings.extend(self.check(Check::ConsumerTimeout, "", held).await);
        probe.close().await;
        findings
    }

    /// Returns the queues to check: those of locations and of the command line, or the default one.
    pub(super) fn queues(&self, of_locations: Vec<String>) -> BTreeSet<String> {
        let mut names: BTreeSet<_> = of_locations.into_iter().collect();
        names.extend(self.options.queues.iter().cloned());
        if names.is_empty() {
            names.insert(self.settings.celery.task_default_queue.clone());
        }
        names
    }

    async fn check_permissions(&self, probe: &Probe) -> Outcome {
        // Named like the queue for remote control that every worker declares.
        let tag = Uuid::new_v4().simple().to_string();
        let name = Queue::control(&format!("doctor@{}", self.host), &tag).name;
        let Permissions {
            configure,
            write,
            read,
        } = match probe.permissions(&name).await {
            Ok(permissions) => permissions,
            Err(error @ BrokerError::Blocked { .. }) => {
                return Outcome::red(
                    chain(&error).to_string(),
                    "give the broker memory or disk space, or empty its queues: `rabbitmq-diagnostics \
                     alarms` shows which. Until then results, follow-up tasks and the manager's messages \
                     wait",
                );
            }
            Err(error) => return Outcome::red(chain(&error).to_string(), "try again"),
        };
        let tried = [
            ("configure", Some(configure)),
            ("write", Some(write)),
            ("read", read),
        ];
        let refused: Vec<_> = tried
            .into_iter()
            .filter_map(|(name, tried)| Some(format!("{name}: {}", tried?.err()?)))
            .collect();
        if refused.is_empty() {
            return Outcome::green("configure, write and read are granted");
        }
        let (user, vhost) = probe.login();
        Outcome::red(
            refused.join("; "),
            format!(
                "grant them: `rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'`, or patterns for the task \
                 queues, celery.*, .*[.]celery[.]pidbox, celeryev.* and amq[.]default"
            ),
        )
    }

    async fn check_queue(&self, probe: &Probe, queue: Queue) -> Outcome {
        let no_declare = self.settings.celery.no_declare;
        let compared = match no_declare {
            true => match probe.exists(&queue.name).await {
                Ok(true) => return Outcome::green("it exists"),
                Ok(false) => Ok(Comparison::Missing),
                Err(error) => Err(error),
            },
            false => probe.compare(&queue).await,
        };
        match compared {
            Ok(Comparison::Same {
                messages,
                consumers,
            }) => Outcome::green(format!(
                "declared as configured; {messages} messages wait, {consumers} consumers listen"
            )),
            Ok(Comparison::Missing) if no_declare => Outcome::red(
                "it is missing, and celery.no_declare does not allow declaring it",
                "declare it with a login that may configure queues",
            ),
            Ok(Comparison::Missing) => {
                Outcome::green("it does not exist yet; its first user declares it")
            }
            Ok(Comparison::Differs(difference)) => Outcome::red(
                format!(
                    "it was declared with other arguments: {difference}. The worker uses it unchanged; a \
                     producer that declares it with these settings is refused"
                ),
                format!(
                    "set its arguments in celery.task_queues.{}, or stop its users and delete it: `rabbitmqctl \
                     delete_queue {}`",
                    queue.name, queue.name
                ),
            ),
            Err(error) => Outcome::red(
                chain(&error).to_string(),
                "let the user configure, write and read it: `rabbitmqctl set_permissions`",
            ),
        }
    }

    fn check_consumer_timeout(&self, greeting: Option<&Greeting>) -> Outcome {
        let default = match greeting {
            Some(Greeting { product, version }) if product == "RabbitMQ" => {
                match (version_of(version), default_timeout(version)) {
                    (Some(_), None) => {
                        return Outcome::green(format!(
                            "RabbitMQ {version} has no consumer_timeout"
                        ));
                    }
                    (_, default) => default,
                }
            }
            _ => None,
        };
        let default = default.unwrap_or(CONSUMER_TIMEOUTS[0].1);
        let shown = humantime::format_duration(default);
        let hold = self.settings.celery.worker_eta_hold;
        let outcome = Outcome::green(format!(
            "it cannot be read over AMQP; RabbitMQ's default is {shown}. A longer transfer continues, and \
             its redelivered message joins it"
        ));
        match hold >= default {
            true => Outcome {
                verdict: Verdict::Yellow,
                advice: Some(format!(
                    "lower celery.worker_eta_hold ({}), or raise consumer_timeout in rabbitmq.conf: the \
                     broker requeues messages that wait longer for their eta",
                    humantime::format_duration(hold)
                )),
                ..outcome
            },
            false => outcome,
        }
    }
}

fn explain(ConnectFailure { stage, reason }: &ConnectFailure) -> Outcome {
    let (what, advice) = match stage {
        ConnectStage::Settings => (
            "settings",
            "correct celery.broker_url and celery.broker_ssl_…",
        ),
        ConnectStage::Name => (
            "host name",
            "correct the host in celery.broker_url, or the resolver: `getent hosts HOST`",
        ),
        ConnectStage::Tcp => (
            "connection",
            "start the broker, or correct host and port in celery.broker_url, and the firewall",
        ),
        ConnectStage::Tls => (
            "TLS",
            "check that the port is the one for TLS, that celery.broker_ssl_ca_file contains the authority \
             of the broker's certificate, and that the certificate is for this host name",
        ),
        ConnectStage::Protocol => (
            "AMQP",
            "check that the port is RabbitMQ's port for AMQP (5672; with amqps:// 5671)",
        ),
        ConnectStage::Login => (
            "login",
            "correct user and password in celery.broker_url, or `rabbitmqctl change_password USER`; `guest` \
             can log in only from the broker's own host",
        ),
        ConnectStage::VirtualHost => (
            "virtual host",
            "correct the path of celery.broker_url, or `rabbitmqctl add_vhost VHOST` and `rabbitmqctl set_permissions -p \
             VHOST USER '.*' '.*' '.*'`",
        ),
    };
    Outcome::red(format!("{what}: {reason}"), advice)
}

fn version_of(version: &str) -> Option<(u32, u32, u32)> {
    let core = version.split(['-', '+']).next()?;
    let mut parts = core.split('.').map(|part| part.parse().ok());
    Some((
        parts.next()??,
        parts.next()??,
        parts.next().flatten().unwrap_or(0),
    ))
}

fn default_timeout(version: &str) -> Option<Duration> {
    let version = version_of(version)?;
    CONSUMER_TIMEOUTS
        .into_iter()
        .find(|(since, _)| version >= *since)
        .map(|(_, timeout)| timeout)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("3.8.14", None)]
    #[case("3.8.16", Some(15))]
    #[case("3.10.8", Some(30))]
    #[case("4.3.0-rc.1", Some(30))]
    #[case("unknown", None)]
    fn timeouts_by_version(#[case] version: &str, #[case] minutes: Option<u64>) {
        let expected = minutes.map(|minutes| Duration::from_secs(minutes * 60));
        assert_eq!(default_timeout(version), expected);
    }
}
