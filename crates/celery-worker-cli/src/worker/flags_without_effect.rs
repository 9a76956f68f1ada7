//! Flags of `celery worker` without an effect in this program.

use clap::Args;

/// Flags that are accepted so that start scripts need no change.
#[derive(Debug, Args)]
#[command(next_help_heading = "Flags of `celery worker` without an effect here")]
pub(super) struct FlagsWithoutEffect {
    #[arg(short = 'A', long, value_name = "APP")]
    app: Option<String>,
    #[arg(short = 'P', long, value_name = "POOL")]
    pool: Option<String>,
    #[arg(long, value_name = "METHOD")]
    pool_start_method: Option<String>,
    #[arg(short = 'O', long, value_name = "PROFILE")]
    optimization: Option<String>,
    #[arg(short = 'I', long, value_name = "MODULES")]
    include: Option<String>,
    #[arg(long, value_name = "N")]
    max_tasks_per_child: Option<u64>,
    #[arg(long, value_name = "KIB")]
    max_memory_per_child: Option<u64>,
    #[arg(short = 'D', long)]
    detach: bool,
    #[arg(short = 'B', long)]
    beat: bool,
    #[arg(short = 's', long, value_name = "FILE")]
    schedule_filename: Option<String>,
    #[arg(long, value_name = "CLASS")]
    scheduler: Option<String>,
    #[arg(long)]
    without_mingle: bool,
    #[arg(long)]
    without_heartbeat: bool,
    #[arg(long, value_name = "FILE")]
    executable: Option<String>,
    #[arg(long, value_name = "MASK")]
    umask: Option<String>,
}

impl FlagsWithoutEffect {
    /// The flags that were given.
    pub(super) fn given(&self) -> Vec<&'static str> {
        [
            (self.app.is_some(), "--app"),
            (self.pool.is_some(), "--pool"),
            (self.pool_start_method.is_some(), "--pool-start-method"),
            (self.optimization.is_some(), "--optimization"),
            (self.include.is_some(), "--include"),
            (self.max_tasks_per_child.is_some(), "--max-tasks-per-child"),
            (
                self.max_memory_per_child.is_some(),
                "--max-memory-per-child",
            ),
            (self.detach, "--detach"),
            (self.beat, "--beat"),
            (self.schedule_filename.is_some(), "--schedule-filename"),
            (self.scheduler.is_some(), "--scheduler"),
            (self.without_mingle, "--without-mingle"),
            (self.without_heartbeat, "--without-heartbeat"),
            (self.executable.is_some(), "--executable"),
            (self.umask.is_some(), "--umask"),
        ]
        .into_iter()
        .filter_map(|(given, flag)| given.then_some(flag))
        .collect()
    }
}
