//! Processor time and memory of processes, from /proc.

use std::fs;

use crate::Outcome;

/// Processor time and memory of a process and its descendants.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Usage {
    /// User and system time so far in seconds, including ended children.
    pub(crate) cpu_s: f64,
    /// Resident memory in kB; shared pages count in each process.
    pub(crate) resident_kb: u64,
    pub(crate) processes: u64,
}

/// Unit of the times in /proc; a constant of Linux's interface on every platform of Debian.
const TICKS_PER_SECOND: f64 = 100.0;

/// Reads the usage of a process and its descendants.
///
/// # Errors
/// The process does not exist.
pub(crate) fn of(pid: u32) -> Outcome<Usage> {
    let mut usage = Usage::default();
    let mut left = vec![pid];
    while let Some(pid) = left.pop() {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // After the name, which is in brackets and may contain anything: state is the third field.
        let rest = stat
            .rsplit_once(')')
            .ok_or("unknown form of /proc/PID/stat")?
            .1;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = |field: usize| -> Outcome<f64> {
            Ok(fields
                .get(field - 3)
                .ok_or("short /proc/PID/stat")?
                .parse()?)
        };
        usage.cpu_s += (ticks(14)? + ticks(15)? + ticks(16)? + ticks(17)?) / TICKS_PER_SECOND;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        usage.resident_kb += resident.map_or(Ok(0), str::parse)?;
        usage.processes += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            left.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    Ok(usage)
}
