//! The public API of the published crates, as text beside each crate.
//!
//! The lists come from rustdoc's JSON through `xtask/public-api`. `cargo semver-checks` compares with a release on
//! crates.io, and there is none; a list in the repository shows each change of the API in the commit that makes it.

use std::env;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::TaskError;

/// The published crates.
const CRATES: [&str; 5] = [
    "celery-protocol",
    "celery-worker",
    "celery-worker-cli",
    "celery-worker-macros",
    "service-connection",
];

/// Set for the calls of rustdoc that cargo makes through this program.
const AS_RUSTDOC: &str = "XTASK_AS_RUSTDOC";

/// Exit code of `xtask/public-api` for JSON of another rustdoc.
const OTHER_FORMAT: i32 = 2;

/// Failure of the comparison.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("cannot run {program}")]
    Run {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cargo doc failed")]
    Doc,
    #[error("the public API cannot be listed")]
    List,
    #[error(
        "the public API of {0} differs from the list; if that is intended, run `cargo xtask api` and commit it"
    )]
    Differs(String),
}

/// Acts as rustdoc if cargo has called this program in its place; returns otherwise.
///
/// Only rustdoc gets `RUSTC_BOOTSTRAP`, which allows JSON on a stable toolchain: build scripts watch the variable, and
/// cargo would rebuild their crates.
pub(crate) fn act_as_rustdoc() {
    if env::var_os(AS_RUSTDOC).is_some() {
        let error = Command::new("rustdoc")
            .args(env::args_os().skip(1))
            .env("RUSTC_BOOTSTRAP", "1")
            .exec();
        eprintln!("xtask: cannot run rustdoc: {error}");
        std::process::exit(1);
    }
}

/// Writes the list of each crate, or compares it with the written one.
pub(crate) fn run(repository: &Path, check: bool) -> Result<(), TaskError> {
    let target = document(repository)?;
    let json = |name: &str| target.join("doc").join(name.replace('-', "_") + ".json");
    if !list(repository, &target, &CRATES.map(json))? {
        eprintln!("xtask: public API not compared");
        return Ok(());
    }
    let mut differing = Vec::new();
    for name in CRATES {
        let list = json(name).with_extension("txt");
        let api =
            fs::read_to_string(&list).map_err(|source| TaskError::File { path: list, source })?;
        let path = repository.join("crates").join(name).join("public-api.txt");
        let written = fs::read_to_string(&path).unwrap_or_default();
        if written == api {
            continue;
        }
        if check {
            show_difference(name, &written, &api);
            differing.push(name);
        } else {
            fs::write(&path, api).map_err(|source| TaskError::File { path, source })?;
            println!("crates/{name}/public-api.txt");
        }
    }
    match differing.is_empty() {
        true => Ok(()),
        false => Err(ApiError::Differs(differing.join(", ")).into()),
    }
}

/// Runs rustdoc on the libraries of the workspace; returns the target directory. The whole workspace, so that the
/// dependencies have the features that other checks have compiled them with.
fn document(repository: &Path) -> Result<PathBuf, ApiError> {
    let own = env::current_exe().map_err(|source| ApiError::Run {
        program: "xtask",
        source,
    })?;
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from);
    let status = Command::new("cargo")
        .args([
            "doc",
            "--quiet",
            "--locked",
            "--workspace",
            "--no-deps",
            "--lib",
        ])
        .args(["--features", "celery-worker/testing"])
        .current_dir(repository)
        .env("RUSTDOC", own)
        .env(AS_RUSTDOC, "1")
        .env(
            "RUSTDOCFLAGS",
            "-Z unstable-options --output-format json --cap-lints allow",
        )
        .status()
        .map_err(|source| ApiError::Run {
            program: "cargo",
            source,
        })?;
    match status.success() {
        true => Ok(target),
        false => Err(ApiError::Doc),
    }
}

/// Writes the public API in each of rustdoc's JSON files, one item a line, to a file beside it; returns false if another
/// rustdoc wrote them than can be read.
fn list(repository: &Path, target: &Path, json: &[PathBuf]) -> Result<bool, ApiError> {
    let status = Command::new("cargo")
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(repository.join("xtask/public-api/Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .arg("--")
        .args(json)
        .current_dir(repository)
        .status()
        .map_err(|source| ApiError::Run {
            program: "cargo",
            source,
        })?;
    match status.code() {
        Some(0) => Ok(true),
        Some(OTHER_FORMAT) => Ok(false),
        _ => Err(ApiError::List),
    }
}

/// Prints the lines that only one of two lists has.
fn show_difference(name: &str, written: &str, api: &str) {
    println!("{name}:");
    let missing = |from: &str, of: &str, sign: char| {
        let known: std::collections::HashSet<_> = from.lines().collect();
        for line in of.lines().filter(|line| !known.contains(line)) {
            println!("{sign} {line}");
        }
    };
    missing(api, written, '-');
    missing(written, api, '+');
}
