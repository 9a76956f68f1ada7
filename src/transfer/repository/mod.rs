//! Reading and changing transfers.
//!
//! All functions of this module change a transfer in the same way: **lock its row, read, write, commit.** The row lock
//! (`SELECT … FOR NO KEY UPDATE` on PostgreSQL, the write lock of the database on SQLite) makes all programs that
//! change a transfer wait for each other, including those that do not use leases: an operator, a Python worker.
//! Therefore the facts that were read are still true when the change is written, and a write that needs a lease is made
//! only if the lease still has the caller's token.
//!
//! Functions that change only tables of this project, such as [`Repository::renew`] and
//! [`Repository::claim_destination`], work without the row lock. Their statements that need a lease contain the
//! conditions themselves: the token of the lease, and the status IN_PROGRESS.
//!
//! [`DatabaseError`] is a separate variant of all errors: unless it is [of one row](DatabaseError::is_of_one_row), it
//! says nothing about the transfer, must never count as a failed attempt, and the same call can be made again. If the
//! first call was successful and only its answer was lost, then [`complete`](Repository::complete) and similar
//! functions recognise their own change and succeed again; [`acquire`](Repository::acquire) finds a lease that no
//! worker renews, so the transfer is taken again when that lease has expired.

use std::path::Path;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use entity::{Outcome, Status, data_transfer, transfer_worker_attempt, transfer_worker_lease};
use sea_orm::sea_query::{
    DynIden, Expr, ExprTrait as _, InsertStatement, IntoTableRef, LockType, Query, SelectStatement,
};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, EntityTrait,
    QueryFilter, QuerySelect, UpdateMany,
};

use super::database::{Database, DatabaseError};
use super::lease::{ExpiryReason, Lease, LeaseInfo};
use super::schema::{self, Schema, SchemaError};
use crate::settings::EnumLabels;
use crate::transfer::id::{AttemptNumber, TransferId};

mod acquire;
mod census;
mod delay;
mod digests;
mod ended;
mod ends;
mod files;
mod holder;
mod links;
mod list;
mod map;
mod operator;
mod overview;
mod partials;
mod place;
mod programs;
mod record;
mod scan;
mod schedule;
mod scheduled;
mod search;
mod settle;
mod sweep;

pub use acquire::{Acquired, Acquisition, Displaced};
pub use census::Census;
pub use digests::RecordedBlock;
pub use ended::EndedAttempt;
pub use ends::{SiteError, TransferEnd};
pub use files::Leftover;
pub use holder::{ClaimError, Renewal, Successor};
pub use links::{LinkChange, LinkError, Traffic};
pub use list::{Filter, ListError, Listing, Sort, TransferSummary};
pub use map::{LocationMap, RoutedLink};
pub use operator::{Applicability, Change, Instruction, Refusal};
pub use overview::{Cause, EndedCount, TransferCount};
pub use partials::RecordedPartial;
pub use place::{InvalidPlace, Place};
pub use programs::{PROGRAM_INTERVAL, ProgramKind, ProgramProcess, ProgramRecord};
pub use record::{
    ActionRecord, AttemptRecord, DiskRecord, LocationRecord, PackageRecord, RouteRecord,
    SiteRecord, TransferDetail, TransferRecord,
};
pub use scan::{OpenTransfer, ScanCursor};
pub use schedule::{Allowance, Batch, Candidate};
pub use scheduled::{ScheduleRecord, Withdrawal};
pub use search::{FoundTransfers, Search};
pub use settle::{CompletedCopy, Failure};
pub use sweep::{Recovered, Sweep};

/// Access to the transfers of one database. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Repository {
    database: Database,
    schema: Arc<Schema>,
}

impl Repository {
    /// Checks that the database is usable for attempts: it answers, and the tables and privileges that every attempt
    /// needs exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn answers(&self) -> Result<(), DatabaseError> {
        let probing = async { Ok(probe_statements(self.database.connection()).await?) };
        self.database.bounded(probing).await
    }

    /// Checks the schema of the database and creates the repository.
    ///
    /// # Errors
    /// The errors of [`schema::check`].
    pub async fn open(
        database: Database,
        text_enum_labels: EnumLabels,
    ) -> Result<Self, SchemaError> {
        let schema = schema::check(&database, text_enum_labels).await?;
        Ok(Self {
            database,
            schema: Arc::new(schema),
        })
    }

    /// The connection to the database.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// Result of the schema check.
    pub(super) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Returns the number of failed attempts of a transfer; `None` if the transfer does not exist.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn get_retry_count(&self, id: TransferId) -> Result<Option<u32>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.row(id).await?.as_ref().map(retry_count)) })
            .await
    }

    async fn row(&self, id: TransferId) -> Result<Option<data_transfer::Model>, DbErr> {
        data_transfer::Entity::find_by_id(id)
            .one(self.database.connection())
            .await
    }

    /// Condition: the transfer has one of these statuses.
    fn status_is(&self, statuses: &[Status]) -> Expr {
        Expr::col((data_transfer::Entity, data_transfer::Column::Status))
            .is_in(self.schema.transfer_status.one_of(statuses))
    }

    /// Subquery: the transfer is IN_PROGRESS.
    fn in_progress(&self, id: TransferId) -> SelectStatement {
        use data_transfer::{Column, Entity};
        Query::select()
            .expr(Expr::val(1))
            .from(Entity)
            .and_where(Expr::col((Entity, Column::Id)).eq(id))
            .and_where(self.status_is(&[Status::InProgress]))
            .to_owned()
    }

    /// Update of one transfer's status; the caller may add further columns.
    fn set_status(&self, id: TransferId, status: Status) -> UpdateMany<data_transfer::Entity> {
        data_transfer::Entity::update_many()
            .col_expr(
                data_transfer::Column::Status,
                self.schema.transfer_status.write(status),
            )
            .filter(data_transfer::Column::Id.eq(id))
    }
}

/// Makes the reads and locks of every attempt, but without locking a row.
async fn probe_statements(db: &DatabaseConnection) -> Result<(), DbErr> {
    // No transfer has this id.
    const NONE: TransferId = TransferId::new(-1);
    data_transfer::Entity::find_by_id(NONE)
        .lock(LockType::NoKeyUpdate)
        .one(db)
        .await?;
    find_lease(db, NONE).await.map(drop)
}

/// Locks a transfer's row until the transaction ends, and returns the row as it is under the lock.
async fn lock(
    tx: &DatabaseTransaction,
    id: TransferId,
) -> Result<Option<data_transfer::Model>, DbErr> {
    // Not the stronger `FOR UPDATE`: other transactions may insert rows that refer to this one.
    data_transfer::Entity::find_by_id(id)
        .lock(LockType::NoKeyUpdate)
        .one(tx)
        .await
}

async fn find_lease(
    db: &impl ConnectionTrait,
    id: TransferId,
) -> Result<Option<transfer_worker_lease::Model>, DbErr> {
    transfer_worker_lease::Entity::find_by_id(id).one(db).await
}

/// Removes a dead lease and ends its holder's attempt as interrupted. Returns `None` if the lease was renewed or
/// replaced in the meantime.
async fn displace(
    tx: &DatabaseTransaction,
    held: &transfer_worker_lease::Model,
    expiry_reason: ExpiryReason,
    now: DateTime<Utc>,
) -> Result<Option<Displaced>, DbErr> {
    use transfer_worker_lease::{Column, Entity};
    let mut delete = Entity::delete_many()
        .filter(Column::DataTransferId.eq(held.data_transfer_id))
        .filter(Column::Token.eq(held.token.as_str()));
    if expiry_reason == ExpiryReason::Expired {
        // A renewal does not take the row lock, so the lease may have been renewed since it was read.
        delete = delete.filter(Column::RenewedAt.eq(held.renewed_at));
    }
    if delete.exec(tx).await?.rows_affected == 0 {
        return Ok(None);
    }
    let lease = LeaseInfo::from(held);
    let ending = Ending::interrupted(&lease, expiry_reason);
    end_attempt(tx, lease.data_transfer_id, lease.attempt, now, &ending).await?;
    Ok(Some(Displaced {
        lease,
        expiry_reason,
    }))
}

/// Subquery: this lease still exists.
fn lease_exists(lease: &Lease) -> SelectStatement {
    use transfer_worker_lease::{Column, Entity};
    Query::select()
        .expr(Expr::val(1))
        .from(Entity)
        .and_where(Expr::col((Entity, Column::DataTransferId)).eq(lease.data_transfer_id))
        .and_where(Expr::col((Entity, Column::Token)).eq(lease.token.to_string()))
        .to_owned()
}

/// End of an attempt.
#[derive(Debug, Clone)]
struct Ending {
    outcome: Outcome,
    error_code: Option<String>,
    message: Option<String>,
    bytes: i64,
    rate_bytes_per_s: i64,
    digest: Option<String>,
}

impl Ending {
    /// End of an attempt whose worker cannot report it.
    fn interrupted(lease: &LeaseInfo, expiry_reason: ExpiryReason) -> Self {
        Self {
            outcome: Outcome::Interrupted,
            error_code: None,
            message: Some(expiry_reason.to_string()),
            bytes: lease.bytes_done,
            rate_bytes_per_s: lease.rate_bytes_per_s,
            digest: None,
        }
    }
}

/// Writes the end of an attempt, unless it is already written.
async fn end_attempt(
    db: &impl ConnectionTrait,
    id: TransferId,
    attempt: AttemptNumber,
    now: DateTime<Utc>,
    ending: &Ending,
) -> Result<(), DbErr> {
    use transfer_worker_attempt::{Column, Entity};
    Entity::update_many()
        .col_expr(Column::EndedAt, Expr::val(now))
        .col_expr(Column::Outcome, Expr::val(ending.outcome))
        .col_expr(
            Column::ErrorCode,
            Expr::val(ending.error_code.as_deref().map(replace_nul)),
        )
        .col_expr(
            Column::Message,
            Expr::val(ending.message.as_deref().map(replace_nul)),
        )
        .col_expr(Column::Bytes, Expr::val(ending.bytes))
        .col_expr(Column::RateBytesPerS, Expr::val(ending.rate_bytes_per_s))
        .col_expr(
            Column::Digest,
            Expr::val(ending.digest.as_deref().map(replace_nul)),
        )
        .filter(Column::DataTransferId.eq(id))
        .filter(Column::Attempt.eq(attempt))
        .filter(Column::Outcome.is_null())
        .exec(db)
        .await
        .map(drop)
}

/// Insert of one row. Used instead of an active model where a column needs its own cast.
pub(super) fn insert_into(
    table: impl IntoTableRef,
    cells: Vec<(DynIden, Expr)>,
) -> InsertStatement {
    let (columns, values): (Vec<_>, Vec<_>) = cells.into_iter().unzip();
    let mut insert = Query::insert();
    // The numbers of values and columns are equal, so this cannot panic.
    insert
        .into_table(table)
        .columns(columns)
        .values_panic(values);
    insert
}

fn retry_count(row: &data_transfer::Model) -> u32 {
    row.retry_count
        .map_or(0, |count| u32::try_from(count).unwrap_or(0))
}

/// Converts a count to the type of a column. No file is larger than the maximum.
fn column_value(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Replaces NUL characters, which PostgreSQL does not store. The output of a program may contain them, and must not
/// prevent a failure from being recorded.
fn replace_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn path_text(path: &Path) -> String {
    replace_nul(&path.to_string_lossy())
}
