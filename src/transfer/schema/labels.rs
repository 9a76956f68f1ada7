//! Labels of enums in the live database.

use std::marker::PhantomData;

use entity::DatabaseEnum;
use sea_orm::sea_query::{Expr, ExprTrait as _, Iden, Query};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbErr};

use crate::settings::EnumLabels;

/// Spelling of the values of one enum column in the live database.
///
/// A native PostgreSQL type has its own labels, and a value needs a cast to the type. A text column contains names or
/// values: queries search for both, and writes use the spelling of the column's rows, or that of another column if it
/// has no rows. (On SQLite a cast would be wrong: `CAST(x AS status)` converts any text to a number.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnumColumn<E> {
    spelling: Spelling,
    member: PhantomData<E>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Spelling {
    Native {
        type_name: String,
        labels: Vec<String>,
    },
    Text(EnumLabels),
}

impl<E: DatabaseEnum> EnumColumn<E> {
    /// Creates a column with a native PostgreSQL type. The type name is inserted into SQL unchanged, so the caller has
    /// to quote it if necessary.
    pub(in crate::transfer) fn native(type_name: String, labels: Vec<String>) -> Self {
        Self {
            spelling: Spelling::Native { type_name, labels },
            member: PhantomData,
        }
    }

    /// Creates a text column.
    pub(in crate::transfer) fn text(labels: EnumLabels) -> Self {
        Self {
            spelling: Spelling::Text(labels),
            member: PhantomData,
        }
    }

    /// Returns the label that is written for a member.
    pub fn label(&self, member: E) -> String {
        match &self.spelling {
            Spelling::Native { labels, .. } => labels
                .iter()
                .find(|label| E::from_label(label) == Some(member))
                .cloned()
                // The type has no such member; the error of the database explains this better.
                .unwrap_or_else(|| member.name().to_owned()),
            Spelling::Text(EnumLabels::Names) => member.name().to_owned(),
            Spelling::Text(EnumLabels::Values) => member.value(),
        }
    }

    /// Expression that writes a member.
    pub fn write(&self, member: E) -> Expr {
        let label = Expr::val(self.label(member));
        match &self.spelling {
            Spelling::Native { type_name, .. } => label.cast_as(type_name.clone()),
            Spelling::Text(_) => label,
        }
    }

    /// Expressions for a query of rows with one of these members.
    pub fn one_of(&self, members: &[E]) -> Vec<Expr> {
        let exprs = members.iter().map(|&member| match &self.spelling {
            Spelling::Native { .. } => vec![self.write(member)],
            Spelling::Text(_) => vec![Expr::val(member.name()), Expr::val(member.value())],
        });
        exprs.flatten().collect()
    }
}

/// Returns the spelling of the labels in a column's rows; `None` without rows.
pub(super) async fn spelling_in_use<E: DatabaseEnum>(
    db: &DatabaseConnection,
    table: impl Iden,
    column: impl Iden + Copy,
) -> Result<Option<EnumLabels>, DbErr> {
    let query = Query::select()
        .column(column)
        .from(table)
        .and_where(Expr::col(column).is_not_null())
        .limit(1)
        .to_owned();
    let Some(row) = db.query_one(&query).await? else {
        return Ok(None);
    };
    let label: String = row.try_get_by_index(0)?;
    Ok(E::from_label(&label).map(|member| {
        if label == member.value() {
            EnumLabels::Values
        } else {
            EnumLabels::Names
        }
    }))
}

#[cfg(test)]
mod tests {
    use entity::{Status, data_transfer};
    use sea_orm::sea_query::{PostgresQueryBuilder, SqliteQueryBuilder};

    use super::*;

    fn where_status(column: &EnumColumn<Status>) -> sea_orm::sea_query::SelectStatement {
        Query::select()
            .expr(Expr::val(1))
            .from(data_transfer::Entity)
            .and_where(Expr::col("status").is_in(column.one_of(&[Status::Pending])))
            .to_owned()
    }

    #[test]
    fn native_labels_are_the_types_own_and_cast_to_it() {
        let labels = ["pending", "Scheduled", "IN_PROGRESS"];
        let labels = labels.map(str::to_owned).to_vec();
        let column = EnumColumn::native("types.\"Status\"".to_owned(), labels);
        assert_eq!(column.label(Status::Scheduled), "Scheduled");
        let sql = where_status(&column).to_string(PostgresQueryBuilder);
        assert!(
            sql.ends_with("IN (CAST('pending' AS types.\"Status\"))"),
            "{sql}"
        );
    }

    #[test]
    fn text_is_never_cast_and_found_in_both_spellings() {
        for (labels, written) in [
            (EnumLabels::Names, "PENDING"),
            (EnumLabels::Values, "pending"),
        ] {
            let column = EnumColumn::text(labels);
            assert_eq!(column.label(Status::Pending), written);
            let sql = where_status(&column).to_string(SqliteQueryBuilder);
            assert!(sql.ends_with("IN ('PENDING', 'pending')"), "{sql}");
        }
    }
}
