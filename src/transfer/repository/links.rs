//! Rows of links, and the checks if a link allows another copy.
//!
//! In a database without the table (migrated by an older version of this program), no link has a limit, and none can be
//! changed.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use entity::{
    Status, Timestamp, data_location, data_transfer, site, transfer_worker_lease,
    transfer_worker_link,
};
use sea_orm::sea_query::{
    Expr, ExprTrait as _, Func, JoinType, LockType, OnConflict, Query, SelectStatement, SimpleExpr,
};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter,
    QueryOrder, QueryResult, QuerySelect, Set,
};
use serde::Serialize;

use super::{Repository, replace_nul};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;
use crate::transfer::link::{
    Capacity, ClosedLink, FullLink, Link, LinkName, Overrides, Pause, PausedLink,
};

/// A change of a link; `None` leaves a value unchanged.
#[derive(Debug, Clone, Default)]
pub struct LinkChange {
    /// Maximum number of active transfers; `Some(None)` for no limit.
    pub max_active: Option<Option<u32>>,
    /// Priority; the highest is scheduled first.
    pub priority: Option<i64>,
    /// The complete list of time windows.
    pub capacity: Option<Capacity>,
    /// Number of bbcp's streams; `Some(None)` for the value of the settings.
    pub streams: Option<Option<u8>>,
    /// TCP window of bbcp; `Some(None)` for the value of the settings.
    pub tcp_window: Option<Option<String>>,
    /// Rate limit of bbcp; `Some(None)` for the value of the settings.
    pub max_rate: Option<Option<String>>,
}

impl LinkChange {
    /// Applies the change to the overrides of a link.
    pub fn apply_to(&self, overrides: &mut Overrides) {
        if let Some(streams) = self.streams {
            overrides.streams = streams.map(i64::from);
        }
        if let Some(window) = &self.tcp_window {
            overrides.tcp_window.clone_from(window);
        }
        if let Some(rate) = &self.max_rate {
            overrides.max_rate.clone_from(rate);
        }
    }
}

/// Error of changing a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The database has no table of links.
    #[error("this database has no table transfer_worker_link")]
    NoTable,
    /// The link is already paused.
    #[error("the link {name} is paused already, since {} by {}: {}", .pause.since, .pause.by, .pause.reason)]
    Paused {
        /// Name of the link.
        name: LinkName,
        /// The existing pause.
        pause: Pause,
    },
    /// The link is not paused.
    #[error("the link {0} is not paused")]
    NotPaused(LinkName),
    /// The database returned an error.
    #[error("the link could not be changed")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for LinkError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

/// Number of transfers of a link by state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Number of IN_PROGRESS transfers: copies that run.
    pub active: u64,
    /// Number of SCHEDULED transfers: messages that wait for a worker.
    pub scheduled: u64,
    /// Number of PENDING transfers, which wait for the manager.
    pub pending: u64,
    /// Lowest id of the PENDING transfers.
    pub oldest_pending: Option<TransferId>,
    /// Creation time of the oldest PENDING transfer; `None` if the ops-db has no column `created_at`.
    pub pending_since: Option<DateTime<Utc>>,
}

impl Repository {
    /// Returns true if the database has the table of links.
    pub fn has_links(&self) -> bool {
        self.schema.has_links
    }

    /// Returns all links that have a row, by name.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn links(&self) -> Result<Vec<Link>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_links().await?) })
            .await
    }

    pub(super) async fn read_links(&self) -> Result<Vec<Link>, DbErr> {
        use transfer_worker_link::{Column, Entity};
        if !self.schema.has_links {
            return Ok(Vec::new());
        }
        let rows = Entity::find()
            .order_by_asc(Column::Origin)
            .order_by_asc(Column::Destination)
            .all(self.database.connection())
            .await?;
        Ok(rows.into_iter().map(Link::from).collect())
    }

    /// Returns one link; without limits if it has no row.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn link(&self, name: &LinkName) -> Result<Link, DatabaseError> {
        let row = match self.schema.has_links {
            true => {
                let db = self.database.connection();
                let reading = async { Ok::<_, DatabaseError>(find(db, name).await?) };
                self.database.bounded(reading).await?
            }
            false => None,
        };
        Ok(row.map_or_else(|| Link::unlimited(name.clone()), Link::from))
    }

    /// Returns the short names of all sites, sorted.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn site_names(&self) -> Result<Vec<String>, DatabaseError> {
        let reading = async {
            let mut names: Vec<_> = self.short_names().await?.into_values().collect();
            names.sort_unstable();
            Ok(names)
        };
        self.database.bounded(reading).await
    }

    /// Counts the transfers of each link that have not ended. Reads every such transfer.
    ///
    /// # Errors
    /// The database cannot be reached, or it refuses the statement.
    pub async fn traffic(&self) -> Result<BTreeMap<LinkName, Traffic>, DatabaseError> {
        self.database
            .bounded(async { Ok(self.read_traffic().await?) })
            .await
    }

    async fn read_traffic(&self) -> Result<BTreeMap<LinkName, Traffic>, DbErr> {
        use data_transfer::{Column, Entity, Optional};
        let name = |location: &'static str| Expr::col((location, site::Column::ShortName));
        let count = |statuses: &[Status]| -> SimpleExpr {
            let one = Expr::case(self.status_is(statuses), 1).finally(0);
            Func::sum(one).cast_as("bigint")
        };
        let of_pending =
            |column: Expr| Func::min(Expr::case(self.status_is(&[Status::Pending]), column));
        let oldest = of_pending(Expr::col((Entity, Column::Id))).cast_as("bigint");
        let since = match self.schema.has_transfer_created_at {
            true => of_pending(Expr::col((Entity, Optional::CreatedAt))).cast_as("text"),
            false => Expr::val(None::<String>),
        };
        let mut query = Query::select();
        query
            .from(Entity)
            .expr_as(name("origin_site"), "origin")
            .expr_as(name("destination_site"), "destination")
            .expr_as(count(&[Status::InProgress]), "active")
            .expr_as(count(&[Status::Scheduled]), "scheduled")
            .expr_as(count(&[Status::Pending]), "pending")
            .expr_as(oldest, "oldest")
            .expr_as(since, "since")
            .and_where(self.status_is(&[Status::Pending, Status::Scheduled, Status::InProgress]))
            .add_group_by([name("origin_site"), name("destination_site")]);
        for (location, site, key) in [
            ("origin", "origin_site", Column::OriginLocationId),
            (
                "destination",
                "destination_site",
                Column::DestinationLocationId,
            ),
        ] {
            query
                .join_as(
                    JoinType::InnerJoin,
                    data_location::Entity,
                    location,
                    Expr::col((location, data_location::Column::Id)).equals((Entity, key)),
                )
                .join_as(
                    JoinType::InnerJoin,
                    site::Entity,
                    site,
                    Expr::col((site, site::Column::Id))
                        .equals((location, data_location::Column::SiteId)),
                );
        }
        let count = |row: &QueryResult, column: &str| -> Result<u64, DbErr> {
            let count: i64 = row.try_get("", column)?;
            Ok(u64::try_from(count).unwrap_or(0))
        };
        let mut traffic = BTreeMap::new();
        for row in self.database.connection().query_all(&query).await? {
            let name = LinkName {
                origin: row.try_get("", "origin")?,
                destination: row.try_get("", "destination")?,
            };
            let of_link = Traffic {
                active: count(&row, "active")?,
                scheduled: count(&row, "scheduled")?,
                pending: count(&row, "pending")?,
                oldest_pending: row.try_get("", "oldest")?,
                pending_since: row
                    .try_get::<Option<Timestamp>>("", "since")?
                    .map(|Timestamp(time)| time),
            };
            traffic.insert(name, of_link);
        }
        Ok(traffic)
    }

    /// Changes a link and returns its new state.
    ///
    /// # Errors
    /// [`LinkError::NoTable`], [`LinkError::Database`].
    pub async fn set_link(&self, name: &LinkName, change: &LinkChange) -> Result<Link, LinkError> {
        self.change_link(name, async |tx, _| {
            use transfer_worker_link::{Column, Entity};
            let mut update = Entity::update_many();
            if let Some(max_active) = change.max_active {
                update = update.col_expr(Column::MaxActive, Expr::val(max_active.map(i64::from)));
            }
            if let Some(priority) = change.priority {
                update = update.col_expr(Column::Priority, Expr::val(priority));
            }
            if let Some(capacity) = &change.capacity {
                update = update.col_expr(Column::Capacity, Expr::val(capacity.lines().join("\n")));
            }
            if let Some(streams) = change.streams {
                update = update.col_expr(Column::Streams, Expr::val(streams.map(i64::from)));
            }
            if let Some(window) = &change.tcp_window {
                update = update.col_expr(Column::TcpWindow, Expr::val(window.clone()));
            }
            if let Some(rate) = &change.max_rate {
                update = update.col_expr(Column::MaxRate, Expr::val(rate.clone()));
            }
            update.filter(of(name)).exec(tx).await?;
            Ok(())
        })
        .await
    }

    /// Pauses a link: no copy starts any more. With `stops_running`, workers also stop running copies at the next
    /// renewal of their leases.
    ///
    /// # Errors
    /// [`LinkError::Paused`], except when the existing pause lets copies run and the new one stops them; the errors of
    /// [`Self::set_link`].
    pub async fn pause_link(
        &self,
        name: &LinkName,
        by: &str,
        reason: &str,
        stops_running: bool,
    ) -> Result<Link, LinkError> {
        self.change_link(name, async |tx, before| {
            use transfer_worker_link::{Column, Entity};
            if let Some(pause) = before.pause
                && (pause.stops_running || !stops_running)
            {
                let name = name.clone();
                return Err(LinkError::Paused { name, pause });
            }
            let now = database::now(tx).await?;
            Entity::update_many()
                .col_expr(Column::PausedAt, Expr::val(Some(now)))
                .col_expr(Column::PausedBy, Expr::val(Some(replace_nul(by))))
                .col_expr(Column::PauseReason, Expr::val(Some(replace_nul(reason))))
                .col_expr(Column::StopsRunning, Expr::val(stops_running))
                .filter(of(name))
                .exec(tx)
                .await?;
            Ok(())
        })
        .await
    }

    /// Ends a pause.
    ///
    /// # Errors
    /// [`LinkError::NotPaused`]; the errors of [`Self::set_link`].
    pub async fn resume_link(&self, name: &LinkName) -> Result<Link, LinkError> {
        self.change_link(name, async |tx, before| {
            use transfer_worker_link::{Column, Entity};
            if before.pause.is_none() {
                return Err(LinkError::NotPaused(name.clone()));
            }
            Entity::update_many()
                .col_expr(Column::PausedAt, Expr::val(None::<DateTime<Utc>>))
                .col_expr(Column::PausedBy, Expr::val(None::<String>))
                .col_expr(Column::PauseReason, Expr::val(None::<String>))
                .col_expr(Column::StopsRunning, Expr::val(false))
                .filter(of(name))
                .exec(tx)
                .await?;
            Ok(())
        })
        .await
    }

    /// Creates the row of the link if it does not exist, locks it, and changes it.
    async fn change_link(
        &self,
        name: &LinkName,
        change: impl AsyncFnOnce(&DatabaseTransaction, Link) -> Result<(), LinkError>,
    ) -> Result<Link, LinkError> {
        if !self.schema.has_links {
            return Err(LinkError::NoTable);
        }
        let changing = async |tx: &DatabaseTransaction| {
            make(tx, name).await?;
            let before = lock_links(tx, [name]).await?.pop();
            let before = before.map_or_else(|| Link::unlimited(name.clone()), Link::from);
            change(tx, before).await?;
            let after = find(tx, name).await?;
            Ok(after.map_or_else(|| Link::unlimited(name.clone()), Link::from))
        };
        self.database.bounded(self.database.write(changing)).await
    }

    /// Returns the pause that stops the running copy of a transfer, if one exists.
    pub(super) async fn stopped_link(
        &self,
        db: &impl ConnectionTrait,
        id: TransferId,
    ) -> Result<Option<PausedLink>, DbErr> {
        use transfer_worker_link::{Column, Entity};
        if !self.schema.has_links {
            return Ok(None);
        }
        let row = Entity::find()
            .filter(is_link_of_transfer(id))
            .filter(Column::PausedAt.is_not_null())
            .filter(Column::StopsRunning.eq(true))
            .one(db)
            .await?;
        Ok(row.map(Link::from).and_then(paused))
    }

    /// Returns the reason why a copy of a transfer must not begin `now`: a pause of its link, or the limit of the link
    /// if `limit_is_heeded`.
    ///
    /// The manager checked the limit when it sent the message, but the limit may be lower now. The row of the link is
    /// then locked until the transaction ends, so that workers that begin at the same time see each other's copies. A
    /// manager that holds this lock never waits for the row of a transfer, so the caller may hold the lock of such a
    /// row.
    pub(super) async fn closed_link(
        &self,
        tx: &DatabaseTransaction,
        id: TransferId,
        now: DateTime<Utc>,
        limit_is_heeded: bool,
    ) -> Result<Option<ClosedLink>, DbErr> {
        use transfer_worker_link::Entity;
        if !self.schema.has_links {
            return Ok(None);
        }
        let row = Entity::find()
            .filter(is_link_of_transfer(id))
            .one(tx)
            .await?;
        let Some(link) = row.map(Link::from) else {
            return Ok(None);
        };
        let has_limit = limit_is_heeded && link.limit(now).is_some();
        if link.pause.is_some() || !has_limit {
            return Ok(paused(link).map(ClosedLink::Paused));
        }
        // The row may have been changed during the wait for the lock.
        let row = lock_links(tx, [&link.name]).await?.pop();
        let Some(link) = row.map(Link::from) else {
            return Ok(None);
        };
        if link.pause.is_some() {
            return Ok(paused(link).map(ClosedLink::Paused));
        }
        let Some(limit) = link.limit(now) else {
            return Ok(None);
        };
        let copies = self.count_copies(tx, &link.name).await?;
        let name = link.name;
        let is_full = copies >= u64::from(limit);
        Ok(is_full.then_some(ClosedLink::Full(FullLink {
            name,
            limit,
            copies,
        })))
    }

    /// Number of copies over a link by workers of this program. Copies by Python workers are not counted: they have no
    /// lease, and finding them would need a scan of the whole table for each copy.
    async fn count_copies(&self, tx: &DatabaseTransaction, name: &LinkName) -> Result<u64, DbErr> {
        use data_transfer::{Column, Entity};
        let leased = Query::select()
            .column(transfer_worker_lease::Column::DataTransferId)
            .from(transfer_worker_lease::Entity)
            .to_owned();
        let query = Query::select()
            .expr(Func::count(Expr::col((Entity, Column::Id))).cast_as("bigint"))
            .from(Entity)
            .and_where(Expr::col((Entity, Column::Id)).in_subquery(leased))
            .and_where(self.status_is(&[Status::InProgress]))
            .and_where(Column::OriginLocationId.in_subquery(locations_of(&name.origin)))
            .and_where(Column::DestinationLocationId.in_subquery(locations_of(&name.destination)))
            .to_owned();
        let row = tx.query_one(&query).await?;
        let count: i64 = row.map_or(Ok(0), |row| row.try_get_by_index(0))?;
        Ok(u64::try_from(count).unwrap_or(0))
    }
}

/// Condition: the row of this link.
fn of(name: &LinkName) -> Expr {
    use transfer_worker_link::Column;
    Column::Origin
        .eq(name.origin.as_str())
        .and(Column::Destination.eq(name.destination.as_str()))
}

async fn find(
    db: &impl ConnectionTrait,
    name: &LinkName,
) -> Result<Option<transfer_worker_link::Model>, DbErr> {
    transfer_worker_link::Entity::find()
        .filter(of(name))
        .one(db)
        .await
}

/// Condition: the rows of these links.
fn has_one_of_names<'n>(names: impl IntoIterator<Item = &'n LinkName>) -> Condition {
    names
        .into_iter()
        .fold(Condition::any(), |any, name| any.add(of(name)))
}

/// Locks the rows of links until the transaction ends. The order is always the same, so that two transactions that lock
/// several rows cannot deadlock.
pub(super) async fn lock_links<'n>(
    tx: &DatabaseTransaction,
    names: impl IntoIterator<Item = &'n LinkName>,
) -> Result<Vec<transfer_worker_link::Model>, DbErr> {
    use transfer_worker_link::{Column, Entity};
    Entity::find()
        .filter(has_one_of_names(names))
        .order_by_asc(Column::Origin)
        .order_by_asc(Column::Destination)
        .lock(LockType::NoKeyUpdate)
        .all(tx)
        .await
}

/// Adds to the count of scheduled transfers of each link, with one statement for all links with the same number.
pub(super) async fn count_issued(
    tx: &DatabaseTransaction,
    issued: &BTreeMap<&LinkName, i64>,
) -> Result<(), DbErr> {
    use transfer_worker_link::{Column, Entity};
    let counts: BTreeSet<i64> = issued.values().copied().collect();
    for count in counts {
        let alike = issued.iter().filter(|(_, issued)| **issued == count);
        Entity::update_many()
            .col_expr(Column::Issued, Expr::col(Column::Issued).add(count))
            .filter(has_one_of_names(alike.map(|(name, _)| *name)))
            .exec(tx)
            .await?;
    }
    Ok(())
}

async fn make(tx: &DatabaseTransaction, name: &LinkName) -> Result<(), DbErr> {
    use transfer_worker_link::{ActiveModel, Column, Entity};
    let row = ActiveModel {
        origin: Set(replace_nul(&name.origin)),
        destination: Set(replace_nul(&name.destination)),
        priority: Set(0),
        capacity: Set(String::new()),
        stops_running: Set(false),
        issued: Set(0),
        ..Default::default()
    };
    let already = OnConflict::columns([Column::Origin, Column::Destination])
        .do_nothing()
        .to_owned();
    Entity::insert(row)
        .on_conflict(already)
        .exec_without_returning(tx)
        .await
        .map(drop)
}

/// Condition: the row of a transfer's link.
fn is_link_of_transfer(id: TransferId) -> Condition {
    use data_transfer::Column as Transfer;
    use transfer_worker_link::Column;
    Condition::all()
        .add(Column::Origin.in_subquery(site_of(id, Transfer::OriginLocationId)))
        .add(Column::Destination.in_subquery(site_of(id, Transfer::DestinationLocationId)))
}

/// Returns the pause of a link, if it is paused.
fn paused(link: Link) -> Option<PausedLink> {
    let name = link.name;
    link.pause.map(|pause| PausedLink { name, pause })
}

/// Subquery: ids of a site's locations.
fn locations_of(short_name: &str) -> SelectStatement {
    use data_location::{Column, Entity};
    Query::select()
        .column((Entity, Column::Id))
        .from(Entity)
        .inner_join(
            site::Entity,
            Expr::col((site::Entity, site::Column::Id)).equals((Entity, Column::SiteId)),
        )
        .and_where(Expr::col((site::Entity, site::Column::ShortName)).eq(short_name))
        .to_owned()
}

/// Subquery: short name of the site at one end of a transfer.
fn site_of(id: TransferId, end: data_transfer::Column) -> SelectStatement {
    use data_location::Column as Location;
    Query::select()
        .column((site::Entity, site::Column::ShortName))
        .from(data_transfer::Entity)
        .inner_join(
            data_location::Entity,
            Expr::col((data_location::Entity, Location::Id)).equals((data_transfer::Entity, end)),
        )
        .inner_join(
            site::Entity,
            Expr::col((site::Entity, site::Column::Id))
                .equals((data_location::Entity, Location::SiteId)),
        )
        .and_where(Expr::col((data_transfer::Entity, data_transfer::Column::Id)).eq(id))
        .to_owned()
}

impl From<transfer_worker_link::Model> for Link {
    fn from(row: transfer_worker_link::Model) -> Self {
        Self {
            name: LinkName {
                origin: row.origin,
                destination: row.destination,
            },
            // A negative limit counts as 0: nothing may run.
            max_active: row
                .max_active
                .map(|limit| u32::try_from(Ord::max(limit, 0)).unwrap_or(u32::MAX)),
            priority: row.priority,
            capacity: Capacity::stored(&row.capacity),
            overrides: Overrides {
                streams: row.streams,
                tcp_window: row.tcp_window,
                max_rate: row.max_rate,
            },
            pause: row.paused_at.map(|since| Pause {
                since,
                by: row.paused_by.unwrap_or_default(),
                reason: row.pause_reason.unwrap_or_default(),
                stops_running: row.stops_running,
            }),
            issued: row.issued,
        }
    }
}
