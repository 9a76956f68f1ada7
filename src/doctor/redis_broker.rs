//! Checks of Redis as the broker: the server, the permissions of the user, and queues.

use std::time::Duration;

use tokio::sync::oneshot;

use super::broker::judge_all;
use super::database::compare_clocks;
use super::{Check, Doctor, Finding, Outcome, Verdict};
use crate::clock;
use celery_worker::broker::BrokerError;
use celery_worker::broker::redis::{QueueState, RedisBrokerOptions, RedisProbe, ServerState};
use service_connection::error_chain::chain;

/// The oldest version with the commands that kombu 5.7 uses.
const OLDEST: (u32, u32) = (6, 2);

impl Doctor {
    /// Checks Redis as the broker. `known` receives the names of the locations' queues when they have been read from
    /// the database.
    pub(super) async fn check_redis_broker(
        &self,
        known: oneshot::Receiver<Vec<String>>,
    ) -> Vec<Finding> {
        if self.options.skip.contains(&Check::Broker) {
            return Vec::new();
        }
        let celery = &self.settings.celery;
        let options = celery.redis_options(&format!("ccat-transfer@{}", self.host));
        let mut probe = None;
        let connecting = async {
            let servers = match RedisProbe::servers(&options) {
                Ok(servers) => servers,
                Err(error) => return explain(&error),
            };
            let mut logins = Vec::new();
            for (place, options) in servers {
                let login = match ask(&options).await {
                    Ok((connected, state)) => {
                        probe.get_or_insert(connected);
                        judge(&state)
                    }
                    Err(error) => explain(&error),
                };
                logins.push((place, login));
            }
            judge_all(logins)
        };
        let mut findings = Vec::from_iter(self.check(Check::Broker, "", connecting).await);
        let Some(probe) = probe else {
            for check in [Check::Permissions, Check::Queues] {
                findings.extend(self.skipped(check, "", "the login to the broker failed"));
            }
            return findings;
        };
        let permissions = async {
            match probe.try_commands().await {
                Ok(()) => Outcome::green("all commands of a worker are allowed"),
                Err(error) => Outcome::red(
                    chain(&error).to_string(),
                    "give the user the permission: `ACL SETUSER <user> ~* &* +@all -@dangerous +info`",
                ),
            }
        };
        findings.extend(self.check(Check::Permissions, "", permissions).await);
        // Workers compare the times of deliveries with their own clocks.
        let clock = async {
            let asked = clock::now();
            match probe.time().await {
                Ok(theirs) => compare_clocks(theirs, asked, clock::now(), Duration::ZERO),
                Err(error) => explain(&error),
            }
        };
        findings.extend(self.check(Check::Clock, "broker", clock).await);
        for name in self.queues(known.await.unwrap_or_default()) {
            let work = async { judge_queue(&name, probe.queue(&name).await) };
            findings.extend(self.check(Check::Queues, &name, work).await);
        }
        findings
    }
}

/// Connects to a server, and reads its state.
async fn ask(options: &RedisBrokerOptions) -> Result<(RedisProbe, ServerState), BrokerError> {
    let probe = RedisProbe::new(options)?;
    let state = probe.server().await?;
    Ok((probe, state))
}

fn explain(error: &BrokerError) -> Outcome {
    let advice = match error {
        BrokerError::Refused { .. } => "correct user and password in celery.broker_url",
        BrokerError::Url(_) => "correct celery.broker_url or celery.broker_transport_options",
        _ => "start Redis, or correct host and port in celery.broker_url",
    };
    Outcome::red(chain(error).to_string(), advice)
}

/// Judges the state of a server; reports only its worst property.
fn judge(state: &ServerState) -> Outcome {
    let ServerState {
        place,
        version,
        held,
        ..
    } = state;
    let found =
        format!("login to {place} succeeded (Redis {version}); workers hold {held} messages");
    if !state.is_master {
        return Outcome::red(
            format!("{found}. The server is a replica"),
            "give the URL of the master, or of its sentinels (sentinel://)",
        );
    }
    if version_of(version).is_some_and(|version| version < OLDEST) {
        return Outcome::red(
            format!("{found}. The version is too old"),
            "install Redis 6.2 or later",
        );
    }
    let yellow = |why: String, advice: &str| Outcome {
        verdict: Verdict::Yellow,
        ..Outcome::red(format!("{found}. {why}"), advice)
    };
    if state.eviction_policy != "noeviction" {
        let policy = &state.eviction_policy;
        return yellow(
            format!(
                "With maxmemory-policy {policy}, a server without free memory deletes messages"
            ),
            "set `maxmemory-policy noeviction` in redis.conf",
        );
    }
    if state.parked_entries > 0 {
        return yellow(
            format!(
                "{} entries of dead workers are not messages",
                state.parked_entries
            ),
            "read the list celery-worker.parked-entries with redis-cli, then delete it",
        );
    }
    if state.expired > 0 {
        return yellow(
            format!("{} messages of dead workers have expired", state.expired),
            "start a worker, which returns them to their queues",
        );
    }
    if !state.is_persistent {
        return yellow(
            "The server writes nothing to disk: its restart loses all messages".into(),
            "set `appendonly yes` in redis.conf; without it, the manager has to send lost messages again",
        );
    }
    Outcome::green(found)
}

fn judge_queue(name: &str, state: Result<QueueState, BrokerError>) -> Outcome {
    match state {
        Ok(QueueState {
            messages,
            parked: 0,
        }) => Outcome::green(format!("{messages} messages wait")),
        Ok(QueueState { messages, parked }) => Outcome {
            verdict: Verdict::Yellow,
            ..Outcome::red(
                format!("{messages} messages wait; {parked} elements are not messages"),
                format!(
                    "`ccat-transfer parked list {name}` shows them, `parked delete` deletes them"
                ),
            )
        },
        Err(error) => Outcome::red(
            chain(&error).to_string(),
            "check that no other program uses a key with the name of this queue",
        ),
    }
}

fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn healthy() -> ServerState {
        ServerState {
            place: "redis://h:6379".into(),
            version: "7.0.15".into(),
            is_master: true,
            is_persistent: true,
            eviction_policy: "noeviction".into(),
            held: 0,
            expired: 0,
            parked_entries: 0,
        }
    }

    #[rstest]
    #[case(|_: &mut ServerState| (), Verdict::Green)]
    #[case(|state: &mut ServerState| state.is_master = false, Verdict::Red)]
    #[case(|state: &mut ServerState| state.version = "6.0.16".into(), Verdict::Red)]
    #[case(|state: &mut ServerState| state.version = "8.0.1".into(), Verdict::Green)]
    #[case(|state: &mut ServerState| state.eviction_policy = "allkeys-lru".into(), Verdict::Yellow)]
    #[case(|state: &mut ServerState| state.is_persistent = false, Verdict::Yellow)]
    #[case(|state: &mut ServerState| state.expired = 1, Verdict::Yellow)]
    #[case(|state: &mut ServerState| state.parked_entries = 1, Verdict::Yellow)]
    fn servers_are_judged(#[case] change: fn(&mut ServerState), #[case] expected: Verdict) {
        let mut state = healthy();
        change(&mut state);
        assert_eq!(judge(&state).verdict, expected);
    }
}
