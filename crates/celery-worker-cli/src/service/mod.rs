//! Services: processes that run until a signal or a request ends them.

use std::path::Path;

use celery_worker::worker::Shutdown;

use crate::error::ProcessError;
use crate::health::HealthRegistry;
use crate::program::Process;

mod pidfile;
mod restart;
mod signals;
mod systemd;

pub use restart::End;
pub use signals::Signals;

use pidfile::PidFile;

impl Process {
    /// Runs a service. Signals request its shutdown from the beginning, also while it waits for servers. systemd is
    /// notified, and `pidfile` contains the process id while the service runs.
    ///
    /// # Errors
    /// The error of the service, or [`ProcessError::Refused`] if another process has the file.
    pub async fn serve<E: From<ProcessError>>(
        &self,
        health: &HealthRegistry,
        pidfile: Option<&Path>,
        work: impl AsyncFnOnce(Shutdown) -> Result<(), E>,
    ) -> Result<End, E> {
        let signals = Signals::listen()?;
        let _notifications = systemd::notify(health);
        self.log_warnings();
        let _pidfile = pidfile.map(PidFile::create).transpose()?;
        let shutdown = Shutdown::default();
        let can_restart = || restart::is_possible(self);
        let working = work(shutdown.clone());
        let (ended, end) = signals
            .during(health, &shutdown, can_restart, working)
            .await;
        ended.map(|()| end)
    }
}
