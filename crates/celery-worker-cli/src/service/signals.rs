//! Signals, with their meaning in Celery.
//!
//! TERM: warm shutdown, exit status 0; a second one has no effect. INT: warm shutdown, exit status 1; a second one:
//! cold shutdown. QUIT: cold shutdown. With `REMAP_SIGTERM=SIGQUIT` in the environment TERM means QUIT. HUP: warm
//! shutdown and restart. On a terminal HUP has the effect of TERM, because it means there that the terminal was closed.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use celery_worker::worker::Shutdown;

use super::restart::End;
use crate::error::ProcessError;
use crate::health::{HealthRegistry, Phase};

/// Signals that end a process.
#[derive(Debug)]
pub struct Signals {
    term: Signal,
    hup: Signal,
    int: Signal,
    quit: Signal,
    term_is_quit: bool,
}

impl Signals {
    /// Replaces the default effect of the signals.
    ///
    /// # Errors
    /// The operating system rejects the handlers.
    pub fn listen() -> Result<Self, ProcessError> {
        let listen = |kind| {
            signal(kind).map_err(|e| ProcessError::Failed(format!("cannot listen to signals: {e}")))
        };
        Ok(Self {
            term: listen(SignalKind::terminate())?,
            hup: listen(SignalKind::hangup())?,
            int: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            term_is_quit: std::env::var("REMAP_SIGTERM").is_ok_and(|to| to == "SIGQUIT"),
        })
    }

    /// Runs `working` and triggers `shutdown` on signals. Updates the phase of `health` accordingly. Returns the output
    /// of `working` and the way in which the process ends. A restart takes place if `can_restart` returns true at the
    /// signal.
    pub(super) async fn during<R>(
        mut self,
        health: &HealthRegistry,
        shutdown: &Shutdown,
        can_restart: impl Fn() -> bool,
        working: impl Future<Output = R>,
    ) -> (R, End) {
        let mut interrupted = false;
        let (mut stopped, mut restart) = (false, false);
        let requested = shutdown.requested();
        let mut is_shown = false;
        tokio::pin!(working, requested);
        let ended = loop {
            tokio::select! {
                ended = &mut working => break ended,
                // A shutdown by the remote control, if no signal came before.
                () = &mut requested, if !is_shown => {
                    is_shown = true;
                    health.enter(if restart { Phase::Restarting } else { Phase::Stopping });
                }
                Some(()) = self.term.recv() => {
                    stopped = true;
                    if self.term_is_quit { shutdown.cold() } else { shutdown.warm() }
                }
                Some(()) = self.hup.recv() => {
                    if on_terminal() {
                        stopped = true;
                        shutdown.warm();
                    } else if !stopped && can_restart() {
                        tracing::info!("restart requested: no new tasks; restarting when the running ones have ended");
                        restart = true;
                        shutdown.warm();
                    }
                }
                Some(()) = self.int.recv() => {
                    stopped = true;
                    if interrupted { shutdown.cold() } else { shutdown.warm() }
                    interrupted = true;
                }
                Some(()) = self.quit.recv() => {
                    stopped = true;
                    shutdown.cold();
                }
            }
            if stopped {
                health.enter(Phase::Stopping);
            }
        };
        let end = match (restart && !stopped, interrupted) {
            (true, _) => End::Restart,
            (false, true) => End::Exit(ExitCode::FAILURE),
            (false, false) => End::Exit(ExitCode::SUCCESS),
        };
        (ended, end)
    }

    /// Waits for the first signal. Returns the exit code of a program that this signal ends: 128 plus its number.
    pub async fn ending(&mut self) -> ExitCode {
        let number = tokio::select! {
            _ = self.term.recv() => 15,
            _ = self.hup.recv() => 1,
            _ = self.int.recv() => 2,
            _ = self.quit.recv() => 3,
        };
        ExitCode::from(128 + number)
    }

    /// Waits for the next signal.
    pub async fn any(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.hup.recv() => {}
            _ = self.int.recv() => {}
            _ = self.quit.recv() => {}
        }
    }
}

fn on_terminal() -> bool {
    io::stdin().is_terminal() || io::stderr().is_terminal()
}
