//! Conversion of a transfer's rows into the input of its plan.

use entity::StorageType;

use super::{Location, Package};
use crate::settings::{LinkSettings, Settings};
use crate::transfer::failures::TransferError;
use crate::transfer::link::LinkName;
use crate::transfer::repository::{LocationRecord, PackageRecord, TransferRecord};

/// The columns of one transfer's rows that its plan needs.
#[derive(Debug, Clone)]
pub struct PlanInput {
    /// Location that is read.
    pub origin: Location,
    /// Location that is written.
    pub destination: Location,
    /// The file to copy.
    pub package: Package,
    /// Method of the route from origin to destination; `None` without a route.
    pub method: Option<String>,
}

impl PlanInput {
    /// Converts the rows of a transfer.
    ///
    /// # Errors
    /// [`TransferError::Database`] for a row that is missing or incomplete.
    pub(in crate::transfer) fn from_rows(record: TransferRecord) -> Result<Self, TransferError> {
        let TransferRecord {
            id,
            package,
            origin,
            destination,
            route,
            ..
        } = record;
        let missing = |what: &str| TransferError::Database {
            source: format!(
                "data transfer {id} has no {what}; its row refers to one that does not exist"
            )
            .into(),
        };
        let package = package.ok_or_else(|| missing("package"))?;
        let origin = origin.ok_or_else(|| missing("origin location"))?;
        let origin = Location::from_row(origin)?;
        let destination = destination.ok_or_else(|| missing("destination location"))?;
        let destination = Location::from_row(destination)?;
        Ok(Self {
            origin,
            destination,
            package: package.into(),
            method: route.map(|route| route.method.unwrap_or_default()),
        })
    }

    /// The link that the copy uses.
    #[must_use]
    pub fn link(&self) -> LinkName {
        LinkName {
            origin: self.origin.site.clone(),
            destination: self.destination.site.clone(),
        }
    }
}

/// Returns the settings of a plan's link according to the settings file alone.
///
/// # Errors
/// [`TransferError::LinkSettings`] if a route in the file cannot be used.
pub(in crate::transfer) fn file_settings(
    settings: &Settings,
    input: &PlanInput,
) -> Result<LinkSettings, TransferError> {
    let LinkName {
        origin,
        destination,
    } = input.link();
    settings
        .link(&origin, &destination)
        .map_err(|problem| TransferError::LinkSettings {
            origin,
            destination,
            problem,
        })
}

impl Location {
    /// Converts a location's row.
    ///
    /// # Errors
    /// [`TransferError::Database`] if the row is incomplete.
    pub(in crate::transfer) fn from_row(row: LocationRecord) -> Result<Self, TransferError> {
        let storage = row.storage_type.known().unwrap_or(StorageType::Disk);
        let incomplete = |what: &str| TransferError::Database {
            source: format!("data location `{}` has no {what}", row.name).into(),
        };
        let site = row
            .site
            .as_ref()
            .ok_or_else(|| incomplete("site"))?
            .short_name
            .clone();
        let (host, root) = match (&row.disk, storage) {
            (Some(disk), _) => (disk.host.clone(), disk.path.clone()),
            (None, StorageType::Disk) => {
                return Err(incomplete(
                    "row in disk_data_location, hence no host and no path",
                ));
            }
            (None, _) => (None, String::new()),
        };
        Ok(Self {
            site,
            name: row.name,
            storage,
            host,
            root,
        })
    }
}

impl From<PackageRecord> for Package {
    fn from(row: PackageRecord) -> Self {
        let size = row.size_bytes.and_then(|bytes| u64::try_from(bytes).ok());
        Self {
            relative_path: row.relative_path,
            file_name: row.file_name,
            // An unrecorded size is later taken from the file, see `attempt::prepare`.
            size: size.unwrap_or(0),
            checksum: row.checksum,
        }
    }
}
