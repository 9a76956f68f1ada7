//! A site: an observatory or an archive.

use sea_orm::entity::prelude::*;

/// A row of `site`.
#[derive(Debug, Clone, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "site")]
pub struct Model {
    /// Key.
    #[sea_orm(primary_key, select_as = "bigint")]
    pub id: i64,
    /// Name for people.
    pub name: String,
    /// Name in queue names.
    pub short_name: String,
    /// Where it is.
    pub location: Option<String>,
}

/// Relations.
#[derive(Debug, Clone, Copy, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
