//! A package: one file to transfer.

use sea_orm::entity::prelude::*;

/// A row of `data_transfer_package`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "data_transfer_package")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Name of the file.
    pub file_name: String,
    /// Path relative to the root directory of a location, including the file name.
    pub relative_path: String,
    /// Size in bytes.
    #[sea_orm(select_as = "bigint")]
    pub size: Option<i64>,
    /// Checksum, in the format that the producer wrote.
    pub checksum: Option<String>,
}

/// Columns that the live schema may lack.
#[derive(Debug, Clone, Copy, DeriveIden)]
pub enum Optional {
    /// [`crate::PackageState`] of the package.
    Status,
    /// Time at which the package was created.
    CreatedAt,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
