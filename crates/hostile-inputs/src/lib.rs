//! A corpus of inputs, and random changes of it, for parsers of hostile input.
//!
//! Used by `tests/parsers.rs` of each crate, and by unit tests of private parsers. The changes are the same in each run:
//!
//!   PARSER_SEED=7         other changes
//!   PARSER_ROUNDS=100000  more of them; damaged inputs for each parser, fewer for slow ones

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Maximum number of bytes of a damaged input.
const LARGE: usize = 8 << 10;

/// Number of bytes of the larger of two inputs that differ only in size.
const GROWN: usize = 128 << 10;

/// Ratio of the sizes of these two inputs.
const GROWTH: usize = 8;

/// Limit of the processor time for an input: a constant, and a time per byte. Ten times the usual time of a debug
/// build.
const CONSTANT: Duration = Duration::from_millis(300);
const PER_BYTE: Duration = Duration::from_micros(20);

/// Elapsed time after which a parser counts as endless.
const ENDLESS: Duration = Duration::from_secs(240);

/// Bytes with a meaning for at least one parser.
const SPECIAL: [&[u8]; 58] = [
    b"\0",
    b"\x01",
    b"\x1b[2J",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80",
    b"\xe2\x80\xa8",
    b"\"",
    b"'",
    b"`",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"[",
    b"]",
    b"[[],",
    b"{",
    b"}",
    b"{\"a\":",
    b"<",
    b"(",
    b":",
    b": ",
    b"://",
    b",",
    b"- ",
    b"-",
    b"? ",
    b"?",
    b"&a=",
    b"&",
    b"*a",
    b"&a ",
    b"!!set ",
    b"|",
    b"%",
    b"%ff",
    b"@",
    b"#",
    b"=",
    b";",
    b"/",
    b"../",
    b".",
    b" ",
    b"\t",
    b"\n",
    b"\n ",
    b"\r\n",
    b"1e999",
    b"-1",
    b"18446744073709551616",
    b"NaN",
    b"{\"__type__\":\"bytes\",\"__value__\":\"\"},",
    b"\xdd\xff\xff\xff\xff",
];

/// Generator of damaged inputs.
struct Damage<'a> {
    random: fastrand::Rng,
    files: &'a [(String, Vec<u8>)],
}

impl Damage<'_> {
    fn file(&mut self) -> (String, Vec<u8>) {
        self.files[self.random.usize(..self.files.len())].clone()
    }

    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.random.usize(..=length);
        let end = (start + self.random.usize(..=most)).min(length);
        start..end
    }

    fn special(&mut self) -> &'static [u8] {
        SPECIAL[self.random.usize(..SPECIAL.len())]
    }

    /// Returns a damaged file with its name.
    fn input(&mut self) -> (String, Vec<u8>) {
        let (name, mut bytes) = self.file();
        for _ in 0..self.random.usize(1..5) {
            self.damage(&mut bytes);
        }
        bytes.truncate(LARGE);
        (name, bytes)
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        let length = bytes.len();
        match self.random.u8(..8) {
            0 => {
                for _ in 0..self.random.usize(1..8) {
                    let bit = 1 << self.random.u8(..8);
                    if let Some(byte) = bytes.get_mut(self.random.usize(..length.max(1))) {
                        *byte ^= bit;
                    }
                }
            }
            1 => bytes.truncate(self.random.usize(..=length)),
            2 => {
                let range = self.range(length, 64);
                bytes.drain(range);
            }
            3 => {
                let (_, other) = self.file();
                bytes.truncate(self.random.usize(..=length));
                bytes.extend_from_slice(&other[self.random.usize(..=other.len())..]);
            }
            4 => {
                let range = self.range(length, 200);
                let slice = bytes[range.clone()].repeat(self.random.usize(1..40));
                bytes.splice(range, slice);
            }
            5 => {
                let (_, other) = self.file();
                let slice = other[self.range(other.len(), 200)].to_vec();
                let at = self.range(length, 100);
                bytes.splice(at, slice);
            }
            _ => {
                let times = match self.random.u8(..8) {
                    0 => self.random.usize(1..300),
                    _ => 1,
                };
                let at = self.range(length, 4);
                bytes.splice(at, self.special().repeat(times));
            }
        }
    }

    /// Returns two inputs of the same parts. The second repeats one part [`GROWTH`] times as often.
    fn growing(&mut self, round: usize) -> (String, [Vec<u8>; 2]) {
        let (name, file) = self.file();
        let unit = match round % 2 {
            0 => SPECIAL[round / 2 % SPECIAL.len()].to_vec(),
            _ => file[self.range(file.len(), 48)].to_vec(),
        };
        let unit = if unit.is_empty() { b"x".to_vec() } else { unit };
        let (head, tail) = file.split_at(self.random.usize(..=file.len()));
        let of = |size: usize| [head, &unit.repeat(size / unit.len()), tail].concat();
        let shown = String::from_utf8_lossy(&unit).into_owned();
        let sizes = [of(GROWN / GROWTH), of(GROWN)];
        (format!("{name}, with {shown:?} repeated"), sizes)
    }
}

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number"))
    })
}

/// Processor time of this thread, which does not depend on the load of the machine.
fn processor_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds = stat.split(' ').next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// Runs a parser and returns its processor time.
///
/// # Panics
/// The parser panics, or takes too long for the input's size. The message has the input and the data to make it again.
fn run(parser: &str, from: &str, seed: u64, input: &[u8], read: &impl Fn(&[u8])) -> Duration {
    let failed = |why: &str| -> ! {
        let mut shown = String::new();
        for byte in input.iter().take(2000) {
            let _ = write!(shown, "{}", byte.escape_ascii());
        }
        panic!(
            "{parser} {why}: {} bytes made of {from}, PARSER_SEED={seed}: b\"{shown}\"",
            input.len()
        )
    };
    let (done, ended) = channel::<()>();
    let (began, clock) = (processor_time(), Instant::now());
    let outcome = std::thread::scope(|scope| {
        if input.len() > LARGE {
            // A thread cannot be stopped from outside, so the process ends, with the reason in its output.
            scope.spawn(move || {
                if ended.recv_timeout(ENDLESS) == Err(RecvTimeoutError::Timeout) {
                    eprintln!("{parser} does not end with {from}, PARSER_SEED={seed}");
                    std::process::abort();
                }
            });
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| read(input)));
        drop(done);
        outcome
    });
    let took = match (began, processor_time()) {
        (Some(began), Some(ended)) => ended.saturating_sub(began),
        _ => clock.elapsed(),
    };
    if outcome.is_err() {
        failed("failed, see above");
    }
    let size = u32::try_from(input.len()).unwrap();
    if took > CONSTANT + PER_BYTE * size {
        failed(&format!("took {took:?}"));
    }
    took
}

/// Runs a parser on every file of its corpus, `tests/corpus/<parser>` of the package under test, and on a number of
/// damaged ones. It must return within a time that depends
/// on the size of the input. `read` asserts the properties of the result. `cost` divides the number of inputs, for slow
/// parsers.
///
/// # Panics
/// The parser fails; the message has the input.
pub fn endures(parser: &str, cost: u64, read: impl Fn(&[u8])) {
    // Cargo sets the variable to the directory of the package whose test runs.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the test");
    let folder = PathBuf::from(package).join("tests/corpus").join(parser);
    let entries = std::fs::read_dir(&folder).expect("there is a corpus");
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    assert!(files.len() > 3, "{} has few files", folder.display());
    let seed = variable("PARSER_SEED", 14);
    let rounds = variable("PARSER_ROUNDS", 2000) / cost;
    let clock = Instant::now();

    for (name, bytes) in &files {
        run(parser, name, seed, bytes, &read);
    }
    let random = fastrand::Rng::with_seed(seed);
    let mut damage = Damage {
        random,
        files: &files,
    };
    for _ in 0..rounds {
        let (name, bytes) = damage.input();
        run(parser, &name, seed, &bytes, &read);
    }
    let grown = usize::try_from(rounds / 100).unwrap().max(4);
    let mut slowest = Duration::ZERO;
    for round in 0..grown {
        let (name, [small, large]) = damage.growing(round);
        let of_small = run(parser, &name, seed, &small, &read);
        let of_large = run(parser, &name, seed, &large, &read);
        slowest = slowest.max(of_large);
        // A quadratic parser would take twice this limit.
        let most = of_small * u32::try_from(GROWTH * 4).unwrap() + CONSTANT;
        assert!(
            of_large < most,
            "{parser} takes {of_small:?} for {} bytes and {of_large:?} for {}: {name}, PARSER_SEED={seed}",
            small.len(),
            large.len()
        );
    }
    println!(
        "{parser}: {} files, {rounds} damaged inputs, {grown} grown ones (at most {slowest:?}), PARSER_SEED={seed}: {:?}",
        files.len(),
        clock.elapsed()
    );
}
