//! The data as they are read from the database, for all viewers.
//!
//! A [`Part`] is read at most once at a time, however many viewers there are, and not again before it is a second old. A
//! part that is expensive to read is refreshed in the background, and at most for a twentieth of the time. Nothing is
//! read without viewers. If the database fails, the last data remain, with the time since when.

mod cache;
mod log;
mod source;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use entity::Status;

use self::cache::Cache;
use self::source::{Part, Source};
use super::error::WebError;
use super::model::{Overview, Period, Throughput, Transfer, Transfers, Unreachable};
use super::overview::{self, EndedAttempts};
use super::search::TransferSearch;
use crate::explanation::{Explanation, RoutingInfo};
use crate::settings::Settings;
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::lease::Owner;
use crate::transfer::link::{Link, LinkName};
use crate::transfer::repository::{
    Cause, ListError, LocationRecord, ProgramRecord, Repository, TransferCount, TransferDetail,
    TransferSummary,
};

/// Maximum number of running transfers in a list.
const MAX_RUNNING: u64 = 1_000;

/// Longest wait of a viewer for new data.
const PATIENCE: Duration = Duration::from_secs(2);

/// Longest wait of a viewer for the first count of all transfers, without which the overview can be shown.
const PATIENCE_FOR_COUNT: Duration = Duration::from_millis(50);

/// Time after which a SCHEDULED transfer counts as not taken, if the manager does not look for lost messages.
const UNTAKEN_AFTER: Duration = Duration::from_secs(300);

/// Name of this program as an observer of leases.
const OBSERVER: &str = "status-page";

/// Data that change with every progress of a copy.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) at: DateTime<Utc>,
    pub(super) running: Vec<TransferSummary>,
    pub(super) links: Vec<Link>,
    pub(super) routes: Vec<LinkName>,
    pub(super) delayed: Vec<Cause>,
    pub(super) untaken: Vec<Cause>,
    pub(super) programs: Option<Vec<ProgramRecord>>,
}

/// The data of the pages and of the API.
pub struct Snapshots {
    settings: Arc<Settings>,
    source: Arc<Source>,
    live: Part<Live>,
    counted: Part<TransferCount>,
    ended: HashMap<Period, Part<EndedAttempts>>,
    transfers: Cache<TransferId, Result<Option<Arc<Transfer>>, Unreachable>>,
    searches: Cache<TransferSearch, Result<Arc<Transfers>, WebError>>,
    last: Mutex<Option<Composed>>,
}

/// An overview, and the data from which it was made.
struct Composed {
    inputs: Inputs,
    overview: Arc<Overview>,
}

/// Data of an overview.
#[derive(Clone)]
pub(super) struct Inputs {
    pub(super) live: Option<Arc<Live>>,
    pub(super) counted: Option<Arc<TransferCount>>,
    pub(super) ended: Option<Arc<EndedAttempts>>,
    pub(super) unreachable: Option<Unreachable>,
}

impl Inputs {
    fn is_same(&self, other: &Self) -> bool {
        fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
            match (one, other) {
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                (None, None) => true,
                _ => false,
            }
        }
        same(self.live.as_ref(), other.live.as_ref())
            && same(self.counted.as_ref(), other.counted.as_ref())
            && same(self.ended.as_ref(), other.ended.as_ref())
            && self.unreachable == other.unreachable
    }
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshots").finish_non_exhaustive()
    }
}

impl Snapshots {
    /// Creates the snapshots. The database is connected when they are used for the first time.
    #[must_use]
    pub fn new(settings: Arc<Settings>) -> Self {
        let source = Arc::new(Source::new(&settings.ops_db));
        let reconcile = settings.manager.reconcile_after;
        let untaken_after = match reconcile.is_zero() {
            true => UNTAKEN_AFTER,
            false => reconcile,
        };
        let untaken_after = TimeDelta::from_std(untaken_after).unwrap_or(TimeDelta::MAX);
        let ended = |period: Period| {
            let part = Part::expensive(&source, move |repository| read_ended(repository, period));
            (period, part)
        };
        Self {
            live: Part::new(&source, move |repository| {
                read_live(repository, untaken_after)
            }),
            counted: Part::expensive(&source, |repository: Repository| async move {
                repository.count_transfers().await
            }),
            ended: Period::ALL.into_iter().map(ended).collect(),
            transfers: Cache::default(),
            searches: Cache::default(),
            last: Mutex::default(),
            settings,
            source,
        }
    }

    /// The settings of the program.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the state of the whole system. Never fails: without a database, the result says so.
    pub async fn overview(&self) -> Arc<Overview> {
        let ended = async {
            match self.ended.get(&Period::Day) {
                Some(part) => part.latest(PATIENCE).await.0,
                None => None,
            }
        };
        let (live, counted, ended) = tokio::join!(
            self.live.newest(PATIENCE),
            self.counted.latest(PATIENCE_FOR_COUNT),
            ended
        );
        let (live, unreachable) = live;
        let inputs = Inputs {
            live,
            counted: counted.0,
            ended,
            unreachable,
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(composed) if composed.inputs.is_same(&inputs) => composed.overview.clone(),
            _ => {
                let overview = Arc::new(overview::compose(&inputs));
                *last = Some(Composed {
                    inputs,
                    overview: overview.clone(),
                });
                overview
            }
        }
    }

    /// Returns packages and failures over a period; of one link, or of all.
    ///
    /// # Errors
    /// The database cannot be read, and has not been before.
    pub async fn throughput(
        &self,
        period: Period,
        origin: Option<&str>,
        destination: Option<&str>,
    ) -> Result<Throughput, WebError> {
        let part = self.ended.get(&period).ok_or_else(|| {
            WebError::NotFound(format!("there are no data of the period {period}"))
        })?;
        let (ended, unreachable) = part.latest(PATIENCE).await;
        let mut throughput = match ended {
            Some(ended) => ended.throughput.clone(),
            None => {
                return Err(unreachable
                    .unwrap_or_else(|| self.source.silent(PATIENCE))
                    .into());
            }
        };
        throughput.links.retain(|link| {
            origin.is_none_or(|origin| link.origin == origin)
                && destination.is_none_or(|destination| link.destination == destination)
        });
        Ok(throughput)
    }

    /// Returns a transfer with its history; `None` if it does not exist.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn transfer(&self, id: TransferId) -> Result<Option<Arc<Transfer>>, Unreachable> {
        self.transfers.get(id, || self.read_transfer(id)).await
    }

    /// Searches for transfers.
    ///
    /// # Errors
    /// The search names a site or location that does not exist, or the database cannot be read.
    pub async fn search(&self, search: &TransferSearch) -> Result<Arc<Transfers>, WebError> {
        let reading = || self.read_search(search);
        self.searches.get(search.clone(), reading).await
    }

    async fn read_search(&self, search: &TransferSearch) -> Result<Arc<Transfers>, WebError> {
        let search = search.clone();
        let found = self
            .source
            .answer(async move |repository: Repository| {
                let now = repository.database().now().await?;
                match repository.search(&search.request(now)).await {
                    Ok(found) => Ok(Ok(found)),
                    Err(ListError::Database(error)) => Err(error),
                    Err(error @ ListError::UnknownPlace { .. }) => Ok(Err(error.to_string())),
                }
            })
            .await?;
        let found = found.map_err(WebError::BadRequest)?;
        Ok(Arc::new(Transfers {
            transfers: found.transfers,
            next_cursor: found.continue_below.map(|id| id.to_string()),
            searched_to: found.continue_below,
        }))
    }

    async fn read_transfer(&self, id: TransferId) -> Result<Option<Arc<Transfer>>, Unreachable> {
        let found = self
            .source
            .answer(async move |repository: Repository| {
                let Some(detail) = repository.show(id).await? else {
                    return Ok(None);
                };
                let at = repository.database().now().await?;
                let link = match waiting_link(&detail) {
                    Some(name) => Some(repository.link(&name).await?),
                    None => None,
                };
                Ok(Some((detail, at, link)))
            })
            .await?;
        let Some((detail, at, link)) = found else {
            return Ok(None);
        };
        let link = match link {
            None => None,
            Some(link) => {
                let under_way = self.under_way(&link, at).await;
                Some((link, under_way))
            }
        };
        let routing = RoutingInfo::new(&self.settings, link);
        let observer = Owner::current(OBSERVER);
        let explanation = Explanation::of(&detail, &routing, &observer, at);
        let log = log::tail(&self.settings.transfer.log_dir, &detail.attempts).await;
        Ok(Some(Arc::new(Transfer {
            at,
            detail,
            explanation,
            log,
        })))
    }

    /// Number of transfers that are SCHEDULED or IN_PROGRESS on a link with a limit, as of the last count.
    async fn under_way(&self, link: &Link, now: DateTime<Utc>) -> u64 {
        if matches!(link.limit(now), None | Some(0)) {
            return 0;
        }
        let (counted, _) = self.counted.latest(PATIENCE).await;
        let traffic = counted.as_ref().and_then(|c| c.traffic.get(&link.name));
        traffic.map_or(0, |traffic| traffic.active + traffic.scheduled)
    }
}

/// The link of a transfer that may wait for it.
fn waiting_link(detail: &TransferDetail) -> Option<LinkName> {
    let site = |location: &Option<LocationRecord>| {
        let site = location.as_ref()?.site.as_ref()?;
        Some(site.short_name.clone())
    };
    let transfer = &detail.transfer;
    transfer.status.known().filter(|s| *s == Status::Pending)?;
    Some(LinkName {
        origin: site(&transfer.origin)?,
        destination: site(&transfer.destination)?,
    })
}

async fn read_live(
    repository: Repository,
    untaken_after: TimeDelta,
) -> Result<Live, DatabaseError> {
    let at = async { repository.database().now().await };
    let (at, running, links, routes, delayed, untaken, programs) = tokio::try_join!(
        at,
        repository.running(MAX_RUNNING),
        repository.links(),
        repository.routed_links(),
        repository.delayed(),
        repository.untaken(untaken_after),
        repository.programs()
    )?;
    Ok(Live {
        at,
        running,
        links,
        routes: routes.into_iter().map(|route| route.name).collect(),
        delayed,
        untaken,
        programs,
    })
}

async fn read_ended(
    repository: Repository,
    period: Period,
) -> Result<EndedAttempts, DatabaseError> {
    let until = repository.database().now().await?;
    let since = until
        .checked_sub_signed(TimeDelta::from_std(period.length()).unwrap_or(TimeDelta::MAX))
        .unwrap_or(DateTime::UNIX_EPOCH);
    let step_s = u32::try_from(period.bucket().as_secs()).unwrap_or(u32::MAX);
    let counts = repository.ended_counts(since, step_s).await?;
    Ok(EndedAttempts::new(period, since, until, &counts))
}
