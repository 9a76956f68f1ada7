//! A file that is to be transferred.

use sea_orm::entity::prelude::*;

/// A row of `data_transfer_package`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_package")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Name of the file.
    pub file_name: String,
    /// Path below the location's root, with the file's name.
    pub relative_path: String,
    /// Size in bytes.
    #[sea_orm(select_as = "bigint")]
    pub size: Option<i64>,
    /// Checksum, in whichever form the producer wrote it.
    pub checksum: Option<String>,
}

/// Columns that a schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// [`crate::PackageState`] of the package.
    Status,
    /// When the package was made.
    CreatedAt,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
