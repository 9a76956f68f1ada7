//! The manager: finds the transfers that wait, gives each a message, and takes up again what
//! dead workers left.
//!
//! A row becomes SCHEDULED in the same transaction in which its message is confirmed by the
//! broker. So no row is ever SCHEDULED without a message; the other way round (a message whose
//! row is still PENDING, after a crash between confirm and commit) does no harm, since a worker
//! takes PENDING rows, too, and the second message finds the work done.
//!
//! A pass looks first, without a lock, at everything that is not over. From that it knows how much
//! each link has under way and how much more its limit allows, and picks: links of a higher priority
//! first, links of one priority in turn, of each the oldest first. What it has picked it schedules in
//! batches, each in one transaction whose messages are all on their way at once.
//!
//! Any number of managers may run, with or without a site of their own each: row locks keep them from
//! scheduling a transfer twice, and the locks of the links' rows from exceeding a limit together.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use entity::Status;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::faults::fault_point;
use crate::settings::{QueueLocation, Settings};
use crate::telemetry::chain;
use crate::transfer::database::DatabaseError;
use crate::transfer::lease::Owner;
use crate::transfer::link::{self, Link, LinkName};
use crate::transfer::repository::{
    Allowance, Candidate, Endpoint, OpenTransfer, Repository, Watch,
};
use crate::transfer::routing::queue_name;

/// So many publications that fail, with none between that succeeds, mean that the broker is away.
const GIVE_UP_AFTER: usize = 3;

/// Longest time that a batch waits for the broker's confirmations: its rows are locked meanwhile,
/// and on SQLite the whole database.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(2);

/// How long a pass tries to reach the broker, before it has locked anything.
const REACHED_WITHIN: Duration = Duration::from_secs(5);

/// Rows in one transaction. It begins with few, and follows what the batch before took.
const BATCH: BatchSize = BatchSize {
    least: 10,
    first: 50,
    most: 200,
    quick: Duration::from_millis(250),
    slow: Duration::from_millis(500),
};

/// Sends the message that starts a transfer.
#[async_trait]
pub trait Submit: Send + Sync {
    /// Makes ready to send, so that nothing of it has to be done while rows are locked.
    async fn prepare(&self, within: Duration) -> Result<(), SubmitError>;

    /// Sends it to `queue`; done when the broker has taken responsibility for it.
    async fn submit(&self, data_transfer_id: i64, queue: &str) -> Result<(), SubmitError>;
}

/// A message could not be sent.
#[derive(Debug, thiserror::Error)]
#[error("the message could not be sent")]
pub struct SubmitError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Schedules transfers.
pub struct Manager {
    repository: Repository,
    settings: Arc<Settings>,
    owner: Owner,
    submit: Arc<dyn Submit>,
    /// What the look before has found, and when all rows were looked at.
    watch: Mutex<Option<(Watch, Instant)>>,
}

/// What one pass did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Pass {
    /// Transfers that got a message.
    pub scheduled: Vec<Assignment>,
    /// Transfers that somebody else scheduled meanwhile.
    pub taken: usize,
    /// Transfers that stay PENDING, and why.
    pub refused: Vec<Refusal>,
    /// Transfers that a dead worker left, PENDING again.
    pub recovered: Vec<i64>,
    /// How many PENDING transfers wait to be tried again later.
    pub waiting: u64,
    /// How many PENDING transfers wait for their link: its limit is reached, or it is paused.
    pub held_back: u64,
}

/// A transfer and the queue that its message went to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assignment {
    /// The transfer.
    pub data_transfer_id: i64,
    /// The queue.
    pub queue: String,
}

/// A transfer that could not be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The transfer.
    pub data_transfer_id: i64,
    /// Why.
    pub reason: String,
}

/// A pass that could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The database.
    #[error("the transfers that wait could not be read or scheduled")]
    Database(#[from] DatabaseError),
    /// The broker. Rows without a message stay PENDING.
    #[error("messages could not be sent; their transfers stay pending")]
    Broker(#[source] SubmitError),
}

impl ManagerError {
    /// Name of the Python exception that a Celery caller sees.
    #[must_use]
    pub fn exc_type(&self) -> &'static str {
        match self {
            Self::Database(_) => "DatabaseError",
            Self::Broker(_) => "ScheduleError",
        }
    }
}

/// A transfer that is to be scheduled, and where its message goes.
#[derive(Debug)]
struct Pick {
    candidate: Candidate,
    queue: Arc<str>,
}

impl Manager {
    /// A manager that sends through `submit`.
    #[must_use]
    pub fn new(
        repository: Repository,
        settings: Arc<Settings>,
        owner: Owner,
        submit: Arc<dyn Submit>,
    ) -> Self {
        Self {
            repository,
            settings,
            owner,
            submit,
            watch: Mutex::new(None),
        }
    }

    /// Runs passes for ever, with a pause between them, until `stop`. A pass that fails is logged;
    /// the next one tries again.
    pub async fn transfer_manager_service(&self, stop: &CancellationToken) {
        let pause = self.settings.manager.sleep_time;
        tracing::info!(sleep_s = pause.as_secs_f64(), "manager ready");
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                pass = self.transfer_transfer_packages(false) => {
                    if let Err(error) = pass {
                        tracing::warn!(error = %chain(&error), "pass failed; the next one tries again");
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        tracing::info!("manager stopped");
    }

    /// One pass: recovers, then schedules every PENDING transfer that is due and that its link has
    /// room for. With `verbose` every row has a line in the log.
    ///
    /// # Errors
    /// [`ManagerError`]. A row that is bad in itself is no error of the pass but a [`Refusal`].
    pub async fn transfer_transfer_packages(&self, verbose: bool) -> Result<Pass, ManagerError> {
        let mut pass = Pass {
            recovered: self.recover().await?,
            ..Pass::default()
        };
        let mut picks = VecDeque::from(self.pick(&mut pass).await?);
        let mut broken = None;
        if !picks.is_empty() {
            broken = self.submit.prepare(REACHED_WITHIN).await.err();
        }
        let mut size = BATCH.first;
        while broken.is_none() && !picks.is_empty() {
            let batch: Vec<_> = picks.drain(..size.min(picks.len())).collect();
            let began = Instant::now();
            broken = self.schedule(batch, &mut pass, verbose).await?;
            size = BATCH.next(size, began.elapsed());
        }
        tracing::info!(
            scheduled = pass.scheduled.len(),
            refused = pass.refused.len(),
            taken = pass.taken,
            recovered = pass.recovered.len(),
            waiting = pass.waiting,
            held_back = pass.held_back,
            "pass finished"
        );
        match broken {
            Some(error) => Err(ManagerError::Broker(error)),
            None => Ok(pass),
        }
    }

    /// Puts transfers of dead workers back.
    ///
    /// # Errors
    /// What the database says.
    pub async fn recover(&self) -> Result<Vec<i64>, DatabaseError> {
        recover(&self.repository, &self.owner).await
    }

    /// What this pass is to schedule, in order.
    async fn pick(&self, pass: &mut Pass) -> Result<Vec<Pick>, DatabaseError> {
        // Before what is under way is counted: see `Allowance::issued`.
        let links = self.repository.links().await?;
        let places = self.repository.places().await?;
        let now = self.repository.database().now().await?;
        let sites = &self.settings.manager.sites;
        let origins: Option<Vec<_>> = (!sites.is_empty()).then(|| {
            let is_ours = |place: &Endpoint| sites.contains(&place.site);
            let ours = places.iter().filter(|(_, place)| is_ours(place));
            ours.map(|(id, _)| *id).collect()
        });
        if origins.as_ref().is_some_and(Vec::is_empty) {
            tracing::error!(
                ?sites,
                "nothing is scheduled; no location is at a site of manager.sites"
            );
        }
        let mut survey = Survey::new(links, &places, now, &self.settings);
        let before = self.watch();
        let since = before.as_ref().map(|(watch, _)| watch);
        let watch = self
            .repository
            .look(origins.as_deref(), since, |transfer| survey.see(transfer))
            .await?;
        // A look at a part is as old as the look at all that it rests on.
        let looked = before.map_or_else(Instant::now, |(_, looked)| looked);
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) =
            watch.map(|watch| (watch, looked));
        Ok(survey.picks(pass))
    }

    /// What is known from the look before, if it is not too old.
    fn watch(&self) -> Option<(Watch, Instant)> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let every = self.settings.manager.full_look_interval;
        // Taken out: a pass that fails is followed by a look at everything.
        watch.take().filter(|(_, looked)| looked.elapsed() < every)
    }

    /// Schedules a batch, or its parts where the database refuses the whole. Returns the error of the
    /// broker, if it seems to be away.
    async fn schedule(
        &self,
        batch: Vec<Pick>,
        pass: &mut Pass,
        verbose: bool,
    ) -> Result<Option<SubmitError>, DatabaseError> {
        let mut parts = vec![batch];
        while let Some(mut batch) = parts.pop() {
            match self.schedule_at_once(&batch, pass, verbose).await {
                Ok(None) => {}
                Ok(broken) => return Ok(broken),
                Err(error) if error.is_unreachable() => return Err(error),
                Err(error) => match &batch[..] {
                    [pick] => pass.refuse(pick.candidate.id, chain(&error).to_string()),
                    // One row is bad, and must not be in the way of the others.
                    _ => {
                        parts.push(batch.split_off(batch.len() / 2));
                        parts.push(batch);
                    }
                },
            }
        }
        Ok(None)
    }

    async fn schedule_at_once(
        &self,
        batch: &[Pick],
        pass: &mut Pass,
        verbose: bool,
    ) -> Result<Option<SubmitError>, DatabaseError> {
        let candidates: Vec<_> = batch.iter().map(|pick| pick.candidate.clone()).collect();
        let queues: HashMap<_, _> = batch
            .iter()
            .map(|pick| (pick.candidate.id, pick.queue.clone()))
            .collect();
        let failures = Mutex::new(HashMap::new());
        let publish = |ids: Vec<i64>| async {
            let (confirmed, failed) = self.publish(ids, &queues).await;
            *failures.lock().unwrap_or_else(PoisonError::into_inner) = failed;
            confirmed
        };
        let done = fault_point!(
            ManagerCommitted,
            self.repository.schedule(&candidates, publish).await
        )?;
        let mut failures = failures
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        pass.taken += done.taken.len();
        pass.held_back += done.held_back.len() as u64;
        for data_transfer_id in &done.scheduled {
            let queue = queues.get(data_transfer_id).map_or("", |queue| queue);
            if verbose {
                tracing::info!(data_transfer_id, queue, "transfer scheduled");
            } else {
                tracing::debug!(data_transfer_id, queue, "transfer scheduled");
            }
            pass.scheduled.push(Assignment {
                data_transfer_id: *data_transfer_id,
                queue: queue.to_owned(),
            });
        }
        let mut last = None;
        for id in &done.unpublished {
            let error = failures.remove(id).unwrap_or_else(unconfirmed);
            pass.refuse(*id, chain(&error).to_string());
            last = Some(error);
        }
        // A failure that no success is beside of is the broker's, not a row's.
        let is_broken = done.scheduled.is_empty();
        Ok(last.filter(|_| is_broken))
    }

    /// Sends messages, all at once; those that were confirmed, and how the others failed.
    async fn publish(
        &self,
        ids: Vec<i64>,
        queues: &HashMap<i64, Arc<str>>,
    ) -> (HashSet<i64>, HashMap<i64, SubmitError>) {
        let mut sending: FuturesUnordered<_> = ids
            .into_iter()
            .map(|id| async move {
                let queue = queues.get(&id).map_or("", |queue| queue);
                let sent = fault_point!(ManagerPublished, self.submit.submit(id, queue).await);
                (id, sent)
            })
            .collect();
        let (mut confirmed, mut failed) = (HashSet::new(), HashMap::new());
        let mut time_is_up = pin!(sleep(CONFIRMED_WITHIN));
        loop {
            tokio::select! {
                biased;
                next = sending.next() => match next {
                    Some((id, Ok(()))) => {
                        confirmed.insert(id);
                    }
                    Some((id, Err(error))) => {
                        failed.insert(id, error);
                        if confirmed.is_empty() && failed.len() >= GIVE_UP_AFTER {
                            break;
                        }
                    }
                    None => break,
                },
                () = &mut time_is_up => break,
            }
        }
        (confirmed, failed)
    }
}

/// The broker has not answered in time, or seems to be away.
fn unconfirmed() -> SubmitError {
    SubmitError("the broker has not confirmed it; the next pass tries again".into())
}

impl Pass {
    fn refuse(&mut self, data_transfer_id: i64, reason: String) {
        tracing::error!(
            data_transfer_id,
            reason,
            "transfer cannot be scheduled; it stays pending"
        );
        self.refused.push(Refusal {
            data_transfer_id,
            reason,
        });
    }
}

/// How many rows are locked at once.
struct BatchSize {
    least: usize,
    first: usize,
    most: usize,
    quick: Duration,
    slow: Duration,
}

impl BatchSize {
    /// The size of a batch after one of `size` that took so long.
    fn next(&self, size: usize, took: Duration) -> usize {
        if took < self.quick {
            (size * 2).min(self.most)
        } else if took > self.slow {
            (size / 2).max(self.least)
        } else {
            size
        }
    }
}

/// The locations at both ends of a transfer.
type Ends = (Option<i64>, Option<i64>);

/// The link that a transfer goes over, by its place in the survey, and the queue of its message.
type Way = (usize, Arc<str>);

/// What a look has shown of the links.
struct Survey<'a> {
    places: &'a HashMap<i64, Endpoint>,
    settings: &'a Settings,
    now: DateTime<Utc>,
    links: Vec<OfLink>,
    by_name: BTreeMap<LinkName, usize>,
    /// None where the ends lead nowhere.
    known: HashMap<Ends, Option<Way>>,
    waiting: u64,
    lost: Vec<i64>,
}

/// One link in a survey.
struct OfLink {
    link: Link,
    limit: Option<u64>,
    active: u64,
    pending: u64,
    /// The oldest that are due, no more than the limit.
    queue: VecDeque<(i64, Arc<str>)>,
}

impl<'a> Survey<'a> {
    fn new(
        links: Vec<Link>,
        places: &'a HashMap<i64, Endpoint>,
        now: DateTime<Utc>,
        settings: &'a Settings,
    ) -> Self {
        let mut survey = Self {
            places,
            settings,
            now,
            links: Vec::new(),
            by_name: BTreeMap::new(),
            known: HashMap::new(),
            waiting: 0,
            lost: Vec::new(),
        };
        for link in links {
            if let Some(problem) = link.capacity.problem() {
                tracing::error!(
                    link = %link.name,
                    error = %problem,
                    "nothing is sent over this link; its windows cannot be read"
                );
            }
            survey.add(link);
        }
        survey
    }

    fn add(&mut self, link: Link) -> usize {
        let index = self.links.len();
        self.by_name.insert(link.name.clone(), index);
        self.links.push(OfLink {
            limit: link.limit(self.now).map(u64::from),
            link,
            active: 0,
            pending: 0,
            queue: VecDeque::new(),
        });
        index
    }

    fn see(&mut self, transfer: OpenTransfer) {
        let way = self.way(&transfer);
        let is_pending = transfer.status == Status::Pending;
        if is_pending && transfer.waits {
            self.waiting += 1;
            return;
        }
        let Some((index, queue)) = way else {
            if is_pending {
                self.lost.push(transfer.id);
            }
            return;
        };
        let Some(of_link) = self.links.get_mut(index) else {
            return;
        };
        if !is_pending {
            of_link.active += 1;
            return;
        }
        of_link.pending += 1;
        let has_room = |limit| (of_link.queue.len() as u64) < limit;
        if of_link.limit.is_none_or(has_room) {
            of_link.queue.push_back((transfer.id, queue));
        }
    }

    fn way(&mut self, transfer: &OpenTransfer) -> Option<Way> {
        let ends = (
            transfer.origin_location_id,
            transfer.destination_location_id,
        );
        if let Some(known) = self.known.get(&ends) {
            return known.clone();
        }
        let way = self.find_way(ends);
        self.known.insert(ends, way.clone());
        way
    }

    fn find_way(&mut self, (origin, destination): Ends) -> Option<Way> {
        let origin = self.places.get(&origin?)?;
        let destination = self.places.get(&destination?)?;
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

    /// What is to be scheduled, in order; the rest is noted in `pass`.
    fn picks(self, pass: &mut Pass) -> Vec<Pick> {
        pass.waiting = self.waiting;
        for id in self.lost {
            let reason = "its location or the location's site is missing; correct the row";
            pass.refuse(id, reason.into());
        }
        let mut queues = Vec::new();
        for of_link in self.links {
            let free = of_link
                .limit
                .map(|limit| limit.saturating_sub(of_link.active));
            let mut queue = of_link.queue;
            if let Some(free) = free {
                queue.truncate(usize::try_from(free).unwrap_or(usize::MAX));
            }
            let held_back = of_link.pending.saturating_sub(queue.len() as u64);
            pass.held_back += held_back;
            if held_back > 0 {
                tracing::debug!(
                    link = %of_link.link.name,
                    limit = of_link.limit,
                    active = of_link.active,
                    pending = of_link.pending,
                    paused = of_link.link.pause.is_some(),
                    "transfers wait for their link"
                );
            }
            let allowance = free.map(|free| {
                Arc::new(Allowance {
                    link: of_link.link.name,
                    free,
                    issued: of_link.link.issued,
                })
            });
            let picks = queue.into_iter().map(|(id, queue)| Pick {
                candidate: Candidate {
                    id,
                    allowance: allowance.clone(),
                },
                queue,
            });
            queues.push((of_link.link.priority, picks.collect()));
        }
        link::in_turn(queues)
    }
}

/// Sweeps dead leases, as every manager and every worker does.
///
/// # Errors
/// What the database says.
pub async fn recover(repository: &Repository, observer: &Owner) -> Result<Vec<i64>, DatabaseError> {
    let sweep = repository.sweep(observer).await?;
    for (id, error) in &sweep.failed {
        tracing::warn!(data_transfer_id = id, error = %chain(error), "dead lease stays for now");
    }
    let mut pending = Vec::new();
    for recovered in sweep.recovered {
        let lease = recovered.displaced.lease;
        tracing::warn!(
            data_transfer_id = lease.data_transfer_id,
            attempt = lease.attempt,
            owner = %lease.owner,
            reason = %recovered.displaced.demise,
            pending = recovered.is_pending,
            "dead lease swept"
        );
        if recovered.is_pending {
            pending.push(lease.data_transfer_id);
        }
    }
    Ok(pending)
}

/// Sweeps dead leases again and again until `stop`: at once, and then whenever one could have died.
pub async fn keep_recovering(
    repository: &Repository,
    observer: &Owner,
    every: Duration,
    stop: &CancellationToken,
) {
    loop {
        if let Err(error) = recover(repository, observer).await {
            tracing::warn!(error = %chain(&error), "dead leases could not be swept");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}

#[cfg(feature = "fault-points")]
impl From<crate::faults::AnswerLost> for SubmitError {
    fn from(lost: crate::faults::AnswerLost) -> Self {
        Self(lost.into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::transfer::link::Pause;

    #[test]
    fn batches_follow_what_they_take() {
        let sizes = |took: u64, first| {
            let mut sizes = vec![first];
            for _ in 0..6 {
                let last = sizes.last().copied().unwrap();
                sizes.push(BATCH.next(last, Duration::from_millis(took)));
            }
            sizes
        };
        assert_eq!(sizes(20, 50), [50, 100, 200, 200, 200, 200, 200]);
        assert_eq!(sizes(300, 50), [50; 7]);
        assert_eq!(sizes(900, 200), [200, 100, 50, 25, 12, 10, 10]);
    }

    fn name(origin: &str, destination: &str) -> LinkName {
        LinkName {
            origin: origin.into(),
            destination: destination.into(),
        }
    }

    /// Locations 1, 2, 3 at the sites a, b, c.
    fn survey(links: Vec<Link>, transfers: &[(i64, Status, i64, i64)]) -> (Vec<i64>, Pass) {
        let places = [(1, "a"), (2, "b"), (3, "c")].map(|(id, site)| {
            let endpoint = Endpoint {
                site: site.into(),
                location: "buffer".into(),
            };
            (id, endpoint)
        });
        let (places, settings) = (
            HashMap::from(places),
            crate::settings::load(None, []).unwrap(),
        );
        let mut survey = Survey::new(links, &places, Utc::now(), &settings);
        for (id, status, origin, destination) in transfers {
            survey.see(OpenTransfer {
                id: *id,
                status: *status,
                origin_location_id: Some(*origin),
                destination_location_id: Some(*destination),
                waits: *id >= 100,
            });
        }
        let mut pass = Pass::default();
        let picks = survey.picks(&mut pass);
        assert!(
            picks
                .iter()
                .all(|pick| pick.queue.ends_with("_buffer_data_transfer"))
        );
        (picks.iter().map(|pick| pick.candidate.id).collect(), pass)
    }

    use Status::{InProgress, Pending, Scheduled};

    #[test]
    fn what_is_under_way_takes_from_the_limit() {
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
        let (picked, pass) = survey(vec![limited.clone()], &transfers);
        assert_eq!(picked, [3, 5, 6]);
        assert_eq!(pass.held_back, 1);
        // More under way than there may be, as after the limit was lowered.
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
        let (picked, pass) = survey(vec![], &transfers);
        assert_eq!((picked, pass.held_back), (vec![1, 4, 5, 2, 6, 3], 0));
        let first = Link {
            priority: 1,
            ..Link::unlimited(name("c", "b"))
        };
        let paused = Link {
            pause: Some(Pause {
                since: Utc::now(),
                by: "me@here".into(),
                reason: "storm".into(),
                stops_running: false,
            }),
            ..Link::unlimited(name("a", "b"))
        };
        let (picked, pass) = survey(vec![paused, first], &transfers);
        assert_eq!((picked, pass.held_back), (vec![5, 6, 4], 3));
    }

    #[test]
    fn what_leads_nowhere_and_what_waits_is_told() {
        let transfers = [
            (1, Pending, 1, 9),
            (2, InProgress, 9, 1),
            (100, Pending, 1, 2),
            (101, Pending, 1, 9),
        ];
        let (picked, pass) = survey(vec![], &transfers);
        assert_eq!((picked, pass.waiting, pass.held_back), (vec![], 2, 0));
        let refused: Vec<_> = pass.refused.iter().map(|r| r.data_transfer_id).collect();
        assert_eq!(refused, [1]);
    }
}
