//! Notifications to systemd: readiness, watchdog, status and stop, as in sd_notify(3).
//!
//! Without `NOTIFY_SOCKET` in the environment no notification is sent. The watchdog is notified from the beginning,
//! because it already runs after a restart of the program in the same process. It is notified only while no loop is
//! stopped, so that systemd restarts a process that hangs.
//!
//! A restart by HUP is only visible in the status. systemd does not accept that a stopping service becomes ready again,
//! and a service that is reloading blocks `systemctl reload` for as long as the running tasks take.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::spawn_blocking;
use tokio::time::interval;
use tokio_util::task::AbortOnDropHandle;

use crate::health::{HealthRegistry, Phase};

/// Interval of notifications, unless the watchdog needs a shorter one.
const EVERY: Duration = Duration::from_secs(10);

/// Notifies systemd until the returned handle is dropped. The service is ready in [`Phase::Running`].
pub(super) fn notify(health: &HealthRegistry) -> Option<AbortOnDropHandle<()>> {
    std::env::var_os("NOTIFY_SOCKET")?;
    Some(AbortOnDropHandle::new(tokio::spawn(notify_periodically(
        health.clone(),
    ))))
}

async fn notify_periodically(health: HealthRegistry) {
    let watchdog = sd_notify::watchdog_enabled();
    // Half of the watchdog's time, as sd_watchdog_enabled(3) recommends.
    let every = watchdog.map_or(EVERY, |limit| (limit / 2).min(EVERY));
    let mut ticks = interval(every.max(Duration::from_millis(10)));
    let mut phase = health.phase();
    let (mut sent_ready, mut sent_stopping) = (false, false);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = phase.changed() => {}
        }
        let mut states = Vec::new();
        let now = *phase.borrow_and_update();
        if now == Phase::Running && !sent_ready {
            sent_ready = true;
            states.push(NotifyState::Ready);
        }
        if now == Phase::Stopping && !sent_stopping {
            sent_stopping = true;
            states.push(NotifyState::Stopping);
        }
        let stopped = health.liveness().stopped();
        if stopped.is_empty() && watchdog.is_some() {
            states.push(NotifyState::Watchdog);
        }
        let status = match (stopped.first(), now) {
            (Some(stopped), _) => format!("the loop `{}` has stopped", stopped.name),
            (None, Phase::Starting) => "waiting for the database and the broker".to_owned(),
            (None, Phase::Running) => health.status(),
            (None, Phase::Restarting) => {
                format!(
                    "restarts when the running tasks have ended; {}",
                    health.status()
                )
            }
            (None, Phase::Stopping) => format!("stopping; {}", health.status()),
        };
        send(states, status).await;
    }
}

/// Sends states. The call runs outside of the runtime's threads, because it blocks while systemd does not read.
async fn send(states: Vec<NotifyState<'static>>, status: String) {
    let sent = spawn_blocking(move || {
        let mut all: Vec<NotifyState<'_>> = states;
        all.push(NotifyState::Status(&status));
        sd_notify::notify(&all)
    });
    let error = match sent.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::debug!(error, "systemd could not be notified");
}
