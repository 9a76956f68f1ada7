//! Rates in bbcp's notation, and the progress lines of the sink.

use crate::console;
use chrono::Local;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Formats a rate as `4.0 MB/s`: units of 1024 written like powers of 1000, one decimal, and E after T as in the
/// original.
pub(crate) fn rate(bytes_per_second: f64) -> String {
    if bytes_per_second.is_nan() {
        return "-nan B/s".to_owned();
    }
    if bytes_per_second.is_infinite() {
        return "inf B/s".to_owned();
    }
    let mut scaled = bytes_per_second;
    for unit in ["", "K", "M", "G", "T", "E", "Z", "Y"] {
        if scaled < 1024.0 || unit == "Y" {
            return format!("{scaled:.1} {unit}B/s");
        }
        scaled /= 1024.0;
    }
    format!("{scaled:.1} B/s")
}

/// Rates in the progress lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rates {
    /// Measured rates
    Measured,
    /// `-nan`, the result of 0/0 in the original
    NotANumber,
    /// `inf`
    Infinite,
}

/// Format of a file's progress lines.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    /// Time between lines; zero floods, as `-P 1` does
    pub(crate) interval: Duration,
    /// `-v` adds the average
    pub(crate) verbose: bool,
    /// Number of bytes that this session has to write
    pub(crate) total: u64,
    /// Factor on sizes
    pub(crate) factor: u64,
    /// Rates
    pub(crate) rates: Rates,
    /// Number of written bytes at which no line is printed
    pub(crate) silent_at: Option<u64>,
    /// The lines advance without a copy, one percent each
    pub(crate) pretended: bool,
}

impl Style {
    /// Formats one line.
    pub(crate) fn line(&self, done: u64, now: f64, average: f64) -> String {
        let percent = match self.total {
            0 => "not".to_owned(),
            total => format!("{}%", u128::from(done) * 100 / u128::from(total)),
        };
        let shown = |measured: f64| match self.rates {
            Rates::Measured => rate(measured * self.factor as f64),
            Rates::NotANumber => rate(f64::NAN),
            Rates::Infinite => rate(f64::INFINITY),
        };
        let stamp = Local::now().format("%y%m%d %H:%M:%S");
        if self.verbose {
            format!(
                "bbcp: {stamp}  {percent} done; {}, avg {}",
                shown(now),
                shown(average)
            )
        } else {
            format!("bbcp: {stamp}  {percent} done; {}", shown(average))
        }
    }
}

/// A thread that prints progress until it is dropped.
pub(crate) struct Reporter {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reporter {
    /// Starts the thread. `done` counts the bytes of this session.
    pub(crate) fn start(style: Style, done: Arc<AtomicU64>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || report(&style, &done, &stopped));
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn report(style: &Style, done: &AtomicU64, stopped: &mpsc::Receiver<()>) {
    let started = Instant::now();
    let (mut last_done, mut last_time, mut count) = (0, started, 0_u64);
    let flooding = style.interval.is_zero();
    let interval = if flooding {
        Duration::from_millis(20)
    } else {
        style.interval
    };
    while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
        count += 1;
        let bytes = if style.pretended {
            style.total / 100 * (count % 100)
        } else {
            done.load(Ordering::Relaxed)
        };
        if style.silent_at == Some(bytes) {
            continue;
        }
        let time = Instant::now();
        let gained = bytes.saturating_sub(last_done) as f64;
        let now = if flooding && gained == 0.0 {
            f64::NAN
        } else {
            gained / (time - last_time).as_secs_f64()
        };
        console::line(&style.line(bytes, now, bytes as f64 / (time - started).as_secs_f64()));
        (last_done, last_time) = (bytes, time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        for (bytes, text) in [
            (0.0, "0.0 B/s"),
            (1023.0, "1023.0 B/s"),
            (4.0 * 1024.0 * 1024.0, "4.0 MB/s"),
            (2.5 * 1_125_899_906_842_624.0, "2.5 EB/s"),
            (f64::NAN, "-nan B/s"),
            (f64::INFINITY, "inf B/s"),
        ] {
            assert_eq!(rate(bytes), text);
        }
    }
}
