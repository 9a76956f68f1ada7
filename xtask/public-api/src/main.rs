//! Lists the public API of the crates whose rustdoc JSON is named on the command line: writes `FILE.txt` beside each
//! `FILE.json`. Exits with 2, without a list, if another version of rustdoc wrote the JSON than can be read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Deserialize;

#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error("cannot read or write {}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: not JSON of rustdoc: {source}", .path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{}: the public API cannot be listed: {source}", .path.display())]
    List {
        path: PathBuf,
        source: public_api::Error,
    },
    #[error(
        "this rustdoc writes format {found}, and `public-api` in xtask/public-api/Cargo.toml reads {}",
        rustdoc_types::FORMAT_VERSION
    )]
    Format { found: u32 },
}

#[derive(Deserialize)]
struct Document {
    format_version: u32,
}

fn main() -> ExitCode {
    for path in std::env::args_os().skip(1).map(PathBuf::from) {
        if let Err(error) = write_list(&path) {
            eprintln!("public-api-list: {error}");
            return match error {
                ListError::Format { .. } => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            };
        }
    }
    ExitCode::SUCCESS
}

fn write_list(json: &Path) -> Result<(), ListError> {
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| ListError::File { path, source }
    };
    let text = fs::read_to_string(json).map_err(file(json))?;
    let document: Document = serde_json::from_str(&text).map_err(|source| ListError::Json {
        path: json.to_owned(),
        source,
    })?;
    if document.format_version != rustdoc_types::FORMAT_VERSION {
        return Err(ListError::Format {
            found: document.format_version,
        });
    }
    let api = public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()
        .map_err(|source| ListError::List {
            path: json.to_owned(),
            source,
        })?;
    let list = json.with_extension("txt");
    fs::write(&list, api.to_string()).map_err(file(&list))
}
