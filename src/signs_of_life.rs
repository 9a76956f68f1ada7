//! Signs of life of this process in the database, for the status page.
//!
//! Nothing waits for them, and nothing is decided by them. One that cannot be written is logged, and the next one follows
//! after the interval.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::PROGRAM;
use crate::transfer::database::DatabaseError;
use crate::transfer::lease::Owner;
use crate::transfer::repository::{PROGRAM_INTERVAL, ProgramKind, ProgramProcess, Repository};
use service_connection::error_chain::chain;

/// Time limit of recording the end: the process does not stay for it.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Signs of life of this process, until the value is dropped.
#[derive(Debug)]
pub(crate) struct SignsOfLife {
    repository: Repository,
    process: ProgramProcess,
    _writing: AbortOnDropHandle<()>,
}

impl SignsOfLife {
    /// Begins to give signs of life. Returns `None` if the database has no table for them.
    pub(crate) fn start(repository: &Repository, owner: Owner, kind: ProgramKind) -> Option<Self> {
        if !repository.has_programs() {
            return None;
        }
        let process = ProgramProcess {
            owner,
            kind,
            version: PROGRAM.version,
            token: Uuid::new_v4(),
        };
        let writing = tokio::spawn(write(repository.clone(), process.clone()));
        Some(Self {
            repository: repository.clone(),
            process,
            _writing: AbortOnDropHandle::new(writing),
        })
    }

    /// Records that the process ends in order.
    pub(crate) async fn end(self) {
        let Self {
            repository,
            process,
            _writing: writing,
        } = self;
        writing.abort();
        let ending = timeout(END_TIMEOUT, repository.end_program(&process)).await;
        match ending {
            Ok(Ok(())) => {}
            Ok(Err(error)) => report(&error),
            Err(_) => tracing::warn!(
                error = "no answer in time",
                "sign of life could not be written; the status page may report this process as lost"
            ),
        }
    }
}

async fn write(repository: Repository, process: ProgramProcess) {
    let mut beats = interval(PROGRAM_INTERVAL);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut has_row, mut is_failing) = (false, false);
    loop {
        beats.tick().await;
        let written = match has_row {
            true => repository.continue_program(&process).await,
            false => repository.start_program(&process).await.map(|()| true),
        };
        match written {
            Ok(still) => (has_row, is_failing) = (still, false),
            // Once for each failure of the database.
            Err(error) if !is_failing => {
                is_failing = true;
                report(&error);
            }
            Err(_) => {}
        }
    }
}

fn report(error: &DatabaseError) {
    tracing::warn!(
        error = %chain(error),
        "sign of life could not be written; the status page may report this process as lost"
    );
}
