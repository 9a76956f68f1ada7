//! Links: their rows, and what stands against a copy.
//!
//! Where the table does not exist (a database that was migrated before there were links), no link
//! has a limit, and none can be changed.

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

use super::{Repository, storable};
use crate::transfer::database::{self, DatabaseError};
use crate::transfer::id::TransferId;
use crate::transfer::link::{
    Capacity, ClosedLink, FullLink, Link, LinkName, Overrides, Pause, PausedLink,
};

/// What is to be changed about a link; what is `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct LinkChange {
    /// `Some(None)` for no limit.
    pub max_active: Option<Option<u32>>,
    /// Higher comes first.
    pub priority: Option<i64>,
    /// The windows of the day, all of them.
    pub capacity: Option<Capacity>,
    /// `Some(None)` leaves it to the settings, as for the next two.
    pub streams: Option<Option<u8>>,
    /// bbcp's TCP window.
    pub tcp_window: Option<Option<String>>,
    /// bbcp's rate limit.
    pub max_rate: Option<Option<String>>,
}

impl LinkChange {
    /// What a link's overrides become by it.
    pub fn lay_over(&self, overrides: &mut Overrides) {
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

/// Why a link was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no table for it.
    #[error("this database has no table transfer_worker_link")]
    NoTable,
    /// It is paused already.
    #[error("the link {name} is paused already, since {} by {}: {}", .pause.since, .pause.by, .pause.reason)]
    Paused {
        /// Which link.
        name: LinkName,
        /// By whom, and why.
        pause: Pause,
    },
    /// It is not paused.
    #[error("the link {0} is not paused")]
    NotPaused(LinkName),
    /// The database.
    #[error("the link could not be changed")]
    Database(#[from] DatabaseError),
}

impl From<DbErr> for LinkError {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

/// What is under way over a link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Copies that run: IN_PROGRESS.
    pub active: u64,
    /// Messages that wait for a worker: SCHEDULED.
    pub scheduled: u64,
    /// Transfers that wait for the manager: PENDING.
    pub pending: u64,
    /// The lowest id of those that are PENDING.
    pub oldest_pending: Option<TransferId>,
    /// Since when the oldest of them waits; none where the ops-db does not keep when rows were made.
    pub pending_since: Option<DateTime<Utc>>,
}

impl Repository {
    /// Whether links can have limits here.
    pub fn has_links(&self) -> bool {
        self.schema.has_links
    }

    /// All links that somebody has said something about, by name.
    ///
    /// # Errors
    /// What the database says.
    pub async fn links(&self) -> Result<Vec<Link>, DatabaseError> {
        use transfer_worker_link::{Column, Entity};
        if !self.schema.has_links {
            return Ok(Vec::new());
        }
        let reading = async {
            let rows = Entity::find()
                .order_by_asc(Column::Origin)
                .order_by_asc(Column::Destination)
                .all(self.database.connection())
                .await?;
            Ok(rows.into_iter().map(Link::from).collect())
        };
        self.database.bounded(reading).await
    }

    /// One link; without limits if nobody has said anything about it.
    ///
    /// # Errors
    /// What the database says.
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

    /// Short names of all sites, sorted.
    ///
    /// # Errors
    /// What the database says.
    pub async fn site_names(&self) -> Result<Vec<String>, DatabaseError> {
        let reading = async {
            let mut names: Vec<_> = self.short_names().await?.into_values().collect();
            names.sort_unstable();
            Ok(names)
        };
        self.database.bounded(reading).await
    }

    /// What is under way, by the short names of both sites. A look at every transfer that is not over.
    ///
    /// # Errors
    /// What the database says.
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

    /// Changes a link, and returns what it is then.
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

    /// Lets no copy start over a link any more; with `stops_running`, workers stop those that run
    /// when they next renew a lease.
    ///
    /// # Errors
    /// [`LinkError::Paused`], unless that pause lets copies run and this one stops them; as
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
                .col_expr(Column::PausedBy, Expr::val(Some(storable(by))))
                .col_expr(Column::PauseReason, Expr::val(Some(storable(reason))))
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
    /// [`LinkError::NotPaused`]; as [`Self::set_link`].
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

    /// Makes the link's row where there is none, locks it, and changes it.
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

    /// The pause that stops the copy of a transfer that runs.
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
            .filter(over_which(id))
            .filter(Column::PausedAt.is_not_null())
            .filter(Column::StopsRunning.eq(true))
            .one(db)
            .await?;
        Ok(row.map(Link::from).and_then(paused))
    }

    /// What stands against a copy of a transfer that is to begin `now`: a pause, or the link's limit,
    /// where that is heeded.
    ///
    /// A limit was heeded when the transfer's message was sent; but it may have become less since. The
    /// link's row is locked then until the transaction ends, so that workers that begin at once see
    /// each other's copies. A manager that holds that lock never waits for a transfer's row, so the
    /// caller may have locked one.
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
        let row = Entity::find().filter(over_which(id)).one(tx).await?;
        let Some(link) = row.map(Link::from) else {
            return Ok(None);
        };
        let has_limit = limit_is_heeded && link.limit(now).is_some();
        if link.pause.is_some() || !has_limit {
            return Ok(paused(link).map(ClosedLink::Paused));
        }
        // It may have been changed while we waited.
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
        let copies = self.copies_over(tx, &link.name).await?;
        let name = link.name;
        let is_full = copies >= u64::from(limit);
        Ok(is_full.then_some(ClosedLink::Full(FullLink {
            name,
            limit,
            copies,
        })))
    }

    /// How many copies of this program's workers run over a link. Not those of Python's workers: they
    /// have no lease, and to find them would be a look at the whole table for each copy.
    async fn copies_over(&self, tx: &DatabaseTransaction, name: &LinkName) -> Result<u64, DbErr> {
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

/// "The row of this link."
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

/// "A row of these links."
fn one_of<'n>(names: impl IntoIterator<Item = &'n LinkName>) -> Condition {
    names
        .into_iter()
        .fold(Condition::any(), |any, name| any.add(of(name)))
}

/// Locks links' rows until the transaction ends, always in the same order, so that two who lock several
/// never wait for each other.
pub(super) async fn lock_links<'n>(
    tx: &DatabaseTransaction,
    names: impl IntoIterator<Item = &'n LinkName>,
) -> Result<Vec<transfer_worker_link::Model>, DbErr> {
    use transfer_worker_link::{Column, Entity};
    Entity::find()
        .filter(one_of(names))
        .order_by_asc(Column::Origin)
        .order_by_asc(Column::Destination)
        .lock(LockType::NoKeyUpdate)
        .all(tx)
        .await
}

/// Notes how many transfers of each link were scheduled: in one statement for all that have as many.
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
            .filter(one_of(alike.map(|(name, _)| *name)))
            .exec(tx)
            .await?;
    }
    Ok(())
}

async fn make(tx: &DatabaseTransaction, name: &LinkName) -> Result<(), DbErr> {
    use transfer_worker_link::{ActiveModel, Column, Entity};
    let row = ActiveModel {
        origin: Set(storable(&name.origin)),
        destination: Set(storable(&name.destination)),
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

/// "The row of the link that a transfer goes over."
fn over_which(id: TransferId) -> Condition {
    use data_transfer::Column as Transfer;
    use transfer_worker_link::Column;
    Condition::all()
        .add(Column::Origin.in_subquery(site_of(id, Transfer::OriginLocationId)))
        .add(Column::Destination.in_subquery(site_of(id, Transfer::DestinationLocationId)))
}

/// The pause of a link, if it is paused.
fn paused(link: Link) -> Option<PausedLink> {
    let name = link.name;
    link.pause.map(|pause| PausedLink { name, pause })
}

/// Ids of a site's locations, as a subquery.
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

/// Short name of the site at one end of a transfer, as a subquery.
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
            // Below 0 means what it must: nothing may run.
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
