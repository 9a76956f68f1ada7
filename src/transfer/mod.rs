//! The domain: leases, copies with bbcp, verification. Knows nothing of Celery.

pub mod attempt;
pub mod bbcp;
pub mod database;
pub mod digest;
pub mod endpoint;
pub mod error;
pub(crate) mod failures;
pub mod inspection;
pub mod lease;
pub mod link;
mod patience;
mod patterns;
pub mod plan;
pub mod repository;
pub mod retry;
pub mod routing;
pub mod schema;
pub mod service;
pub mod topology;
