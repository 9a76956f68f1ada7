//! A random walk over the possible actions of an operator, a broker, a database and workers on transfers.
//!
//! All code that changes rows is the program's own: the repository on a real database, the manager's passes with their
//! reconciliation, the sweep, and the settling of failed attempts. The broker and the workers' copies are models. Time
//! does not pass; records are made older.
//!
//! A walk consists of bursts. After each step the invariants hold: at most one holder of a transfer can complete it,
//! only an operator changes COMPLETED and FAILED, only a counted failure or an operator changes `retry_count`, no two
//! leases have one destination, and for each row that has not ended some component will make the next step. After each
//! burst all faults end, and within some rounds each row is COMPLETED, or FAILED with a reason, and no lease, claim or
//! record is left.
//!
//! A failure prints the seed and the history of the transfer. Repeat it with `WALK_SEED=… WALK_STEPS=…`.
#![cfg(feature = "fault-points")]
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "random_walk/actions.rs"]
mod actions;
#[path = "random_walk/broker.rs"]
mod broker;
#[path = "support/ops_db.rs"]
mod ops_db;
#[path = "random_walk/picture.rs"]
mod picture;
#[path = "random_walk/worker.rs"]
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use ccat_transfer::manager::Manager;
use ccat_transfer::settings::Settings;
use ccat_transfer::transfer::link::LinkName;
use ccat_transfer::transfer::repository::LinkChange;
use ccat_transfer::transfer::topology::{self, NewTransfer, Topology};
use fastrand::Rng;

use broker::Broker;
use ops_db::Fixture;
use picture::{Picture, Step, Violation, check_state, check_step};
use worker::Worker;

on_both_databases!(every_row_keeps_moving);

/// Number of steps of a walk without `WALK_STEPS`.
const STEPS: usize = 600;

/// Seed of a walk without `WALK_SEED`.
const SEED: u64 = 14;

/// Number of transfers at the same time.
const TRANSFERS: usize = 12;

/// Distance between the ids of transfers.
const FAR: i64 = 700;

/// Maximum number of rounds until all transfers have ended.
const ROUNDS: usize = 40;

const THIRD_SITE: &str = r#"
[[sites]]
name = "University of Boulder"
short_name = "boulder"
[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = "archive.boulder.edu"
path = "/buffer"

[[routes]]
origin = "ccat"
destination = "boulder"
method = "bbcp"
type = "direct"

[[routes]]
origin = "boulder"
destination = "cologne"
method = "bbcp"
type = "direct"
"#;

/// Sites of the links.
const LINKS: [(&str, &str); 3] = [
    ("ccat", "cologne"),
    ("ccat", "boulder"),
    ("boulder", "cologne"),
];

/// Origin and destination of transfers, and the index of their link.
const WAYS: [(&str, &str, usize); 4] = [
    ("ccat/telescope_computer", "cologne/buffer", 0),
    ("ccat/buffer", "cologne/buffer", 0),
    ("ccat/buffer", "boulder/buffer", 1),
    ("boulder/buffer", "cologne/buffer", 2),
];

/// State of a link as set by the operator.
struct ConnectionState {
    name: LinkName,
    limit: Option<u32>,
    is_paused: bool,
}

/// One step in the history.
struct Entry {
    step: usize,
    text: String,
    about: BTreeSet<i64>,
    changes: BTreeMap<i64, String>,
}

/// State of the whole walk.
struct World {
    db: Fixture,
    rng: Rng,
    settings: Arc<Settings>,
    broker: Arc<Broker>,
    manager: Manager,
    /// The manager's next scan is a full one.
    looks_at_all: bool,
    workers: Vec<Worker>,
    /// Number of workers started so far.
    started: u64,
    /// Index of the link of each transfer.
    rows: BTreeMap<i64, usize>,
    /// The highest id so far.
    highest: i64,
    links: Vec<ConnectionState>,
    /// State of the database after the last step.
    before: Picture,
    /// Rows that a manager sees only in its next full scan.
    unseen: BTreeSet<i64>,
    /// True if all faults have ended.
    is_well: bool,
    /// True if the database refuses writes.
    refusing: bool,
    tally: Tally,
    history: Vec<Entry>,
    step: usize,
    seed: u64,
}

/// Counts of the events of a walk, to check that it covers all of them.
#[derive(Debug, Default)]
struct Tally {
    completed: usize,
    failed: usize,
    retried: usize,
    /// Rows with a lost message that were sent again.
    resent: usize,
    /// Leases of dead workers, and of rows that an operator has changed.
    swept: usize,
    /// The same leases, taken over by a worker that wanted the transfer.
    displaced: usize,
    lost_leases: usize,
    /// Messages whose transfer was held.
    held: usize,
    /// Messages whose link was closed.
    link_closed: usize,
    withdrawn: usize,
    unwritten: usize,
}

impl Tally {
    fn add(&mut self, before: &Picture, after: &Picture, step: &Step) {
        for (id, row) in &after.rows {
            let old = before.rows.get(id);
            if old.is_some_and(|old| old.status != row.status) {
                self.completed += usize::from(row.status == "COMPLETED");
                self.failed += usize::from(row.status == "FAILED");
            }
            self.retried += usize::from(old.is_some_and(|old| old.retry_count < row.retry_count));
        }
        self.resent += step.resent;
        self.swept += step.swept;
        self.displaced += step.displaced;
        let has = |word: &str| usize::from(step.text.contains(word));
        self.lost_leases += has("lease lost");
        self.held += has("held by");
        self.link_closed += has("LinkClosed");
        self.withdrawn += has("Ok(true)");
        self.unwritten += has("Unwritten");
    }
}

fn from_environment<T: std::str::FromStr>(name: &str, default: T) -> T {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| {
        let number = text.parse().ok();
        number.unwrap_or_else(|| panic!("{name}={text} is not a number"))
    })
}

/// On a thread of its own: without optimisation, the futures of a whole walk need more stack than a test has.
async fn every_row_keeps_moving(db: Fixture) {
    let runtime = tokio::runtime::Handle::current();
    let walking = std::thread::Builder::new()
        .stack_size(16 << 20)
        .spawn(move || runtime.block_on(walk(db)))
        .unwrap();
    let walked = tokio::task::spawn_blocking(move || walking.join());
    if let Err(panic) = walked.await.unwrap() {
        std::panic::resume_unwind(panic);
    }
}

async fn walk(db: Fixture) {
    let steps = from_environment("WALK_STEPS", STEPS);
    let seed = from_environment("WALK_SEED", SEED);
    let began = std::time::Instant::now();
    let backend = db.database.backend();
    let mut world = World::new(db, seed).await;
    let mut rounds = 0;
    let mut bursts = 0;
    while world.step < steps {
        world.renew_transfers().await;
        for _ in 0..world.rng.usize(20..50) {
            let step = world.random_step().await;
            world.note(step).await;
        }
        rounds += world.recover().await;
        bursts += 1;
    }
    let took = began.elapsed().as_secs_f64();
    let steps = world.step;
    let tally = &world.tally;
    eprintln!(
        "{backend:?}, seed {seed}: {steps} steps and {bursts} recoveries in {rounds} rounds, {took:.1} s; {tally:?}"
    );
    let met = [tally.completed, tally.retried, tally.resent, tally.swept];
    assert!(
        steps < STEPS || !met.contains(&0),
        "the walk has not met everything: {tally:?}"
    );
}

impl World {
    async fn new(db: Fixture, seed: u64) -> Self {
        let third: Topology = THIRD_SITE.parse().unwrap();
        topology::seed(&db.repository, &third).await.unwrap();
        let mut settings = ccat_transfer::settings::load(None, []).unwrap();
        // Never passes during the test.
        settings.manager.reconcile_after = ops_db::TTL;
        settings.manager.full_look_interval = ops_db::TTL;
        settings.transfer.retry_delay_first = ops_db::TTL;
        let settings = Arc::new(settings);
        let broker = Arc::new(Broker::default());
        let manager = Manager::new(
            db.repository.clone(),
            settings.clone(),
            ops_db::me(),
            broker.clone(),
        );
        let link = |(origin, destination): (&str, &str)| ConnectionState {
            name: LinkName {
                origin: origin.into(),
                destination: destination.into(),
            },
            limit: None,
            is_paused: false,
        };
        let mut world = Self {
            db,
            rng: Rng::with_seed(seed),
            settings,
            broker,
            manager,
            looks_at_all: true,
            workers: Vec::new(),
            started: 0,
            rows: BTreeMap::new(),
            // Far above the values of a sequence.
            highest: 1_000_000,
            links: LINKS.map(link).into(),
            before: Picture::default(),
            unseen: BTreeSet::new(),
            is_well: false,
            refusing: false,
            tally: Tally::default(),
            history: Vec::new(),
            step: 0,
            seed,
        };
        world.manager = world.new_manager(&[]);
        world.make_refusals().await;
        world.start_worker();
        world.start_worker();
        world
    }

    /// Picks a random element; `None` of an empty slice.
    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        (!from.is_empty()).then(|| &from[self.rng.usize(0..from.len())])
    }

    /// Creates triggers by which the database refuses writes to a table.
    async fn make_refusals(&self) {
        let is_postgres = self.db.database.backend() == sea_orm::DbBackend::Postgres;
        self.db.sql("CREATE TABLE walk_refusal (name text)").await;
        if is_postgres {
            self.db
                .sql(
                    "CREATE FUNCTION walk_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                     IF EXISTS (SELECT 1 FROM walk_refusal WHERE name = TG_TABLE_NAME) THEN \
                     RAISE EXCEPTION 'refused by the walk'; END IF; RETURN NEW; END $$",
                )
                .await;
        }
        for (table, event) in [
            ("data_transfer", "UPDATE"),
            ("transfer_worker_lease", "INSERT"),
            ("transfer_worker_lease", "UPDATE"),
            ("transfer_worker_attempt", "UPDATE"),
            ("transfer_worker_schedule", "INSERT"),
        ] {
            let trigger = format!(
                "CREATE TRIGGER refuse_{table}_{event} BEFORE {event} ON {table} FOR EACH ROW"
            );
            self.db
                .sql(&match is_postgres {
                    true => format!("{trigger} EXECUTE FUNCTION walk_refuse()"),
                    false => format!(
                        "{trigger} WHEN EXISTS (SELECT 1 FROM walk_refusal WHERE name = '{table}') \
                         BEGIN SELECT RAISE(ABORT, 'refused by the walk'); END"
                    ),
                })
                .await;
        }
    }

    /// Makes the database refuse writes to a table, or to none.
    async fn refuse(&mut self, table: Option<&str>) {
        self.refusing = table.is_some();
        self.db
            .sql(&match table {
                Some(table) => format!("INSERT INTO walk_refusal VALUES ('{table}')"),
                None => "DELETE FROM walk_refusal".into(),
            })
            .await;
    }

    /// Resets some of the transfers that have ended, and replaces others by new ones.
    async fn renew_transfers(&mut self) {
        for id in self.rows.keys().copied().collect::<Vec<_>>() {
            match self.rng.u8(0..3) {
                0 => {
                    self.write_row(id, "status = 'PENDING', retry_count = 0")
                        .await;
                    self.unseen.insert(id);
                }
                1 => {}
                _ => drop(self.rows.remove(&id)),
            }
        }
        while self.rows.len() < TRANSFERS {
            let (origin, destination, link) = WAYS[self.rng.usize(0..WAYS.len())];
            let number = self.rng.u64(..);
            let new = NewTransfer {
                relative_path: format!("2026/{number:x}.tar"),
                size_bytes: Some(1_000_000),
                checksum: None,
                origin: origin.parse().unwrap(),
                destination: destination.parse().unwrap(),
            };
            let id = topology::create_transfer(&self.db.repository, &new)
                .await
                .unwrap();
            // The ids are far apart, as on a large table: a manager's scan reads only the rows that it knows and the
            // latest ones.
            self.highest += FAR;
            let highest = self.highest;
            self.write_row(id, &format!("id = {highest}")).await;
            self.rows.insert(highest, link);
        }
        self.history.clear();
        self.before = Picture::of(&self.db, self.rows.keys().copied()).await;
    }

    /// Checks the effect of a step, and records it.
    async fn note(&mut self, step: Step) {
        self.step += 1;
        let after = Picture::of(&self.db, self.rows.keys().copied()).await;
        let changed = |id: &i64| Some((*id, after.changes(&self.before, *id)?));
        self.history.push(Entry {
            step: self.step,
            text: step.text.clone(),
            about: step.about.clone(),
            changes: self.rows.keys().filter_map(changed).collect(),
        });
        if step.is_full_look {
            self.unseen.clear();
        }
        self.unseen.extend(step.unseen.iter().copied());
        let checked = {
            let broker = self.broker.state();
            check_step(&self.before, &after, &step)
                .and_then(|()| check_state(&after, |id| broker.has(id), &self.unseen))
        };
        let checked = checked.and_then(|()| self.check_links(&after, &step));
        self.tally.add(&self.before, &after, &step);
        self.before = after;
        if let Err(violation) = checked {
            self.fail_walk(&violation);
        }
    }

    /// Checks that a pass adds nothing to a link that is full or paused, and that no copy starts there.
    fn check_links(&self, after: &Picture, step: &Step) -> Result<(), Violation> {
        if !step.operator.is_empty() {
            return Ok(());
        }
        // A message that was sent before the link was closed counts as soon as its copy starts.
        let counted = match step.scheduled.is_empty() {
            true => &["IN_PROGRESS"][..],
            false => &["SCHEDULED", "IN_PROGRESS"],
        };
        for (index, link) in self.links.iter().enumerate() {
            let over = self.rows.iter().filter(|(_, of)| **of == index);
            let over: Vec<_> = over.map(|(id, _)| *id).collect();
            let is_active = |picture: &Picture, id: i64| {
                counted.contains(&picture.status(id)) && !self.unseen.contains(&id)
            };
            let is_new = |id: &&i64| is_active(after, **id) && !is_active(&self.before, **id);
            let Some(id) = over.iter().find(is_new) else {
                continue;
            };
            let active = over.iter().filter(|id| is_active(after, **id)).count();
            let (name, limit) = (&link.name, link.limit);
            if link.is_paused {
                return Err((*id, format!("moves over {name}, which is paused")));
            }
            if limit.is_some_and(|limit| active > limit as usize) {
                return Err((
                    *id,
                    format!("is one of {active} over {name}, whose limit is {limit:?}"),
                ));
            }
        }
        Ok(())
    }

    /// Ends all faults, and expects every transfer to end. Returns the number of rounds.
    async fn recover(&mut self) -> usize {
        self.is_well = true;
        let mut step = Step::new("everything is well");
        {
            let mut broker = self.broker.state();
            (broker.is_away, broker.is_mute) = (false, false);
        }
        for worker in &mut self.workers {
            (worker.is_frozen, worker.is_mute) = (false, false);
        }
        for index in 0..self.links.len() {
            self.open_link(index).await;
        }
        if self.workers.is_empty() {
            step.add(&self.start_worker().text);
        }
        self.note(step).await;
        self.step -= 1;
        let mut round = 0;
        while !self.is_over() {
            round += 1;
            if round > ROUNDS {
                let is_over =
                    |id: &&i64| matches!(self.before.status(**id), "COMPLETED" | "FAILED");
                let stuck = self.rows.keys().find(|id| !is_over(id)).copied();
                let id = stuck.unwrap_or_default();
                self.fail_walk(&(id, format!("still moves after {ROUNDS} rounds of recovery")));
            }
            self.round(round).await;
        }
        // One more scan covers the transfers that had ended before.
        self.round(round + 1).await;
        let left = &self.before;
        let leftover = left.leases.keys().chain(&left.records).next().copied();
        if let Some(id) = leftover {
            self.fail_walk(&(id, "is over, and has a lease or a record".into()));
        }
        let traffic = self.db.repository.traffic().await.unwrap();
        for (name, traffic) in traffic {
            let waits = traffic.pending + traffic.scheduled + traffic.active;
            assert_eq!(waits, 0, "{name} is not free: {traffic:?}");
        }
        self.is_well = false;
        round
    }

    fn is_over(&self) -> bool {
        let is_over = |id: &i64| matches!(self.before.status(*id), "COMPLETED" | "FAILED");
        let broker = self.broker.state();
        self.rows.keys().all(is_over)
            && broker.waiting().is_empty()
            && broker.unsettled.is_empty()
            && self.workers.iter().all(|worker| worker.jobs.is_empty())
    }

    /// Resumes a link, and raises its limit to at least two transfers.
    async fn open_link(&mut self, index: usize) {
        let link = &mut self.links[index];
        let repository = &self.db.repository;
        if std::mem::take(&mut link.is_paused) {
            repository.resume_link(&link.name).await.unwrap();
        }
        if link.limit.is_some_and(|limit| limit < 2) {
            link.limit = Some(2);
            let max_active = Some(link.limit);
            let change = LinkChange {
                max_active,
                ..LinkChange::default()
            };
            repository.set_link(&link.name, &change).await.unwrap();
        }
    }

    /// Makes one round: time passes, the manager makes a pass, and workers process their queues.
    async fn round(&mut self, round: usize) {
        self.pass_much_time().await;
        if round == 3 {
            // A full scan or a restart of the manager finds the unseen rows; this is a restart.
            self.manager = self.new_manager(&[]);
        }
        let step = self.pass(vec![], vec![]).await;
        self.note_round(step).await;
        loop {
            let place = self.broker.state().waiting().first().cloned();
            let Some(place) = place else { break };
            let message = self.broker.state().take(&place).unwrap();
            let worker = self.rng.usize(0..self.workers.len());
            self.deliver(message, worker);
        }
        // Each job acquires its lease and does its work; a job whose transfer is held by another worker waits.
        for _ in 0..2 {
            let mut tags: Vec<_> = self
                .workers
                .iter()
                .flat_map(|w| &w.jobs)
                .map(|j| j.tag)
                .collect();
            tags.sort_unstable();
            for tag in tags {
                let is_it = |(w, j): &(usize, usize)| self.workers[*w].jobs[*j].tag == tag;
                let Some(place) = self.jobs().into_iter().find(is_it) else {
                    continue;
                };
                let step = self.finish(place, round < 5).await;
                self.note_round(step).await;
            }
        }
    }

    /// Records a step of a recovery, which does not count as a step of the walk.
    async fn note_round(&mut self, step: Step) {
        self.note(step).await;
        self.step -= 1;
    }

    fn fail_walk(&self, (id, what): &Violation) -> ! {
        let mut text = format!(
            "transfer {id} {what} (WALK_SEED={} WALK_STEPS={}); its history:\n",
            self.seed, self.step
        );
        let mut last = None;
        for entry in &self.history {
            let change = entry.changes.get(id);
            let names_it = entry.about.is_empty() && entry.changes.is_empty();
            let concerns_it = entry.about.contains(id) || change.is_some() || names_it;
            // Rounds without an event are all the same, so they are left out.
            if !concerns_it || change.is_none() && last == Some(&entry.text) {
                continue;
            }
            last = Some(&entry.text);
            let _ = writeln!(text, "  {}: {}", entry.step, entry.text);
            if let Some(change) = change {
                let _ = writeln!(text, "      {change}");
            }
        }
        let broker = self.broker.state();
        let _ = writeln!(
            text,
            "messages: {:?}\nunsettled: {:?}",
            broker.ready, broker.unsettled
        );
        panic!("{text}");
    }
}
