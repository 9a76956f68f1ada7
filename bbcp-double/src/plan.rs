//! Selection of the entry of `BBCP_DOUBLE_PLAN` for this invocation.
//!
//! The plan is a list separated by `;`, with one entry for each *copy* (a command line that prints the version or is
//! refused takes none); the last entry repeats. The syntax of an entry is in [`crate::effects`]. The file
//! `BBCP_DOUBLE_STATE` has the number of copies so far. It is locked while it is read and written, so that concurrent
//! copies take different entries.
//!
//! Without a plan, `BBCP_DOUBLE_FAIL_RATE` makes each copy fail with that probability, by a random entry of
//! `BBCP_DOUBLE_FAIL_SET`.

use crate::effects::{Effect, parse_entry};
use crate::knobs::Knobs;
use std::fs::OpenOptions;
use std::io::{Read, Seek, Write};
use std::path::Path;

/// Default entries of the soak test: all kinds of failures that a retry can overcome.
const DEFAULT_FAIL_SET: &str = "refused;reset@30%;reset@90%;enospc@40%;segv-sink@50%;segv-remote@60%;\
                                segv-remote:32@20%;corrupt:50%;short:1;timelimit@70%;portbusy;banner";

/// Injections for this copy.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Injections {
    /// Number of this copy, from 0; always 0 without a state file
    pub(crate) number: u64,
    /// Text of the entry, for the record; `None` if neither plan nor failure rate is set
    pub(crate) entry: Option<String>,
    /// Parsed entry
    pub(crate) effects: Vec<Effect>,
}

/// Selects the entry of this copy and counts the copy.
///
/// # Errors
/// A problem with the knobs.
pub(crate) fn draw(knobs: &Knobs) -> Result<Injections, String> {
    let number = match &knobs.state {
        Some(state) => {
            count(state).map_err(|error| format!("cannot count in {}: {error}", state.display()))?
        }
        None => 0,
    };
    let entry = match &knobs.plan {
        Some(plan) => {
            let entries = split(plan);
            if entries.len() > 1 && knobs.state.is_none() {
                return Err("a plan of several entries needs BBCP_DOUBLE_STATE".into());
            }
            // All entries are parsed, so that a typing error in a later one is reported at once.
            for entry in &entries {
                parse_entry(entry)?;
            }
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            entries.get(index).or(entries.last()).copied()
        }
        None if knobs.fail_rate > 0.0 => {
            let entries = split(knobs.fail_set.as_deref().unwrap_or(DEFAULT_FAIL_SET));
            let mut random = Random::new(knobs.seed.unwrap_or_else(random_seed), number);
            if random.unit() < knobs.fail_rate {
                let index = (random.unit() * entries.len() as f64) as usize;
                entries.get(index).copied()
            } else {
                Some("ok")
            }
        }
        None => None,
    };
    Ok(Injections {
        number,
        entry: entry.map(str::to_owned),
        effects: entry.map(parse_entry).transpose()?.unwrap_or_default(),
    })
}

fn split(list: &str) -> Vec<&str> {
    list.split(';')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .collect()
}

/// Returns the count in the file and adds one to it.
fn count(state: &Path) -> std::io::Result<u64> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(state)?;
    file.lock()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let number: u64 = text.trim().parse().unwrap_or(0);
    file.rewind()?;
    file.set_len(0)?;
    writeln!(file, "{}", number + 1)?;
    Ok(number)
}

fn random_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    u64::from(std::process::id()) << 32 | u64::from(now)
}

/// SplitMix64: sufficient for random entries, with the same results on all platforms and in all versions.
struct Random(u64);

impl Random {
    fn new(seed: u64, number: u64) -> Self {
        Self(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// Returns a number in [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_default_set_can_be_read() {
        for entry in split(DEFAULT_FAIL_SET) {
            assert!(!parse_entry(entry).unwrap().is_empty(), "{entry}");
        }
    }

    #[test]
    fn draws_are_even_and_repeatable() {
        let draw = |number| Random::new(7, number).unit();
        assert_eq!(draw(3), draw(3));
        let below: usize = (0..1000).filter(|number| draw(*number) < 0.3).count();
        assert!((240..360).contains(&below), "{below}");
    }
}
