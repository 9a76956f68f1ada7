//! States that a running task reports, on their way to the worker.

use std::time::Duration;

use celery_protocol::result::{InvalidStateName, State, StateName};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{Notify, oneshot};
use tokio::time::sleep;

/// Reason why a state was not set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateStateError {
    /// No state can have this name.
    #[error(transparent)]
    Name(#[from] InvalidStateName),
    /// The value cannot be written as JSON.
    #[error("the value of the state cannot be written as JSON")]
    Meta(#[from] serde_json::Error),
}

/// A reported state.
pub(crate) struct StateUpdate {
    pub(crate) state: State,
    /// Wakes the task that waits until the state is passed on. Dropped if a later state takes its place.
    pub(crate) passed_on: Option<oneshot::Sender<()>>,
}

/// The most recent state that a task reported and that is not passed on yet.
///
/// One slot rather than a queue: a state that was followed by another one is not reported, and a task may report
/// more often than a backend can store.
#[derive(Default)]
pub(crate) struct StateUpdates {
    latest: Mutex<Latest>,
    reported: Notify,
    is_awaited: Notify,
}

#[derive(Default)]
struct Latest {
    update: Option<StateUpdate>,
    is_closed: bool,
}

impl StateUpdates {
    /// Reports a state without waiting.
    pub(crate) fn report(&self, name: StateName, meta: Value) {
        self.put(name, meta, None);
    }

    /// Reports a state, and waits until it is passed on or replaced by a later one.
    pub(crate) async fn pass_on(&self, name: StateName, meta: Value) {
        let (passed_on, wait) = oneshot::channel();
        self.put(name, meta, Some(passed_on));
        self.is_awaited.notify_one();
        // An error means that the state is not reported: a later one took its place, or the run has ended.
        let _ = wait.await;
    }

    fn put(&self, name: StateName, meta: Value, passed_on: Option<oneshot::Sender<()>>) {
        let state = State::Custom { name, meta };
        let mut latest = self.latest.lock();
        if !latest.is_closed {
            latest.update = Some(StateUpdate { state, passed_on });
            self.reported.notify_one();
        }
    }

    /// The next state. The future can be dropped without losing one.
    pub(crate) async fn next(&self) -> StateUpdate {
        loop {
            if let Some(update) = self.latest.lock().update.take() {
                return update;
            }
            self.reported.notified().await;
        }
    }

    /// Waits for a time, or until the task waits for a state to be passed on.
    pub(crate) async fn pause(&self, time: Duration) {
        tokio::select! {
            () = sleep(time) => {}
            () = self.is_awaited.notified() => {}
        }
    }

    /// Ignores states from now on: the run has ended, and what it left behind must not wait.
    pub(crate) fn close(&self) {
        let mut latest = self.latest.lock();
        latest.is_closed = true;
        latest.update = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moving() -> (StateName, Value) {
        let name = StateName::new("MOVING").unwrap_or(StateName::PROGRESS);
        (name, Value::Null)
    }

    #[tokio::test]
    async fn an_awaited_state_ends_the_pause_and_replaces_progress() {
        let updates = StateUpdates::default();
        updates.report(StateName::PROGRESS, Value::Null);
        let ((name, meta), mut names) = (moving(), Vec::new());
        let passing_on = async {
            updates.pause(Duration::from_secs(3600)).await;
            let update = updates.next().await;
            names.push(update.state.name().to_owned());
            update.passed_on.map(|waiting| waiting.send(()))
        };
        let ((), passed_on) = tokio::join!(updates.pass_on(name, meta), passing_on);
        assert_eq!((names, passed_on), (vec!["MOVING".into()], Some(Ok(()))));
    }

    #[tokio::test]
    async fn nothing_waits_after_the_end_of_a_run() {
        let updates = StateUpdates::default();
        let (name, meta) = moving();
        let closing = async { updates.close() };
        tokio::join!(updates.pass_on(name, meta), closing);
        let (name, meta) = moving();
        updates.pass_on(name, meta).await;
    }
}
