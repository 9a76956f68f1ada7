//! Survey of the links: one read of the table, and the selection of transfers to schedule over each link.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, PoisonError};

use chrono::{DateTime, Utc};
use entity::Status;
use tokio::time::Instant;

use super::{Manager, Pass};
use crate::settings::{QueueLocation, Settings};
use crate::transfer::database::DatabaseError;
use crate::transfer::id::TransferId;
use crate::transfer::link::{self, Link, LinkName};
use crate::transfer::repository::{Allowance, Candidate, OpenTransfer, ScanCursor, TransferEnd};
use crate::transfer::routing::queue_name;

/// Result of one survey.
pub(super) struct SurveyResult {
    /// Transfers to schedule, in order.
    pub(super) selected: Vec<Candidate>,
    /// Transfers that are SCHEDULED, with their queues.
    pub(super) scheduled: Vec<(TransferId, Option<Arc<str>>)>,
}

impl Manager {
    /// Reads the transfers to schedule in this pass, in order, and those that are SCHEDULED.
    pub(super) async fn survey(&self, pass: &mut Pass) -> Result<SurveyResult, DatabaseError> {
        // The links are read before the active transfers are counted, see `Allowance::issued`.
        let links = self.repository.links().await?;
        let locations = self.repository.transfer_ends().await?;
        let now = self.repository.database().now().await?;
        let sites = &self.settings.manager.sites;
        let origins: Option<Vec<_>> = (!sites.is_empty()).then(|| {
            let is_ours = |place: &TransferEnd| sites.contains(&place.site);
            let ours = locations.iter().filter(|(_, place)| is_ours(place));
            ours.map(|(id, _)| *id).collect()
        });
        if origins.as_ref().is_some_and(Vec::is_empty) {
            tracing::error!(
                ?sites,
                "nothing is scheduled; no location is at a site of manager.sites"
            );
        }
        let mut survey = Survey::new(links, &locations, now, &self.settings);
        let before = self.cursor();
        let since = before.as_ref().map(|(cursor, _)| cursor);
        let cursor = self
            .repository
            .scan(origins.as_deref(), since, |transfer| survey.count(transfer))
            .await?;
        // A partial scan keeps the time of the full scan that it is based on.
        let scanned_at = before.map_or_else(Instant::now, |(_, scanned_at)| scanned_at);
        *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) =
            cursor.map(|cursor| (cursor, scanned_at));
        Ok(survey.finish(pass))
    }

    /// Result of the previous scan, if it is recent enough.
    fn cursor(&self) -> Option<(ScanCursor, Instant)> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let every = self.settings.manager.full_look_interval;
        // The cursor is removed here, so that a failed pass is followed by a full scan.
        cursor
            .take()
            .filter(|(_, scanned_at)| scanned_at.elapsed() < every)
    }
}

/// The locations at both ends of a transfer.
type Ends = (Option<i64>, Option<i64>);

/// The link of a transfer, by its position in the survey, and the queue of its message.
type Route = (usize, Arc<str>);

/// State of the links, as read at the start of a pass, with their transfers.
struct Survey<'a> {
    locations: &'a HashMap<i64, TransferEnd>,
    settings: &'a Settings,
    now: DateTime<Utc>,
    links: Vec<LinkState>,
    by_name: BTreeMap<LinkName, usize>,
    /// Link of each pair of ends; `None` if no link connects them.
    known: HashMap<Ends, Option<Route>>,
    waiting: u64,
    unroutable: Vec<TransferId>,
    /// Rows that are SCHEDULED, with their queues.
    scheduled: Vec<(TransferId, Option<Arc<str>>)>,
}

/// One link in a survey.
struct LinkState {
    link: Link,
    limit: Option<u64>,
    active: u64,
    pending: u64,
    /// The oldest due transfers, at most as many as the limit.
    queue: VecDeque<(TransferId, Arc<str>)>,
}

impl<'a> Survey<'a> {
    fn new(
        links: Vec<Link>,
        locations: &'a HashMap<i64, TransferEnd>,
        now: DateTime<Utc>,
        settings: &'a Settings,
    ) -> Self {
        let mut survey = Self {
            locations,
            settings,
            now,
            links: Vec::new(),
            by_name: BTreeMap::new(),
            known: HashMap::new(),
            waiting: 0,
            unroutable: Vec::new(),
            scheduled: Vec::new(),
        };
        for link in links {
            if let Some(problem) = link.capacity.problem() {
                tracing::error!(
                    link = %link.name,
                    error = %problem,
                    "link is closed: its capacity windows cannot be read"
                );
            }
            survey.add(link);
        }
        survey
    }

    fn add(&mut self, link: Link) -> usize {
        let index = self.links.len();
        self.by_name.insert(link.name.clone(), index);
        self.links.push(LinkState {
            limit: link.limit(self.now).map(u64::from),
            link,
            active: 0,
            pending: 0,
            queue: VecDeque::new(),
        });
        index
    }

    fn count(&mut self, transfer: OpenTransfer) {
        let route = self.route(&transfer);
        let is_pending = transfer.status == Status::Pending;
        if transfer.status == Status::Scheduled {
            let queue = route.as_ref().map(|(_, queue)| queue.clone());
            self.scheduled.push((transfer.id, queue));
        }
        if is_pending && transfer.has_delay {
            self.waiting += 1;
            return;
        }
        let Some((index, queue)) = route else {
            if is_pending {
                self.unroutable.push(transfer.id);
            }
            return;
        };
        let Some(link_state) = self.links.get_mut(index) else {
            return;
        };
        if !is_pending {
            link_state.active += 1;
            return;
        }
        link_state.pending += 1;
        let has_room = |limit| (link_state.queue.len() as u64) < limit;
        if link_state.limit.is_none_or(has_room) {
            link_state.queue.push_back((transfer.id, queue));
        }
    }

    fn route(&mut self, transfer: &OpenTransfer) -> Option<Route> {
        let ends = (
            transfer.origin_location_id,
            transfer.destination_location_id,
        );
        if let Some(known) = self.known.get(&ends) {
            return known.clone();
        }
        let route = self.find_route(ends);
        self.known.insert(ends, route.clone());
        route
    }

    fn find_route(&mut self, (origin, destination): Ends) -> Option<Route> {
        let origin = self.locations.get(&origin?)?;
        let destination = self.locations.get(&destination?)?;
        let end = match self.settings.transfer.queue_location {
            QueueLocation::Origin => origin,
            QueueLocation::Destination => destination,
        };
        let queue = queue_name(
            &self.settings.transfer.queue_prefix,
            &end.site,
            &end.location,
        );
        let name = LinkName {
            origin: origin.site.clone(),
            destination: destination.site.clone(),
        };
        let index = match self.by_name.get(&name) {
            Some(index) => *index,
            None => self.add(Link::unlimited(name)),
        };
        Some((index, queue.into()))
    }

    /// Selects the transfers to schedule, in order; the others are counted in `pass`.
    fn finish(self, pass: &mut Pass) -> SurveyResult {
        pass.waiting = self.waiting;
        for id in self.unroutable {
            let reason = "its location or the location's site is missing; correct the row";
            pass.refuse(id, reason.into());
        }
        let mut queues = Vec::new();
        for link_state in self.links {
            let free = link_state
                .limit
                .map(|limit| limit.saturating_sub(link_state.active));
            let mut queue = link_state.queue;
            if let Some(free) = free {
                queue.truncate(usize::try_from(free).unwrap_or(usize::MAX));
            }
            let held_back = link_state.pending.saturating_sub(queue.len() as u64);
            pass.held_back += held_back;
            if held_back > 0 {
                tracing::debug!(
                    link = %link_state.link.name,
                    limit = link_state.limit,
                    active = link_state.active,
                    pending = link_state.pending,
                    paused = link_state.link.pause.is_some(),
                    "transfers wait for their link"
                );
            }
            let allowance = free.map(|free| {
                Arc::new(Allowance {
                    link: link_state.link.name,
                    free,
                    issued: link_state.link.issued,
                })
            });
            let selected = queue.into_iter().map(|(id, queue)| Candidate {
                id,
                queue,
                allowance: allowance.clone(),
            });
            queues.push((link_state.link.priority, selected.collect()));
        }
        SurveyResult {
            selected: link::in_turn(queues),
            scheduled: self.scheduled,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::transfer::link::Pause;

    fn name(origin: &str, destination: &str) -> LinkName {
        LinkName {
            origin: origin.into(),
            destination: destination.into(),
        }
    }

    /// Locations 1, 2, 3 at the sites a, b, c.
    fn survey(links: Vec<Link>, transfers: &[(i64, Status, i64, i64)]) -> (Vec<i64>, Pass) {
        let locations = [(1, "a"), (2, "b"), (3, "c")].map(|(id, site)| {
            let endpoint = TransferEnd {
                site: site.into(),
                location: "buffer".into(),
            };
            (id, endpoint)
        });
        let (locations, settings) = (
            HashMap::from(locations),
            crate::settings::load(None, []).unwrap(),
        );
        let mut survey = Survey::new(links, &locations, crate::clock::now(), &settings);
        for (id, status, origin, destination) in transfers {
            survey.count(OpenTransfer {
                id: TransferId::new(*id),
                status: *status,
                origin_location_id: Some(*origin),
                destination_location_id: Some(*destination),
                has_delay: *id >= 100,
            });
        }
        let mut pass = Pass::default();
        let selected = survey.finish(&mut pass).selected;
        assert!(
            selected
                .iter()
                .all(|candidate| candidate.queue.ends_with("_buffer_data_transfer"))
        );
        (
            selected
                .iter()
                .map(|candidate| candidate.id.get())
                .collect(),
            pass,
        )
    }

    use Status::{InProgress, Pending, Scheduled};

    #[test]
    fn running_transfers_count_against_the_limit() {
        let limited = Link {
            max_active: Some(3),
            ..Link::unlimited(name("a", "b"))
        };
        let transfers = [
            (1, InProgress, 1, 2),
            (2, Scheduled, 1, 2),
            (3, Pending, 1, 2),
            (4, Pending, 1, 2),
            (5, Pending, 2, 1),
            (6, Pending, 2, 1),
        ];
        let (selected, pass) = survey(vec![limited.clone()], &transfers);
        assert_eq!(selected, [3, 5, 6]);
        assert_eq!(pass.held_back, 1);
        // More transfers run than the limit allows, for example after the limit was lowered.
        let lowered = Link {
            max_active: Some(1),
            ..limited
        };
        assert_eq!(survey(vec![lowered], &transfers).0, [5, 6]);
    }

    #[test]
    fn destinations_take_turns_and_a_paused_one_has_none() {
        let transfers = [
            (1, Pending, 1, 2),
            (2, Pending, 1, 2),
            (3, Pending, 1, 2),
            (4, Pending, 1, 3),
            (5, Pending, 3, 2),
            (6, Pending, 3, 2),
        ];
        let (selected, pass) = survey(vec![], &transfers);
        assert_eq!((selected, pass.held_back), (vec![1, 4, 5, 2, 6, 3], 0));
        let first = Link {
            priority: 1,
            ..Link::unlimited(name("c", "b"))
        };
        let paused = Link {
            pause: Some(Pause {
                since: crate::clock::now(),
                by: "me@here".into(),
                reason: "storm".into(),
                stops_running: false,
            }),
            ..Link::unlimited(name("a", "b"))
        };
        let (selected, pass) = survey(vec![paused, first], &transfers);
        assert_eq!((selected, pass.held_back), (vec![5, 6, 4], 3));
    }

    #[test]
    fn unusable_and_waiting_transfers_are_reported() {
        let transfers = [
            (1, Pending, 1, 9),
            (2, InProgress, 9, 1),
            (100, Pending, 1, 2),
            (101, Pending, 1, 9),
        ];
        let (selected, pass) = survey(vec![], &transfers);
        assert_eq!((selected, pass.waiting, pass.held_back), (vec![], 2, 0));
        let refused: Vec<_> = pass.refused.iter().map(|r| r.data_transfer_id).collect();
        assert_eq!(refused, [TransferId::new(1)]);
    }
}
