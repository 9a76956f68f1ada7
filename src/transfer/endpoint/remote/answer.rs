//! Separation of a script's answer from other output of a remote shell.
//!
//! Login shells run start-up files, and these may print any text: greetings, warnings, with or without a line end. Each
//! request has a [`Mark`] that cannot be known in advance. A script prints it on both outputs when it begins. Only
//! marked lines after that are its answer, and only text on its standard error after that is its error text. An exit
//! code without the mark does not come from the script.

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::transfer::bbcp::output::Lines;

/// First word of every mark.
const PROGRAM: &str = "ccat-transfer";

/// Maximum number of bytes of an answer; the longest answer is a list of leftovers.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Maximum number of bytes of standard error. The last ones are kept, since ssh prints its reason at the end.
const MAX_COMPLAINT_BYTES: usize = 64 << 10;

/// Maximum number of bytes per read from a pipe.
const CHUNK_BYTES: usize = 8 << 10;

/// Word that marks the output of one request.
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

    fn is_begin_line(&self, line: &str) -> bool {
        self.strip(line)
            .is_some_and(|rest| rest.trim_end() == BEGUN)
    }
}

/// First word that a script prints.
const BEGUN: &str = "begin";

/// The standard output of a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MarkedOutput {
    /// True if the script was started.
    pub(super) begun: bool,
    /// Marked lines.
    pub(super) lines: Vec<String>,
    /// The last line that is not part of the answer.
    pub(super) noise: String,
    bytes: usize,
}

impl MarkedOutput {
    fn take(&mut self, mark: &Mark, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        match mark.strip(&line) {
            Some(rest) if !self.begun => self.begun = rest.trim_end() == BEGUN,
            Some(rest) if self.bytes + rest.len() <= MAX_ANSWER_BYTES => {
                self.bytes += rest.len();
                self.lines.push(rest.trim_end().to_owned());
            }
            Some(_) => {}
            None if line.trim().is_empty() => {}
            None => self.noise = line.trim().chars().take(500).collect(),
        }
    }

    /// Reads the pipe to its end.
    pub(super) async fn read(pipe: Option<impl AsyncRead + Unpin>, mark: &Mark) -> Self {
        let mut answer = Self::default();
        let Some(mut pipe) = pipe else {
            return answer;
        };
        let mut lines = Lines::default();
        let mut chunk = vec![0; CHUNK_BYTES];
        // A broken pipe counts as its end; the exit code explains the failure.
        while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
            lines.push(&chunk[..n], |line| answer.take(mark, line));
        }
        lines.finish(|line| answer.take(mark, line));
        answer
    }
}

/// Reads standard error to its end. Returns the text after the begin of the script, or all text if the script
/// did not begin.
pub(super) async fn read_stderr(pipe: Option<impl AsyncRead + Unpin>, mark: &Mark) -> String {
    let Some(mut pipe) = pipe else {
        return String::new();
    };
    let mut kept = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(n @ 1..) = pipe.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..n]);
        if kept.len() > 2 * MAX_COMPLAINT_BYTES {
            kept.drain(..kept.len() - MAX_COMPLAINT_BYTES);
        }
    }
    let text = String::from_utf8_lossy(&kept);
    let mut after = Vec::new();
    for line in text.lines() {
        if mark.is_begin_line(line) {
            after.clear();
        } else {
            after.push(line);
        }
    }
    after.join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(mark: &Mark, output: &[u8]) -> MarkedOutput {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(MarkedOutput::read(Some(output), mark))
    }

    #[test]
    fn only_marked_lines_are_answers() {
        let mark = Mark("m".into());
        let found = read(
            &mark,
            b"Welcome!m begin\nm early\n\nm begin\nm made\nmm x\nnoise",
        );
        assert!(found.begun);
        assert_eq!(found.lines, ["made"]);
        assert_eq!(found.noise, "noise");
        assert!(!read(&mark, b"m made\n").begun);
    }

    #[test]
    fn output_before_the_mark_is_ignored() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mark = Mark("m".into());
        let of = |text: &'static str| runtime.block_on(read_stderr(Some(text.as_bytes()), &mark));
        assert_eq!(of("cat: x\n\nm begin\nmkdir: y\n"), "mkdir: y");
        assert_eq!(of("ssh: refused"), "ssh: refused");
    }

    /// In the corpus, `MARK` stands for the mark.
    #[test]
    fn any_output_is_an_answer_or_none() {
        let mark = Mark("MARK".into());
        hostile_inputs::endures("answers", 4, |bytes| {
            let answer = read(&mark, bytes);
            let kept: usize = answer.lines.iter().map(String::len).sum();
            assert!(kept <= MAX_ANSWER_BYTES);
            assert!(answer.begun || answer.lines.is_empty());
            assert!(answer.noise.chars().count() <= 500);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            let said = runtime.block_on(read_stderr(Some(bytes), &mark));
            assert!(said.len() <= 3 * 2 * MAX_COMPLAINT_BYTES);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn output_before_the_mark_changes_nothing(noise: Vec<u8>, lines in 0..40usize) {
            let mark = Mark::new();
            let m = mark.as_str();
            let mut output = noise.repeat(lines);
            output.extend_from_slice(format!("\n{m} begin\n{m} 12 x\n").as_bytes());
            let found = read(&mark, &output);
            prop_assert!(found.begun);
            prop_assert_eq!(found.lines, ["12 x"]);
        }
    }
}
