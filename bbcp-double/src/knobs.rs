//! Knobs: configuration of the double by a test.
//!
//! A knob is an environment variable `BBCP_DOUBLE_NAME`. A program under test may start bbcp with a clean
//! environment, so each knob may also be a line `BBCP_DOUBLE_NAME=value` of a file `bbcp-double.env` in the
//! directory of the executable *as it was called*: symbolic links are not followed, so a test links or copies
//! the binary into a directory of its own and puts the file beside it. Blank lines and lines that begin with
//! `#` are skipped; a value is everything after the first `=`. The environment wins over the file. With such
//! a file, `BBCP_DOUBLE_STATE` is by default `bbcp-double.state` beside it.
//!
//! | knob | value | default |
//! | --- | --- | --- |
//! | `HOSTS` | `siteb=/tmp/t/siteb,sitec=/tmp/t/sitec`: a host's files are under that directory | none |
//! | `ANYHOST` | 1: hosts that are not listed exist too, their paths are used as they are | 0 |
//! | `NETWORK` | 1: hosts are real ones, reached by the commands of `-S` and `-T`; see [`crate::network`] | 0 |
//! | `REMOTE` | 1: with no host in any operand, treat the target as remote all the same | 0 |
//! | `POLL` | seconds between two checks of a child that the agent lives | 5 |
//! | `ENDSLEEP` | seconds that the agent sleeps before it ends (the real one: 1) | 0 |
//! | `ACCEPT` | seconds until `Accept timed out` | 30 |
//! | `TICK` | seconds between progress lines, instead of those of `-P N` (N − 1) | |
//! | `RATE` | bytes per second where no `-x` is given | |
//! | `FAKE_SIZE` | factor on all printed sizes and rates; the copy itself is of true size | 1 |
//! | `VERSION` | what `-#` prints | `17.12.00.00.0` |
//! | `PEER_VERSION` | version of the other side; another than `VERSION` gives a warning | |
//! | `LOG` | file for the records, see [`crate::record`] | |
//! | `PLAN` | injections, see [`crate::plan`] | |
//! | `STATE` | file that counts the copies; needed by a plan of more than one entry | |
//! | `FAIL_RATE` | probability of failure of each copy, where no `PLAN` is given | 0 |
//! | `SEED` | makes the draws repeatable (with `STATE`) | process and time |
//! | `FAIL_SET` | entries to draw from, separated by `;` | a mixed bag |
//!
//! A knob that is unknown or cannot be read ends the run with code 99: a test must not pass by a typing error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Prefix of every knob's name.
const PREFIX: &str = "BBCP_DOUBLE_";
/// Name of the file of knobs.
const FILE: &str = "bbcp-double.env";
/// Version that `-#` of the real program prints.
const REAL_VERSION: &str = "17.12.00.00.0";

/// Values of all knobs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Knobs {
    pub(crate) hosts: Vec<(String, String)>,
    pub(crate) any_host: bool,
    pub(crate) network: bool,
    pub(crate) remote: bool,
    pub(crate) poll: Duration,
    pub(crate) end_sleep: Duration,
    pub(crate) accept: Duration,
    pub(crate) tick: Option<Duration>,
    pub(crate) rate: Option<u64>,
    pub(crate) fake_size: u64,
    pub(crate) version: String,
    pub(crate) peer_version: Option<String>,
    pub(crate) log: Option<PathBuf>,
    pub(crate) plan: Option<String>,
    pub(crate) state: Option<PathBuf>,
    pub(crate) fail_rate: f64,
    pub(crate) seed: Option<u64>,
    pub(crate) fail_set: Option<String>,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            any_host: false,
            network: false,
            remote: false,
            poll: Duration::from_secs(5),
            end_sleep: Duration::ZERO,
            accept: Duration::from_secs(30),
            tick: None,
            rate: None,
            fake_size: 1,
            version: REAL_VERSION.to_owned(),
            peer_version: None,
            log: None,
            plan: None,
            state: None,
            fail_rate: 0.0,
            seed: None,
            fail_set: None,
        }
    }
}

impl Knobs {
    /// Reads file and environment. `program` is the executable as it was called.
    ///
    /// # Errors
    /// A line that names the wrong knob.
    pub(crate) fn read(program: &Path) -> Result<Self, String> {
        let mut knobs = Self::default();
        let mut settings = BTreeMap::new();
        if let Some(directory) = program.parent()
            && let Ok(text) = std::fs::read_to_string(directory.join(FILE))
        {
            knobs.state = Some(directory.join("bbcp-double.state"));
            for line in text
                .lines()
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                let (name, value) = line
                    .split_once('=')
                    .filter(|(name, _)| name.starts_with(PREFIX))
                    .ok_or_else(|| format!("{FILE} has a line that is not a knob: {line}"))?;
                settings.insert(name.to_owned(), value.to_owned());
            }
        }
        for (name, value) in std::env::vars_os() {
            if let (Some(name), Some(value)) = (name.to_str(), value.to_str())
                && name.starts_with(PREFIX)
            {
                settings.insert(name.to_owned(), value.to_owned());
            }
        }
        for (name, value) in &settings {
            knobs
                .set(name.trim_start_matches(PREFIX), value)
                .map_err(|problem| format!("{name}={value}: {problem}"))?;
        }
        Ok(knobs)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        match name {
            "HOSTS" => {
                self.hosts = value
                    .split(',')
                    .filter(|entry| !entry.is_empty())
                    .map(|entry| {
                        entry
                            .split_once('=')
                            .map(|(host, root)| (host.to_owned(), root.to_owned()))
                            .ok_or("wants host=directory")
                    })
                    .collect::<Result<_, _>>()?;
            }
            "ANYHOST" => self.any_host = flag(value)?,
            "NETWORK" => self.network = flag(value)?,
            "REMOTE" => self.remote = flag(value)?,
            "POLL" => self.poll = seconds(value)?,
            "ENDSLEEP" => self.end_sleep = seconds(value)?,
            "ACCEPT" => self.accept = seconds(value)?,
            "TICK" => self.tick = Some(seconds(value)?),
            "RATE" => self.rate = Some(whole(value)?),
            "FAKE_SIZE" => self.fake_size = whole(value)?,
            "VERSION" => self.version = value.to_owned(),
            "PEER_VERSION" => self.peer_version = Some(value.to_owned()),
            "LOG" => self.log = Some(value.into()),
            "PLAN" => self.plan = Some(value.to_owned()),
            "STATE" => self.state = Some(value.into()),
            "FAIL_RATE" => {
                self.fail_rate = value
                    .parse()
                    .ok()
                    .filter(|rate| (0.0..=1.0).contains(rate))
                    .ok_or("wants a probability")?;
            }
            "SEED" => self.seed = Some(whole(value)?),
            "FAIL_SET" => self.fail_set = Some(value.to_owned()),
            _ => return Err("no such knob"),
        }
        Ok(())
    }
}

/// Returns the executable as it was called: symbolic links are not followed.
pub(crate) fn program_as_called(called: &str) -> Option<PathBuf> {
    if called.contains('/') {
        return Some(PathBuf::from(called));
    }
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(called))
        .find(|candidate| candidate.is_file())
}

fn flag(value: &str) -> Result<bool, &'static str> {
    match value {
        "0" | "" => Ok(false),
        "1" => Ok(true),
        _ => Err("wants 0 or 1"),
    }
}

fn whole(value: &str) -> Result<u64, &'static str> {
    value.parse().map_err(|_| "wants a whole number")
}

fn seconds(value: &str) -> Result<Duration, &'static str> {
    value
        .parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or("wants seconds")
}
