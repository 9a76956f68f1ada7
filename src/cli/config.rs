//! `config`: check the settings, print the defaults.

use std::process::ExitCode;

use clap::Subcommand;

use super::{CliError, output};
use crate::settings::{DEFAULTS, Settings, SettingsError};
use celery_worker_cli::exit_code;
use celery_worker_cli::text::visible_lines;

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Report all problems of the settings at once.
    Check,
    /// Print every setting with its default and its meaning.
    Default,
}

pub(super) fn run(
    command: &ConfigCommand,
    json: bool,
    loaded: Result<Settings, SettingsError>,
) -> Result<ExitCode, CliError> {
    match command {
        ConfigCommand::Check if json => {
            let (problems, warnings) = match loaded {
                Ok(settings) => (Vec::new(), settings.warnings),
                Err(error) => (error.problems, Vec::new()),
            };
            output::json(&serde_json::json!({ "problems": problems, "warnings": warnings }))?;
            if !problems.is_empty() {
                return Ok(ExitCode::from(exit_code::SETTINGS));
            }
        }
        ConfigCommand::Check => {
            for warning in loaded?.warnings {
                eprintln!("warning: {}", visible_lines(&warning.to_string()));
            }
            println!("the settings are valid");
        }
        ConfigCommand::Default => print!("{DEFAULTS}"),
    }
    Ok(ExitCode::SUCCESS)
}
