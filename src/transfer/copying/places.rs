//! Limit of the copies that one worker runs on a link at the same time.
//!
//! A worker may have more transfers than copies: the others are prepared, or finished, meanwhile. So the link is not idle
//! between two copies. bbcp needs seconds to start over a long link; so a place is free shortly before the last byte.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::CopyProgress;
use crate::transfer::link::LinkName;

/// Time before the expected end of a copy by bbcp at which the next one may start. Over a round trip of 240 ms, bbcp needs
/// about as long for its first byte.
const LEAD: Duration = Duration::from_secs(4);

/// The places for copies of all links. Clones share them.
#[derive(Debug, Clone)]
pub(in crate::transfer) struct CopyPlaces {
    /// Number of places per link; 0 for no limit.
    per_link: usize,
    links: Arc<Mutex<HashMap<LinkName, Arc<Semaphore>>>>,
}

/// A place for one copy, until it is dropped.
#[derive(Debug)]
pub(in crate::transfer) struct CopyPlace {
    /// `None` without a limit.
    permit: Option<OwnedSemaphorePermit>,
    /// Time before the end of the copy at which the place is free.
    lead: Option<Duration>,
}

impl CopyPlaces {
    pub(in crate::transfer) fn new(per_link: usize) -> Self {
        Self {
            per_link,
            links: Arc::default(),
        }
    }

    /// Waits for a place. The place is free some time before the end of the copy if that `needs_time` to start.
    pub(in crate::transfer) async fn take(&self, link: &LinkName, needs_time: bool) -> CopyPlace {
        let lead = needs_time.then_some(LEAD);
        let permit = match self.per_link {
            0 => None,
            // The semaphore is never closed.
            _ => self.places(link).acquire_owned().await.ok(),
        };
        CopyPlace { permit, lead }
    }

    fn places(&self, link: &LinkName) -> Arc<Semaphore> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Semaphore::new(self.per_link));
        links.entry(link.clone()).or_insert_with(new).clone()
    }
}

impl CopyPlace {
    /// Time at which the place will be free, according to the progress. `None` if only the end of the copy frees it.
    pub(in crate::transfer) fn free_at(
        &self,
        progress: &CopyProgress,
        now: Instant,
    ) -> Option<Instant> {
        self.permit.as_ref()?;
        let rate = progress.rate_bytes_per_s.filter(|rate| *rate >= 1.0)?;
        let rest = progress.bytes_total.saturating_sub(progress.bytes_done);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let rest = Duration::try_from_secs_f64(rest as f64 / rate).ok()?;
        now.checked_add(rest.saturating_sub(self.lead?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn link(destination: &str) -> LinkName {
        LinkName {
            origin: "ccat".into(),
            destination: destination.into(),
        }
    }

    #[tokio::test]
    async fn places_are_limited_for_each_link() {
        let places = CopyPlaces::new(1);
        let (one, other) = (link("cologne"), link("cornell"));
        let first = places.take(&one, true).now_or_never().unwrap();
        assert!(places.take(&one, true).now_or_never().is_none());
        assert!(places.take(&other, true).now_or_never().is_some());
        drop(first);
        assert!(places.take(&one, true).now_or_never().is_some());
        let unlimited = CopyPlaces::new(0);
        let _first = unlimited.take(&one, true).now_or_never().unwrap();
        assert!(unlimited.take(&one, true).now_or_never().is_some());
    }

    #[tokio::test]
    async fn place_is_free_before_the_last_byte() {
        let now = Instant::now();
        let progress = |bytes_done, rate_bytes_per_s| CopyProgress {
            bytes_done,
            bytes_total: 1000,
            rate_bytes_per_s,
        };
        let places = CopyPlaces::new(1);
        let place = places.take(&link("a"), true).await;
        let second = Duration::from_secs(1);
        assert_eq!(
            place.free_at(&progress(0, Some(100.0)), now),
            Some(now + 6 * second)
        );
        assert_eq!(place.free_at(&progress(900, Some(100.0)), now), Some(now));
        for rate in [None, Some(0.0), Some(f64::NAN), Some(f64::INFINITY)] {
            let at = place.free_at(&progress(0, rate), now);
            assert!(at.is_none_or(|at| at == now), "{rate:?}");
        }
        let place = places.take(&link("b"), false).await;
        assert_eq!(place.free_at(&progress(900, Some(100.0)), now), None);
    }
}
