//! The flags of `celery worker`.

use std::path::PathBuf;

use clap::Args;

use super::flags_without_effect::FlagsWithoutEffect;
use crate::error::ProcessError;
use crate::node::{host, node_name, node_path};
use crate::settings::{Celery, Problems, SettingsError};
use crate::wait_for::WaitFor;

/// The flags of `celery worker`. Those without a meaning for a process without Python and without child processes are
/// accepted with a warning, so that start scripts need no change.
#[derive(Debug, Args)]
pub struct WorkerArguments {
    /// Queues to listen to.
    #[arg(short = 'Q', long, value_delimiter = ',', value_name = "QUEUE")]
    pub queues: Vec<String>,

    /// Queues not to listen to.
    #[arg(short = 'X', long, value_delimiter = ',', value_name = "QUEUE")]
    pub exclude_queues: Vec<String>,

    /// Node name; %h is the host, %n its first label, %d its domain, %i is 0, %I nothing [default: celery@%h].
    #[arg(short = 'n', long, value_name = "NODE")]
    pub hostname: Option<String>,

    /// Tasks at a time; 0 or `auto` is one for each processor.
    #[arg(short = 'c', long, value_name = "N", value_parser = places)]
    pub concurrency: Option<u16>,

    /// As -c with the larger number: an unused slot costs nothing here.
    #[arg(long, value_name = "MAX,MIN")]
    pub autoscale: Option<String>,

    /// Prefetched deliveries per slot.
    #[arg(long, value_name = "N")]
    pub prefetch_multiplier: Option<u16>,

    /// Take a message only while a slot is free, over all queues; only for Redis as the broker.
    #[arg(long)]
    pub disable_prefetch: bool,

    /// Send the events of tasks, for monitors such as Flower.
    #[arg(short = 'E', long, visible_alias = "events")]
    pub task_events: bool,

    /// Seconds between the heartbeats that monitors see.
    #[arg(long, value_name = "SECONDS")]
    pub heartbeat_interval: Option<f64>,

    /// Seconds that a task may run.
    #[arg(long, value_name = "SECONDS")]
    pub time_limit: Option<f64>,

    /// Seconds after which a task is asked to stop.
    #[arg(long, value_name = "SECONDS")]
    pub soft_time_limit: Option<f64>,

    /// Do not exchange revoked ids and clocks with other workers (no mingle, no gossip).
    #[arg(long)]
    pub without_gossip: bool,

    /// Declare no queues; use the existing ones.
    #[arg(long)]
    pub no_declare: bool,

    /// File that holds the process id while the worker runs; in it, and in that of -f, %n is the name of the node, %h its host.
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,

    /// File in which revoked ids survive a restart, with the same abbreviations; not that of a Python worker.
    #[arg(short = 'S', long, value_name = "FILE")]
    pub statedb: Option<PathBuf>,

    /// `--wait-for`.
    #[command(flatten)]
    pub wait_for: WaitFor,

    #[command(flatten)]
    without_effect: FlagsWithoutEffect,
}

impl WorkerArguments {
    /// The node's name: that of `--hostname`, or `celery@` and the host.
    ///
    /// # Errors
    /// [`ProcessError::Usage`] for an unknown abbreviation.
    pub fn node_name(&self) -> Result<String, ProcessError> {
        node_name(self.hostname.as_deref(), &host())
    }

    /// The path of `--pidfile`, with the abbreviations for the node expanded.
    ///
    /// # Errors
    /// [`ProcessError::Usage`] for an unknown abbreviation.
    pub fn pidfile(&self) -> Result<Option<PathBuf>, ProcessError> {
        let path = self.pidfile.as_deref();
        path.map(|path| node_path("--pidfile", path, &self.node_name()?))
            .transpose()
    }

    /// The path of `--statedb`, with the abbreviations for the node expanded.
    ///
    /// # Errors
    /// [`ProcessError::Usage`] for an unknown abbreviation.
    pub fn statedb(&self) -> Result<Option<PathBuf>, ProcessError> {
        let path = self.statedb.as_deref();
        path.map(|path| node_path("--statedb", path, &self.node_name()?))
            .transpose()
    }

    /// Logs the flags that have no effect.
    pub fn log_ignored_flags(&self) {
        let ignored = self.without_effect.given();
        if !ignored.is_empty() {
            tracing::warn!(flags = ?ignored, "flags of celery worker without effect here");
        }
    }

    /// Overrides the settings by the flags.
    ///
    /// # Errors
    /// [`ProcessError::Usage`] or [`ProcessError::Settings`] for a value that is not allowed.
    pub fn apply(&self, celery: &mut Celery) -> Result<(), ProcessError> {
        let autoscale = self.autoscale.as_deref().map(|text| {
            text.split(',')
                .map(|n| n.trim().parse::<u16>())
                .collect::<Result<Vec<_>, _>>()
                .map(|numbers| numbers.into_iter().max())
                .map_err(|_| ProcessError::Usage("--autoscale: two numbers, as in 10,3".into()))
        });
        let autoscale = autoscale.transpose()?.flatten();
        if let Some(concurrency) = autoscale.or(self.concurrency) {
            celery.worker_concurrency = concurrency;
        }
        if let Some(multiplier) = self.prefetch_multiplier {
            celery.worker_prefetch_multiplier = multiplier;
        }
        celery.worker_disable_prefetch |= self.disable_prefetch;
        celery.worker_send_task_events |= self.task_events;
        celery.no_declare |= self.no_declare;
        let numbers = [
            (self.time_limit, &mut celery.task_time_limit),
            (self.soft_time_limit, &mut celery.task_soft_time_limit),
            (
                self.heartbeat_interval,
                &mut celery.worker_heartbeat_interval,
            ),
        ];
        for (given, setting) in numbers {
            if let Some(given) = given {
                *setting = given;
            }
        }
        let mut problems = Problems::default();
        celery.check(&mut problems.section("celery"));
        let problems = problems.into_vec();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(SettingsError { problems }.into()),
        }
    }
}

fn places(text: &str) -> Result<u16, std::num::ParseIntError> {
    match text {
        "auto" => Ok(0),
        number => number.parse(),
    }
}
