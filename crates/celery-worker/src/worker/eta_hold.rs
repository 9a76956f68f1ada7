//! The hold of a delivery until the eta of its task.

use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::in_flight::Phase;
use super::request::Request;
use super::runtime::Runtime;
use crate::clock;

/// Reason why a hold has ended.
pub(super) enum HoldEnd {
    /// The eta is reached.
    EtaReached,
    /// The delivery was held as long as the broker allows.
    LimitReached,
    /// The worker shuts down.
    Shutdown,
}

impl Runtime {
    /// Holds the deliveries of an accepted task until its eta, as long as the broker allows. From then on they do not
    /// count against the prefetch limit.
    pub(super) async fn hold_until_eta(
        &self,
        request: &Arc<Request>,
        eta: DateTime<Utc>,
    ) -> HoldEnd {
        let Ok(left) = (eta - clock::now()).to_std() else {
            return HoldEnd::EtaReached;
        };
        self.in_flight.enter(request, Phase::Scheduled(eta));
        self.in_flight.set_exempt(request, true);
        let limit = self.config.eta_hold;
        let holding = tokio::time::sleep(left.min(limit));
        match self.shutdown.warm.run_until_cancelled(holding).await {
            None => HoldEnd::Shutdown,
            Some(()) if left > limit => HoldEnd::LimitReached,
            Some(()) => HoldEnd::EtaReached,
        }
    }
}
