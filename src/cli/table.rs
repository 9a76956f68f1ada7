//! Readiness check and metrics of the database.

use std::time::Duration;

use super::CliError;
use crate::metrics::TableMetrics;
use crate::transfer::database::DatabaseError;
use crate::transfer::repository::Repository;
use celery_worker_cli::health::{HealthRegistry, Probe};
use service_connection::error_chain::chain;

/// Validity of the last successful check of the database, which includes that transfers can be worked on.
const ANSWER_VALID_FOR: Duration = Duration::from_secs(2);

/// Validity of a count of all transfers: about the time between two scrapes.
const COUNT_VALID_FOR: Duration = Duration::from_secs(15);

/// Adds the readiness check of the database and the metrics of the transfers.
pub(super) fn watch(health: &HealthRegistry, repository: &Repository) -> Result<(), CliError> {
    let why = |error: DatabaseError| chain(&error).to_string();
    let asked = repository.clone();
    health.ready_if(Probe::new("database", ANSWER_VALID_FOR, move || {
        let asked = asked.clone();
        async move { asked.answers().await.map_err(why) }
    }));
    let table = TableMetrics::new()?;
    health.register(&table.all())?;
    let repository = repository.clone();
    health.before_scrape(Probe::new("database", COUNT_VALID_FOR, move || {
        let (repository, table) = (repository.clone(), table.clone());
        async move {
            let census = repository.census().await.map_err(why)?;
            let transfers = census.transfers.iter().map(|(name, count)| (*name, *count));
            table.set(transfers, census.oldest_pending, census.oldest_renewal);
            Ok(())
        }
    }));
    Ok(())
}
