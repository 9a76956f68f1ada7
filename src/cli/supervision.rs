//! What a service tells systemd: that it is ready, that it lives, what it does, that it ends.
//!
//! As sd_notify(3) has it; without `NOTIFY_SOCKET` in the environment nothing is told. The watchdog is
//! fed only while every loop of the process has its pulse, so that one that stands still has the
//! service started anew.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::interval;
use tokio_util::task::AbortOnDropHandle;

use crate::sideport::{Board, Phase};

/// How often the state is told where no watchdog wants to hear more often.
const EVERY: Duration = Duration::from_secs(10);

/// Tells systemd of the process until the answer is dropped. It is ready once `ready` is.
pub(super) fn supervise(
    board: &Board,
    ready: watch::Receiver<bool>,
) -> Option<AbortOnDropHandle<()>> {
    std::env::var_os("NOTIFY_SOCKET")?;
    let telling = tell(board.clone(), ready);
    Some(AbortOnDropHandle::new(tokio::spawn(telling)))
}

async fn tell(board: Board, mut ready: watch::Receiver<bool>) {
    let watchdog = sd_notify::watchdog_enabled();
    // Twice for each time that it wants to hear something, as sd_watchdog_enabled(3) advises.
    let every = watchdog.map_or(EVERY, |limit| (limit / 2).min(EVERY));
    let mut ticks = interval(every.max(Duration::from_millis(10)));
    let mut phase = board.phase();
    let (mut told_ready, mut told_stopping) = (false, false);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = ready.changed(), if !told_ready => {}
            Ok(()) = phase.changed() => {}
        }
        let mut states = Vec::new();
        if !told_ready && *ready.borrow_and_update() {
            told_ready = true;
            states.push(NotifyState::Ready);
        }
        let is_stopping = *phase.borrow_and_update() == Phase::Stopping;
        if is_stopping && !told_stopping {
            told_stopping = true;
            states.push(NotifyState::Stopping);
        }
        let stopped = board.pulses.stopped();
        if stopped.is_empty() && watchdog.is_some() {
            states.push(NotifyState::Watchdog);
        }
        let status = match stopped.first() {
            Some(stopped) => format!("the loop `{}` stands still", stopped.name),
            None if is_stopping => format!("stopping; {}", board.doing()),
            None if !told_ready => "waiting for the broker".to_owned(),
            None => board.doing(),
        };
        say(states, status).await;
    }
}

/// Tells it. Not on a thread of the runtime: a systemd that does not listen just now makes this
/// wait, and must not stop anything else.
async fn say(states: Vec<NotifyState<'static>>, status: String) {
    let said = spawn_blocking(move || {
        let mut all: Vec<NotifyState<'_>> = states;
        all.push(NotifyState::Status(&status));
        sd_notify::notify(&all)
    });
    let error = match said.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::debug!(error, "systemd could not be told");
}
