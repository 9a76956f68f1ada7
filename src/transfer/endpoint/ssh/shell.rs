//! The shell that runs at the other end of a connection, and the lines that it exchanges with the worker.
//!
//! A login costs several round trips, and so does every further session of a connection. One session therefore stays
//! open for all requests, and a request costs one round trip. [`SHELL`] reads one request per line and runs it in the
//! background, so requests do not wait for each other.
//!
//! Login shells run start-up files, and these may print any text: greetings, warnings, with or without a line end. Each
//! connection has a [`Mark`] that cannot be known in advance. The shell prints it when it begins, and before every line
//! of an answer; all other lines are noise.

use super::ScriptReply;

/// First word of every mark.
const PROGRAM: &str = "ccat-transfer";

/// Maximum number of bytes of an answer; the longest answer is a list of leftovers.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Maximum number of characters of a line in an error.
const MAX_NOISE_CHARS: usize = 500;

/// The program of the session, for a POSIX shell; `$0` is the mark. It is a single line, since some login shells do not
/// accept a line break inside quotes.
///
/// Each line of its input is one request in shell words: number, script, arguments of the script. Each line of its
/// output is `MARK NUMBER : LINE` for a line that the script printed, or `MARK NUMBER = CODE` at its end. A script runs as
/// a grandchild, so that the shell need not wait for it. At the end of the input, or of the connection, the shell ends all
/// scripts, which are in its process group.
pub(super) const SHELL: &str = concat!(
    r#"export LC_ALL=C; printf "\n%s begin\n" "$0"; "#,
    r#"while IFS= read -r q; do eval "set -- $q"; ( ( i=$1; s=$2; shift 2; o=$(exec </dev/null 2>&1; sh -c "$s" "$0" "$@"); c=$?; "#,
    r#"if test -n "$o"; then printf "%s\n" "$o" | while IFS= read -r l; do printf "%s %s : %s\n" "$0" "$i" "$l"; done; fi; "#,
    r#"printf "%s %s = %s\n" "$0" "$i" "$c" ) & ); done; kill -TERM 0"#
);

/// Word that marks the output of one connection's shell.
#[derive(Debug, Clone)]
pub(super) struct Mark(String);

impl Mark {
    pub(super) fn new() -> Self {
        Self(format!("{PROGRAM}-{}", uuid::Uuid::new_v4().simple()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns a marked line without its mark.
    fn strip<'a>(&self, line: &'a str) -> Option<&'a str> {
        line.strip_prefix(&self.0)?.strip_prefix(' ')
    }

    /// Parses a line of the shell's output.
    pub(super) fn parse(&self, line: &[u8]) -> ShellLine {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end();
        let noise = || ShellLine::Noise(line.trim().chars().take(MAX_NOISE_CHARS).collect());
        let Some(rest) = self.strip(line) else {
            return noise();
        };
        if rest == "begin" {
            return ShellLine::Begin;
        }
        let mut words = rest.splitn(3, ' ');
        let number = words.next().and_then(|number| number.parse().ok());
        let (Some(number), Some(kind)) = (number, words.next()) else {
            return noise();
        };
        let rest = words.next().unwrap_or_default();
        match (kind, rest.parse()) {
            (":", _) => ShellLine::Output(
                number,
                match self.strip(rest) {
                    Some(answer) => ScriptLine::Answer(answer.to_owned()),
                    None => ScriptLine::Complaint(rest.to_owned()),
                },
            ),
            ("=", Ok(code)) => ShellLine::End(number, code),
            _ => noise(),
        }
    }
}

/// A request as one line of the shell's input; `None` if a word contains a line break.
pub(super) fn request(number: u64, script: &str, arguments: &[&str]) -> Option<String> {
    let number = number.to_string();
    let words = [number.as_str(), script];
    let line = shell_words::join(words.iter().chain(arguments));
    (!line.contains(['\n', '\r', '\0'])).then(|| line + "\n")
}

/// A line of the shell's output.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ShellLine {
    /// The shell runs.
    Begin,
    /// A line of a request.
    Output(u64, ScriptLine),
    /// A request has ended with this exit code.
    End(u64, i32),
    /// Output of start-up files.
    Noise(String),
}

/// A line that a script printed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ScriptLine {
    /// Part of its answer.
    Answer(String),
    /// Any other output: error messages of programs.
    Complaint(String),
}

/// The output of a running script, in a limited number of bytes.
#[derive(Debug, Default)]
pub(super) struct PartialReply {
    answers: Vec<String>,
    complaint: String,
    bytes: usize,
}

impl PartialReply {
    pub(super) fn add(&mut self, line: ScriptLine) {
        match line {
            ScriptLine::Answer(line) if self.bytes + line.len() <= MAX_ANSWER_BYTES => {
                self.bytes += line.len();
                self.answers.push(line);
            }
            // The last line of an error message has its cause.
            ScriptLine::Complaint(line) if !line.trim().is_empty() => {
                self.complaint = line.trim().chars().take(MAX_NOISE_CHARS).collect();
            }
            ScriptLine::Answer(_) | ScriptLine::Complaint(_) => {}
        }
    }

    pub(super) fn end(self, code: i32) -> ScriptReply {
        ScriptReply {
            code,
            answers: self.answers,
            complaint: self.complaint,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("m begin", ShellLine::Begin)]
    #[case("m 7 : m file yes", ShellLine::Output(7, ScriptLine::Answer("file yes".into())))]
    #[case("m 7 : mkdir: no", ShellLine::Output(7, ScriptLine::Complaint("mkdir: no".into())))]
    #[case("m 7 :", ShellLine::Output(7, ScriptLine::Complaint(String::new())))]
    #[case("m 7 = 66", ShellLine::End(7, 66))]
    #[case("m 7 = x", ShellLine::Noise("m 7 = x".into()))]
    #[case("m x : y", ShellLine::Noise("m x : y".into()))]
    #[case("Welcome! m begin", ShellLine::Noise("Welcome! m begin".into()))]
    #[case("mm begin", ShellLine::Noise("mm begin".into()))]
    fn lines(#[case] line: &str, #[case] expected: ShellLine) {
        assert_eq!(Mark("m".into()).parse(line.as_bytes()), expected);
    }

    #[test]
    fn a_request_is_one_line() {
        let line = request(3, "say \"$1\"", &["a'b", ""]).unwrap();
        let words = shell_words::split(&line).unwrap();
        assert_eq!(words, ["3", "say \"$1\"", "a'b", ""]);
        assert_eq!(request(3, "x", &["a\nb"]), None);
    }

    /// In the corpus, `MARK` stands for the mark.
    #[test]
    fn any_output_is_an_answer_or_noise() {
        let mark = Mark("MARK".into());
        hostile_inputs::endures("answers", 4, |bytes| {
            let mut reply = PartialReply::default();
            for line in bytes.split(|byte| *byte == b'\n') {
                match mark.parse(line) {
                    ShellLine::Output(_, line) => reply.add(line),
                    ShellLine::Noise(noise) => assert!(noise.chars().count() <= MAX_NOISE_CHARS),
                    ShellLine::Begin | ShellLine::End(..) => {}
                }
            }
            let reply = reply.end(0);
            let kept: usize = reply.answers.iter().map(String::len).sum();
            assert!(kept <= MAX_ANSWER_BYTES);
            assert!(reply.complaint.chars().count() <= MAX_NOISE_CHARS);
        });
    }

    proptest! {
        #[test]
        fn arguments_survive_the_request(arguments in prop::collection::vec("\\PC{0,20}", 0..5)) {
            let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let line = request(1, "script", &words).unwrap();
            let read = shell_words::split(&line).unwrap();
            prop_assert_eq!(&read[2..], &arguments[..]);
        }
    }
}
