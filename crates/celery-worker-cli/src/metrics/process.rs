//! `process_*`: figures of the kernel about this process, under the names that all Prometheus clients use.
//!
//! They are read at each scrape. Child processes are not included. The collector of the crate `prometheus` has the same
//! names, but counts CPU time in whole seconds.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use prometheus::{Counter, Error, Gauge};

use super::Registered;
use crate::clock;

/// The gauges and counters `process_*`.
#[derive(Debug)]
pub(super) struct ProcessMetrics {
    cpu: Counter,
    resident: Gauge,
    virtual_memory: Gauge,
    open_fds: Gauge,
    max_fds: Gauge,
    threads: Gauge,
    start: Gauge,
}

impl ProcessMetrics {
    /// Creates the metrics of this process; the current time is its start.
    ///
    /// # Errors
    /// See [`super::Metrics::new`].
    pub(super) fn new() -> Result<Self, Error> {
        let process = Self {
            cpu: Counter::new(
                "process_cpu_seconds_total",
                "User and system time of the process, in seconds.",
            )?,
            resident: Gauge::new(
                "process_resident_memory_bytes",
                "Resident memory, in bytes.",
            )?,
            virtual_memory: Gauge::new(
                "process_virtual_memory_bytes",
                "Virtual memory, in bytes.",
            )?,
            open_fds: Gauge::new("process_open_fds", "Open file descriptors.")?,
            max_fds: Gauge::new(
                "process_max_fds",
                "Maximum number of open file descriptors.",
            )?,
            threads: Gauge::new("process_threads", "Threads of the process.")?,
            start: Gauge::new(
                "process_start_time_seconds",
                "Start of the process, in seconds since 1970.",
            )?,
        };
        let now = SystemTime::from(clock::now()).duration_since(UNIX_EPOCH);
        process.start.set(now.unwrap_or_default().as_secs_f64());
        Ok(process)
    }

    pub(super) fn gauges(&self) -> [Box<dyn Registered>; 7] {
        [
            Box::new(self.cpu.clone()),
            Box::new(self.resident.clone()),
            Box::new(self.virtual_memory.clone()),
            Box::new(self.open_fds.clone()),
            Box::new(self.max_fds.clone()),
            Box::new(self.threads.clone()),
            Box::new(self.start.clone()),
        ]
    }

    /// Updates the metrics. A value that cannot be read stays unchanged.
    pub(super) fn read(&self) {
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let micros: i64 = [usage.user_time(), usage.system_time()]
                .iter()
                .map(|time| time.tv_sec() * 1_000_000 + time.tv_usec())
                .sum();
            // Two concurrent scrapes could both add the same increase; a counter must not go down.
            let more = micros as f64 / 1e6 - self.cpu.get();
            if more > 0.0 {
                self.cpu.inc_by(more);
            }
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            for (key, gauge, unit) in [
                ("VmRSS:", &self.resident, 1024.0),
                ("VmSize:", &self.virtual_memory, 1024.0),
                ("Threads:", &self.threads, 1.0),
            ] {
                if let Some(value) = field(&status, key) {
                    gauge.set(value * unit);
                }
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of the open files is the directory that is read here.
            self.open_fds.set(entries.count().saturating_sub(1) as f64);
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            self.max_fds.set(soft as f64);
        }
    }
}

/// A number from `/proc/self/status`, see proc(5).
fn field(status: &str, key: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_figures_are_read() -> Result<(), Error> {
        let process = ProcessMetrics::new()?;
        process.read();
        assert!(process.resident.get() > 1e6, "{}", process.resident.get());
        assert!(process.virtual_memory.get() >= process.resident.get());
        assert!(process.open_fds.get() >= 3.0);
        assert!(process.max_fds.get() >= process.open_fds.get());
        assert!(process.threads.get() >= 1.0);
        assert!(process.cpu.get() > 0.0);
        Ok(())
    }

    #[test]
    fn a_field_that_is_missing_is_none() {
        assert_eq!(
            field("Name:\tx\nVmRSS:\t    5232 kB\n", "VmRSS:"),
            Some(5232.0)
        );
        assert_eq!(field("Name:\tx\n", "VmRSS:"), None);
    }
}
