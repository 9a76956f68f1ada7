//! Creation of one package with its transfer.

use std::path::{Component, Path};

use entity::{PackageState, Status, Timestamp, data_transfer, data_transfer_package};
use sea_orm::DatabaseTransaction;
use sea_orm::sea_query::{Expr, IntoIden as _};

use super::{Cell, LocationName, TopologyError, insert, location_id, refuse_alembic};
use crate::transfer::database;
use crate::transfer::repository::Repository;

/// A new transfer with its package.
#[derive(Debug, Clone)]
pub struct NewTransfer {
    /// Path of the file below the origin's root.
    pub relative_path: String,
    /// Size in bytes.
    pub size_bytes: Option<u64>,
    /// Checksum.
    pub checksum: Option<String>,
    /// Location of the file.
    pub origin: LocationName,
    /// Location of the copy.
    pub destination: LocationName,
}

/// Creates a package and its PENDING transfer, and returns the transfer's id.
///
/// # Errors
/// See [`TopologyError`].
pub async fn create_transfer(
    repository: &Repository,
    new: &NewTransfer,
) -> Result<i64, TopologyError> {
    let file_name = file_name(&new.relative_path)?;
    let creating = async |tx: &DatabaseTransaction| {
        refuse_alembic(tx).await?;
        let origin = location_id(tx, &new.origin).await?;
        let destination = location_id(tx, &new.destination).await?;
        let now = Timestamp(database::now(tx).await?);
        let package = insert(
            tx,
            data_transfer_package::Entity,
            data_transfer_package::Column::Id,
            package_cells(repository, new, file_name, now),
        )
        .await?;
        let transfer = insert(
            tx,
            data_transfer::Entity,
            data_transfer::Column::Id,
            transfer_cells(repository, package, origin, destination, now),
        )
        .await?;
        Ok(transfer)
    };
    let database = repository.database();
    database.bounded(database.write(creating)).await
}

fn package_cells(
    repository: &Repository,
    new: &NewTransfer,
    file_name: &str,
    now: Timestamp,
) -> Vec<Cell> {
    use data_transfer_package::{Column, Optional};
    let schema = repository.schema();
    let size = new
        .size_bytes
        .map(|size| i64::try_from(size).unwrap_or(i64::MAX));
    let mut cells: Vec<Cell> = vec![
        (Column::FileName.into_iden(), Expr::val(file_name)),
        (
            Column::RelativePath.into_iden(),
            Expr::val(new.relative_path.as_str()),
        ),
        (Column::Size.into_iden(), Expr::val(size)),
        (
            Column::Checksum.into_iden(),
            Expr::val(new.checksum.clone()),
        ),
    ];
    if let Some(column) = &schema.package_state {
        cells.push((
            Optional::Status.into_iden(),
            column.write(PackageState::Waiting),
        ));
    }
    if schema.has_package_created_at {
        cells.push((Optional::CreatedAt.into_iden(), Expr::val(now)));
    }
    cells
}

fn transfer_cells(
    repository: &Repository,
    package: i64,
    origin: i64,
    destination: i64,
    now: Timestamp,
) -> Vec<Cell> {
    use data_transfer::{Column, Optional};
    let schema = repository.schema();
    let mut cells: Vec<Cell> = vec![
        (
            Column::DataTransferPackageId.into_iden(),
            Expr::val(package),
        ),
        (Column::OriginLocationId.into_iden(), Expr::val(origin)),
        (
            Column::DestinationLocationId.into_iden(),
            Expr::val(destination),
        ),
        (
            Column::Status.into_iden(),
            schema.transfer_status.write(Status::Pending),
        ),
        (Column::RetryCount.into_iden(), Expr::val(0)),
    ];
    if let Some(column) = &schema.unpack_status {
        cells.push((
            Optional::UnpackStatus.into_iden(),
            column.write(Status::Pending),
        ));
    }
    if schema.has_transfer_created_at {
        cells.push((Optional::CreatedAt.into_iden(), Expr::val(now)));
    }
    cells
}

/// The last part of a path that stays below its root.
fn file_name(relative_path: &str) -> Result<&str, TopologyError> {
    let path = Path::new(relative_path);
    let stays_below = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    path.file_name()
        .and_then(|name| name.to_str())
        .filter(|_| stays_below && !relative_path.ends_with('/'))
        .ok_or_else(|| TopologyError::RelativePath(relative_path.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_file_stays_below_its_root() {
        assert_eq!(file_name("2026/a.tar").unwrap(), "a.tar");
        for path in [
            "",
            "/a.tar",
            "../a.tar",
            "x/../a.tar",
            "./a.tar",
            "x/",
            "x/..",
        ] {
            assert!(file_name(path).is_err(), "{path}");
        }
    }
}
