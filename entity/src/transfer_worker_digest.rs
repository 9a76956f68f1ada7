//! Digests of the blocks of large files, so that a resumed copy does not read them again.

use sea_orm::entity::prelude::*;

/// End of a copy at which a block was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "String(StringLen::N(16))")]
pub enum FileEnd {
    /// The file that is copied.
    #[sea_orm(string_value = "origin")]
    Origin,
    /// The copy.
    #[sea_orm(string_value = "destination")]
    Destination,
}

/// A row of `transfer_worker_digest`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "transfer_worker_digest")]
pub struct Model {
    /// Id of the transfer.
    #[sea_orm(primary_key, auto_increment = false)]
    pub data_transfer_id: i64,
    /// End at which the block was read.
    #[sea_orm(primary_key, auto_increment = false)]
    pub file_end: FileEnd,
    /// Number of the block: 0, 1, …
    #[sea_orm(primary_key, auto_increment = false)]
    pub block: i64,
    /// The version of the file that was read, and the size of its blocks. The digest is of no use for another version.
    #[sea_orm(column_type = "Text")]
    pub file_version: String,
    /// Digest of the block, as `algorithm:hex`.
    pub digest: String,
    /// State of the digest of the whole file after this block, as hex; null if the reader does not compute it.
    #[sea_orm(column_type = "Text", nullable)]
    pub state: Option<String>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
