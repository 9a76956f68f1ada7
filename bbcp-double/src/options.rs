//! The command line of bbcp 17.12.
//!
//! Single letters may be combined; a value is always the *next* argument and may not begin with `-`; an optional value
//! takes a following word that does not begin with `-`; options end at the first operand; of a repeated option the last
//! counts; `--` is not the end of options but an option without effect. Long options may be abbreviated.

use crate::checksum::Checksum;
use crate::failure::Failure;
use serde::{Deserialize, Serialize};

/// Presence of an option's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    None,
    Required,
    Optional,
}

/// All accepted options. Those without effect only appear in the record of the invocation.
const LETTERS: &[(char, Value)] = &[
    ('a', Value::Optional),
    ('A', Value::None),
    ('b', Value::Required),
    ('B', Value::Required),
    ('c', Value::Optional),
    ('e', Value::None),
    ('E', Value::Required),
    ('f', Value::None),
    ('F', Value::None),
    ('h', Value::None),
    ('i', Value::Required),
    ('I', Value::Required),
    ('k', Value::None),
    ('K', Value::None),
    ('l', Value::Required),
    ('m', Value::Required),
    ('n', Value::None),
    ('o', Value::None),
    ('O', Value::None),
    ('p', Value::None),
    ('P', Value::Required),
    ('q', Value::Required),
    ('s', Value::Required),
    ('S', Value::Required),
    ('t', Value::Required),
    ('T', Value::Required),
    ('u', Value::Required),
    ('U', Value::Required),
    ('v', Value::None),
    ('V', Value::None),
    ('w', Value::Required),
    ('W', Value::Required),
    ('x', Value::Required),
    ('y', Value::Required),
    ('z', Value::None),
    ('Z', Value::Required),
    ('4', Value::Optional),
    ('~', Value::None),
    ('#', Value::None),
    ('-', Value::None),
];

/// Long names: word, shortest abbreviation, letter.
const WORDS: &[(&str, usize, char)] = &[
    ("append", 1, 'a'),
    ("buffers", 1, 'b'),
    ("buffsz", 6, 'B'),
    ("checksum", 5, 'E'),
    ("compress", 1, 'c'),
    ("force", 1, 'f'),
    ("help", 1, 'h'),
    ("idfile", 1, 'i'),
    ("infiles", 2, 'I'),
    ("ipv4", 4, '4'),
    ("keep", 1, 'k'),
    ("logfile", 1, 'l'),
    ("mkdir", 3, 'A'),
    ("mode", 1, 'm'),
    ("nodns", 1, 'n'),
    ("nofschk", 4, 'F'),
    ("omit", 4, 'O'),
    ("order", 1, 'o'),
    ("port", 4, 'Z'),
    ("preserve", 1, 'p'),
    ("progress", 4, 'P'),
    ("ptime", 2, '~'),
    ("qos", 3, 'q'),
    ("reverse", 3, 'z'),
    ("streams", 1, 's'),
    ("sync", 4, 'y'),
    ("timelimit", 1, 't'),
    ("unbuffered", 1, 'u'),
    ("verbose", 1, 'v'),
    ("version", 7, '#'),
    ("vverbose", 2, 'V'),
    ("windowsz", 1, 'w'),
    ("xfrrate", 1, 'x'),
];

/// Attributes of the source that `-p` and `-~` keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Preserve {
    /// Nothing
    #[default]
    Nothing,
    /// `-~`: access and modification time
    Times,
    /// `-p`: also mode and group
    Everything,
}

/// Files that `-y` flushes before the target is closed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Flush {
    /// Nothing
    #[default]
    Nothing,
    /// `-y d`
    File,
    /// `-y dd`
    FileAndDirectory,
}

/// `-a [dir]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Append {
    /// Checkpoint directory on the target's host; `~/.bbcp` by default
    pub(crate) directory: Option<String>,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Options {
    /// `-s`
    pub(crate) streams: u64,
    /// `-P`, seconds
    pub(crate) progress: Option<u64>,
    /// `-v`
    pub(crate) verbose: bool,
    /// `-V`, implies `verbose`
    pub(crate) very_verbose: bool,
    /// `-f`
    pub(crate) force: bool,
    /// `-k`
    pub(crate) keep: bool,
    /// `-K`
    pub(crate) truncate: bool,
    /// `-a`
    pub(crate) append: Option<Append>,
    /// `-A`
    pub(crate) make_directory: bool,
    /// `-e`, `-E`
    pub(crate) checksum: Checksum,
    /// `-p`, `-~`
    pub(crate) preserve: Preserve,
    /// `-m`
    pub(crate) mode: Option<u32>,
    /// Directory mode of `-m`
    pub(crate) directory_mode: u32,
    /// `-I`
    pub(crate) list: Option<String>,
    /// `-O`
    pub(crate) omit: bool,
    /// `-t`, seconds
    pub(crate) time_limit: Option<u64>,
    /// `-x`, bytes per second
    pub(crate) rate: Option<u64>,
    /// `-F`
    pub(crate) skip_space_check: bool,
    /// `-y`
    pub(crate) flush: Flush,
    /// `-n`
    pub(crate) no_dns: bool,
    /// `-o`, or implied by another option
    pub(crate) ordered: bool,
    /// First and last port of `-Z`
    pub(crate) ports: Option<(u16, u16)>,
    /// `-z`
    pub(crate) reverse: bool,
    /// `-S`
    pub(crate) source_command: Option<String>,
    /// `-T`
    pub(crate) target_command: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streams: 4,
            progress: None,
            verbose: false,
            very_verbose: false,
            force: false,
            keep: false,
            truncate: false,
            append: None,
            make_directory: false,
            checksum: Checksum::default(),
            preserve: Preserve::Nothing,
            mode: None,
            directory_mode: 0o755,
            list: None,
            omit: false,
            time_limit: None,
            rate: None,
            skip_space_check: false,
            flush: Flush::Nothing,
            no_dns: false,
            ordered: false,
            ports: None,
            reverse: false,
            source_command: None,
            target_command: None,
        }
    }
}

impl Options {
    /// Returns true if the target of a failed copy stays.
    pub(crate) fn keeps_failed_target(&self) -> bool {
        self.keep || self.truncate
    }

    /// Returns true if the start of a file is reported.
    pub(crate) fn announces_start(&self) -> bool {
        self.very_verbose || self.progress.is_some()
    }
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// `-h`
    Help,
    /// `-#`
    Version,
    /// A copy: options, and the operands as written (sources, then the target)
    Copy(Box<Options>, Vec<String>),
}

/// Rejection of a command line. With `usage`, the usage text is printed on standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Code and text
    pub(crate) failure: Failure,
    /// Usage is printed as well
    pub(crate) usage: bool,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            usage: false,
        }
    }
}

fn misuse(code: u8, line: impl Into<String>) -> Refusal {
    Refusal {
        failure: Failure::new(code, line),
        usage: true,
    }
}

/// Parses the arguments (without the program's name).
///
/// # Errors
/// A refusal with bbcp's text and code: 255 for an option that it does not know or that lacks its value, 1
/// for a value or a combination that it does not accept.
pub(crate) fn parse(arguments: &[String]) -> Result<Request, Refusal> {
    if arguments.is_empty() {
        return Err(misuse(1, "Copy arguments not specified."));
    }
    let mut options = Options::default();
    let mut checksum = None;
    let mut rest = arguments.iter().peekable();
    while let Some(word) = rest.next_if(|word| word.starts_with('-')) {
        let cluster = &word[1..];
        if cluster.is_empty() {
            return Err(misuse(255, "Option letter missing after '-'."));
        }
        let long = cluster.strip_prefix('-').filter(|name| name.len() > 1);
        let letters: Vec<char> = match long {
            Some(name) => vec![letter_of(name).ok_or_else(|| misuse(255, "Invalid option, '-'."))?],
            None => cluster.chars().collect(),
        };
        for letter in letters {
            let shown = match long {
                Some(_) => cluster.to_owned(),
                None => letter.to_string(),
            };
            let Some((_, kind)) = LETTERS.iter().find(|(known, _)| *known == letter) else {
                return Err(misuse(255, format!("Invalid option, '-{letter}'.")));
            };
            let value = match kind {
                Value::None => None,
                Value::Optional => rest
                    .next_if(|next| !next.starts_with('-'))
                    .filter(|value| !value.is_empty()),
                Value::Required => Some(
                    rest.next_if(|next| !next.starts_with('-') && !next.is_empty())
                        .ok_or_else(|| {
                            misuse(255, format!("Value not specified for '-{shown}'."))
                        })?,
                ),
            }
            .map(String::as_str);
            match letter {
                'h' => return Ok(Request::Help),
                '#' => return Ok(Request::Version),
                // The last one counts, and is parsed after all other options.
                'E' => checksum = value,
                _ => apply(&mut options, letter, value)?,
            }
        }
    }
    if let Some(specification) = checksum {
        options.checksum.apply(specification)?;
    }
    conclude(&mut options)?;
    let operands: Vec<String> = rest.cloned().collect();
    Ok(Request::Copy(Box::new(options), operands))
}

fn letter_of(name: &str) -> Option<char> {
    WORDS
        .iter()
        .find(|(word, shortest, _)| name.len() >= *shortest && word.starts_with(name))
        .map(|(_, _, letter)| *letter)
}

fn apply(options: &mut Options, letter: char, value: Option<&str>) -> Result<(), Failure> {
    let text = value.unwrap_or_default();
    match letter {
        'a' => {
            options.append = Some(Append {
                directory: value.map(str::to_owned),
            });
            options.ordered = true;
        }
        'A' => options.make_directory = true,
        'b' => {
            match text.strip_prefix('+') {
                Some(more) => number("additional buff", more, 1, 4096)?,
                None => number("blocking factor", text, 1, 1024)?,
            };
        }
        'B' => {
            size("block size", text, 1024)?;
        }
        'c' => {
            if let Some(level) = value {
                number("compression level", level, 0, 9)?;
            }
            options.ordered = true;
        }
        'e' => options.checksum.on_link = true,
        'f' => options.force = true,
        'F' => options.skip_space_check = true,
        'I' => options.list = Some(text.to_owned()),
        'k' => {
            options.keep = true;
            options.ordered = true;
        }
        'K' => options.truncate = true,
        'm' => {
            let file = match text.split_once('/') {
                Some((directory, file)) => {
                    options.directory_mode = octal("dirmode", directory)?;
                    file
                }
                None => text,
            };
            if !file.is_empty() {
                options.mode = Some(octal("mode", file)?);
            }
        }
        'n' => options.no_dns = true,
        'o' => options.ordered = true,
        'O' => options.omit = true,
        'p' => options.preserve = Preserve::Everything,
        'P' => options.progress = Some(number("seconds", text, 1, u64::MAX)?),
        'q' => {
            number("qos", text, 0, 255)?;
        }
        's' => options.streams = number("streams", text, 1, 64)?,
        'S' => options.source_command = Some(text.to_owned()),
        't' => options.time_limit = Some(size("time limit", text, 1)?),
        'T' => options.target_command = Some(text.to_owned()),
        'u' if !matches!(text, "s" | "t" | "st" | "ts") => {
            return Err(invalid("unbuffered options", text));
        }
        'U' => {
            size("forced window size", text, 8192)?;
        }
        'v' => options.verbose = true,
        'V' => {
            options.verbose = true;
            options.very_verbose = true;
        }
        'w' | 'W' => {
            size("window size", text.strip_prefix('=').unwrap_or(text), 8192)?;
        }
        'x' => options.rate = Some(size("transfer rate", text, 1024)?),
        'y' => {
            options.flush = match text {
                "d" => Flush::File,
                "dd" => Flush::FileAndDirectory,
                _ => return Err(invalid("sync option", text)),
            };
        }
        'Z' => {
            let (first, last) = text.split_once(':').unwrap_or((text, text));
            options.ports = Some((port(first)?, port(last)?));
        }
        'z' => options.reverse = true,
        '4' => {
            if let Some(places) = value
                && !places.chars().all(|place| matches!(place, 't' | 's' | 'c'))
            {
                return Err(invalid("ipv4 options", places));
            }
        }
        '~' => options.preserve = Preserve::Times,
        // -i -l -u and the empty option: recorded, but without effect.
        _ => {}
    }
    Ok(())
}

/// Applies the rules that concern several options.
fn conclude(options: &mut Options) -> Result<(), Failure> {
    if options.checksum.computed_at_sink(options.ordered) && options.checksum.whole.is_some() {
        options.ordered = true;
    }
    if options.append.is_some() && options.checksum.whole.is_some() {
        return Err(Failure::new(1, "-a and -E ...= are mutually exclusive."));
    }
    if options.keep && options.truncate {
        return Err(Failure::new(1, "-k and -K are mutually exclusive."));
    }
    Ok(())
}

fn invalid(what: &str, text: &str) -> Failure {
    Failure::new(1, format!("Invalid {what} - {text}"))
}

fn number(what: &str, text: &str, least: u64, most: u64) -> Result<u64, Failure> {
    match text.parse::<u64>() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(invalid(what, text)),
    }
}

fn port(text: &str) -> Result<u16, Failure> {
    let port = number("port number", text, 1, u64::from(u16::MAX))?;
    u16::try_from(port).map_err(|_| invalid("port number", text))
}

/// Parses a number with an optional k, m or g, up to 1 GiB.
fn size(what: &str, text: &str, least: u64) -> Result<u64, Failure> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|size| (least..=1 << 30).contains(size))
        .ok_or_else(|| invalid(what, text))
}

fn octal(what: &str, text: &str) -> Result<u32, Failure> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if (1..=0o7777).contains(&mode) => Ok(mode),
        _ => Err(invalid(what, text)),
    }
}

/// The usage text of `-h` and of a refused command line.
pub(crate) fn usage() -> String {
    let letters: String = LETTERS
        .iter()
        .filter(|(_, kind)| *kind == Value::None)
        .map(|(letter, _)| *letter)
        .collect();
    let valued: Vec<String> = LETTERS
        .iter()
        .filter(|(_, kind)| *kind != Value::None)
        .map(|(letter, kind)| match kind {
            Value::Optional => format!("[-{letter} [value]]"),
            _ => format!("[-{letter} value]"),
        })
        .collect();
    format!(
        "Usage:   bbcp [Options] [Inspec] Outspec\n\nOptions: [-{letters}] {}\n\n\
         I/Ospec: [user@][host:]file\n\nThis is the bbcp test double of ccat-transfer.",
        valued.join(" ")
    )
}
