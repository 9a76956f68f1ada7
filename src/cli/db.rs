//! `db`: sets up and checks the operations database.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::{CliError, Context, output};
use crate::transfer::database::Database;
use crate::transfer::topology::{self, Topology, TopologyError};
use service_connection::error_chain::chain;

#[derive(Debug, Subcommand)]
pub(super) enum DbCommand {
    /// Create this program's own tables; in an empty database also the tables of the ops-db that it uses.
    Migrate {
        /// Drop this program's own tables, with every lease and the history of attempts.
        #[arg(long)]
        down: bool,
        /// With --down: do not ask.
        #[arg(long, requires = "down")]
        yes: bool,
    },
    /// Print which tables exist.
    Status,
    /// Check that the schema has everything that is needed.
    Check,
    /// Create the sites, locations and routes of a file; not for databases that the Python system fills.
    Seed {
        /// File in TOML.
        file: PathBuf,
    },
}

pub(super) async fn run(context: &Context, command: DbCommand) -> Result<ExitCode, CliError> {
    match command {
        DbCommand::Migrate { down: false, .. } => up(context).await?,
        DbCommand::Migrate { down: true, yes } => down(context, yes).await?,
        DbCommand::Status => status(context).await?,
        DbCommand::Check => {
            context.repository().await?;
            print_result(context, &json!({"ok": true}), || {
                "the schema has everything that is needed".into()
            })?;
        }
        DbCommand::Seed { file } => seed(context, file).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn up(context: &Context) -> Result<(), CliError> {
    let database = Database::connect_or_create(&context.settings.ops_db).await?;
    let db = database.connection();
    let mut tables = Vec::new();
    for table in entity::OPS_DB_TABLES {
        if migration::table_exists(db, table)
            .await
            .map_err(migration::MigrationError::from)?
        {
            tables.push(table);
        }
    }
    let made = tables.is_empty();
    if made {
        migration::create_ops_db(db).await?;
    }
    migration::create_worker_tables(db).await?;
    let result = json!({
        "ops_db": if made { "made" } else { "not touched" },
        "own_tables": entity::WORKER_TABLES,
    });
    print_result(context, &result, || {
        let ops_db = if made {
            format!(
                "created the tables of the ops-db: {}",
                entity::OPS_DB_TABLES.join(", ")
            )
        } else {
            "the ops-db exists already and was not changed".to_owned()
        };
        let own = entity::WORKER_TABLES.join(", ");
        format!("{ops_db}\nthis program's own tables exist: {own}")
    })
}

async fn down(context: &Context, yes: bool) -> Result<(), CliError> {
    if !yes {
        return Err(CliError::refused(
            "this drops every lease and the history of all attempts; stop the workers, then add --yes",
        ));
    }
    let database = Database::connect(&context.settings.ops_db).await?;
    migration::drop_worker_tables(database.connection()).await?;
    let result = json!({"dropped": entity::WORKER_TABLES});
    print_result(context, &result, || {
        format!("dropped: {}", entity::WORKER_TABLES.join(", "))
    })
}

#[derive(Serialize)]
struct TableStatus {
    table: &'static str,
    owner: &'static str,
    exists: bool,
}

async fn status(context: &Context) -> Result<(), CliError> {
    let database = Database::connect(&context.settings.ops_db).await?;
    let mut tables = Vec::new();
    let known = entity::OPS_DB_TABLES
        .map(|table| (table, "ops-db"))
        .into_iter()
        .chain(entity::WORKER_TABLES.map(|table| (table, "ccat-transfer")))
        .chain([(entity::ALEMBIC_TABLE, "alembic")]);
    for (table, owner) in known {
        let exists = migration::table_exists(database.connection(), table)
            .await
            .map_err(migration::MigrationError::from)?;
        tables.push(TableStatus {
            table,
            owner,
            exists,
        });
    }
    if context.json {
        return output::json(&tables);
    }
    let mut shown = output::table(&["TABLE", "OWNER", "THERE"]);
    for status in tables {
        let there = if status.exists { "yes" } else { "no" };
        shown.add_row([status.table, status.owner, there]);
    }
    println!("{shown}");
    Ok(())
}

async fn seed(context: &Context, file: PathBuf) -> Result<(), CliError> {
    let text = std::fs::read_to_string(&file)
        .map_err(|e| CliError::NotFound(format!("cannot read {}: {e}", file.display())))?;
    let topology: Topology = text.parse().map_err(topology_error)?;
    let repository = context.repository().await?;
    let seeded = topology::seed(&repository, &topology)
        .await
        .map_err(topology_error)?;
    let result = json!({
        "created": seeded.created,
        "changed": seeded.updated,
        "unchanged": seeded.unchanged,
    });
    print_result(context, &result, || {
        format!(
            "{} created, {} changed, {} unchanged",
            seeded.created, seeded.updated, seeded.unchanged
        )
    })
}

/// Prints a result, as JSON or as text.
fn print_result(
    context: &Context,
    result: &serde_json::Value,
    words: impl FnOnce() -> String,
) -> Result<(), CliError> {
    if context.json {
        return output::json(result);
    }
    println!("{}", words());
    Ok(())
}

/// Converts a topology's error: adds the exit code, and the command that fills an empty ops-db.
pub(super) fn topology_error(error: TopologyError) -> CliError {
    let text = chain(&error).to_string();
    match error {
        TopologyError::Database(error) => error.into(),
        TopologyError::UnknownSite { known, .. } | TopologyError::UnknownLocation { known, .. } => {
            CliError::NotFound(match known.is_empty() {
                true => format!("{text}; `ccat-transfer db seed` creates them"),
                false => text,
            })
        }
        TopologyError::OwnedByAlembic => CliError::refused(text),
        _ => CliError::usage(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_ops_db_is_explained() {
        let error = |known: &[&str]| TopologyError::UnknownSite {
            name: "x".to_owned(),
            known: known.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(
            topology_error(error(&[])).to_string(),
            "a route names the unknown site `x`; known sites: none yet; `ccat-transfer db seed` creates them"
        );
        assert_eq!(
            topology_error(error(&["ccat", "cologne"])).to_string(),
            "a route names the unknown site `x`; known sites: ccat, cologne"
        );
    }
}
