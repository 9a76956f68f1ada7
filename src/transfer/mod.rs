//! The domain: leases, copies with bbcp, verification. Knows nothing of Celery.

pub mod database;
pub mod lease;
pub mod repository;
pub mod schema;
pub mod topology;
