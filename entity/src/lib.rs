//! SeaORM entities: the part of the ops-db that a transfer needs, and this project's own tables.
//!
//! The ops-db belongs to the Python package `ccat_ops_db`, whose source is not public. **All assumptions of this
//! project about its table and column names are in this crate and nowhere else**; the program compares them with the
//! live database when it starts.
//!
//! Models contain only the columns that are read. They are read with casts (`select_as`), because the owner of the
//! schema chooses the exact types: an id can be `integer` or `bigint`, an enum can be a native type or text, and a time
//! can have a time zone or not. The `Optional` enum of a module lists the columns that the live schema may lack.

mod labels;
mod timestamp;

pub mod data_location;
pub mod data_transfer;
pub mod data_transfer_log;
pub mod data_transfer_package;
pub mod data_transfer_route;
pub mod disk_data_location;
pub mod site;
pub mod transfer_worker_action;
pub mod transfer_worker_attempt;
pub mod transfer_worker_delay;
pub mod transfer_worker_digest;
pub mod transfer_worker_lease;
pub mod transfer_worker_link;
pub mod transfer_worker_program;
pub mod transfer_worker_schedule;

pub use labels::{DatabaseEnum, Label, LocationType, PackageState, RouteType, Status, StorageType};
pub use timestamp::{Timestamp, TimestampError};
pub use transfer_worker_action::Action;
pub use transfer_worker_attempt::Outcome;
pub use transfer_worker_digest::FileEnd;

/// Tables of the ops-db that this project uses, in the order in which they can be created (foreign keys).
pub const OPS_DB_TABLES: [&str; 7] = [
    "site",
    "data_location",
    "disk_data_location",
    "data_transfer_route",
    "data_transfer_package",
    "data_transfer",
    "data_transfer_log",
];

/// This project's own tables.
pub const WORKER_TABLES: [&str; 8] = [
    "transfer_worker_lease",
    "transfer_worker_attempt",
    "transfer_worker_delay",
    "transfer_worker_action",
    "transfer_worker_link",
    "transfer_worker_schedule",
    "transfer_worker_digest",
    "transfer_worker_program",
];

/// Table in which Alembic stores the version of a schema. Its existence shows that Alembic manages the ops-db.
pub const ALEMBIC_TABLE: &str = "alembic_version";
