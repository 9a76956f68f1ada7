//! The `ccat-transfer` program; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ccat_transfer::cli::main()
}
