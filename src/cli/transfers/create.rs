//! `transfers create`: creates a package and its PENDING transfer.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::super::db::topology_error;
use super::super::{CliError, Context, output};
use crate::transfer::plan::LocalHost;
use crate::transfer::repository::LocationRecord;
use crate::transfer::topology::{self, LocationName, NewTransfer};
use celery_worker_cli::node::host;

#[derive(Debug, Args)]
pub(in crate::cli) struct Create {
    /// The file: a path below the origin's directory.
    #[arg(long, value_name = "FILE")]
    package: String,
    /// Location of the file, as SITE/LOCATION.
    #[arg(long, value_name = "SITE/LOCATION")]
    from: String,
    /// Location of the copy, as SITE/LOCATION.
    #[arg(long, value_name = "SITE/LOCATION")]
    to: String,
    /// Recorded digest of the file, in the form `sha256:HEX`.
    #[arg(long, value_name = "ALGORITHM:HEX")]
    checksum: Option<String>,
}

pub(super) async fn run(context: &Context, create: Create) -> Result<(), CliError> {
    let repository = context.repository().await?;
    let origin: LocationName = create.from.parse().map_err(topology_error)?;
    let destination: LocationName = create.to.parse().map_err(topology_error)?;
    let at = topology::locate(&repository, &origin)
        .await
        .map_err(topology_error)?;
    let size_bytes = local_size(context, &at, &create.package)?;
    let new = NewTransfer {
        relative_path: create.package,
        size_bytes,
        checksum: create.checksum,
        origin,
        destination,
    };
    let id = topology::create_transfer(&repository, &new)
        .await
        .map_err(topology_error)?;
    if context.json {
        return output::json(&json!({ "id": id }));
    }
    println!("{id}");
    Ok(())
}

/// Size of a package on this host; `None` if the package is on another host.
fn local_size(
    context: &Context,
    at: &LocationRecord,
    package: &str,
) -> Result<Option<u64>, CliError> {
    let Some(disk) = &at.disk else {
        return Ok(None);
    };
    let here = LocalHost::of_settings(&host(), &context.settings.transfer);
    if disk
        .host
        .as_deref()
        .is_some_and(|host| !host.is_empty() && !here.has_name(host))
    {
        return Ok(None);
    }
    let path = Path::new(&disk.path).join(package);
    let facts = std::fs::metadata(&path)
        .map_err(|e| CliError::NotFound(format!("the package {}: {e}", path.display())))?;
    if facts.is_file() {
        Ok(Some(facts.len()))
    } else {
        Err(CliError::usage(format!("{} is not a file", path.display())))
    }
}
