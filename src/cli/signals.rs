//! Signals, with the meaning that Celery gives them.
//!
//! TERM: warm, exit status 0; again: nothing new. INT: warm, but exit status 1; again: cold. QUIT:
//! cold at once. With `REMAP_SIGTERM=SIGQUIT` in the environment TERM means QUIT. HUP: warm, and then the
//! service starts itself anew; on a terminal as TERM, since there it tells that the terminal is gone.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;
use super::restart::End;
use crate::sideport::{Board, Phase};
use celery_worker::worker::Shutdown;

/// The signals that a worker listens to.
pub(super) struct Signals {
    term: Signal,
    hup: Signal,
    int: Signal,
    quit: Signal,
    term_is_quit: bool,
}

impl Signals {
    /// Listens from now on.
    pub(super) fn listen() -> Result<Self, CliError> {
        let listen = |kind| {
            signal(kind).map_err(|e| CliError::Failed(format!("cannot listen to signals: {e}")))
        };
        Ok(Self {
            term: listen(SignalKind::terminate())?,
            hup: listen(SignalKind::hangup())?,
            int: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            term_is_quit: std::env::var("REMAP_SIGTERM").is_ok_and(|to| to == "SIGQUIT"),
        })
    }

    /// Passes signals on to `shutdown` while `working` lasts, and shows on the board that it ends, whoever
    /// asked for it; returns what came of it, and how the process is to end. Whether it can begin anew is
    /// asked when somebody wants it to.
    pub(super) async fn during<R>(
        mut self,
        board: &Board,
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
                // By the remote control, if by no signal.
                () = &mut requested, if !is_shown => {
                    is_shown = true;
                    board.enter(if restart { Phase::Restarting } else { Phase::Stopping });
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
                        tracing::info!("restart: no new tasks, and a new beginning when the running ones have ended");
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
                board.enter(Phase::Stopping);
            }
        };
        let end = match (restart && !stopped, interrupted) {
            (true, _) => End::Restart,
            (false, true) => End::Exit(ExitCode::FAILURE),
            (false, false) => End::Exit(ExitCode::SUCCESS),
        };
        (ended, end)
    }

    /// Waits for the first request to stop; the exit code of a program that it ends, as shells have
    /// it.
    pub(super) async fn ending(&mut self) -> ExitCode {
        let number = tokio::select! {
            _ = self.term.recv() => 15,
            _ = self.hup.recv() => 1,
            _ = self.int.recv() => 2,
            _ = self.quit.recv() => 3,
        };
        ExitCode::from(128 + number)
    }

    /// Waits for the first request to stop.
    pub(super) async fn any(&mut self) {
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
