//! Search for transfers in limited time, however many there are.
//!
//! The ops-db has no indexes for a search, and this program creates none in it. So a search reads the transfers by
//! descending id, in ranges of ids, and ends when its time is over; the next search continues there.

use std::time::{Duration, Instant};

use sea_orm::sea_query::{Expr, ExprTrait as _, Query};
use sea_orm::{ConnectionTrait as _, DbErr};

use entity::data_transfer;

use super::{Filter, ListError, Listing, Repository, TransferSummary};
use crate::transfer::id::TransferId;

/// Number of ids in the first range. A further one is twice as long, unless this may take too long.
const FIRST_RANGE: i64 = 20_000;

/// A range is not made longer if the last one has taken more than this part of the time of a search.
const SHARE_OF_RANGE: u32 = 4;

/// Request for a part of the transfers that a filter selects, the newest first.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// Conditions of the transfers.
    pub filter: Filter,
    /// Only ids below this one.
    pub below: Option<TransferId>,
    /// Maximum number of transfers.
    pub limit: u64,
    /// Time after which no further range is read.
    pub time: Duration,
}

/// Result of a search.
#[derive(Debug, Clone)]
pub struct FoundTransfers {
    /// The transfers, the newest first.
    pub transfers: Vec<TransferSummary>,
    /// All transfers from this id on were searched, and there may be more below; `None` if there are none.
    pub continue_below: Option<TransferId>,
}

impl Repository {
    /// Searches for transfers.
    ///
    /// # Errors
    /// The errors of [`Self::list`].
    pub async fn search(&self, search: &Search) -> Result<FoundTransfers, ListError> {
        let is_indexed = search.filter.ids.is_some() || search.filter.error_code.is_some();
        let Some((lowest, highest)) = self.id_range().await? else {
            return Ok(FoundTransfers {
                transfers: Vec::new(),
                continue_below: None,
            });
        };
        let begin = Instant::now();
        let wanted = usize::try_from(search.limit).unwrap_or(usize::MAX);
        let mut transfers: Vec<TransferSummary> = Vec::new();
        let mut below = highest.saturating_add(1);
        if let Some(limit) = search.below {
            below = Ord::min(below, limit.get());
        }
        let mut range = if is_indexed { i64::MAX } else { FIRST_RANGE };
        while below > lowest {
            let from = Ord::max(below.saturating_sub(range), lowest);
            let listing = Listing {
                filter: Filter {
                    id_range: Some((TransferId::new(from), TransferId::new(below))),
                    ..search.filter.clone()
                },
                // One more shows whether the list is complete.
                limit: Some(search.limit.saturating_add(1) - found(&transfers)),
                ..Listing::default()
            };
            let begin_of_range = Instant::now();
            transfers.extend(self.list(&listing).await?);
            if transfers.len() > wanted {
                transfers.truncate(wanted);
                return Ok(FoundTransfers {
                    continue_below: transfers.last().map(|transfer| transfer.id),
                    transfers,
                });
            }
            below = from;
            if begin_of_range.elapsed() < search.time / SHARE_OF_RANGE {
                range = range.saturating_mul(2);
            }
            if begin.elapsed() >= search.time {
                break;
            }
        }
        Ok(FoundTransfers {
            transfers,
            continue_below: (below > lowest).then_some(TransferId::new(below)),
        })
    }

    /// Returns the lowest and the highest id; `None` without transfers.
    async fn id_range(&self) -> Result<Option<(i64, i64)>, DbErr> {
        use data_transfer::{Column, Entity};
        // A statement of its own for each: together, SQLite would read all rows.
        let limit = |limit: Expr| {
            let query = Query::select()
                .expr(limit.cast_as("bigint"))
                .from(Entity)
                .to_owned();
            async move {
                let row = self.database.connection().query_one(&query).await?;
                row.map_or(Ok(None), |row| row.try_get_by_index::<Option<i64>>(0))
            }
        };
        let lowest = limit(Expr::col(Column::Id).min()).await?;
        let highest = limit(Expr::col(Column::Id).max()).await?;
        Ok(lowest.zip(highest))
    }
}

fn found(transfers: &[TransferSummary]) -> u64 {
    u64::try_from(transfers.len()).unwrap_or(u64::MAX)
}
