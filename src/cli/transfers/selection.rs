//! Selection of the transfers of a command.

use std::time::Duration;

use clap::{Args, ValueEnum};
use entity::Status;

use crate::transfer::failures::FailureKind;
use crate::transfer::repository::{Filter, Place};

/// Filters; a transfer is selected if it matches all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Filters")]
pub(super) struct Filters {
    /// In this state; for several states, separate them with commas or give the option again.
    #[arg(long, value_delimiter = ',')]
    status: Vec<StatusArgument>,

    /// From or to this site or location.
    #[arg(long, value_name = "SITE[/LOCATION]")]
    site: Option<Place>,

    /// From this site or location.
    #[arg(long, value_name = "SITE[/LOCATION]")]
    from: Option<Place>,

    /// To this site or location.
    #[arg(long, value_name = "SITE[/LOCATION]")]
    to: Option<Place>,

    /// Unchanged for longer than this, e.g. 2h: since the row's end_time, else its start_time (of the
    /// latest attempt), else its created_at.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,

    /// Changed within this time, by the same times.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    newer_than: Option<Duration>,

    /// Latest attempt ended with this error code, see docs/failures.md.
    #[arg(long, value_name = "CODE")]
    error: Option<String>,

    /// Held by this worker (celery@host), or by any worker on this host.
    #[arg(long, value_name = "NODE")]
    held_by: Option<String>,

    /// Waiting for the time of their next attempt.
    #[arg(long)]
    waiting: bool,

    /// SCHEDULED for longer than this, e.g. 10m, without a worker: their messages may be lost.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    scheduled_for: Option<Duration>,
}

/// The states of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum StatusArgument {
    Pending,
    Scheduled,
    InProgress,
    Completed,
    Failed,
}

impl From<StatusArgument> for Status {
    fn from(argument: StatusArgument) -> Self {
        match argument {
            StatusArgument::Pending => Self::Pending,
            StatusArgument::Scheduled => Self::Scheduled,
            StatusArgument::InProgress => Self::InProgress,
            StatusArgument::Completed => Self::Completed,
            StatusArgument::Failed => Self::Failed,
        }
    }
}

impl Filters {
    /// Returns true if no filter is given.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the states to select.
    pub(super) fn statuses(&self) -> Vec<Status> {
        self.status.iter().copied().map(Status::from).collect()
    }
}

impl From<&Filters> for Filter {
    fn from(filters: &Filters) -> Self {
        if let Some(code) = &filters.error
            && FailureKind::from_code(code).is_none()
        {
            eprintln!("ccat-transfer: no failure has the code `{code}`; see docs/failures.md");
        }
        Self {
            ids: None,
            id_range: None,
            file_name: None,
            statuses: filters.statuses(),
            site: filters.site.clone(),
            origin: filters.from.clone(),
            destination: filters.to.clone(),
            older_than: filters.older_than,
            newer_than: filters.newer_than,
            changed_from: None,
            changed_before: None,
            error_code: filters.error.clone(),
            held_by: filters.held_by.clone(),
            is_held: false,
            is_waiting: filters.waiting,
            scheduled_for: filters.scheduled_for,
        }
    }
}
