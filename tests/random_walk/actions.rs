//! Actions of an operator, a broker and a database, and the passage of time.

use std::sync::Arc;

use ccat_transfer::faults::{FaultPoint, Mode, with_faults};
use ccat_transfer::manager::{Manager, recover};
use ccat_transfer::transfer::id::TransferId;
use ccat_transfer::transfer::repository::{Instruction, LinkChange};
use celery_worker::liveness::Liveness;
use entity::Action;
use futures_util::FutureExt as _;

use super::broker::Publication;
use super::picture::Step;
use super::worker::Worker;
use super::{LINKS, World};
use crate::ops_db::me;

/// Maximum number of workers at the same time.
const WORKERS: usize = 4;

impl World {
    /// Makes a random step of those that are possible now.
    pub(super) async fn random_step(&mut self) -> Step {
        loop {
            let taken = match self.rng.u32(0..100) {
                0..38 => self.advance_one().await,
                38..56 => self.deliver_one(),
                56..64 => Some(self.random_pass().await),
                64..72 => self.disturb_broker(),
                72..80 => self.operate().await,
                80..84 => self.change_link().await,
                84..93 => self.disturb_worker().await,
                93..98 => self.pass_time().await,
                _ => self.sweep().await,
            };
            if let Some(step) = taken {
                return step;
            }
        }
    }

    async fn advance_one(&mut self) -> Option<Step> {
        let jobs = self.jobs();
        let place = *self.pick(&jobs)?;
        // From time to time the database refuses every change of the row, or of one of our tables.
        if self.rng.u32(0..15) > 0 {
            return Some(self.advance(place).await);
        }
        let tables = [
            "data_transfer",
            "transfer_worker_lease",
            "transfer_worker_attempt",
        ];
        let table = tables[self.rng.usize(0..tables.len())];
        self.refuse(Some(table)).await;
        let mut step = self.advance(place).await;
        self.refuse(None).await;
        step.add(&format!("the database refuses writes to {table}"));
        Some(step)
    }

    fn deliver_one(&mut self) -> Option<Step> {
        let waiting = self.broker.state().waiting();
        // The first message of a queue is the most likely one.
        let first: Vec<_> = waiting
            .iter()
            .filter(|(_, place)| *place == 0)
            .cloned()
            .collect();
        let place = match self.rng.u8(0..4) {
            0 => self.pick(&waiting).cloned()?,
            _ => self.pick(&first).cloned()?,
        };
        let awake: Vec<_> = (0..self.workers.len())
            .filter(|w| !self.workers[*w].is_frozen)
            .collect();
        let worker = *self.pick(&awake)?;
        let message = self.broker.state().take(&place)?;
        let node = &self.workers[worker].owner.node;
        let text = format!("{} is delivered to {node}", message.task_id);
        let step = Step {
            about: message.transfer.into_iter().collect(),
            ..Step::new(text)
        };
        self.deliver(message, worker);
        Some(step)
    }

    async fn random_pass(&mut self) -> Step {
        let mut plan = Vec::new();
        let is_bad = self.rng.u8(0..3) == 0;
        if is_bad {
            let fates = [
                Publication::Confirmed,
                Publication::Confirmed,
                Publication::ConfirmedAndLost,
                Publication::Refused,
                Publication::Unconfirmed,
                Publication::Unanswered,
                Publication::ManagerDies,
            ];
            plan.extend((0..6).map(|_| fates[self.rng.usize(0..fates.len())]));
        }
        let points = [
            FaultPoint::ManagerRowLocked,
            FaultPoint::ManagerPublished,
            FaultPoint::ManagerCommitted,
            FaultPoint::SweepWritten,
            FaultPoint::SweepCommitted,
        ];
        let refuses = self.rng.u8(0..20) == 0;
        let faults = match self.rng.u8(0..6) {
            0 => {
                let mode = if refuses || self.rng.bool() {
                    Mode::Fail
                } else {
                    Mode::Twice
                };
                vec![(points[self.rng.usize(0..points.len())], mode)]
            }
            _ => vec![],
        };
        if self.rng.u8(0..8) == 0 {
            // A second manager, a restart, or the time for a full scan.
            let sites = [&[][..], &["ccat"], &["boulder"]];
            let sites = sites[self.rng.usize(0..sites.len())];
            self.manager = self.new_manager(sites);
        }
        if refuses {
            let tables = [
                "data_transfer",
                "transfer_worker_lease",
                "transfer_worker_schedule",
            ];
            let table = tables[self.rng.usize(0..tables.len())];
            self.refuse(Some(table)).await;
        }
        let mut step = self.pass(plan, faults).await;
        if refuses {
            self.refuse(None).await;
            step.is_full_look = false;
            step.add("the database refuses writes");
        }
        step
    }

    /// Creates a manager in the state of a new process, for the transfers from some sites or from all.
    pub(super) fn new_manager(&mut self, sites: &[&str]) -> Manager {
        let mut settings = (*self.settings).clone();
        settings.manager.sites = sites.iter().map(|&site| site.to_owned()).collect();
        self.looks_at_all = sites.is_empty();
        Manager::new(
            self.db.repository.clone(),
            Arc::new(settings),
            me(),
            self.broker.clone(),
        )
        .reconciling(self.broker.clone())
    }

    /// Makes one pass, with the given fates of its first messages.
    pub(super) async fn pass(
        &mut self,
        plan: Vec<Publication>,
        faults: Vec<(FaultPoint, Mode)>,
    ) -> Step {
        let mut step = Step::new(format!("pass, {plan:?}, {faults:?}"));
        // A pass that fails later may already have scanned.
        let looks_at_all = std::mem::take(&mut self.looks_at_all);
        self.answer_questions();
        self.broker.state().plan = plan.into();
        let passing = self.manager.run_pass(false);
        let died = self.broker.manager_died.notified();
        let ended = tokio::select! {
            biased;
            pass = with_faults(faults, passing) => Some(pass),
            () = died => None,
        };
        self.broker.state().plan.clear();
        // The manager may have died at a message that it no longer waited for.
        let _ = self.broker.manager_died.notified().now_or_never();
        match ended {
            Some(Ok(pass)) => {
                step.is_full_look = looks_at_all;
                for assignment in &pass.scheduled {
                    step.about.insert(assignment.data_transfer_id.get());
                    step.scheduled.insert(assignment.data_transfer_id.get());
                }
                (step.resent, step.swept) = (pass.resent.len(), pass.recovered.len());
                let (scheduled, refused) = (pass.scheduled.len(), pass.refused.len());
                step.add(&format!(
                    "scheduled {scheduled}, refused {refused}, recovered {:?}, resent {:?}, overdue {}",
                    pass.recovered, pass.resent, pass.overdue
                ));
            }
            Some(Err(error)) => step.add(&format!("{error}")),
            None => {
                step.add("the manager dies");
                self.manager = self.new_manager(&[]);
            }
        }
        step
    }

    /// Sets the answers of the workers about the messages that they hold.
    fn answer_questions(&self) {
        let mut broker = self.broker.state();
        broker.held = Default::default();
        for worker in self.workers.iter().filter(|w| !w.is_frozen && !w.is_mute) {
            broker.held.workers += 1;
            for job in &worker.jobs {
                let transfer = job.message.transfer.map(TransferId::new);
                broker.held.transfers.extend(transfer);
                broker.held.task_ids.insert(job.message.task_id.clone());
            }
        }
    }

    fn disturb_broker(&mut self) -> Option<Step> {
        let action = self.rng.u32(0..100);
        let broker = self.broker.clone();
        let mut broker = broker.state();
        let waiting = broker.waiting();
        match action {
            // A connection ends: its messages are delivered again.
            0..25 => {
                let tags: Vec<_> = broker.unsettled.keys().copied().collect();
                let tag = *self.pick(&tags)?;
                let worker = broker.unsettled.get(&tag)?.0;
                for tag in broker.tags_of(worker) {
                    broker.requeue(tag);
                }
                Some(Step::new(format!(
                    "the broker takes back what w{worker} has"
                )))
            }
            25..45 => {
                let place = self.pick(&waiting)?;
                let message = broker.ready.get(&place.0)?.get(place.1)?.clone();
                let step = Step {
                    about: message.transfer.into_iter().collect(),
                    ..Step::new(format!("{} is in its queue twice", message.task_id))
                };
                broker.put(message);
                Some(step)
            }
            45..65 => {
                let message = broker.take(self.pick(&waiting)?)?;
                Some(Step {
                    about: message.transfer.into_iter().collect(),
                    ..Step::new(format!("{} is dead-lettered", message.task_id))
                })
            }
            65..72 => {
                let queue = &self.pick(&waiting)?.0;
                broker.ready.remove(queue);
                Some(Step::new(format!("{queue} is purged")))
            }
            72..80 => {
                let queue = &self.pick(&waiting)?.0;
                let messages = broker.ready.get_mut(queue)?;
                self.rng.shuffle(messages.make_contiguous());
                Some(Step::new(format!("{queue} has another order")))
            }
            80..86 => {
                let queue = &self.pick(&waiting)?.0;
                broker.publish(None, queue);
                Some(Step::new(format!("{queue} has a message of another task")))
            }
            86..93 => {
                broker.is_away = !broker.is_away;
                Some(Step::new(format!("broker unreachable: {}", broker.is_away)))
            }
            _ => {
                broker.is_mute = !broker.is_mute;
                Some(Step::new(format!("broker mute: {}", broker.is_mute)))
            }
        }
    }

    async fn operate(&mut self) -> Option<Step> {
        let ids: Vec<_> = self.rows.keys().copied().collect();
        let id = *self.pick(&ids)?;
        let mut step = Step::about(id, "");
        step.operator.insert(id);
        match self.rng.u32(0..100) {
            0..55 => {
                let action = match self.rng.u8(0..6) {
                    0 => Action::Fail,
                    1 | 2 => Action::Cancel,
                    _ => Action::Retry,
                };
                let instruction = Instruction {
                    action,
                    operator: "me@here".into(),
                    reason: None,
                    only: Vec::new(),
                    untracked: false,
                };
                let instructing = self.db.repository.execute(id.into(), &instruction);
                let verdict = instructing.await.unwrap();
                step.text = format!("operator: {action:?}, {verdict:?}");
            }
            // A change like that of a web interface, without regard to leases and messages.
            55..85 => {
                let count = match self.rng.bool() {
                    true => ", retry_count = 0",
                    false => "",
                };
                step.text = format!("operator: status = 'PENDING'{count}");
                step.unseen.insert(id);
                self.write_row(id, &format!("status = 'PENDING'{count}"))
                    .await;
            }
            85..93 => {
                step.text = "operator: status = 'FAILED'".into();
                step.unseen.insert(id);
                let set = "status = 'FAILED', failure_error_message = 'not wanted'";
                self.write_row(id, set).await;
            }
            _ => {
                step.text = "operator: status = 'SCHEDULED'".into();
                step.unseen.insert(id);
                self.write_row(id, "status = 'SCHEDULED'").await;
            }
        }
        Some(step)
    }

    pub(super) async fn write_row(&self, id: i64, set: &str) {
        let sql = format!("UPDATE data_transfer SET {set} WHERE id = {id}");
        self.db.sql(&sql).await;
    }

    async fn change_link(&mut self) -> Option<Step> {
        let index = self.rng.usize(0..LINKS.len());
        let repository = self.db.repository.clone();
        let link = &mut self.links[index];
        let name = link.name.clone();
        let text = match self.rng.u8(0..3) {
            0 => {
                link.limit = match self.rng.u32(0..6) {
                    5 => None,
                    limit => Some(limit),
                };
                let change = LinkChange {
                    max_active: Some(link.limit),
                    ..LinkChange::default()
                };
                repository.set_link(&name, &change).await.unwrap();
                format!("limit of {name}: {:?}", link.limit)
            }
            _ if link.is_paused => {
                link.is_paused = false;
                repository.resume_link(&name).await.unwrap();
                format!("{name} is resumed")
            }
            _ => {
                link.is_paused = true;
                let stops = self.rng.bool();
                repository
                    .pause_link(&name, "me@here", "storm", stops)
                    .await
                    .unwrap();
                format!("{name} is paused, stops copies: {stops}")
            }
        };
        Some(Step::new(text))
    }

    async fn disturb_worker(&mut self) -> Option<Step> {
        let number = self.workers.len();
        if number < 2 {
            return Some(self.start_worker());
        }
        let index = self.rng.usize(0..number);
        let worker = &mut self.workers[index];
        let node = worker.owner.node.clone();
        match self.rng.u8(0..12) {
            0..2 if number < WORKERS => Some(self.start_worker()),
            // The worker dies without any message.
            0..3 => {
                let dead = self.workers.swap_remove(index);
                if dead.is_here {
                    self.bury(&node).await;
                }
                Some(Step::new(format!("{node} dies")))
            }
            3..7 => {
                worker.is_frozen = !worker.is_frozen;
                Some(Step::new(format!("{node} frozen: {}", worker.is_frozen)))
            }
            7..9 => {
                worker.is_mute = !worker.is_mute;
                Some(Step::new(format!("{node} mute: {}", worker.is_mute)))
            }
            // The worker stops: it returns the messages that it has not started, and completes or also stops the rest.
            _ if worker.is_frozen => None,
            stop => {
                let is_cold = stop == 9;
                let jobs = &mut worker.jobs;
                let (begun, waiting) = std::mem::take(jobs)
                    .into_iter()
                    .partition(|job| job.lease.is_some());
                *jobs = begun;
                for job in waiting {
                    self.broker.state().requeue(job.tag);
                }
                let mut step = Step::new(format!("{node} stops, cold: {is_cold}"));
                if is_cold {
                    self.stop_copies(&node, &mut step).await;
                }
                Some(step)
            }
        }
    }

    pub(super) fn start_worker(&mut self) -> Step {
        self.started += 1;
        let is_here = self.rng.bool();
        let worker = Worker::new(self.started, is_here);
        let node = worker.owner.node.clone();
        self.workers.push(worker);
        Step::new(format!("{node} starts, on this host: {is_here}"))
    }

    /// Makes the death of a process of this host visible.
    async fn bury(&self, node: &str) {
        self.db
            .sql(&format!(
                "UPDATE transfer_worker_lease SET owner_started = '1' WHERE owner_node = '{node}'"
            ))
            .await;
    }

    async fn pass_time(&mut self) -> Option<Step> {
        let ids: Vec<_> = self.rows.keys().copied().collect();
        let id = *self.pick(&ids)?;
        let (sql, text) = match self.rng.u8(0..6) {
            0..3 => {
                let leased: Vec<_> = self.before.leases.keys().copied().collect();
                let id = *self.pick(&leased)?;
                let sql = format!(
                    "UPDATE transfer_worker_lease SET expires_at = {PAST} WHERE data_transfer_id = {id}"
                );
                (sql, format!("the lease of {id} expires"))
            }
            3 => (
                format!(
                    "UPDATE transfer_worker_delay SET not_before = {PAST} WHERE data_transfer_id = {id}"
                ),
                format!("{id} is due"),
            ),
            4 => (make_overdue(), "rows are overdue".into()),
            _ => (
                "DELETE FROM transfer_worker_schedule".into(),
                "an old backup of our table is restored".into(),
            ),
        };
        let mut step = Step::new(text);
        if sql.starts_with("DELETE") {
            step.unseen.extend(self.before.records.iter().copied());
        }
        self.db.sql(&sql).await;
        Some(step)
    }

    async fn sweep(&mut self) -> Option<Step> {
        let faults = match self.rng.u8(0..4) {
            0 => vec![(FaultPoint::SweepWritten, Mode::Fail)],
            1 => vec![(FaultPoint::SweepCommitted, Mode::Fail)],
            _ => vec![],
        };
        let (observer, pulse) = (me(), Liveness::default());
        let sweeping = recover(&self.db.repository, &observer, &pulse);
        let swept = with_faults(faults, sweeping).await;
        Some(Step {
            swept: swept.as_ref().map_or(0, Vec::len),
            ..Step::new(format!("a worker sweeps: {swept:?}"))
        })
    }

    /// Makes all waiting times pass: dead workers are detected, their leases expire, delays end, rows become overdue.
    pub(super) async fn pass_much_time(&mut self) {
        let alive: Vec<_> = self.workers.iter().map(|worker| worker.number).collect();
        {
            let mut broker = self.broker.state();
            let lost = broker
                .unsettled
                .iter()
                .filter(|(_, (w, _))| !alive.contains(w));
            let lost: Vec<_> = lost.map(|(tag, _)| *tag).collect();
            for tag in lost {
                broker.requeue(tag);
            }
        }
        let running = self.workers.iter().flat_map(|worker| &worker.jobs);
        let renewed =
            running.filter_map(|job| Some(job.lease.as_ref()?.data_transfer_id().to_string()));
        let renewed: Vec<_> = renewed.chain(["0".to_owned()]).collect();
        let renewed = renewed.join(", ");
        for sql in [
            format!(
                "UPDATE transfer_worker_lease SET expires_at = {PAST} WHERE data_transfer_id NOT IN ({renewed})"
            ),
            format!("UPDATE transfer_worker_delay SET not_before = {PAST}"),
            make_overdue(),
        ] {
            self.db.sql(&sql).await;
        }
    }
}

const PAST: &str = "'2001-01-01T00:00:00+00:00'";

fn make_overdue() -> String {
    format!("UPDATE transfer_worker_schedule SET scheduled_at = {PAST}")
}
