//! Metrics of transfers and of the manager.
//!
//! Label values are sites, statuses and error codes of this program and its database, so that they are bounded.

mod table;
mod transfers;

pub use table::TableMetrics;
pub use transfers::{Copying, ManagerMetrics, PassCounts, TransferMetrics};
