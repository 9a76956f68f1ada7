//! The manager's side: what waits, and sending it on its way.

use entity::{Status, data_location, data_transfer, site};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoIden, JoinType, Order, Query, SelectStatement};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QueryResult,
};
use serde::Serialize;

use super::{Repository, delay, lock};
use crate::faults::fault_point;
use crate::transfer::database::{self, DatabaseError};

/// One end of a transfer, as far as a queue's name needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// Short name of the site.
    pub site: String,
    /// Name of the location.
    pub location: String,
}

/// A transfer that waits for the manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingTransfer {
    /// The transfer.
    pub id: i64,
    /// From here; none if the row leads nowhere.
    pub origin: Option<Endpoint>,
    /// To there; none if the row leads nowhere.
    pub destination: Option<Endpoint>,
}

/// What became of the wish to schedule a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduled {
    /// A message is out and the row says SCHEDULED.
    Scheduled,
    /// The row is not PENDING (any more), or waits; nothing was published.
    NotPending,
}

/// Why a transfer was not scheduled.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError<E: std::error::Error + 'static> {
    /// The message was not published; the row is PENDING.
    #[error("the message could not be published")]
    Publish(#[source] E),
    /// The row is PENDING. If a message was published, the worker that gets it can start on it.
    #[error("the transfer's status could not be written")]
    Database(#[from] DatabaseError),
}

/// Why a site's locations could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// There is no site of this short name.
    #[error("there is no site `{name}`; the database has {}", list(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// The short names that there are.
        known: Vec<String>,
    },
    /// The database.
    #[error("the site's locations could not be read")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for SiteError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl Repository {
    /// PENDING transfers that are due and have an id above `after`, lowest first, `limit` at most.
    ///
    /// # Errors
    /// What the database says.
    pub async fn pending(
        &self,
        after: Option<i64>,
        limit: u64,
    ) -> Result<Vec<PendingTransfer>, DatabaseError> {
        let reading = async {
            let db = self.database.connection();
            let mut query = Query::select();
            with_endpoints(query.from(data_transfer::Entity))
                .and_where(self.status_is(&[Status::Pending]))
                .and_where(Expr::exists(delay::stands(database::now(db).await?)).not())
                .order_by(
                    (data_transfer::Entity, data_transfer::Column::Id),
                    Order::Asc,
                )
                .limit(limit);
            if let Some(after) = after {
                query.and_where(
                    Expr::col((data_transfer::Entity, data_transfer::Column::Id)).gt(after),
                );
            }
            let rows = db.query_all(&query).await?;
            let pending: Result<_, DbErr> = rows
                .iter()
                .map(|row| {
                    let (origin, destination) = endpoints(row)?;
                    Ok(PendingTransfer {
                        id: row.try_get("", ID)?,
                        origin,
                        destination,
                    })
                })
                .collect();
            Ok(pending?)
        };
        self.database.bounded(reading).await
    }

    /// How many PENDING transfers wait for a time that has not come.
    ///
    /// # Errors
    /// What the database says.
    pub async fn waiting(&self) -> Result<u64, DatabaseError> {
        let counting = async {
            let db = self.database.connection();
            let now = database::now(db).await?;
            let waiting = data_transfer::Entity::find()
                .filter(self.status_is(&[Status::Pending]))
                .filter(Expr::exists(delay::stands(now)))
                .count(db)
                .await?;
            Ok(waiting)
        };
        self.database.bounded(counting).await
    }

    /// Publishes a PENDING transfer's message and makes its row SCHEDULED, in this order of effect:
    /// the row is locked and changed, `publish` is awaited, and the change is committed if it
    /// returns `Ok`, rolled back otherwise.
    ///
    /// So no row is ever SCHEDULED without a message. The other way round does happen: after a
    /// crash or a lost connection between publishing and committing, a message is out and the row
    /// is PENDING. A worker takes a PENDING row just the same, and if the manager publishes again,
    /// the second message finds the transfer held or completed. A worker that gets the message
    /// before the commit waits for the row lock, and then goes on.
    ///
    /// While `publish` runs, the row is locked (SQLite: nobody else writes), so it must end in
    /// seconds, by a time-out of its own.
    ///
    /// # Errors
    /// [`ScheduleError::Publish`] with the error of `publish`; [`ScheduleError::Database`].
    pub async fn schedule<E, F>(
        &self,
        id: i64,
        publish: impl FnOnce() -> F,
    ) -> Result<Scheduled, ScheduleError<E>>
    where
        E: std::error::Error + 'static,
        F: Future<Output = Result<(), E>>,
    {
        let changing = || async {
            let tx = self.database.begin().await?;
            let row = lock(&tx, id).await?;
            let is_due = match row.filter(|row| row.status.means(Status::Pending)) {
                Some(row) => {
                    let now = database::now(&tx).await?;
                    delay::standing(&tx, &row, now).await?.is_none()
                }
                None => false,
            };
            if !is_due {
                tx.rollback().await?;
                return Ok(None);
            }
            self.set_status(id, Status::Scheduled).exec(&tx).await?;
            Ok::<_, DatabaseError>(Some(tx))
        };
        let locked = fault_point!(ManagerRowLocked, self.database.bounded(changing()).await);
        let Some(tx) = locked? else {
            return Ok(Scheduled::NotPending);
        };
        if let Err(error) = publish().await {
            // Explicit, so that the lock is gone when this returns. If it fails, the connection is
            // gone, and the lock with it.
            let _ = self
                .database
                .bounded(async { Ok::<_, DatabaseError>(tx.rollback().await?) })
                .await;
            return Err(ScheduleError::Publish(error));
        }
        self.database
            .bounded(async { Ok::<_, DatabaseError>(tx.commit().await?) })
            .await?;
        Ok(Scheduled::Scheduled)
    }

    /// Names of a site's locations, in their order of use.
    ///
    /// # Errors
    /// [`SiteError::Unknown`], which lists the sites that there are; else what the database says.
    pub async fn locations_of_site(&self, short_name: &str) -> Result<Vec<String>, SiteError> {
        let reading = async {
            let db = self.database.connection();
            let sites = site::Entity::find()
                .order_by_asc(site::Column::ShortName)
                .all(db)
                .await?;
            let Some(site) = sites.iter().find(|site| site.short_name == short_name) else {
                let known = sites.into_iter().map(|site| site.short_name).collect();
                return Err(SiteError::Unknown {
                    name: short_name.to_owned(),
                    known,
                });
            };
            let locations = data_location::Entity::find()
                .filter(data_location::Column::SiteId.eq(site.id))
                .order_by_asc(data_location::Column::Priority)
                .order_by_asc(data_location::Column::Id)
                .all(db)
                .await?;
            Ok(locations
                .into_iter()
                .map(|location| location.name)
                .collect())
        };
        self.database.bounded(reading).await
    }
}

/// Name under which [`with_endpoints`] selects the transfer's id.
pub(super) const ID: &str = "id";

/// The two ends: aliases of the location and of its site, and names of the selected columns.
const ORIGIN: [&str; 4] = [
    "origin",
    "origin_site",
    "origin_location",
    "origin_site_name",
];
const DESTINATION: [&str; 4] = [
    "destination",
    "destination_site",
    "destination_location",
    "destination_site_name",
];

/// Adds the id and the names of both ends to a query of transfers. Rows that lead nowhere are not
/// left out: they would wait for ever without anybody knowing.
pub(super) fn with_endpoints(query: &mut SelectStatement) -> &mut SelectStatement {
    use data_transfer::{Column, Entity};
    query.expr_as(Expr::col((Entity, Column::Id)).cast_as("bigint"), ID);
    for ([location, site, location_name, site_name], key) in [
        (ORIGIN, Column::OriginLocationId),
        (DESTINATION, Column::DestinationLocationId),
    ] {
        query
            .join_as(
                JoinType::LeftJoin,
                data_location::Entity,
                location,
                Expr::col((location, data_location::Column::Id)).equals((Entity, key)),
            )
            .join_as(
                JoinType::LeftJoin,
                site::Entity,
                site,
                Expr::col((site, site::Column::Id))
                    .equals((location, data_location::Column::SiteId)),
            )
            .expr_as(
                Expr::col((location, data_location::Column::Name)),
                location_name.into_iden(),
            )
            .expr_as(
                Expr::col((site, site::Column::ShortName)),
                site_name.into_iden(),
            );
    }
    query
}

/// Reads what [`with_endpoints`] selects.
pub(super) fn endpoints(row: &QueryResult) -> Result<(Option<Endpoint>, Option<Endpoint>), DbErr> {
    let read = |[_, _, location, site]: [&str; 4]| {
        let location: Option<String> = row.try_get("", location)?;
        let site: Option<String> = row.try_get("", site)?;
        Ok::<_, DbErr>(
            site.zip(location)
                .map(|(site, location)| Endpoint { site, location }),
        )
    };
    Ok((read(ORIGIN)?, read(DESTINATION)?))
}

#[cfg(feature = "fault-points")]
impl<E: std::error::Error + 'static> From<crate::faults::AnswerLost> for ScheduleError<E> {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self::Database(lost.into())
    }
}
