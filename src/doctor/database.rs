//! Checks of the operations database.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::oneshot;

use super::{Check, Doctor, Finding, Outcome, scheduled};
use crate::advice;
use crate::clock;
use crate::settings::DatabaseType;
use crate::transfer::database::{Database, DatabaseError};
use crate::transfer::repository::{LocationMap, Repository};
use crate::transfer::routing::queue_name;
use crate::transfer::schema::SchemaError;
use service_connection::error_chain::chain;

/// Limits for the difference of two clocks: below the first they agree, above the second they are certainly wrong.
const CLOCKS_DIFFER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

impl Doctor {
    /// Checks the database, and the places that it names. `names` receives the queues.
    pub(super) async fn check_database_and_locations(
        &self,
        names: oneshot::Sender<Vec<String>>,
    ) -> (Vec<Finding>, Vec<Finding>) {
        let (mut findings, map) = self.check_database().await;
        let Some(map) = map else {
            // The receiver then continues without the names.
            drop(names);
            let places = self.check_bbcp_only().await;
            return (findings, places);
        };
        findings.extend(self.unknown_sites(&map));
        // The receiver is gone if the broker cannot be reached.
        let _ = names.send(self.queues_of(&map));
        let places = self.check_locations(&map).await;
        (findings, places)
    }

    async fn check_database(&self) -> (Vec<Finding>, Option<LocationMap>) {
        let settings = &self.settings.ops_db;
        let mut database = None;
        // Done even if the check is skipped, since other checks need the connection.
        let connecting = async {
            match Database::connect(settings).await {
                Ok(connected) => {
                    database = Some(connected);
                    Outcome::green("it answers")
                }
                Err(error) => explain(&error, settings.database_type),
            }
        };
        let mut findings = self.always(Check::Database, connecting).await;
        let Some(database) = database else {
            let why = "the database cannot be reached";
            findings.extend(self.skipped(Check::Schema, "", why));
            findings.extend(self.skipped(Check::Partials, "", why));
            findings.extend(self.skipped(Check::Scheduled, "", why));
            findings.extend(self.skipped(Check::Clock, "database", why));
            return (findings, None);
        };

        let mut map = None;
        let mut open = None;
        let checks = async {
            let labels = settings.text_enum_labels;
            let repository = match Repository::open(database.clone(), labels).await {
                Ok(repository) => repository,
                Err(error) => return schema_mismatch(&error),
            };
            let repository = open.insert(repository);
            match repository.map().await {
                Ok(found) => map = Some(found),
                Err(error) => {
                    return Outcome::red(
                        chain(&error).to_string(),
                        "let this user read the tables of the ops-db",
                    );
                }
            }
            match migration::pending_worker_migrations(database.connection()).await {
                Ok(pending) if pending.is_empty() => {
                    Outcome::green("all needed tables and columns exist")
                }
                Ok(pending) => Outcome::yellow(
                    format!(
                        "all needed tables exist, but migrations are pending: {}",
                        pending.join(", ")
                    ),
                    "run `ccat-transfer db migrate`",
                ),
                Err(error) => Outcome::yellow(
                    format!("the applied migrations cannot be read: {error}"),
                    "let this user read transfer_worker_migration",
                ),
            }
        };
        findings.extend(self.always(Check::Schema, checks).await);
        findings.extend(match &open {
            Some(repository) => {
                let partials = check_partials(repository);
                self.check(Check::Partials, "", partials).await
            }
            None => self.skipped(Check::Partials, "", "the schema does not match"),
        });
        findings.extend(match &open {
            Some(repository) => {
                let after = self.settings.manager.reconcile_after;
                let scheduled = scheduled::check(repository, after);
                self.check(Check::Scheduled, "", scheduled).await
            }
            None => self.skipped(Check::Scheduled, "", "the schema does not match"),
        });
        let clock = async {
            let asked = clock::now();
            match database.now().await {
                Ok(theirs) => compare_clocks(theirs, asked, clock::now(), Duration::ZERO),
                Err(error) => Outcome::red(chain(&error).to_string(), "check that it answers"),
            }
        };
        findings.extend(self.check(Check::Clock, "database", clock).await);
        (findings, map)
    }

    /// Makes a check that others depend on, and reports it only if it is not skipped.
    async fn always(&self, check: Check, work: impl Future<Output = Outcome>) -> Vec<Finding> {
        if self.options.skip.contains(&check) {
            let _ = tokio::time::timeout(self.options.limit, work).await;
            return Vec::new();
        }
        self.check(check, "", work).await.into_iter().collect()
    }

    fn unknown_sites(&self, map: &LocationMap) -> Vec<Finding> {
        let known = || {
            let mut names: Vec<_> = sites(map).collect();
            names.sort_unstable();
            names.dedup();
            names
        };
        let unknown = |site: &&String| !sites(map).any(|known| known == site.as_str());
        let finding = |site: &String| Finding {
            check: Check::Database,
            subject: site.clone(),
            verdict: super::Verdict::Red,
            found: "there is no location at a site of this short name".into(),
            advice: Some(format!("the database has {}", known().join(", "))),
        };
        let sites = self.options.sites.iter();
        sites.filter(unknown).map(finding).collect()
    }

    /// Returns true if the checks include the site.
    pub(super) fn includes(&self, site: &str) -> bool {
        self.options.sites.is_empty() || self.options.sites.iter().any(|wanted| wanted == site)
    }

    fn queues_of(&self, map: &LocationMap) -> Vec<String> {
        let prefix = &self.settings.transfer.queue_prefix;
        map.locations
            .iter()
            .filter_map(|location| Some((location, location.site.as_ref()?)))
            .filter(|(_, site)| self.includes(&site.short_name))
            .map(|(location, site)| queue_name(prefix, &site.short_name, &location.name))
            .collect()
    }
}

/// Checks for partial copies that no attempt will complete.
async fn check_partials(repository: &Repository) -> Outcome {
    let partials = match repository.partials_of_ended().await {
        Ok(partials) => partials,
        Err(error) => {
            return Outcome::yellow(
                chain(&error).to_string(),
                "let this user read transfer_worker_attempt",
            );
        }
    };
    if partials.is_empty() {
        return Outcome::green("no partial copy of an ended transfer is recorded");
    }
    let bytes: u64 = partials.iter().map(|partial| partial.bytes).sum();
    Outcome::yellow(
        format!(
            "{} partial copies of ended transfers are recorded, with {bytes} bytes",
            partials.len()
        ),
        "run `ccat-transfer transfers clean` on a host that reaches their destinations",
    )
}

fn sites(map: &LocationMap) -> impl Iterator<Item = &str> {
    let sites = map.locations.iter().filter_map(|l| l.site.as_ref());
    sites.map(|site| site.short_name.as_str())
}

fn explain(error: &DatabaseError, kind: DatabaseType) -> Outcome {
    let found = format!("{}{}", chain(error), advice::database_command(error));
    let advice = match (error, kind) {
        (DatabaseError::Missing(_), _) => {
            "correct ops_db.database_sqlite_database, or run `ccat-transfer db migrate` to create one"
        }
        (_, DatabaseType::Sqlite) => "let this user read and write the file and its directory",
        (error, DatabaseType::Postgresql) if error.is_pooled() => {
            "point ops_db.database_postgresql_host and _port to the server, or set pool_mode = session in pgbouncer.ini"
        }
        (error, DatabaseType::Postgresql) if error.is_unreachable() => {
            "start it, or correct ops_db.database_postgresql_host and _port, and the firewall"
        }
        (_, DatabaseType::Postgresql) => {
            "correct ops_db.database_postgresql_user, _password, _database or the _ssl… keys, or the server's pg_hba.conf"
        }
    };
    Outcome::red(found, advice)
}

fn schema_mismatch(error: &SchemaError) -> Outcome {
    let SchemaError::Differs(differences) = error else {
        return Outcome::red(
            chain(error).to_string(),
            "let this user read the tables of the ops-db",
        );
    };
    let is_own = |table: &str| entity::WORKER_TABLES.contains(&table);
    let shown: Vec<_> = differences.iter().map(ToString::to_string).collect();
    let advice = match differences.iter().all(|d| is_own(d.table())) {
        true => "run `ccat-transfer db migrate`: these tables are this program's own",
        false => {
            "check that [ops_db] names the right database, and update its schema with ccat_ops_db's Alembic \
             migrations; `ccat-transfer db migrate` creates it only in an empty database"
        }
    };
    Outcome::red(shown.join("; "), advice)
}

/// Compares a clock that was read between two readings of ours, with the resolution `grain`.
pub(super) fn compare_clocks(
    theirs: DateTime<Utc>,
    asked: DateTime<Utc>,
    answered: DateTime<Utc>,
    grain: Duration,
) -> Outcome {
    let grain = chrono::TimeDelta::from_std(grain).unwrap_or_default();
    // Any reading between the two counts as no difference.
    let difference = if theirs + grain < asked {
        asked - theirs - grain
    } else if theirs > answered {
        theirs - answered
    } else {
        chrono::TimeDelta::zero()
    };
    let difference = difference.to_std().unwrap_or_default();
    let side = if theirs < asked { "behind" } else { "ahead of" };
    let shown = humantime::format_duration(Duration::from_secs(difference.as_secs()));
    let found = format!("it is {shown} {side} this host's clock");
    let advice = "synchronise both (chrony, ntpd): `chronyc tracking`, `timedatectl`";
    match difference {
        d if d > CLOCKS_DIFFER.1 => Outcome::red(found, advice),
        d if d > CLOCKS_DIFFER.0 => Outcome::yellow(found, advice),
        _ => Outcome::green("it agrees with this host's clock"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::super::Verdict;
    use super::*;

    #[rstest]
    #[case(0, Verdict::Green)]
    #[case(-3, Verdict::Green)]
    #[case(7, Verdict::Green)]
    #[case(20, Verdict::Yellow)]
    #[case(-20, Verdict::Yellow)]
    #[case(3600, Verdict::Red)]
    #[case(-3600, Verdict::Red)]
    fn clocks(#[case] seconds: i64, #[case] verdict: Verdict) {
        let asked = clock::now();
        let answered = asked + chrono::TimeDelta::seconds(2);
        let theirs = asked + chrono::TimeDelta::seconds(seconds);
        let outcome = compare_clocks(theirs, asked, answered, Duration::from_secs(1));
        assert_eq!(outcome.verdict, verdict, "{}", outcome.found);
    }
}
