//! Tests of leases, transfers, links and the schema on real databases: SQLite, and PostgreSQL if `TEST_POSTGRES_URL`
//! names a server.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

#[path = "../support/ops_db.rs"]
mod ops_db;
#[path = "../support/transfer_rows.rs"]
mod transfer_rows;

mod attempts;
mod connections;
mod digests;
mod leases;
mod links;
mod manager_passes;
mod operators;
mod partials;
mod reading;
mod scheduled_rows;
mod scheduling;
mod schema;
mod seeding;
mod sweep;
