//! `doctor`: checks everything that a worker or a manager needs.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use celery_worker_cli::Signals;
use celery_worker_cli::node::host;

use super::{CliError, Context, output};
use crate::doctor::{Check, Doctor, DoctorOptions, Finding, Verdict, invalid_settings};
use crate::settings::SettingsError;

/// Check everything that a worker or manager needs: settings, database, broker, results, other hosts, directories.
///
/// Prints a line for each check, and below it advice if something has to be corrected. Nothing is changed; trial files
/// and rows are removed at once. Exits with 0 if nothing is red, with 1 otherwise.
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Only the locations of these sites, by short name, and the links from and to them.
    #[arg(long, value_delimiter = ',', value_name = "SHORT_NAME")]
    site: Vec<String>,

    /// Queues to check besides those of the locations.
    #[arg(short = 'Q', long, value_delimiter = ',', value_name = "QUEUE")]
    queues: Vec<String>,

    /// Checks to leave out.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    skip: Vec<Check>,

    /// Longest time for one check, e.g. `10s`.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

pub(super) async fn run(
    context: &Context,
    arguments: DoctorArguments,
) -> Result<ExitCode, CliError> {
    let options = DoctorOptions {
        sites: arguments.site,
        queues: arguments.queues,
        skip: arguments.skip.into_iter().collect(),
        limit: arguments.timeout,
    };
    let mut signals = Signals::listen()?;
    let doctor = Doctor::new(context.settings.clone(), host(), options);
    // Child processes end with the future that waits for them; they would outlive a process that is just killed.
    tokio::select! {
        findings = doctor.run_checks() => print_findings(context.json, &findings),
        code = signals.ending() => Ok(code),
    }
}

/// Reports settings that cannot be used. No other check is possible then.
pub(super) fn without_settings(json: bool, error: &SettingsError) -> Result<ExitCode, CliError> {
    print_findings(json, &invalid_settings(error))
}

fn print_findings(json: bool, findings: &[Finding]) -> Result<ExitCode, CliError> {
    let is_well = findings.iter().all(|f| f.verdict != Verdict::Red);
    if json {
        output::json(&serde_json::json!({ "ok": is_well, "checks": findings }))?;
    } else {
        let colour = std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        for finding in findings {
            print!("{}", format_finding(finding, colour));
        }
        println!("{}", summary(findings));
    }
    Ok(ExitCode::from(u8::from(!is_well)))
}

/// Mark, word and colour (SGR) of a verdict.
fn sign(verdict: Verdict) -> (&'static str, &'static str, &'static str) {
    match verdict {
        Verdict::Green => ("✔", "green", "32"),
        Verdict::Yellow => ("!", "yellow", "33"),
        Verdict::Red => ("✘", "red", "31"),
        Verdict::Skipped => ("-", "skipped", "2"),
    }
}

/// Formats a finding: one line for the result, and one for the advice.
fn format_finding(finding: &Finding, colour: bool) -> String {
    let (mark, word, code) = sign(finding.verdict);
    let verdict = format!("{mark} {word:<7}");
    let verdict = match colour {
        true => format!("\x1b[{code}m{verdict}\x1b[0m"),
        false => verdict,
    };
    let subject = match finding.subject.as_str() {
        "" => String::new(),
        subject => format!("{}: ", output::clean(subject)),
    };
    let name = name(finding.check);
    let mut text = format!(
        "{verdict} {name:<16} {subject}{}\n",
        output::clean(&finding.found)
    );
    if let Some(advice) = &finding.advice {
        text.push_str(&format!("{:<26} → {}\n", "", output::clean(advice)));
    }
    text
}

fn name(check: Check) -> String {
    use clap::ValueEnum as _;
    let value = check.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn summary(findings: &[Finding]) -> String {
    let count = |verdict| findings.iter().filter(|f| f.verdict == verdict).count();
    let counted = [
        Verdict::Green,
        Verdict::Yellow,
        Verdict::Red,
        Verdict::Skipped,
    ]
    .map(|verdict| format!("{} {}", count(verdict), sign(verdict).1));
    counted.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_and_its_advice() {
        let finding = Finding {
            check: Check::RemoteBbcp,
            subject: "far".into(),
            verdict: Verdict::Red,
            found: "no\x1b[2J\nbbcp".into(),
            advice: Some("install it".into()),
        };
        assert_eq!(
            format_finding(&finding, false),
            "✘ red     remote_bbcp      far: no\\u{1b}[2J\\nbbcp\n                           → install it\n"
        );
        assert!(format_finding(&finding, true).starts_with("\x1b[31m✘ red    \x1b[0m remote_bbcp"));
    }

    #[test]
    fn page_lists_every_check() {
        use clap::ValueEnum as _;
        let manual = include_str!("../../docs/operations/doctor.md");
        for check in Check::value_variants() {
            let row = format!("| `{}` |", name(*check));
            assert!(manual.contains(&row), "{row} is missing");
        }
    }
}
