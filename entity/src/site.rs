//! A site: an observatory or an archive.

use sea_orm::entity::prelude::*;

/// A row of `site`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "site")]
pub struct Model {
    /// Primary key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Full name of the site.
    pub name: String,
    /// Short name, as used in queue names.
    pub short_name: String,
    /// Geographic location.
    pub location: Option<String>,
}

/// Relations to other tables; none are declared.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
