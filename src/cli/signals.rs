//! Signals, with the meaning that Celery gives them.
//!
//! TERM: warm, exit status 0; again: nothing new. INT: warm, but exit status 1; again: cold. QUIT:
//! cold at once. With `REMAP_SIGTERM=SIGQUIT` in the environment TERM means QUIT. HUP: as TERM; a
//! detached Python worker would start itself anew, which is the service manager's part here.

use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;
use crate::worker::Shutdown;

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

    /// Passes signals on to `shutdown` while `working` lasts; returns what came of it, and the exit
    /// status.
    pub(super) async fn during<R>(
        mut self,
        shutdown: &Shutdown,
        working: impl Future<Output = R>,
    ) -> (R, ExitCode) {
        let mut interrupted = false;
        tokio::pin!(working);
        let ended = loop {
            tokio::select! {
                ended = &mut working => break ended,
                Some(()) = self.term.recv() => {
                    if self.term_is_quit { shutdown.cold() } else { shutdown.warm() }
                }
                Some(()) = self.hup.recv() => shutdown.warm(),
                Some(()) = self.int.recv() => {
                    if interrupted { shutdown.cold() } else { shutdown.warm() }
                    interrupted = true;
                }
                Some(()) = self.quit.recv() => shutdown.cold(),
            }
        };
        let code = if interrupted {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
        (ended, code)
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
