//! `transfers log`: bbcp's output of an attempt.
//!
//! The log is a file on the host of the worker that made the attempt. Its name contains the lease token, so a local
//! file with this name is the right one, even if another host wrote it (on a shared file system).

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::time::sleep;

use super::super::{CliError, Context, output};
use crate::transfer::id::{AttemptNumber, TransferId};
use crate::transfer::repository::{AttemptRecord, Repository};
use celery_worker_cli::Signals;
use celery_worker_cli::node::host;

/// Interval between two reads of a log with `--follow`.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(in crate::cli) struct Log {
    /// Id of the transfer.
    id: TransferId,

    /// Number of the attempt; without it the last one.
    #[arg(long, value_name = "N")]
    attempt: Option<AttemptNumber>,

    /// Continue until the attempt ends.
    #[arg(long)]
    follow: bool,
}

pub(super) async fn run(context: &Context, log: &Log) -> Result<ExitCode, CliError> {
    let mut signals = Signals::listen()?;
    let printing = print(context, log);
    tokio::select! {
        printed = printing => printed.map(|()| ExitCode::SUCCESS),
        code = signals.ending() => Ok(code),
    }
}

async fn print(context: &Context, log: &Log) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let attempt = find(&repository, log).await?;
    let Some(path) = &attempt.log_path else {
        return Err(CliError::NotFound(no_log(log.id, &attempt)));
    };
    let mut file = match File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(CliError::NotFound(log_on_other_host(path, &attempt)));
        }
        Err(error) => return Err(CliError::failed(format!("cannot read {path}: {error}"))),
    };
    let mut printer = Printer::new(context.json, attempt.attempt);
    loop {
        // Checked before the file is read, so that the last lines are read too.
        let is_over = !log.follow || find(&repository, log).await?.outcome.is_some();
        copy(&mut file, path, &mut printer).await?;
        if is_over {
            return printer.end();
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Prints the file from the current position to its end.
async fn copy(file: &mut File, path: &str, printer: &mut Printer) -> Result<(), CliError> {
    let mut chunk = vec![0; 64 << 10];
    loop {
        let count = file
            .read(&mut chunk)
            .await
            .map_err(|error| CliError::failed(format!("cannot read {path}: {error}")))?;
        match chunk.get(..count) {
            None | Some([]) => return Ok(()),
            Some(bytes) => printer.put(bytes)?,
        }
    }
}

/// Finds the attempt of the command line.
async fn find(repository: &Repository, log: &Log) -> Result<AttemptRecord, CliError> {
    let detail = repository.show(log.id).await?;
    let mut attempts = detail.ok_or_else(|| super::unknown(log.id))?.attempts;
    let Some(number) = log.attempt else {
        return attempts.pop().ok_or_else(|| {
            CliError::NotFound(format!("transfer {} has not been tried yet", log.id))
        });
    };
    let last = attempts
        .last()
        .map_or(AttemptNumber::ZERO, |attempt| attempt.attempt);
    attempts
        .into_iter()
        .find(|attempt| attempt.attempt == number)
        .ok_or_else(|| {
            CliError::NotFound(format!(
                "transfer {} has no attempt {number}; its attempts are 1 to {last}",
                log.id
            ))
        })
}

fn no_log(id: TransferId, attempt: &AttemptRecord) -> String {
    let number = attempt.attempt;
    let why = attempt
        .message
        .as_deref()
        .map_or_else(String::new, |message| {
            format!(": {}", output::clean(message))
        });
    format!(
        "attempt {number} of transfer {id} has no log, as bbcp was not started{why}; \
         --attempt N prints the log of another one"
    )
}

fn log_on_other_host(path: &str, attempt: &AttemptRecord) -> String {
    let here = host();
    let worker = output::clean(&attempt.worker);
    let of_here = worker
        .rsplit_once('@')
        .is_some_and(|(_, host)| host == here);
    let path = output::clean(path);
    if of_here {
        format!("the log {path} of {worker} does not exist any more; it was removed")
    } else {
        format!(
            "the log is not on this host, {here}: {worker} wrote it on its host; read {path} there, unless \
             it was removed"
        )
    }
}

/// Prints a log in pieces as they arrive.
struct Printer {
    json: bool,
    attempt: AttemptNumber,
    is_terminal: bool,
    line: Vec<u8>,
}

impl Printer {
    fn new(json: bool, attempt: AttemptNumber) -> Self {
        Self {
            json,
            attempt,
            is_terminal: std::io::stdout().is_terminal(),
            line: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        if self.json {
            for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
                self.line.extend_from_slice(piece);
                if piece.ends_with(b"\n") {
                    self.put_line()?;
                }
            }
            return Ok(());
        }
        if !self.is_terminal {
            return output::print_bytes(bytes);
        }
        // The other end wrote a part of the text, and a terminal executes control sequences.
        self.line.extend_from_slice(bytes);
        let whole = whole_characters(&self.line);
        let rest = self.line.split_off(whole);
        let text = std::mem::replace(&mut self.line, rest);
        output::print(&String::from_utf8_lossy(&text))
    }

    fn put_line(&mut self) -> Result<(), CliError> {
        let text = String::from_utf8_lossy(&self.line);
        let line = json!({ "attempt": self.attempt, "line": text.trim_end_matches(['\r', '\n']) });
        output::json_line(&line)?;
        self.line.clear();
        Ok(())
    }

    fn end(&mut self) -> Result<(), CliError> {
        match (self.line.is_empty(), self.json) {
            (true, _) => Ok(()),
            (false, true) => self.put_line(),
            (false, false) => output::print(&String::from_utf8_lossy(&self.line)),
        }
    }
}

/// Number of bytes before an incomplete UTF-8 character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    let has_begun = |at: &usize| {
        let rest = bytes.get(*at..).unwrap_or_default();
        str::from_utf8(rest)
            .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
    };
    // The longest UTF-8 character has four bytes.
    let tail = bytes.len().saturating_sub(3);
    (tail..bytes.len()).find(has_begun).unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::whole_characters;

    #[test]
    fn characters_are_not_cut() {
        for (bytes, whole) in [
            (&b"ab"[..], 2),
            (b"a\xc2", 1),
            (b"a\xe2\x80", 1),
            (b"\xff\xe2\x80", 1),
            (b"\xff\xe2\x80\xae", 4),
            (b"a\xff", 2),
            (b"", 0),
        ] {
            assert_eq!(whole_characters(bytes), whole, "{bytes:?}");
        }
    }
}
