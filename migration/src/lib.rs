//! Migrations, in two sets that never mix.
//!
//! * [`OpsDbSubset`]: the ops-db tables that a transfer needs. They belong to `ccat_ops_db` and its
//!   Alembic migrations. They are made here only where **none** of them exists: a SQLite file, or
//!   a development PostgreSQL. A database with a table `alembic_version` is refused.
//! * [`Worker`]: this project's own tables, prefixed `transfer_worker_`, by explicit command, in
//!   any database.
//!
//! Each set keeps its own books, in a table that carries the prefix as well, so that taking one
//! set down can never touch the other's tables, and taking the subset down can never drop tables
//! that somebody else has made.

use entity::{ALEMBIC_TABLE, OPS_DB_TABLES};
use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{DatabaseConnection, DbBackend, Statement};

mod m20260101_000001_ops_db_subset;
mod m20260101_000002_worker_tables;
mod m20261124_000003_delays_and_destinations;
mod m20261124_000004_operators;
mod m20261124_000005_links;
mod m20261129_000006_schedule;

/// Why a migration was not run.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The ops-db is somebody else's.
    #[error(
        "the table `{ALEMBIC_TABLE}` exists: the schema belongs to ccat_ops_db and is migrated \
         with Alembic, not from here"
    )]
    OwnedByAlembic,
    /// Some ops-db tables exist, and they were not made from here.
    #[error(
        "tables of the ops-db exist already and were not made from here: {}; they are left alone",
        .0.join(", ")
    )]
    TablesExist(Vec<String>),
    /// The database.
    #[error("the database refused a migration")]
    Database(#[from] DbErr),
}

/// The part of the ops-db that a transfer needs; see the crate's documentation.
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
        ]
    }

    fn migration_table_name() -> DynIden {
        "transfer_worker_migration".into_iden()
    }
}

/// Creates the ops-db subset, and does nothing where this has been done before.
///
/// # Errors
/// [`MigrationError::OwnedByAlembic`] and [`MigrationError::TablesExist`], with nothing changed;
/// else what the database says.
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

/// Drops the ops-db subset, with all that is in it, if it was made by [`create_ops_db`].
///
/// # Errors
/// [`MigrationError::OwnedByAlembic`] and [`MigrationError::TablesExist`], with nothing changed;
/// else what the database says.
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

/// Creates this project's own tables, or brings them up to date.
///
/// # Errors
/// What the database says.
pub async fn create_worker_tables(db: &DatabaseConnection) -> Result<(), MigrationError> {
    Ok(Worker::up(db, None).await?)
}

/// Names of the migrations of this project's own tables that were not applied. Changes nothing.
///
/// # Errors
/// What the database says.
pub async fn pending_worker_migrations(db: &DatabaseConnection) -> Result<Vec<String>, DbErr> {
    let pending = Worker::get_pending_migrations_read_only(db).await?;
    Ok(pending.iter().map(|m| m.name().to_owned()).collect())
}

/// Drops this project's own tables, with leases and history.
///
/// # Errors
/// What the database says.
pub async fn drop_worker_tables(db: &DatabaseConnection) -> Result<(), MigrationError> {
    Ok(Worker::reset(db).await?)
}

/// Whether a table (or view) of this name can be seen.
///
/// # Errors
/// What the database says.
pub async fn table_exists(db: &impl ConnectionTrait, table: &str) -> Result<bool, DbErr> {
    let backend = db.get_database_backend();
    let sql = match backend {
        // The whole search path, as any later statement sees it.
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

/// Whether the books say that the ops-db tables were made here.
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
