//! Migrations, in two independent sets.
//!
//! * [`OpsDbSubset`]: the ops-db tables that a transfer needs. They belong to `ccat_ops_db` and its Alembic migrations.
//!   They are created here only if **none** of them exists: in a SQLite file or a development PostgreSQL. A database
//!   with a table `alembic_version` is refused.
//! * [`Worker`]: this project's own tables, prefixed `transfer_worker_`. They are created by explicit command, in any
//!   database.
//!
//! Each set records its migrations in a table of its own, which has the prefix as well. Therefore dropping one set
//! never touches the tables of the other, and dropping the subset never drops tables that another program created.

use entity::{ALEMBIC_TABLE, OPS_DB_TABLES};
use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{DatabaseConnection, DbBackend, Statement};

mod m20260101_000001_ops_db_subset;
mod m20260101_000002_worker_tables;
mod m20261124_000003_delays_and_destinations;
mod m20261124_000004_operators;
mod m20261124_000005_links;
mod m20261129_000006_schedule;
mod m20261201_000007_digests;
mod m20261201_000008_reports;
mod m20261201_000009_programs;

/// A migration that was not run.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Alembic manages the schema of the ops-db.
    #[error(
        "the table `{ALEMBIC_TABLE}` exists: the schema belongs to ccat_ops_db and is migrated \
         with Alembic, not from here"
    )]
    OwnedByAlembic,
    /// Some ops-db tables exist, and this program did not create them.
    #[error(
        "tables of the ops-db exist already and were not made from here: {}; they are left alone",
        .0.join(", ")
    )]
    TablesExist(Vec<String>),
    /// The database returned an error.
    #[error("the database refused a migration")]
    Database(#[from] DbErr),
}

/// The part of the ops-db that a transfer needs; see the documentation of the crate.
#[derive(Debug, Clone, Copy)]
pub struct OpsDbSubset;

#[async_trait::async_trait]
impl MigratorTrait for OpsDbSubset {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(m20260101_000001_ops_db_subset::Migration)]
    }

    fn migration_table_name() -> DynIden {
        "transfer_worker_ops_db_migration".into_iden()
    }
}

/// This project's own tables.
#[derive(Debug, Clone, Copy)]
pub struct Worker;

#[async_trait::async_trait]
impl MigratorTrait for Worker {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20260101_000002_worker_tables::Migration),
            Box::new(m20261124_000003_delays_and_destinations::Migration),
            Box::new(m20261124_000004_operators::Migration),
            Box::new(m20261124_000005_links::Migration),
            Box::new(m20261129_000006_schedule::Migration),
            Box::new(m20261201_000007_digests::Migration),
            Box::new(m20261201_000008_reports::Migration),
            Box::new(m20261201_000009_programs::Migration),
        ]
    }

    fn migration_table_name() -> DynIden {
        "transfer_worker_migration".into_iden()
    }
}

/// Creates the ops-db subset. Does nothing if it was created before.
///
/// # Errors
/// [`MigrationError::OwnedByAlembic`] and [`MigrationError::TablesExist`], with nothing changed;
/// [`MigrationError::Database`].
pub async fn create_ops_db(db: &DatabaseConnection) -> Result<(), MigrationError> {
    refuse_alembic(db).await?;
    if !made_here(db).await? {
        let existing = existing(db, &OPS_DB_TABLES).await?;
        if !existing.is_empty() {
            return Err(MigrationError::TablesExist(existing));
        }
    }
    Ok(OpsDbSubset::up(db, None).await?)
}

/// Drops the ops-db subset with all its rows, if it was created by [`create_ops_db`].
///
/// # Errors
/// [`MigrationError::OwnedByAlembic`] and [`MigrationError::TablesExist`], with nothing changed;
/// [`MigrationError::Database`].
pub async fn drop_ops_db(db: &DatabaseConnection) -> Result<(), MigrationError> {
    refuse_alembic(db).await?;
    if !made_here(db).await? {
        let existing = existing(db, &OPS_DB_TABLES).await?;
        return if existing.is_empty() {
            Ok(())
        } else {
            Err(MigrationError::TablesExist(existing))
        };
    }
    Ok(OpsDbSubset::reset(db).await?)
}

/// Creates this project's own tables, or applies the migrations that are missing.
///
/// # Errors
/// The database cannot be reached, or it refuses the statement.
pub async fn create_worker_tables(db: &DatabaseConnection) -> Result<(), MigrationError> {
    Ok(Worker::up(db, None).await?)
}

/// Names of the migrations of this project's own tables that were not applied. Changes nothing.
///
/// # Errors
/// The database cannot be reached, or it refuses the statement.
pub async fn pending_worker_migrations(db: &DatabaseConnection) -> Result<Vec<String>, DbErr> {
    let pending = Worker::get_pending_migrations_read_only(db).await?;
    Ok(pending.iter().map(|m| m.name().to_owned()).collect())
}

/// Drops this project's own tables, including the leases and the history.
///
/// # Errors
/// The database cannot be reached, or it refuses the statement.
pub async fn drop_worker_tables(db: &DatabaseConnection) -> Result<(), MigrationError> {
    Ok(Worker::reset(db).await?)
}

/// Returns true if a table (or view) of this name is visible to the connection.
///
/// # Errors
/// The database cannot be reached, or it refuses the statement.
pub async fn table_exists(db: &impl ConnectionTrait, table: &str) -> Result<bool, DbErr> {
    let backend = db.get_database_backend();
    let sql = match backend {
        // Looks at the whole search path, like any later statement.
        DbBackend::Postgres => "SELECT to_regclass(quote_ident($1)) IS NOT NULL",
        _ => "SELECT count(*) > 0 FROM sqlite_master WHERE name = $1",
    };
    let row = db
        .query_one_raw(Statement::from_sql_and_values(backend, sql, [table.into()]))
        .await?;
    row.map_or(Ok(false), |row| row.try_get_by_index(0))
}

async fn refuse_alembic(db: &DatabaseConnection) -> Result<(), MigrationError> {
    if table_exists(db, ALEMBIC_TABLE).await? {
        return Err(MigrationError::OwnedByAlembic);
    }
    Ok(())
}

/// Returns true if the migration table records that this program created the ops-db tables.
async fn made_here(db: &DatabaseConnection) -> Result<bool, DbErr> {
    Ok(!OpsDbSubset::get_applied_migrations_read_only(db)
        .await?
        .is_empty())
}

async fn existing(db: &DatabaseConnection, tables: &[&str]) -> Result<Vec<String>, DbErr> {
    let mut found = Vec::new();
    for table in tables {
        if table_exists(db, table).await? {
            found.push((*table).to_owned());
        }
    }
    Ok(found)
}
