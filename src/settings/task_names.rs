//! `[celery.task_names]`: names of the tasks of this program in messages.

use celery_worker_cli::settings::{Celery, SectionProblems};

/// Keys of the section.
const TASK_TYPES: [&str; 2] = ["transfer_files_bbcp", "transfer_transfer_packages"];

/// Adds the broken rules of the section.
pub(super) fn check(celery: &Celery, problems: &mut SectionProblems<'_>) {
    for (task, names) in &celery.task_names {
        let key = format!("task_names.{task}");
        if !TASK_TYPES.contains(&task.as_str()) {
            let known = TASK_TYPES.join(" and ");
            problems.add(&key, format!("unknown task; known are {known}"));
        }
        problems.require(!names.is_empty(), &key, "needs at least one name");
    }
    for task in TASK_TYPES {
        problems.require(
            celery.task_names.contains_key(task),
            &format!("task_names.{task}"),
            "must be given when task_names is",
        );
    }
}
