//! `completions` and `man`: files that a package installs beside the program.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use clap_complete::Shell;

use super::{CliError, command};

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct Man {
    /// Directory for the pages; created if it is missing.
    directory: PathBuf,
}

/// Prints a script by which a shell completes the command line.
pub(super) fn completions(arguments: &Completions) -> Result<ExitCode, CliError> {
    let mut script = Vec::new();
    let mut command = command();
    let name = command.get_name().to_owned();
    clap_complete::generate(arguments.shell, &mut command, name, &mut script);
    io::stdout()
        .write_all(&script)
        .map_err(|e| CliError::failed(format!("cannot print the script: {e}")))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a manual page for the program and one for each of its commands.
pub(super) fn man(arguments: &Man) -> Result<ExitCode, CliError> {
    pages(&arguments.directory).map_err(|e| {
        let directory = arguments.directory.display();
        CliError::failed(format!("cannot write manual pages to {directory}: {e}"))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn pages(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(command(), directory)
}
