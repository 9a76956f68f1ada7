//! What a service tells systemd: that it is ready, that it lives, what it does, that it ends.
//!
//! As sd_notify(3) has it; without `NOTIFY_SOCKET` in the environment nothing is told. The watchdog is
//! fed from the first moment, since after a reload it runs already, and only while every loop of the
//! process has its pulse, so that one that stands still has the service started anew.
//!
//! A reload is not told, but for the status. To systemd a service that is stopping never comes back, and
//! one that is reloading holds up `systemctl reload`, for the hours that a copy may take.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::spawn_blocking;
use tokio::time::interval;
use tokio_util::task::AbortOnDropHandle;

use crate::sideport::{Board, Phase};

/// How often the state is told where no watchdog wants to hear more often.
const EVERY: Duration = Duration::from_secs(10);

/// Tells systemd of the process until the answer is dropped. It is ready once it is
/// [`Phase::Running`].
pub(super) fn supervise(board: &Board) -> Option<AbortOnDropHandle<()>> {
    std::env::var_os("NOTIFY_SOCKET")?;
    Some(AbortOnDropHandle::new(tokio::spawn(tell(board.clone()))))
}

async fn tell(board: Board) {
    let watchdog = sd_notify::watchdog_enabled();
    // Twice for each time that it wants to hear something, as sd_watchdog_enabled(3) advises.
    let every = watchdog.map_or(EVERY, |limit| (limit / 2).min(EVERY));
    let mut ticks = interval(every.max(Duration::from_millis(10)));
    let mut phase = board.phase();
    let (mut told_ready, mut told_stopping) = (false, false);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = phase.changed() => {}
        }
        let mut states = Vec::new();
        let now = *phase.borrow_and_update();
        if now == Phase::Running && !told_ready {
            told_ready = true;
            states.push(NotifyState::Ready);
        }
        if now == Phase::Stopping && !told_stopping {
            told_stopping = true;
            states.push(NotifyState::Stopping);
        }
        let stopped = board.pulses.stopped();
        if stopped.is_empty() && watchdog.is_some() {
            states.push(NotifyState::Watchdog);
        }
        let status = match (stopped.first(), now) {
            (Some(stopped), _) => format!("the loop `{}` stands still", stopped.name),
            (None, Phase::Starting) => "waiting for the database and the broker".to_owned(),
            (None, Phase::Running) => board.doing(),
            (None, Phase::Restarting) => {
                format!("begins anew when what runs has ended; {}", board.doing())
            }
            (None, Phase::Stopping) => format!("stopping; {}", board.doing()),
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
