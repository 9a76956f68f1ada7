//! A broker in memory: queues, messages that workers hold, and every way in which a broker loses, repeats or refuses a
//! message.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use ccat_transfer::manager::{FindError, FindMessages, HeldMessages, Submit, SubmitError};
use ccat_transfer::transfer::id::TransferId;
use tokio::sync::Notify;

/// The message of a task. One without a transfer belongs to another task.
#[derive(Debug, Clone)]
pub struct Message {
    pub transfer: Option<i64>,
    pub task_id: String,
    pub queue: String,
    pub redelivered: bool,
}

/// Fate of a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publication {
    Confirmed,
    /// Confirmed, but lost at the next restart of the broker.
    ConfirmedAndLost,
    Refused,
    /// In its queue, but the confirmation is lost.
    Unconfirmed,
    /// Neither in a queue nor answered.
    Unanswered,
    /// In its queue, but the manager dies before it receives the confirmation.
    ManagerDies,
}

#[derive(Default)]
pub struct State {
    tasks: u64,
    tags: u64,
    pub ready: BTreeMap<String, VecDeque<Message>>,
    /// Delivered and not settled: by tag, with the worker's number.
    pub unsettled: BTreeMap<u64, (u64, Message)>,
    /// Answers of the workers about the messages that they hold.
    pub held: HeldMessages,
    /// Fates of the next publications; then all are confirmed.
    pub plan: VecDeque<Publication>,
    /// No client can connect.
    pub is_away: bool,
    /// The search for messages fails.
    pub is_mute: bool,
}

#[derive(Default)]
pub struct Broker {
    state: Mutex<State>,
    pub manager_died: Notify,
}

impl Broker {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    /// Puts a message into a queue.
    pub fn publish(&mut self, transfer: Option<i64>, queue: &str) -> String {
        self.tasks += 1;
        let task_id = format!("task-{}", self.tasks);
        let message = Message {
            transfer,
            task_id: task_id.clone(),
            queue: queue.to_owned(),
            redelivered: false,
        };
        self.put(message);
        task_id
    }

    pub fn put(&mut self, message: Message) {
        let queue = self.ready.entry(message.queue.clone()).or_default();
        queue.push_back(message);
    }

    /// All waiting messages, by queue and position.
    pub fn waiting(&self) -> Vec<(String, usize)> {
        let places = |(queue, messages): (&String, &VecDeque<Message>)| {
            let queue = queue.clone();
            (0..messages.len()).map(move |place| (queue.clone(), place))
        };
        self.ready.iter().flat_map(places).collect()
    }

    pub fn take(&mut self, (queue, place): &(String, usize)) -> Option<Message> {
        self.ready.get_mut(queue)?.remove(*place)
    }

    /// Delivers a message to a worker and returns its tag.
    pub fn deliver(&mut self, message: Message, worker: u64) -> u64 {
        self.tags += 1;
        self.unsettled.insert(self.tags, (worker, message));
        self.tags
    }

    /// Returns false for a message that the worker no longer holds.
    pub fn acknowledge(&mut self, tag: u64) -> bool {
        self.unsettled.remove(&tag).is_some()
    }

    pub fn requeue(&mut self, tag: u64) {
        if let Some((_, message)) = self.unsettled.remove(&tag) {
            let redelivered = true;
            let queue = self.ready.entry(message.queue.clone()).or_default();
            queue.push_front(Message {
                redelivered,
                ..message
            });
        }
    }

    /// Tags of a worker's unsettled messages.
    pub fn tags_of(&self, worker: u64) -> Vec<u64> {
        let of_worker = self.unsettled.iter().filter(|(_, (w, _))| *w == worker);
        of_worker.map(|(tag, _)| *tag).collect()
    }

    /// Returns true if a message of the transfer exists.
    pub fn has(&self, id: i64) -> bool {
        let of_it = |message: &Message| message.transfer == Some(id);
        self.ready.values().flatten().any(of_it) || self.unsettled.values().any(|(_, m)| of_it(m))
    }
}

#[async_trait]
impl Submit for Broker {
    async fn prepare(&self, _within: Duration) -> Result<(), SubmitError> {
        match self.state().is_away {
            true => Err(SubmitError::unanswered("no connection")),
            false => Ok(()),
        }
    }

    async fn submit(&self, id: TransferId, queue: &str) -> Result<String, SubmitError> {
        let id = id.get();
        let fate = self.state().plan.pop_front();
        match fate.unwrap_or(Publication::Confirmed) {
            Publication::Confirmed => Ok(self.state().publish(Some(id), queue)),
            Publication::ConfirmedAndLost => Ok("task-lost".to_owned()),
            Publication::Refused => Err(SubmitError::refused("the queue is full")),
            Publication::Unconfirmed => {
                self.state().publish(Some(id), queue);
                Err(SubmitError::unanswered("connection lost"))
            }
            Publication::Unanswered => Err(SubmitError::unanswered("connection lost")),
            Publication::ManagerDies => {
                self.state().publish(Some(id), queue);
                self.manager_died.notify_one();
                std::future::pending().await
            }
        }
    }
}

#[async_trait]
impl FindMessages for Broker {
    async fn ready(&self, queues: &[String]) -> Result<HashMap<String, u64>, FindError> {
        let state = self.state();
        if state.is_mute {
            return Err(FindError("no answer".into()));
        }
        let count = |queue: &String| state.ready.get(queue).map_or(0, |queue| queue.len() as u64);
        Ok(queues.iter().map(|q| (q.clone(), count(q))).collect())
    }

    async fn held(&self) -> Result<HeldMessages, FindError> {
        Ok(self.state().held.clone())
    }
}
