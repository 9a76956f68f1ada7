//! Record of every invocation, for assertions of tests.
//!
//! `BBCP_DOUBLE_LOG` is a file of one JSON object per line. The line is written when the invocation begins
//! and completed in place when it ends, so there is exactly one line for each invocation, in the order of
//! their starts, and one that was killed shows `"rc": null`. Every access is under a lock on the file.
//!
//! | field | meaning |
//! | --- | --- |
//! | `argv`, `cwd` | as given |
//! | `env` | names of all environment variables, sorted |
//! | `pid`, `pgid`, `sid` | of the agent |
//! | `stdin_is_null` | whether standard input is `/dev/null` |
//! | `plan` | the entry that applied, or null |
//! | `beside` | agents' ids of earlier invocations with a live process at the start: no end on record, group not gone |
//! | `start`, `end` | seconds since 1970, with fraction |
//! | `rc` | exit code |

use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Space in the line for the end time and the code, in bytes.
const ROOM: usize = 48;

/// Line of this invocation in the record.
pub(crate) struct Record {
    file: PathBuf,
    offset: u64,
    length: usize,
    entry: Value,
}

impl Record {
    /// Writes the line of an invocation that begins.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn begin(
        file: PathBuf,
        arguments: &[String],
        plan: Option<&str>,
    ) -> io::Result<Self> {
        let mut names: Vec<String> = std::env::vars_os()
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        let mut entry = json!({
            "argv": arguments,
            "cwd": std::env::current_dir().ok(),
            "env": names,
            "pid": std::process::id(),
            "pgid": nix::unistd::getpgrp().as_raw(),
            "sid": nix::unistd::getsid(None).map(nix::unistd::Pid::as_raw).ok(),
            "stdin_is_null": standard_input_is_null(),
            "plan": plan,
            "beside": [],
            "start": null,
            "end": null,
            "rc": null,
        });
        // Both under one lock, so that of two concurrent invocations one sees the other.
        let mut log = open(&file)?;
        let mut earlier = String::new();
        log.read_to_string(&mut earlier)?;
        entry["beside"] = json!(live_agents(&earlier));
        entry["start"] = json!(now());
        let text = entry.to_string();
        let length = text.len() + ROOM;
        let offset = log.seek(SeekFrom::End(0))?;
        log.write_all(padded(&text, length).as_bytes())?;
        Ok(Self {
            file,
            offset,
            length,
            entry,
        })
    }

    /// Completes the line. If the log was emptied in the meantime, writes the line again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn end(mut self, code: u8) -> io::Result<()> {
        let begun = self.entry.to_string();
        self.entry["end"] = json!(now());
        self.entry["rc"] = json!(code);
        let mut log = open(&self.file)?;
        log.seek(SeekFrom::Start(self.offset))?;
        let mut there = vec![0; begun.len()];
        let unchanged = log.read_exact(&mut there).is_ok() && there == begun.as_bytes();
        log.seek(if unchanged {
            SeekFrom::Start(self.offset)
        } else {
            SeekFrom::End(0)
        })?;
        log.write_all(padded(&self.entry.to_string(), self.length).as_bytes())
    }
}

/// Agents' ids of recorded invocations without an end and with a live process.
fn live_agents(log: &str) -> Vec<i64> {
    let open: Vec<(i64, i64)> = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|entry| entry["end"].is_null())
        .filter_map(|entry| Some((entry["pid"].as_i64()?, entry["pgid"].as_i64()?)))
        .collect();
    if open.is_empty() {
        return Vec::new();
    }
    let groups = live_groups();
    open.into_iter()
        .filter(|(_, group)| groups.contains(group))
        .map(|(pid, _)| pid)
        .collect()
}

/// Returns the process groups with a process that is not a zombie.
fn live_groups() -> HashSet<i64> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return HashSet::new();
    };
    processes
        .filter_map(|process| {
            let stat = std::fs::read_to_string(process.ok()?.path().join("stat")).ok()?;
            // After the name, which may contain anything: state, parent, group.
            let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
            let state = fields.next()?;
            let group = fields.nth(1)?.parse().ok()?;
            (!matches!(state, "Z" | "X")).then_some(group)
        })
        .collect()
}

fn open(path: &PathBuf) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.lock()?;
    Ok(file)
}

/// Pads a line with blanks: they are not part of the JSON value.
fn padded(text: &str, length: usize) -> String {
    format!("{text:<length$}\n")
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| (since.as_secs_f64() * 1e3).round() / 1e3)
}

fn standard_input_is_null() -> bool {
    let (Ok(input), Ok(null)) = (
        std::fs::metadata("/dev/stdin"),
        std::fs::metadata("/dev/null"),
    ) else {
        return false;
    };
    input.file_type().is_char_device() && input.rdev() == null.rdev()
}
